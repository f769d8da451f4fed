"""What the machine can do, arithmetic and memory traffic, and how much of it training uses."""

from collections.abc import Iterator
from statistics import median

import torch
from torch import nn

from workbench.benchmarks import costs
from workbench.benchmarks.figure import Figure, Options, figure
from workbench.benchmarks.measurement import free, matrix_rate
from workbench.benchmarks.step import MODELS, loop, open_model, repeats_of
from workbench.benchmarks.timing import in_turn

COPIED = 2**26  # float32 numbers, more than caches hold
PAIRS = 16
#: Numbers that are moved for each weight: clipping reads a gradient, reads and writes it again; AdamW reads weight,
#: gradient and two moments and writes all but the gradient.
MOVED = 3 + 7


def limits(options: Options) -> Iterator[Figure]:
    """Matrix rate, copying rate, and what the floor of a step and its optimizer reach of them."""
    device = options.device
    rates = [matrix_rate(device, torch.float32) for _ in range(options.repeats)]
    yield figure("limits", "matrix product, float32", [rate / 1e9 for rate in rates], None, unit="GFLOP/s")
    copied = copying(device, options.repeats)
    yield figure("limits", "copying memory, read and written", [rate / 1e9 for rate in copied], None, unit="GB/s")
    for model in MODELS:
        yield from reached(model, median(rates), median(copied), repeats_of(model, options), device)
        free(device)


def copying(device: torch.device, repeats: int) -> list[float]:
    """Bytes a second, read and written, of large copies."""
    a, b = torch.randn(2, COPIED, device=device)
    took = in_turn(lambda: a.copy_(b), repeats=repeats, device=device)[0]
    # Read and written, 4 bytes a number.
    return (2 * 4 * COPIED / took).tolist()


def reached(model: str, rate: float, bandwidth: float, repeats: int, device: torch.device) -> Iterator[Figure]:
    """The floor's arithmetic and the optimizer's traffic, in turn, so that neither finds its data in the caches.

    Args:
        rate: of matrix products, FLOP/s.
        bandwidth: of copies, bytes a second.
    """
    backend, shape = open_model(model, device)
    made, cost = loop(backend, shape, pairs=PAIRS), costs.count(shape)
    parameters, optimizer = list(made.training.policy.parameters()), made.training.optimizer
    gradients = [torch.randn_like(p) for p in parameters]

    def update() -> None:
        for parameter, gradient in zip(parameters, gradients, strict=True):
            # Clipping changes a gradient in place, and zero_grad drops it: the same tensor is set again each time.
            parameter.grad = gradient
        nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)

    floor, moved = in_turn(made.floor, update, repeats=repeats, device=device, warm=2, name=model)
    arithmetic, traffic = cost.step * PAIRS / floor / rate, 4 * MOVED * cost.weights / moved / bandwidth
    yield figure("limits", f"floor of {PAIRS} pairs, of the matrix rate: {model}", 100 * arithmetic, None, unit="%")
    yield figure("limits", f"clipping and AdamW: {model}", 1e3 * moved, None, unit="ms")
    yield figure("limits", f"clipping and AdamW, of the copying rate: {model}", 100 * traffic, None, unit="%")
