"""How the reference model moves during training.

Symbols: tau = `interval`; D = divergence from the pretrained model on the fixed probe (paper Eq. 8);
delta = its threshold. A rule is `f(*, ...) -> Rule`; to add one that is a setting of `Rule`, write it and name
it in RULES.
"""

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Annotated, Any, Literal, NamedTuple

import torch
from annotated_types import Ge, Gt, Le
from torch import Tensor, nn

from workbench.common.distributed import load, local, weights


@dataclass(frozen=True)
class Rule:
    """When the reference moves, how far, and what stops it.

    Attributes:
        interval: optimizer steps between candidate updates; 0 = never.
        rate: how far towards the policy, 1 = hard copy.
        delta: largest divergence that the reference may reach.
        on_exceed: "freeze" for good, or "reinit" to the pretrained weights and go on.
        sigmas: largest divergence that it may reach, in standard errors of the probe's estimate.
        measured: steps between candidates whose divergence is measured; the others are taken unseen.
    """

    interval: int = 0
    rate: float = 1.0
    delta: float = math.inf
    on_exceed: str = "freeze"
    sigmas: float = math.inf
    measured: int = 1

    @property
    def is_bounded(self) -> bool:
        """Whether a candidate can be refused."""
        return self.delta < math.inf or self.sigmas < math.inf

    def refuses(self, candidate: "Divergence") -> bool:
        """Whether a candidate has gone too far."""
        beyond = candidate.error_difference
        # A divergence of exactly delta is still within (docs/method.md: "at or below").
        return beyond > self.delta or (self.sigmas < math.inf and beyond > self.sigmas * candidate.error)


Interval = Annotated[int, Gt(0)]
Rate = Annotated[float, Gt(0), Le(1)]


def frozen() -> Rule:
    """The reference stays the pretrained model: plain Diffusion-DPO."""
    return Rule()


def update(*, interval: Interval = 8, rate: Rate = 1.0) -> Rule:
    """Every `interval` steps the reference moves to the policy, however far it has gone (paper, no regularisation).

    Args:
        interval: optimizer steps between updates, the paper's tau.
        rate: how far the reference moves towards the policy; 1 is a hard copy, as in the paper.
    """
    return Rule(interval, rate)


def threshold(
    *,
    interval: Interval = 8,
    rate: Rate = 1.0,
    delta: Annotated[float, Ge(0)] = 0.005,
    on_exceed: Literal["freeze", "reinit"] = "freeze",
) -> Rule:
    """As `update`, but a candidate whose divergence exceeds `delta` is refused (paper, "Regularisation").

    Args:
        delta: largest divergence of the reference, paper's Eq. 8, mean-per-element units (SD1.5: 0.005).
        on_exceed: "freeze" for good, or "reinit" to the pretrained weights and go on.
    """
    return Rule(interval, rate, delta, on_exceed)


def noise(*, interval: Interval = 8, rate: Rate = 1.0, sigmas: Annotated[float, Gt(0)] = 3.0) -> Rule:
    """As `threshold`, with the bound taken from the data: the reference may go as far as the probe can hardly see.

    A candidate is refused for good once its divergence exceeds `sigmas` standard errors of its own estimate, that is
    once it is certain to lie beyond the pretrained model. Ours, not the paper's, which sets delta by hand.

    Args:
        sigmas: standard errors; a larger probe sees smaller divergences, so the bound falls with its size's root.
    """
    return Rule(interval, rate, sigmas=sigmas)


def ema(*, rate: Rate = 0.01, measured: Interval = 16) -> Rule:
    """The reference is an exponential moving average of the policy: it moves a little at every step, unhindered.

    With the objective `linear` this is Linear-DPO (2026). Its rate and its beta are not known to us: both are ours.

    Args:
        rate: how far the reference moves towards the policy at every step, 1 - the average's decay.
        measured: optimizer steps between measurements of the reference's divergence, each of which costs as much as a
            step or more.
    """
    return Rule(interval=1, rate=rate, measured=measured)


RULES: dict[str, Callable[..., Rule]] = {
    "frozen": frozen,
    "update": update,
    "threshold": threshold,
    "noise": noise,
    "ema": ema,
}


class Divergence(NamedTuple):
    """A model's distance from the pretrained one on the probe.

    Attributes:
        error_difference: paper's Eq. 8, the mean over the probe.
        kernel_kl: mean square of the difference of the two predictions.
        error: standard error of `error_difference`, over the probe's images.
    """

    error_difference: float
    kernel_kl: float
    error: float = 0.0


class Decision(NamedTuple):
    """What became of one candidate update: a row of the audit table."""

    step: int
    divergence: float
    kernel_kl: float
    decision: str


@dataclass
class Reference:
    """The reference model and its history.

    Attributes:
        model: the reference; never trained.
        rule: when and how it moves.
        measure: divergence of a model from the pretrained one, on the fixed probe.
        pretrained: returns the pretrained parameters by name (read back from disk: no third copy stays in memory).
    """

    model: nn.Module
    rule: Rule
    measure: Callable[[nn.Module], Divergence]
    pretrained: Callable[[], dict[str, Tensor]]
    divergence: Divergence = field(default_factory=lambda: Divergence(0.0, 0.0))
    updates: int = 0
    frozen: bool = False
    audit: list[Decision] = field(default_factory=list)

    def __post_init__(self) -> None:
        # `after_step` looks at `frozen` first, so that it never divides by an interval of 0.
        self.frozen = self.rule.interval == 0

    def after_step(self, step: int, policy: nn.Module) -> Decision | None:
        """Consider an update after optimizer step `step` (counted from 1).

        A candidate above delta is refused *before* the reference moves, so the reference never lies beyond delta.

        Returns:
            The decision, or None where none was due or its divergence was not measured.
        Raises:
            FloatingPointError: the candidate's divergence is not finite.
        """
        if self.frozen or step % self.rule.interval:
            return None
        # Taken without a measurement; `divergence` keeps what was last measured until the next one.
        if step % self.rule.measured:
            self._move(policy)
            self.updates += 1
            return None
        candidate, undo = policy, dict[str, Tensor]()
        if self.rule.rate < 1:  # the candidate is a mixture: make it in place, keep the way back off the device
            if self.rule.is_bounded:
                undo = {name: value.detach().cpu().clone() for name, value in self.model.named_parameters()}
            self._move(policy)
            candidate = self.model
        found = self.measure(candidate)
        # Every comparison with NaN is false, so that `refuses` would let a candidate of NaN pass.
        if not math.isfinite(found.error_difference):
            raise FloatingPointError(f"step {step}: not finite (divergence = {found.error_difference})")
        if not self.rule.refuses(found):
            # A hard copy is judged by the policy itself, which it would equal; a mixture is in the model already.
            if candidate is policy:
                self._move(policy)
            self.divergence, self.updates, verdict = found, self.updates + 1, "update"
        elif self.rule.on_exceed == "reinit":
            load(self.model, self.pretrained())
            # The reference is the pretrained model again: 0 by definition, whatever the refused candidate had.
            self.divergence, verdict = Divergence(0.0, 0.0), "reinit"
        else:
            # At rate 1 the reference has not been touched, and there is nothing to undo.
            if undo:
                load(self.model, undo)
            self.frozen, verdict = True, "freeze"
        self.audit.append(Decision(step, found.error_difference, found.kernel_kl, verdict))
        return self.audit[-1]

    def state(self) -> dict[str, Any]:
        """Weights and history, as plain values and tensors in one piece."""
        return {
            "weights": weights(self.model),
            # Plain tuples: a snapshot is read as tensors and plain values alone, and no class of ours is one.
            "divergence": tuple(self.divergence),
            "updates": self.updates,
            "frozen": self.frozen,
            "audit": [tuple(decision) for decision in self.audit],
        }

    def load(self, state: Mapping[str, Any]) -> None:
        """Take over weights and history that `state` returned."""
        load(self.model, state["weights"])
        self.divergence, self.updates, self.frozen = Divergence(*state["divergence"]), state["updates"], state["frozen"]
        self.audit = [Decision(*decision) for decision in state["audit"]]

    @torch.no_grad()
    def _move(self, policy: nn.Module) -> None:
        """Move the reference towards the policy, as far as the rule's rate says."""
        # Both models are sharded alike, so each process moves its own shards and nothing is gathered.
        ours, theirs = ([local(p) for p in model.parameters()] for model in (self.model, policy))
        if self.rule.rate == 1:
            # Not lerp with weight 1: at this rate the reference may be stored in half precision, and copying casts.
            torch._foreach_copy_(ours, theirs)
        else:
            torch._foreach_lerp_(ours, theirs, self.rule.rate)
