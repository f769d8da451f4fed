"""The composition root: settings become functions and models, the loop runs, consumers hear of it. One run."""

import inspect
import itertools
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError
from torch import Generator, Tensor, nn

from workbench.common import distributed
from workbench.common.cache import in_place
from workbench.common.contact_sheet import contact_sheet
from workbench.common.errors import Failure, UserError, memory_explained
from workbench.data.pairs import Batch
from workbench.method import reward_scale
from workbench.method.noise import bucket_names
from workbench.method.reference import Divergence, Reference, Rule
from workbench.models import Backend, adapt
from workbench.training import diagnostics, optimizers
from workbench.training.config import Config
from workbench.training.diagnostics import BucketDiagnostics, Probe, Samples
from workbench.training.listener import Listener, Told
from workbench.training.loop import StepRecord, as_floats, train
from workbench.training.preparation import Prepared, draw, open_backend, plan, prepare
from workbench.training.snapshots import Snapshot, Snapshots, random_states, require_same, set_random_states


@dataclass(frozen=True)
class Started:
    """A run that is ready to train: all that changes while it does, and the loop, which trains as it is read.

    Attributes:
        lam: lambda(t), on the CPU.
        draws: generator of timesteps and noise.
        done: steps that an earlier part of the run has taken.
    """

    policy: nn.Module
    reference: Reference
    probe: Probe
    optimizer: torch.optim.Optimizer
    schedule: torch.optim.lr_scheduler.LRScheduler
    scaler: torch.amp.GradScaler
    draws: Generator
    lam: Tensor
    done: int
    records: Iterator[StepRecord]

    def state(self) -> dict[str, Any]:
        """All of it as plain values and tensors in one piece; the data's position follows from the step."""
        return {
            "policy": distributed.weights(self.policy),
            "reference": self.reference.state(),
            "probe": self.probe.state(),
            "optimizer": distributed.optimizer_state(self.optimizer),
            "schedule": self.schedule.state_dict(),
            "scaler": self.scaler.state_dict(),
        }

    def load(self, state: Mapping[str, Any]) -> None:
        """Go on from where `state` and `position` were taken."""
        distributed.load(self.policy, state["policy"])
        self.reference.load(state["reference"])
        distributed.load_optimizer(self.optimizer, state["optimizer"])
        self.schedule.load_state_dict(state["schedule"])
        self.scaler.load_state_dict(state["scaler"])
        self.draws.set_state(state["draws"])


def start(
    config: Config, ready: Prepared, found: Snapshot | None = None, stopping: Callable[[], bool] = lambda: False
) -> Started:
    """Settings become functions and models.

    Args:
        found: what the run goes on from.
        stopping: asked before each batch; the loop raises KeyboardInterrupt where it says so.
    """
    done = found.step if found else 0
    probe = ready.probe.going_on(found.state["probe"]) if found else ready.probe
    backend, device, settings = ready.backend, ready.backend.device, config.train
    rule, rule_settings = config.chosen("reference")
    policy, reference = _models(config, backend, rule(**rule_settings), probe)
    wrapped = distributed.wrap(
        policy, settings.parallel, trained=True
    )  # before the optimizer: fsdp replaces parameters
    objective, objective_settings = config.chosen("objective")
    if "mean" in inspect.signature(objective).parameters:  # it looks at the whole batch
        objective = partial(objective, mean=lambda x: distributed.mean(x.mean()))
    density, density_settings = config.chosen("timesteps")
    shape, shape_settings = config.chosen("reward_scale")
    lam = reward_scale.scale(
        shape(reward_scale.bounded(backend.process.abar.double()), **shape_settings),
        rise=config.reward_scale.rise,  # type: ignore[attr-defined]
        unit_mean=config.reward_scale.unit_mean,  # type: ignore[attr-defined]
    )
    if distributed.is_sharded(policy) and settings.optimizer != "adamw":
        raise UserError(f"train.optimizer = {settings.optimizer!r}: train.parallel = 'fsdp' works with 'adamw' alone")
    together = settings.batch_size * settings.accumulation * distributed.world()
    optimizer = optimizers.OPTIMIZERS[settings.optimizer](
        list(policy.parameters()),
        lr=settings.lr * (together if settings.scale_lr else 1),
        betas=settings.betas,
        weight_decay=settings.weight_decay,
    )
    warmup = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: min(1.0, (step + 1) / (settings.warmup + 1)))
    order, draws = (Generator().manual_seed(config.seed * 2 + k) for k in range(2))
    scaler = torch.amp.GradScaler(device.type, enabled=backend.dtype == torch.float16)
    batches = ready.train.batches(settings.batch_size, order, device, skip=done * settings.accumulation)
    records = train(
        wrapped,
        reference,
        _until(stopping, batches),
        denoise=backend.denoise,
        objective=partial(objective, **objective_settings),
        process=backend.process.to(device),
        density=density(backend.process.abar, **density_settings),
        lam=lam.to(device),
        optimizer=optimizer,
        schedule=warmup,
        scaler=scaler,
        steps=settings.steps,
        accumulation=settings.accumulation,
        clip=settings.clip,
        generator=draws,
        done=done,
        check_every=_check_every(ready),
    )
    started = Started(policy, reference, probe, optimizer, warmup, scaler, draws, lam, done, records)
    if found:
        started.load(found.state)
    return started


def _until(stopping: Callable[[], bool], batches: Iterator[Batch]) -> Iterator[Batch]:
    """Batches until somebody asks to stop; several processes ask one another only now and then, as it takes a while."""
    for number in itertools.count():
        if stopping() if distributed.world() == 1 else number % 16 == 0 and distributed.anywhere(stopping()):
            raise KeyboardInterrupt
        yield next(batches)


def _models(config: Config, backend: Backend, rule: Rule, probe: Probe) -> tuple[nn.Module, Reference]:
    """Policy and reference: two denoisers, or two sets of adapters of one; in eval mode throughout, so no dropout."""
    parallel, lora = config.train.parallel, config.lora
    if lora.rank:
        if parallel == "fsdp" and distributed.world() > 1:
            raise UserError("train.parallel = 'fsdp': LoRA trains so few weights that 'ddp' is the better choice")
        policy, reference, _ = adapt(
            backend.denoiser(half=True),
            rank=lora.rank,
            alpha=lora.alpha or lora.rank,
            targets=lora.targets or backend.LORA_TARGETS,
            seed=config.seed,
        )
        initial = {name: p.detach().clone() for name, p in reference.named_parameters()}
        denoisers: list[Any] = [policy.denoiser]
        found: tuple[nn.Module, Reference] = policy, Reference(reference, rule, probe, lambda: initial)
    else:
        trained = backend.denoiser().requires_grad_(True)
        sharded = parallel == "fsdp" and distributed.world() > 1  # a shard holds one precision
        other = backend.denoiser(half=rule.rate == 1 and not sharded)  # a mixture needs all its digits
        denoisers = [trained, other]
        fixed = distributed.wrap(other, parallel, trained=False)
        found = trained, Reference(fixed, rule, probe, lambda: dict(backend.denoiser(device="cpu").named_parameters()))
    if config.train.checkpointing:
        denoisers[0].enable_gradient_checkpointing()
    if config.model.compile:
        for denoiser in denoisers:
            denoiser.compile()
    return found


def _check_every(ready: Prepared) -> int:
    return 1 if ready.backend.device.type == "cpu" else 16


@memory_explained()
def execute(
    config: Config,
    listener: Listener,
    *,
    on_step: Callable[[int, Mapping[str, float]], None] = lambda step, metrics: None,
    save_to: Path | None = None,
    snapshots: Snapshots | None = None,
    stopping: Callable[[], bool] = lambda: False,
) -> dict[str, float]:
    """Run one experiment, or go on with it.

    Args:
        listener: hears of every metric, image and table; of a run that goes on also of what was told before.
        on_step: called after each step with what was newly measured at it; may raise to end the run.
        save_to: folder for the trained model, as a diffusers checkpoint.
        snapshots: where the run's snapshots are, and are taken; it goes on from the newest to the same bits.
        stopping: whether to take a snapshot and raise KeyboardInterrupt, asked between two batches.
    Returns:
        The last value of every metric.
    Raises:
        FloatingPointError: the run met a number that is not finite.
        KeyboardInterrupt: it was asked to stop.
    """
    ready, told = prepare(config), Told(listener)
    found = _newest(snapshots, config, ready)
    started = start(config, ready, found, stopping)
    policy, reference, settings = started.policy, started.reference, config.train
    check_every = _check_every(ready)
    waiting: list[StepRecord] = []
    done, draws = started.done, started.draws.get_state()

    def keep() -> None:
        if snapshots is None:
            return
        state = started.state() | {"draws": draws, "random": random_states(ready.backend.device), "told": told.events}
        if distributed.is_main():
            snapshots.save(done, state | {"settings": config.flat(), "data": _data(ready)})

    if found:
        told.again(found.state["told"])
        set_random_states(found.state["random"], ready.backend.device)
        on_step(done, {})
    elif config.evaluation.grid and ready.baseline is not None:
        told.image("samples", 0, _sheet(ready.baseline.images, config, ready))
    try:
        for record in started.records:
            step, final = record.step, record.step == settings.steps
            waiting.append(record)
            news = _reference_state(reference)
            decided = bool(reference.audit) and reference.audit[-1].step == step
            if decided and reference.rule.rate == 1:  # the candidate was the policy itself
                news |= _distance("policy", Divergence(*reference.audit[-1][1:3]))
            if step % config.diagnostics.interval == 0 or final:
                if "divergence/policy" not in news:
                    news |= _distance("policy", started.probe(policy))
                news |= diagnostics.bucket_means(started.lam, config.diagnostics.buckets) if final else {}
                news |= ready.diagnostics(policy, full=final)
                if config.evaluation.grid and not (final and config.evaluation.seeds):
                    images, gained = _grid(config, ready, policy)
                    told.image("samples", step, images)
                    news |= gained
            if final and reference.rule.interval:
                news["divergence/reference_unseen"] = ready.unseen(reference.model).error_difference
            kept = snapshots is not None and snapshots.due(step) and not final
            if len(waiting) >= check_every or len(news) > 4 or final or kept:
                _tell(told, waiting)
            told.log(step, news)
            done, draws = step, started.draws.get_state()
            if kept:
                keep()
            on_step(step, news)
    except KeyboardInterrupt:
        _tell(told, waiting)
        if done > started.done:
            keep()
        raise
    finally:  # what the reference did matters most for the runs that did not end well
        if reference.audit:
            columns = reference.audit[0]._fields
            listener.table("reference_audit.json", {c: [getattr(d, c) for d in reference.audit] for c in columns})
    policy.requires_grad_(False)
    if ready.scorer is not None and ready.baseline is not None:
        drawn = plan(ready.captions, config.evaluation.seeds)
        images = draw(ready.backend, policy, *drawn, config.evaluation)
        ours = ready.scorer(images, range(len(images)))
        told.log(settings.steps, diagnostics.compare(ours, ready.baseline) | _gained(ours, config, ready))
        listener.picture("pretrained.png", contact_sheet(ready.baseline.images, columns=len(ready.captions), zoom=1))
        listener.picture("samples.png", contact_sheet(images, columns=len(ready.captions), zoom=1))
        if config.evaluation.grid:
            told.image("samples", settings.steps, _sheet(images, config, ready))
        scores = {"caption": ours.captions, "seed": ours.seeds, "reward": ours.rewards.tolist()}
        scores |= {"pretrained_reward": ready.baseline.rewards.tolist()}
        scores |= {"judge": ours.judged.tolist(), "pretrained_judge": ready.baseline.judged.tolist()}
        listener.table("samples.json", scores)
    if settings.keep:
        with TemporaryDirectory() as folder:
            _save(ready.backend, started, Path(folder), whole=False)
            listener.artifact(Path(folder), "model")
    if save_to is not None:
        _save(ready.backend, started, save_to, whole=True)
    return told.last


def _tell(told: Told, waiting: list[StepRecord]) -> None:
    """Records that waited for each other, since each transfer from the device costs time."""
    for record, metrics in zip(waiting, as_floats(waiting), strict=True):
        told.log(record.step, metrics)
    waiting.clear()


def _data(ready: Prepared) -> list[str]:
    """Digests of what a run learns from and begins with."""
    backend = ready.backend
    return [ready.train.digest, ready.validation.digest, backend.digest(backend.DENOISER, "scheduler")]


def _newest(snapshots: Snapshots | None, config: Config, ready: Prepared) -> Snapshot | None:
    """What the run goes on from, the same on every process.

    Raises:
        UserError: the snapshot's run had other settings, data or weights.
        Failure: processes find different ones.
    """
    found = snapshots.newest() if snapshots else None
    if snapshots and distributed.world() > 1:
        here = torch.tensor(float(found.step if found else -1), device=ready.backend.device)
        if not distributed.agreed(bool(distributed.mean(here) == here)):
            raise Failure(f"{snapshots.folder}: not the same on all machines of the run; let WORKBENCH_STATE be shared")
    if snapshots and found:
        require_same(found.state["settings"], config.flat(), str(snapshots.folder))
        if found.state["data"] != _data(ready):
            raise UserError(f"{snapshots.folder}: the snapshot was made with other data or weights under these names")
    return found


def _save(backend: Backend, started: Started, folder: Path, whole: bool) -> None:
    """Write the policy; sharded weights are brought together first, on the main process."""
    policy = started.policy
    if distributed.is_sharded(policy):
        weights = distributed.whole_weights(policy)
        if distributed.is_main():
            policy = backend.denoiser(device="cpu")
            policy.load_state_dict(weights)
    if distributed.is_main():
        try:
            with in_place(folder) as partial:
                backend.save(policy, partial, whole)
        except (OSError, SafetensorError) as error:
            raise Failure(f"{folder}: the trained model cannot be written ({error})") from None


def _distance(who: str, found: Divergence) -> dict[str, float]:
    return {f"divergence/{who}": found.error_difference, f"kl/{who}": found.kernel_kl}


def _reference_state(reference: Reference) -> dict[str, float]:
    counts = {"reference/updates": float(reference.updates), "reference/frozen": float(reference.frozen)}
    return _distance("reference", reference.divergence) | counts


def _grid_rows(config: Config, ready: Prepared) -> list[int]:
    """Which test prompts the sample grid shows: evenly spread, at most `evaluation.grid`."""
    count = len(ready.captions)
    return list(range(0, count, max(1, count // config.evaluation.grid)))[: config.evaluation.grid]


def _sheet(images: np.ndarray, config: Config, ready: Prepared) -> np.ndarray:
    """The sample grid, cut from all evaluated images, which begin with one of each prompt."""
    return contact_sheet(images[_grid_rows(config, ready)], columns=8)


def _grid(config: Config, ready: Prepared, policy: nn.Module) -> tuple[np.ndarray, dict[str, float]]:
    """The sample grid, and what the true reward makes of it, where there is one."""
    rows = _grid_rows(config, ready)
    captions = [ready.captions[i] for i in rows]
    images = draw(ready.backend, policy, captions, [0] * len(captions), config.evaluation)
    ready.backend.offload()
    gained = {}
    if ready.scorer is not None and ready.baseline is not None:
        gained = diagnostics.progress(ready.scorer(images, rows), ready.baseline.part(rows))
    return contact_sheet(images, columns=8), gained


def _gained(ours: Samples, config: Config, ready: Prepared) -> dict[str, float]:
    """The same at the end, of the same prompts and noise among all evaluated images."""
    if not config.evaluation.grid or ready.baseline is None:
        return {}
    rows = _grid_rows(config, ready)
    return diagnostics.progress(ours.part(rows), ready.baseline.part(rows))


def check(config: Config) -> None:
    """Everything about a run that can be found wrong before it starts, once its data are there.

    Raises:
        UserError: more pairs a batch than there are, or a density that the model's timesteps cannot have.
    """
    ready = prepare(config)
    next(ready.train.batches(config.train.batch_size, Generator(), ready.backend.device))
    density, settings = config.chosen("timesteps")
    density(ready.backend.process.abar, **settings)


def metric_names(config: Config) -> set[str]:
    """Every metric that a finished run of these settings has logged."""
    names = {*StepRecord.NAMES, "train/lr", "reference/updates", "reference/frozen"}
    names |= {f"{kind}/{who}" for kind in ("divergence", "kl") for who in ("policy", "reference")}
    if config.reference.policy != "frozen":  # type: ignore[attr-defined]
        names.add("divergence/reference_unseen")
    names |= {f"validation/{name}" for name in BucketDiagnostics.MEANS}
    if config.evaluation.seeds:
        names |= {f"eval/{name}" for name in diagnostics.COMPARED}
        names |= {f"samples/{name}" for name in diagnostics.PROGRESS} if config.evaluation.grid else set()
    buckets = bucket_names(config.diagnostics.buckets, open_backend(config.model).timesteps)
    quantities = ("loss", "reward", "reward_size", "margin", "accuracy", "divergence", "count", "lambda")
    return names | {f"timestep_{quantity}/{bucket}" for quantity in quantities for bucket in buckets}
