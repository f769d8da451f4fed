"""The bucket diagnostics against the forward passes that they need."""

import time
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import torch

from workbench.benchmarks.figure import Figure, Options, control, figure
from workbench.benchmarks.measurement import random_pairs
from workbench.benchmarks.sandbox import sandbox, temporary_folder
from workbench.benchmarks.step import open_model
from workbench.benchmarks.timing import in_turn
from workbench.models import Backend, Shape
from workbench.training.diagnostics import BucketDiagnostics


def diagnostics(
    options: Options, pairs: int = 400, backend: Backend | None = None, shape: Shape | None = None
) -> Iterator[Figure]:
    """A full pass of the bucket diagnostics against the same calls of the denoiser, on inputs made beforehand."""
    if backend is None or shape is None:
        backend, shape = open_model("embedded", options.device)
    with temporary_folder(options.folder) as folder, sandbox(folder):
        work, forwards = passes(backend, shape, pairs)
        name = f"diagnostics over 10 buckets, {pairs} pairs"
        repeats = max(4, options.repeats // 2)
        took, first, second = in_turn(
            work, forwards, forwards, repeats=repeats, device=options.device, warm=1, name=name
        )
    yield control("diagnostics", "control: the forwards against themselves", second / first)
    yield figure("diagnostics", f"{name}, against the forwards", took / first, 1.1, note="3 draws a pair, 64 images")


def passes(backend: Backend, shape: Shape, pairs: int, buckets: int = 10) -> tuple[Callable, Callable]:
    """A full pass of the diagnostics of a model over random pairs, and the same calls of the denoiser alone.

    The pretrained model's errors are in the cache afterwards, so that a pass has the policy's calls only.
    """
    calls: list[tuple] = []

    def recorded(model: Any, *inputs: Any) -> torch.Tensor:
        calls.append(inputs)
        return backend.denoise(model, *inputs)

    # The policy stands for the pretrained model too: which weights are used does not change the time.
    policy, data = backend.denoiser(), random_pairs(shape, backend, pairs)
    diagnose = BucketDiagnostics(
        recorded, policy, data, backend.process.to(backend.device),
        # A digest that no cache knows: the pretrained model's errors are computed here, and their calls recorded.
        pretrained_digest=f"bench-{time.time_ns()}", buckets=buckets, curve=100, draws=3, device=backend.device,
    )  # fmt: skip
    # Recording would keep the inputs of every timed pass, too.
    diagnose.denoise = backend.denoise

    @torch.no_grad()
    def forwards() -> None:
        for inputs in calls:
            backend.denoise(policy, *inputs)

    return partial(diagnose, policy, full=True), forwards
