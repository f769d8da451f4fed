"""A study's search as data, for figures and tables: objectives, constraints, space and trials."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import polars as pl

from workbench.common.errors import UserError
from workbench.training.sections import Direction


@dataclass(frozen=True)
class Search:
    """What a study searched, for what, and its trials.

    Attributes:
        objectives: metric -> its direction.
        constraints: metric -> the largest value that a trial may end with.
        space: setting -> its distribution as declared in the experiment file.
        trials: one row a trial that ended: number, name, arm (null for sampled trials), state, feasible (complete and
            within all constraints), best (no feasible trial beats it), inside (differs from the study's settings only
            in the space); then one column a metric and one a setting of the space, null where a trial lacks it,
            choices as text.
    """

    objectives: Mapping[str, Direction]
    constraints: Mapping[str, float]
    space: Mapping[str, Mapping[str, Any]]
    trials: pl.DataFrame

    @property
    def watched(self) -> list[str]:
        """The metrics that decide: objectives, then constrained metrics."""
        return list(dict.fromkeys([*self.objectives, *self.constraints]))

    def complete(self, *metrics: str) -> pl.DataFrame:
        """The complete trials that have these metrics.

        Raises:
            UserError: there is none.
        """
        # Metrics have a slash in their names, settings a dot.
        known = [name for name in self.trials.columns if "/" in name]
        for metric in metrics:
            if metric not in known:
                raise UserError(f"metric {metric!r}: the study's trials have {', '.join(known) or 'none'}")
        found = self.trials.filter(pl.col("state") == "complete").drop_nulls(metrics)
        if found.is_empty():
            raise UserError("no trial of the study has come to its end")
        return found


def best_table(search: Search) -> pl.DataFrame:
    """The best trials within the constraints: one, or with several objectives the front, by the first objective.

    Raises:
        UserError: no complete trial is within the constraints.
    """
    first, direction = next(iter(search.objectives.items()))
    best = search.complete().filter("best").sort(first, descending=direction == "maximize")
    if best.is_empty():
        bounds = ", ".join(f"{metric} <= {bound:g}" for metric, bound in search.constraints.items())
        raise UserError(f"no trial of the study is within {bounds}")
    trial = pl.format("{}{}", "number", pl.concat_str(pl.lit(" ("), "arm", pl.lit(")")).fill_null("")).alias("trial")
    chosen = [name for name in search.space if best[name].null_count() < len(best)]
    numbers = [name for name in (*search.watched, *chosen) if best[name].dtype.is_numeric()]
    shown = best.with_columns(pl.col(name).map_elements(lambda v: f"{v:.4g}", pl.String) for name in numbers)
    return shown.select(trial, *search.watched, *chosen)


def pretrained(runs: pl.DataFrame) -> dict[str, float]:
    """What the model measures before training, by metric: no divergence, half of the wins, and its own scores.

    Args:
        runs: of a study; what a score has gained in them tells what it was.
    """
    known = {"divergence/policy": 0.0, "kl/policy": 0.0, "eval/win_rate": 0.5}
    for gain in (name for name in runs.columns if name.endswith("_gain")):
        score = gain.removesuffix("_gain")
        before = (runs[score] - runs[gain]).drop_nulls() if score in runs.columns else pl.Series([])
        if len(before):
            known[score] = float(before.mean())  # type: ignore[arg-type]
    return known
