"""A study's search, read from Optuna's storage as data, and which settings mattered."""

from typing import Any

import numpy as np
import optuna
import polars as pl
from optuna import Study
from optuna.distributions import CategoricalDistribution
from optuna.importance import FanovaImportanceEvaluator, get_param_importances
from optuna.trial import FrozenTrial, TrialState
from scipy.stats import rankdata
from sklearn.ensemble import RandomForestRegressor
from sqlalchemy import make_url

from workbench.common.errors import UserError
from workbench.common.paths import storage_url
from workbench.studies.records import StudyRecord, TrialRecord
from workbench.studies.search import Search
from workbench.studies.storage import find_study, missing, open_storage
from workbench.studies.trials import counts, feasible, measured, state_of
from workbench.training.sections import Sweep

ENOUGH = 8  #: fewest trials from which importance is worked out


def open_search(name: str) -> Study:
    """A study that searched: one with a space, several objectives or constraints.

    Raises:
        UserError: there is none of that name here, or it only compares arms by one objective.
    """
    study = _own_study(name)
    if study is None:
        raise UserError(f"study {name!r}: not in {_place()}; WORKBENCH_STORAGE says where studies lie")
    sweep = StudyRecord.of(study).sweep
    if not sweep.space and not sweep.constraints and len(sweep.objectives) == 1:
        raise UserError(f"study {name!r} searches nothing: it has arms alone, one objective and no constraints")
    return study


def declared(name: str) -> Sweep | None:
    """What a study searches and for what; None where this study database has no such study."""
    study = _own_study(name)
    return None if study is None else StudyRecord.of(study).sweep


def _own_study(name: str) -> Study | None:
    """The workbench's study of that name in this study database, which is not made where it is missing."""
    url = storage_url()
    if missing(url):
        return None
    study = find_study(name, open_storage(url))
    return None if study is None or StudyRecord.of(study).definition is None else study


def _place() -> str:
    """Where studies lie, as a message shows it: the file, which is not an address with a password."""
    url = storage_url()
    return (make_url(url).database if url.startswith("sqlite") else None) or "the study storage"


def _inside(trial: FrozenTrial, sweep: Sweep) -> bool:
    """Whether a trial differs from its study's settings only in the space, and in the seed, as sampled trials do."""
    return set(TrialRecord.of(trial).overrides or {}) <= {"seed", *sweep.space}


def read(study: Study) -> Search:
    """A study's search as data."""
    sweep, best = StudyRecord.of(study).sweep, {trial.number for trial in study.best_trials}
    # Choices of one setting may be of several types, a column has one type.
    kinds = {name: str if d["type"] == "CategoricalDistribution" else float for name, d in sweep.space.items()}
    rows = [
        {
            "number": trial.number,
            "name": TrialRecord.of(trial).name or f"trial-{trial.number}",
            "arm": TrialRecord.of(trial).arm,
            "state": state_of(trial),
            "feasible": feasible(trial),
            "best": trial.number in best,
            "inside": _inside(trial, sweep),
            **measured(trial, sweep),
            **{name: kind(trial.params[name]) for name, kind in kinds.items() if name in trial.params},
        }
        for trial in study.get_trials(deepcopy=False)
        if trial.state.is_finished() and counts(trial)
    ]
    schema: dict[str, Any] = {"number": int, "name": str, "arm": str, "state": str}
    schema |= dict.fromkeys(("feasible", "best", "inside"), bool)
    schema |= dict.fromkeys(sorted({key for row in rows for key in row if "/" in key} | {*sweep.objectives}), float)
    return Search(sweep.objectives, sweep.constraints, sweep.space, pl.DataFrame(rows, schema=schema | kinds))


def reports(study: Study) -> pl.DataFrame:
    """What trials that count reported to the pruner on their way.

    Returns:
        Columns number, state, metric (the pruner's), step, value; by trial and step; no rows where nothing prunes.
    """
    metric = StudyRecord.of(study).sweep.pruner_metric
    rows = [
        {"number": trial.number, "state": state_of(trial), "metric": metric, "step": step, "value": value}
        for trial in study.get_trials(deepcopy=False)
        if trial.state.is_finished() and counts(trial)
        for step, value in sorted(trial.intermediate_values.items())
    ]
    schema = {"number": int, "state": str, "metric": str, "step": int, "value": float}
    return pl.DataFrame(rows, schema=schema, orient="row")


def importance(study: Study) -> pl.DataFrame:
    """How much each setting explains of the order in which a metric ranks the trials.

    Optuna's fANOVA divides what a random forest explains among the settings. Its shares always sum to 1, even where
    there is nothing but noise. So each share comes with how well such a forest predicts trials that it was not fitted
    to (out-of-bag R2, 0 if no better than the mean). Both are of ranks, so that one extreme trial does not decide.

    Taken over complete trials, within the constraints or not, that differ from the study only in the space. A setting
    that only some of them have is judged on those, beside the settings that all of those have.

    Returns:
        Columns metric, setting, share, predicted, trials.
    Raises:
        UserError: there are fewer than 8 such trials, or no metric differs between them.
    """
    sweep = StudyRecord.of(study).sweep
    if not sweep.space:
        raise UserError("importance: the study declares no sweep.space")
    ended = [t for t in study.get_trials(deepcopy=False) if t.state == TrialState.COMPLETE and _inside(t, sweep)]
    if len(ended) < ENOUGH:
        raise UserError(f"importance needs {ENOUGH} complete trials of the space; the study has {len(ended)}")
    groups: dict[tuple[int, ...], list[str]] = {}
    for name in sweep.space:
        groups.setdefault(tuple(i for i, trial in enumerate(ended) if name in trial.params), []).append(name)
    rows = []
    for members, settings in groups.items():
        if len(members) < ENOUGH:
            continue
        trials = [ended[i] for i in members]
        judged = [name for name in sweep.space if all(name in trial.params for trial in trials)]
        for metric in dict.fromkeys([*sweep.objectives, *sweep.constraints]):
            values = np.array([measured(trial, sweep)[metric] for trial in trials])
            if np.ptp(values) > 0:
                ranks = rankdata(values)
                shares, predicted = _shares(trials, judged, ranks), _predictable(trials, judged, ranks)
                about = {"metric": metric, "predicted": predicted, "trials": len(trials)}
                rows += [about | {"setting": name, "share": shares[name]} for name in settings]
    if not rows:
        raise UserError("importance: no metric differs between the trials of the space")
    return pl.DataFrame(rows).select("metric", "setting", "share", "predicted", "trials")


def _shares(trials: list[FrozenTrial], settings: list[str], values: np.ndarray) -> dict[str, float]:
    """Each setting's share in explaining values, shape (trials,), by fANOVA; the shares sum to 1."""
    # In memory, with the ranks as values. Its direction has no influence on importance.
    study = optuna.create_study()
    study.add_trials(
        optuna.trial.create_trial(params=t.params, distributions=t.distributions, value=value)
        for t, value in zip(trials, values, strict=True)
    )
    return get_param_importances(study, evaluator=FanovaImportanceEvaluator(seed=0), params=settings)


def _predictable(trials: list[FrozenTrial], settings: list[str], values: np.ndarray) -> float:
    """The share of the values' variance that a random forest predicts out of bag; at least 0."""
    columns: list[list[float]] = []
    for name in settings:
        distribution = trials[0].distributions[name]
        # On a logarithmic dimension no logarithm is needed: trees split by order alone.
        inside = [distribution.to_internal_repr(trial.params[name]) for trial in trials]
        choices = len(distribution.choices) if isinstance(distribution, CategoricalDistribution) else 0
        # A column a choice: the indices of choices would give them an order that they do not have.
        columns += [[float(value == choice) for value in inside] for choice in range(choices)] if choices else [inside]
    forest = RandomForestRegressor(200, oob_score=True, random_state=0).fit(np.array(columns).T, values)
    return max(0.0, float(forest.oob_score_))
