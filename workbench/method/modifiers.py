"""Modifiers, which go with every objective: they change the errors and lambda(t) that it is given, not its formula.

Symbols: m_w, m_l = policy's mean-per-element squared errors on winner and loser; a, b = its residuals there,
prediction - target; lam = lambda(t).
"""

from typing import Annotated, Literal

import torch
from annotated_types import Ge, Gt, Le
from torch import Tensor

from workbench.method.objectives import Objective, PairErrors


def modified(
    objective: Objective,
    errors: PairErrors,
    lam: Tensor,
    *,
    safeguard: bool = False,
    mu: Annotated[float, Ge(0), Le(1)] = 0.0,
    label: Literal["hard", "soft"] = "hard",
    temperature: Annotated[float, Gt(0)] = 1.0,
) -> Tensor:
    """An objective's loss of each pair, shape (B,), with these modifiers; without any it is the objective's own.

    Args:
        safeguard: scale the loser's gradient so that the winner's error does not grow (Diffusion-SDPO).
        mu: of the safeguard, how much of the winner's descent is kept; 1 leaves no part of a loser's gradient that
            works against the winner.
        label: "hard", the winner is preferred for sure; or "soft", as surely as the difference of the images' stored
            scores says (SmPO-Diffusion), which needs data.scores.
        temperature: of a soft label, the difference of scores at which the winner is preferred with probability 0.73.
    """
    if label == "soft":
        assert errors.gap is not None, "training without scores is refused before it begins"
        lam = softened(lam, errors.gap, temperature)
    return objective(safeguarded(errors, mu) if safeguard else errors, lam)


def softened(lam: Tensor, gap: Tensor, temperature: float) -> Tensor:
    """lambda(t) times 2 p - 1, where p = sigmoid(gap / temperature) is the probability that the winner is preferred.

    The likelihoods of both orders, averaged geometrically with weights p and 1 - p, multiply the implicit reward by
    2 p - 1 (SmPO-Diffusion, Lu et al. 2025, whose public code has 10 (2 p - 1), with p from PickScore). A pair whose
    scores are equal teaches nothing; one whose loser has the higher score is learned the other way round.

    Args:
        gap: the winner's score minus the loser's, (B,), in the scores' own unit.
    """
    # tanh(x / 2) = 2 sigmoid(x) - 1.
    return lam * torch.tanh(gap / (2 * temperature))


def safeguarded(errors: PairErrors, mu: float) -> PairErrors:
    """The same errors, of which the loser's passes only a share of its gradient (Diffusion-SDPO, Fu et al. 2025).

    A step along the model's outputs changes the winner's error by -<a, a> + s <b, a>, where s scales the loser's
    gradient. s = (1 - mu) <a, a> / <b, a>, at most 1, keeps that at or below -mu <a, a> to first order. Where
    <b, a> <= 0 the loser's gradient helps the winner, and s = 1. There is one s for the whole batch of all processes,
    as in the public code, without gradient through it.

    Args:
        mu: 0 to 1. The public code's default is 0; its training scripts take 0.9 for `dpo` and `dmpo` on SD1.5, 0.2
            for `dspo`, and 0.6 on SDXL.
    """
    # Means stand for the sums <a, a> and <b, a> over the batch: in their ratio the number of elements cancels.
    winner, both = errors.mean(errors.policy_w.detach()), errors.mean(errors.residuals)
    # torch.where also computes the branch that it does not take; without a gradient a division by 0 there is harmless.
    share = torch.where(both > 0, ((1 - mu) * winner / both).clamp(max=1), 1.0)
    fixed = errors.policy_l.detach()
    # The bracket is 0: the value stays policy_l, and only the gradient that flows back is multiplied by share.
    return errors._replace(policy_l=fixed + share * (errors.policy_l - fixed))
