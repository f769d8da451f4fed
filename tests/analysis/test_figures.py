import numpy as np
import polars as pl
import pytest

from workbench.analysis import figures, style
from workbench.common.errors import UserError


def runs() -> pl.DataFrame:
    rows = []
    for arm, policy in (("frozen", "frozen"), ("threshold", "threshold")):
        for seed in range(2):
            row = {
                "run_id": f"{arm}{seed}", "name": f"{arm}-{seed}", "arm": arm, "state": "complete", "seed": str(seed),
                "reference.policy": policy, "reference.delta": "0.005", "objective.beta": "300.0",
                "reference.interval": None if policy == "frozen" else "4",
                "divergence/policy": 0.01 * (seed + 1), "eval/reward": -1.0 + seed,
            }  # fmt: skip
            for bucket in range(10):
                for quantity in ("loss", "reward_size", "accuracy", "lambda", "divergence"):
                    row[f"timestep_{quantity}/t{bucket * 100:03d}-{bucket * 100 + 99:03d}"] = (
                        1.0 - bucket / 20 + seed / 100
                    )
            rows.append(row)
    return pl.DataFrame(rows)


def history() -> pl.DataFrame:
    steps = [
        {"step": s, "validation/margin": s * 1e-3, "divergence/reference": s * 1e-4, "divergence/policy": None}
        for s in (1, 2, 3, 4)
    ]
    return pl.concat(
        pl.DataFrame(steps, schema_overrides={"divergence/policy": pl.Float64}).with_columns(
            run_id=pl.lit(row["run_id"]), arm=pl.lit(row["arm"]), name=pl.lit(row["name"])
        )
        for row in runs().iter_rows(named=True)
    ).with_columns(pl.col("divergence/policy").fill_null(0.002))


def test_margin_is_drawn_times_half_beta_and_divergence_of_whoever_moves():
    figure = figures.margin_and_divergence(runs(), history(), margin="validation/margin")
    left, right = figure.axes
    assert left.lines[0].get_ydata().tolist() == pytest.approx([0.15, 0.3, 0.45, 0.6])
    labels = {line.get_label() for line in right.lines}
    assert {"threshold: divergence of the reference", "frozen: divergence of the policy"} <= labels
    assert all(line.get_linestyle() == ":" for line in right.lines[:2])


def test_runs_that_measured_once_have_a_mark_and_their_range_in_fig_1b():
    once = history().filter(pl.col("step") == 4).with_columns(
        pl.col("validation/margin") * (1 + pl.col("run_id").str.ends_with("1").cast(pl.Float64))
    )  # fmt: skip
    left, _ = figures.margin_and_divergence(runs(), once, margin="validation/margin").axes
    assert [line.get_marker() for line in left.lines] == ["o", "s"]
    (span, *_), *_ = (bar.get_segments() for bar in left.collections)
    assert span.tolist() == pytest.approx(np.array([[4, 0.6], [4, 1.2]]))


def test_fig_1b_shows_the_smoothed_margin_of_training_batches_and_says_so():
    steps = pl.DataFrame({"step": range(1, 65), "rewards/margins": [0.001 * (1 + (-1) ** i) for i in range(64)]})
    noisy = pl.concat(
        steps.with_columns(run_id=pl.lit(row["run_id"]), arm=pl.lit(row["arm"]), name=pl.lit(row["name"]))
        for row in runs().iter_rows(named=True)
    ).with_columns(pl.lit(0.001).alias("divergence/reference"), pl.lit(0.002).alias("divergence/policy"))
    figure = figures.margin_and_divergence(runs(), noisy)
    line = figure.axes[0].lines[0].get_ydata()
    assert len(line) == 64 and line[2:-2] == pytest.approx([0.15] * 60)  # the mean of two runs of four points
    (caption,) = (text.get_text() for text in figure.texts)
    assert "training batches, against the reference" in caption and "4 logged points" in caption
    plain = figures.margin_and_divergence(runs(), history(), margin="validation/margin")
    assert [text.get_text() for text in plain.texts] == ["Margin: of validation pairs, against the pretrained model."]


def test_the_same_figure_gives_the_same_file(tmp_path):
    for folder in ("a", "b"):
        figures.save(figures.imbalance(runs(), runs()), tmp_path / folder, "f", "svg,png")
    for kind in ("svg", "png"):
        assert (tmp_path / "a" / f"f.{kind}").read_bytes() == (tmp_path / "b" / f"f.{kind}").read_bytes()


def test_an_unknown_format_or_metric_is_named(tmp_path):
    with pytest.raises(UserError, match="'docx'"):
        figures.save(figures.imbalance(runs(), runs()), tmp_path, "f", "docx")


def samples() -> pl.DataFrame:
    captions = ["a fox on a red background, noto style", "a car on a blue background, fluent style",
                "a owl on a white background, twemoji style"]  # fmt: skip
    return pl.DataFrame(
        {"run_id": run["run_id"], "arm": run["arm"], "caption": caption, "image_seed": seed,
         "reward": -2.0 + place / 10 + int(run["seed"]), "pretrained_reward": -3.0}
        for run in runs().to_dicts()
        for seed in range(2)
        for place, caption in enumerate(captions)
    )  # fmt: skip


def test_final_gains_have_a_point_an_arm_above_the_pretrained_models_line_in_every_panel():
    figure = figures.final_gain(runs(), samples())
    assert [axes.get_title() for axes in figure.axes] == ["all prompts", "noto style", "fluent style", "twemoji style"]
    noto = figure.axes[1]
    assert noto.lines[0].get_ydata() == [0, 0] and noto.lines[0].get_label() == "pretrained model"
    points = [line.get_ydata()[0] for line in noto.lines if line.get_marker() in style.MARKERS]
    assert points == pytest.approx([1.5, 1.5])  # the mean of two seeds, 1 and 2 above the pretrained model's -3
    assert len({axes.get_ylim() for axes in figure.axes}) == 1
    assert [text.get_text() for text in figure.texts] == ["2 training seeds: too few for an interval"]


@pytest.mark.parametrize(
    ("seeds", "says"),
    [
        ({"frozen": 1, "threshold": 1}, ["one training seed: too few for an interval"]),
        ({"frozen": 1, "threshold": 3}, ["where no whiskers are, one training seed: too few for an interval"]),
        ({"frozen": 1, "threshold": 2}, ["fewer than 3 training seeds: too few for an interval"]),
        ({"frozen": 3, "threshold": 4}, []),
    ],
)
def test_figures_say_where_seeds_are_too_few_for_whiskers(seeds, says):
    first = runs().filter(pl.col("seed") == "0")
    study = pl.concat(
        first.filter(pl.col("arm") == arm).with_columns(run_id=pl.col("run_id") + f"-{seed}", seed=pl.lit(str(seed)))
        for arm, count in seeds.items()
        for seed in range(count)
    )
    scored = pl.concat(
        samples()
        .filter(pl.col("run_id") == f"{run['arm']}0")
        .with_columns(run_id=pl.lit(run["run_id"]), reward=pl.col("reward") + int(run["seed"]) / 10)
        for run in study.to_dicts()
    )
    for draw in (figures.final_gain, figures.gain_against_interval):
        assert [text.get_text() for text in draw(study, scored).texts] == says


def test_gains_against_intervals_have_a_band_of_the_frozen_reference():
    figure = figures.gain_against_interval(runs(), samples())
    assert [text.get_text() for text in figure.axes[0].get_xticklabels()] == ["4"]
    (legend,) = figure.legends
    assert {text.get_text() for text in legend.get_texts()} == {
        "pretrained model", "frozen reference (Diffusion-DPO)", "without threshold", "with threshold",
    }  # fmt: skip


def test_divergence_by_timestep_is_in_per_cent_of_the_base():
    figure = figures.divergence_by_timestep(runs(), arms="threshold", base="frozen")
    (line,) = (line for line in figure.axes[0].lines if line.get_marker() == style.MARKERS[0])
    assert line.get_ydata().tolist() == pytest.approx([100.0] * 10)


def test_sample_grids_cut_the_same_prompts_from_every_sheet():
    sheets = {run: np.zeros((8, 12, 3), np.uint8) for run in runs()["run_id"]}
    for sheet in sheets.values():
        sheet[:4] = np.repeat([10, 20, 30], 4)[None, :, None]  # the second image seed, below, stays black
    before = {run: sheet + 100 for run, sheet in sheets.items()}
    figure = figures.sample_grid(runs(), samples(), sheets, before, seed=1, prompts=2)
    shown = [axes.images[0].get_array() for axes in figure.axes]
    assert [image.shape for image in shown] == [(4, 4, 3)] * 6
    assert [int(image.max()) for image in shown] == [110, 10, 10, 130, 30, 30]  # by row: first and last prompt
    assert [figure.axes[i].get_title() for i in range(3)] == ["pretrained", "Diffusion-DPO", "threshold"]
    assert figure.axes[0].get_ylabel().startswith("fox")
    with pytest.raises(UserError, match="arm 'frozen': no finished run with training seed 5"):
        figures.sample_grid(runs(), samples(), sheets, {}, seed=5)


def test_the_zeros_of_fig_1bs_axes_coincide():
    left, right = figures.margin_and_divergence(runs(), history(), margin="validation/margin").axes
    heights = [-low / (high - low) for low, high in (left.get_ylim(), right.get_ylim())]
    assert heights[0] == pytest.approx(heights[1]) and heights[0] < 0.5


def test_fig_1b_shows_what_is_near_delta_where_divergence_goes_far_beyond():
    far = history().with_columns(pl.col("divergence/reference") * 100)
    left, right, near = figures.margin_and_divergence(runs(), far, margin="validation/margin").axes
    assert near.get_ylim() == pytest.approx((-0.00125, 0.01)) and right.get_ylim()[1] > 0.03
    assert right.lines[0].get_drawstyle() == "steps-post"  # a reference moves in steps
    assert "Diffusion-DPO" in [text.get_text() for text in left.figure.legends[0].get_texts()]


def test_accuracy_is_drawn_from_one_half_and_few_runs_are_counted():
    figure = figures.imbalance(runs().head(2), runs())
    bar = figure.axes[2].patches[0]
    assert bar.get_y() == 0.5 and bar.get_height() == pytest.approx(0.505)  # the mean of 1 and 1.01
    assert [text.get_text() for text in figure.texts] == ["bars: 2 runs, too few for whiskers"]
    ticks = [text.get_text() for text in figure.axes[0].get_xticklabels()]
    assert ticks[:2] == ["0", "100"] and ticks[-1] == "1000"
    assert figures.imbalance(runs(), runs()).texts == []


def test_a_sample_has_its_reward_below_and_the_best_of_a_row_a_frame():
    sheets = {run: np.zeros((8, 12, 3), np.uint8) for run in runs()["run_id"]}
    better = samples().with_columns(
        reward=pl.when(pl.col("arm") == "threshold").then(pl.col("reward") + 0.5).otherwise("reward")
    )
    figure = figures.sample_grid(runs(), better, sheets, sheets, seed=1, prompts=2)
    assert [axes.get_xlabel() for axes in figure.axes[:3]] == ["-3.00", "-1.00", "-0.50"]
    assert [axes.spines["left"].get_visible() for axes in figure.axes] == [False, False, True] * 2
