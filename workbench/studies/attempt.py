"""One attempt at a trial: from the moment a worker takes it until Optuna and MLflow agree on how it ended.

The order of three steps makes a kill at any moment harmless. First the run delivers everything it has logged, while it
is still RUNNING in MLflow. Then Optuna learns how the trial ended. Last the run ends, in the state that Optuna has. So
wherever the two differ later, Optuna is right, and a complete trial always has a complete run. One number stands
aside: the value that Optuna's own pages show of a pruned trial, which is put right after all of this, once.
"""

import math
import time
from collections.abc import Callable, Mapping
from contextlib import suppress
from typing import Any

from optuna import Study, Trial, TrialPruned
from optuna.exceptions import UpdateFinishedTrialError
from optuna.trial import FrozenTrial, TrialState
from sqlalchemy.exc import SQLAlchemyError

from workbench import tracking
from workbench.common.errors import Failure
from workbench.common.processes import this_process
from workbench.common.secrets import hide_passwords
from workbench.studies import records, recovery, storage
from workbench.studies.experiment import Experiment
from workbench.studies.records import Progress, TrialRecord
from workbench.studies.space import constrain, outcome
from workbench.studies.trials import INTERVAL, SHOWN, counts, state_of
from workbench.tracking import tags
from workbench.tracking.study_runs import StudyId
from workbench.training.config import Config, distinguishing
from workbench.training.loop import STEP_METRICS
from workbench.training.measurements import has_pass
from workbench.training.preparation import Prepared
from workbench.training.provenance import datasets, describe, provenance
from workbench.training.run import execute
from workbench.training.sections import Sweep
from workbench.training.snapshots import Snapshots

PROGRESS_INTERVAL = 10.0  #: seconds between two records of a trial's progress, each a write to a shared database


def _so_far(sweep: Sweep, measured: Mapping[str, float]) -> dict[str, float]:
    """What is kept of a trial that is stopped: the usual metrics, and its objectives as far as they are known by then.

    The pruner goes by a metric of its own, which says little beside the values of complete trials. What an objective
    `eval/NAME` would come to, `samples/NAME` has been estimating on the few prompts that are drawn during training.
    """
    names = [*SHOWN, *sweep.objectives, *(f"samples/{name.removeprefix('eval/')}" for name in sweep.objectives)]
    return {metric: measured[metric] for metric in names if math.isfinite(measured.get(metric, math.nan))}


class TrialTakenError(RuntimeError):
    """The trial was failed by another process, since this one had no heartbeat for too long."""


class Attempt:
    """One attempt at a trial, run and tracked. Optuna calls it as the objective.

    Args:
        study_id: of the study, in Optuna and in MLflow.
        parent: id of the study's MLflow run.
        prepare: what the runs of a process share, for the settings of one of them.
        on_claimed: called once the trial has this process's name and heartbeat.
        on_step: called after each step, as `execute` does.
        on_evaluated: called while the trained model's samples are drawn, with the share that is done.
        stopping: whether to take a snapshot, give the trial back to the queue and raise KeyboardInterrupt.
    """

    def __init__(
        self,
        study: Study,
        experiment: Experiment,
        client: tracking.Client,
        study_id: StudyId,
        parent: str,
        *,
        prepare: Callable[[Config], Prepared],
        on_claimed: Callable[[], None],
        on_step: Callable[[int, Mapping[str, float]], None],
        stopping: Callable[[], bool],
        on_evaluated: Callable[[float], None] = lambda share: None,
    ):
        self.study, self.experiment, self.client = study, experiment, client
        self.study_id, self.parent, self.prepare = study_id, parent, prepare
        self.on_claimed, self.on_step, self.on_evaluated = on_claimed, on_step, on_evaluated
        self.stopping = stopping
        self.trial: Trial | None = None
        self.error: BaseException | None = None
        self.reason = ""
        self._tracker: tracking.Tracker | None = None
        self._snapshots: Snapshots | None = None
        self._last_progress = 0.0

    def __call__(self, trial: Trial) -> float | tuple[float, ...]:
        """The values of the trial's objectives.

        A trial whose numbers are not finite has failed and counts. One that ends for another reason (it was stopped, a
        store is away, memory ran out) is queued again by `recovery.recover`.
        """
        self.trial = trial
        try:
            self._claim(trial)
            self.on_claimed()
            config = self.experiment.trial_config(trial)
            twin = self._twin(trial, config)
            return self._run(trial, config) if twin is None else self._copied(trial, twin)
        except BaseException as error:
            self.error = error
            self.reason = hide_passwords(str(error))
            # Before Optuna sees the error and ends the trial, which then takes no attribute; and before the delivery,
            # in which the process may be killed: a stop without its reason may count as a crash (`trials.crashes`).
            self._store_reason(trial, error)
            if self._tracker is not None:
                with suppress(Failure):  # what cannot be delivered now waits on disk
                    self._tracker.finish(self._patience())
            raise

    def _claim(self, trial: Trial) -> None:
        # Optuna's own first heartbeat comes from a thread, some time later. A worker that dies before it would leave a
        # trial that is never found stale.
        self.study._storage.record_heartbeat(trial._trial_id)  # type: ignore[attr-defined]
        records.write(trial, process=this_process())

    def _store_reason(self, trial: Trial, error: BaseException) -> None:
        # Any other error leaves no reason, and the trial is tried again (`trials.counts`).
        fields = {TrialPruned: "pruned", FloatingPointError: "failed", KeyboardInterrupt: "interrupted"}
        if type(error) in fields:
            with suppress(UpdateFinishedTrialError):
                records.write(trial, **{fields[type(error)]: self.reason or True})

    def _twin(self, trial: Trial, config: Config) -> FrozenTrial | None:
        """A complete trial with the settings that the sampler has chosen once more; None where there is none.

        Equal settings, the seed among them, train to the same result. An arm is always run: tables compare arms.
        """
        if TrialRecord.of(trial).overrides is not None:
            return None
        for other in self.study.get_trials(deepcopy=False):
            if other.state == TrialState.COMPLETE and self.experiment.settings_of(other) == config.flat():
                return other
        return None

    def _copied(self, trial: Trial, twin: FrozenTrial) -> float | tuple[float, ...]:
        """Give a trial the result of another; it has no run of its own."""
        records.write(trial, copied_from=twin.number, metrics=dict(TrialRecord.of(twin).metrics))
        for name, excess in twin.constraints.items():
            trial.set_constraint(name, excess)
        return tuple(twin.values) if len(twin.values) > 1 else twin.values[0]

    def _run(self, trial: Trial, config: Config) -> float | tuple[float, ...]:
        prepared = self.prepare(config)
        trials = self.study.get_trials(deepcopy=False)
        numbers = [*recovery.attempts(trials, trial.number)]
        folders = [recovery.snapshot_folder(self.study, number) for number in numbers]
        # Each attempt writes into a folder of its own, since a worker that was taken for dead may still be writing.
        # It resumes from the snapshots of earlier attempts too.
        self._snapshots = snapshots = Snapshots(
            folders[0], config.snapshots.interval, config.snapshots.keep, folders[1:]
        )
        self._tracker = self._track(trial, config, prepared)
        # A kill before this line leaves a run that only its process ties to the trial (`TrialStatus.has`).
        records.write(trial, run_id=self._tracker.run_id)
        reported = {step: v for number in numbers[1:] for step, v in trials[number].intermediate_values.items()}
        measured: dict[str, float] = {}  # of earlier attempts too, once the run has resumed

        def on_step(step: int, metrics: Mapping[str, float]) -> None:
            resumed = not metrics  # a run that resumes calls once, before its first step, with nothing measured
            if resumed:
                self._repeat_reports(trial, step, reported)
            # Metrics come at different steps; a trial that is pruned is judged by the last value of each.
            measured.update(metrics)
            self.on_step(step, metrics)
            # The run has written the snapshot before it calls this (`training.run.execute`), so the record never
            # claims one that is not there. After the last step the run takes none.
            if not resumed and snapshots.due(step) and step < config.train.steps:
                self._write(trial, snapshot=step)
            passed = has_pass(config, step)
            # A step's own metrics are told of every step on a CPU and of some on a GPU: only at the passes, where they
            # are told on both, do they decide.
            watched = metrics if passed else {name: v for name, v in metrics.items() if name not in STEP_METRICS}
            reason = self._collapsed(step, watched) or (self._pruned(trial, step, watched) if passed else "")
            if reason or time.monotonic() - self._last_progress > PROGRESS_INTERVAL:
                self._write_progress(trial, step, config)
            if reason:
                self._write(trial, metrics=_so_far(self.experiment.sweep, measured))
                # Optuna accepts no constraint once the trial has ended, which it does as soon as this raises.
                constrain(trial, self.experiment.sweep, measured)
                raise TrialPruned(reason)

        final = execute(
            config,
            prepared,
            self._tracker,
            on_step=on_step,
            on_resumed=measured.update,
            on_evaluated=self.on_evaluated,
            snapshots=snapshots,
            stopping=self.stopping,
        )
        shown = [metric for metric in (*SHOWN, *INTERVAL) if math.isfinite(final.get(metric, math.nan))]
        self._write(trial, metrics={metric: final[metric] for metric in shown})
        values = outcome(trial, self.experiment.sweep, final)
        self._tracker.finish()  # before Optuna learns of the end, which this function's return tells it
        self._write_progress(trial, config.train.steps, config)
        return values

    def _track(self, trial: Trial, config: Config, prepared: Prepared) -> tracking.Tracker:
        record = TrialRecord.of(trial)
        about = provenance() | {
            tags.KIND: "trial",
            tags.STUDY: self.study_id.name,
            tags.TOKEN: self.study_id.token,
            tags.TRIAL: str(trial.number),
            tags.ARM: record.arm or "sampled",
            tags.NOTE: describe(config, record.arm or ""),
        }
        if record.retry_of is not None:
            about[tags.RETRY_OF] = str(record.retry_of)
        name, inputs = record.name or f"trial-{trial.number}", datasets(prepared)
        settings = config.flat()
        # In a table of a study's runs each has a value in every column that tells them apart.
        varied = [dimension.name for dimension in self.experiment.space]
        varied += [setting for arm in self.experiment.arms for setting in arm.overrides]
        return tracking.Tracker(
            self.client,
            name,
            params=distinguishing(settings, *varied),
            settings=settings,
            tags=about,
            datasets=inputs,
            parent=self.parent,
        )

    def _repeat_reports(self, trial: Trial, step: int, reported: Mapping[int, float]) -> None:
        """Report to the pruner what earlier attempts had reported up to the step that this one resumes from.

        Each attempt is a trial of its own in Optuna, and would otherwise lack the beginning of its curve. What came
        after that step is run, and reported, again.
        """
        for earlier, value in sorted(reported.items()):
            if earlier <= step:
                trial.report(value, earlier)

    def _write(self, trial: Trial, **values: Any) -> None:
        """Store fields of the trial's record, and so learn whether the trial still is this process's.

        Raises:
            TrialTakenError: the trial has ended without this process.
        """
        try:
            records.write(trial, **values)
        except UpdateFinishedTrialError:
            raise TrialTakenError(f"trial {trial.number} was taken by another worker") from None

    def _write_progress(self, trial: Trial, step: int, config: Config) -> None:
        self._write(trial, progress=Progress(step, config.train.steps, time.time()))
        self._last_progress = time.monotonic()

    def _collapsed(self, step: int, metrics: Mapping[str, float]) -> str:
        """Why the trial is stopped as collapsed; empty if it is not."""
        bound = self.experiment.sweep.prune
        value = metrics.get(bound.metric, -math.inf)
        return f"{bound.metric} = {value:.4g} above {bound.above} at step {step}" if value > bound.above else ""

    def _pruned(self, trial: Trial, step: int, metrics: Mapping[str, float]) -> str:
        """Why the pruner stops the trial; empty if it does not.

        Arms report to the pruner and are never stopped by it, since they are what sampled trials are compared with.
        """
        sweep = self.experiment.sweep
        if not sweep.prunes or sweep.pruner_metric not in metrics:
            return ""
        value = metrics[sweep.pruner_metric]
        trial.report(value, step)
        pruned = TrialRecord.of(trial).arm is None and trial.should_prune()
        return f"{sweep.pruner_metric} = {value:.4g} at step {step} does not keep up" if pruned else ""

    def was_taken(self, error: BaseException) -> bool:
        """Whether an error that Optuna raised means that the trial ended without this process."""
        if self.trial is None or self.trial.number is None:
            return False
        ended = self._frozen().state.is_finished()
        # An error of Optuna's own, about a trial that has ended, comes from its attempt to end the trial once more.
        return ended and (isinstance(self.error, TrialTakenError | UpdateFinishedTrialError) or error is not self.error)

    def finish(self) -> None:
        """End the MLflow run as Optuna has it, and remove the snapshots of a trial that counts."""
        if self.trial is None:
            return
        frozen = self._frozen()
        if self._tracker is not None:
            # Optuna may not have learned of the end, since its database is away. Then the run stays open too, until
            # `reconcile` knows how the trial ended.
            if not frozen.state.is_finished():
                return
            self._tracker.end(state_of(frozen), self.reason, self._patience())
        # Now that all has ended: what a kill before this leaves, `recovery.remove_unused_snapshots` removes.
        if counts(frozen) and self._snapshots is not None:
            self._snapshots.discard()
        if state_of(frozen) == "pruned" and len(self.study.directions) == 1:
            # Last, and no matter: after a kill before this, or an error of the database, Optuna's pages go on showing
            # what the pruner saw, and nothing else reads it.
            with suppress(SQLAlchemyError):
                storage.set_pruned_value(self.study, frozen, self._estimate(frozen))

    def _estimate(self, trial: FrozenTrial) -> float | None:
        """What the objective of a stopped trial has come to so far; None where nothing told it."""
        objective, kept = next(iter(self.experiment.sweep.objectives)), TrialRecord.of(trial).metrics
        return kept.get(objective, kept.get(f"samples/{objective.removeprefix('eval/')}"))

    def _patience(self) -> float:
        """Seconds to wait for a tracking store that is away.

        A process that was told to stop has little time: the stop is forced after `common.signals.PATIENCE`.
        """
        return 5.0 if isinstance(self.error, KeyboardInterrupt) else 60.0

    def _frozen(self) -> FrozenTrial:
        assert self.trial is not None
        # From the database: the `Trial` object does not see what another process has done to the trial.
        return self.study.get_trials(deepcopy=False)[self.trial.number]
