"""The forward process and the timestep axis.

Symbols: abar_t = product of (1 - beta_s) for s <= t; x_t = sqrt(abar_t) x0 + sqrt(1 - abar_t) eps;
SNR(t) = abar_t / (1 - abar_t); T = number of training timesteps; large t = much noise = early in generation.
"""

from itertools import pairwise

import torch
from torch import Tensor


def snr(abar: Tensor) -> Tensor:
    """Signal-to-noise ratio abar / (1 - abar), same shape, dimensionless."""
    return abar / (1 - abar)


def add_noise(x0: Tensor, eps: Tensor, abar_t: Tensor) -> Tensor:
    """Sample x_t of the forward process (Ho et al. 2020, Eq. 4).

    Args:
        x0, eps: shape (B, ...).
        abar_t: abar at each sample's timestep, shape (B,).
    """
    a = abar_t.view(-1, *[1] * (x0.ndim - 1))
    return a.sqrt() * x0 + (1 - a).sqrt() * eps


def squared_error(prediction: Tensor, target: Tensor) -> Tensor:
    """Squared error of each sample: the mean over its elements, in float32 whatever the inputs are.

    The mean, not the sum, is the unit of every error, reward and divergence here (public Diffusion-DPO code).

    Args:
        prediction, target: shape (B, ...).
    Returns:
        Shape (B,), float32.
    """
    return (prediction.float() - target.float()).square().flatten(1).mean(1)


def bucket_of(t: Tensor, buckets: int, timesteps: int) -> Tensor:
    """Index of the equal timestep interval that holds each t, in 0..buckets-1; bucket 0 has the least noise."""
    return t * buckets // timesteps


def bucket_names(buckets: int, timesteps: int) -> list[str]:
    """Names such as 't000-099', zero-padded so that they sort by timestep."""
    edges = [-(-i * timesteps // buckets) for i in range(buckets + 1)]
    width = len(str(timesteps - 1))
    return [f"t{low:0{width}}-{high - 1:0{width}}" for low, high in pairwise(edges)]


def stratified(draws: Tensor, first_bucket: Tensor, buckets: int, timesteps: int) -> Tensor:
    """Timesteps that visit the buckets in turn: column j of row i lies in bucket (first_bucket_i + j) mod buckets.

    Args:
        draws: uniform in [0, 1), shape (N, D).
        first_bucket: bucket of each row's first column, shape (N,).
    Returns:
        Timesteps, shape (N, D), int64. Over D = buckets columns every row visits every bucket once.
    """
    bucket = (first_bucket[:, None] + torch.arange(draws.shape[1])) % buckets
    return ((bucket + draws.double()) * timesteps / buckets).long().clamp(max=timesteps - 1)
