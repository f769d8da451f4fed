"""The whole command on tiny models: what it writes, how it goes on after a kill, what it takes for a model."""

import json
import os
import shutil
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
from tests.support.evaluations import BOTH, PROMPTS, contents, evaluate, evaluations
from tests.support.helpers import workbench
from tests.support.hub import serve
from workbench import tracking
from workbench.evaluate import main
from workbench.evaluation import model_sources, reward_models, sample_store, scorers
from workbench.tracking import study_runs


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
