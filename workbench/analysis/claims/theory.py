"""Two statements of the paper that need no diffusion model, as experiments on small ones.

Symbols: f = logits, V of them; K = Lipschitz constant of f in its parameters; T = length of a response; x_t, abar,
eps as in `noise`; eps_m, eps_init = noise predicted by a model and by the pretrained one.
"""

import math
from typing import NamedTuple

import torch
from torch import Generator, Tensor

from workbench.method.noise import diffusion, squared_error


class MarginGradients(NamedTuple):
    """Gradient norms of the margin of two responses, one a scale of the parameters: softmax model and squared error."""

    scales: Tensor
    softmax: Tensor
    bound: float
    squared: Tensor


def margin_gradients(
    seed: int, *, vocabulary: int = 32, length: int = 8, width: int = 16, scales: int = 9
) -> MarginGradients:
    """How large the margin's gradient gets as the parameters grow by factors 1 to 10^4 (paper, Theorem 1).

    Softmax: token t of a response has logits f = W h_t, h_t a fixed random feature of its context; the margin is
    log p(y) - log p(y') of two random responses of equal length. d f / d W has norm |h_t| <= K in every direction,
    and d log p(y_t) / d f = e_{y_t} - softmax(f) has norm at most sqrt 2, so each token adds at most sqrt 2 K and
    the margin's gradient is at most 2 sqrt 2 K T whatever W is. Squared error: the same features and maps with
    mean-per-element errors |z_t - W h_t|^2 to random targets z_t instead of log-probabilities; nothing bounds it.

    Returns:
        scales (S,), gradient norms (S,) of both margins, and the bound 2 sqrt 2 K T.
    """
    generator = Generator().manual_seed(seed)
    draw = lambda *shape: torch.randn(*shape, generator=generator, dtype=torch.float64)  # noqa: E731
    features = draw(2, length, width)
    responses = torch.randint(vocabulary, (2, length), generator=generator)
    targets, direction = draw(2, length, vocabulary), draw(vocabulary, width) / math.sqrt(width)
    bound = 2 * math.sqrt(2) * features.norm(dim=-1).max().item() * length
    factors = torch.logspace(0, 4, scales, dtype=torch.float64)
    softmax, squared = [], []
    for factor in factors:
        weight = (factor * direction).requires_grad_(True)
        logits = features @ weight.T
        score = logits.log_softmax(-1).gather(-1, responses[..., None]).sum((-1, -2))
        # The graph is kept, since both margins are computed from the same logits.
        softmax.append(torch.autograd.grad(score[0] - score[1], weight, retain_graph=True)[0].norm())
        error = (targets - logits).square().mean(-1).sum(-1)
        # An error is a negative reward, so winner and loser change places.
        squared.append(torch.autograd.grad(error[1] - error[0], weight)[0].norm())
    return MarginGradients(factors, torch.stack(softmax), bound, torch.stack(squared))


class DivergenceForms(NamedTuple):
    """Eq. 8 and the kernel KL of one model, means over the same draws."""

    error_difference: float
    kernel_kl: float


def gaussian_divergences(
    seed: int, abar: Tensor, *, optimal: bool = True, variance: float = 0.5, size: int = 16, draws: int = 50_000
) -> DivergenceForms:
    """Both forms of the divergence where the optimal denoiser is known: x0 ~ N(0, variance), elements independent.

    There E[eps | x_t] = sqrt(1 - abar) / (abar variance + 1 - abar) x_t. The model's prediction is that one plus a
    random linear map of x_t. With the optimal denoiser as the pretrained model, Eq. 8 and the kernel KL have the
    same expectation; with one that predicts too little by a fifth they have not.

    Args:
        abar: the schedule, (T,); timesteps are drawn evenly from it.
        optimal: whether the pretrained model is the optimal denoiser.
        size: elements of a sample.
    """
    generator = Generator().manual_seed(seed)
    draw = lambda *shape: torch.randn(*shape, generator=generator, dtype=torch.float64)  # noqa: E731
    t = torch.randint(len(abar), (draws,), generator=generator)
    abar_t, eps = abar.double()[t], draw(draws, size)
    x_t = diffusion(abar.double()).x_t(math.sqrt(variance) * draw(draws, size), eps, t)
    gain = ((1 - abar_t).sqrt() / (abar_t * variance + 1 - abar_t))[:, None]
    init = gain * x_t * (1.0 if optimal else 0.8)
    model = init + 0.1 * gain * x_t @ draw(size, size) / math.sqrt(size)
    difference = squared_error(model, eps) - squared_error(init, eps)
    return DivergenceForms(difference.mean().item(), squared_error(model, init).mean().item())
