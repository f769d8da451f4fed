"""Figures of what a search found, on invented trials."""

import warnings

import matplotlib.pyplot as plt
import numpy as np
import polars as pl
import pytest

from tests.support.searched import BOTH, REWARD, SPACE, study, trial
from workbench.analysis import search_figures
from workbench.common.errors import UserError
from workbench.studies import results

BOUND = {"sweep.constraints": {"divergence/policy": 0.02}}


@pytest.fixture(autouse=True)
def _close_figures():
    yield
    plt.close("all")


def texts(figure):
    return [text.get_text() for text in figure.legends[0].get_texts()]


def test_the_front_is_stepped_and_its_trials_are_numbered():
    made = study(BOTH, [trial(1.0, 0.1, arm="frozen"), trial(3.0, 0.3), trial(2.0, 0.2), trial(1.5, 0.3)])
    figure = search_figures.trade_off(results.read(made), landmarks={"eval/reward": 0.5, "divergence/policy": 0.0})
    (axes,) = figure.axes
    (steps,) = (line for line in axes.lines if line.get_drawstyle() == "steps-post")
    assert steps.get_xydata().tolist() == [[0.1, 1.0], [0.2, 2.0], [0.3, 3.0]]
    assert [text.get_text() for text in axes.texts] == ["1", "2", "0"]
    assert axes.get_ylabel() == "eval/reward (more is better)"
    assert texts(figure) == ["sampled", "Diffusion-DPO", "pretrained model", "on the front", "beaten"]


def test_a_front_of_a_metric_that_is_maximised_is_stepped_the_other_way():
    wanted = {"sweep.objective": ["eval/reward", "eval/judge"], "sweep.direction": ["maximize", "maximize"]}
    figure = search_figures.trade_off(results.read(study(wanted, [trial(1.0, 2.0), trial(2.0, 1.0)])))
    (steps,) = (line for line in figure.axes[0].lines if line.get_drawstyle() == "steps-pre")
    assert steps.get_xydata().tolist() == [[1.0, 2.0], [2.0, 1.0]]


def test_a_bound_is_drawn_and_what_is_beyond_it_is_hollow():
    made = study(REWARD | BOUND, [trial(2.0, beyond=-0.01), trial(3.0, beyond=0.02), trial(1.0, beyond=-0.015)])
    figure = search_figures.trade_off(results.read(made))
    (axes,) = figure.axes
    hollow = [line for line in axes.lines if line.get_markerfacecolor() == "none" and len(line.get_xdata())]
    assert [line.get_xydata().tolist() for line in hollow] == [[[pytest.approx(0.04), 3.0]]]
    assert [0.02, 0.02] in [[*line.get_xdata()] for line in axes.lines]
    assert {"at most 0.02", "0"} == {text.get_text() for text in axes.texts}
    assert texts(figure) == ["sampled", "best", "beaten", "beyond a constraint"]


def test_a_metric_that_trials_lack_is_named_with_those_they_have():
    with pytest.raises(UserError, match=r"metric 'divergence/policy': the study's trials have eval/reward"):
        search_figures.trade_off(results.read(study(REWARD, [trial(1.0)])))


def test_slices_have_a_row_a_metric_and_the_trials_that_have_the_setting():
    made = study(REWARD | BOUND, [
        trial(1.0, beyond=-0.01), trial(2.0, beyond=-0.01, density="discounted", gamma=0.9),
        trial(3.0, beyond=-0.01, arm="odd", overrides={"objective.beta": 1.0}),
    ])  # fmt: skip
    figure = search_figures.slices(results.read(made))
    panels = np.reshape(figure.axes, (2, 3))
    counts = [sum(len(line.get_xdata()) for line in axes.lines if line.get_ls() == "None") for axes in panels[0]]
    assert counts == [3, 3, 1]
    assert [tick.get_text() for tick in panels[1, 1].get_xticklabels()] == ["uniform", "discounted"]
    assert panels[0, 0].get_xscale() == "log" and panels[0, 2].get_xscale() == "linear"
    assert texts(figure) == ["arm outside the space", "beaten"]
    with pytest.raises(UserError, match=r"no sweep\.space"):
        search_figures.slices(results.read(study(BOTH | {"sweep.space": {}}, [trial(1.0, 1.0)])))


def without_end(axes):
    """Where trials without an end are marked along the axes' lower edge, by their mark."""
    found = [line for line in axes.lines if line.get_transform() == axes.get_xaxis_transform()]
    return {line.get_marker(): line.get_xdata().tolist() for line in found}


def with_reports(made, **told):
    """A trial with what it reported on its way."""
    made.intermediate_values.update(told["reports"])
    return made


EARLY = [
    with_reports(trial(1.0), reports={8: 0.1, 16: 0.2}), trial(state="FAIL", failed="out of memory"),
    with_reports(trial(3.0, density="discounted", gamma=0.89), reports={8: 0.2, 16: 0.4}),
    with_reports(trial(state="PRUNED", lr=1e-4), reports={16: 0.0, 8: 0.05}), trial(2.0),
]  # fmt: skip


def test_the_history_has_the_best_so_far_and_marks_trials_without_an_end():
    (axes,) = search_figures.history(results.read(study(REWARD, EARLY))).axes
    (steps,) = (line for line in axes.lines if line.get_drawstyle() == "steps-post")
    assert steps.get_xydata().tolist() == [[0, 1.0], [2, 3.0], [4, 3.0]]
    assert without_end(axes) == {"v": [3], "X": [1]}
    assert texts(axes.figure) == ["best so far", "pruned", "failed", "best", "beaten"]
    both = study(BOTH, [trial(1.0, 0.3), trial(2.0, 0.2), trial(0.5, 0.4)])
    least = search_figures.history(results.read(both)).axes[1]
    assert least.lines[0].get_ydata().tolist() == [0.3, 0.2, 0.2]


def test_slices_mark_the_trials_without_an_end_that_have_the_setting():
    figure = search_figures.slices(results.read(study(REWARD, EARLY)))
    assert [without_end(axes) for axes in figure.axes] == [
        {"v": [1e-4], "X": [3e-5]}, {"v": [0], "X": [0]}, {},
    ]  # fmt: skip
    assert texts(figure)[:2] == ["pruned", "failed"]


def test_intermediate_values_are_lines_with_a_cross_where_a_trial_was_pruned():
    made = study(REWARD | {"sweep.pruner": "MedianPruner"}, EARLY)
    (axes,) = search_figures.intermediate(results.reports(made)).axes
    pruned = [line for line in axes.lines if line.get_color() == "C3"]
    assert [line.get_xydata().tolist() for line in pruned] == [[[8, 0.05], [16, 0.0]], [[16, 0.0]]]
    assert pruned[1].get_marker() == "X" and len(axes.lines) == 2 + len(pruned)
    assert axes.get_ylabel() == "samples/reward_gain"
    with pytest.raises(UserError, match=r"no trial reported any; those of a study with sweep\.pruner do"):
        search_figures.intermediate(results.reports(study(REWARD, [trial(1.0)])))


def test_parallel_coordinates_have_a_line_a_trial_and_those_without_an_end_stop_before_the_objective():
    figure = search_figures.parallel(results.read(study(REWARD, EARLY)))
    axes, _ = figure.axes
    ended = [line.get_ydata() for line in axes.lines if len(line.get_ydata()) == 4]
    early = [line.get_ydata() for line in axes.lines if len(line.get_ydata()) == 3]
    third = pytest.approx(np.log10(3), abs=1e-6)  # 3e-5 on a logarithmic axis from 1e-5 to 1e-4
    assert [list(y) for y in ended] == [
        [third, 0, search_figures.NONE, 0], [third, 0, search_figures.NONE, 0.5], [third, 1, pytest.approx(0.5), 1],
    ]  # fmt: skip
    assert sorted(y[0] for y in early) == [third, 1]
    widths = [line.get_linewidth() for line in axes.lines if len(line.get_ydata()) == 4]
    assert widths[2] > widths[0] == widths[1]
    assert [tick.get_text() for tick in axes.get_xticklabels()] == [*SPACE, "eval/reward"]
    labels = [text.get_text() for text in axes.get_legend().get_texts()]
    assert labels == ["pruned or failed"]
    with pytest.raises(UserError, match=r"parallel coordinates: the study declares no sweep\.space"):
        search_figures.parallel(results.read(study(REWARD | {"sweep.space": {}}, [trial(1.0)])))


def test_parallel_coordinates_colour_by_the_trials_that_may_be_chosen():
    bounded = REWARD | {"sweep.constraints": {"divergence/policy": 0.02}}
    made = [trial(1.0, beyond=-0.01), trial(2.0, beyond=-0.005), trial(9.0, beyond=0.48)]
    axes, bar = search_figures.parallel(results.read(study(bounded, made))).axes
    lines = [line for line in axes.lines if len(line.get_ydata()) == 3]  # two settings and the objective
    assert [line.get_linestyle() for line in lines] == ["-", "-", ":"]
    assert bar.get_ylim() == (1.0, 2.0)
    assert [text.get_text() for text in axes.get_legend().get_texts()] == ["beyond a constraint"]


def test_a_setting_with_one_value_is_in_the_middle_of_its_axis():
    space = {"train.lr": {"type": "FloatDistribution", "low": 3e-5, "high": 3e-5, "log": True}}
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        figure = search_figures.parallel(results.read(study(REWARD | {"sweep.space": space}, [trial(1.0)])))
    assert [line.get_ydata()[0] for line in figure.axes[0].lines] == [0.5]


def test_win_rates_have_their_intervals_in_every_figure_of_them():
    ends = {"eval/win_rate_low": 0.4, "eval/win_rate_high": 0.7}
    far = {"divergence/policy": 0.01}
    wanted = {"sweep.objective": "eval/win_rate", "sweep.direction": "maximize"}
    found = results.read(study(wanted, [trial(0.55, **ends, **far), trial(0.6, **far)]))
    for axes in (
        search_figures.trade_off(found).axes[0], search_figures.history(found).axes[0],
        search_figures.slices(found).axes[0],
    ):  # fmt: skip
        segments = [segment[:, 1].tolist() for lines in axes.collections for segment in lines.get_segments()]
        assert [0.4, 0.7] in segments, segments
    (axes,) = search_figures.trade_off(found, x="eval/win_rate", y="divergence/policy").axes
    (segment,) = (s for lines in axes.collections for s in lines.get_segments())
    assert segment[:, 0].tolist() == [0.4, 0.7]


def test_importance_is_drawn_as_far_as_it_can_be_predicted():
    shares = pl.DataFrame({
        "metric": ["a/b", "a/b", "c/d"], "setting": ["train.lr", "timesteps.gamma", "train.lr"],
        "share": [0.5, 0.4, 1.0], "predicted": [0.8, 0.5, 0.0], "trials": [12, 9, 12],
    })  # fmt: skip
    (axes,) = search_figures.importance(shares).axes
    assert sorted(bar.get_width() for bar in axes.patches) == pytest.approx([0.0, 0.2, 0.4])
    assert [tick.get_text() for tick in axes.get_yticklabels()] == ["timesteps.gamma\n(9 trials)", "train.lr"]
    assert [t.get_text() for t in axes.get_legend().get_texts()] == [
        "a/b: 80 % can be predicted", "c/d: 0 % can be predicted",
    ]  # fmt: skip
    assert "fANOVA" in axes.get_title("left")
    with pytest.raises(UserError, match="from the settings of 12 trials nothing can be predicted"):
        search_figures.importance(shares.with_columns(predicted=pl.lit(0.0)))
