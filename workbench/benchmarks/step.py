"""The training step against what it cannot do without, and the reference's moves against the steps between them."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Generator, Tensor

from workbench import models
from workbench.benchmarks.figure import Figure, Options, control, figure
from workbench.benchmarks.measurement import PAIRS, build_on, free, random_pairs
from workbench.benchmarks.sandbox import EXPERIMENTS
from workbench.benchmarks.timing import in_turn
from workbench.common.validation import LARGEST
from workbench.models import SHAPES, Backend, Shape, random_backend
from workbench.training.build import Training
from workbench.training.config import resolve
from workbench.training.experiment_file import load
from workbench.training.loop import Noised, StepRecord, draw_noise, noised

SMALL, LARGE = MODELS = ("embedded", "sd34m")
VARIANTS = {"full": (0, 1.05), "LoRA": (8, 1.10)}  # name -> rank of the adapters, goal
SIZES = (4, 16)  # pairs a step
SUBSET = 32  # images
INTERVALS = (64, 16)  # steps between moves of the reference
GOAL = 64.0  # %, the time of a move at most, of one step's: 1 % of the time of 64 steps, 4 % of that of 16


@dataclass(frozen=True)
class Loop:
    """A training run without end, and the floor under each of its steps.

    Attributes:
        inputs: what the models are given in the run's first step, (2B, ...); the floor has it every time.
    """

    backend: Backend
    training: Training
    inputs: Noised

    def step(self) -> StepRecord:
        """One optimizer step of the run."""
        return next(self.training.records)

    def floor(self) -> tuple[Tensor, Tensor]:
        """What a step of preference optimisation cannot do without: two forward passes and a backward pass.

        The reference goes first, while no activations wait, and the predictions are given their gradient, so that
        there is no loss to compute.

        Returns:
            Predictions of policy and reference, detached, each (2B, C, H, W).
        """
        x_t, t, condition, _ = self.inputs
        policy, reference = self.training.policy, self.training.reference.model
        with torch.no_grad():
            fixed = self.backend.denoise(reference, x_t, t, condition)
        predicted = self.backend.denoise(policy, x_t, t, condition)
        predicted.backward(fixed)
        policy.zero_grad(set_to_none=True)
        return predicted.detach(), fixed


def loop(
    backend: Backend, shape: Shape, *, pairs: int, rank: int = 0, settings: Mapping[str, Any] | None = None
) -> Loop:
    """A run as `training.build` makes it, on random pairs, with the default settings but for its models.

    Args:
        backend, shape: the model, as `open_model` returns it.
        pairs: of a step.
        rank: of the adapters; 0 = full fine-tune.
        settings: others by dotted name; without any the reference stays where it is and its probe is one image.
    """
    config = resolve(
        {"train.steps": LARGEST, "train.batch_size": pairs, "lora.rank": rank}
        | {"reference.policy": "frozen", "diagnostics.probe": 1}
        | dict(settings or {})
    )
    device = backend.device
    data = random_pairs(shape, backend, max(PAIRS, pairs, config.diagnostics.probe))
    training = build_on(config, backend, data)
    density, density_settings = config.chosen("timesteps")
    order, draws = (Generator().manual_seed(config.seed * 2 + k) for k in range(2))  # as the run's own
    batch = next(data.batches(pairs, order, device))
    t, eps = draw_noise(batch.x_w, density(backend.process.abar, **density_settings), draws)
    return Loop(backend, training, noised(batch, t, eps, backend.process.to(device)))


def open_model(name: str, device: torch.device, dtype: torch.dtype = torch.float32) -> tuple[Backend, Shape]:
    """A model and its shape.

    Args:
        name: "embedded", the small model that comes with the workbench, or a shape in SHAPES, untrained.
        dtype: precision of forward passes, by autocast.
    """
    if name in SHAPES:
        return random_backend(SHAPES[name], device, dtype), SHAPES[name]
    backend = models.load(name, device, dtype)
    told = {key: tuple(x.shape[1:]) for key, x in backend.encode_text([""]).items()}
    # The text encoder was needed for the shapes alone.
    backend.offload()
    described = backend.checkpoint.config
    return backend, Shape("sd", described(backend.DENOISER), told, vae=described("vae"))


def steps(options: Options) -> Iterator[Figure]:
    """Training steps against their floor: two models, full and LoRA, 4 and 16 pairs."""
    for model in MODELS:
        for variant, (rank, goal) in VARIANTS.items():
            for pairs in SIZES:
                made = loop(*open_model(model, options.device), pairs=pairs, rank=rank)
                yield from against_floor(f"{model}, {variant}, {pairs} pairs", made, goal, repeats_of(model, options))
                del made
                free(options.device)


def against_floor(name: str, made: Loop, goal: float, repeats: int) -> Iterator[Figure]:
    """Step / floor, floor / floor, and the floor itself, of the same rounds: step, floor, floor."""
    works = (made.step, made.floor, made.floor)
    step, floor, again = in_turn(*works, repeats=repeats, device=made.backend.device, warm=2, name=name)
    floors = (floor + again) / 2
    yield figure("step", f"training step / floor: {name}", step / floors, goal)
    yield control("step", f"control, floor / floor: {name}", floor / again)
    yield figure("step", f"floor: {name}", 1e3 * floors, None, unit="ms")


def machinery(options: Options) -> Iterator[Figure]:
    """An accepted update of the reference against the steps from one to the next: full, at the default batch.

    With a probe of 32 images, which is what a subset of a batch has, and with the default's, which is larger as its
    own noise is part of what is compared with delta. Last the small model with the default study's batch, probe and
    interval.
    """
    config = resolve({})
    pairs = config.train.batch_size
    for model in MODELS:
        for probe in (SUBSET, config.diagnostics.probe):
            made = _never_moving(model, options, pairs, probe)
            name = f"{model}, {pairs} pairs, probe of {probe}"
            yield from updates(name, made, INTERVALS, repeats_of(model, options))
            del made
            free(options.device)
    study = load(EXPERIMENTS / "default.toml", {})
    pairs, probe, (_, rule) = study.train.batch_size, study.diagnostics.probe, study.chosen("reference")
    made = _never_moving(MODELS[0], options, pairs, probe)
    name = f"the default study's {MODELS[0]}, {pairs} pairs, probe of {probe}"
    yield from updates(name, made, (rule["interval"],), options.repeats)


def _never_moving(model: str, options: Options, pairs: int, probe: int) -> Loop:
    """A run that never comes to its first update by itself, so that each can be asked for."""
    settings = {"reference.policy": "update", "reference.interval": LARGEST, "diagnostics.probe": probe}
    return loop(*open_model(model, options.device), pairs=pairs, settings=settings)


def updates(name: str, made: Loop, intervals: Sequence[int], repeats: int) -> Iterator[Figure]:
    """Time of an update, which is probe, decision and copy, as a share of the steps' that it comes after.

    Args:
        intervals: steps from one update to the next.
    """
    reference, policy = made.training.reference, made.training.policy
    step, update = in_turn(
        made.step,
        lambda: reference.after_step(reference.rule.interval, policy),
        repeats=repeats,
        device=made.backend.device,
        warm=2,
        name=name,
    )
    # 2: the rounds that warm up. A refused update would be measured without its copy.
    assert reference.updates == repeats + 2, "an update was not accepted"
    for interval in intervals:
        share = 100 * update / (interval * step)
        title = f"reference moved every {interval} steps: {name}"
        yield figure("reference", title, share, GOAL / interval, unit="%")
    yield figure("reference", f"one update: {name}", 1e3 * update, None, unit="ms")


def repeats_of(model: str, options: Options) -> int:
    """How often a model is measured: less often the large one, whose steps are long."""
    return max(5, options.repeats // 3) if model == LARGE else options.repeats
