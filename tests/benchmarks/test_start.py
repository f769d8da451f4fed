"""What commands that a person waits for may import."""

import json
import subprocess
import sys

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
