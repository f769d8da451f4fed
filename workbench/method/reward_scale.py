"""Reward scale lambda(t): how strongly the implicit reward counts at each timestep, inside the sigmoid.

Symbols: abar, SNR as in `noise`; T = number of timesteps.

A shape is a raw curve over t; `scale` turns every one the same way into lambda(t) = 1 + rise * norm(curve), norm
being min-max over t, so that with rise = 1 each runs from 1 to 2 as the paper's does. Every shape is
`f(abar, *, ...) -> curve over t, shape (T,)`, any range. Keyword-only arguments are its settings. To add one:
write it and name it in SHAPES.
"""

import math
from collections.abc import Callable
from typing import Annotated

import torch
from annotated_types import Gt
from torch import Tensor

from workbench.method.noise import snr


def constant(abar: Tensor) -> Tensor:
    """lambda(t) = 1: plain Diffusion-DPO."""
    return torch.zeros_like(abar)


def inverse_sqrt_snr(abar: Tensor) -> Tensor:
    """1 / sqrt(SNR(t)): the paper's."""
    return snr(abar).rsqrt()


def power(abar: Tensor, *, exponent: Annotated[float, Gt(0)] = 0.25) -> Tensor:
    """SNR(t)^-exponent.

    Args:
        exponent: 0.5 is the paper's; less rises earlier, more later and steeper.
    """
    return snr(abar) ** -exponent


def linear(abar: Tensor) -> Tensor:
    """Proportional to t."""
    return torch.arange(len(abar), dtype=abar.dtype)


def cosine(abar: Tensor) -> Tensor:
    """Half a cosine: flat at both ends, steepest in the middle."""
    return -torch.cos(torch.linspace(0, math.pi, len(abar), dtype=abar.dtype))


def log_snr(abar: Tensor) -> Tensor:
    """-log SNR(t): even in the logarithm of the noise."""
    return -snr(abar).log()


def min_snr(abar: Tensor, *, clip: Annotated[float, Gt(0)] = 5.0) -> Tensor:
    """min(SNR, clip) / SNR: the min-SNR weight of epsilon prediction (Hang et al. 2023), which saturates.

    Args:
        clip: the SNR below which the curve is flat.
    """
    return snr(abar).clamp(max=clip) / snr(abar)


#: SNR below which every shape is flat. SD1.x and SDXL end at 0.0047, above it; a flow or a zero-terminal-SNR schedule
#: ends at 0, where 1 / sqrt(SNR) is infinite and would leave lambda at 1 everywhere else.
LEAST_SNR = 0.0046


def bounded(abar: Tensor) -> Tensor:
    """abar, (T,), with its SNR kept at or above LEAST_SNR: what shapes are computed from."""
    # SNR = abar / (1 - abar), solved for abar at SNR = LEAST_SNR.
    return abar.clamp(min=LEAST_SNR / (1 + LEAST_SNR))


SHAPES: dict[str, Callable[..., Tensor]] = {
    "constant": constant,
    "inverse_sqrt_snr": inverse_sqrt_snr,
    "power": power,
    "linear": linear,
    "cosine": cosine,
    "log_snr": log_snr,
    "min_snr": min_snr,
}


def scale(curve: Tensor, *, rise: Annotated[float, Gt(-1)] = 1.0, unit_mean: bool = False) -> Tensor:
    """lambda(t) from a shape's curve: 1 + rise * norm(curve).

    Args:
        curve: shape (T,), any range; a constant curve gives lambda = 1.
        rise: how far lambda climbs above 1 where the curve is highest; negative values descend below 1.
        unit_mean: divide by the mean over t, so that the shape does not change the mean strength (the paper does
            not say whether it does).
    Returns:
        lambda(t) > 0, shape (T,), float32.
    """
    low, high = curve.min(), curve.max()
    # A constant curve has no range to divide by.
    lam = 1 + rise * (curve - low) / (high - low) if high > low else torch.ones_like(curve)
    return (lam / lam.mean() if unit_mean else lam).float()
