"""Timing a public script against ours, with a stand-in for the script; the real ones are not in this repository."""

import json
from functools import partial

import pytest
import torch
from click.testing import CliRunner

from workbench import bench
from workbench.benchmarks import peers, suite
from workbench.benchmarks.figure import Options, figure
from workbench.common.errors import Failure, UserError

SCRIPT = """
import argparse, json, sys, time
from pathlib import Path
p = argparse.ArgumentParser()
p.add_argument("--max_train_steps", type=int, required=True)
p.add_argument("--output_dir", type=Path, required=True)
p.add_argument("--dataset_name", type=Path, required=True)
p.add_argument("--pretrained_model_name_or_path", type=Path, required=True)
told, rest = p.parse_known_args()
assert not told.output_dir.exists() and (told.dataset_name / "train.parquet").is_file()
assert (told.pretrained_model_name_or_path / "unet" / "config.json").is_file()
with (Path(__file__).parent / "calls.jsonl").open("a") as file:
    file.write(json.dumps([told.max_train_steps, *rest]) + chr(10))
time.sleep(0.5 + 0.05 * told.max_train_steps)
"""


@pytest.fixture
def checkout(tmp_path):
    """A folder that has the script of diffusers where a checkout has it."""
    script = tmp_path / "checkout" / peers.PEERS["diffusers"].script
    script.parent.mkdir(parents=True)
    script.write_text(SCRIPT)
    return tmp_path / "checkout"


def test_start_up_cancels(tmp_path, checkout):
    """Half a second of start-up and 50 ms a step: 50 ms."""
    (script,) = peers.checkouts([f"diffusers={checkout}"]).values()
    model, data = peers.untrained(tmp_path / "model"), tmp_path / "data"
    data.mkdir()
    peers.pairs_file(data / "train.parquet", 4)
    call = peers.theirs(peers.PEERS["diffusers"], script, model, data)
    assert peers.seconds_a_step(call, tmp_path, "diffusers") == pytest.approx(0.05, abs=0.02)
    calls = [json.loads(line) for line in (script.parent / "calls.jsonl").read_text().splitlines()]
    assert [one[0] for one in calls] == [peers.FEW, peers.MORE]
    told = dict(zip(calls[0][1::2], calls[0][2::2], strict=False))
    assert (
        told["--resolution"] == "64" and told["--train_batch_size"] == "4" and told["--dataset_split_name"] == "train"
    )


def test_ratios_are_of_rounds_in_turn_with_ours_in_both_ways(tmp_path, checkout, monkeypatch):
    times = iter([0.3, 0.1, 0.2, 0.6, 0.2, 0.3, 0.9, 0.3, 0.6])
    asked = []

    def seconds_a_step(call, folder, name):
        asked.append(next((word for word in call if word.startswith("data.cache=")), "theirs"))
        return next(times)

    def fill(call, steps, folder, name):
        assert steps == peers.FEW
        seconds_a_step(call, folder, name)
        times_not_used.append(name)

    times, times_not_used = iter([50.0, 60.0, 70.0, *times]), []
    monkeypatch.setattr(peers, "seconds_a_step", seconds_a_step)
    monkeypatch.setattr(peers, "_seconds", fill)
    scripts = peers.checkouts([f"diffusers={checkout}"])
    once, each, theirs = peers.peers(Options(5, torch.device("cpu"), tmp_path / "work", peers=scripts))
    # Once to fill the caches, and three times that count.
    assert asked == 4 * ["theirs", "data.cache=true", "data.cache=false"] and len(times_not_used) == 3
    assert once.median == pytest.approx(3) and each.median == pytest.approx(1.5) and once.met and each.met
    assert theirs.median == 0.6 and "LoRA, rank 8" in theirs.note


@pytest.mark.slow
def test_our_side_trains(tmp_path, monkeypatch):
    """Seven steps more, which take longer than what start-up varies by."""
    monkeypatch.setattr(peers, "FEW", 1)
    monkeypatch.setattr(peers, "MORE", 8)
    model, data = peers.untrained(tmp_path / "model"), tmp_path / "data"
    data.mkdir()
    peers.pairs_file(data / "train.parquet", 16)
    for way in peers.WAYS.values():
        call = peers.ours(peers.PEERS["diffusers"], model, data, way)
        assert peers.seconds_a_step(call, tmp_path, "ours") > 0


def test_a_script_that_fails_loses_no_figure_of_another(tmp_path, monkeypatch):
    """The table has what came before it, and what an earlier call had measured of it."""

    def compared(name, *_):
        if name == "diffusers" and broken:
            raise Failure("peers: diffusers: its line")
        yield figure("peers", f"{name}: a step", [1.0 + broken], None)

    monkeypatch.setattr(peers, "_compared", compared)
    monkeypatch.setattr(peers, "checkouts", lambda told: dict.fromkeys(peers.PEERS, tmp_path))
    monkeypatch.setattr(suite, "checkouts", peers.checkouts)
    monkeypatch.setattr(peers, "untrained", lambda folder: folder)
    monkeypatch.setattr(peers, "pairs_file", lambda *_: None)
    measure = partial(
        suite.run_suite, ["peers"], False, repeats=5, sweeps=1, device="cpu", folder=tmp_path, say=lambda line: None
    )
    broken = False
    measure()
    broken = True
    with pytest.raises(Failure, match="its line"):
        measure()
    found = {one["name"]: one["median"] for one in json.loads((tmp_path / "bench.json").read_text())}
    assert found == {"diffusers: a step": 1.0, "salesforce: a step": 2.0}


def test_a_script_that_fails_says_so_on_one_line(tmp_path, checkout):
    (script,) = peers.checkouts([f"diffusers={checkout}"]).values()
    script.write_text("import a_package_that_is_not_here")
    call = peers.theirs(peers.PEERS["diffusers"], script, tmp_path, tmp_path)
    with pytest.raises(Failure, match="diffusers: ModuleNotFoundError: No module named 'a_package_that_is_not_here'"):
        peers.seconds_a_step(call, tmp_path, "diffusers")


def test_a_folder_without_the_script_is_refused_and_a_script_that_cannot_run_here(tmp_path, monkeypatch):
    with pytest.raises(UserError, match=r"has no train\.py; a checkout of https://github\.com/SalesforceAIResearch"):
        peers.checkouts([f"salesforce={tmp_path}"])
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    (tmp_path / "train.py").touch()
    with pytest.raises(UserError, match="its script runs on CUDA GPUs alone"):
        peers.checkouts([f"salesforce={tmp_path}"])
    for wrong in ("salesforce", "another=folder"):
        with pytest.raises(UserError, match="give NAME=FOLDER, where NAME is one of diffusers, salesforce"):
            peers.checkouts([wrong])
    done = CliRunner().invoke(bench.main, ["--only", "peers", "--out", str(tmp_path / "out")])
    assert done.exit_code and "needs --peer NAME=FOLDER" in str(done.output) + str(done.exception)
