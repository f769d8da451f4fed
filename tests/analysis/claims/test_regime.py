"""Whether runs are in the paper's regime, on histories made here."""

import math

import polars as pl
import pytest

from workbench import tracking
from workbench.analysis.claims import regime
from workbench.studies.experiment import Experiment
from workbench.studies.tuning import candidates, read
from workbench.tracking import study_runs, tags

STEPS = 512


def study(
    *, frozen: float = 0.004, update: float = 0.05, updates: int = 10, freeze: int | None = 176, interval: int = 16
) -> tuple[pl.DataFrame, pl.DataFrame]:
    """Two seeds of frozen, update and threshold; by default as the paper's figure has them.

    Args:
        freeze: step at which the thresholded reference is frozen; None = never.
    """
    runs, history = [], []
    for seed in "01":
        for arm, far in (("frozen", frozen), ("update", update), ("threshold", 0.005)):
            run = {"run_id": f"{arm}{seed}", "name": arm, "arm": arm, "state": "complete", "seed": seed}
            run |= {"reference.policy": arm, "objective.loss": "dpo", "train.steps": str(STEPS)}
            run |= {"reference.interval": str(interval) if arm != "frozen" else None}
            run |= {"reference.delta": "0.005" if arm == "threshold" else None}
            run |= {"divergence/policy": far if arm == "frozen" else 2 * far}
            run |= {"divergence/reference": 0.0 if arm == "frozen" else far}
            run |= {"reference/updates": float(updates if arm == "threshold" else 0)}
            runs.append(run)
            stops = {"frozen": 1, "update": math.inf, "threshold": freeze or math.inf}[arm]
            history += [
                {"run_id": run["run_id"], "arm": arm, "step": step, "reference/frozen": float(step >= stops)}
                for step in range(16, STEPS + 1, 16)
            ]
    return pl.DataFrame(runs), pl.DataFrame(history)


def values(*frames, edges=None):
    return {one.name: one.value for one in regime.measure(*frames, edges)}


def test_the_papers_own_figure_is_in_its_regime():
    measures = regime.measure(*study(), {"frozen": [], "ours": []})
    assert all(one.inside for one in measures) and regime.sentence(measures) == ""
    assert {one.name: one.value for one in measures} == pytest.approx({
        "frozen_over_delta": 0.8, "updates_before_freeze": 10, "freeze_step": 176 / STEPS, "interval_share": 16 / STEPS,
        "update_over_frozen": 12.5, "tuned_on_edge": 0,
    })  # fmt: skip


@pytest.mark.parametrize(
    ("changes", "name", "clause"),
    [
        ({"frozen": 0.065, "update": 0.4}, "frozen_over_delta", "ends at 13 times delta (the paper's: at most 1.25)"),
        ({"updates": 1}, "updates_before_freeze", "lets the reference move 1 times (the paper's: at least 8)"),
        ({"freeze": 32}, "freeze_step", "frozen after 6.25 % of training (the paper's: 20 % to 80 %)"),
        ({"freeze": None}, "freeze_step", "frozen after 100 % of training"),
        ({"interval": 64}, "interval_share", "the interval is 12.5 % of training (the paper's: 1 % to 4 %)"),
        ({"update": 0.012}, "update_over_frozen", "only 3 times as far"),
    ],
)
def test_each_number_outside_is_a_reason_in_one_line(changes, name, clause):
    measures = regime.measure(*study(**changes))
    assert [one.name for one in measures if not one.inside] == [name]
    line = regime.sentence(measures)
    assert line.startswith("These verdicts are about another regime than the paper's, because ") and clause in line
    assert "\n" not in line and line.endswith(".")


def test_a_frozen_arm_that_comes_closer_diverges_by_no_share():
    assert values(*study(frozen=-0.001))["update_over_frozen"] == math.inf


def test_what_needs_a_missing_arm_is_left_out():
    runs, history = study()
    assert [*values(runs.filter(pl.col("arm") == "frozen"), history)] == []
    assert [*values(runs.filter(pl.col("arm") != "frozen"), history)] == [
        "updates_before_freeze", "freeze_step", "interval_share",
    ]  # fmt: skip


def test_arms_that_share_the_frozen_ones_settings_come_before_others():
    runs, history = study()
    tuned = runs.filter(pl.col("arm") != "frozen").with_columns(pl.lit(0.4).alias("divergence/reference"))
    tuned = tuned.with_columns(pl.col("arm") + "-8", pl.col("run_id") + "-8")
    same = runs.with_columns(
        arm=pl.when(pl.col("arm") == "frozen").then("arm").otherwise(pl.lit("same-") + pl.col("arm"))
    )
    assert values(pl.concat([tuned, same]), history)["update_over_frozen"] == pytest.approx(12.5)


def test_arms_of_other_objectives_and_sampled_trials_are_not_compared():
    runs, history = study()
    other = runs.filter(pl.col("arm") == "update").with_columns(
        arm=pl.lit("another"), run_id=pl.lit("x"), **{"objective.loss": pl.lit("kto")}
    )
    sampled = other.with_columns(arm=pl.lit("sampled"), **{"objective.loss": pl.lit("dpo")})
    assert values(pl.concat([sampled, other, runs]), history) == values(runs, history)


def test_tuned_values_on_the_edge_are_named_by_arm():
    declared = {
        "train.lr": 3e-5,
        "sweep.objective": "eval/reward", "sweep.trials": 0, "sweep.arms": {"a": {}, "b": {"train.lr": 1e-4}},
        "sweep.tuning": {"factors": {"train.lr": [0.5, 1, 2], "objective.beta": [1]}},
    }  # fmt: skip
    experiment = Experiment.resolve(declared)
    best = pl.DataFrame({"arm": ["a lr=6e-05 beta=300", "b lr=0.0001 beta=300"], "state": "complete"})
    edges = read(experiment, candidates(experiment), best.with_columns(pl.lit(1.0).alias("eval/reward"))).on_edge
    assert edges == {"a": ["train.lr"], "b": []}
    (one,) = (one for one in regime.measure(*study(), edges) if one.name == "tuned_on_edge")
    assert one.value == 1 and not one.inside and "a: train.lr" in one.reason


def test_the_studys_page_says_it_once_however_often_it_is_written(workplace):
    client = tracking.connect()
    parent = study_runs.open_study(client, study_runs.StudyId("s", "token"), "")
    study_runs.finish_study(client, parent, {}, "the summary", "complete")
    for updates in (1, 10, 10):
        regime.publish("s", regime.measure(*study(updates=updates)))
    run = client.get_run(parent)
    note = run.data.tags[tags.NOTE]
    assert note.startswith("the summary") and note.count("regime") == note.count("paper's regime")
    assert note.count("### The paper's regime") == 1 and "The runs are in the paper's regime." in note
    assert run.data.metrics["regime/updates_before_freeze"] == 10
    assert len(client.get_metric_history(parent, "regime/updates_before_freeze")) == 2  # the same is not written again
