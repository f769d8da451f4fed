"""What commands that a person waits for may import, and when a study's first step is seen."""

import json
import subprocess
import sys
import time

import pytest
import torch

from workbench.benchmarks import start
from workbench.benchmarks.figure import Options
from workbench.benchmarks.sandbox import EXPERIMENTS
from workbench.studies.experiment import Experiment
from workbench.studies.synthetic import finished_study
from workbench.training.experiment_file import read

STATUS = """
import json, sys
from click.testing import CliRunner
from workbench.study import main
told = CliRunner().invoke(main, ["status", "many", "--json"])
print(json.dumps([json.loads(told.output), sorted({"torch", "mlflow", "polars", "diffusers"} & {*sys.modules})]))
"""


def test_the_status_of_a_study_needs_neither_torch_nor_mlflow(workplace, monkeypatch):
    url = f"sqlite:///{workplace / 'many.db'}"
    finished_study(Experiment.resolve(read(EXPERIMENTS / "default.toml")), "many", url, 7)
    monkeypatch.setenv("WORKBENCH_STORAGE", url)
    done = subprocess.run([sys.executable, "-c", STATUS], capture_output=True, text=True, check=True)
    (standing,), imported = json.loads(done.stdout)
    assert standing["trials"] == {"complete": 7, "waiting": 4} and standing["study"] == "many"
    assert imported == []


#: Writes what a run writes: its parameters, then the numbers of a step; and sleeps until it is killed.
STANDS_IN = """
import os, subprocess, sys, time
from workbench.tracking.outbox import Outbox
if os.environ["WORKBENCH_CACHE"].endswith("broken"):
    sys.exit("Error: no such model")
sleeper = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"])
open("sleeper", "w").write(str(sleeper.pid))
outbox = Outbox("run")
outbox.open()
outbox.add("params", values={})
time.sleep(0.5)
outbox.add("metrics", step=1, values={"train/loss": 0.7})
time.sleep(600)
"""


@pytest.fixture
def stands_in(tmp_path, monkeypatch):
    (tmp_path / "stands_in.py").write_text(STANDS_IN)
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    return ("stands_in",)


def test_a_study_that_has_taken_its_first_step_is_killed_with_all_its_processes(stands_in, tmp_path):
    place = tmp_path / "study"
    environment = {"WORKBENCH_STATE": str(place / "state"), "WORKBENCH_CACHE": str(tmp_path / "cache")}
    began = time.perf_counter()
    assert 0.5 < start.first_step(place, stands_in, environment) < time.perf_counter() - began
    status = f"/proc/{(place / 'sleeper').read_text()}/stat"
    try:
        with open(status) as stream:  # killed; not yet collected where nobody waits for it
            assert stream.read().rpartition(")")[2].split()[0] == "Z"
    except FileNotFoundError:
        pass


def test_a_study_that_ends_before_its_first_step_is_a_failure(stands_in, tmp_path):
    environment = {"WORKBENCH_STATE": str(tmp_path / "state"), "WORKBENCH_CACHE": str(tmp_path / "broken")}
    with pytest.raises(start.Failure, match="no training step of stands_in: Error: no such model"):
        start.first_step(tmp_path / "study", stands_in, environment)


def test_the_first_step_is_timed_with_nothing_cached_and_then_with_what_that_left(monkeypatch, tmp_path):
    caches = []

    def first_step(folder, command, environment):
        caches.append(environment["WORKBENCH_CACHE"])
        return 100.0 if len(caches) == 1 else 10.0

    monkeypatch.setattr(start, "first_step", first_step)
    cold, warm = start.first_steps(Options(5, torch.device("cpu"), tmp_path))
    assert (cold.median, cold.goal, warm.median, warm.goal) == (100.0, None, 10.0, 15.0)
    assert len(caches) == 4 and len({*caches}) == 1
