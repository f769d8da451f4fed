"""One run, from its first step or its last snapshot to its trained model."""

import time
from collections.abc import Callable, Mapping
from pathlib import Path
from tempfile import TemporaryDirectory

import torch
from safetensors import SafetensorError
from torch import Generator

from workbench.common import distributed
from workbench.common.contact_sheet import beside, contact_sheet
from workbench.common.errors import Failure, UserError, memory_explained
from workbench.common.files import in_place
from workbench.method.reference import Decision
from workbench.models import Backend
from workbench.training.build import Position, StopRequested, Training, build
from workbench.training.config import Config, completed
from workbench.training.listener import Listener, Recorder
from workbench.training.loop import StepRecord, as_floats
from workbench.training.measurements import Measurements
from workbench.training.preparation import Prepared
from workbench.training.snapshots import Snapshot, Snapshots, require_same

BESIDE = "pretrained-and-trained.png"  #: a run's picture of both models' samples, in pairs


@memory_explained()
def execute(
    config: Config,
    prepared: Prepared,
    listener: Listener,
    *,
    on_step: Callable[[int, Mapping[str, float]], None] = lambda step, metrics: None,
    on_resumed: Callable[[Mapping[str, float]], object] = lambda metrics: None,
    on_evaluated: Callable[[float], object] = lambda share: None,
    save_to: Path | None = None,
    shown_as: Path | None = None,
    snapshots: Snapshots | None = None,
    stopping: Callable[[], bool] = lambda: False,
) -> dict[str, float]:
    """Run one experiment, or resume it from its newest snapshot, to the same bits.

    A snapshot is taken between two steps only: where one is due, and where the run stops because `stopping` says so. An
    exception that arrives anywhere else, such as a second Ctrl-C's, may find a step half taken. It is passed on and
    nothing is kept, so that the run resumes from the snapshot before.

    Args:
        listener: gets every metric, image and table; a resumed run's also those of its earlier parts.
        on_step: called after each step with what was measured after it, beside the step's own metrics where they were
            read by then: on a CPU those of each, on a GPU of some. Once, with nothing, when a run resumes; may raise to
            end the run.
        on_resumed: called before that when a run resumes, with the last value of every metric so far.
        on_evaluated: called after the last step while the final samples are drawn, with the share that is done, 0 to 1.
        save_to: folder for the trained model, as a diffusers checkpoint.
        shown_as: what messages call that folder, where it is one beside the person's.
        snapshots: where the run's snapshots are and are taken; without them the run cannot be resumed.
        stopping: whether to take a snapshot and raise KeyboardInterrupt; asked before each batch.
    Returns:
        The last value of every metric.
    Raises:
        FloatingPointError: the run met a number that is not finite.
        KeyboardInterrupt: the run was stopped.
        UserError: the snapshot's run had other settings, data or weights.
        Failure: a snapshot or the trained model cannot be written.
    """
    prepared.backend.offload()  # training needs neither autoencoder nor text encoders
    snapshot = _newest(snapshots, config, prepared)
    until = time.monotonic() + 3600 * config.train.max_hours if config.train.max_hours else float("inf")
    training = build(
        config,
        prepared.backend,
        prepared.train,
        prepared.probe,
        snapshot=snapshot,
        stopping=lambda: stopping() or time.monotonic() > until,
    )
    session = _Session(config, prepared, training, Recorder(listener), snapshots)
    if snapshot:
        # The pretrained model's grid is among these events, so that `report_start` is for runs that begin.
        session.recorder.replay(snapshot.events)
        # Before the first new step, so that the caller can take up its own part, such as reports to a pruner.
        on_resumed(session.recorder.last)
        on_step(training.done, {})
    else:
        session.report_start()
    try:
        for record in training.records:
            metrics = session.report(record)
            # In this order: whoever is told of a step by `on_step` and dies finds its snapshot, and a snapshot holds
            # all that was logged up to it.
            session.checkpoint_if_due(record.step)
            session.snapshot_if_due(record.step)
            on_step(record.step, metrics)
    except StopRequested:
        session.snapshot_last_step()
        # The caller sees the same exception whatever asked for the stop: a signal, or train.max_hours.
        raise KeyboardInterrupt from None
    finally:  # what the reference did matters most for the runs that did not end well
        session.report_decisions()
    training.policy.requires_grad_(False)
    session.report_end(on_evaluated)
    if config.train.keep:
        with TemporaryDirectory() as folder:
            _save(prepared.backend, training, Path(folder), whole=False)
            listener.artifact(Path(folder), "model")
    if save_to is not None:
        _save(prepared.backend, training, save_to, whole=True, shown_as=shown_as)
    return session.recorder.last


def checkpoint(step: int) -> str:
    """The artifact folder of the weights that a run kept after a step."""
    return f"checkpoints/{step:06d}"


class _Session:
    """What a run reports and keeps while it trains.

    Attributes:
        position: after the last step that is wholly reported.
    """

    def __init__(
        self, config: Config, prepared: Prepared, training: Training, recorder: Recorder, snapshots: Snapshots | None
    ):
        self.config, self.prepared, self.training = config, prepared, training
        self.recorder, self.snapshots = recorder, snapshots
        self.measurements = Measurements(config, prepared, training)
        self.position: Position = training.position(training.done)
        self._unread: list[StepRecord] = []  # records whose numbers are still on the device

    def report_start(self) -> None:
        """Report the pretrained model's sample grid as step 0, where grids are drawn."""
        grid = self.measurements.start()
        if grid is not None:
            self.recorder.image("samples", 0, grid)

    def report(self, record: StepRecord) -> dict[str, float]:
        """Measure and log a step.

        Returns:
            What was measured after it, and its own metrics where they were read now: on a GPU a few steps at once are.
        """
        # First, so that a snapshot of this step holds an average that has seen it.
        self.training.follow()
        self._unread.append(record)
        measured, own = self.measurements.step(record), dict[str, float]()
        if measured.grid is not None:
            self.recorder.image("samples", record.step, measured.grid)
        final = record.step == self.config.train.steps
        # Reading a record waits for the device, so they are read together, or when it has been waited for anyway. Also
        # before a snapshot, which must hold the numbers of every step up to its own.
        if len(self._unread) >= self.training.check_every or measured.waited or final or self._due(record.step):
            own = self._read()
        self.recorder.log(record.step, measured.metrics)
        # Last: a run that stops keeps the position after a step that is wholly reported.
        self.position = self.training.position(record.step)
        return own | measured.metrics

    def _read(self) -> dict[str, float]:
        """Log the numbers of the steps that are still on the device, in one transfer; returns the last step's."""
        metrics: dict[str, float] = {}
        for record, metrics in zip(self._unread, as_floats(self._unread), strict=True):
            self.recorder.log(record.step, metrics)
        self._unread.clear()
        return metrics

    def _due(self, step: int) -> bool:
        """Whether a snapshot is due; never after the last step, which leaves nothing to resume."""
        return self.snapshots is not None and self.snapshots.due(step) and step < self.config.train.steps

    def checkpoint_if_due(self, step: int) -> None:
        """Keep the policy's weights of this step, and no longer those of the oldest checkpoint beyond the limit."""
        every, kept = self.config.train.checkpoint_every, self.config.train.checkpoints_kept
        if not every or step % every:
            return
        with TemporaryDirectory() as folder:
            _save(self.prepared.backend, self.training, Path(folder), whole=False)
            self.recorder.listener.artifact(Path(folder), checkpoint(step))
        # Computed from the step, not remembered: so a resumed run also removes what its earlier part kept.
        if kept and step > kept * every:
            self.recorder.listener.remove(checkpoint(step - kept * every))

    def snapshot_if_due(self, step: int) -> None:
        """Take a snapshot if the interval says so."""
        if self._due(step):
            self._snapshot()

    def snapshot_last_step(self) -> None:
        """Keep the last whole step of a run that stops; one that has made no step since its snapshot has it already."""
        # Steps whose numbers are still on the device are part of what the snapshot has to report again.
        self._read()
        if self.position.step > self.training.done:
            self._snapshot()

    def _snapshot(self) -> None:
        """Take a snapshot at `position`, where the run has a place for them; a collective call."""
        if self.snapshots is None:
            return
        state = self.training.state(self.position)  # on every process, since weights may be sharded
        settings, data = self.config.flat(), self.prepared.data
        if distributed.is_main():
            self.snapshots.save(Snapshot(self.position.step, state, self.recorder.events, settings, data))

    def report_decisions(self) -> None:
        """Report what became of each candidate of the reference, where there were some."""
        decisions = self.training.reference.audit
        if decisions:
            columns = {name: [getattr(d, name) for d in decisions] for name in Decision._fields}
            self.recorder.listener.table("reference_audit.json", columns)

    def report_end(self, on_evaluated: Callable[[float], object]) -> None:
        """Draw, score and report the final samples; nothing where the run has no such evaluation."""
        with self.training.averaged():
            drawn, steps = self.measurements.end(on_evaluated), self.config.train.steps
        if drawn is None:
            return
        listener, captions = self.recorder.listener, self.prepared.sampling.captions
        self.recorder.log(steps, drawn.metrics)
        listener.picture("pretrained.png", contact_sheet(drawn.pretrained, columns=len(captions), zoom=1))
        listener.picture("samples.png", contact_sheet(drawn.images, columns=len(captions), zoom=1))
        # For people: the two above, which are read back by place, are as wide as there are prompts.
        first = slice(len(captions))  # of each prompt the image with the first seed
        listener.picture(BESIDE, beside(drawn.pretrained[first], drawn.images[first]))
        if drawn.grid is not None:
            self.recorder.image("samples", steps, drawn.grid)
        listener.table("samples.json", drawn.table)


def _newest(snapshots: Snapshots | None, config: Config, prepared: Prepared) -> Snapshot | None:
    """The snapshot that the run resumes from, the same on every process.

    Raises:
        UserError: the snapshot's run had other settings, data or weights, or more steps than this one is to have.
        Failure: processes find different ones.
    """
    snapshot = snapshots.newest() if snapshots else None
    if snapshots and distributed.world() > 1:
        step = torch.tensor(float(snapshot.step if snapshot else -1), device=prepared.backend.device)
        # Every process has the mean only where all have the same step. All take part, or the others would wait forever.
        if not distributed.agreed(bool(distributed.mean(step) == step)):
            raise Failure(f"{snapshots.folder}: not the same on all machines of the run; let WORKBENCH_STATE be shared")
    if snapshots and snapshot:
        # Settings before data: a changed setting is named, where a digest could only say that something differs.
        require_same(completed(snapshot.settings), config.flat(), str(snapshots.folder))
        if snapshot.step >= config.train.steps:
            raise UserError(
                f"train.steps = {config.train.steps}: the run has taken {snapshot.step} steps already; give more, or "
                "begin anew under another name"
            )
        if snapshot.data != prepared.data:
            raise UserError(f"{snapshots.folder}: the snapshot was made with other data or weights under these names")
    return snapshot


def _save(backend: Backend, training: Training, folder: Path, whole: bool, shown_as: Path | None = None) -> None:
    """Write the policy, or its average; sharded weights are brought together first, on the main process.

    Args:
        whole: write a complete checkpoint, with the pretrained model's other parts; else the denoiser alone.
        shown_as: as `execute` takes it.
    Raises:
        Failure: it cannot be written.
    """
    policy = training.policy
    # Gathering is a collective call: every process takes part in it, and the main one alone writes.
    if distributed.is_sharded(policy):
        weights = distributed.whole_weights(policy)
        if distributed.is_main():
            policy = backend.denoiser(device="cpu")
            policy.load_state_dict(weights)
    if distributed.is_main():
        try:
            with training.averaged(), in_place(folder) as partial:
                backend.save(policy, partial, whole)
        except (OSError, SafetensorError) as error:
            # Not all of what it says: that names the files where it was being written.
            reason = getattr(error, "strerror", None) or error
            raise Failure(f"{shown_as or folder}: the trained model cannot be written ({reason})") from None


def check(config: Config, prepared: Prepared) -> None:
    """Find everything about a run that can be found wrong before it starts, once its data are there.

    Raises:
        UserError: more pairs a batch than there are, or a density that the model's timesteps cannot have.
    """
    # A generator of its own, so that looking moves no draw of the run.
    next(prepared.train.batches(config.train.batch_size, Generator(), prepared.backend.device))
    density, settings = config.chosen("timesteps")
    density(prepared.backend.process.abar, **settings)
