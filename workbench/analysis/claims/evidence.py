"""What claims rest on: effects over training seeds, and the tracked runs that they are computed from."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import numpy as np
import polars as pl
from numpy.typing import NDArray

from workbench.analysis import paired, tables
from workbench.common.errors import UserError

BySeed = dict[str, float]  # training seed -> value
Values = NDArray[np.float64]


class Effect(NamedTuple):
    """One measured quantity of a claim.

    Attributes:
        statement: what it is, so that greater than 0 means that the paper is right.
        values: one a seed, (S,).
        unit: of the values, for the table.
        decides: whether the verdict rests on it; otherwise it is only shown.
    """

    statement: str
    values: Values
    unit: str = "reward"
    decides: bool = True


def seedwise(formula: Callable[..., float], *parts: Mapping[str, Any]) -> Values:
    """A formula of quantities, seed by seed, over the seeds that all of them have.

    Raises:
        UserError: they have none in common.
    """
    shared = sorted(set.intersection(*(set(part) for part in parts)))
    if not shared:
        raise UserError("the arms have no finished run with a common seed")
    return np.array([formula(*(part[seed] for part in parts)) for seed in shared], dtype=float)


@dataclass(frozen=True)
class Evidence:
    """Runs and what they left.

    Attributes:
        runs: ended runs of the study, as `tracking.load_runs` gives them.
        history: their steps, as `tracking.load_history` gives them.
        samples: their images' rewards, as `tracking.load_samples` gives them.
        checks: runs of the checks that need no arms, one a seed.
        lost: arm -> seeds of its runs that failed or were pruned.
    """

    runs: pl.DataFrame
    history: pl.DataFrame
    samples: pl.DataFrame
    checks: pl.DataFrame
    lost: Mapping[str, Sequence[str]] = field(default_factory=dict)

    def of(self, arm: str) -> pl.DataFrame:
        """The complete runs of an arm, one a seed.

        Raises:
            UserError: there is none, or a seed was run twice.
        """
        runs = tables.of_arms(self.runs, arm).sort("seed")
        # Arms are paired by seed: of two runs with one seed nobody could say which counts.
        twice = runs.filter(pl.col("seed").is_duplicated())
        if not twice.is_empty():
            raise UserError(f"arm {arm!r}: two runs with seed {twice['seed'][0]}; give the study another name")
        return runs

    def final(self, arm: str, metric: str) -> BySeed:
        """A metric's last value in the complete runs of an arm, by seed.

        Raises:
            UserError: no complete run of the arm has it.
        """
        runs = self.of(arm)
        if metric not in runs.columns or runs[metric].drop_nulls().is_empty():
            raise UserError(f"arm {arm!r}: no complete run with {metric}")
        return dict(runs.select("seed", metric).drop_nulls().iter_rows())

    def setting(self, arm: str, name: str) -> BySeed:
        """A numerical setting of the complete runs of an arm, by seed."""
        return dict(self.of(arm).select("seed", pl.col(name).cast(pl.Float64)).iter_rows())

    def peak(self, arm: str, metric: str) -> BySeed:
        """A metric's largest value in the complete runs of an arm, by seed."""
        points = self._points(arm, metric)
        return dict(points.group_by("seed").agg(pl.col(metric).max()).iter_rows())

    def growth(self, arm: str, metric: str, since: float = 0.5) -> BySeed:
        """A metric's last value minus its last in the first part of the run, by seed.

        Args:
            since: that part, a share of the steps.
        Raises:
            UserError: nothing was logged in that part.
        """
        points = self._points(arm, metric).sort("seed", "step")
        before = points.filter(pl.col("step") <= since * pl.col("step").max()).group_by("seed").last()
        if before.is_empty():
            raise UserError(f"arm {arm!r}: {metric} was logged at the end of the run alone; lower diagnostics.interval")
        both = points.group_by("seed").last().join(before, on="seed", suffix="_before")
        return dict(both.select("seed", pl.col(metric) - pl.col(f"{metric}_before")).iter_rows())

    def _points(self, arm: str, metric: str) -> pl.DataFrame:
        if metric not in self.history.columns:
            raise UserError(f"arm {arm!r}: no run logged {metric}")
        return self.history.join(self.of(arm).select("run_id", "seed"), on="run_id").select(
            "seed", "step", metric
        ).drop_nulls()  # fmt: skip

    def buckets(self, arm: str, quantity: str) -> dict[str, Values]:
        """A per-timestep quantity by seed, one value a timestep interval, least noise first.

        Raises:
            UserError: no complete run of the arm has it.
        """
        runs = self.of(arm)
        columns = list(tables.bucket_columns(runs, quantity).values())
        runs = runs.drop_nulls(columns) if columns else runs.clear()
        if runs.is_empty():
            raise UserError(f"arm {arm!r}: no complete run with timestep_{quantity}")
        return dict(zip(runs["seed"].to_list(), runs.select(columns).to_numpy(), strict=True))

    def noisier_half(self, arm: str, quantity: str) -> BySeed:
        """A per-timestep quantity's mean over the noisier half of the intervals."""
        by_seed = self.buckets(arm, quantity)
        return {seed: float(values[len(values) // 2 :].mean()) for seed, values in by_seed.items()}

    def win_rate(self, arm: str, other: str) -> BySeed:
        """Share of images on which arm scores higher than other: same training seed, prompt and image seed."""
        for each in (arm, other):
            self.of(each)  # which refuses two runs of one seed
        rates = paired.won(self.runs, self.samples, arm, other).filter(pl.col("prompts") == "all")
        return dict(rates.select("seed", "value").iter_rows())

    def check(self, metric: str) -> BySeed:
        """A value that the checks measured, by the name of their run (one a seed)."""
        if metric not in self.checks.columns:
            raise UserError(f"the checks have no {metric}")
        return dict(self.checks.select("name", metric).drop_nulls().iter_rows())
