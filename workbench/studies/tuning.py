"""Fair arms: each arm finds its own learning rate, beta and the like in a small search before it is compared.

`sweep.tuning.factors` names settings and the factors of an arm's own value that are tried. Every combination is one run
with `sweep.tuning.settings` on top (other prompts and another seed than the comparison's). The arm is compared with the
values of its best run by `sweep.objective`, within `sweep.constraints`. Two keys of an arm are not settings: `like =
"ARM"` takes the values tuned for that arm, and `times = { "SETTING" = factor }` multiplies the value it would have.
"""

import itertools
from collections.abc import Mapping
from dataclasses import dataclass

import polars as pl

from workbench.common.errors import UserError
from workbench.studies.experiment import Experiment, arm_config, own_settings, times, without
from workbench.training.config import known_names, merge


@dataclass(frozen=True)
class Candidate:
    """One run of the search: an arm, and the values that it tries."""

    arm: str
    values: dict[str, float]


def candidates(experiment: Experiment) -> dict[str, Candidate]:
    """The runs of the search by name: every combination for every arm without `like`; empty if nothing is tuned.

    Raises:
        UserError: a factor's setting is not a number of an arm, or the study has several objectives.
    """
    sweep, runs = experiment.declared_sweep, {}
    factors, objectives = sweep.tuning.factors, sweep.objectives
    if factors and len(objectives) > 1:
        raise UserError(f"sweep.tuning: arms are tuned by one objective; sweep.objective has {len(objectives)}")
    for name in factors:
        if name not in known_names() or name.startswith("sweep."):
            raise UserError(f"sweep.tuning.factors.{name}: no setting of that name")
    for arm, declared in sweep.arms.items() if factors else ():
        if "like" in declared:
            continue
        own = arm_config(arm, experiment.declared, own_settings(declared)).flat()
        tuned = [name for name in factors if name in own]
        for combination in itertools.product(*(factors[name] for name in tuned)):
            values = {name: times(name, own[name], factor) for name, factor in zip(tuned, combination, strict=True)}
            label = " ".join([arm, *(f"{name.split('.')[-1]}={value:g}" for name, value in values.items())])
            runs[label] = Candidate(arm, values)
    return runs


def search(experiment: Experiment) -> Experiment:
    """The search as an experiment of its own, whose arms are the candidates."""
    sweep = experiment.declared_sweep
    extra = sweep.tuning.settings
    arms = {
        label: {k: v for k, v in own_settings(sweep.arms[candidate.arm]).items() if k not in extra} | candidate.values
        for label, candidate in candidates(experiment).items()
    }
    base = without(merge(dict(experiment.declared), extra), "sweep.tuning", "sweep.arms")
    own = {"sweep.arms": arms, "sweep.seeds": [], "sweep.trials": len(arms), "sweep.space": {}}
    return Experiment.resolve(base | own)


def best_values(experiment: Experiment, runs: pl.DataFrame) -> dict[str, dict[str, float]]:
    """For each arm the values of its best complete run within the constraints; arms without one are left out.

    Args:
        runs: the search's, with columns arm, state and the metrics of the objective and the constraints.
    """
    sweep = experiment.declared_sweep
    objective, direction = next(iter(sweep.objectives.items()))  # `candidates` makes sure that it is the only one
    sign = 1 if direction == "maximize" else -1
    within = [pl.col(metric) <= bound for metric, bound in sweep.constraints.items()]
    ended = runs.filter(pl.col("state") == "complete", *within).select("arm", objective).drop_nulls()
    score = dict(ended.iter_rows())
    best: dict[str, dict[str, float]] = {}
    best_score: dict[str, float] = {}
    for label, candidate in candidates(experiment).items():
        value = sign * score.get(label, float("-inf") * sign)
        if value > best_score.get(candidate.arm, float("-inf")):
            best[candidate.arm], best_score[candidate.arm] = candidate.values, value
    return best


def on_edge(experiment: Experiment, tuned: Mapping[str, Mapping[str, float]]) -> dict[str, list[str]]:
    """For each tuned arm the settings whose best value is the smallest or the largest that was tried.

    A search that ends there may have missed a better value beyond. A setting of which one value was tried has no edge.

    Args:
        tuned: from `best_values`.
    """
    tried: dict[str, dict[str, set[float]]] = {}
    for candidate in candidates(experiment).values():
        for name, value in candidate.values.items():
            tried.setdefault(candidate.arm, {}).setdefault(name, set()).add(value)
    return {
        arm: [name for name, value in values.items() if len(tried[arm][name]) > 1 and value in _ends(tried[arm][name])]
        for arm, values in tuned.items()
    }


def _ends(values: set[float]) -> tuple[float, float]:
    return min(values), max(values)
