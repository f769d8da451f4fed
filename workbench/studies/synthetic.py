"""Studies with invented trials, for benchmarks: as large as one likes, and nothing is trained."""

import warnings
from collections.abc import Iterator
from dataclasses import dataclass
from datetime import datetime
from typing import NamedTuple

import numpy as np
import optuna
from optuna import Study, Trial
from optuna.trial import FrozenTrial, TrialState

from workbench.studies import lifecycle, records
from workbench.studies.experiment import Experiment
from workbench.studies.records import TrialRecord
from workbench.studies.recovery import recover
from workbench.studies.storage import locked, open_storage
from workbench.studies.trials import SHOWN, counts
from workbench.studies.workers import remaining
from workbench.training.config import Config


class LongStudy:
    """A study of an experiment that already has finished trials, with random settings and invented values.

    Args:
        url: of an empty study database.
        finished: number of trials that it has.
    """

    def __init__(self, experiment: Experiment, url: str, finished: int):
        self.experiment, self.url = experiment, url
        with locked(url):
            self.study = optuna.create_study(
                study_name="s", storage=open_storage(url), direction="maximize", sampler=experiment.sampler(0)
            )
        self.study.add_trials(_sampled(experiment, finished))

    def next_trial(self) -> None:
        """Take the next trial as a worker does, under the lock and with the sampler's choice; it ends at once."""
        with locked(self.url):
            recover(self.study)
            # The number is not needed, but a worker counts before each trial: its time belongs to what is measured.
            remaining(self.study, 10**6, running=True)
            trial = self.study.ask()
            self.experiment.trial_config(trial)
        self.study.tell(trial, 0.5)


def _sampled(experiment: Experiment, count: int, reports: int = 0) -> list[FrozenTrial]:
    """Finished trials with random settings and invented values, of no study yet.

    Args:
        reports: intermediate values of each.
    """
    sampled = optuna.create_study(direction="maximize", sampler=optuna.samplers.RandomSampler(0))
    for i in range(count):
        trial = sampled.ask()
        # Called so that random values are chosen for the trial; the configuration is not needed.
        experiment.trial_config(trial)
        for step in range(reports):
            trial.report(float(np.cos(i + step)), step)
        if reports:
            records.write(trial, metrics=dict.fromkeys(SHOWN, float(np.sin(i))), process="elsewhere:1:0")
        sampled.tell(trial, float(np.sin(i)))
    return sampled.get_trials(deepcopy=False)


def finished_study(experiment: Experiment, name: str, url: str, finished: int, reports: int = 8) -> None:
    """Create a study as the workbench does, with one objective to maximise, and trials of it that have ended."""
    with locked(url), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # Optuna: names of objectives are experimental
        study = lifecycle.open_study(experiment, name, url)
    study.add_trials(_sampled(experiment, finished, reports))


@dataclass(frozen=True)
class InventedTrial:
    """A trial that is about to be filled with invented numbers."""

    number: int
    name: str
    arm: str
    config: Config
    _trial: Trial
    _study: Study

    def finish(self, metrics: dict[str, float]) -> None:
        """End the trial with the last value of each metric, as a worker does."""
        records.write(self._trial, metrics={metric: metrics[metric] for metric in SHOWN})
        self._study.tell(self._trial, [metrics[metric] for metric in self.config.sweep.objectives])


def invented_trials(experiment: Experiment, name: str, url: str, count: int) -> Iterator[InventedTrial]:
    """Create a study and yield its trials, arms first, one at a time; finish each before the next is requested."""
    with locked(url):
        study = lifecycle.open_study(experiment, name, url)
    for _ in range(count):
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # Optuna: the trial has no heartbeat
            trial = study.ask()
        config, record = experiment.trial_config(trial), TrialRecord.of(trial)
        label, arm = record.name or f"trial-{trial.number}", record.arm or "sampled"
        yield InventedTrial(trial.number, label, arm, config, trial, study)


class TrialTimes(NamedTuple):
    """When a trial ran and what it came to.

    Attributes:
        value: None where it did not complete.
        began, ended: of the last attempt; None where it has not.
        process: the worker's.
        steps: optimizer steps that were taken.
    """

    value: float | None
    began: datetime | None
    ended: datetime | None
    process: str | None
    steps: int


def trial_times(name: str, url: str) -> list[TrialTimes]:
    """The trials of a study that came to an end of their own, in the order in which they began."""
    study = optuna.load_study(study_name=name, storage=url)
    trials = [trial for trial in study.get_trials(deepcopy=False) if counts(trial)]
    times = []
    for trial in sorted(trials, key=lambda trial: str(trial.datetime_start)):
        record, value = TrialRecord.of(trial), trial.value if trial.state == TrialState.COMPLETE else None
        steps = record.progress.step if record.progress else 0
        times.append(TrialTimes(value, trial.datetime_start, trial.datetime_complete, record.process, steps))
    return times
