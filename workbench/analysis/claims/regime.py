"""Whether a study's runs are in the paper's regime, as numbers computed from the runs.

In the paper frozen Diffusion-DPO hardly diverges, the reference follows the policy many times before its threshold
stops it somewhere in the middle of training, and without a threshold it goes far beyond. Where a study's runs do not do
that, its verdicts are about another regime than the paper's: a reference that freezes at its first update cannot show
what updates do. The bounds below were written before the runs that they judge; docs/method.md says where each comes
from.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import polars as pl

from workbench import tracking
from workbench.analysis import tables
from workbench.common.errors import UserError
from workbench.common.markdown import markdown_table
from workbench.tracking import study_runs

CLOSE = 1.25  #: frozen Diffusion-DPO ends at most at so many times delta: "about" or below
UPDATES = 8  #: the thresholded reference moves at least so often
TITLE = "The paper's regime"
RUNS = "These runs are in"  # how the sentence starts where there are no verdicts


@dataclass(frozen=True)
class Measure:
    """One number that the regime is defined by.

    Attributes:
        name: MLflow's metric is `regime/NAME`.
        statement: what is measured.
        value: mean over the training seeds; infinite where a ratio's denominator is not above 0.
        least, most: the bounds of the regime.
        clause: the reason that is given where the value lies outside, with {value} in it.
        percent: whether the value is a share, shown in per cent.
        seeds: the value of each training seed, where it has some; most of them must lie within the bounds too, since a
            mean of runs that froze at once and of others that never did would be of none of them.
    """

    name: str
    statement: str
    value: float
    least: float = -math.inf
    most: float = math.inf
    clause: str = ""
    percent: bool = False
    seeds: tuple[float, ...] = ()

    @property
    def inside(self) -> bool:
        """Whether the value lies within its bounds, and so do those of most seeds."""
        return self._within(self.value) and 2 * sum(map(self._within, self.seeds)) >= len(self.seeds)

    def _within(self, value: float) -> bool:
        return self.least <= value <= self.most

    def shown(self, value: float) -> str:
        """A value of this measure as text, in per cent where it is a share.

        Three significant digits, or as many more as it takes not to look like a bound that it is not.
        """
        bounds = {f"{bound:.3g}" for bound in (self.least, self.most) if bound != value}
        digits = next((n for n in (3, 4, 5, 6) if f"{value:.{n}g}" not in bounds), 7)
        if self.percent and math.isfinite(value):
            return f"{100 * value:.{digits}g} %"
        return f"{value:.{digits}g}"

    @property
    def here(self) -> str:
        """The value as text, with the smallest and the largest of the seeds."""
        if len(self.seeds) < 2:
            return self.shown(self.value)
        return f"{self.shown(self.value)} (seeds: {self.shown(min(self.seeds))} to {self.shown(max(self.seeds))})"

    @property
    def bounds(self) -> str:
        """The bounds of this measure as text."""
        if math.isfinite(self.least) and math.isfinite(self.most):
            return f"{self.shown(self.least)} to {self.shown(self.most)}"
        return f"at least {self.shown(self.least)}" if math.isfinite(self.least) else f"at most {self.shown(self.most)}"

    def as_dict(self) -> dict[str, Any]:
        """The measure as JSON has it, which knows no infinity: None stands for it."""
        numbers = {key: getattr(self, key) for key in ("value", "least", "most")}
        finite = {key: number if math.isfinite(number) else None for key, number in numbers.items()}
        return {"name": self.name, "statement": self.statement, **finite, "inside": self.inside}

    @property
    def reason(self) -> str:
        """Why a study with this value is outside: a clause of the sentence before the verdicts."""
        seeds = "" if not self._within(self.value) else ", though on average only"
        return f"{self.clause.format(value=self.shown(self.value))}{seeds} (the paper's: {self.bounds})"


def measure(
    runs: pl.DataFrame, history: pl.DataFrame, edges: Mapping[str, Sequence[str]] | None = None
) -> list[Measure]:
    """Everything about the regime that a study's runs can tell.

    The arms compared are those of Fig. 1b: plain Diffusion-DPO that differs in its reference alone. What needs an arm
    that the study lacks is left out.

    Args:
        runs: as `tracking.load_runs` gives them.
        history: their steps, as `tracking.load_history` gives them.
        edges: arm -> its settings whose tuned value lies on the edge of the searched grid; None = nothing was tuned.
    """
    arms = _arms(runs)
    frozen, update, threshold = (arms.get(policy) for policy in ("frozen", "update", "threshold"))
    found: list[Measure | None] = [
        _frozen_over_delta(frozen, threshold),
        *(_updates(threshold, history) if threshold is not None else ()),
        _interval_share(threshold if threshold is not None else update),
        _update_over_frozen(update, frozen),
        _tuned_on_edge(edges),
    ]
    return [one for one in found if one is not None]


def _arms(runs: pl.DataFrame) -> dict[str, pl.DataFrame]:
    """The complete runs of one arm a reference policy: those of Fig. 1b, the first where there are several."""
    declared = runs.filter((pl.col("state") == "complete") & (pl.col("arm") != "sampled"))
    plain = tables.reference_arms(declared)
    for setting, values in tables.PLAIN.items():
        if setting in plain.columns:
            plain = plain.filter(pl.col(setting).is_null() | pl.col(setting).is_in(values))
    arms: dict[str, pl.DataFrame] = {}
    for (policy, _arm), part in plain.group_by("reference.policy", "arm", maintain_order=True):
        arms.setdefault(str(policy), part)
    return arms


def _values(runs: pl.DataFrame, column: str) -> tuple[float, ...]:
    """A metric or a numerical setting of each run that has it."""
    return tuple(runs[column].cast(pl.Float64).drop_nulls()) if column in runs.columns else ()


def _mean(runs: pl.DataFrame, column: str) -> float | None:
    """Mean over runs of a metric or a numerical setting; None where no run has it."""
    values = _values(runs, column)
    return sum(values) / len(values) if values else None


def _ratio(above: float | None, below: float | None) -> float | None:
    if above is None or below is None:
        return None
    if below > 0:
        return above / below
    # Eq. 8 is a difference of errors: a frozen arm may come out below 0. Whatever has moved away is then infinitely far
    # beyond it, and what has not is not.
    return math.inf if above > 0 else 0.0


def _frozen_over_delta(frozen: pl.DataFrame | None, threshold: pl.DataFrame | None) -> Measure | None:
    if frozen is None or threshold is None:
        return None
    delta = _mean(threshold, "reference.delta")
    value = _ratio(_mean(frozen, "divergence/policy"), delta)
    return value if value is None else Measure(
        "frozen_over_delta", "final divergence of frozen Diffusion-DPO over delta", value, most=CLOSE,
        clause="frozen Diffusion-DPO itself ends at {value} times delta",
        seeds=tuple(far / delta for far in _values(frozen, "divergence/policy")) if delta else (),
    )  # fmt: skip


def _updates(threshold: pl.DataFrame, history: pl.DataFrame) -> list[Measure]:
    """How often the thresholded reference moves, and when it stops."""
    if "reference/frozen" not in history.columns or _mean(threshold, "reference/updates") is None:
        return []
    updates = _mean(threshold, "reference/updates")
    steps = history.join(threshold.select("run_id", total=pl.col("train.steps").cast(pl.Float64)), on="run_id")
    stopped = steps.filter(pl.col("reference/frozen") == 1).group_by("run_id").agg(pl.col("step").min())
    shares = threshold.select("run_id", total=pl.col("train.steps").cast(pl.Float64)).join(
        stopped, on="run_id", how="left"
    )
    # A run whose reference was never frozen counts with all of its steps.
    each = (shares["step"].fill_null(shares["total"]) / shares["total"]).to_numpy()
    return [
        Measure(
            "updates_before_freeze", "accepted updates of the thresholded reference", updates or 0.0, least=UPDATES,
            clause="its threshold lets the reference move {value} times", seeds=_values(threshold, "reference/updates"),
        ),
        Measure(
            "freeze_step", "step at which it is frozen for good, as a share of training (100 %: never)",
            float(each.mean()), least=0.2, most=0.8, clause="the reference is frozen after {value} of training",
            percent=True, seeds=tuple(each.tolist()),
        ),
    ]  # fmt: skip


def _interval_share(moving: pl.DataFrame | None) -> Measure | None:
    if moving is None:
        return None
    value = _ratio(_mean(moving, "reference.interval"), _mean(moving, "train.steps"))
    return value if value is None else Measure(
        # The paper's 16 to 64 of 2,000 steps are 0.8 % to 3.2 %.
        "interval_share", "interval of the reference's updates, as a share of training", value, least=0.01, most=0.04,
        clause="the interval is {value} of training", percent=True,
    )  # fmt: skip


def _update_over_frozen(update: pl.DataFrame | None, frozen: pl.DataFrame | None) -> Measure | None:
    if update is None or frozen is None:
        return None
    value = _ratio(_mean(update, "divergence/reference"), _mean(frozen, "divergence/policy"))
    return value if value is None else Measure(
        "update_over_frozen", "final divergence of the unregularised reference over frozen Diffusion-DPO's", value,
        least=5, clause="without a threshold the reference diverges only {value} times as far as frozen Diffusion-DPO",
    )  # fmt: skip


def _tuned_on_edge(edges: Mapping[str, Sequence[str]] | None) -> Measure | None:
    if edges is None:
        return None
    named = "; ".join(f"{arm}: {', '.join(settings)}" for arm, settings in edges.items() if settings)
    return Measure(
        "tuned_on_edge", "arms whose tuned values lie on the edge of the searched grid",
        float(sum(bool(settings) for settings in edges.values())), most=0,
        clause=f"the tuned values of {{value}} of the arms lie on the edge of what was searched, {named}",
    )  # fmt: skip


def sentence(measures: Sequence[Measure], start: str = "These verdicts are about") -> str:
    """The line that a study outside the regime begins with, before its verdicts; empty inside.

    Args:
        start: of the sentence.
    """
    reasons = [one.reason for one in measures if not one.inside]
    if not reasons:
        return ""
    return f"{start} another regime than the paper's, because {'; '.join(reasons)}."


def markdown(measures: Sequence[Measure]) -> str:
    """The numbers with their bounds, as a table in Markdown."""
    rows = [(one.statement, one.here, one.bounds, "yes" if one.inside else "**no**") for one in measures]
    return markdown_table(("what", "here", "the paper's regime", "inside"), rows)


def publish(study: str, measures: Sequence[Measure]) -> None:
    """Write the regime onto the study's page in MLflow: metrics `regime/*`, and a section of its description."""
    metrics = {f"regime/{one.name}": one.value for one in measures if math.isfinite(one.value)}
    verdict = sentence(measures, RUNS) or "The runs are in the paper's regime."
    study_runs.describe_study(tracking.connect(), study, TITLE, f"{verdict}\n\n{markdown(measures)}", metrics)


def of_runs(runs: pl.DataFrame, edges: Mapping[str, Sequence[str]] | None = None) -> list[Measure]:
    """The regime of a study's runs, whose histories are read; empty where they tell nothing of it.

    Args:
        runs: as `tracking.load_runs` gives them.
        edges: as `measure` takes them.
    """
    arms = _arms(runs) if "reference.policy" in runs.columns else {}
    if not arms:
        return []
    try:
        history = tracking.load_history(pl.concat(arms.values()))
    except UserError:  # the runs' artifacts are gone; the study itself has ended well
        return []
    return measure(runs, history, edges)


def of_study(study: str, edges: Mapping[str, Sequence[str]] | None = None) -> list[Measure]:
    """The regime of a tracked study, written onto its page in MLflow; empty where its runs tell nothing of it.

    Args:
        edges: as `measure` takes them.
    Raises:
        UserError: there is no such study, or it has no ended run.
    """
    measures = of_runs(tracking.load_runs(study), edges)
    if measures:
        publish(study, measures)
    return measures
