"""What the workbench keeps of studies and trials in Optuna's user attributes, as types.

The keys in the database are fixed: studies made by earlier versions have to be readable. Fields whose key has another
name are listed in `KEYS`.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from typing import Any, NamedTuple

from optuna import Study, Trial
from optuna.trial import FrozenTrial

from workbench.training.sections import Sweep

KEYS = {"crashes": "deaths", "interrupted": "handed_back", "pruned": "reason", "trials": "asked"}


class Progress(NamedTuple):
    """How far a trial's worker is.

    Attributes:
        step: last step that is done, of `of` steps.
        time: when this was written, in seconds of Unix time.
    """

    step: int
    of: int
    time: float


@dataclass(frozen=True)
class TrialRecord:
    """The workbench's attributes of one attempt at a trial.

    Attributes:
        arm, name: the arm and its label with the seed; None where the sampler chose the settings.
        overrides: the arm's dotted settings, its seed included; None where the sampler chose.
        retry_of: number of the interrupted attempt that this one continues.
        crashes: attempts in a row, before this one, that ended without a snapshot or an orderly stop.
        process: the worker, as `common.processes.this_process` names it; None until it has claimed the trial.
        run_id: the MLflow run.
        progress: written at intervals, and at the end.
        snapshot: step of the last snapshot.
        interrupted: why the attempt was stopped in an orderly way; empty if it was not.
        failed: which numbers were not finite; empty if all were.
        pruned: why the trial was pruned; empty if it was not.
        copied_from: number of the trial with the same settings whose result this one has.
        forgotten: whether the user has taken its result away; such a trial counts for nothing.
        metrics: final metrics by name; of a pruned trial the last ones before it was stopped.
    """

    arm: str | None = None
    name: str | None = None
    overrides: Mapping[str, Any] | None = None
    retry_of: int | None = None
    crashes: int = 0
    process: str | None = None
    run_id: str | None = None
    progress: Progress | None = None
    snapshot: int | None = None
    interrupted: str = ""
    failed: str = ""
    pruned: str = ""
    copied_from: int | None = None
    forgotten: bool = False
    metrics: Mapping[str, float] = field(default_factory=dict)

    @classmethod
    def of(cls, trial: Trial | FrozenTrial) -> "TrialRecord":
        """The record of a trial; attributes that others have set are passed over."""
        stored = trial.user_attrs
        found = {name: stored[key] for name, key in _TRIAL_KEYS.items() if key in stored}
        if "progress" in found:
            found["progress"] = Progress(**found["progress"])
        for name in ("interrupted", "failed", "pruned"):
            if found.get(name) is True:  # a reason that had no text
                found[name] = "no reason given"
        # The name of a metric has a slash; no other attribute's has.
        metrics = {key: value for key, value in stored.items() if "/" in key and isinstance(value, float)}
        return cls(**found, metrics=metrics)


def trial_attributes(**values: Any) -> dict[str, Any]:
    """Fields of a `TrialRecord` as Optuna's user attributes."""
    if "progress" in values:
        values["progress"] = values["progress"]._asdict()
    metrics = values.pop("metrics", {})  # each has an attribute of its own, named as the metric
    return {_TRIAL_KEYS[name]: value for name, value in values.items()} | metrics


def write(trial: Trial, **values: Any) -> None:
    """Store fields of a trial's `TrialRecord`.

    Raises:
        UpdateFinishedTrialError: the trial has ended.
    """
    for key, value in trial_attributes(**values).items():
        trial.set_user_attr(key, value)


@dataclass(frozen=True)
class StudyRecord:
    """The workbench's attributes of a study.

    Attributes:
        token: what tells the study from every other of its name.
        definition: the settings that make the study what it is, written when everything else is in place.
        settings: dotted settings with which to resume it.
        trials: how many finished trials it is to have in all.
    """

    token: str = ""
    definition: Mapping[str, Any] | None = None
    settings: Mapping[str, Any] | None = None
    trials: int | None = None

    @classmethod
    def of(cls, study: Study) -> "StudyRecord":
        """The record of a study; attributes that others have set are passed over."""
        return cls.from_attributes(study.user_attrs)

    @classmethod
    def from_attributes(cls, stored: Mapping[str, Any]) -> "StudyRecord":
        """The record in a study's user attributes."""
        return cls(**{name: stored[key] for name, key in _STUDY_KEYS.items() if key in stored})

    @property
    def sweep(self) -> Sweep:
        """What the study searches and for what; nothing else of its sweep is in it."""
        stored = self.definition or {}
        keys = (key for key in ("objective", "direction", "constraints", "space") if f"sweep.{key}" in stored)
        return Sweep.model_validate({key: stored[f"sweep.{key}"] for key in keys})

    @property
    def is_ours(self) -> bool:
        """Whether the workbench made the study: others may use these keys, but not with such values."""
        return isinstance(self.definition, Mapping) and isinstance(self.token, str)


def write_study(study: Study, **values: Any) -> None:
    """Store fields of a study's `StudyRecord`, one after the other in the order given."""
    for name, value in values.items():
        study.set_user_attr(_STUDY_KEYS[name], value)


def _keys(record: type) -> dict[str, str]:
    """Attribute key by field, for the fields that have one of their own."""
    return {f.name: KEYS.get(f.name, f.name) for f in fields(record) if f.name != "metrics"}


_TRIAL_KEYS, _STUDY_KEYS = _keys(TrialRecord), _keys(StudyRecord)
