"""The whole command on tiny models: what it says of mistakes, and what it leaves behind then; its help."""

import json
import os
import shutil
import subprocess
import sys

import numpy as np
import torch
from click.testing import CliRunner

from tests.support.evaluations import BOTH, contents, evaluate, evaluations
from tests.support.helpers import ROOT
from workbench.evaluate import main
from workbench.evaluation import model_sources, reward_models


def test_mistakes_are_one_line_and_nothing_is_left_behind(place, tiny_clip, other_model, monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(place / "hub"))
    (place / "free.txt").write_text("a corgi reading a newspaper\n")
    (place / "full").mkdir()
    (place / "full" / "letter.txt").write_text("dear")
    shutil.copytree(other_model / "unet", "weights/unet")
    clip = f"clip={tiny_clip}"
    for arguments, code, message in (
        ((), 2, "--model: give at least one"),
        (("--model", "tiny"), 2, "--model tiny: expected NAME=SOURCE"),
        (("--model", "a/b=tiny"), 2, "a name has letters, digits"),
        (("--model", "a=tiny", "--model", "a=other"), 2, "--model a=other: 'a' is there twice"),
        ((*BOTH, "--ours", "us"), 2, "--ours us: not among the models ours, pretrained"),
        (("--model", "a=nowhere"), 2, "--model a=nowhere: model.path = 'nowhere'"),
        (("--model", "a=weights"), 2, "--model a=weights: holds trained weights alone; say on which model with --base"),
        (("--model", "a=runs:/123"), 2, "runs:/123: no such run"),
        (("--model", "study:none"), 2, "study 'none': not found"),
        ((*BOTH, "--scorer", "pickscor"), 2, "--scorer 'pickscor': expected one of pickscore"),
        ((*BOTH, "--scorer", "clip=missing/folder/x"), 2, "--scorer clip=missing/folder/x: no such folder"),
        ((*BOTH, "--scorer", "pickscore"), 1, "hub could not be reached for yuvalkirstain/PickScore_v1"),
        ((*BOTH, "--prompts", "free=free.txt"), 2, "--scorer reward: judges only what the small model draws"),
        ((*BOTH, "--prompts", "nowhere.txt"), 2, "--prompts nowhere.txt: no such file"),
        ((*BOTH, "--seeds", "0"), 2, "0 is not in the range x>=1"),
        ((*BOTH, "--output", "full"), 2, "--output full: neither empty nor an evaluation's folder"),
    ):
        output = ("--output", "out") if "--output" not in arguments else ()
        text = evaluate(*arguments, *output, code=code)
        line = text.strip().splitlines()[-1]
        assert message in line and line.startswith("Error: "), (arguments, text)
    assert not (place / "out").exists() and not evaluations()
    evaluate("--model", "a=tiny", "--prompts", "free=free.txt", "--scorer", clip, "--output", "free")


def test_a_mistake_makes_no_tracking_store(place):
    store = place / "mlflow.db"
    store.unlink()
    for source in ("a=nowhere", "a=runs:/123", "study:none"):
        text = evaluate("--model", source, "--output", "out", code=2)
        assert source == "a=nowhere" or f"no study yet: there is no {store}" in text
    assert not store.exists() and not (place / "out").exists()


def test_a_folder_of_other_settings_is_refused_and_kept(place):
    evaluate("--model", "a=tiny", "--output", "out")
    before = contents(place / "out")
    text = CliRunner().invoke(
        main, ["--steps", "2", "--prompts", "mine=prompts.txt", "--seeds", "3", "--output", "out"]
    )
    assert text.exit_code == 2 and "prompts 'mine' have --seeds 2 there, not 3" in text.output
    for arguments, message in (
        (("--model", "a=tiny", "--steps", "3"), "--output out: its samples were drawn with --steps 2, not 3"),
        (("--model", "a=other"), "--output out: models 'a' was 'tiny'"),
        (("--model", "a=tiny", "--prompts", "mine=embedded"), "'mine' is there twice"),
        (("--model", "a=tiny", "--limit", "3"), "--output out: prompts 'mine' have --limit 0 there, not 3"),
    ):
        assert message in evaluate(*arguments, "--output", "out", code=2)
    assert contents(place / "out").equals(before)


def test_a_mistake_that_drew_nothing_can_be_mended_in_the_same_folder(place, monkeypatch):
    real = model_sources.open_model

    def full(*arguments):
        raise torch.OutOfMemoryError

    monkeypatch.setattr(model_sources, "open_model", full)
    text = evaluate("--model", "a=other", "--scorer", "reward", "--output", "out", code=1)
    assert "out of memory: lower --batch-size (now 24)" in text.splitlines()[-1]
    monkeypatch.setattr(model_sources, "open_model", real)
    evaluate("--model", "a=tiny", "--output", "out", "--guidance", "2")
    settings = json.loads((place / "out" / "settings.json").read_text())
    assert settings["models"]["a"]["source"] == "tiny" and settings["sampling"]["guidance"] == 2


def test_a_store_that_takes_no_artifacts_is_found_before_anything_is_drawn(place):
    (place / "mlruns").touch()
    refused = evaluate(*BOTH, code=1)
    assert "which cannot be written" in refused and not list(place.rglob("*.parquet"))


def test_a_score_that_is_no_number_is_a_failure(place, monkeypatch):
    kind = reward_models.REWARD_MODELS["reward"]
    broken = reward_models.RewardModel(
        kind.heading, kind.parts, lambda *a: lambda images, prompts: np.full(len(prompts), np.nan)
    )
    monkeypatch.setitem(reward_models.REWARD_MODELS, "reward", broken)
    assert "not a finite score for a's image of 'a fox" in evaluate("--model", "a=tiny", "--output", "out", code=1)


def test_help_teaches():
    text = CliRunner().invoke(main, ["--help"]).output
    assert "study:NAME" in text and "--scorer imagereward" in text and "goes on where it was" in text


def test_help_needs_no_heavy_library():
    code = (
        "import sys; import workbench.evaluate; print([m for m in ('torch', 'mlflow', 'polars') if m in sys.modules])"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], env=os.environ | {"PYTHONPATH": str(ROOT)}, capture_output=True, text=True
    )
    assert done.stdout.strip() == "[]", done.stderr
