"""The words with which a report begins."""

from datetime import datetime

import polars as pl

from workbench.analysis import story
from workbench.analysis.intervals import seed_interval
from workbench.tracking.overview import Overview

REWARD = {"eval/reward": "maximize"}


def study(**arms: list[float]) -> pl.DataFrame:
    """A run a seed of each arm, with the reward given; arm frozen is plain Diffusion-DPO."""
    return pl.DataFrame(
        {
            "run_id": f"{arm}{seed}", "name": f"{arm}-s{seed}", "arm": arm, "state": "complete", "reason": "",
            "trial": 10 * number + seed, "seed": str(seed), "train.lr": "3e-06", "objective.loss": "dpo",
            "timesteps.density": "uniform", "reward_scale.shape": "constant",
            "reference.policy": "frozen" if arm == "frozen" else "threshold",
            "eval/reward": value, "divergence/policy": 0.005,
        }
        for number, (arm, values) in enumerate(arms.items())
        for seed, value in enumerate(values)
    )  # fmt: skip


def told(runs: pl.DataFrame, objectives=REWARD) -> str:
    return story.headline(runs, objectives, story.best_run(runs, objectives, {}))


def test_the_best_arm_is_set_against_diffusion_dpo_seed_by_seed():
    # Seeds differ by far more than arms do: only pairs show that every seed gains 0.2.
    text = told(study(frozen=[0.0, 1.0, 2.0], other=[0.0, 1.0, 2.05], best=[0.2, 1.21, 2.19]))
    low, high = seed_interval([0.2, 0.21, 0.19])
    assert f"a difference of +0.200 (95 % t interval over 3 training seeds: {low:+.3f} to {high:+.3f})" in text
    assert text.startswith(
        "The best arm, **best**, ends with a true reward (`eval/reward`) of 1.200, **Diffusion-DPO**"
    )
    assert "which is better beyond what seeds explain" in text and "trial 22, with 2.190" in text


def test_an_interval_that_holds_0_decides_nothing_and_less_is_better_where_the_study_says_so():
    assert "The interval holds 0" in told(study(frozen=[0.0, 1.0, 2.0], best=[1.0, 0.9, 2.0]))
    less = told(study(frozen=[1.0, 2.0, 3.0], best=[0.8, 1.81, 2.79]), {"eval/reward": "minimize"})
    assert "a difference of -0.2" in less and "better beyond" in less


def test_one_seed_is_called_so_and_has_no_interval():
    one = told(study(frozen=[0.0], best=[0.5]))
    assert "+0.500 (one seed, no interval)" in one and "95 %" not in one
    assert "(2 seeds, too few for an interval)" in told(study(frozen=[0.0, 0.1], best=[0.5, 0.9]))


def test_where_nothing_beats_diffusion_dpo_the_headline_says_so():
    text = told(study(frozen=[1.0, 2.0, 3.0], next=[0.8, 1.81, 2.79], last=[0.0, 0.0, 0.0]))
    assert text.startswith("No arm beats **Diffusion-DPO**. The next best, **next**, ends")
    assert "worse beyond what seeds explain" in text


def test_the_best_run_keeps_to_the_constraints():
    runs = study(frozen=[0.0, 1.0, 2.0]).with_columns(pl.Series("divergence/policy", [0.1, 0.2, 0.3]))
    assert story.best_run(runs, REWARD, {"divergence/policy": 0.25})["run_id"] == "frozen1"
    assert story.best_run(runs, REWARD, {"divergence/policy": 0.01}) is None
    assert story.best_run(runs, REWARD, {"no/metric": 1.0}) is None


def test_the_table_has_pruned_trials_last_with_their_reason():
    runs = study(frozen=[0.0], sampled=[3.0, 2.0]).with_columns(
        pl.Series("state", ["complete", "pruned", "complete"]),
        pl.Series("reason", ["", "does not keep up", ""]),
        pl.Series("train.lr", ["3e-06", "1.23456789e-05", "2.3456789e-05"]),
        pl.Series("reference.rate", ["1.0", "0.5", "0.5"]),  # of arms and sampled trials, not among the sampled
        pl.Series("eval/reward", [0.0, None, 2.0]),
        pl.Series("samples/reward", [0.1, -0.25, 2.1]),
    )
    lines = story.trial_table(runs, REWARD, {}).splitlines()
    assert [line.split("|")[1].strip() for line in lines[4:]] == ["11", "0", "10"]
    assert "| lr=2.35e-05 |" in lines[4] and "Diffusion-DPO" in lines[5] and "(-0.250)" in lines[6]
    assert "pruned: does not keep up" in lines[6] and "2.1" not in lines[4]


def test_text_in_which_python_would_write_a_number_is_shortened_and_names_are_not():
    values = ["3.456789e-06", "16.0", "1234567", "2024.10", "1_000.5", "1e400", "dpo"]
    runs = study(sampled=[0.0] * len(values)).with_columns(pl.Series("train.lr", values))
    lines = story.trial_table(runs, REWARD, {}).splitlines()[4:]
    shown = [line.split("|")[2].strip().removeprefix("lr=") for line in lines]
    assert shown == ["3.46e-06", "16", "1234567", "2024.10", "1_000.5", "1e400", "dpo"]


def test_settings_are_those_that_all_trials_share_and_no_default_has():
    runs = study(frozen=[0.0], other=[1.0]).with_columns(
        pl.lit("4").alias("train.batch_size"),
        pl.lit("128").alias("train.steps"),  # the default
        pl.lit("discounted").alias("timesteps.density"),
        pl.lit("0.9").alias("timesteps.gamma"),  # the default of that density
    )
    about = Overview("r", "python -m workbench.sweep mine.toml", versions={"torch": "2.13"})
    text = story.made_with(runs, about, "s@1", datetime(2026, 11, 27, 9, 30))
    single = runs.with_columns(trial=pl.lit(None, pl.Int64))  # runs that belong to no trial are not resumed so
    assert "study resume" not in story.made_with(single, about, "s@1", datetime(2026, 11, 27, 9, 30))
    assert "the defaults: `timesteps.density = discounted`, `train.batch_size = 4`\n" in text
    assert "train.steps" not in text and "gamma" not in text and "reference.policy" not in text
    assert "Made by: `python -m workbench.sweep mine.toml`" in text and "torch 2.13" in text
    assert "study resume s`" in text and "Page of 2026-11-27 09:30" in text
