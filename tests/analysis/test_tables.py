import numpy as np
import polars as pl
import pytest

from workbench.analysis import paired, paper, tables
from workbench.common.errors import UserError

CAPTIONS = ["a fox on a red background, noto style", "a fox on a blue background, fluent style"]
BUCKETS = ("t000-499", "t500-999")


def runs(**arms: list[float]) -> pl.DataFrame:
    """Two seeds an arm; the numbers are each run's divergence in the first bucket, the second's is twice that."""
    return pl.DataFrame(
        {
            "run_id": f"{arm}{seed}", "name": f"{arm}-s{seed}", "arm": arm, "state": "complete", "seed": str(seed),
            "reference.policy": "threshold", "reference.interval": "4", "eval/reward": -2.0 - seed / 10,
            "eval/win_rate": 0.5, "divergence/policy": divergence,
            "timestep_divergence/t000-499": divergence, "timestep_divergence/t500-999": 2 * divergence,
        }
        for arm, values in arms.items()
        for seed, divergence in enumerate(values)
    )  # fmt: skip


def samples(scores: dict[str, list[float]]) -> pl.DataFrame:
    """By run, the rewards of captions 0 and 1 with image seed 0, then both with image seed 1."""
    return pl.DataFrame(
        {"run_id": run, "arm": run[:-1], "caption": CAPTIONS[i % 2], "image_seed": i // 2, "reward": value,
         "pretrained_reward": -2.0}
        for run, values in scores.items()
        for i, value in enumerate(values)
    )  # fmt: skip


def test_relative_divergence_is_a_ratio_of_means_over_seeds():
    study = runs(base=[0.01, 0.03, 0.02], ours=[0.02, 0.04, 0.03])
    table = paired.relative_divergence(study, "ours", "base")
    assert table["bucket"].to_list() == ["0-499", "500-999"]
    assert table["mean"].to_list() == pytest.approx([1.5, 1.5])  # 0.03 / 0.02; a mean of ratios would be 1.67
    assert table["low"].to_list() == pytest.approx([4 / 3] * 2)  # the seeds' own ratios, 2, 4/3 and 3/2, bound it
    assert table["high"].to_list() == pytest.approx([2.0] * 2)


def test_a_ratio_of_two_seeds_has_no_interval():
    table = paired.relative_divergence(runs(base=[0.01, 0.03], ours=[0.02, 0.04]), "ours", "base")
    assert table.row(0)[2:] == (pytest.approx(1.5), pytest.approx(1.5), pytest.approx(1.5), 2)


def test_no_ratio_to_what_is_not_positive_and_no_interval_where_a_draw_may_not_be():
    study = runs(base=[-0.01, 0.03, 0.01], worse=[0.02, 0.04, 0.03], nothing=[-0.01, 0.0, 0.0])
    assert paired.relative_divergence(study, "worse", "base").row(0)[2:5] == (pytest.approx(3.0), None, None)
    assert paired.relative_divergence(study, "worse", "nothing").row(0)[2:5] == (None, None, None)


def test_win_rates_pair_images_by_training_seed_prompt_and_image_seed():
    study = runs(ours=[0, 0], theirs=[0, 0])
    scores = samples(
        {
            "ours0": [1, 1, 1, 1], "theirs0": [0, 1, 2, 1],  # seed 0: noto win and loss, fluent two ties
            "ours1": [5, 5, 5, 5], "theirs1": [4, 6, 4, 6],  # seed 1: noto two wins, fluent two losses
        }
    )  # fmt: skip
    table = paired.win_rates(study, scores, "ours", "theirs")
    found = {row["prompts"]: row for row in table.to_dicts()}
    assert found["noto"]["mean"] == pytest.approx((0.5 + 1) / 2)
    assert found["fluent"]["mean"] == pytest.approx((0.5 + 0) / 2)
    assert found["all"]["mean"] == pytest.approx(0.5) and found["all"]["seeds"] == 2
    for order in range(3):
        mixed = scores.sample(fraction=1.0, shuffle=True, seed=order)
        again = paired.win_rates(study.sample(fraction=1.0, shuffle=True, seed=order), mixed, "ours", "theirs")
        assert again.sort("prompts").equals(table.sort("prompts"))


def test_win_rates_against_pretrained_need_no_second_run():
    study = runs(ours=[0])
    table = paired.win_rates(study, samples({"ours0": [-1, -3, -2, -2]}), "ours", "pretrained")
    assert dict(table.select("prompts", "mean").rows()) == {"noto": 0.75, "fluent": 0.25, "all": 0.5}


def test_only_training_seeds_of_both_arms_count():
    study = runs(ours=[0, 0], theirs=[0])
    scores = samples({"ours0": [1] * 4, "ours1": [1] * 4, "theirs0": [0] * 4})
    assert paired.win_rates(study, scores, "ours", "theirs")["seeds"].to_list() == [1] * 3
    apart = study.with_columns(seed=pl.when(pl.col("arm") == "theirs").then(pl.lit("7")).otherwise("seed"))
    with pytest.raises(UserError, match="arm 'theirs': no image of the same training seed"):
        paired.win_rates(apart, scores, "ours", "theirs")


def test_a_missing_arm_is_named_with_those_there_are():
    study = runs(frozen=[0], update=[0])
    with pytest.raises(UserError, match=r"arm 'kto': .* only of frozen, update"):
        tables.of_arms(study, "frozen,kto")
    unfinished = study.with_columns(state=pl.lit("pruned"))
    with pytest.raises(UserError, match="arm 'frozen'"):
        tables.of_arms(unfinished, "frozen")
    assert len(tables.of_arms(unfinished, "frozen", stopped=True)) == 1


def test_arms_come_in_the_order_asked_for():
    study = runs(a=[0, 0], b=[0])
    assert tables.of_arms(study, "b, a, pretrained, b")["arm"].to_list() == ["b", "a", "a"]


def test_fig_4_takes_arms_that_differ_in_the_references_updates_alone():
    study = runs(**{"threshold-4": [0, 0]}).with_columns(pl.lit("uniform").alias("timesteps.density"))
    scores = samples({"threshold-40": [1.0] * 4, "threshold-41": [3.0] * 4})
    table = tables.by_interval(study, scores)
    assert table.filter(pl.col("prompts") == "all").select("policy", "interval", "mean").rows() == [
        ("threshold", 4, 4)  # 2 above 0, and the pretrained model at -2
    ]
    with pytest.raises(UserError, match=r"timesteps\.density = 'discounted'"):
        tables.by_interval(study.with_columns(pl.lit("discounted").alias("timesteps.density")), scores)
    with pytest.raises(UserError, match="no arm with"):
        tables.by_interval(study.with_columns(pl.lit("frozen").alias("reference.policy")), scores)


def test_arms_that_differ_in_their_reference_alone_are_preferred():
    many = runs(**{"frozen": [0], "ours": [0], "same-update-4": [0]})
    assert tables.reference_arms(many)["arm"].to_list() == ["frozen", "same-update-4"]
    few = runs(frozen=[0], update=[0])
    assert tables.reference_arms(few)["arm"].to_list() == ["frozen", "update"]


def test_baseline_is_plain_diffusion_dpo():
    study = runs(frozen=[0], sft=[0], update=[0])
    frozen = pl.col("arm").is_in(["frozen", "sft"])
    study = study.with_columns(
        pl.when(frozen).then(pl.lit("frozen")).otherwise("reference.policy").alias("reference.policy")
    )
    assert tables.baseline(study)["arm"].to_list() == ["frozen"]
    assert tables.baseline(study.filter(pl.col("arm") != "frozen"))["arm"].to_list() == ["sft"]
    assert tables.baseline(study.filter(pl.col("arm") == "update"))["arm"].to_list() == ["update"]


def test_each_reward_scale_is_shown_once():
    study = runs(a=[0, 0], b=[0], c=[0], d=[0]).with_columns(
        pl.when(pl.col("arm") == "a").then(pl.lit("constant")).otherwise(pl.lit("power")).alias("reward_scale.shape"),
        pl.col("arm").replace_strict({"a": 1.0, "b": 1.5, "c": 1.5, "d": 1.7}).alias("timestep_lambda/t000-999"),
    )
    assert list(tables.distinct_scales(study)) == ["constant", "power (b)", "power (d)"]


def test_a_table_is_whole_in_markdown(tmp_path):
    table = pl.DataFrame({"a": ["x" * 100, None], "b": [1, 2]})
    path = tables.save(table, tmp_path / "new", "t")
    assert path.read_text() == f"| a | b |\n| --- | --- |\n| {'x' * 100} | 1 |\n|  | 2 |\n"
    assert tables.show(table).data == path.read_text()


def test_the_papers_tables_are_whole():
    assert all(set(row) == {"pretrained", "kto", "sft", "frozen", "dspo"} for row in paper.TABLE_1.values())
    assert paper.TABLE_3["ours"] == paper.TABLE_4["ours"] and paper.TABLE_3["frozen"] == paper.TABLE_4["frozen"]
    assert np.mean([row["frozen"] for row in paper.TABLE_1.values()]) == pytest.approx(69.13, abs=0.01)


def history() -> pl.DataFrame:
    """Two runs of an arm and one of another, four steps each."""
    return pl.DataFrame(
        {"run_id": run, "arm": run[:-1], "step": step, "margin": step * 1.0 + offset}
        for run, offset in (("a0", 0.0), ("a1", 2.0), ("b0", 0.0))
        for step in (1, 2, 3, 4)
    )  # fmt: skip


def test_curves_average_the_runs_of_an_arm():
    table = tables.curves(history(), "margin")
    assert table.columns == ["arm", "step", "mean", "low", "high", "runs"]
    assert table.filter(pl.col("arm") == "a").row(0) == ("a", 1, 2.0, 1.0, 3.0, 2)
    with pytest.raises(UserError, match="metric 'nope'"):
        tables.curves(history(), "nope")


def test_smoothing_is_a_running_mean_within_a_run():
    table = tables.curves(history(), "margin", smoothing=2).filter(pl.col("arm") == "b")
    assert table["mean"].to_list() == pytest.approx([1, 1.5, 2.5, 3.5])


def test_buckets_come_in_order_with_an_interval_over_runs():
    table = tables.by_bucket(runs(a=[0.01, 0.02, 0.03]), "divergence")
    half = 4.303 * 0.01 / 3**0.5  # Student's t with two degrees of freedom
    expected = [("0-499", 0.02, half), ("500-999", 0.04, 2 * half)]
    assert table["bucket"].to_list() == [bucket for bucket, *_ in expected]
    for (_, mean, beyond), row in zip(expected, table.rows(), strict=True):
        assert row[1:] == pytest.approx((mean, mean - beyond, mean + beyond), rel=1e-3)
    with pytest.raises(UserError, match="metric timestep_nope"):
        tables.by_bucket(runs(a=[0.01]), "nope")


def test_arms_are_the_declared_ones_where_there_are_any():
    mixed = pl.concat([runs(a=[0]), runs(sampled=[0])])
    assert tables.paper_arms(mixed)["arm"].to_list() == ["a"]
    assert len(tables.paper_arms(runs(sampled=[0]))) == 1
