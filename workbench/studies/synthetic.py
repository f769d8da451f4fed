"""Studies with invented trials, for benchmarks: as large as one likes, and nothing is trained."""

import warnings
from collections.abc import Iterator
from dataclasses import dataclass
from datetime import datetime
from typing import Any, NamedTuple

import numpy as np
import optuna
from optuna import Study, Trial
from optuna.trial import TrialState

from workbench.studies import lifecycle
from workbench.studies.recovery import mend
from workbench.studies.space import arms_of, read_sampler, read_space, settings_of
from workbench.studies.storage import locked, open_storage
from workbench.studies.trials import SHOWN, counts
from workbench.studies.workers import missing
from workbench.training.config import Config, resolve


class LongStudy:
    """A study of an experiment that already has finished trials, with random settings and invented values.

    Args:
        settings: the experiment's dotted settings, its sweep included.
        url: of an empty study database.
        finished: number of trials that it has.
    """

    def __init__(self, settings: dict[str, Any], url: str, finished: int):
        self.settings, self.url = settings, url
        config = resolve(settings)
        self.space = read_space(config)
        sampled = optuna.create_study(direction="maximize", sampler=optuna.samplers.RandomSampler(0))
        for i in range(finished):
            trial = sampled.ask()
            settings_of(trial, settings, self.space)
            sampled.tell(trial, float(np.sin(i)))
        with locked(url):
            self.study = optuna.create_study(
                study_name="s", storage=open_storage(url), direction="maximize", sampler=read_sampler(config)
            )
        self.study.add_trials(sampled.get_trials(deepcopy=False))

    def next_trial(self) -> None:
        """Take the next trial as a worker does, under the lock and with the sampler's choice; it ends at once."""
        with locked(self.url):
            mend(self.study)
            missing(self.study, 10**6, running=True)
            trial = self.study.ask()
            settings_of(trial, self.settings, self.space)
        self.study.tell(trial, 0.5)


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
        for metric in SHOWN:
            self._trial.set_user_attr(metric, metrics[metric])
        self._study.tell(self._trial, [metrics[metric] for metric in self.config.sweep.objectives])


def invented_trials(settings: dict[str, Any], name: str, url: str, count: int) -> Iterator[InventedTrial]:
    """Make a study and hand out its trials, arms first, one at a time; finish each before the next is asked for.

    Args:
        settings: the experiment's dotted settings, its arms settled.
    """
    config = resolve(settings)
    with locked(url):
        study = lifecycle.open_study(config, settings, arms_of(config, settings), name, url)
    for _ in range(count):
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # Optuna: the trial has no heartbeat
            trial = study.ask()
        own = resolve(settings_of(trial, settings, read_space(config)))
        attributes = trial.user_attrs
        label, arm = attributes.get("name", f"trial-{trial.number}"), attributes.get("arm", "sampled")
        yield InventedTrial(trial.number, label, arm, own, trial, study)


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
    return [
        TrialTimes(
            t.value if t.state == TrialState.COMPLETE else None,
            t.datetime_start,
            t.datetime_complete,
            t.user_attrs.get("process"),
            int(t.user_attrs.get("progress", {"step": 0})["step"]),
        )
        for t in sorted(trials, key=lambda trial: str(trial.datetime_start))
    ]
