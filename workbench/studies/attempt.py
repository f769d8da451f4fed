"""One attempt at a trial, from its being taken to the moment when Optuna and MLflow say the same of how it ended.

The order is what makes a kill at any moment harmless: everything a run has to say is delivered while its MLflow run
still runs, then Optuna hears how the trial ended, and only then does the run end, as Optuna has it. Whoever finds the
two apart later knows which to believe.
"""

import math
import time
from collections.abc import Callable, Mapping
from contextlib import suppress
from typing import Any

from optuna import Study, Trial, TrialPruned
from optuna.exceptions import UpdateFinishedTrialError

from workbench import tracking
from workbench.common.errors import Failure
from workbench.common.processes import this_process
from workbench.common.secrets import hide_passwords
from workbench.studies import recovery
from workbench.studies.space import constrain, outcome, read_space, settings_of
from workbench.studies.trials import SHOWN, SPAN, counts, state_of
from workbench.tracking import tags
from workbench.training.config import Config, resolve
from workbench.training.provenance import datasets, describe, provenance
from workbench.training.run import execute, prepare
from workbench.training.snapshots import Snapshots

SIGN_OF_LIFE = 10.0  # seconds between two


class LostError(RuntimeError):
    """The trial was taken from its worker, which had given no sign of life for too long."""


class Attempt:
    """One trial of a study, run and tracked.

    Args:
        settings: the experiment's dotted settings, its sweep included.
        parent: id of the study's MLflow run.
        taken: called once the trial is this process's own.
        on_step: called with the step after each.
        stopping: whether to take a snapshot, hand the trial back and raise KeyboardInterrupt.
    """

    def __init__(
        self,
        study: Study,
        settings: Mapping[str, Any],
        client: tracking.Client,
        parent: str,
        *,
        taken: Callable[[], None],
        on_step: Callable[[int], None],
        stopping: Callable[[], bool],
    ):
        self.study, self.settings, self.client, self.parent = study, settings, client, parent
        self.config = resolve(dict(settings))
        self.taken, self.on_step, self.stopping = taken, on_step, stopping
        self.trial: Trial | None = None
        self.error: BaseException | None = None
        self.reason = ""
        self._tracker: tracking.Tracker | None = None
        self._snapshots: Snapshots | None = None
        self._alive = 0.0

    def __call__(self, trial: Trial) -> float | tuple[float, ...]:
        """What Optuna calls: the trial's objective, or objectives.

        A trial whose numbers are not finite has failed and counts; one that ends otherwise (stopped, a store out of
        reach, out of memory) is queued again.
        """
        self.trial = trial
        try:
            self._sign(trial)
            self.taken()
            return self._run(trial)
        except BaseException as error:
            self.error = error
            self.reason = hide_passwords(str(error))
            self._explain(trial, error)
            if self._tracker is not None:
                with suppress(Failure):  # what could not be delivered waits on disk
                    self._tracker.finish(self._patience())
            raise

    def _sign(self, trial: Trial) -> None:
        self.study._storage.record_heartbeat(trial._trial_id)  # type: ignore[attr-defined]  # or a kill leaves none
        trial.set_user_attr("process", this_process())

    def _explain(self, trial: Trial, error: BaseException) -> None:
        """Tell Optuna why, as far as it can be told anything."""
        key = {TrialPruned: "reason", FloatingPointError: "failed", KeyboardInterrupt: "handed_back"}.get(type(error))
        if key is None:
            return
        with suppress(UpdateFinishedTrialError):
            trial.set_user_attr(key, self.reason or True)

    def _run(self, trial: Trial) -> float | tuple[float, ...]:
        config = resolve(settings_of(trial, self.settings, read_space(self.config)))
        trials = self.study.get_trials(deepcopy=False)
        chain = [*recovery.chain(trials, trial.number)]
        attempts = [recovery.snapshots_of(self.study, number) for number in chain]
        kept = config.snapshots
        self._snapshots = snapshots = Snapshots(attempts[0], kept.interval, kept.keep, attempts[1:])
        self._tracker = self._track(trial, config)
        trial.set_user_attr("run_id", self._tracker.run_id)
        last: dict[str, float] = {}
        earlier = [(s, v) for n in chain[1:] for s, v in trials[n].intermediate_values.items()]

        def on_step(step: int, news: Mapping[str, float]) -> None:
            last.update(news)
            if not news:  # a pruner has to know what the attempt that this one goes on from has told
                for told, value in sorted(earlier):
                    if told <= step:
                        trial.report(value, told)
            self.on_step(step)
            if news and snapshots.due(step) and step < config.train.steps:  # no news: it only goes on from there
                self._say(trial, "snapshot", step)
            reason = self._collapsed(step, news) or self._beaten(trial, step, news)
            if reason or time.monotonic() - self._alive > SIGN_OF_LIFE:
                self._say(trial, "progress", {"step": step, "of": config.train.steps, "time": time.time()})
                self._alive = time.monotonic()
            if reason:
                constrain(trial, self.config.sweep, last)
                raise TrialPruned(reason)

        final = execute(config, self._tracker, on_step=on_step, snapshots=snapshots, stopping=self.stopping)
        for metric in (*SHOWN, *SPAN):
            if metric in final and math.isfinite(final[metric]):
                self._say(trial, metric, final[metric])
        values = outcome(trial, self.config.sweep, final)
        self._tracker.finish()
        self._say(trial, "progress", {"step": config.train.steps, "of": config.train.steps, "time": time.time()})
        return values

    def _track(self, trial: Trial, config: Config) -> tracking.Tracker:
        arm, name = trial.user_attrs.get("arm", ""), trial.user_attrs.get("name", f"trial-{trial.number}")
        about = provenance() | {
            tags.KIND: "trial",
            tags.STUDY: self.study.study_name,
            tags.TRIAL: str(trial.number),
            tags.ARM: arm or "sampled",
            tags.NOTE: describe(config, arm),
        }
        if "retry_of" in trial.user_attrs:
            about[tags.RETRY_OF] = str(trial.user_attrs["retry_of"])
        inputs = datasets(prepare(config))
        return tracking.Tracker(
            self.client, name, params=config.flat(), tags=about, datasets=inputs, parent=self.parent
        )

    def _say(self, trial: Trial, key: str, value: Any) -> None:
        """A sign of life with some news.

        Raises:
            LostError: the trial has ended without this process.
        """
        try:
            trial.set_user_attr(key, value)
        except UpdateFinishedTrialError:
            raise LostError(f"trial {trial.number} was taken by another worker") from None

    def _collapsed(self, step: int, news: Mapping[str, float]) -> str:
        """Why the trial is not worth going on with, if it is not."""
        watched = self.config.sweep.prune
        found = news.get(watched.metric, -math.inf)
        return f"{watched.metric} = {found:.4g} above {watched.above} at step {step}" if found > watched.above else ""

    def _beaten(self, trial: Trial, step: int, news: Mapping[str, float]) -> str:
        """The same where others did better; arms are what they are compared with and run to their end."""
        sweep = self.config.sweep
        if not sweep.prunes or sweep.pruner_metric not in news:
            return ""
        found = news[sweep.pruner_metric]
        trial.report(found, step)
        beaten = "arm" not in trial.user_attrs and trial.should_prune()
        return f"{sweep.pruner_metric} = {found:.4g} at step {step} does not keep up" if beaten else ""

    def lost(self, error: BaseException) -> bool:
        """Whether what Optuna raised means that the trial ended without this process."""
        if self.trial is None or self.trial.number is None:
            return False
        ended = self._frozen().state.is_finished()
        return ended and (isinstance(self.error, LostError | UpdateFinishedTrialError) or error is not self.error)

    def settle(self) -> None:
        """Let the MLflow run end as Optuna has it; snapshots of a trial that came to an end of its own go."""
        if self.trial is None:
            return
        frozen = self._frozen()
        if self._tracker is not None:
            if not frozen.state.is_finished():  # Optuna could not be told: the run stays as it is, for `agree`
                return
            self._tracker.end(state_of(frozen), self.reason, self._patience())
        if counts(frozen) and self._snapshots is not None:
            self._snapshots.discard()

    def _patience(self) -> float:
        """Seconds for a tracking store that is away; who was asked to stop has little time."""
        return 5.0 if isinstance(self.error, KeyboardInterrupt) else 60.0

    def _frozen(self) -> Any:
        assert self.trial is not None
        return self.study.get_trials(deepcopy=False)[self.trial.number]
