"""The fault campaign, short in every test run and long where it is asked for; what it leaves can be doctored."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from optuna import load_study
from optuna.trial import create_trial

from tests.faults.invariants import KINDS, held, violations
from workbench import tracking

CAMPAIGN = Path(__file__).with_name("campaign.py")
SHORT = ("--small", "--trials", "3", "--steps", "24", "--workers", "1", "--each", "40", "--pause", "1.5")


def run(folder: Path, *arguments: str, seconds: int) -> dict:
    """A campaign's record, with its folder kept as `campaign`; nothing may be wrong."""
    record = folder / "record.json"
    where = ("--keep", folder / "campaign", "--record", record)
    done = subprocess.run(
        [sys.executable, CAMPAIGN, "--seconds", str(seconds), *arguments, *where],
        capture_output=True, text=True, env=os.environ | {"PYTHONUNBUFFERED": "1"},
    )  # fmt: skip
    assert done.returncode == 0, f"{done.stdout}\n{done.stderr}"
    found = json.loads(record.read_text())
    assert found["counts"]["faults"] and not any(found["counts"][kind] for kind in KINDS)
    return found


@pytest.mark.slow
def test_a_few_faults_and_what_they_leave(tmp_path, monkeypatch):
    run(tmp_path, *SHORT, "--seed", "5", seconds=30)
    place = tmp_path / "campaign"
    url = f"sqlite:///{place / 'optuna.db'}"
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"sqlite:///{place / 'mlflow.db'}")

    def kinds() -> set[str]:
        found = held(url, "study-1", place / "state", place / "cache")
        return {each.kind for each in violations(found, 3, ["frozen", "update"], {}, 24)}

    assert not kinds()
    load_study(study_name="study-1", storage=url).add_trial(create_trial(value=1.0))
    assert kinds() == {"lost", "doubled"}  # it has no run, and nobody asked for it
    client = tracking.connect()
    first = tracking.load_runs("study-1")["run_id"][0]
    client.set_terminated(first, "FAILED")
    client.log_metric(first, "train/loss", 0.5, step=3)
    (place / "state" / "1.partial").touch()
    assert kinds() == {"lost", "doubled", "mismatched", "left over"}


@pytest.mark.campaign
@pytest.mark.parametrize("storage", ["sqlite", "postgres"])
def test_hundreds_of_faults(storage, tmp_path):
    found = run(tmp_path, "--seed", "1", "--storage", storage, "--pause", "3", seconds=1500)
    assert found["counts"]["faults"] >= 100
