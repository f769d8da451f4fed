"""What the figures of a search share: how trials are drawn, marks of those without an end, bounds, the legend.

A trial is full where it is best or on the front, faint where it is beaten, hollow where it is beyond a constraint. One
that was pruned or failed has no end, and is marked at the lower edge.
"""

from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
import polars as pl
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D

from workbench.common.errors import UserError
from workbench.studies.search import Search
from workbench.studies.trials import INTERVAL

#: How a trial's mark looks, by how the trial came out.
LOOKS: dict[str, dict[str, Any]] = {
    "best": {"mec": "black", "mew": 1.2, "zorder": 5},
    "beaten": {"alpha": 0.4, "mec": "white", "mew": 0.6, "zorder": 3},
    "beyond a constraint": {"mfc": "none", "mew": 1.4, "zorder": 4},
}

#: How the mark of a trial without an end looks, by its state.
EARLY: dict[str, dict[str, Any]] = {
    "pruned": {"marker": "v", "color": "C3", "mfc": "none", "ms": 6, "mew": 1.4, "ls": ""},
    "failed": {"marker": "X", "color": "0.2", "ms": 6, "ls": ""},
}
WIN_RATE = "eval/win_rate"


def draw(axes: Axes, trials: pl.DataFrame, x: np.ndarray, y: str, look: Mapping[str, Any]) -> None:
    """Draw trials at x, shape (trials,), with the look of how each came out (LOOKS)."""
    came, values = kinds(trials), trials[y].to_numpy()
    whiskers(axes, trials, x, y, axes.vlines)
    for kind, how in LOOKS.items():
        axes.plot(x[came == kind], values[came == kind], **{"mec": look["color"], **look, **how})


def whiskers(axes: Axes, trials: pl.DataFrame, at: np.ndarray, metric: str, lines: Callable) -> None:
    """The 95 % intervals over prompts of trials' win rates, where these are drawn.

    Args:
        at: where on the other axis, shape (trials,).
        lines: axes.vlines or axes.hlines.
    """
    if metric == WIN_RATE and {*INTERVAL} <= {*trials.columns}:
        known = trials.select(pl.all_horizontal(pl.col(name).is_not_null() for name in INTERVAL)).to_series()
        low, high = (trials.filter(known)[name] for name in INTERVAL)
        lines(at[known.to_numpy()], low, high, color="0.55", lw=1.2, zorder=1)


def mark_early(axes: Axes, trials: pl.DataFrame, x: np.ndarray) -> None:
    """Marks at the lower edge for trials without an end, at x, shape (trials,)."""
    for state, look in EARLY.items():
        chosen = (trials["state"] == state).to_numpy()
        if chosen.any():
            low = np.full(chosen.sum(), 0.03)  # as a fraction of the axes
            axes.plot(x[chosen], low, transform=axes.get_xaxis_transform(), zorder=4, **look)


def early_marks(trials: pl.DataFrame) -> list[Line2D]:
    """What the marks of `mark_early` mean, as far as there are such trials."""
    return [Line2D([], [], label=state, **look) for state, look in EARLY.items() if state in trials["state"]]


def without_end(search: Search) -> pl.DataFrame:
    """The trials without an end."""
    return search.trials.filter(pl.col("state").is_in([*EARLY]))


def kinds(trials: pl.DataFrame) -> np.ndarray:
    """How each trial came out, a key of LOOKS, shape (trials,)."""
    best, beaten, beyond = (pl.lit(kind) for kind in LOOKS)
    return (
        trials.select(pl.when(~pl.col("feasible")).then(beyond).when("best").then(best).otherwise(beaten))
        .to_series()
        .to_numpy()
    )


def draw_bound(axes: Axes, search: Search, metric: str, side: str) -> None:
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


def sense(search: Search, metric: str) -> str:
    """A metric's name with which way is better, where the study wants one."""
    better = {"maximize": " (more is better)", "minimize": " (less is better)"}
    return metric + better.get(search.objectives.get(metric, ""), "")


def legend(figure: Figure, search: Search, trials: pl.DataFrame, marks: list[Line2D]) -> None:
    """Marks first, then what their looks mean as far as they are there."""
    there = {*kinds(trials)}
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


def searched(search: Search, done: pl.DataFrame, figure: str) -> list[str]:
    """The settings of the space that complete trials have.

    Raises:
        UserError: there is none.
    """
    settings = [name for name in search.space if done[name].null_count() < len(done)]
    if not settings:
        raise UserError(f"{figure}: the study declares no sweep.space, or no complete trial has a setting of it")
    return settings
