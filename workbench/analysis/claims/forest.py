"""All effects of the claims in one figure: which way the paper is right, and how surely."""

from collections.abc import Mapping, Sequence
from typing import Any

import matplotlib.pyplot as plt
import numpy as np
import seaborn as sns
from matplotlib.figure import Figure
from matplotlib.lines import Line2D

from workbench.analysis.claims.verdicts import FAILS, HOLDS, OPEN
from workbench.analysis.intervals import ENOUGH

FARTHEST = 6.0  # half-widths; what lies beyond is drawn at the edge, as a triangle
LOOKS = {HOLDS: ("C2", "o"), OPEN: ("0.45", "s"), FAILS: ("C3", "D"), "": ("C0", "x")}
NAMES = {"": "shown, decides nothing"}
FEW = "no verdict"  #: what an inconclusive effect's mark is called where all such effects have too few seeds for any


def forest(rows: Sequence[Mapping[str, Any]]) -> Figure:
    """A row an effect, claims from top to bottom; right of 0 is as the paper says.

    Effects have different units, so each is divided by half the width of its 95 % interval over training seeds: every
    interval has the length 2, and it holds where all of it lies right of 0, that is where the point lies right of 1.

    Args:
        rows: of `verdicts.judge`.
    """
    effects = [(row["number"], effect) for row in rows for effect in row["effects"]]
    figure, axes = plt.subplots(figsize=(8.5, 1.2 + 0.27 * len(effects)))
    axes.axvspan(-1, 1, color="0.93", zorder=0)
    axes.axvline(0, color="0.3", lw=1, zorder=1)
    for place, (_, effect) in enumerate(effects):
        half = (effect["high"] - effect["low"]) / 2
        # No interval, for too few or equal seeds: nothing to divide by. Such an effect is a point at the edge, or at 0.
        ratio = effect["mean"] / half if half else FARTHEST * np.sign(effect["mean"])
        shown = min(max(ratio, -FARTHEST), FARTHEST)
        colour, marker = LOOKS[effect["verdict"]]
        if shown != ratio:
            marker = ">" if ratio > 0 else "<"
        elif half:
            axes.plot([ratio - 1, ratio + 1], [place, place], color=colour, lw=1.6, zorder=2)
        axes.plot(shown, place, marker, color=colour, ms=6, mew=1.6, zorder=3)
    axes.set_yticks(range(len(effects)), [f"{number}  {_short(effect['statement'])}" for number, effect in effects])
    axes.tick_params(axis="y", labelsize="x-small", length=0)
    # The y axis is turned over: the first claim is on top.
    axes.set(xlim=(-FARTHEST - 1.2, FARTHEST + 1.2), ylim=(len(effects) - 0.4, -0.6))
    axes.set_xlabel("mean over seeds in half-widths of its 95 % interval (right: as the paper says)", fontsize="small")
    undecided = [effect["seeds"] for _, effect in effects if effect["verdict"] == OPEN]
    names = NAMES | ({OPEN: FEW} if undecided and max(undecided) < ENOUGH else {})
    marks = [
        Line2D([], [], color=colour, marker=marker, ls="", label=names.get(verdict, verdict))
        for verdict, (colour, marker) in LOOKS.items()
    ]
    axes.legend(handles=marks, loc="lower center", bbox_to_anchor=(0.3, 1), ncols=4, frameon=False, fontsize="x-small")
    sns.despine(figure, left=True)
    return figure


def _short(statement: str) -> str:
    return statement if len(statement) <= 80 else f"{statement[:77].rstrip()} ..."
