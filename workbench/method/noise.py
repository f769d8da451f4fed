"""The forward process and the timestep axis, for diffusion and for flow matching alike.

Symbols: x_t = a_t x0 + s_t eps, a = signal, s = noise; diffusion: a = sqrt(abar), s = sqrt(1 - abar), abar_t = product
of (1 - beta_s) for s <= t; flow matching: a = 1 - sigma, s = sigma. SNR(t) = (a_t / s_t)^2, in both.
T = number of training timesteps. t = 0..T-1 is a place on the axis, ordered by noise in every family: large t = much
noise = early in generation. What a model is told of t is `time[t]`.
"""

from dataclasses import dataclass
from itertools import pairwise

import torch
from torch import Tensor


def snr(abar: Tensor) -> Tensor:
    """Signal-to-noise ratio abar / (1 - abar), same shape, dimensionless."""
    return abar / (1 - abar)


@dataclass(frozen=True)
class ForwardProcess:
    """How images are noised and what a model of them predicts, at each t; every field has shape (T,).

    Attributes:
        signal, noise: x_t = signal x0 + noise eps.
        of_x0, of_eps: the prediction's target = of_x0 x0 + of_eps eps.
        time: what the model is told of t.
    """

    signal: Tensor
    noise: Tensor
    of_x0: Tensor
    of_eps: Tensor
    time: Tensor

    def __len__(self) -> int:
        return len(self.signal)

    @property
    def abar(self) -> Tensor:
        """a^2 / (a^2 + s^2), (T,): diffusion's abar, and for flow matching the one of equal SNR."""
        return self.signal.square() / (self.signal.square() + self.noise.square())

    def x_t(self, x0: Tensor, eps: Tensor, t: Tensor) -> Tensor:
        """Sample of the forward process (Ho et al. 2020, Eq. 4; Esser et al. 2024, Eq. 1).

        Args:
            x0, eps: shape (B, ...).
            t: shape (B,).
        """
        return _at(self.signal, t, x0) * x0 + _at(self.noise, t, x0) * eps

    def target(self, x0: Tensor, eps: Tensor, t: Tensor) -> Tensor:
        """What the model is to predict at x_t; shapes as in `x_t`."""
        return _at(self.of_x0, t, x0) * x0 + _at(self.of_eps, t, x0) * eps

    def to(self, device: torch.device | str) -> "ForwardProcess":
        """The same process with its tensors on another device."""
        return ForwardProcess(*(x.to(device) for x in (self.signal, self.noise, self.of_x0, self.of_eps, self.time)))


def _at(values: Tensor, t: Tensor, like: Tensor) -> Tensor:
    """Values at timesteps t, (B,), shaped (B, 1, ...) so that they multiply a tensor of the shape of `like`."""
    return values[t].view(-1, *[1] * (like.ndim - 1))


def diffusion(abar: Tensor, predicts: str = "epsilon") -> ForwardProcess:
    """The variance-preserving process of SD1.x, SD2.x and SDXL.

    Args:
        abar: falling over t, (T,).
        predicts: "epsilon", or "v_prediction": a eps - s x0 (Salimans and Ho 2022).
    Raises:
        KeyError: it predicts something else.
    """
    signal, noise = abar.sqrt(), (1 - abar).sqrt()
    one, zero = torch.ones_like(abar), torch.zeros_like(abar)
    # Targets as curves over t, so that nothing downstream asks what a model predicts.
    of_x0, of_eps = {"epsilon": (zero, one), "v_prediction": (-noise, signal)}[predicts]
    return ForwardProcess(signal, noise, of_x0, of_eps, torch.arange(len(abar), device=abar.device))


def flow(sigma: Tensor, time: Tensor) -> ForwardProcess:
    """The straight path of SD3, whose velocity eps - x0 is predicted (Esser et al. 2024).

    Args:
        sigma: rising over t to at most 1, (T,); diffusers keeps it falling.
        time: what the model is told, 1000 sigma in diffusers, (T,).
    """
    one = torch.ones_like(sigma)
    return ForwardProcess(1 - sigma, sigma, -one, one, time)


def squared_error(prediction: Tensor, target: Tensor) -> Tensor:
    """Squared error of each sample: the mean over its elements, in float32 whatever the inputs are.

    The mean, not the sum, is the unit of every error, reward and divergence here (public Diffusion-DPO code).

    Args:
        prediction, target: shape (B, ...).
    Returns:
        Shape (B,), float32.
    """
    # float32 before the subtraction: rewards are small differences of such errors, and bfloat16 would round them away.
    return (prediction.float() - target.float()).square().flatten(1).mean(1)


def residual_product(prediction: Tensor, target: Tensor) -> Tensor:
    """Mean over elements of the product of the residuals of each pair's winner and loser; no gradient.

    Args:
        prediction, target: winners, then losers, shape (2B, ...).
    Returns:
        Shape (B,), float32; the squared error where winner and loser are the same.
    """
    winner, loser = (prediction.detach().float() - target.float()).chunk(2)
    return (winner * loser).flatten(1).mean(1)


def bucket_of(t: Tensor, buckets: int, timesteps: int) -> Tensor:
    """Index of the equal timestep interval that holds each t, in 0..buckets-1; bucket 0 has the least noise."""
    return t * buckets // timesteps


def bucket_names(buckets: int, timesteps: int) -> list[str]:
    """Names such as 't000-099', zero-padded so that they sort by timestep."""
    # Rounded up: the first t for which `bucket_of`, which rounds down, gives bucket i. Both must agree on every t.
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
    # In float32 a draw just below 1 would round up into the next bucket; the clamp keeps the last one below T.
    return ((bucket + draws.double()) * timesteps / buckets).long().clamp(max=timesteps - 1)
