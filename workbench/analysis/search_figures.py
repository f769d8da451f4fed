"""Figures of a search: reward against divergence, its course, what mattered, and value against setting.

Unlike in Optuna's own slices and parallel coordinates, trials that were pruned or failed are shown, at the lower edge,
and trials that lack a conditional setting too. `search_marks` has the looks.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import matplotlib.pyplot as plt
import numpy as np
import polars as pl
import seaborn as sns
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D

from workbench.analysis.labels import label
from workbench.analysis.search_marks import (
    draw,
    draw_bound,
    early_marks,
    legend,
    mark_early,
    searched,
    sense,
    whiskers,
    without_end,
)
from workbench.analysis.style import MARKERS
from workbench.common.errors import UserError
from workbench.studies.search import Search


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
            draw(axes, part, part[x].to_numpy(), y, look)
            whiskers(axes, part, part[y].to_numpy(), x, axes.hlines)
            marks.append(
                Line2D([], [], **look, label="sampled" if arm is None else (called or {}).get(arm, label(arm)))
            )
    if landmarks and x in landmarks and y in landmarks:
        axes.plot(landmarks[x], landmarks[y], "x", color="black", ms=9, mew=2, zorder=4)
        marks.append(Line2D([], [], marker="x", ls="", color="black", ms=8, mew=2, label="pretrained model"))
    draw_bound(axes, search, x, "x")
    draw_bound(axes, search, y, "y")
    axes.set(xlabel=sense(search, x), ylabel=sense(search, y))
    _number(axes, search, front, x, y)
    legend(figure, search, done, marks)
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


def history(search: Search) -> Figure:
    """Every objective over the trials in their order; the line is the best so far within the constraints.

    A win rate has its 95 % interval over prompts.

    Raises:
        UserError: no trial has come to its end.
    """
    done, early = search.complete(*search.objectives), without_end(search)
    figure, panels = plt.subplots(
        len(search.objectives), 1, figsize=(7.6, 0.8 + 2.9 * len(search.objectives)), squeeze=False, sharex=True
    )
    good = done.filter("feasible").sort("number")
    for (metric, direction), axes in zip(search.objectives.items(), panels[:, 0], strict=True):
        best = good[metric].cum_max() if direction == "maximize" else good[metric].cum_min()
        axes.plot(good["number"], best, color="0.35", lw=1.4, drawstyle="steps-post", zorder=2)
        draw(axes, done, done["number"].to_numpy(), metric, {"marker": "o", "color": "C0", "ls": "", "ms": 7})
        axes.margins(y=0.12)
        mark_early(axes, early, early["number"].to_numpy())
        draw_bound(axes, search, metric, "y")
        axes.set_ylabel(sense(search, metric).replace(" (", "\n("))
        axes.xaxis.get_major_locator().set_params(integer=True)
    panels[-1, 0].set_xlabel("trial")
    line = [Line2D([], [], color="0.35", lw=1.4, drawstyle="steps-post", label="best so far")]
    legend(figure, search, done, line + early_marks(early))
    sns.despine(figure)
    return figure


def intermediate(reports: pl.DataFrame) -> Figure:
    """What trials reported to the pruner on their way; a cross where one was stopped, by the pruner or as collapsed.

    Args:
        reports: of `results.reports`.
    Raises:
        UserError: no trial reported anything.
    """
    if reports.is_empty():
        raise UserError("intermediate values: no trial reported any; those of a study with sweep.pruner do")
    figure, axes = plt.subplots(figsize=(7.6, 4.4))
    looks: dict[str, dict[str, Any]] = {
        "complete": {"color": "C0", "lw": 1.3, "alpha": 0.75, "label": "came to its end"},
        "pruned": {"color": "C3", "lw": 1.3, "ls": "--", "label": "stopped early"},
        "failed": {"color": "0.3", "lw": 1.3, "ls": ":", "label": "failed"},
    }
    for state, look in looks.items():
        of_state = reports.filter(pl.col("state") == state)
        for place, (_, part) in enumerate(of_state.group_by("number", maintain_order=True)):
            once: dict[str, Any] = look | {"label": look["label"] if place == 0 else None}
            axes.plot(part["step"], part["value"], marker="o", ms=3, **once)
            if state == "pruned":
                axes.plot(part["step"][-1], part["value"][-1], "X", color="C3", ms=9, mec="white", zorder=4)
    axes.set(xlabel="training step", ylabel=reports["metric"][0])
    axes.legend(frameon=False, fontsize="small", loc="center left", bbox_to_anchor=(1, 0.5))
    sns.despine(figure)
    return figure


def parallel(search: Search) -> Figure:
    """Every trial a line through its settings to the first objective, which also colours it: the darker the better.

    The best have thick lines; trials beyond a constraint are dotted, and the colours' range is that of the others.
    Trials without an end are dashed grey and stop before the objective. A setting that a trial lacks, since another one
    does not call for it, is at "none", below the axis.

    Raises:
        UserError: no complete trial has a setting of the space.
    """
    objective, direction = next(iter(search.objectives.items()))
    done = search.complete(objective).filter("inside").sort(objective, descending=direction == "minimize")
    settings = searched(search, done, "parallel coordinates")
    early = without_end(search).filter("inside")
    low, high = float(done[objective].min()), float(done[objective].max())  # type: ignore[arg-type]
    # Trials that may not be chosen must not take the darkest colours from those that may.
    within = done.filter("feasible")[objective].to_list() or [low, high]
    figure, axes = plt.subplots(figsize=(2.0 * len(settings) + 2.6, 4.4))
    norm = plt.Normalize(min(within), max(within), clip=True)
    colours = sns.color_palette("crest" if direction == "maximize" else "crest_r", as_cmap=True)
    at = np.arange(len(settings) + 1)
    for row in early.to_dicts():
        axes.plot(at[:-1], _heights(row, settings, search), color="0.7", lw=1, ls="--", zorder=1)
    for row in done.to_dicts():
        end = (row[objective] - low) / (high - low) if high > low else 0.5
        look: dict[str, Any] = {"lw": 3, "zorder": 3} if row["best"] else {"lw": 1.3, "zorder": 2}
        look |= {} if row["feasible"] else {"ls": ":"}
        axes.plot(at, [*_heights(row, settings, search), end], color=colours(norm(row[objective])), **look)
    beside: dict[str, Any] = {
        "xytext": (4, 0), "textcoords": "offset points", "va": "center", "fontsize": "x-small", "zorder": 5,
        "bbox": {"fc": "white", "ec": "none", "alpha": 0.8, "pad": 0.6},
    }  # fmt: skip
    for place, name in enumerate(settings):
        for height, text in _marks_of(search.space[name]):
            axes.annotate(text, (place, height), **beside)
        if done[name].null_count() or early[name].null_count():
            axes.annotate("none", (place, NONE), **beside)
    axes.vlines(at, 0, 1, color="0.3", lw=1, zorder=1)
    axes.set_xticks(at, [*settings, objective], fontsize="small", rotation=20, ha="right")
    axes.set(yticks=[], ylim=(NONE - 0.05, 1.05))
    figure.colorbar(plt.cm.ScalarMappable(norm, colours), ax=axes, pad=0.02).set_label(sense(search, objective))
    others = {"pruned or failed": len(early) and "--", "beyond a constraint": not done["feasible"].all() and ":"}
    if any(others.values()):
        for text, dashes in others.items():
            if dashes:
                axes.plot([], [], color="0.5", ls=dashes, label=text)
        axes.legend(frameon=False, fontsize="small", loc="lower left", bbox_to_anchor=(0, 1))
    sns.despine(figure, left=True)
    return figure


NONE = -0.12  #: height in `parallel` at which a setting is missing


def _heights(trial: Mapping[str, Any], settings: Sequence[str], search: Search) -> list[float]:
    """Where a trial's settings lie on their axes of height 1; NONE where it lacks one."""
    return [NONE if trial[name] is None else _share(search.space[name], trial[name]) for name in settings]


def _share(declared: Mapping[str, Any], value: Any) -> float:
    """How far along a setting's range a value lies, 0 to 1; a range of one value has it in the middle."""
    if declared["type"] == "CategoricalDistribution":
        choices = [str(choice) for choice in declared["choices"]]
        return choices.index(str(value)) / max(1, len(choices) - 1)
    scale = np.log if declared.get("log") else np.asarray
    low, high = scale(declared["low"]), scale(declared["high"])
    return float((scale(value) - low) / (high - low)) if high > low else 0.5


def _marks_of(declared: Mapping[str, Any]) -> list[tuple[float, str]]:
    """Heights and texts on a setting's axis: its choices, or the ends of its range."""
    if declared["type"] == "CategoricalDistribution":
        return [(_share(declared, choice), str(choice)) for choice in declared["choices"]]
    return [(0.0, _number_text(declared["low"])), (1.0, _number_text(declared["high"]))]


def _number_text(value: float) -> str:
    """A number beside an axis: two digits, or whole from 100 on."""
    return f"{value:.2g}" if value < 100 else f"{value:.0f}"


def importance(shares: pl.DataFrame) -> Figure:
    """How much of the order of the trials by each metric a setting explains, as far as it can be predicted at all.

    Args:
        shares: of `results.importance`.
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
    title = "What explains the order of the trials: fANOVA's shares of what can be predicted"
    axes.set_title(title, fontsize="medium", loc="left", pad=12 + 16 * len(metrics))
    sns.despine(figure)
    return figure


def slices(search: Search) -> Figure:
    """Every metric that decides against every setting of the space; a setting's panel has the trials that have it.

    Crosses are arms that differ from the study in more than the space.

    Raises:
        UserError: no complete trial has a setting of the space.
    """
    done = search.complete(*search.watched)
    settings, early = searched(search, done, "slices"), without_end(search)
    size = (2.6 * len(settings) + 0.6, 2.5 * len(search.watched) + 0.5)
    figure, panels = plt.subplots(
        len(search.watched), len(settings), figsize=size, squeeze=False, sharey="row", sharex="col"
    )
    for metric, row in zip(search.watched, panels, strict=True):
        for name, axes in zip(settings, row, strict=True):
            part = done.drop_nulls(name)
            x = _along(axes, part[name], search.space[name])
            outside = ~part["inside"].to_numpy()
            draw(axes, part.filter(~outside), x[~outside], metric, {"marker": "o", "color": "C0", "ls": "", "ms": 6.5})
            axes.plot(x[outside], part[metric].to_numpy()[outside], "x", color="C1", ms=6.5, mew=1.6, zorder=4)
            lacking = early.drop_nulls(name)
            mark_early(axes, lacking, _along(axes, lacking[name], search.space[name]))
            axes.margins(y=0.12)
            draw_bound(axes, search, metric, "y")
        row[0].set_ylabel(sense(search, metric).replace(" (", "\n("), fontsize="small")
    for name, axes in zip(settings, panels[-1], strict=True):
        axes.set_xlabel(name, fontsize="small")
    marks = [Line2D([], [], marker="x", ls="", color="C1", mew=1.6, label="arm outside the space")]
    figure.align_xlabels()
    arms = marks if not done["inside"].all() else []
    legend(figure, search, done.filter("inside"), arms + early_marks(early))
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
    axes.set_xticks(ticks, [_number_text(tick) for tick in ticks], fontsize="small")
    axes.minorticks_off()
    return values.to_numpy()
