"""Preference objectives, as pure functions of a few numbers a pair.

Symbols: m_w, m_l = policy's mean-per-element squared errors on winner and loser; r_w, r_l = the reference's on
the same noised latents; g = r - m = timestep-wise implicit reward; margin = g_w - g_l; d_w = mean square of
eps_policy - eps_reference on the winner; a, b = the policy's residuals, prediction - target, on winner and loser;
lam = lambda(t), which multiplies the implicit reward.

Every objective is `f(errors, lam, *, ...) -> loss per pair, shape (B,)`; the trainer takes the mean over pairs.
Its keyword-only arguments are its settings, their annotations the accepted values and their defaults the only
defaults. To add one: write it and name it in OBJECTIVES. What goes with every objective is in `modifiers`.

`beta` is in the units of mean-per-element errors with T folded in. The public codes disagree about a factor 1/2:
Diffusion-DPO's and DSPO's logit is beta/2 times the margin, Diffusion-KTO's is beta times the reward, IPO's target
margin is 1/(2 beta) in diffusers' DPO example; each function follows the code of its own method.
"""

import math
from collections.abc import Callable
from typing import Annotated, NamedTuple

import torch
from annotated_types import Gt, Lt
from torch import Tensor
from torch.nn.functional import logsigmoid, softplus


class PairErrors(NamedTuple):
    """Mean-per-element squared errors of a batch of pairs, each of shape (B,), float32.

    Attributes:
        policy_w, policy_l, reference_w, reference_l: to the noise that was added.
        distance_w: between the two models' predictions on the winner.
        residuals: mean over elements of a b, the policy's residuals on winner and loser; no gradient.
        mean: of a tensor over the whole batch, of which a process may hold a part only; for objectives that are no
            mean over pairs, such as `kto`.
        gap: the winner's score minus the loser's, (B,), where the data's scores are read.
    """

    policy_w: Tensor
    policy_l: Tensor
    reference_w: Tensor
    reference_l: Tensor
    distance_w: Tensor
    residuals: Tensor
    mean: Callable[[Tensor], Tensor] = torch.mean
    gap: Tensor | None = None

    @property
    def reward_w(self) -> Tensor:
        """Implicit reward of the winners, r_w - m_w: positive where the policy denoises better."""
        return self.reference_w - self.policy_w

    @property
    def reward_l(self) -> Tensor:
        """Implicit reward of the losers, r_l - m_l."""
        return self.reference_l - self.policy_l

    @property
    def margin(self) -> Tensor:
        """reward_w - reward_l."""
        return self.reward_w - self.reward_l


def accuracy(margin: Tensor) -> Tensor:
    """1 where the winner's implicit reward is larger, 0 where the loser's is, 1/2 where they are equal; shape (B,)."""
    # Ties do occur: right after a hard copy policy and reference agree, and every margin is exactly 0.
    return (margin > 0).float() + 0.5 * (margin == 0).float()


def dpo(errors: PairErrors, lam: Tensor, *, beta: Annotated[float, Gt(0)] = 300.0) -> Tensor:
    """Diffusion-DPO: -log sigmoid(beta/2 lam margin) (paper Eq. 6, with the factor 1/2 of the public code).

    Args:
        lam: lambda(t) of each pair, shape (B,).
        beta: dimensionless; its scale assumes mean-per-element errors, T folded in. The paper's is 5000 for SD1.5.
    Returns:
        Loss, shape (B,); log 2 where policy and reference agree.
    """
    # softplus(-x) = -log sigmoid(x), but stays finite where sigmoid(x) underflows to 0.
    return softplus(-0.5 * beta * lam * errors.margin)


def ipo(errors: PairErrors, lam: Tensor, *, beta: Annotated[float, Gt(0)] = 300.0) -> Tensor:
    """IPO: (lam margin - 1/(2 beta))^2 (Azar et al. 2023, in the diffusion units of diffusers' DPO example).

    Args:
        beta: 1/(2 beta) is the margin aimed at.
    Returns:
        Loss, shape (B,); 1/(4 beta^2) where policy and reference agree.
    """
    return (lam * errors.margin - 1 / (2 * beta)).square()


def sft(errors: PairErrors, lam: Tensor) -> Tensor:
    """Supervised fine-tuning on the winners: their denoising error; the reference and lambda(t) play no part."""
    return errors.policy_w


def linear(errors: PairErrors, lam: Tensor, *, beta: Annotated[float, Gt(0)] = 300.0) -> Tensor:
    """DPO with a linear utility: -beta/2 lam margin, its slope where DPO's is largest, without saturation.

    Nothing in it stops the margin's growth (the utilities of Diffusion-KTO's paper, risk-neutral case).

    Returns:
        Loss, shape (B,); 0 where policy and reference agree; unbounded below.
    """
    return -0.5 * beta * lam * errors.margin


def kto(errors: PairErrors, lam: Tensor, *, beta: Annotated[float, Gt(0)] = 150.0) -> Tensor:
    """Diffusion-KTO: mean of 1 - sigmoid(beta (lam g_w - z)) and 1 - sigmoid(-beta (lam g_l - z)) (Li et al. 2024).

    z = max(batch mean of lam g over winners and losers, 0), without gradient. Both sides weigh 1, as in the public
    code; there the images of a batch are unpaired, here winner and loser share t and eps like everywhere.

    Args:
        beta: no factor 1/2: 150 makes the sigmoid's argument DPO's at 300. The public SD1.5 setting is 1000.
    Returns:
        Loss, shape (B,); 1/2 where policy and reference agree.
    """
    reward_w, reward_l = lam * errors.reward_w, lam * errors.reward_l
    # errors.mean and not torch.mean: the baseline is of the batch of all processes, however it is divided among them.
    z = errors.mean(torch.cat([reward_w, reward_l]).detach()).clamp(min=0)
    return 0.5 * (torch.sigmoid(-beta * (reward_w - z)) + torch.sigmoid(beta * (reward_l - z)))


def dspo(errors: PairErrors, lam: Tensor, *, beta: Annotated[float, Gt(0)] = 0.5) -> Tensor:
    """DSPO: the winner's score matched to that of the preferred distribution (Zhu et al. 2025).

    The preferred distribution is proportional to p(x) sigmoid(logit), so that its score is the data's plus
    (1 - sigmoid(logit)) beta (score - reference score). With score = -eps / sqrt(1 - abar) the loss is the mean
    square of eps_policy - eps - k (eps_policy - eps_reference), k = beta lam (1 - sigmoid(beta/2 lam margin)),
    here multiplied out into errors: (1 - k) m_w + k r_w - k (1 - k) d_w. The gradient flows through k too, as in
    the public code for SD1.5 (Diffusion-SDPO's repository; its SDXL branch is another, heuristic, loss).

    Args:
        beta: k = beta lam / 2 at the start; above 2 / lam the policy is driven away from the noise. The public
            setting for SD1.5 is 0.001, which is SFT but for rounding.
    Returns:
        Loss, shape (B,); m_w where policy and reference agree.
    """
    k = beta * lam * torch.sigmoid(-0.5 * beta * lam * errors.margin)
    return (1 - k) * errors.policy_w + k * errors.reference_w - k * (1 - k) * errors.distance_w


def dmpo(
    errors: PairErrors,
    lam: Tensor,
    *,
    beta: Annotated[float, Gt(0)] = 300.0,
    alpha: Annotated[float, Gt(0), Lt(1)] = 0.01,
) -> Tensor:
    """DMPO: KL(p || q) of p = sigmoid(beta/2 lam margin) from q = 1 - alpha, the reverse of DPO's KL (Li et al. 2025).

    As in the public code of Diffusion-SDPO. Least where p = q, so that a margin can grow too far, as in IPO.

    Args:
        beta: as in `dpo`; the public setting for SD1.5 is 2000.
        alpha: share of labels that are taken to be wrong; 0.01 in the public training scripts.
    Returns:
        Loss, shape (B,); -log(4 alpha (1 - alpha)) / 2 where policy and reference agree.
    """
    logit = 0.5 * beta * lam * errors.margin
    # p log(p / q) + (1 - p) log((1 - p) / (1 - q)); 1 - p is sigmoid(-logit), which stays exact where p is near 1.
    for_w = logsigmoid(logit).sub(math.log1p(-alpha)) * torch.sigmoid(logit)
    return for_w + logsigmoid(-logit).sub(math.log(alpha)) * torch.sigmoid(-logit)


def mapo(
    errors: PairErrors,
    lam: Tensor,
    *,
    beta: Annotated[float, Gt(0)] = 0.1,
    steepness: Annotated[float, Gt(0)] = 0.5,
    factor: Annotated[float, Gt(0)] = 1000.0,
) -> Tensor:
    """MaPO: m_w - beta log sigmoid(T lam (h(m_w) - h(m_l))), h(m) = s m / (exp(s m) - 1) (Hong et al. 2024).

    Needs no reference: whatever the reference does changes nothing. h falls from 1 with the error.

    Args:
        beta: weight of the preference term against the winners' error.
        steepness: s, 0.5 in the public code.
        factor: T, 1000 in the public code.
    Returns:
        Loss, shape (B,); m_w + beta log 2 where both errors are equal.
    """
    # expm1, since exp(m) - 1 loses its digits for a small error m.
    h_w, h_l = (m / torch.expm1(m) for m in (steepness * errors.policy_w, steepness * errors.policy_l))
    return errors.policy_w - beta * logsigmoid(factor * lam * (h_w - h_l))


Objective = Callable[[PairErrors, Tensor], Tensor]
OBJECTIVES: dict[str, Callable[..., Tensor]] = {
    "dpo": dpo,
    "ipo": ipo,
    "sft": sft,
    "linear": linear,
    "kto": kto,
    "dspo": dspo,
    "dmpo": dmpo,
    "mapo": mapo,
}
