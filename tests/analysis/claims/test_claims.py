import json
from urllib.parse import parse_qs, urlsplit

import pytest
from mlflow import MlflowClient

from tests.support.commands import invoke
from workbench.tracking import load_runs


@pytest.fixture
def experiment(tiny, workplace):
    """An experiment file of three arms, one of them tuned, that takes seconds."""
    quick = tiny | {"evaluation.grid": 0}
    lines = [f'"{key}" = {json.dumps(value)}' for key, value in quick.items() if key != "reference.interval"]
    nested = "\n".join(line.replace('"', "", 2) for line in lines)
    path = workplace / "small.toml"
    path.write_text(
        nested
        + """
sweep.objective = "eval/reward"
sweep.trials = 0
sweep.seeds = [0, 1]

[sweep.tuning]
factors = { "train.lr" = [0.5, 1.0] }
settings = { seed = 100, "evaluation.steps" = 1 }

[sweep.arms]
frozen = { "reference.policy" = "frozen" }
update = { like = "frozen", "reference.policy" = "update", "reference.interval" = 2 }
"""
    )
    return path


def test_claims_are_measured_once_and_a_second_run_changes_nothing(experiment, workplace):
    first = invoke("claims", "small.toml", "--study", "c", "--workers", 2)
    assert first.returncode == 0, first.stderr
    rows = {row["number"]: row for row in json.loads((workplace / "reports/c/claims.json").read_text())}
    assert {tuple(row["steps"]) for row in rows.values()} == {(4,)}
    assert len(rows) == 14
    assert rows[2]["verdict"] != "not measured" and rows[2]["effects"][0]["seeds"] == 2
    assert rows[8]["verdict"] == "not measured" and "timestep-aware" in rows[8]["reason"]
    assert all(effect["low"] > 0 for effect in rows[12]["effects"])  # which needs no model
    assert {rows[2]["verdict"], rows[12]["verdict"], rows[13]["verdict"]} == {"inconclusive"}  # two seeds are too few
    assert len(rows[13]["effects"]) == 3
    table = (workplace / "reports/c/claims.md").read_text()
    (query,) = parse_qs(urlsplit(rows[2]["link"].replace("#", "")).query)["searchFilter"]
    client = MlflowClient(f"sqlite:///{workplace / 'mlflow.db'}")
    linked = client.search_runs([client.get_experiment_by_name("diffusion-dpo").experiment_id], query)
    assert sorted(run.info.run_name for run in linked) == ["update-s0", "update-s1"]
    assert "| frozen | train.lr = " in table
    assert "All else is inconclusive, also with runs that were lost." in table  # and not: with fewer than 3 seeds

    assert sorted(load_runs("c-tuning")["arm"]) == ["frozen lr=0.0005", "frozen lr=0.001"]
    runs = load_runs("c")
    assert sorted(runs["name"]) == ["frozen-s0", "frozen-s1", "update-s0", "update-s1"]
    assert runs["train.lr"].n_unique() == 1  # the second arm takes what the first found

    before = {path: path.stat().st_mtime_ns for path in (workplace / "reports/c").iterdir()}
    second = invoke("claims", "small.toml", "--study", "c")
    assert second.returncode == 0 and "(unchanged)" in second.stdout
    assert {path: path.stat().st_mtime_ns for path in (workplace / "reports/c").iterdir()} == before
    assert set(load_runs("c")["run_id"]) == set(runs["run_id"])
