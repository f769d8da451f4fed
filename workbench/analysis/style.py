"""What all figures share: the theme, the marks, means with whiskers, and what is said where there are none.

Colours are safe for the colour-blind, marks and dashes tell in grey. To import this module sets the theme.
"""

import matplotlib as mpl
import numpy as np
import polars as pl
import seaborn as sns
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from workbench.analysis import fonts
from workbench.analysis.intervals import ENOUGH

mpl.rcParams["svg.hashsalt"] = "workbench"  # the same figure gives the same file
sns.set_theme(context="notebook", style="ticks", palette="colorblind")
fonts.use()

MARKERS = "osD^vPX<>*"


def name_buckets(axes: Axes, buckets: pl.Series) -> None:
    """The edges of buckets as ticks between them."""
    edges = [bucket.split("-")[0] for bucket in buckets] + [str(int(buckets[-1].split("-")[-1]) + 1)]
    axes.set_xticks(np.arange(len(edges)) - 0.5, edges, fontsize="x-small")


def points(
    axes: Axes, x: np.ndarray, table: pl.DataFrame, *, colour: str, marker: str, fmt: str = "", factor: float = 1,
    label: str | None = None,
) -> None:  # fmt: skip
    """Means with whiskers from low to high; none where there is no interval."""
    mean, low, high = (table[column].cast(pl.Float64).to_numpy() * factor for column in ("mean", "low", "high"))
    axes.errorbar(
        # errorbar refuses NaN, and lengths below 0, which rounding can make.
        x, mean, yerr=np.nan_to_num(np.stack([mean - low, high - mean])).clip(0), fmt=f"{fmt}{marker}", color=colour,
        ms=8, mec="white", mew=0.8, capsize=3, lw=1.6, label=label, zorder=3,
    )  # fmt: skip


def say_few(figure: Figure, seeds: pl.Series, y: float = -0.02) -> None:
    """Say below a figure where training seeds are too few for whiskers; nothing where there are enough everywhere.

    Args:
        seeds: how many each point has; 0 is of a point that is not drawn.
        y: height of the text, as a fraction of the figure.
    """
    counts = {int(count) for count in seeds if count}
    few = sorted(count for count in counts if count < ENOUGH)
    if not few:
        return
    number = f"fewer than {ENOUGH} training seeds" if len(few) > 1 else f"{few[0]} training seeds"
    said = "one training seed" if few == [1] else number
    every = "" if len(few) == len(counts) else "where no whiskers are, "
    figure.text(0.5, y, f"{every}{said}: too few for an interval", ha="center", va="top", color="0.3", fontsize="small")
