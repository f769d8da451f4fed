"""Timestep densities: how often each t is drawn in training.

Symbols: T = number of timesteps; k = index of a step in generation order (0 = noisiest); gamma = discount;
sigma = s / (a + s), the noise's share of x_t = a x0 + s eps, which is flow matching's sigma.

Every density is `f(abar, *, ...) -> probabilities over t, shape (T,), float64, summing to 1`, abar as in `noise`.
Keyword-only arguments are its settings. To add one: write it and name it in DENSITIES.
"""

from collections.abc import Callable
from typing import Annotated

import torch
from annotated_types import Gt, Le
from torch import Generator, Tensor

from workbench.common.errors import UserError
from workbench.method.noise import snr


def uniform(abar: Tensor) -> Tensor:
    """Every timestep alike."""
    return torch.full((len(abar),), 1 / len(abar), dtype=torch.float64)


def uniform_sigma(abar: Tensor) -> Tensor:
    """Every noise level sigma alike: for flow matching, undoes the schedule's shift towards noise."""
    # 1 / (1 + sqrt(SNR)) = sigma. A timestep is drawn in proportion to the piece of sigma that it covers.
    (step,) = torch.gradient(1 / (1 + snr(abar.double()).sqrt()))
    return step / step.sum()


def logit_normal(abar: Tensor, *, location: float = 0.0, spread: Annotated[float, Gt(0)] = 1.0) -> Tensor:
    """Logit-normal over the axis, as SD3 was trained (Esser et al. 2024): the middle more often than both ends.

    On t / T, before the schedule's shift, as diffusers' SD3 script draws it.

    Args:
        location: mean of logit(t / T); above 0 leans to noise (diffusers counts from the noisy end, so flip its sign).
        spread: standard deviation of logit(t / T).
    """
    edges = torch.linspace(0, 1, len(abar) + 1, dtype=torch.float64)
    # The integral over each timestep's cell, which is finite at both ends though logit(0) and logit(1) are not.
    share = torch.special.ndtr((edges.logit() - location) / spread).diff()
    return share / share.sum()


def discounted(
    abar: Tensor, *, gamma: Annotated[float, Gt(0), Le(1)] = 0.9, grid: Annotated[int, Gt(0)] = 50
) -> Tensor:
    """Skewed to early, noisy steps: probability of cell k proportional to gamma^k (paper, "Timestep-aware training").

    The paper does not state the grid on which k counts; the work it cites (Yang, Chen and Zhou 2024) counts
    the 50 steps of a sampler. Each cell's mass is spread evenly over the timesteps it holds.

    Args:
        gamma: discount; 1 is uniform over cells.
        grid: number of cells over the T timesteps, at most T.
    Raises:
        UserError: more cells than timesteps.
    """
    timesteps = len(abar)
    if grid > timesteps:
        raise UserError(f"timesteps.grid = {grid}: more cells than the model's {timesteps} timesteps")
    # The largest t comes first in generation, so it lies in cell 0.
    k = torch.arange(timesteps - 1, -1, -1) * grid // timesteps
    # Cells differ in size by one where the grid does not divide T, hence each cell's own count.
    share = gamma ** torch.arange(grid, dtype=torch.float64) / torch.bincount(k, minlength=grid)
    return share[k] / share[k].sum()


def draw(density: Tensor, count: int, generator: Generator) -> Tensor:
    """`count` timesteps from a density, shape (count,), int64."""
    return torch.multinomial(density, count, replacement=True, generator=generator)


DENSITIES: dict[str, Callable[..., Tensor]] = {
    "uniform": uniform,
    "discounted": discounted,
    "uniform_sigma": uniform_sigma,
    "logit_normal": logit_normal,
}
