import polars as pl
import pytest

from tests.analysis.test_tables import runs, samples
from workbench.analysis import paper, paper_tables
from workbench.common.errors import UserError


def test_an_estimate_has_half_its_interval_or_says_how_few_seeds_there_are():
    assert paper_tables.estimate(0.37, 0.186, 0.554, 5, 3, signed=True) == "+0.370 ± 0.184"
    assert paper_tables.estimate(50.0, 50.0, 50.0, 1, 1) == "50.0 (1 seed)"
    assert paper_tables.estimate(50.0, 50.0, 50.0, 2, 1) == "50.0 (2 seeds)"


def test_table_1_stands_beside_the_papers_and_has_the_judge_where_there_is_one():
    study = runs(ours=[0, 0], kto=[0, 0])
    scores = samples({run: [0.0] * 4 for run in ("ours0", "ours1", "kto0", "kto1")})
    table = paper_tables.table_1(study, scores, "ours", "pretrained,kto")
    assert table["ours against"].to_list() == ["pretrained", "Diffusion-KTO"]
    assert table["gain, nats"].to_list() == ["+2.000 (2 seeds)", "+0.000 (2 seeds)"]
    assert table["all, %"].to_list() == ["100.0 (2 seeds)", "50.0 (2 seeds)"]
    assert table["HPDv2 (paper, SD1.5), %"].to_list() == ["82.3", "58.3"]
    judged = scores.with_columns(judge=pl.lit(-1.0), pretrained_judge=pl.lit(0.0))
    judged = paper_tables.table_1(study, judged, "ours", "pretrained,kto").filter(pl.col("by") == "independent judge")
    assert judged["all, %"].to_list() == ["0.0 (2 seeds)", "50.0 (2 seeds)"]
    assert judged["gain, nats"].to_list() == ["-1.000 (2 seeds)", "+0.000 (2 seeds)"]


def test_table_1_is_bold_where_an_interval_says_that_ours_is_better():
    study = runs(ours=[0] * 3, kto=[0] * 3)
    ours = {f"ours{seed}": [1 + seed / 10, 1.0, 1.0, 1.0] for seed in range(3)}
    # Noto always won; of fluent, seed by seed, one half, one half, nothing.
    kto = {f"kto{seed}": [0.0, 2.0, 0.0, 0.0 if seed < 2 else 2.0] for seed in range(3)}
    (row,) = paper_tables.table_1(study, samples(ours | kto), "ours", "kto").to_dicts()
    assert row["noto style, %"] == "**100.0 ± 0.0**" and row["fluent style, %"] == "33.3 ± 71.7"
    assert row["gain, nats"] == "+0.358 ± 0.664"
    better = {run: [value + 5 for value in values] for run, values in ours.items()}
    (row,) = paper_tables.table_1(study, samples(better | kto), "ours", "kto").to_dicts()
    assert row["gain, nats"] == "**+5.358 ± 0.664**"


def comparable(arms) -> pl.DataFrame:
    """Three seeds an arm; the first arm has the largest gain by the reward, the last by the judge."""
    gain = {arm: 0.5 - place / 10 for place, arm in enumerate(arms)}
    return runs(**{arm: [0.01, 0.02, 0.03] for arm in arms}).with_columns(
        pl.col("arm").replace_strict(gain).add(pl.col("seed").cast(pl.Int64) / 10).alias("eval/reward_gain"),
        -pl.col("arm").replace_strict(gain).alias("eval/judge_gain"),
    )


def test_comparison_has_a_row_a_method_after_the_pretrained_models_and_counts_the_stopped():
    collapsed = pl.col("arm") == "lr-high"
    study = comparable(paper.TABLE_3).with_columns(
        pl.when(collapsed).then(pl.lit("pruned")).otherwise("state").alias("state"),
        pl.when(~collapsed).then("eval/reward_gain").alias("eval/reward_gain"),
    )
    table = paper_tables.comparison(study, paper.TABLE_3)
    assert table["arm"].to_list() == [None, "frozen", "lr-high", "beta-low", "reinit", "ours"]
    before, first, second, *_, last = table.to_dicts()
    assert (before["method"], before["gain in true reward"], before["win rate against pretrained, %"]) == (
        "pretrained", "0", "**50**",
    )  # fmt: skip
    assert before["PickScore (paper, SD1.5)"] is None
    assert first["gain in true reward"] == "**+0.600 ± 0.248**" and first["seeds finished"] == "3"
    assert second["gain in true reward"] == "none" and second["seeds finished"] == "0 of 3"
    assert second["divergence of the policy"] == "0.0200 ± 0.0248"
    assert second["PickScore (paper, SD1.5)"] == "19.75"
    assert before["gain by the judge"] == "**0**" and last["gain by the judge"] == "-0.100 ± 0.000"
    with pytest.raises(UserError, match="arm 'timestep-aware'"):
        paper_tables.comparison(study, paper.TABLE_4)
    assert "gain by the judge" not in paper_tables.comparison(study.drop("eval/judge_gain"), paper.TABLE_3).columns


def test_comparison_of_single_seeds_pretends_no_interval():
    table = paper_tables.comparison(comparable(paper.TABLE_3).filter(pl.col("seed") == "0"), paper.TABLE_3)
    assert table["gain in true reward"].to_list()[1] == "**+0.500 (1 seed)**"
    assert not table.select(pl.all().cast(pl.String).str.contains("±").any()).row(0).count(True)
