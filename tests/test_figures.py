import polars as pl
import pytest

from workbench import figures
from workbench.errors import UserError


def runs() -> pl.DataFrame:
    rows = []
    for arm, policy in (("frozen", "frozen"), ("threshold", "threshold")):
        for seed in range(2):
            row = {
                "run_id": f"{arm}{seed}", "name": f"{arm}-{seed}", "arm": arm, "state": "complete",
                "reference.policy": policy, "reference.delta": "0.005", "objective.beta": "300.0",
                "divergence/policy": 0.01 * (seed + 1), "eval/reward": -1.0 + seed,
            }  # fmt: skip
            for bucket in range(10):
                for quantity in ("loss", "reward_size", "accuracy", "lambda"):
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


def test_curves_average_the_runs_of_an_arm():
    table = figures.curves(history(), "validation/margin")
    assert table.columns == ["arm", "step", "mean", "low", "high", "runs"]
    assert table.filter(pl.col("arm") == "frozen")["mean"].to_list() == pytest.approx([1e-3, 2e-3, 3e-3, 4e-3])
    assert set(table["runs"]) == {2}


def test_smoothing_is_a_running_mean_within_a_run():
    table = figures.curves(history(), "validation/margin", smoothing=2).filter(pl.col("arm") == "frozen")
    assert table["mean"].to_list() == pytest.approx([1e-3, 1.5e-3, 2.5e-3, 3.5e-3])


def test_margin_is_drawn_times_half_beta_and_divergence_of_whoever_moves():
    figure = figures.margin_and_divergence(runs(), history())
    left, right = figure.axes
    assert left.lines[0].get_ydata().tolist() == pytest.approx([0.15, 0.3, 0.45, 0.6])
    labels = {line.get_label() for line in right.lines}
    assert {"threshold: divergence of the reference", "frozen: divergence of the policy"} <= labels
    assert all(line.get_linestyle() == ":" for line in right.lines[:2])


def test_buckets_come_in_order_with_an_interval_over_runs():
    table = figures.by_bucket(runs().filter(pl.col("arm") == "frozen"), "accuracy")
    assert table["bucket"].to_list()[:2] == ["0-99", "100-199"]
    assert table["mean"][0] == pytest.approx(1.005) and table["low"][0] <= 1.005 <= table["high"][0]


def test_the_same_figure_gives_the_same_file(tmp_path):
    for folder in ("a", "b"):
        figures.save(figures.imbalance(runs(), runs()), tmp_path / folder, "f", "svg,png")
    for kind in ("svg", "png"):
        assert (tmp_path / "a" / f"f.{kind}").read_bytes() == (tmp_path / "b" / f"f.{kind}").read_bytes()


def test_an_unknown_format_or_metric_is_named(tmp_path):
    with pytest.raises(UserError, match="'docx'"):
        figures.save(figures.score_against_divergence(runs()), tmp_path, "f", "docx")
    with pytest.raises(UserError, match="metric 'nope'"):
        figures.curves(history(), "nope")
    with pytest.raises(UserError, match="metric 'nope'"):
        figures.score_against_divergence(runs(), score="nope")


def test_arms_are_the_declared_ones_where_there_are_any():
    mixed = pl.concat([runs(), runs().with_columns(arm=pl.lit("sampled"))])
    assert len(figures.paper_arms(mixed)) == 4
    assert len(figures.paper_arms(mixed.filter(pl.col("arm") == "sampled"))) == 4
