"""How each of the small model's networks is trained: one loop, resumable at any step."""

import copy
import math
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Generator, Tensor, nn

from workbench.common.files import in_place
from workbench.models.small.muon import optimizers

#: Draws a batch from a generator, on the generator's device, and returns the scalar loss of a network on it.
Loss = Callable[[Generator], Tensor]


def fit(
    name: str,
    module: nn.Module,
    loss: Loss,
    work: Path,
    *,
    steps: int,
    lr: float,
    muon: float = 0.0,
    ema_decay: float = 0.999,
    save_every: float = 60.0,
    keep: tuple[float, ...] = (),
) -> None:
    """Minimise `loss` over `module`'s weights with AdamW (and Muon) and a cosine decay, resumably.

    Each step's draws come from a generator seeded with the step, so a resumed run draws what an uninterrupted one
    would have. On return the module holds the averaged weights.

    Args:
        loss: draws a batch from a generator on the module's device and returns the scalar loss.
        lr, muon: learning rates, see `muon.optimizers`.
        work: folder of the checkpoint `NAME.pt`, written atomically every `save_every` seconds.
        ema_decay: largest decay of the weights' running average.
        keep: shares of the training after which the averaged weights are kept, in half precision, as
            `NAME-PERCENT.pt`.
    Raises:
        FloatingPointError: the loss is not finite.
    """
    from tqdm import tqdm

    device = next(module.parameters()).device
    fast: list[Tensor] = list(module.parameters())
    steppers = optimizers(module, lr, muon)
    # Read before a checkpoint is loaded, which holds the rates of the step that it was taken at.
    full = [o.param_groups[0]["lr"] for o in steppers]
    average = copy.deepcopy(module)
    slow: list[Tensor] = list(average.parameters())
    path, step = work / f"{name}.pt", 0
    if path.exists():
        state = torch.load(path, weights_only=True, map_location=device)
        module.load_state_dict(state["module"])
        average.load_state_dict(state["average"])
        for stepper, kept in zip(steppers, state["optimizers"], strict=True):
            stepper.load_state_dict(kept)
        step = state["step"]

    def save() -> None:
        state = {"step": step, "optimizers": [o.state_dict() for o in steppers]}
        write(state | {"module": module.state_dict(), "average": average.state_dict()}, path)

    module.train()
    saved, recent = time.monotonic(), []
    marks = {round(share * steps): work / f"{name}-{round(100 * share)}.pt" for share in keep}
    bar = tqdm(desc=name, initial=step, total=steps, mininterval=5, maxinterval=20)
    while step < steps:
        for stepper, most in zip(steppers, full, strict=True):
            stepper.param_groups[0]["lr"] = most * _rate(step, steps)
        value = loss(Generator(device).manual_seed(step))
        for p in fast:
            p.grad = None
        value.backward()
        nn.utils.clip_grad_norm_(fast, 1.0)
        for stepper in steppers:
            stepper.step()
        step += 1
        with torch.no_grad():
            # The decay grows from small values, so that the average forgets the random weights of the start.
            torch._foreach_lerp_(slow, fast, 1 - min(ema_decay, step / (step + 9)))
        recent.append(value.detach())
        # Only every hundredth step: to read the loss waits for the GPU.
        if len(recent) == 100:
            mean = torch.stack(recent).mean().item()
            # NaN alone differs from itself.
            if mean != mean:
                raise FloatingPointError(f"{name}: loss is not finite near step {step}")
            bar.set_postfix(loss=f"{mean:.4f}")
            recent.clear()
        bar.update()
        if step in marks:
            # Before the checkpoint below: a kill in between repeats the step and writes this file again.
            write(half_of(average), marks[step])
        if time.monotonic() - saved > save_every:
            save()
            saved = time.monotonic()
    bar.close()
    save()
    # The checkpoint just saved is of the last step, so a finished stage that is called again comes straight here.
    module.load_state_dict(average.state_dict())
    module.eval().requires_grad_(False)


def _rate(step: int, steps: int) -> float:
    """Share of the full learning rate at a step: a linear warm-up, and a cosine that ends at a hundredth."""
    warmup = min(300, steps // 10 + 1)
    return min(1.0, (step + 1) / warmup) * (0.01 + 0.99 * 0.5 * (1 + math.cos(math.pi * step / steps)))


def write(state: Any, target: Path) -> None:
    """Save atomically: a killed process leaves the old file or the new one."""
    with in_place(target) as partial:
        torch.save(state, partial)


def half_of(module: nn.Module) -> dict[str, Tensor]:
    """A module's state in half precision; counts stay whole numbers."""
    return {k: v.half() if v.is_floating_point() else v for k, v in module.state_dict().items()}
