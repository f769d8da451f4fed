import matplotlib.pyplot as plt
import polars as pl
import pytest

from tests.analysis.test_figures import runs
from workbench.analysis import divergence_figures, tables
from workbench.common.errors import UserError


def arms(points: dict[str, tuple[float, float]]) -> pl.DataFrame:
    """Three seeds of each arm around a divergence and a reward."""
    return pl.DataFrame(
        {"run_id": f"{arm}{seed}", "arm": arm, "state": "complete", "seed": str(seed), "reference.policy": "threshold",
         "reference.delta": "0.005", "divergence/policy": far + 1e-4 * (seed - 1), "eval/reward": reward,
         "eval/reward_gain": reward + 2}
        for arm, (far, reward) in points.items() for seed in range(3)
    )  # fmt: skip


def test_the_front_has_the_arms_that_no_other_beats_in_reward_and_divergence():
    points = {
        "far": (0.1, -1.5),
        "near": (0.002, -1.9),
        "good": (0.01, -1.4),
        "beaten": (0.02, -1.6),
        "tie": (0.03, -1.4),
    }
    table = tables.front(arms(points))
    assert table["arm"].to_list() == ["near", "good", "beaten", "tie", "far"]
    assert table.filter("on_front")["arm"].to_list() == ["near", "good"]
    assert table["divergence_low"][0] < 0.002 < table["divergence_high"][0]
    figure = divergence_figures.reward_front(arms(points))
    axes = figure.axes[0]
    assert axes.lines[0].get_xdata().tolist() == pytest.approx([0.002, 0.01])
    assert {"pretrained model", *points} == {text.get_text() for text in axes.get_legend().get_texts()}
    assert not figure.texts
    alone = arms(points).filter(pl.col("seed") == "0")
    (said,) = divergence_figures.reward_front(alone).texts
    assert said.get_text() == "one training seed: too few for an interval"
    assert {"near", "good", "delta = 0.005"} == {text.get_text() for text in axes.texts}
    with pytest.raises(UserError, match="metric 'nope'"):
        tables.front(arms(points), "nope")


def test_a_run_that_went_very_far_is_counted_and_not_shown():
    far = pl.concat([runs(), runs().head(1).with_columns(pl.lit(0.9).alias("divergence/policy"), run_id=pl.lit("far"))])
    figure = divergence_figures.score_against_divergence(far)
    assert figure.axes[0].get_xlim()[1] < 0.1
    assert "not shown: 1 runs, up to 0.9 away" in figure.texts[0].get_text()


def test_an_unknown_score_is_named():
    with pytest.raises(UserError, match="metric 'nope'"):
        divergence_figures.score_against_divergence(runs(), score="nope")


def test_every_part_of_the_reward_has_a_panel_and_every_arm_a_point_in_it():
    gains = {metric: pl.lit(0.1 * i) for i, metric in enumerate(divergence_figures.GAINS)}
    figure = divergence_figures.reward_parts(arms({"near": (0.002, -1.9), "far": (0.1, -1.5)}).with_columns(**gains))
    assert [axes.get_title() for axes in figure.axes] == list(divergence_figures.GAINS.values())
    for i, axes in enumerate(figure.axes):
        points = [container.lines[0].get_ydata()[0] for container in axes.containers]
        assert points == pytest.approx([0.1 * i] * 2)
    with pytest.raises(UserError, match="eval/concept_gain"):
        divergence_figures.reward_parts(arms({"near": (0.002, -1.9)}))


def test_few_runs_have_no_running_mean_and_the_pretrained_model_is_always_there():
    def drawn(count):
        points = {f"a{i}": (0.001 * (i + 1), -1.5) for i in range(count)}
        axes = divergence_figures.score_against_divergence(arms(points)).axes[0]
        return {text.get_text() for text in axes.get_legend().get_texts()}, axes

    texts, axes = drawn(4)  # twelve runs
    assert "pretrained model" in texts and not any("neighbours" in text for text in texts)
    assert [0, -2] in [[*line.get_xdata(), *line.get_ydata()] for line in axes.lines]
    assert any("neighbours" in text for text in drawn(5)[0])


@pytest.mark.parametrize("ends", [(-0.0009, 0.0007), (0.0021, 0.0049), (0.06, 0.09), (0.3, 0.45), (0, 0.06)])
def test_an_axis_of_divergences_has_a_few_short_ticks(ends):
    figure, axes = plt.subplots()
    divergence_figures._scale(axes, [0.005])
    axes.plot(ends, [0, 1])
    divergence_figures._tick(axes)
    figure.canvas.draw()
    low, high = axes.get_xlim()
    labels = [text.get_text() for text in axes.get_xticklabels() if low <= text.get_position()[0] <= high]
    assert 3 <= len(labels) <= 9 and all(len(label) <= 7 for label in labels), labels
    plt.close(figure)
