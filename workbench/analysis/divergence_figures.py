"""Figures of what a policy's distance from the pretrained model buys: Fig. 1c, the front, and the reward's parts.

Data frames in, matplotlib figures out; colours, marks and intervals as in `figures`.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import matplotlib.pyplot as plt
import numpy as np
import polars as pl
import seaborn as sns
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from workbench.analysis import tables
from workbench.analysis.figures import deltas_of
from workbench.analysis.labels import labels
from workbench.analysis.style import MARKERS, say_few
from workbench.common.errors import UserError
from workbench.models.small.reward import PARTS
from workbench.studies.search import pretrained

SMOOTHED = 15  #: fewest runs of which Fig. 1c draws a running mean
DIVERGENCE = "divergence of the policy from the pretrained model (Eq. 8)"

#: Kinds of run in Fig. 1c, each with its name and marker.
KINDS = {
    "frozen": ("reference frozen", "o"),
    "update": ("reference updated", "^"),
    "threshold": ("updated below delta", "s"),
    "another": ("another objective", "x"),
}


def score_against_divergence(runs: pl.DataFrame, *, score: str = "eval/reward") -> Figure:
    """The paper's Fig. 1c: final score of every run against how far its policy has moved, by kind of reference.

    The cross is the pretrained model. The line is a running mean over neighbouring runs of the DPO objective, drawn
    from fifteen runs on: of fewer it would show their scatter. A few runs that went more than twenty deltas away would
    flatten all others: they are left out and counted in a note.

    Raises:
        UserError: no finished run has both numbers.
    """
    needed = [score, "divergence/policy"]
    if any(name not in runs.columns for name in needed):
        raise UserError(f"metric {score!r}: no finished run of the study has it together with divergence/policy")
    is_dpo = pl.col("objective.loss") == "dpo" if "objective.loss" in runs.columns else pl.lit(True)
    kind = pl.when(is_dpo).then("reference.policy").otherwise(pl.lit("another"))
    done = runs.drop_nulls(needed).with_columns(kind=kind).sort("divergence/policy")
    deltas = deltas_of(done)
    beyond = done.filter(pl.col("divergence/policy") > 20 * deltas[0]) if deltas else done.clear()
    # Only where they are few: of a study that mostly went so far, they are what there is to see.
    beyond = beyond if 4 * len(beyond) <= len(done) else done.clear()
    done = done.join(beyond, on="run_id", how="anti", maintain_order="left")
    figure, axes = plt.subplots(figsize=(7.2, 4.4))
    for i, (of_kind, (name, marker)) in enumerate(KINDS.items()):
        part = done.filter(pl.col("kind") == of_kind)
        if not part.is_empty():
            look: dict[str, Any] = {"edgecolors": "white", "linewidths": 0.6} if marker != "x" else {"linewidths": 1.8}
            axes.scatter(
                part["divergence/policy"], part[score], marker=marker, s=60, color=f"C{i}", zorder=3, label=name, **look
            )  # fmt: skip
    dpo = done.filter(pl.col("kind") != "another")
    if len(dpo) >= SMOOTHED:
        window = max(3, len(dpo) // 4)
        smooth = dpo.select(pl.col(*needed).rolling_mean(window, center=True)).drop_nulls()
        axes.plot(
            smooth["divergence/policy"],
            smooth[score],
            color="0.6",
            lw=2,
            zorder=1,
            label=f"mean of {window} neighbours",
        )
    _mark_pretrained(axes, runs, score)
    _mark_deltas(axes, deltas)
    if not beyond.is_empty():
        farthest, lowest = beyond["divergence/policy"].to_numpy().max(), beyond[score].to_numpy().min()
        note = f"not shown: {len(beyond)} runs, up to {farthest:.2g} away, {score} down to {lowest:.3g}"
        figure.text(0.5, -0.06, note, ha="center", color="0.3", fontsize="small")
    axes.set(xlabel=DIVERGENCE, ylabel=score)
    axes.legend(frameon=False, fontsize="small", loc="center left", bbox_to_anchor=(1, 0.5))
    sns.despine(figure)
    return figure


def reward_front(runs: pl.DataFrame, *, score: str = "eval/reward") -> Figure:
    """What each arm gains in score for how far its policy has moved, all arms in one figure, with their front.

    Points are means over training seeds, whiskers 95 % t intervals over seeds in both directions. Full points are on
    the front, which the steps join: no other arm scores as high without moving further. Named are the arms on it.
    The axis of divergence is linear near 0 and logarithmic beyond delta.

    Raises:
        UserError: no complete run has both numbers.
    """
    table, deltas = _front(runs, score), deltas_of(runs)
    figure, axes = plt.subplots(figsize=(8.2, 5.2))
    _scale(axes, deltas)
    best = table.filter("on_front")
    # steps-post: between two arms of the front, the one to the left is the best that moves no further.
    axes.plot(best["divergence"], best["score"], color="0.35", lw=1.4, drawstyle="steps-post", zorder=2)
    for i, row in enumerate(table.to_dicts()):
        leads = row["on_front"]
        _point(axes, row, i, mfc=None if leads else "none", zorder=4 if leads else 3)
    _mark_pretrained(axes, runs, score)
    _mark_deltas(axes, deltas)
    axes.set(xlabel=DIVERGENCE, ylabel=score)
    _tick(axes)
    _name_apart(axes, [(row["divergence"], row["score"], row["label"]) for row in best.to_dicts()])
    axes.legend(frameon=False, fontsize="small", loc="center left", bbox_to_anchor=(1, 0.5), ncols=1 + len(table) // 16)
    say_few(figure, table["seeds"])
    sns.despine(figure)
    return figure


def _front(runs: pl.DataFrame, score: str) -> pl.DataFrame:
    """`tables.front` with what each arm is called as column label."""
    return tables.front(runs, score).with_columns(label=pl.col("arm").replace_strict(labels(runs)))


def _mark_pretrained(axes: Axes, runs: pl.DataFrame, score: str) -> None:
    """A cross at the pretrained model, where runs tell its score: it has no divergence from itself."""
    known = pretrained(runs)
    if score in known:
        axes.plot(0, known[score], "x", color="black", ms=9, mew=2, ls="", label="pretrained model", zorder=5)


def _mark_deltas(axes: Axes, deltas: Sequence[float]) -> None:
    """A line at each threshold, with its value above."""
    for delta in deltas:
        axes.axvline(delta, color="0.45", lw=1)
        above = axes.get_xaxis_transform()  # x as data, y as a fraction of the axes
        axes.text(delta, 1.01, f"delta = {delta:g}", transform=above, ha="center", color="0.3", fontsize="small")


def _scale(axes: Axes, deltas: Sequence[float]) -> None:
    """Make the axis of divergence linear near 0 and logarithmic beyond delta."""
    axes.set_xscale("asinh", linear_width=deltas[0] if deltas else 0.005)


def _tick(axes: Axes) -> None:
    """Round numbers as ticks of an axis of divergence that is logarithmic in its outer parts."""
    low, high = axes.get_xlim()
    rounded = (-0.01, -0.002, 0, 0.002, 0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1, 2)
    ticks = [tick for tick in rounded if low < tick < high]
    if len(ticks) < 3:  # a narrow range, on which the axis is all but linear
        axes.xaxis.set_major_locator(MaxNLocator(5))
        axes.xaxis.set_major_formatter(lambda tick, _: f"{tick:g}")
    else:
        axes.set_xticks(ticks, [f"{tick:g}" for tick in ticks])
    axes.minorticks_off()


def _name_apart(axes: Axes, points: Sequence[tuple[float, float, str]]) -> None:
    """Names to the upper left of points; one that would cover its neighbour's is left to the legend."""
    named: list[np.ndarray] = []
    for x, y, name in points:
        at = axes.transData.transform((x, y))
        if all(abs(at[1] - other[1]) > 14 or abs(at[0] - other[0]) > 120 for other in named):  # pixels
            axes.annotate(name, (x, y), (-7, 7), textcoords="offset points", ha="right", fontsize="x-small")
            named.append(at)


#: Panels of `reward_parts`: metric -> title.
GAINS = {
    "eval/reward_gain": "whole reward",
    **{f"eval/{part}_gain": part for part in PARTS},
    "eval/judge_gain": "independent judge",
}


def reward_parts(runs: pl.DataFrame) -> Figure:
    """What each part of the reward gains over the pretrained model, against how far the policy has moved.

    A point an arm, means over training seeds with 95 % t intervals in both directions; above 0 is better than the
    pretrained model. The last panel is the judge, which takes no part in the reward: where the reward still rises and
    the judge falls, the reward is being exploited. The axis of divergence is linear near 0 and logarithmic beyond
    delta.

    Raises:
        UserError: no complete run has the parts, which only the small model's reward has.
    """
    missing = [metric for metric in GAINS if metric not in runs.columns]
    if missing:
        raise UserError(f"metric {missing[0]!r}: no finished run of the study has it")
    deltas = deltas_of(runs)
    figure, panels = plt.subplots(2, 4, figsize=(16, 7), sharex=True)
    for axes, (metric, title) in zip(panels.flat, GAINS.items(), strict=True):
        table = _front(runs, metric)
        _scale(axes, deltas)
        axes.axhline(0, color="0.3", ls="--", lw=1)
        for delta in deltas:
            axes.axvline(delta, color="0.6", lw=1)
        for i, row in enumerate(sorted(table.to_dicts(), key=lambda row: row["arm"])):
            _point(axes, row, i, mfc=None)
        axes.set_title(title)
    for axes in panels[:, 0]:
        axes.set_ylabel("gain over the pretrained model")
    for axes in panels[1]:
        _tick(axes)
        axes.tick_params(axis="x", rotation=45)
    handles, names = panels[0, 0].get_legend_handles_labels()
    figure.legend(handles, names, loc="center left", bbox_to_anchor=(1, 0.5), frameon=False, fontsize="small")
    figure.supxlabel(DIVERGENCE)
    say_few(figure, table["seeds"])
    sns.despine(figure)
    figure.tight_layout()
    return figure


def _point(axes: Axes, row: Mapping[str, Any], place: int, **look: Any) -> None:
    """An arm's mean divergence and score with its intervals.

    Args:
        row: of `tables.front`.
        place: of the arm among all, which decides colour and mark.
    """
    spans = [[[row[name] - row[f"{name}_low"]], [row[f"{name}_high"] - row[name]]] for name in ("divergence", "score")]
    axes.errorbar(
        row["divergence"], row["score"], xerr=spans[0], yerr=spans[1], color=f"C{place % 10}",
        marker=MARKERS[(place + place // 10) % len(MARKERS)], ls="", ms=8, lw=1, label=row["label"], **look,
    )  # fmt: skip
