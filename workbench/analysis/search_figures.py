"""Figures of a search: reward against divergence, what mattered, and value against setting.

A trial is full where it is best or on the front, faint where it is beaten, hollow where it is beyond a constraint.
"""

from collections.abc import Mapping
from typing import Any

import matplotlib.pyplot as plt
import numpy as np
import polars as pl
import seaborn as sns
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D

from workbench.analysis.figures import MARKERS
from workbench.analysis.labels import label
from workbench.common.errors import UserError
from workbench.studies.search import Search

#: How a trial's mark looks, by how the trial came out.
LOOKS: dict[str, dict[str, Any]] = {
    "best": {"mec": "black", "mew": 1.2, "zorder": 5},
    "beaten": {"alpha": 0.4, "mec": "white", "mew": 0.6, "zorder": 3},
    "beyond a constraint": {"mfc": "none", "mew": 1.4, "zorder": 4},
}


def trade_off(
    search: Search,
    x: str = "",
    y: str = "",
    landmarks: Mapping[str, float] | None = None,
    called: Mapping[str, str] | None = None,
) -> Figure:
    """One metric against another over all complete trials, with the front and what the constraints rule out.

    The front is stepped: on its better side lies what no trial has reached. The best trials have their numbers there.

    Args:
        x: default: the second objective, else what is constrained, else the policy's divergence.
        y: default: the first objective.
        landmarks: metric -> what the pretrained model measures (`search.pretrained`).
        called: arm -> its label by its settings (`labels.labels`); of others the name alone decides.
    Raises:
        UserError: no complete trial has both metrics.
    """
    objectives = [*search.objectives]
    y = y or objectives[0]
    x = x or next(iter([*objectives[1:], *search.constraints]), "divergence/policy")
    done = search.complete(x, y)
    figure, axes = plt.subplots(figsize=(7.6, 4.8))
    axes.margins(0.09)
    front = done.filter("best").sort(x, y)
    if {x, y} <= {*objectives} and len(objectives) == 2:
        side = "steps-post" if search.objectives[x] == "minimize" else "steps-pre"
        axes.plot(front[x], front[y], color="0.35", lw=1.4, drawstyle=side, zorder=2)
    arms = done["arm"].drop_nulls().unique(maintain_order=True).to_list()
    marks = []
    for i, arm in enumerate([None, *arms]):
        part = done.filter(pl.col("arm").is_null() if arm is None else pl.col("arm") == arm)
        marker = MARKERS[i % 9]  # of nine, with one of ten colours: ninety arms that can be told apart
        look: dict[str, Any] = {"marker": marker, "color": f"C{i % 10}", "ls": "", "ms": 8}
        if not part.is_empty():
            _draw(axes, part, part[x].to_numpy(), y, look)
            marks.append(
                Line2D([], [], **look, label="sampled" if arm is None else (called or {}).get(arm, label(arm)))
            )
    if landmarks and x in landmarks and y in landmarks:
        axes.plot(landmarks[x], landmarks[y], "x", color="black", ms=9, mew=2, zorder=4)
        marks.append(Line2D([], [], marker="x", ls="", color="black", ms=8, mew=2, label="pretrained model"))
    _bound(axes, search, x, "x")
    _bound(axes, search, y, "y")
    axes.set(xlabel=_sense(search, x), ylabel=_sense(search, y))
    _number(axes, search, front, x, y)
    _legend(figure, search, done, marks)
    sns.despine(figure)
    return figure


def _number(axes: Axes, search: Search, trials: pl.DataFrame, x: str, y: str) -> None:
    """Trials' numbers, on the better side of their marks; neighbours that would cover each other's share a place."""
    right, up = search.objectives.get(x) == "maximize", search.objectives.get(y) != "minimize"
    axes.get_xlim(), axes.get_ylim()  # settles where marks lie
    places: list[tuple[np.ndarray, list[str]]] = []
    for row in trials.sort(y, descending=up).to_dicts():
        at = axes.transData.transform((row[x], row[y]))
        if places and np.abs(at - places[-1][0]).max() < 15:  # pixels
            places[-1][1].append(str(row["number"]))
        else:
            places.append((at, [str(row["number"])]))
    for at, numbers in places:
        axes.annotate(
            ", ".join(numbers), tuple(axes.transData.inverted().transform(at)), fontsize="x-small",
            xytext=(6 if right else -6, 5 if up else -5), textcoords="offset points",
            ha="left" if right else "right", va="bottom" if up else "top",
        )  # fmt: skip


def _draw(axes: Axes, trials: pl.DataFrame, x: np.ndarray, y: str, look: Mapping[str, Any]) -> None:
    """Draw trials at x, shape (trials,), with the look of how each came out (LOOKS)."""
    kinds, values = _kinds(trials), trials[y].to_numpy()
    for kind, how in LOOKS.items():
        axes.plot(x[kinds == kind], values[kinds == kind], **{"mec": look["color"], **look, **how})


def _kinds(trials: pl.DataFrame) -> np.ndarray:
    """How each trial came out, a key of LOOKS, shape (trials,)."""
    best, beaten, beyond = (pl.lit(kind) for kind in LOOKS)
    return (
        trials.select(pl.when(~pl.col("feasible")).then(beyond).when("best").then(best).otherwise(beaten))
        .to_series()
        .to_numpy()
    )


def _bound(axes: Axes, search: Search, metric: str, side: str) -> None:
    """The largest value that a metric may have, and what is beyond it in grey."""
    if metric not in search.constraints:
        return
    bound = search.constraints[metric]
    line, span = (axes.axvline, axes.axvspan) if side == "x" else (axes.axhline, axes.axhspan)
    # The axis reaches the bound at least, also where all trials are well within.
    end = max(getattr(axes, f"get_{side}lim")()[1], bound)
    line(bound, color="0.35", ls="--", lw=1.2, zorder=2)
    span(bound, end + (end - bound), color="0.92", lw=0, zorder=0)
    getattr(axes, f"set_{side}lim")(right=end) if side == "x" else axes.set_ylim(top=end)
    if side == "x":
        above = axes.get_xaxis_transform()  # x as data, y as a fraction of the axes
        axes.text(bound, 1.01, f"at most {bound:g}", transform=above, ha="center", color="0.3", fontsize="small")


def _sense(search: Search, metric: str) -> str:
    """A metric's name with which way is better, where the study wants one."""
    better = {"maximize": " (more is better)", "minimize": " (less is better)"}
    return metric + better.get(search.objectives.get(metric, ""), "")


def _legend(figure: Figure, search: Search, trials: pl.DataFrame, marks: list[Line2D]) -> None:
    """Marks first, then what their looks mean as far as they are there."""
    there = {*_kinds(trials)}
    texts = {"best": "on the front"} if len(search.objectives) > 1 else {}
    looks = [
        Line2D(
            [],
            [],
            **{"marker": "o", "ls": "", "ms": 8, "color": "0.3", "mec": "0.3", **how},
            label=texts.get(kind, kind),
        )
        for kind, how in LOOKS.items()
        if kind in there
    ]
    figure.legend(handles=marks + looks, loc="center left", bbox_to_anchor=(0.92, 0.5), frameon=False, fontsize="small")


def importance(shares: pl.DataFrame) -> Figure:
    """How much of the order of the trials by each metric a setting explains, as far as it can be predicted at all.

    Args:
        shares: of `findings.importance`.
    Raises:
        UserError: nothing can be predicted.
    """
    metrics = shares["metric"].unique(maintain_order=True).to_list()
    most = shares["trials"].to_numpy().max()
    explained = shares.with_columns(explained=pl.col("share") * pl.col("predicted"))
    if not (explained["explained"] > 0).any():
        raise UserError(f"importance: from the settings of {most} trials nothing can be predicted of the others")
    order = explained.group_by("setting", maintain_order=True).agg(pl.col("explained").max(), pl.col("trials").first())
    order = order.sort("explained", maintain_order=True)
    places = {name: i for i, name in enumerate(order["setting"])}
    names = [name if count == most else f"{name}\n({count} trials)" for name, _, count in order.iter_rows()]
    figure, axes = plt.subplots(figsize=(7.6, 1.2 + 0.32 * len(places) * (len(metrics) + 1)))
    height = 0.8 / len(metrics)
    for i, metric in enumerate(metrics):
        part = explained.filter(pl.col("metric") == metric)
        y = np.array([places[name] for name in part["setting"]]) + height * ((len(metrics) - 1) / 2 - i)
        in_all = part.filter(pl.col("trials") == most)["predicted"]
        text = f"{metric}: {100 * in_all[0]:.0f} % can be predicted" if len(in_all) else metric
        hatch = ("", "//", "..")[i % 3]
        axes.barh(y, part["explained"], height, color=f"C{i}", hatch=hatch, ec="white", lw=0, label=text)
    axes.set_yticks(range(len(places)), names, fontsize="small")
    axes.set(xlabel=f"explained share of the order of {most} trials", xlim=(0, 1))
    axes.legend(frameon=False, fontsize="small", loc="lower left", bbox_to_anchor=(0, 1))
    sns.despine(figure)
    return figure


def slices(search: Search) -> Figure:
    """Every metric that decides against every setting of the space; a setting's panel has the trials that have it.

    Crosses are arms that differ from the study in more than the space.

    Raises:
        UserError: no complete trial has a setting of the space.
    """
    done = search.complete(*search.watched)
    settings = [name for name in search.space if done[name].null_count() < len(done)]
    if not settings:
        raise UserError("slices: the study declares no sweep.space, or no complete trial has a setting of it")
    size = (2.6 * len(settings) + 0.6, 2.5 * len(search.watched) + 0.5)
    figure, panels = plt.subplots(
        len(search.watched), len(settings), figsize=size, squeeze=False, sharey="row", sharex="col"
    )
    for metric, row in zip(search.watched, panels, strict=True):
        for name, axes in zip(settings, row, strict=True):
            part = done.drop_nulls(name)
            x = _along(axes, part[name], search.space[name])
            outside = ~part["inside"].to_numpy()
            _draw(axes, part.filter(~outside), x[~outside], metric, {"marker": "o", "color": "C0", "ls": "", "ms": 6.5})
            axes.plot(x[outside], part[metric].to_numpy()[outside], "x", color="C1", ms=6.5, mew=1.6, zorder=4)
            _bound(axes, search, metric, "y")
        row[0].set_ylabel(_sense(search, metric).replace(" (", "\n("), fontsize="small")
    for name, axes in zip(settings, panels[-1], strict=True):
        axes.set_xlabel(name, fontsize="small")
    marks = [Line2D([], [], marker="x", ls="", color="C1", mew=1.6, label="arm outside the space")]
    figure.align_xlabels()
    _legend(figure, search, done.filter("inside"), marks if not done["inside"].all() else [])
    sns.despine(figure)
    return figure


def _along(axes: Axes, values: pl.Series, declared: Mapping[str, Any]) -> np.ndarray:
    """Where values of a setting lie on the x axis, which is set up for its distribution."""
    if declared["type"] == "CategoricalDistribution":
        choices = [str(choice) for choice in declared["choices"]]
        axes.set_xticks(
            range(len(choices)), choices, rotation=30 if len("".join(choices)) > 16 else 0, fontsize="small"
        )
        axes.set_xlim(-0.5, len(choices) - 0.5)
        return np.array([choices.index(value) for value in values])
    low, high = declared["low"], declared["high"]
    if declared.get("log"):
        axes.set_xscale("log")
        margin, middle = (high / low) ** 0.06, (low * high) ** 0.5
        axes.set_xlim(low / margin, high * margin)
    else:
        margin, middle = 0.06 * (high - low), (low + high) / 2
        axes.set_xlim(low - margin, high + margin)
    middle = round(middle) if declared["type"] == "IntDistribution" else middle
    ticks = (low, middle, high)
    axes.set_xticks(ticks, [f"{tick:.2g}" if tick < 100 else f"{tick:.0f}" for tick in ticks], fontsize="small")
    axes.minorticks_off()
    return values.to_numpy()
