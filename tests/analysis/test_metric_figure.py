"""A figure of any metric."""

import polars as pl
import pytest

from workbench.analysis.metric_figure import over_steps
from workbench.common.errors import UserError


def history():
    """Two arms of two runs of three steps, and one that was stopped after its first; a reward at the ends alone."""
    rows = [
        {"run_id": f"{arm}{seed}", "arm": arm, "step": step, "margin": step + seed, "never": None,
         "reward": 10.0 * seed + place if step == 3 else None}
        for place, (arm, steps) in enumerate({"frozen": (1, 2, 3), "ours": (1, 2, 3), "stopped": (1,)}.items())
        for seed in range(2)
        for step in steps
    ]  # fmt: skip
    return pl.DataFrame(rows)


def test_a_metric_over_training_is_a_line_an_arm_and_a_mark_where_an_arm_has_one_point():
    (axes,) = over_steps(history(), "margin").axes
    lines = [line for line in axes.lines if len(line.get_xdata())]
    assert [line.get_ydata().tolist() for line in lines] == [[1.5, 2.5, 3.5], [1.5, 2.5, 3.5], [1.5]]
    assert [line.get_marker() not in ("None", "") for line in lines] == [False, False, True]


def test_a_metric_of_the_end_alone_is_a_bar_an_arm():
    (axes,) = over_steps(history(), "reward").axes
    assert [bar.get_height() for bars in axes.containers for bar in bars] == pytest.approx([5.0, 6.0])
    assert [label.get_text() for label in axes.get_xticklabels()] == ["frozen", "ours"]


@pytest.mark.parametrize("metric", ["never", "nonsense"])
def test_a_metric_that_no_run_has_is_named(metric):
    with pytest.raises(UserError, match=f"metric '{metric}': no run of the study logged it"):
        over_steps(history(), metric)
