"""The whole command on tiny models: pairs that training reads, going on after a kill, what it says of mistakes."""

import io
import json
import shutil

import numpy as np
import polars as pl
import pytest
from PIL import Image

from tests.support.commands import invoke
from tests.support.helpers import overrides
from workbench.common.outputs import WRITTEN
from workbench.evaluation import drawing, filling, reward_models, scorers
from workbench.evaluation.drawing import Batch, Drawing, batches, encode, plan
from workbench.evaluation.pairing import LABELS, PAIRINGS
from workbench.evaluation.reward_models import RewardModel
from workbench.models.small.prompts import split
from workbench.models.small.reward import PARTS, Reward
from workbench.prefer import main

PROMPTS = [str(p) for p in split()["train"][:3]]
SAMPLED = ("--steps", 2, "--guidance", 1.5)
OUT = ("--resolution", 32, "--out", "out", "--work", "work")


@pytest.fixture
def place(workplace, tiny_model, checkpoint, tiny_clip, monkeypatch):
    """A working folder with prompts, models and a scorer; shards of three images."""
    monkeypatch.setattr(drawing, "MOST", 3)
    (workplace / "mine.txt").write_text("\n".join(PROMPTS), "utf-8")
    for name, target in (("tiny", tiny_model), ("flux", checkpoint("flux1")), ("clip", tiny_clip)):
        (workplace / name).symlink_to(target)
    return workplace


def prefer(*arguments, code=0):
    given = ("--model", "tiny") if "--model" not in arguments else ()
    prompts = ("--prompts", "train=mine.txt") if "--prompts" not in arguments else ()
    done = invoke("prefer", *given, *prompts, *SAMPLED, *OUT, *arguments)
    assert done.returncode == code, (done.stdout, done.stderr)
    return done.stdout if code == 0 else done.stderr.strip().splitlines()[-1]


def pixels(image):
    return np.asarray(Image.open(io.BytesIO(image)).convert("RGB"))


# --- the plan ----------------------------------------------------------------------------------------------------


def test_random_settings_are_drawn_for_each_image_and_noise_is_its_own():
    found = plan(["a", "b"], 500, ["x", "y", "z"], steps=[4, 8], guidance=[1.0, 3.0], every=False, seed=3)
    assert [d.caption for d in found] == ["a"] * 500 + ["b"] * 500
    assert [d.seed for d in found] == list(range(30_000_000, 30_001_000))
    shares = [sum(d.model == model for d in found) / 1000 for model in "xyz"]
    assert shares == pytest.approx([0.6, 0.2, 0.2], abs=0.05)
    assert sum(d.steps == 4 and d.guidance == 3 for d in found) == pytest.approx(250, abs=50)


def test_all_settings_share_each_noise():
    found = plan(["a", "b"], 2, ["x", "y"], steps=[4], guidance=[1.0, 3.0], every=True, seed=0)
    assert len(found) == 2 * 2 * 4 and [d.seed for d in found] == [0] * 4 + [1] * 4 + [2] * 4 + [3] * 4
    assert {(d.model, d.guidance) for d in found[:4]} == {("x", 1.0), ("x", 3.0), ("y", 1.0), ("y", 3.0)}


def test_shards_are_of_one_way_to_draw_and_of_few_pixels(tmp_path):
    drawings = plan(["a"], 70, ["x"], steps=[4], guidance=[1.0], every=False, seed=0)
    sizes = {
        edge: [len(batch.places) for batch in batches(drawings, tmp_path, {"x": about(edge)}, "avif")]
        for edge in (64, 1024)
    }
    assert sizes == {64: [64, 6], 1024: [4] * 17 + [2]}


def about(resolution=64, weights="w"):
    return {"digest": weights, "resolution": resolution}


def test_a_shards_name_tells_all_that_decides_its_images(tmp_path):
    one = Drawing("a", "x", 4, 1.0, 7)

    def path(drawn=one, weights="w", kind="avif"):
        (batch,) = batches([drawn], tmp_path, {"x": about(weights=weights)}, kind)
        assert isinstance(batch, Batch)
        return batch.path

    others = [one._replace(**{key: value}) for key, value in (("caption", "b"), ("steps", 5), ("seed", 8))]
    found = [path(), path(weights="v"), path(kind="png"), path(one._replace(guidance=2.0)), *map(path, others)]
    assert len(set(found)) == 7 and path() == found[0]


def test_the_commands_choices_are_all_that_there_are():
    choices = {option.name: option.type.choices for option in main.params if hasattr(option.type, "choices")}
    assert set(choices["pairs"]) == set(PAIRINGS) and set(choices["label"]) == set(LABELS)
    assert set(choices["image_format"]) == set(drawing.FORMATS)


# --- the command -------------------------------------------------------------------------------------------------


def test_draw_score_pair_and_train_two_steps(place):
    """The whole circle on a tiny FLUX with random weights."""
    text = prefer("--model", "flux", "--scorer", "clip=clip", "--pairs", "best-worst", "--label", "score", "--tie", 0)
    assert "train: 3 pairs of 3 prompts, 0 ties" in text and "clip and label agree in 100.0% of 3 pairs" in text
    frame = pl.read_parquet("out/train.parquet")
    assert (frame["label_0"] == (frame["clip_0"] > frame["clip_1"])).all() and frame["model_0"][0].startswith("flux, 2")
    settings = {
        "model.path": "flux", "model.resolution": 32,
        "data.train": "out", "data.validation": "out", "data.prompts": "mine.txt",
        "data.scores": "clip", "objective.label": "soft", "train.steps": 2, "train.batch_size": 2, "lora.rank": 2,
        "diagnostics.interval": 2, "diagnostics.probe": 2, "diagnostics.draws": 1,
        "reference.interval": 2, "evaluation.seeds": 0, "evaluation.grid": 0,
    }  # fmt: skip
    done = invoke("train", *overrides(settings), "--no-tracking", "--output", "trained")
    assert done.returncode == 0, done.stderr
    history = pl.read_parquet("trained/history.parquet")
    assert history["step"].to_list() == [1, 2] and history["train/loss"].is_finite().all()
    # What was trained draws the next pairs.
    again = prefer("--model", "trained/model", "--base", "flux", "--scorer", "clip=clip", "--pairs", "best-worst")
    assert "train: " in again


def test_pairs_of_the_small_models_reward(place):
    prefer("--images", 8)
    frame = pl.read_parquet("out/train.parquet")
    assert (
        frame.columns[-14:] == [f"{name}_{side}" for side in (0, 1) for name in ("reward", *PARTS)]
        and frame.height == 3 * 6
    )
    stored = np.stack([pixels(image) for image in frame["jpg_0"]])
    np.testing.assert_allclose(Reward(scorers.ASSETS)(stored, frame["caption"].to_list()), frame["reward_0"], atol=1e-4)
    assert (frame["num_example_per_prompt"] == 6).all() and (frame["ranking_id"] == np.arange(18)).all()
    best = pl.when(pl.col("label_0") == 1).then("image_0_uid").otherwise("image_1_uid")
    decided = frame.filter(pl.col("label_0") != 0.5)
    assert decided.select(best == pl.col("best_image_uid")).to_series().all()
    assert Image.open(place / "out" / "train.png").width == 4 * (2 * 128 + 12)


def test_several_scorers_vote_and_their_agreement_is_counted(place):
    text = prefer("--scorer", "reward", "--scorer", "clip=clip", "--pairs", "all", "--label", "vote")
    frame = pl.read_parquet("out/train.parquet")
    assert {"score_0", "reward_0", "clip_1", "concept_0"} <= set(frame.columns) and len(frame) == 3 * 6
    signs = [np.sign(frame[f"{name}_0"] - frame[f"{name}_1"]) for name in ("reward", "clip")]
    np.testing.assert_array_equal(frame["label_0"], (np.sign(signs[0] + signs[1]) + 1) / 2)
    counts = pl.read_csv("out/train_agreement.csv")
    assert counts.row(0) == ("reward", "clip", *(int((signs[0] * signs[1] == sign).sum()) for sign in (1, -1, 0)))
    assert f"reward and clip agree in {counts['agree'][0] / 18:.1%} of 18 pairs" in text
    assert counts.filter(pl.col("other") == "label")["disagree"].sum() == 0  # both agree, or there is no majority


def test_models_seeds_and_settings_are_combined(place):
    prefer("--model", "a=tiny", "--model", "b=flux", "--scorer", "clip=clip", "--settings", "all", "--images", 2,
           "--guidance", 3, "--pairs", "all", "--label", "score", "--limit", 1)  # fmt: skip
    frame = pl.read_parquet("out/train.parquet")
    ways = {f"{model}, 2 steps, guidance {scale}" for model in "ab" for scale in ("1.5", "3")}
    assert len(frame) == 8 * 7 / 2 and set(frame["model_0"]) | set(frame["model_1"]) == ways
    assert set(frame["caption"]) == {PROMPTS[0]}


def test_a_prompt_twice_is_one_prompt_and_a_set_twice_as_large_keeps_its_images(place):
    prefer("--limit", 2)
    before = sorted((place / "work" / "train").glob("*.parquet"))
    (place / "mine.txt").write_text("\n".join([*PROMPTS, PROMPTS[0]]), "utf-8")
    assert "of 3 prompts" in prefer()
    assert before[0] in (place / "work" / "train").glob("*.parquet")
    assert len(pl.read_parquet("out/train.parquet")) == 9


@pytest.mark.parametrize("where", ["_write", "scored"])
def test_an_interrupted_command_goes_on_and_ends_alike(place, monkeypatch, where):
    prefer("--out", "whole", "--work", "other")
    module = {"_write": drawing, "scored": filling}[where]
    real, calls = getattr(module, where), []

    def stop_at_the_second(*arguments):
        calls.append(arguments)
        if len(calls) == 2:
            raise KeyboardInterrupt
        return real(*arguments)

    monkeypatch.setattr(module, where, stop_at_the_second)
    assert prefer(code=130) == "Interrupted."
    kept = {path: path.stat().st_mtime_ns for path in place.glob("work/train/*.parquet")}
    assert len(kept) == (1 if where == "_write" else 4) and not (place / "out" / "train.parquet").exists()
    monkeypatch.setattr(module, where, real)
    prefer()
    assert len(list(place.glob("work/train/*.parquet"))) == 4
    if where == "_write":
        monkeypatch.setattr(filling.model_sources, "open_model", None)
    for name in ("train.parquet", "train.png", "train_agreement.csv"):
        assert (place / "out" / name).read_bytes() == (place / "whole" / name).read_bytes()
    prefer()  # draws nothing any more
    monkeypatch.undo()


def test_other_weights_are_drawn_and_scored_anew(place, tiny_model, tiny_clip):
    (place / "tiny").unlink()
    shutil.copytree(tiny_model, place / "tiny")
    prefer("--scorer", "clip=clip", "--label", "score")
    first, shards = pl.read_parquet("out/train.parquet"), len(list(place.glob("work/train/*")))
    (place / "clip").unlink()
    shutil.copytree(tiny_clip, place / "clip")
    config = json.loads((place / "clip" / "config.json").read_text())
    (place / "clip" / "config.json").write_text(json.dumps(config | {"comment": "another"}))
    prefer("--scorer", "clip=clip", "--label", "score")
    assert len(list(place.glob("work/train/*"))) == shards  # drawn before
    scheduler = place / "tiny" / "scheduler" / "scheduler_config.json"
    scheduler.write_text(json.dumps(json.loads(scheduler.read_text()) | {"beta_end": 0.02}))
    prefer("--scorer", "clip=clip", "--label", "score")
    assert len(list(place.glob("work/train/*"))) == 2 * shards
    assert not first["jpg_0"].equals(pl.read_parquet("out/train.parquet")["jpg_0"])


def test_without_prompts_it_makes_the_small_models_own_files(place):
    done = invoke("prefer", "--model", "tiny", *SAMPLED, *OUT, "--limit", 1, "--sheet", 0)
    assert done.returncode == 0, done.stderr
    written = set((place / "out" / WRITTEN).read_text().split())
    tables = {f"{name}{ending}" for name in ("train", "validation") for ending in (".parquet", "_agreement.csv")}
    assert written == tables | {f"{name}_prompts.txt" for name in ("test", "validation", "unseen")}
    assert (place / "out" / "test_prompts.txt").read_text().splitlines() == [str(p) for p in split()["test"]]
    assert [len(pl.read_parquet(f"out/{name}.parquet")) for name in ("train", "validation")] == [3, 6]


def test_png_loses_nothing_and_avif_little():
    image = np.random.default_rng(0).integers(0, 256, (32, 32, 3), dtype=np.uint8)
    assert (pixels(encode(image, "png")) == image).all() and not (pixels(encode(image, "avif")) == image).all()


# --- mistakes ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("arguments", "code", "says"),
    [
        (("--model", "nowhere/at/all"), 2, "--model all=nowhere/at/all: "),
        (("--model", "tiny", "--model", "tiny"), 2, "'tiny' is there twice; give another name"),
        (("--prompts", "empty.txt"), 2, "--prompts empty.txt: no prompt in it"),
        (("--prompts", "nowhere.txt"), 2, "--prompts nowhere.txt: no such file or folder"),
        (("--prompts", "train=other.txt"), 2, "--scorer reward: judges only what the small model draws"),
        (("--scorer", "beauty"), 2, "--scorer 'beauty': expected one of pickscore"),
        (("--images", 6), 2, "--images 6: --pairs fours takes images by fours, and a prompt has 6"),
        (("--images", 1, "--pairs", "all"), 2, "--images 1: a pair needs two images of a prompt"),
        (("--steps", 5000), 2, "5000 steps of the sampler"),
        (("--gap", 50), 2, "train: no pair (0 of identical images, 9 closer than --gap 50)"),
        (("--out", "file"), 2, "--out file: cannot be written"),
        (("--out", "theirs"), 2, "theirs/train.parquet: is there, and not among the files that the workbench wrote"),
        (("--seed", -1), 2, "--seed"),
    ],
)
def test_mistakes_are_one_clear_line(place, arguments, code, says):
    (place / "empty.txt").write_text("\n \n")
    (place / "other.txt").write_text("a cat on the moon\n")
    (place / "file").touch()
    (place / "theirs").mkdir()
    (place / "theirs" / "train.parquet").write_text("years of work")
    assert says in prefer(*arguments, code=code)
    assert (place / "theirs" / "train.parquet").read_text() == "years of work"
    assert not list(place.glob("out/*.parquet"))


@pytest.mark.parametrize(
    ("scores", "says"),
    [
        (lambda images, prompts: np.zeros(len(images) + 1), "--scorer clip: 4 scores for 3 images of tiny"),
        (lambda images, prompts: np.zeros((len(images), 2)), "--scorer clip: scores of the shape (3, 2) for 3 images"),
        (lambda images, prompts: np.full(len(images), np.nan), "not a finite score for tiny's image of 'a fox"),
    ],
)
def test_a_scorer_that_does_not_give_a_number_an_image_is_a_failure_and_nothing_is_lost(
    place, monkeypatch, scores, says
):
    kind = reward_models.REWARD_MODELS["clip"]
    with monkeypatch.context() as patch:
        broken = RewardModel(kind.heading, kind.parts, lambda *a: scores)
        patch.setitem(reward_models.REWARD_MODELS, "clip", broken)
        assert says in prefer("--scorer", "clip=clip", code=1)
    drawn = list(place.glob("work/train/*.parquet"))
    assert drawn and "train: " in prefer("--scorer", "clip=clip", "--label", "score")
    assert list(place.glob("work/train/*.parquet")) == drawn


def test_identical_images_make_no_pair(place, monkeypatch):
    real = drawing._write
    monkeypatch.setattr(drawing, "_write", lambda batch, images: real(batch, [images[0]] * len(images)))
    monkeypatch.setattr(drawing, "MOST", 64)
    assert "no pair (9 of identical images, 0 closer than --gap 0); draw more --images" in prefer(code=2)
