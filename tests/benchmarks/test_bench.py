"""The benchmark's table, and what whole sweeps are measured by; nothing here is timed."""

import json
import sys
from functools import partial
from pathlib import Path
from types import ModuleType, SimpleNamespace

import optuna
import polars as pl
import pytest
import torch
from click.testing import CliRunner
from optuna.trial import TrialState, create_trial
from PIL import Image

from workbench import bench
from workbench.benchmarks import groups, pruning, quality, sandbox, suite, workers
from workbench.benchmarks.figure import Options, control, figure


def options(place, **more):
    return Options(5, torch.device("cpu"), place, **more)


def test_a_figure_is_the_median_with_its_spread_and_is_met_on_the_right_side():
    values = list(range(101))
    found = figure("g", "n", values, 50)
    assert (found.low, found.median, found.high, found.met) == (10, 50, 90, True)
    assert not figure("g", "n", values, 49.9).met and figure("g", "n", values, None).met is None
    assert figure("g", "n", values, 50, at_least=True).met and not figure("g", "n", values, 50.1, at_least=True).met
    assert [control("g", "n", [v]).met for v in (0.97, 0.99, 1.01, 1.03)] == [False, True, True, False]


def test_the_table_is_kept_and_groups_that_are_measured_again_replace_their_own(tmp_path, monkeypatch):
    values = {"start": [1.0], "encode": [5.0]}
    monkeypatch.setattr(suite, "GROUPS", {name: ("fake", name) for name in ("encode", "start")})
    fake = ModuleType("fake")
    for name in values:
        setattr(fake, name, lambda asked, name=name: iter([figure(name, f"the {name}", values[name], 2)]))
    monkeypatch.setitem(sys.modules, "workbench.benchmarks.fake", fake)
    for value in (1.0, 3.0):
        values["start"] = [value]
        chosen = ["--only", "start"] if value == 3 else ["--only", "start", "--only", "encode"]
        done = CliRunner().invoke(bench.main, [*chosen, "--out", str(tmp_path / "out")])
        assert done.exit_code == 0, done.output
    assert "the start" in done.output and "MISSED" in done.output and "the encode" not in done.output
    found = json.loads((tmp_path / "out" / "bench.json").read_text())
    assert [(f["name"], f["median"], f["met"]) for f in found] == [("the encode", 5, False), ("the start", 3, False)]
    assert {"name", "median", "low", "high", "goal", "met"} <= found[0].keys()
    assert "| the start | 3.00 x | 3.00 to 3.00 | <= 2.00 | **no** |" in (tmp_path / "out" / "bench.md").read_text()
    assert Image.open(tmp_path / "out" / "bench.png").width > 500


def test_help_names_every_group():
    text = CliRunner().invoke(bench.main, ["--help"]).output
    for name in (*groups.GROUPS, groups.GROWTH):
        assert f"\n    {name} " in text


def curve(*rewards):
    return pl.DataFrame({"step": [8 * (i + 1) for i in range(len(rewards))], "samples/reward": rewards})


@pytest.mark.parametrize(
    ("rewards", "share"), [((-3.0, -2.0, -1.0, 0.0), 0.5), ((-1.0, -3.0), 0.5), ((-3.0, -2.5), quality.NEVER)]
)
def test_time_to_quality_is_the_first_step_that_is_good_enough(rewards, share):
    assert quality.time_to(curve(*rewards), -2.0) == share


def test_sweeps_that_are_timed_have_new_folders_and_leave_others_alone(tmp_path, monkeypatch):
    (tmp_path / "workers").mkdir()
    (tmp_path / "workers" / "thesis.txt").write_text("years of work")
    folders = []

    def sweep(folder: Path, *_):
        assert not any(folder.iterdir())
        folders.append(folder)

    monkeypatch.setattr(sandbox, "sweep", sweep)
    list(workers.workers(options(tmp_path, sweeps=2)))
    assert len(set(folders)) == 2 and (tmp_path / "workers" / "thesis.txt").exists()


def test_pruning_counts_steps_and_compares_the_best(tmp_path, monkeypatch):
    made = {"whole": [(0.6, 100), (0.7, 100), (0.5, 100)], "pruned": [(0.6, 100), (0.65, 100), (None, 40)]}

    def sweep(folder: Path, study, file, workers, *settings):
        folder.mkdir(parents=True, exist_ok=True)
        assert ("sweep.pruner=NopPruner" in settings) == study.startswith("whole")
        storage = sandbox.databases(folder)["WORKBENCH_STORAGE"]
        found = optuna.create_study(study_name=study, storage=storage, direction="maximize")
        for value, steps in made[study.partition("-")[0]]:
            state = TrialState.PRUNED if value is None else TrialState.COMPLETE
            told = {"progress": {"step": steps, "of": 100, "time": 0.0}}
            found.add_trial(create_trial(value=value, state=state, user_attrs=told))

    monkeypatch.setattr(sandbox, "sweep", sweep)
    saved, better = pruning.pruning(options(tmp_path, sweeps=3))
    assert saved.median == pytest.approx(20) and saved.met is False
    assert better.median == pytest.approx(-0.05) and better.met is False


@pytest.mark.parametrize(
    ("differences", "met"), [((-0.05, 0.02), None), ((-0.05, 0.02, 0.01), True), ((-0.05, -0.05, -0.04), False)]
)
def test_pruning_is_as_good_unless_its_seeds_tell_otherwise(differences, met, tmp_path, monkeypatch):
    best = {f"whole-{seed}": 0.7 for seed in range(3)}
    best |= {f"pruned-{seed}": 0.7 + difference for seed, difference in enumerate(differences)}
    monkeypatch.setattr(sandbox, "sweep", lambda *told: None)
    trial = partial(SimpleNamespace, steps=100)
    monkeypatch.setattr(pruning, "trial_times", lambda study, url: [trial(value=best[study]), trial(value=None)])
    _, better = pruning.pruning(options(tmp_path, sweeps=len(differences)))
    assert better.met is met
