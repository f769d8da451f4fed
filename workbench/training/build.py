"""The composition root: a run's settings become functions, models and the loop over them."""

import itertools
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Generator, Tensor, nn

from workbench.common import distributed
from workbench.common.errors import UserError
from workbench.data.captions import drop_captions, empty_caption
from workbench.data.pairs import Batch
from workbench.method import reward_scale
from workbench.method.modifiers import modified
from workbench.method.reference import Reference, Rule
from workbench.models import Backend, adapt
from workbench.models.lora import LORA_FILE, load_adapter
from workbench.training.config import Config
from workbench.training.diagnostics import Probe
from workbench.training.loop import StepRecord, train
from workbench.training.optimizers import OPTIMIZERS, schedule_of
from workbench.training.preparation import Pairs
from workbench.training.snapshots import Snapshot, random_states, set_random_states

#: Of float16's loss, at first; doubled after every 2000 steps without an overflow.
LOSS_SCALE = 2.0**8
#: Added to the run's seed for the draws of caption dropout: so large that the sum is never a seed of the order or the
#: noise, which are at most 2 LARGEST + 1.
CAPTIONS = 2**40


class StopRequested(BaseException):
    """The loop was asked to stop, and did so before a batch: the weights are those of the last whole step.

    No Exception, as KeyboardInterrupt is none: whoever handles failures does not take it for one.
    """


class Position(NamedTuple):
    """Where a run stands between two steps: what the next step changes before it is whole.

    A step draws before it changes a weight. So a stop between two of its batches finds the weights of the last whole
    step, but generators that have moved on; these are kept here.

    Attributes:
        step: how many steps are done.
        draws: state of the generator of timesteps and noise.
        random: states of torch's global generators.
    """

    step: int
    draws: Tensor
    random: Mapping[str, Tensor]


@dataclass(frozen=True)
class Training:
    """A run that is ready to train: all that changes while it does, and the loop, which trains as it is read.

    Attributes:
        average: moving average of the policy's weights, diffusers' EMAModel; None where there is none.
        lam: lambda(t), on the CPU, (T,).
        draws: generator of timesteps and noise.
        done: steps that an earlier part of the run has taken.
        check_every: steps between looks for non-finite numbers.
        records: one an optimizer step.
    """

    policy: nn.Module
    reference: Reference
    probe: Probe
    optimizer: torch.optim.Optimizer
    schedule: torch.optim.lr_scheduler.LRScheduler
    scaler: torch.amp.GradScaler
    average: Any
    draws: Generator
    lam: Tensor
    device: torch.device
    done: int
    check_every: int
    records: Iterator[StepRecord]

    def position(self, step: int) -> Position:
        """Where the run stands now, `step` steps being done; to be asked for between two steps."""
        return Position(step, self.draws.get_state(), random_states(self.device))

    def follow(self) -> None:
        """Let the average follow the policy by a step."""
        if self.average:
            self.average.step(list(self.policy.parameters()))

    @contextmanager
    def averaged(self) -> Iterator[None]:
        """The policy with its averaged weights, where there are some; its own come back at the end."""
        if not self.average:
            yield
            return
        weights = list(self.policy.parameters())
        self.average.store(weights)
        self.average.copy_to(weights)
        try:
            yield
        finally:
            self.average.restore(weights)

    def state(self, position: Position) -> dict[str, Any]:
        """The whole training state as plain values and tensors in one piece; a collective call.

        Which data come next follows from the number of steps that are done.

        Args:
            position: after the last whole step.
        """
        return {
            "policy": distributed.weights(self.policy),
            "reference": self.reference.state(),
            "probe": self.probe.state(),
            "optimizer": distributed.optimizer_state(self.optimizer),
            "schedule": self.schedule.state_dict(),
            "scaler": self.scaler.state_dict(),
            "average": self.average.state_dict() if self.average else {},
            "draws": position.draws,
            "random": position.random,
        }

    def load(self, state: Mapping[str, Any]) -> None:
        """Take over the training state that `state` returned, so that the next step is the one after it."""
        distributed.load(self.policy, state["policy"])
        self.reference.load(state["reference"])
        distributed.load_optimizer(self.optimizer, state["optimizer"])
        self.schedule.load_state_dict(state["schedule"])
        self.scaler.load_state_dict(state["scaler"])
        if self.average:
            self.average.load_state_dict(state["average"])
            # A snapshot is read onto the CPU, and EMAModel leaves what it loads there.
            self.average.to(self.device)
        self.draws.set_state(state["draws"])
        set_random_states(state["random"], self.device)


def build(
    config: Config,
    backend: Backend,
    pairs: Pairs,
    probe: Probe,
    *,
    snapshot: Snapshot | None = None,
    stopping: Callable[[], bool] = lambda: False,
) -> Training:
    """Make a run that is ready to train.

    Args:
        pairs: to train on.
        probe: on which the reference's rule measures the divergence.
        snapshot: what the run goes on from.
        stopping: asked before each batch; the loop raises StopRequested where it says yes.
    Raises:
        UserError: settings that do not go together.
    """
    done, device, settings = snapshot.step if snapshot else 0, backend.device, config.train
    if snapshot:
        # Before the models are made: the reference's rule holds the probe.
        probe = probe.resumed(snapshot.state["probe"])
    policy, reference = _models(config, backend, probe)
    # Before the optimizer is made: fsdp replaces the parameters by sharded ones.
    wrapped = distributed.wrap(policy, settings.parallel, trained=True)
    optimizer, schedule = _optimizer(config, policy)
    lam = _reward_scale(config, backend)
    density, density_settings = config.chosen("timesteps")
    objective, objective_settings = config.chosen("objective")
    # 2 seed and 2 seed + 1: neither is the seed of another run's order or noise.
    order, draws = (Generator().manual_seed(config.seed * 2 + k) for k in range(2))
    # From torch's 65536 the scale would be halved at most of the first steps, which are left out.
    scaler = torch.amp.GradScaler(device.type, init_scale=LOSS_SCALE, enabled=backend.dtype == torch.float16)
    # Looking at a number waits for a GPU's queue to run empty; a CPU has no queue.
    check_every = 1 if device.type == "cpu" else 16
    records = train(
        wrapped,
        reference,
        _until(stopping, _batches(config, backend, pairs, order, skip=done * settings.accumulation)),
        denoise=backend.denoise,
        objective=partial(modified, partial(objective, **objective_settings), **config.shared("objective")),
        process=backend.process.to(device),
        density=density(backend.process.abar, **density_settings),
        lam=lam.to(device),
        optimizer=optimizer,
        schedule=schedule,
        scaler=scaler,
        steps=settings.steps,
        accumulation=settings.accumulation,
        clip=settings.clip,
        generator=draws,
        noise_offset=settings.noise_offset,
        input_perturbation=settings.input_perturbation,
        done=done,
        check_every=check_every,
    )
    training = Training(
        policy,
        reference,
        probe,
        optimizer,
        schedule,
        scaler,
        _average(config, policy),
        draws,
        lam,
        device,
        done,
        check_every,
        records,
    )
    if snapshot:
        # After the loop is made is early enough: a generator does nothing until it is read.
        training.load(snapshot.state)
    return training


def _batches(config: Config, backend: Backend, pairs: Pairs, order: Generator, skip: int) -> Iterator[Batch]:
    """The run's batches on this process, from where it stands."""
    size, share = config.train.batch_size, config.data.caption_dropout
    batches = pairs.batches(size, order, backend.device, skip=skip)
    if not share:
        return batches
    empty = empty_caption(backend)
    backend.offload()  # where the text encoders had to be loaded for it
    generator = Generator().manual_seed(CAPTIONS + config.seed)
    return drop_captions(batches, empty, share=share, size=size, generator=generator, skip=skip)


def _until(stopping: Callable[[], bool], batches: Iterator[Batch]) -> Iterator[Batch]:
    """Batches until `stopping` says so, then StopRequested.

    Several processes ask one another before every 16th batch only, since that takes a while.
    """
    for number in itertools.count():
        # All stop before the same batch: a process that stopped alone would leave the others in a collective call.
        if stopping() if distributed.world() == 1 else number % 16 == 0 and distributed.anywhere(stopping()):
            raise StopRequested
        yield next(batches)


def _models(config: Config, backend: Backend, probe: Probe) -> tuple[nn.Module, Reference]:
    """Policy and reference: two denoisers, or two sets of adapters of one; in eval mode throughout, so no dropout."""
    rule_of, rule_settings = config.chosen("reference")
    rule = rule_of(**rule_settings)
    policy, reference, denoisers = (_adapted if config.lora.rank else _full)(config, backend, rule, probe)
    if config.model.reference:
        # Not 0, as that of a reference which is the pretrained model.
        reference.divergence = probe(reference.model)
    if config.train.checkpointing:
        # The policy's (adapters share it): the reference has no backward pass that would need activations.
        denoisers[0].enable_gradient_checkpointing()
    if config.model.compile:
        for denoiser in denoisers:
            backend.compile(denoiser)
    return policy, reference


def require_shardable(config: Config) -> None:
    """Refuse settings that do not work with weights sharded over several processes.

    Raises:
        UserError: names the setting.
    """
    if config.lora.rank:
        raise UserError("train.parallel = 'fsdp': LoRA trains so few weights that 'ddp' is the better choice")
    if config.train.optimizer != "adamw":
        raise UserError(
            f"train.optimizer = {config.train.optimizer!r}: train.parallel = 'fsdp' works with 'adamw' alone"
        )
    if config.train.ema:
        raise UserError("train.ema: averages whole weights; train.parallel = 'fsdp' shards them, choose 'ddp'")


def _full(config: Config, backend: Backend, rule: Rule, probe: Probe) -> tuple[nn.Module, Reference, list[Any]]:
    """Policy and reference as two denoisers, and these two."""
    parallel = config.train.parallel
    sharded = parallel == "fsdp" and distributed.world() > 1
    if sharded:
        require_shardable(config)
    began, of_reference = _beginnings(config)
    policy = backend.denoiser(trained=began).requires_grad_(True)
    # Half the memory, except where a mixture of policy and reference needs all its digits, or where the weights are
    # sharded, since a shard holds one precision.
    other = backend.denoiser(half=rule.rate == 1 and not sharded, trained=of_reference)
    fixed = distributed.wrap(other, parallel, trained=False)
    # Read again from disk if ever needed, onto the CPU: a third denoiser would take the device's memory for nothing.
    reference = Reference(fixed, rule, probe, lambda: dict(backend.denoiser(device="cpu").named_parameters()))
    return policy, reference, [policy, other]


def _adapted(config: Config, backend: Backend, rule: Rule, probe: Probe) -> tuple[nn.Module, Reference, list[Any]]:
    """Policy and reference as two sets of adapters, and the one denoiser that holds them."""
    lora = config.lora
    if config.train.parallel == "fsdp" and distributed.world() > 1:
        require_shardable(config)
    policy, other, _ = adapt(
        backend.denoiser(half=True),
        rank=lora.rank,
        alpha=lora.alpha or lora.rank,
        targets=lora.targets or backend.LORA_TARGETS,
        seed=config.seed,
    )
    # New adapters change nothing (B = 0): the reference's, as they are now, are the pretrained model.
    initial = {name: p.detach().clone() for name, p in other.named_parameters()}
    for adapter, folder in zip((policy, other), _beginnings(config), strict=True):
        if folder:
            load_adapter(adapter, folder, LORA_FILE, backend.DENOISER)
    return policy, Reference(other, rule, probe, lambda: initial), [policy.denoiser]


def _beginnings(config: Config) -> tuple[Path | None, Path | None]:
    """The folders of the weights that policy and reference begin with; None = the pretrained model's own."""
    policy, reference = (Path(place) if place else None for place in (config.model.policy, config.model.reference))
    return policy, reference


def _optimizer(config: Config, policy: nn.Module) -> tuple[torch.optim.Optimizer, torch.optim.lr_scheduler.LRScheduler]:
    settings = config.train
    pairs = settings.batch_size * settings.accumulation * distributed.world()
    optimizer = OPTIMIZERS[settings.optimizer](
        list(policy.parameters()),
        lr=settings.lr * (pairs if settings.scale_lr else 1),
        betas=settings.betas,
        weight_decay=settings.weight_decay,
        epsilon=settings.epsilon,
    )
    return optimizer, schedule_of(settings.schedule, optimizer, settings.warmup, settings.steps)


def _average(config: Config, policy: nn.Module) -> Any:
    """Diffusers' moving average of the policy's weights, or None."""
    if not config.train.ema:
        return None
    from diffusers.training_utils import EMAModel

    return EMAModel(policy.parameters(), decay=config.train.ema, foreach=True)


def _reward_scale(config: Config, backend: Backend) -> Tensor:
    """lambda(t), on the CPU, (T,)."""
    shape, settings = config.chosen("reward_scale")
    curve = shape(reward_scale.bounded(backend.process.abar.double()), **settings)
    return reward_scale.scale(curve, **config.shared("reward_scale"))
