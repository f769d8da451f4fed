"""Timestep densities: how often each t is drawn in training.

Symbols: T = number of timesteps; k = index of a step in generation order (0 = noisiest); gamma = discount.

Every density is `f(timesteps, *, ...) -> probabilities over t, shape (T,), float64, summing to 1`. Keyword-only
arguments are its settings. To add one: write it and name it in DENSITIES.
"""

from collections.abc import Callable
from typing import Annotated

import torch
from annotated_types import Gt, Le
from torch import Generator, Tensor

from workbench.errors import UserError


def uniform(timesteps: int) -> Tensor:
    """Every timestep alike."""
    return torch.full((timesteps,), 1 / timesteps, dtype=torch.float64)


def discounted(
    timesteps: int, *, gamma: Annotated[float, Gt(0), Le(1)] = 0.9, grid: Annotated[int, Gt(0)] = 50
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
    if grid > timesteps:
        raise UserError(f"timesteps.grid = {grid}: more cells than the model's {timesteps} timesteps")
    k = torch.arange(timesteps - 1, -1, -1) * grid // timesteps
    share = gamma ** torch.arange(grid, dtype=torch.float64) / torch.bincount(k, minlength=grid)
    return share[k] / share[k].sum()


def draw(density: Tensor, count: int, generator: Generator) -> Tensor:
    """`count` timesteps from a density, shape (count,), int64."""
    return torch.multinomial(density, count, replacement=True, generator=generator)


DENSITIES: dict[str, Callable[..., Tensor]] = {"uniform": uniform, "discounted": discounted}
