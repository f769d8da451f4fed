"""The training loop: a generator of step records. It knows tensors and functions, no names of methods.

On several processes each has its part of every batch, and the record is of the whole.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import NamedTuple

import torch
from torch import Generator, Tensor, nn

from workbench.common import distributed
from workbench.data.pairs import Batch
from workbench.method.noise import ForwardProcess, residual_product, squared_error
from workbench.method.objectives import Objective, PairErrors, accuracy
from workbench.method.reference import Decision, Reference
from workbench.method.timesteps import draw

#: Prediction of (denoiser, x_t, t, condition).
Denoise = Callable[[nn.Module, Tensor, Tensor, Mapping[str, Tensor]], Tensor]


@dataclass(frozen=True)
class StepRecord:
    """What one optimizer step showed.

    Attributes:
        values: scalars still on the device, detached, in the order of NAMES; reading them waits for the device.
        decision: what became of the reference's candidate; None where none was due.
    """

    NAMES = (
        "train/loss",
        "train/grad_norm",
        "rewards/margins",
        "rewards/accuracies",
        "rewards/chosen",
        "rewards/rejected",
        "train/error_winner",
        "train/error_loser",
    )
    step: int
    values: Tensor
    lr: float
    decision: Decision | None = None


#: Names of the numbers that `as_floats` returns for each record.
STEP_METRICS = (*StepRecord.NAMES, "train/lr")


class Noised(NamedTuple):
    """What a denoiser is given and is to predict of a batch: winners, then losers, (2B, ...)."""

    x_t: Tensor
    t: Tensor
    condition: Mapping[str, Tensor]
    target: Tensor


def noised(batch: Batch, t: Tensor, eps: Tensor, process: ForwardProcess, perturbation: Tensor | None = None) -> Noised:
    """A batch at timesteps t, (B,), with noise eps, (B, C, H, W); winner and loser share both.

    Args:
        perturbation: added to the noise of x_t, but not to the target, (B, C, H, W).
    """
    t, eps, x0 = torch.cat([t, t]), torch.cat([eps, eps]), torch.cat([batch.x_w, batch.x_l])
    condition = {name: torch.cat([x, x]) for name, x in batch.condition.items()}
    seen = eps if perturbation is None else eps + torch.cat([perturbation, perturbation])
    return Noised(process.x_t(x0, seen, t), t, condition, process.target(x0, eps, t))


def pair_errors(
    denoise: Denoise,
    policy: nn.Module,
    reference: nn.Module,
    batch: Batch,
    t: Tensor,
    eps: Tensor,
    process: ForwardProcess,
    perturbation: Tensor | None = None,
) -> PairErrors:
    """Errors of policy and reference on a batch; winner and loser share t and eps and go through in one call.

    Args:
        t: timesteps, (B,).
        eps: noise, (B, C, H, W).
        process: forward process and target, on the device.
        perturbation: as `noised` takes it.
    """
    x_t, t, condition, target = noised(batch, t, eps, process, perturbation)
    with torch.no_grad():  # before the policy's, whose activations wait for the backward pass
        predicted_reference = denoise(reference, x_t, t, condition)
    predicted = denoise(policy, x_t, t, condition)
    # Of the winners alone, which come first in the batch.
    distance_w = squared_error(predicted.chunk(2)[0], predicted_reference.chunk(2)[0])
    policy_w, policy_l = squared_error(predicted, target).chunk(2)
    reference_w, reference_l = squared_error(predicted_reference, target).chunk(2)
    residuals = residual_product(predicted, target)
    parts = (policy_w, policy_l, reference_w, reference_l, distance_w, residuals)
    return PairErrors(*parts, mean=distributed.mean_of, gap=batch.gap)


def train(
    policy: nn.Module,
    reference: Reference,
    batches: Iterator[Batch],
    *,
    denoise: Denoise,
    objective: Objective,
    process: ForwardProcess,
    density: Tensor,
    lam: Tensor,
    optimizer: torch.optim.Optimizer,
    schedule: torch.optim.lr_scheduler.LRScheduler,
    scaler: torch.amp.GradScaler,
    steps: int,
    accumulation: int,
    clip: float,
    generator: Generator,
    noise_offset: float = 0.0,
    input_perturbation: float = 0.0,
    done: int = 0,
    check_every: int = 1,
) -> Iterator[StepRecord]:
    """Preference optimisation, one record an optimizer step, yielded after the step and the reference's move.

    Args:
        policy: as `distributed.wrap` returns it.
        batches: of this process.
        objective: loss of each pair from (errors, lambda(t)).
        process, lam: over t, on the device, (T,).
        density: probabilities over t, on the CPU, (T,).
        scaler: of the loss, for float16; a disabled one does nothing.
        generator: CPU generator of timesteps and noise, so that devices and numbers of processes draw alike.
        noise_offset: how strongly noise that is alike over each channel of an image is added to the noise.
        input_perturbation: how much other noise is added to that of x_t, but not to the target (Ning et al. 2023).
        done: steps that were taken before, by a run that this one goes on with.
        check_every: steps between looks for non-finite numbers (each one waits for the device).
    Raises:
        FloatingPointError: a loss, gradient or error is not finite; names the step and the numbers.
    """
    unchecked: list[StepRecord] = []
    # DDP's wrapper puts `module.` before names; the reference and the clipping need the model's own parameters.
    weights = distributed.bare(policy)
    for step in range(done + 1, steps + 1):
        summaries = []
        for micro_step in range(1, accumulation + 1):
            batch = next(batches)
            t, eps = draw_noise(batch.x_w, density, generator)
            # Drawn only where it is set, so that a run without it draws the same numbers as before the setting existed.
            if noise_offset:
                eps = eps + noise_offset * _drawn_like(batch.x_w[..., :1, :1], generator)
            perturbation = input_perturbation * _drawn_like(batch.x_w, generator) if input_perturbation else None
            # Gradients of several processes are averaged once a step, in the last of its passes, not in each.
            with distributed.gradients(policy, shared=micro_step == accumulation):
                errors = pair_errors(denoise, policy, reference.model, batch, t, eps, process, perturbation)
                loss = objective(errors, lam[t]).mean()
                # backward() adds gradients up; divided, their sum is the gradient of the mean over the passes.
                scaler.scale(loss / accumulation).backward()
            summaries.append(_summary(loss, errors))
        # Before clipping, whose limit is one of the true gradient and not of the scaled loss's.
        scaler.unscale_(optimizer)
        # With fsdp the norm is a sharded tensor as the gradients are.
        grad_norm = distributed.whole(nn.utils.clip_grad_norm_(weights.parameters(), clip))
        # Read before schedule.step(): the rate of this step, not of the next.
        lr = float(schedule.get_last_lr()[0])
        scaler.step(optimizer)  # float16: a step whose gradients overflow is left out and the scale halved
        scaler.update()
        schedule.step()
        optimizer.zero_grad(set_to_none=True)  # here, so that what is measured between steps has their memory
        # The gradient norm is of averaged gradients and alike on all processes; the summaries are of each one's part.
        loss_mean, *rest = distributed.mean(torch.stack(summaries).mean(0))
        record = StepRecord(step, torch.stack([loss_mean, grad_norm.detach(), *rest]), lr)
        unchecked.append(record)
        # Before the reference may take over weights that are not finite.
        if step % check_every == 0 or step == steps:
            _require_finite(unchecked, overflow=scaler.is_enabled() and scaler.get_scale() >= 1)
            unchecked.clear()
        yield replace(record, decision=reference.after_step(step, weights))


def draw_noise(x0: Tensor, density: Tensor, generator: Generator) -> tuple[Tensor, Tensor]:
    """Timesteps and noise of this process's part, drawn for the batch of all processes alike on each.

    Args:
        x0: this process's winners, (B, ...).
    Returns:
        t (B,) and eps (B, ...), on x0's device.
    """
    # Every process draws for all: so the draws are those of one process that has the whole batch.
    together, mine = len(x0) * distributed.world(), distributed.part_of(len(x0))
    t = draw(density, together, generator)[mine]
    return t.to(x0.device, non_blocking=True), _drawn_like(x0, generator)


def _drawn_like(x: Tensor, generator: Generator) -> Tensor:
    """Standard normal noise of a tensor's shape, this process's part of the whole batch's, on the tensor's device."""
    together, mine = len(x) * distributed.world(), distributed.part_of(len(x))
    return torch.randn(together, *x.shape[1:], generator=generator)[mine].to(x.device, non_blocking=True)


def _summary(loss: Tensor, errors: PairErrors) -> Tensor:
    """One pass's means in the order of `StepRecord.NAMES`, without the gradient norm, which is known after the last."""
    # detach: what a record holds would otherwise keep the step's whole graph in memory.
    margin = errors.margin.detach()
    parts = (errors.reward_w, errors.reward_l, errors.policy_w, errors.policy_l)
    return torch.stack([loss.detach(), margin.mean(), accuracy(margin).mean(), *(p.detach().mean() for p in parts)])


def _require_finite(records: Sequence[StepRecord], overflow: bool) -> None:
    """Raise FloatingPointError unless all numbers of these steps are finite.

    Args:
        overflow: the gradient norm may be infinite, since the scaler has then left the step out. Not so with a loss
            scale below 1: where that does not help, the gradient itself is not finite.
    """
    # One transfer for all steps, since each waits for the device.
    for record, values in zip(records, torch.stack([r.values for r in records]).tolist(), strict=True):
        spared = StepRecord.NAMES.index("train/grad_norm") if overflow else None
        if not all(abs(v) < float("inf") for place, v in enumerate(values) if place != spared):
            numbers = ", ".join(f"{n} = {v:.4g}" for n, v in zip(StepRecord.NAMES, values, strict=True))
            raise FloatingPointError(f"step {record.step}: not finite ({numbers})")


def as_floats(records: Sequence[StepRecord]) -> list[dict[str, float]]:
    """Records as plain numbers, in one transfer from the device."""
    if not records:
        return []
    # Stacked first: each transfer waits for the device, so there is one for all.
    rows = torch.stack([r.values for r in records]).tolist()
    return [dict(zip(STEP_METRICS, (*row, r.lr), strict=True)) for r, row in zip(records, rows, strict=True)]
