"""Folders and databases of their own, and commands in them."""

import os
import subprocess

import pytest
import torch

from workbench import models, tracking
from workbench.benchmarks.sandbox import databases, run_command, sandbox
from workbench.benchmarks.stopwatch import stopwatch


def test_a_sandbox_leaves_nothing_behind(tmp_path):
    before, place = dict(os.environ), os.getcwd()
    with sandbox(tmp_path, MLFLOW_TRACKING_URI="sqlite:///x.db"):
        os.environ["ADDED"] = "1"
        assert os.getcwd() == str(tmp_path) and os.environ["WORKBENCH_STATE"] == str(tmp_path / "state")
    assert dict(os.environ) == before and os.getcwd() == place


def test_a_command_that_fails_is_no_measurement():
    with pytest.raises(subprocess.CalledProcessError, match="no_such_command"):
        run_command("workbench.no_such_command", quiet=True)


def test_a_stopwatch_counts_and_puts_functions_back(tiny_model):
    backend = models.load(str(tiny_model), torch.device("cpu"))
    with stopwatch(backend, "encode_text") as spent:
        backend.encode_text(["a fox"])
    assert spent["encode_text"] > 0 and "encode_text" not in vars(backend)
    before = tracking.load_runs
    with stopwatch(tracking, "load_runs"):
        assert tracking.load_runs is not before
    assert tracking.load_runs is before


def test_studies_and_tracking_of_a_sandbox_are_its_own(tmp_path, monkeypatch):
    monkeypatch.setenv("WORKBENCH_STORAGE", "sqlite:///mine.db")
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    with sandbox(tmp_path, **databases(tmp_path)):
        assert os.environ["WORKBENCH_STORAGE"] == f"sqlite:///{tmp_path / 'optuna.db'}"
    assert os.environ["WORKBENCH_STORAGE"] == "sqlite:///mine.db" and "MLFLOW_TRACKING_URI" not in os.environ
