"""Preference objectives, as pure functions of four errors.

Symbols: m_w, m_l = policy's mean-per-element squared errors on winner and loser; r_w, r_l = the reference's on
the same noised latents; g = r - m = timestep-wise implicit reward; margin = g_w - g_l; lam = lambda(t).

Every objective is `f(errors, lam, *, ...) -> loss per pair, shape (B,)`. Its keyword-only arguments are its
settings, their annotations the accepted values and their defaults the only defaults. To add one: write it and
name it in OBJECTIVES.
"""

from collections.abc import Callable
from typing import Annotated, NamedTuple

from annotated_types import Gt
from torch import Tensor
from torch.nn.functional import softplus


class PairErrors(NamedTuple):
    """Mean-per-element squared errors of a batch of pairs, each of shape (B,), float32."""

    policy_w: Tensor
    policy_l: Tensor
    reference_w: Tensor
    reference_l: Tensor

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


def dpo(errors: PairErrors, lam: Tensor, *, beta: Annotated[float, Gt(0)] = 300.0) -> Tensor:
    """Diffusion-DPO: -log sigmoid(beta/2 lam margin) (paper Eq. 6, with the factor 1/2 of the public code).

    Args:
        lam: lambda(t) of each pair, shape (B,).
        beta: dimensionless; its scale assumes mean-per-element errors, T folded in. The paper's is 5000 for SD1.5.
    Returns:
        Loss, shape (B,); log 2 where policy and reference agree.
    """
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


Objective = Callable[[PairErrors, Tensor], Tensor]
OBJECTIVES: dict[str, Callable[..., Tensor]] = {"dpo": dpo, "ipo": ipo, "sft": sft}
