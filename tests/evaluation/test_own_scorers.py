"""Scorers of the user's own: run only where they were named, pinned by a digest, and one line where they are wrong."""

import json
import shutil

import numpy as np
import polars as pl
import pytest

from tests.support.commands import invoke
from tests.support.helpers import as_toml
from workbench.common.errors import UserError
from workbench.evaluation import sample_store, scorers
from workbench.models.small.prompts import split
from workbench.training import plugins
from workbench.training.experiment_file import parse_override, read

PROMPTS = [str(p) for p in split()["test"][:3]]
MINE = """
import torch

def warmth(images, prompts):
    return images[..., 0].mean((1, 2)) - images[..., 2].mean((1, 2))

def words(images, prompts, *, per: float = 2.0):
    return torch.tensor([len(prompt) / per for prompt in prompts])

def failing(images, prompts):
    return {}["no such key"]

def short(images, prompts):
    return [1.0]

def of_images(images):
    return images
"""
QUICK = ("--steps", 1, "--resolution", 32)


@pytest.fixture
def place(workplace, tiny_model, no_plugins):
    """A working folder with a model, prompts and mine.py."""
    (workplace / "mine.py").write_text(MINE)
    (workplace / "mine.txt").write_text("\n".join(PROMPTS))
    (workplace / "tiny").symlink_to(tiny_model)
    return workplace


def evaluate(*arguments, code=0):
    given = ("--model", "a=tiny", "--prompts", "mine.txt", "--seeds", 1, *QUICK, "--output", "out")
    done = invoke("evaluate", *given, *arguments)
    assert done.returncode == code, (done.stdout, done.stderr)
    return done.stdout if code == 0 else done.stderr.strip().splitlines()[-1]


def test_an_evaluation_scores_by_them_and_knows_them_by_their_files_digest(place):
    text = evaluate("--scorer", "mine.py:warmth", "--scorer", "length=mine.py:words")
    assert "warmth" in text and "length" in text
    found = pl.read_parquet("out/scores.parquet")
    assert found["length"].to_list() == [len(prompt) / 2 for prompt in PROMPTS]
    (shard,) = place.glob("out/data/*/*.parquet")
    images = sample_store.read_images(shard)
    expected = [float(i[..., 0].mean() - i[..., 2].mean()) for i in images]
    np.testing.assert_allclose(found["warmth"], expected)
    kept = json.loads((place / "out" / "settings.json").read_text())["scorers"]
    assert set(kept) == {"warmth", "length"} and kept["length"]["source"].startswith("mine.py:words@")
    # Two functions of one file are two scorers.
    assert kept["length"]["digest"] != kept["warmth"]["digest"]
    (place / "elsewhere").mkdir()
    shutil.copy(place / "mine.py", place / "elsewhere" / "mine.py")
    assert "nothing has changed" in evaluate("--scorer", "warmth=elsewhere/mine.py:warmth")
    (place / "mine.py").write_text(MINE + "\n# another content\n")
    assert "--output out: scorers 'warmth' was 'mine.py:warmth@" in evaluate("--scorer", "mine.py:warmth", code=2)


def test_what_a_folder_names_is_not_run_unless_the_user_names_it_too(place, monkeypatch):
    evaluate("--scorer", "mine.py:warmth")
    monkeypatch.setenv(plugins.VARIABLE, "")
    more = ("--model", "b=tiny")  # needs every score of the folder
    for given in ((), ("--scorer", "warmth")):
        line = evaluate(*more, *given, code=2)
        assert "--scorer warmth = 'mine.py:warmth@" in line and "run only where you name it" in line
    evaluate(*more, "--scorer", "mine.py:warmth")
    assert pl.read_parquet("out/scores.parquet")["warmth"].null_count() == 0
    # Without a digest in the folder's file it is no other.
    settings = place / "out" / "settings.json"
    kept = json.loads(settings.read_text())
    kept["scorers"]["warmth"]["source"] = "mine.py:warmth"
    settings.write_text(json.dumps(kept))
    monkeypatch.setenv(plugins.VARIABLE, "")
    assert "run only where you name it" in evaluate("--model", "c=tiny", code=2)


def test_pairs_are_made_by_them_and_training_can_use_their_scores(place):
    given = ("--model", "tiny", "--prompts", "train=mine.txt", *QUICK, "--guidance", 1.5, "--work", "work")
    done = invoke("prefer", *given, "--scorer", "mine.py:warmth", "--scorer", "reward", "--label", "vote", "--out", "o")
    assert done.returncode == 0, done.stderr
    pairs = pl.read_parquet("o/train.parquet")
    assert {"warmth_0", "warmth_1", "reward_0", "score_1"} <= set(pairs.columns)
    assert pairs["warmth_0"].n_unique() > 1
    (place / "mine.py").write_text(MINE.replace("[..., 0]", "[..., 1]"))
    done = invoke("prefer", *given, "--scorer", "mine.py:warmth", "--label", "score", "--out", "p")
    assert done.returncode == 0, done.stderr
    # The code is another, so these are other scores of the same images.
    other = pl.read_parquet("p/train.parquet")
    assert set(other["image_0_uid"]) & set(pairs["image_0_uid"])
    assert set(other["warmth_0"]) != set(pairs["warmth_0"])


def test_an_experiment_of_rounds_names_a_file_beside_it(place, tmp_path, monkeypatch):
    folder = tmp_path / "beside"
    folder.mkdir()
    (folder / "mine.py").write_text(MINE)
    (folder / "own.toml").write_text(as_toml({"rounds.scorers": ["reward", "mine.py:warmth", "clip=/a:b"]}))
    named = read(folder / "own.toml")["rounds.scorers"]
    assert named[0] == "reward" and named[1].startswith("warmth=mine.py:warmth@") and named[2] == "clip=/a:b"
    assert scorers.with_sources(named[:2]) == ["reward=", named[1]]
    scorers.locate(*named[1].split("=", 1))
    _, value = parse_override("rounds.scorers=length=mine.py:words")
    assert value.startswith("length=mine.py:words@")
    monkeypatch.setenv(plugins.VARIABLE, "")
    with pytest.raises(UserError, match="run only where you name it"):
        scorers.locate(*named[1].split("=", 1))


@pytest.mark.parametrize(
    ("scorer", "code", "says"),
    [
        ("other.py:warmth", 2, "--scorer warmth = 'other.py:warmth': no such file"),
        ("mine.py:cold", 2, "no function 'cold' in mine.py"),
        ("mine.py:of_images", 2, "expected a function of images and prompts (too many positional arguments)"),
        ("label=mine.py:warmth", 2, "--scorer label=mine.py:warmth@"),
        ("reward=mine.py:warmth", 2, "--scorer reward=mine.py:warmth: no such folder, and not a hub id"),
        ("mine.py:failing", 1, "--scorer failing: KeyError in mine.py, line 11: 'no such key'"),
        ("mine.py:short", 1, "--scorer short: 1 scores for 3 images of a; expected one an image"),
    ],
)
def test_what_is_wrong_is_one_line(place, scorer, code, says):
    assert says in evaluate("--scorer", scorer, code=code)
    assert code == 1 or not (place / "out").exists()
