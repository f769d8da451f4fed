"""A figure of any metric, for questions that no other notebook asks."""

import polars as pl
import seaborn as sns
from matplotlib.figure import Figure

from workbench.analysis.style import MARKERS
from workbench.common.errors import UserError


def over_steps(history: pl.DataFrame, metric: str) -> Figure:
    """A metric over training, a line an arm; a bar an arm where no run has it more than once, as at its end.

    Both are means over an arm's runs. Bands and whiskers hold 95 % of the runs' own values, where there are several.

    Args:
        history: of `tracking.load_history`.
    Raises:
        UserError: no run logged the metric.
    """
    if metric not in history.columns or history[metric].is_null().all():
        raise UserError(f"metric {metric!r}: no run of the study logged it")
    logged = history.select("run_id", "arm", "step", metric).drop_nulls()
    drawn = logged.to_dict(as_series=False)
    if logged["run_id"].is_unique().all():
        bars = sns.catplot(drawn, x="arm", y=metric, hue="arm", kind="bar", errorbar="pi", height=3.6, aspect=1.6)
        bars.tick_params(axis="x", rotation=35)
        return bars.figure
    grid = sns.relplot(drawn, x="step", y=metric, hue="arm", kind="line", errorbar="pi", height=3.6, aspect=1.6)
    for line, marker in zip(grid.ax.lines, MARKERS * len(grid.ax.lines), strict=False):
        if len(line.get_xdata()) == 1:  # an arm that was stopped early: a line of one point cannot be seen
            line.set_marker(marker)
    return grid.figure
