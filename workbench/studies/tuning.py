"""Fair arms: each arm finds its own learning rate, beta and the like in a small search before it is compared.

`sweep.tuning.arms` names the arms, `factors` settings and the factors of an arm's own value that are tried: every
combination (`design = "grid"`), or one setting at a time, the others as they are (`"star"`). Each candidate is one run
with `sweep.tuning.settings` on top (other prompts and another seed than the comparison's). An arm whose best value is
the smallest or largest that it has tried then tries one step further, at most `sweep.tuning.extensions` times. The arm
is compared with the values of its best run by `sweep.objective`, within `sweep.constraints`. Two keys of an arm are not
settings: `like = "ARM"` takes the values tuned for that arm, and `times = { "SETTING" = factor }` multiplies the value
it would have.
"""

import contextlib
import itertools
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field

import polars as pl

from workbench.common.errors import UserError
from workbench.studies.experiment import Experiment, arm_config, own_settings, times, without
from workbench.training.config import known_names, merge

#: What follows a study's name in those of its search's rounds, as `round_name` gives them; a regular expression.
ROUNDS = r"-tuning(-\d+)?"
#: End of the name of each study that a study makes for itself: rounds of its search, and the claims' checks.
HELPERS = f"({ROUNDS}|-checks)"


def round_name(study: str, number: int) -> str:
    """The name of the study that is one round of a study's search; rounds count from 1."""
    return f"{study}-tuning" if number == 1 else f"{study}-tuning-{number}"


@dataclass(frozen=True)
class Candidate:
    """One run of the search: an arm, and the values that it tries."""

    arm: str
    values: dict[str, float]


def candidates(experiment: Experiment) -> dict[str, Candidate]:
    """The first runs of the search by name, for every arm that is tuned; empty if nothing is.

    Raises:
        UserError: a factor's setting is not a number of an arm, an arm to tune does not exist, or the study has several
            objectives.
    """
    sweep, runs = experiment.declared_sweep, {}
    factors, objectives = sweep.tuning.factors, sweep.objectives
    if factors and len(objectives) > 1:
        raise UserError(f"sweep.tuning: arms are tuned by one objective; sweep.objective has {len(objectives)}")
    for name in factors:
        if name not in known_names() or name.startswith("sweep."):
            raise UserError(f"sweep.tuning.factors.{name}: no setting of that name")
    tuned_arms = sweep.tuning.arms or [arm for arm, declared in sweep.arms.items() if "like" not in declared]
    for arm in sweep.tuning.arms:
        if arm not in sweep.arms or "like" in sweep.arms[arm]:
            raise UserError(f"sweep.tuning.arms = {arm!r}: expected an arm without `like`, of {', '.join(sweep.arms)}")
    for arm, declared in sweep.arms.items() if factors else ():
        if arm not in tuned_arms:
            continue
        own = arm_config(arm, experiment.declared, own_settings(declared)).flat()
        tuned = [name for name in factors if name in own]
        for combination in _combinations([factors[name] for name in tuned], sweep.tuning.design):
            values = {name: times(name, own[name], factor) for name, factor in zip(tuned, combination, strict=True)}
            runs[_label(arm, values)] = Candidate(arm, values)
    return runs


def _combinations(factors: Sequence[Sequence[float]], design: str) -> Iterator[tuple[float, ...]]:
    """Factors of each setting that are tried together; a star's middle is the arm's own values."""
    if design == "grid":
        yield from itertools.product(*factors)
        return
    middle = (1.0,) * len(factors)
    yield middle
    for place, own in enumerate(factors):
        # A factor of 1 is the middle once more.
        yield from ((*middle[:place], factor, *middle[place + 1 :]) for factor in own if factor != 1)


def _label(arm: str, values: Mapping[str, float]) -> str:
    return " ".join([arm, *(f"{name.split('.')[-1]}={value:g}" for name, value in values.items())])


def search(experiment: Experiment, tried: Mapping[str, Candidate]) -> Experiment:
    """Some candidates as an experiment of its own, of which they are the arms."""
    sweep = experiment.declared_sweep
    extra = sweep.tuning.settings
    # What the search sets for all its runs (a seed and prompts of its own) takes precedence over an arm's value.
    arms = {
        label: {k: v for k, v in own_settings(sweep.arms[candidate.arm]).items() if k not in extra} | candidate.values
        for label, candidate in tried.items()
    }
    base = without(merge(dict(experiment.declared), extra), "sweep.tuning", "sweep.arms")
    own = {"sweep.arms": arms, "sweep.seeds": [], "sweep.trials": len(arms), "sweep.space": {}}
    return Experiment.resolve(base | own)


@dataclass(frozen=True)
class Findings:
    """What a search has tried, and what came of it.

    Attributes:
        tried: the candidates by name.
        scores: their values of the objective, of complete runs within the constraints.
        sign: 1 where more is better, -1 where less is.
    """

    tried: Mapping[str, Candidate] = field(default_factory=dict)
    scores: Mapping[str, float] = field(default_factory=dict)
    sign: int = 1

    @property
    def best(self) -> dict[str, dict[str, float]]:
        """For each arm the values of its best run; arms without a complete one are left out."""
        best: dict[str, str] = {}
        for label, candidate in self.tried.items():
            arm, score = candidate.arm, self.scores.get(label)
            # Of equal scores the first stays; in a star the arm's own values come first.
            if score is not None and (arm not in best or self.sign * (score - self.scores[best[arm]]) > 0):
                best[arm] = label
        return {arm: self.tried[label].values for arm, label in best.items()}

    @property
    def on_edge(self) -> dict[str, list[str]]:
        """For each arm the settings whose best value is the smallest or the largest that was tried.

        A search that ends there may have missed a better value beyond. A setting of which one value was tried has no
        edge.
        """
        return {
            arm: [name for name in values if self._beyond(arm, name) is not None] for arm, values in self.best.items()
        }

    @property
    def further(self) -> dict[str, Candidate]:
        """Where the search goes on: from an arm's best run one step beyond each edge on which it lies."""
        runs: dict[str, Candidate] = {}
        for arm, values in self.best.items():
            for name in values:
                beyond = self._beyond(arm, name)
                if beyond is not None:
                    moved = {**values, name: beyond}
                    runs[_label(arm, moved)] = Candidate(arm, moved)
        return {label: candidate for label, candidate in runs.items() if label not in self.tried}

    def count(self, arm: str) -> int:
        """How many candidates of an arm were tried."""
        return sum(candidate.arm == arm for candidate in self.tried.values())

    def _beyond(self, arm: str, name: str) -> float | None:
        """The next value beyond an edge at the ratio of the last two; None where the best value is on none."""
        values = sorted({candidate.values[name] for candidate in self.tried.values() if candidate.arm == arm})
        best = self.best[arm][name]
        if len(values) < 2 or best not in (values[0], values[-1]):
            return None
        neighbour = values[1] if best == values[0] else values[-2]
        # Factors multiply, so one step further is the same ratio once more.
        return best * best / neighbour


def read(experiment: Experiment, tried: Mapping[str, Candidate], runs: pl.DataFrame) -> Findings:
    """The findings of a search's runs.

    Args:
        tried: the candidates.
        runs: theirs, with columns arm, state and the metrics of the objective and the constraints.
    """
    sweep = experiment.declared_sweep
    objective, direction = next(iter(sweep.objectives.items()))  # `candidates` makes sure that it is the only one
    sign = 1 if direction == "maximize" else -1
    if not {objective, *sweep.constraints} <= set(runs.columns):  # no run came to its end
        return Findings(tried, {}, sign)
    within = [pl.col(metric) <= bound for metric, bound in sweep.constraints.items()]
    ended = runs.filter(pl.col("state") == "complete", *within).select("arm", objective).drop_nulls()
    return Findings(tried, dict(ended.iter_rows()), sign)


def accepted(experiment: Experiment, further: Mapping[str, Candidate]) -> dict[str, Candidate]:
    """The candidates whose values are accepted: a rate, say, has a largest value, and the search ends there."""
    arms, kept = experiment.declared_sweep.arms, {}
    for label, candidate in further.items():
        with contextlib.suppress(UserError):
            arm_config(candidate.arm, experiment.declared, own_settings(arms[candidate.arm]) | candidate.values)
            kept[label] = candidate
    return kept
