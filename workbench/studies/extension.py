"""Adding arms, seeds and dimensions to a study that is there, which keeps its trials.

An arm or a seed more leaves every trial what it is. A dimension more does where each trial already had a value that the
dimension contains: that value becomes its coordinate, as if it had been chosen. Everything else is another study.
"""

import json
from collections.abc import Iterator, Mapping
from typing import Any

from optuna import Study
from optuna.distributions import distribution_to_json
from optuna.trial import FrozenTrial, TrialState
from sqlalchemy import text

from workbench.common.errors import UserError, shown
from workbench.studies.experiment import Experiment
from workbench.studies.records import StudyRecord, TrialRecord, trial_attributes, write_study
from workbench.studies.space import Dimension
from workbench.studies.storage import open_storage, unused
from workbench.training.config import completed
from workbench.training.snapshots import is_definite

#: Settings of a definition to which entries may be added.
EXTENSIBLE = ("sweep.arms", "sweep.seeds", "sweep.space")


def comparable(stored: Mapping[str, Any]) -> dict[str, Any]:
    """A stored definition as `Experiment.definition` gives it now: with the defaults of later settings.

    Without those of snapshots and others that decide nothing about a trial, which no definition has: how long and how
    safely a study runs may be changed.
    """
    whole = {key: value for key, value in completed(stored).items() if is_definite(key)}
    return json.loads(json.dumps(whole))


def is_extension(stored: Mapping[str, Any], now: Mapping[str, Any], key: str) -> bool:
    """Whether a setting of a study's definition only has entries more than before."""
    if key == "sweep.seeds":
        before = stored.get(key) or [stored.get("seed")]  # without a list each arm has the experiment's own
        return set(before) <= set(now.get(key) or [now.get("seed")])
    return key in EXTENSIBLE and stored.get(key, {}).items() <= now.get(key, {}).items()


def extend(study: Study, experiment: Experiment, url: str) -> Iterator[str]:
    """Add to a study what an experiment declares more than the study has. Hold the storage's lock.

    A kill in between leaves the definition as it was, and all of it is done again.

    Args:
        experiment: differs from the study's definition in extensions alone.
    Returns:
        A line for each thing that was added.
    Raises:
        UserError: another command works on the study, or a trial's value lies outside of a new dimension.
    """
    stored = comparable(StudyRecord.of(study).definition or {})
    if stored == experiment.definition():
        return
    with unused(url, StudyRecord.of(study).token) as free:
        trials = study.get_trials(deepcopy=False)
        # The second question is about workers whose command has died: they end the batch that they are at.
        if not free or any(trial.state == TrialState.RUNNING for trial in trials):
            raise UserError(f"study {study.study_name!r}: another command works on it; extend it when that is done")
        for dimension in experiment.space:
            if dimension.name not in stored.get("sweep.space", {}):
                # Every trial is checked before the first one is changed.
                values = {t.number: _value(t, dimension, experiment, study.study_name) for t in trials}
                _place(study, url, dimension, {n: value for n, value in values.items() if value is not None})
                yield f"dimension {dimension.name}"
        # By name too: arms may have the same settings, and each is run.
        present = [(record.arm, record.overrides) for record in map(TrialRecord.of, trials)]
        for arm in experiment.arms:
            if (arm.name, dict(arm.overrides)) not in present:
                attributes = trial_attributes(arm=arm.name, name=arm.label, overrides=dict(arm.overrides))
                study.enqueue_trial(dict(arm.point), user_attrs=attributes)
                yield f"arm {arm.label}"
        # Last: as long as the definition is the old one, a repetition after a kill does all of this again.
        write_study(study, definition=experiment.definition())


def _value(trial: FrozenTrial, dimension: Dimension, experiment: Experiment, study: str) -> Any:
    """What a trial has for a setting that becomes a dimension; None where its other choices do not take it.

    Raises:
        UserError: the dimension does not contain it.
    """
    value = experiment.settings_of(trial).get(dimension.name)
    if value is not None and not dimension.contains(value):
        raise UserError(
            f"study {study!r}: trial {trial.number} has {dimension.name} = {shown(value)}, which the new dimension "
            f"does not contain; widen sweep.space.{dimension.name}, or choose another --study name"
        )
    return value


def _place(study: Study, url: str, dimension: Dimension, values: Mapping[int, Any]) -> None:
    """Give trials their coordinate in a new dimension, which Optuna's interface refuses for trials that have ended.

    Args:
        values: by the trial's number.
    """
    trials = study.get_trials(deepcopy=False)
    columns = "INSERT INTO trial_params (trial_id, param_name, param_value, distribution_json)"
    with open_storage(url).engine.begin() as connection:
        for number, value in values.items():
            trial = trials[number]
            # Placed already, by a call that was cut short: the database refuses a second value of a parameter.
            if trial.state == TrialState.WAITING or dimension.name in trial.params:
                continue
            row = {
                "id": trial._trial_id,
                "name": dimension.name,
                "value": dimension.distribution.to_internal_repr(value),
                "distribution": distribution_to_json(dimension.distribution),
            }
            connection.execute(text(f"{columns} VALUES (:id, :name, :value, :distribution)"), row)
    # A waiting trial has no coordinates yet. When it starts, Optuna takes them from its `fixed_params`.
    for number, value in values.items():
        if trials[number].state == TrialState.WAITING:
            fixed = trials[number].system_attrs.get("fixed_params", {}) | {dimension.name: value}
            study._storage.set_trial_system_attr(trials[number]._trial_id, "fixed_params", fixed)
