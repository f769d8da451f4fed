"""`train --name NAME --resume`: a run that has ended stays as it is, or goes on to a later end."""

import json
import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
import time

import mlflow
import polars as pl
import pytest
from safetensors.torch import load_file

from tests.support.commands import CutOffError, cut_off, invoke
from tests.support.helpers import ROOT, overrides
from workbench.models import Backend
from workbench.studies import single_run
from workbench.training.model_folder import ModelFolder
from workbench.training.preparation import Prepared


@pytest.fixture
def options(tiny, workplace):
    settings = {"train.batch_size": 2, "evaluation.seeds": 0, "evaluation.grid": 0, "snapshots.interval": 3}
    return overrides(tiny | settings)


def statuses(workplace):
    client = mlflow.MlflowClient(f"sqlite:///{workplace / 'mlflow.db'}")
    return [run.info.status for run in client.search_runs(["1"])]


def test_a_run_that_has_ended_is_not_trained_again(options, workplace):
    job = ("train", *options, "--name", "a", "--resume", "--output", "trained")
    assert invoke(*job).returncode == 0
    again = invoke(*job)
    assert again.returncode == 0 and "Run a has ended after its 4 steps; there is nothing to do" in again.stdout
    assert statuses(workplace) == ["FINISHED"]
    for more, message in (
        (("--set", "seed=7"), "seed = 7: the snapshot of"),
        (("--set", "train.steps=2"), "train.steps = 2: run a has ended after 4"),
        (("--output", "elsewhere"), "--output elsewhere: run a has ended already, and its model was put into"),
    ):
        refused = invoke(*job, *more)
        assert refused.returncode == 2 and message in refused.stderr, refused.stderr
    assert statuses(workplace) == ["FINISHED"]


def test_a_run_killed_when_its_model_is_saved_knows_the_folder_again(options, workplace, monkeypatch):
    job = ("train", *options, "--name", "a", "--resume", "--output", "trained")
    with monkeypatch.context() as patch:
        patch.setattr(single_run, "_keep_end", cut_off)
        with pytest.raises(CutOffError):
            invoke(*job)
    (workplace / "trained" / "notes.txt").write_text("mine")
    other = invoke(*job, "--set", "train.lr=0.01")  # would be another model
    assert other.returncode == 2 and "--output trained: not an empty folder" in other.stderr
    again = invoke(*job)
    assert again.returncode == 0, again.stderr
    assert (workplace / "trained" / "notes.txt").read_text() == "mine"
    assert (workplace / "trained" / "model_index.json").is_file()
    assert sorted(path.name for path in workplace.glob("trained*")) == ["trained"]
    shutil.rmtree(workplace / "trained")
    gone = invoke(*job)
    (workplace / "trained").mkdir()
    emptied = invoke(*job)
    for done in (gone, emptied):
        assert done.returncode == 2 and "trained, where it is not any more; choose another --name" in done.stderr


def test_a_run_killed_before_its_model_is_moved_does_not_lose_it(options, workplace, monkeypatch):
    job = ("train", *options, "--set", "snapshots.interval=0", "--name", "a", "--output", "trained")
    with monkeypatch.context() as patch:
        patch.setattr(ModelFolder, "_move", cut_off)
        with pytest.raises(CutOffError):
            invoke(*job)
    (whole,) = workplace.glob("trained.*.partial")
    (whole / "mark").touch()
    anew = invoke(*job)
    assert anew.returncode == 2 and f"which lies in {whole}; go on with --resume" in anew.stderr
    with monkeypatch.context() as patch:
        patch.setattr(Prepared, "data", ["of other pairs"])
        other = invoke(*job, "--resume")
    assert other.returncode == 2 and "trained: the model in it was made with other data" in other.stderr
    again = invoke(*job, "--resume")
    assert again.returncode == 0, again.stderr
    assert (workplace / "trained" / "mark").is_file() and not [*workplace.glob("trained.*")]


def test_a_model_that_cannot_be_written_is_called_as_the_person_calls_it(options, workplace, monkeypatch):
    def fill(backend, policy, folder, whole):
        raise OSError(28, "No space left on device", str(folder / "unet"))

    monkeypatch.setattr(Backend, "save", fill)
    for more, name in (((), "trained"), (("--no-tracking",), "trained/model")):
        done = invoke("train", *options, "--output", "trained", *more)
        assert done.returncode == 1
        assert f"Error: {name}: the trained model cannot be written (No space left on device)\n" in done.stderr
        shutil.rmtree(workplace / "trained")


def test_a_run_in_a_folder_that_is_killed_while_its_model_is_saved_leaves_nothing_for_ever(
    options, workplace, monkeypatch
):
    def begin_to_save(backend, policy, folder, whole):
        (folder / "unet").mkdir(parents=True)
        raise CutOffError

    job = ("train", *options, "--no-tracking", "--name", "a", "--resume", "--output", "run")
    with monkeypatch.context() as patch:
        patch.setattr(Backend, "save", begin_to_save)
        patch.setattr(shutil, "rmtree", lambda *_, **__: None)  # a killed process removes nothing
        with pytest.raises(CutOffError):
            invoke(*job)
    assert [*(workplace / "run").glob("model.*.partial")]
    again = invoke(*job)
    assert again.returncode == 0, again.stderr
    assert not [*(workplace / "run").rglob("*.partial")]
    assert (workplace / "run" / "model" / "model_index.json").is_file()


def test_two_runs_without_a_name_that_begin_in_one_second_have_two(options, workplace, monkeypatch):
    monkeypatch.setattr(time, "strftime", lambda *_: "0814-101500")
    for output in ("one", "two"):
        assert invoke("train", *options, "--no-tracking", "--output", output).returncode == 0
    names = [json.loads((workplace / output / "run.json").read_text())["name"] for output in ("one", "two")]
    assert len({*names}) == 2 and all(re.fullmatch(r"train-0814-101500-[0-9a-f]{8}", name) for name in names), names


def left(folder):
    """The history and the weights that a run has left."""
    files = (folder / "model").rglob("*.safetensors")
    weights = {(f.name, name): x.numpy().tobytes() for f in files for name, x in load_file(f).items()}
    return pl.read_parquet(folder / "history.parquet").to_dict(as_series=False), weights


def test_a_run_with_more_steps_ends_as_if_it_had_had_them_from_the_start(options, workplace):
    whole = invoke("train", *options, "--no-tracking", "--output", "whole", "--set", "train.steps=7")
    assert whole.returncode == 0, whole.stderr
    job = ("train", *options, "--no-tracking", "--name", "a", "--resume", "--output", "parts")
    assert invoke(*job).returncode == 0
    longer = invoke(*job, "--set", "train.steps=7")
    assert longer.returncode == 0, longer.stderr
    assert left(workplace / "parts") == left(workplace / "whole")
    shorter = invoke(*job)
    assert shorter.returncode == 2 and "train.steps = 4: run a has ended after 7" in shorter.stderr
    anew = invoke("train", *options, "--no-tracking", "--name", "a", "--output", "anew")  # the name is free again
    assert anew.returncode == 0, anew.stderr


@pytest.mark.slow
def test_ctrl_c_leaves_a_snapshot_though_the_log_ends_first(options, workplace):
    """`2>&1 | tee log`: a terminal's Ctrl-C ends tee too, and nobody reads what the run prints."""
    run = shlex.join([sys.executable, "-m", "workbench.train", *options, "--name", "a", "--set", "train.steps=5000"])
    shell = subprocess.Popen(
        ["bash", "-c", f"{run} --set snapshots.interval=0 2>&1 | tee log"], cwd=workplace, start_new_session=True,
        env=os.environ | {"PYTHONPATH": str(ROOT), "TQDM_MININTERVAL": "0"},
    )  # fmt: skip
    wait_for(lambda: (workplace / "log").is_file() and "/5000" in (workplace / "log").read_text())
    wait_for(lambda: any(p.stat().st_size > 20_000 for p in workplace.glob(".workbench/outbox/*/journal.jsonl")))
    os.killpg(shell.pid, signal.SIGINT)
    shell.wait()
    wait_for(lambda: list(workplace.glob(".workbench/runs/a/*.snapshot")))
    wait_for(lambda: statuses(workplace) == ["KILLED"])


def wait_for(condition, seconds=300):
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.2)


def test_a_folder_that_is_not_the_runs_is_not_written_to(options, workplace):
    (workplace / "mine").mkdir()
    (workplace / "mine" / "history.parquet").write_text("years of work")
    done = invoke("train", *options, "--no-tracking", "--name", "a", "--resume", "--output", "mine")
    assert done.returncode == 2 and "neither empty nor the folder of run a" in done.stderr
    assert (workplace / "mine" / "history.parquet").read_text() == "years of work"
