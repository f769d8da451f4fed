"""A machine that has torch, diffusers and what they need, and nothing else, can train and measure."""

import json
import subprocess
import sys

import polars as pl

from tests.support.bare_machine import Only
from tests.support.helpers import ROOT, overrides, workbench

FOREIGN = {"mlflow", "optuna", "polars", "pandas", "papermill", "datasets", "scipy", "sklearn", "sqlalchemy"}


def test_the_stand_in_lacks_what_such_a_machine_lacks():
    missing = Only().missing
    assert missing >= FOREIGN and not missing & {"torch", "diffusers", "numpy", "huggingface_hub", "workbench"}
    done = subprocess.run(
        [sys.executable, "-m", "tests.support.bare_machine", "scipy.stats"], cwd=ROOT, capture_output=True, text=True
    )
    assert done.returncode != 0 and "No module named 'scipy'" in done.stderr


def test_it_trains_and_keeps_the_run_in_a_folder_and_measures_and_profiles(tiny, workplace):
    """In one process, most of which is imports. What is measured is LoRA's, which needs all that a full run does."""
    settings = tiny | {"train.steps": 2, "data.prompts": "embedded", "evaluation.grid": 2}
    trains = ["workbench.train", "--no-tracking", "--output", "run", *overrides(settings)]
    measures = "--measure --shape tiny --variant lora --steps 4 --batch-size 2 --device cpu --out measured"
    profiles = "--model tiny --pairs 2 --steps 1 --dtype bfloat16 --no-trace --device cpu --out profiled"
    each = [*trains, "+", "workbench.throughput", *measures.split(), "+", "workbench.profile", *profiles.split()]
    done = workbench("tests.support.bare_machine", *each, cwd=workplace)
    assert done.returncode == 0, done.stderr

    output = workplace / "run"
    history = pl.read_parquet(output / "history.parquet")
    assert history["step"].to_list() == [1, 2]
    assert history["train/loss"].drop_nulls().len() == 2 and history["eval/win_rate"].drop_nulls().len() == 1
    about = json.loads((output / "run.json").read_text())
    assert about["state"] == "complete" and about["settings"]["train.steps"] == 2
    assert {"model", "samples.png", "samples.json", "samples"} <= {path.name for path in output.iterdir()}
    assert not (workplace / "mlruns").exists()

    rows = json.loads((workplace / "measured" / "measured.json").read_text())
    assert [(row["variant"], row["exact"], row["problem"]) for row in rows] == [("lora", "yes", "")]
    assert "**total**" in (workplace / "profiled" / "profile.md").read_text()
