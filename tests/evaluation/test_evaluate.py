"""The whole command on tiny models: what it writes, how it goes on after a kill, what it says of mistakes."""

import json
import os
import shutil
import subprocess
import sys
import time

import numpy as np
import polars as pl
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from click.testing import CliRunner

from tests.support import forked
from tests.support.commands import invoke
from tests.support.helpers import ROOT, workbench
from tests.support.hub import serve
from tests.support.reward_models import save_clip
from workbench import tracking
from workbench.evaluate import main
from workbench.evaluation import model_sources, reward_models, sample_store, scorers
from workbench.models.small.prompts import split
from workbench.tracking import store, study_runs

PROMPTS = [str(p) for p in split()["test"][:5]]
QUICK = ("--steps", "2", "--seeds", "2", "--prompts", "mine=prompts.txt")


@pytest.fixture(scope="session")
def other_model(tiny_model, tmp_path_factory):
    """The tiny model with another UNet."""
    from diffusers import UNet2DConditionModel

    folder = tmp_path_factory.mktemp("other") / "model"
    shutil.copytree(tiny_model, folder)
    unet = UNet2DConditionModel.from_pretrained(folder, subfolder="unet")
    torch.manual_seed(1)
    for parameter in unet.parameters():
        parameter.data.add_(0.05 * torch.randn_like(parameter))
    unet.save_pretrained(folder / "unet")
    return folder


@pytest.fixture(scope="session")
def tiny_clip(tmp_path_factory):
    return save_clip(tmp_path_factory.mktemp("clip"))[0]


@pytest.fixture
def place(workplace, tiny_model, other_model, monkeypatch):
    """A working folder with prompts and both models; shards of three images."""
    monkeypatch.setattr(sample_store, "SHARD", 3)
    (workplace / "prompts.txt").write_text("\n".join(PROMPTS))
    (workplace / "tiny").symlink_to(tiny_model)
    (workplace / "other").symlink_to(other_model)
    return workplace


BOTH = ("--model", "ours=other", "--model", "pretrained=tiny")


def evaluate(*arguments, code=0):
    done = CliRunner().invoke(main, [*QUICK, *arguments])
    assert done.exit_code == code, (done.output, done.exception)
    assert "Traceback" not in done.output
    return done.output


def evaluations():
    client = tracking.connect()
    number = store.experiment(client).experiment_id
    return client.search_runs([number], "tags.`workbench.kind` = 'evaluation'")


def contents(folder):
    """Images and scores, whatever the shards' metadata."""
    return pl.read_parquet(folder / "data" / "**" / "*.parquet")


def test_samples_scores_tables_and_the_tracked_run(place):
    text = evaluate(*BOTH, "--output", "out")
    scores = pl.read_parquet("out/scores.parquet")
    assert scores.columns == ["model", "prompts", "row", "prompt", "category", "seed", "reward"]
    assert len(scores) == 2 * 5 * 2 and set(scores["model"]) == {"ours", "pretrained"}
    both = scores.pivot("model", index=["row", "seed"], values="reward")
    won = ((both["ours"] - both["pretrained"]).sign() + 1).mean() / 2
    (rate,) = pl.read_csv("out/win-rates.csv").to_dicts()
    assert rate["mean"] == pytest.approx(won) and (rate["against"], rate["scorer"]) == ("pretrained", "reward")
    assert "| mine | pretrained |" in text and "### Win rates of ours, %" in text
    assert "true reward" in (place / "out" / "scores.md").read_text()
    (run,) = evaluations()
    assert run.info.status == "FINISHED" and run.info.run_name == "out"
    mean = scores.filter(pl.col("model") == "ours")["reward"].mean()
    assert run.data.metrics["eval/reward/ours"] == pytest.approx(mean)
    assert run.data.metrics["win_rate/reward/ours_vs_pretrained"] == pytest.approx(won)
    assert run.data.params["evaluation.guidance"] == "3.0" and run.data.params["models.ours.sampler"] == "DDIMScheduler"
    assert {one.dataset.name for one in run.inputs.dataset_inputs} == {"prompts mine", "samples"}
    client = tracking.connect()
    files = {one.path for one in client.list_artifacts(run.info.run_id)}
    assert {"scores.csv", "win-rates.md", "samples-mine.png", "settings.json", "scores.parquet", "data"} <= files
    assert len(client.list_artifacts(run.info.run_id, "data/mine")) == 8
    assert "nothing has changed" in evaluate(*BOTH, "--output", "out") and len(evaluations()) == 1
    (place / "out" / "tracked.json").write_text("{")
    assert "nothing has changed" not in evaluate(*BOTH, "--output", "out") and len(evaluations()) == 2


def test_the_shards_are_a_hugging_face_data_set(place, tmp_path):
    datasets = pytest.importorskip("datasets")
    evaluate("--model", "pretrained=tiny", "--output", "out")
    found = datasets.load_dataset(str(place / "out" / "data" / "mine"), split="train", cache_dir=str(tmp_path / "hf"))
    assert found.column_names == ["model", "prompts", "row", "prompt", "category", "seed", "image", "reward"]
    assert found[3]["image"].size == (32, 32) and found[3]["prompt"] == PROMPTS[1] and found[3]["seed"] == 1


def test_the_same_model_under_two_names_draws_the_same_and_ties(place):
    evaluate("--model", "a=tiny", "--model", "b=tiny", "--output", "out", "--batch-size", "7")
    (rate,) = pl.read_csv("out/win-rates.csv").to_dicts()
    assert (rate["mean"], rate["low"], rate["high"]) == (0.5, 0.5, 0.5)
    images = contents(place / "out").sort("model", "row", "seed")["image"].struct.field("bytes")
    assert images[:10].to_list() == images[10:].to_list() and images[:10].n_unique() == 10


def test_images_are_drawn_from_the_seed_of_their_prompt_and_number(place, tiny_model):
    from workbench import models

    evaluate("--model", "a=tiny", "--output", "out")
    backend = models.load(str(tiny_model), torch.device("cpu"))
    seeds = [sample_store.noise_seed(row, seed) for row in range(5) for seed in range(2)]
    captions = [prompt for prompt in PROMPTS for _ in range(2)]
    drawn = backend.sample(backend.denoiser(), captions, seeds, steps=2, guidance=3.0, batch_size=10)
    kept = [image for path in sorted(place.glob("out/data/mine/*")) for image in sample_store.read_images(path)]
    assert np.abs(np.stack(kept).astype(int) - drawn).max() <= 1  # batches differ


@pytest.mark.parametrize("where", ["write_images", "add_scores"])
def test_an_interrupted_command_goes_on_and_ends_alike(place, monkeypatch, where):
    evaluate(*BOTH, "--output", "whole")
    real, calls = getattr(sample_store, where), []

    def stop_at_the_second(*arguments):
        calls.append(arguments)
        if len(calls) == 2:
            raise KeyboardInterrupt
        real(*arguments)

    monkeypatch.setattr(sample_store, where, stop_at_the_second)
    assert "the same command goes on" in evaluate(*BOTH, "--output", "out", code=130)
    assert not (place / "out" / "scores.parquet").exists()
    kept = {path: path.read_bytes() for path in place.glob("out/data/mine/*.parquet")}
    assert len(kept) == (1 if where == "write_images" else 8)
    finished = [path for path in kept if where == "write_images" or "reward" in pl.read_parquet_schema(path)]
    monkeypatch.setattr(sample_store, where, real)
    opened = []
    real_open = model_sources.open_model
    monkeypatch.setattr(model_sources, "open_model", lambda *a: opened.append(a) or real_open(*a))
    evaluate(*BOTH, "--output", "out")
    assert len(opened) == (2 if where == "write_images" else 0)
    (path,) = finished
    assert where == "write_images" or path.read_bytes() == kept[path]
    assert contents(place / "out").equals(contents(place / "whole"))
    for name in ("scores.csv", "win-rates.csv", "scores.parquet", "settings.json", "samples-mine.png"):
        assert (place / "out" / name).read_bytes() == (place / "whole" / name).read_bytes()


@pytest.mark.slow
def test_a_command_that_is_killed_outright_goes_on_too(place):
    command = ["--model", "a=tiny", "--steps", "4", "--limit", "64", "--output", "out"]
    process = forked.start(invoke, "evaluate", *command)
    while not list(place.glob("out/data/embedded/a-*.parquet")):
        assert process.is_alive()
        time.sleep(0.02)
    process.kill()
    process.join()
    first = place / "out" / "data" / "embedded" / "a-00000.parquet"
    kept = pl.read_parquet(first)
    assert len(list(place.glob("out/data/embedded/a-*.parquet"))) < 4
    sample_store.SHARD = 32  # as in the process; monkeypatch puts it back
    done = CliRunner().invoke(main, command)
    assert done.exit_code == 0, done.output
    assert pl.read_parquet(first).drop("reward").equals(kept)
    assert len(pl.read_parquet("out/scores.parquet")) == 128


def test_a_damaged_shard_is_drawn_again(place):
    evaluate(*BOTH, "--output", "out")
    whole = contents(place / "out")
    (place / "out" / "data" / "mine" / "ours-00001.parquet").write_bytes(b"PAR1 and then nothing")
    evaluate(*BOTH, "--output", "out")
    assert contents(place / "out").equals(whole)


def test_what_is_not_as_it_was_written_is_refused_and_kept(place):
    evaluate("--model", "pretrained=tiny", "--output", "out")
    shard, whole = place / "out" / "data" / "mine" / "pretrained-00001.parquet", place / "whole"
    shard.rename(whole)
    table = pq.read_table(whole)
    numbers = pa.array([2**60 + 1] * len(table))  # beyond what a float holds
    for make, says in (
        (lambda: shard.mkdir(), "is a folder, not a file"),
        (lambda: os.mkfifo(shard), "is a named pipe, not a file"),
        (lambda: pq.write_table(table.append_column("reward", table["reward"]), shard), "reward is there twice"),
        (lambda: pq.write_table(table.set_column(7, "reward", numbers), shard), "reward is of another type"),
        (lambda: pq.write_table(table.slice(1), shard), "is not as it was written (2 rows)"),
    ):
        make()
        assert "mine/pretrained-00001.parquet" in (text := evaluate("--output", "out", code=2)) and says in text
        shard.rmdir() if shard.is_dir() else shard.unlink()
    whole.rename(shard)
    shutil.rmtree(place / "out" / "data"), (place / "out" / "data").write_text("years of work")
    assert "out/data/mine: cannot be written" in evaluate("--model", "pretrained=tiny", "--output", "out", code=2)


def test_a_scorer_added_later_uses_the_images_that_are_there(place, tiny_clip, monkeypatch):
    evaluate(*BOTH, "--output", "out")
    before = contents(place / "out")
    monkeypatch.setattr(model_sources, "open_model", None)
    text = evaluate("--scorer", f"clip={tiny_clip}", "--output", "out")
    after = contents(place / "out")
    assert after.drop("clip").equals(before) and after["clip"].null_count() == 0
    assert "CLIP ViT-L/14, % | average, %" in text and len(evaluations()) == 2
    found = sample_store.read_images(place / "out" / "data" / "mine" / "ours-00000.parquet")
    direct = scorers.locate("clip", str(tiny_clip)).load(torch.device("cpu"))
    expected = direct(np.stack(found), [PROMPTS[0], PROMPTS[0], PROMPTS[1]])
    np.testing.assert_allclose(pl.read_parquet("out/data/mine/ours-00000.parquet")["clip"], expected, atol=1e-4)


def test_a_model_added_later_gets_every_score_and_old_ones_are_not_drawn_again(place, tiny_clip):
    evaluate("--model", "ours=other", "--scorer", f"clip={tiny_clip}", "--scorer", "reward", "--output", "out")
    before = contents(place / "out")
    (place / "other").unlink()
    evaluate("--model", "pretrained=tiny", "--output", "out")
    after = contents(place / "out")
    assert after.filter(pl.col("model") == "ours").equals(before)
    assert len(after) == 20 and after.select("clip", "reward").null_count().row(0) == (0, 0)
    assert list(json.loads((place / "out" / "settings.json").read_text())["models"]) == ["ours", "pretrained"]


def test_several_prompt_sets_are_told_apart(place):
    (place / "PartiPrompts.tsv").write_text(f"Prompt\tCategory\tChallenge\n{PROMPTS[0]}\tAnimals\tBasic\n")
    evaluate(*BOTH, "--prompts", "PartiPrompts.tsv", "--output", "out", "--grid", "0", "--no-images", "--name", "two")
    scores = pl.read_parquet("out/scores.parquet")
    assert scores["prompts"].unique(maintain_order=True).to_list() == ["mine", "PartiPrompts"]
    assert set(scores.filter(pl.col("prompts") == "PartiPrompts")["category"]) == {"Animals"}
    more = invoke("evaluate", "--steps", 2, "--prompts", "validation", "--limit", 2, "--seeds", 1, "--output", "out")
    assert more.returncode == 0, more.stderr
    images = pl.read_parquet("out/scores.parquet").group_by("prompts", maintain_order=True).len()
    assert images.rows() == [
        ("mine", 20),
        ("PartiPrompts", 4),
        ("validation", 4),
    ]  # two prompts and two models, one seed
    run = evaluations()[-1]
    assert run.info.run_name == "two" and "eval/PartiPrompts/reward/ours" in run.data.metrics
    assert "data" not in {one.path for one in tracking.connect().list_artifacts(run.info.run_id)}


def keep_weights(name, path, weights, study=None):
    """A tracked run as training leaves it behind."""
    client = tracking.connect()
    parent = study_runs.open_group(client, study, "").info.run_id if study else None
    params = {"model.path": str(path), "seed": 0}
    tags = {"workbench.kind": "run", "workbench.arm": name} | ({"workbench.study": study} if study else {})
    tracker = tracking.Tracker(client, name, params=params, tags=tags, parent=parent)
    if weights:
        tracker.artifact(weights, "model/unet")
    tracker.close("complete")
    return tracker.run_id


def save_lora(model, folder):
    """Random LoRA weights, written by diffusers."""
    from diffusers import StableDiffusionPipeline, UNet2DConditionModel
    from peft import LoraConfig, get_peft_model_state_dict

    unet = UNet2DConditionModel.from_pretrained(model, subfolder="unet")
    unet.add_adapter(LoraConfig(r=2, target_modules=["to_q", "to_v"], init_lora_weights=False))
    StableDiffusionPipeline.save_lora_weights(folder, unet_lora_layers=get_peft_model_state_dict(unet))


def test_runs_and_studies_that_kept_their_weights(place, tiny_model, other_model):
    run_id = keep_weights("alone", tiny_model, other_model / "unet")
    keep_weights("ours", tiny_model, other_model / "unet", study="s")
    keep_weights("frozen", tiny_model, tiny_model / "unet", study="s")
    keep_weights("without", tiny_model, None, study="s")
    shutil.copytree(other_model / "unet", "weights/unet")
    save_lora(tiny_model, place / "lora")
    text = evaluate(
        "--model", f"run=runs:/{run_id}", "--model", "study:s", "--model", "folder=weights", "--model", "lora=lora",
        "--base", "tiny", "--model", "whole=other", "--ours", "whole", "--output", "out",
    )  # fmt: skip
    rates = {row["against"]: row["mean"] for row in pl.read_csv("out/win-rates.csv").to_dicts()}
    assert list(rates) == ["run", "ours", "frozen", "folder", "lora"]
    assert rates["run"] == rates["ours"] == rates["folder"] == 0.5
    assert "Diffusion-DPO" in text  # the arm's label
    kept = contents(place / "out").sort("row", "seed").with_columns(pl.col("image").struct.field("bytes"))
    images = {model: part["bytes"].to_list() for (model,), part in kept.group_by("model")}
    assert images["run"] == images["ours"] == images["folder"] == images["whole"]
    assert len({*images["whole"], *images["frozen"], *images["lora"]}) == 30
    assert "kept no weights" in evaluate(
        "--model", f"x=runs:/{keep_weights('none', tiny_model, None)}", "--output", "x", code=2
    )


def test_evaluated_runs_get_their_scores_for_the_figures_of_their_study(place, tiny_model, other_model, tiny_clip):
    for arm, weights in (("ours", other_model), ("frozen", tiny_model)):
        keep_weights(arm, tiny_model, weights / "unet", study="s")
    evaluate("--model", "study:s", "--scorer", f"clip={tiny_clip}", "--scorer", "reward", "--output", "out")
    (run,) = evaluations()
    found = {row["arm"]: row for row in tracking.load_runs("s").to_dicts()}
    for arm in ("ours", "frozen"):
        assert found[arm]["eval/clip"] == pytest.approx(run.data.metrics[f"eval/clip/{arm}"])
    assert "eval/reward" not in tracking.load_runs("s").columns


@pytest.mark.slow
def test_reward_models_come_from_the_hub_and_then_from_its_cache(place, tiny_clip):
    """Against a hub on loopback, in a process of its own: the hub's client reads its address once."""
    names = ("yuvalkirstain/PickScore_v1", reward_models.CLIP_H)
    given = ("workbench.evaluate", *BOTH, "--prompts", "mine=prompts.txt", "--seeds", "1", "--steps", "1")
    with serve({f"models/{name}": tiny_clip for name in names}) as (address, asked):
        hub = {"HF_ENDPOINT": address, "HF_HOME": str(place / "hf")}
        first = workbench(*given, "--scorer", "pickscore", "--output", "out", cwd=place, **hub)
        assert first.returncode == 0 and "PickScore" in first.stdout, (first.stderr, asked)
        assert any("model.safetensors" in line for line in asked)
    again = workbench(*given, "--scorer", "pickscore", "--output", "again", cwd=place, **hub)
    assert again.returncode == 0, again.stderr
    assert pl.read_csv("again/scores.csv").equals(pl.read_csv("out/scores.csv"))


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
