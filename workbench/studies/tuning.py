"""Fair arms: each finds its own learning rate, beta and the like by the same small search before it is compared.

`sweep.tuning.factors` names settings and the factors of an arm's own value that are tried; every combination is one
run with `sweep.tuning.settings` on top (other prompts and another seed than the comparison's), and the best by
`sweep.objective`, within `sweep.constraints`, is what the arm is compared with. Two keys of an arm are not settings:
`like = "ARM"` takes what that arm found, and `times = { "SETTING" = factor }` multiplies what it would have.
"""

import itertools
from collections.abc import Mapping
from typing import Any, NamedTuple

import polars as pl

from workbench.common.errors import UserError
from workbench.studies.space import resolve_arm
from workbench.training.config import known_names, merge, resolve

Found = Mapping[str, Mapping[str, float]]  # arm -> setting -> value


class Candidate(NamedTuple):
    """A run of the search: the arm it belongs to and the values that it tries."""

    arm: str
    values: dict[str, float]


def own_settings(declared: Mapping[str, Any]) -> dict[str, Any]:
    """An arm's settings, without `like` and `times`."""
    return {key: value for key, value in declared.items() if key not in ("like", "times")}


def candidates(settings: Mapping[str, Any]) -> dict[str, Candidate]:
    """The runs of the search by name: every combination for every arm without `like`; none where nothing is tuned.

    Args:
        settings: the experiment's dotted settings, its sweep included.
    Raises:
        UserError: a factor's setting is not a number of any arm, or the study has several objectives.
    """
    config, runs = resolve(settings), {}
    factors, objectives = config.sweep.tuning.factors, config.sweep.objectives
    if factors and len(objectives) > 1:
        raise UserError(f"sweep.tuning: arms are tuned by one objective; sweep.objective has {len(objectives)}")
    for name in factors:
        if name not in known_names() or name.startswith("sweep."):
            raise UserError(f"sweep.tuning.factors.{name}: no setting of that name")
    for arm, declared in config.sweep.arms.items() if factors else ():
        if "like" in declared:
            continue
        own = resolve_arm(arm, settings, own_settings(declared))
        taking_part = [name for name in factors if name in own]
        for combination in itertools.product(*(factors[name] for name in taking_part)):
            values = {n: _product(n, own[n], f) for n, f in zip(taking_part, combination, strict=True)}
            label = " ".join([arm, *(f"{n.split('.')[-1]}={v:g}" for n, v in values.items())])
            runs[label] = Candidate(arm, values)
    return runs


def search(settings: Mapping[str, Any]) -> dict[str, Any]:
    """The search as a study of its own: the candidates are its arms."""
    config = resolve(settings)
    extra = config.sweep.tuning.settings
    arms = {
        label: {k: v for k, v in own_settings(config.sweep.arms[candidate.arm]).items() if k not in extra}
        | candidate.values
        for label, candidate in candidates(settings).items()
    }
    return _study(merge(dict(settings), extra), arms) | {
        "sweep.seeds": [],
        "sweep.trials": len(arms),
        "sweep.space": {},
    }


def found(settings: Mapping[str, Any], runs: pl.DataFrame) -> dict[str, dict[str, float]]:
    """What each arm found: the values of its best complete run that is within the constraints.

    An arm that has none is left out.

    Args:
        runs: the search's, with columns arm, state and the metrics of the objective and the constraints.
    """
    sweep = resolve(settings).sweep
    objective, direction = next(iter(sweep.objectives.items()))  # there is one where arms are tuned
    sign = 1 if direction == "maximize" else -1
    within = [pl.col(metric) <= bound for metric, bound in sweep.constraints.items()]
    ended = runs.filter(pl.col("state") == "complete", *within).select("arm", objective).drop_nulls()
    score = dict(ended.iter_rows())
    best: dict[str, dict[str, float]] = {}
    best_score: dict[str, float] = {}
    for label, candidate in candidates(settings).items():
        value = sign * score.get(label, float("-inf") * sign)
        if value > best_score.get(candidate.arm, float("-inf")):
            best[candidate.arm], best_score[candidate.arm] = candidate.values, value
    return best


def settle(settings: Mapping[str, Any], tuned: Found) -> dict[str, Any]:
    """The study itself: every arm with the values found for it, `like` and `times` worked out.

    Raises:
        UserError: `like` or `times` names what is not there.
    """
    declared_arms = resolve(settings).sweep.arms
    arms = {}
    for arm, declared in declared_arms.items():
        model = declared.get("like", arm)
        if model not in declared_arms or (model != arm and "like" in declared_arms[model]):
            others = ", ".join(name for name, d in declared_arms.items() if "like" not in d)
            raise UserError(f"sweep.arms.{arm}.like = {model!r}: expected an arm that is tuned itself: {others}")
        own = own_settings(declared)
        has = resolve_arm(arm, settings, own)
        own |= {name: value for name, value in tuned.get(model, {}).items() if name in has}
        has = resolve_arm(arm, settings, own)
        for name, factor in dict(declared.get("times", {})).items():
            if name not in has:
                raise UserError(f"sweep.arms.{arm}.times.{name}: the arm has no such setting")
            own[name] = _product(name, has[name], factor)
        arms[arm] = own
    return _study(settings, arms)


def _study(settings: Mapping[str, Any], arms: dict[str, dict[str, Any]]) -> dict[str, Any]:
    return without(settings, "sweep.tuning", "sweep.arms") | {"sweep.arms": arms}


def without(settings: Mapping[str, Any], *tables: str) -> dict[str, Any]:
    """Dotted settings without some tables and what lies in them."""
    inside = tuple(f"{table}." for table in tables)
    return {name: value for name, value in settings.items() if name not in tables and not name.startswith(inside)}


def _product(name: str, value: Any, factor: Any) -> float:
    numbers = all(isinstance(x, int | float) and not isinstance(x, bool) for x in (value, factor))
    if not numbers:
        raise UserError(f"{name} = {value!r} times {factor!r}: both must be numbers")
    return float(f"{value * factor:.3g}")
