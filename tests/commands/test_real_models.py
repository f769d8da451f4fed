"""Whole commands on tiny checkpoints of the real families' formats, as users of SD1.5, SDXL and SD3 run them."""

import json
import shutil
from pathlib import Path

import polars as pl
import pytest
from safetensors.torch import load_file

from tests.support.commands import in_one_process, invoke
from tests.support.helpers import overrides, pair_rows, workbench
from tests.support.hub import serve
from workbench import tracking

QUICK = {"evaluation.seeds": 0, "evaluation.grid": 0}


@pytest.fixture(scope="module")
def sdxl(checkpoint):
    return checkpoint("sdxl")


@pytest.fixture
def settings(tiny, sdxl, tmp_path):
    """SDXL on a folder in the hub's layout: shards by split, columns that training does not need."""
    folder = tmp_path / "pickapic"
    folder.mkdir()
    extra = {"ranking_id": 1, "model_0": "x", "are_different": True}
    for name, count in (("train-00000-of-00002", 14), ("train-00001-of-00002", 10), ("validation-00000-of-00001", 8)):
        pl.DataFrame([row | extra for row in pair_rows(count)]).write_parquet(folder / f"{name}.parquet")
    data = {"model.path": str(sdxl), "data.train": str(folder), "data.validation": str(folder)}
    return {k: v for k, v in tiny.items() if k != "data.prompts"} | data | QUICK


def test_encode_then_train_from_the_store_alone(settings, workplace):
    given = overrides(settings | {"data.dtype": "float16"})
    first = invoke("encode", *given, "--output", "store", "--shard", 8)
    assert first.returncode == 0, first.stderr
    assert "train: 24 pairs" in first.stdout and "8 rows: 8 used" in first.stdout
    assert json.loads((workplace / "store" / "train" / "index.json").read_text())["pairs"] == 24
    again = invoke("encode", *given, "--output", "store")
    assert again.returncode == 0 and again.stdout == first.stdout
    shutil.rmtree(settings["data.train"])  # the images are not needed any more
    stores = {"data.train": "store", "data.validation": "store/validation"}
    done = invoke("train", *overrides(settings | stores), "--study", "s")
    assert done.returncode == 0, done.stderr


def test_encode_estimates_disk_and_time(settings, workplace):
    done = invoke("encode", *overrides(settings), "--estimate", 8)
    assert done.returncode == 0, done.stderr
    assert "| Pick-a-Pic v2, train | 959,040 |" in done.stdout and "ms and" in done.stdout


@pytest.mark.parametrize(
    "changes",
    [
        pytest.param({"lora.rank": 4, "model.dtype": "bfloat16", "train.checkpointing": True}, id="lora"),
        pytest.param({"data.cache": False, "data.flip": True}, id="from-images"),
        pytest.param({"train.optimizer": "adafactor", "train.scale_lr": True, "train.lr": 1e-5}, id="adafactor"),
    ],
)
def test_train_and_keep(settings, workplace, brief_epochs, changes):
    done = invoke("train", *overrides(settings | changes | {"train.keep": True}), "--study", "s")
    assert done.returncode == 0, done.stderr
    run = tracking.load_runs("s").row(0, named=True)
    assert run["train/loss"] == pytest.approx(0.69, abs=0.5) and run["divergence/policy"] != 0
    _, folder = tracking.kept_model(tracking.connect(), run["run_id"])
    (weights,) = folder.rglob("*.safetensors")
    assert weights.name == (
        "pytorch_lora_weights.safetensors" if "lora.rank" in changes else "diffusion_pytorch_model.safetensors"
    )
    assert load_file(weights)


def test_places_that_will_not_do_are_refused_before_anything_runs(settings, workplace):
    (workplace / "file").touch()
    done = invoke("train", *overrides(settings), "--output", "file/out")
    assert done.returncode == 2 and "--output file/out: cannot be written" in done.stderr
    done = invoke("encode", *overrides(settings), "--output", "file")
    assert done.returncode == 1 and "file/train: cannot be written" in done.stderr
    (workplace / "begun").mkdir()
    (workplace / "begun" / "pairs-00000.safetensors").touch()
    done = invoke("train", *overrides(settings | {"data.train": "begun"}))
    assert done.returncode == 2 and "its encoding was not finished" in done.stderr


@pytest.mark.parametrize(
    ("changes", "code", "message"),
    [
        ({"model.family": "sd3"}, 2, "model.family = 'sd3'"),
        ({"model.path": "someone/some-model"}, 1, "model.path = 'someone/some-model': no such folder, and the hub"),
        ({"data.train": "someone/some-pairs"}, 1, "data.train = 'someone/some-pairs': no such file or folder, and the"),
        ({"lora.rank": 2, "lora.targets": ["to_z"]}, 2, "lora.targets = ['to_z']: matches no layer"),
        ({"model.device": "cuda:9"}, 2, "model.device = 'cuda:9'"),
        ({"model.resolution": 20}, 2, "model.resolution = 20: this model's edges are multiples of 8; try 16 or 24"),
        ({"model.revision": "main"}, 2, "model.revision = 'main'"),
        ({"lora.alpha": 8}, 2, "set lora.rank above 0"),
        ({"train.optimizer": "adamw_8bit"}, 2, "needs bitsandbytes"),
        ({"timesteps.density": "logit_normal", "timesteps.spread": 0}, 2, "timesteps.spread = 0"),
    ],
)
def test_mistakes_are_one_clear_line(settings, workplace, monkeypatch, changes, code, message):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    done = invoke("train", *overrides(settings | changes))
    assert done.returncode == code and message in done.stderr, done.stderr
    assert len(done.stderr.strip().splitlines()[-1]) < 400


@pytest.mark.slow
def test_hub_ids_are_fetched_streamed_and_found_again_without_the_hub(settings, sdxl, workplace):
    """Against a hub on loopback: the model through the hub's cache, the pairs as a stream, encoded once."""
    given = settings | {"model.path": "someone/sdxl", "model.family": "sdxl", "model.revision": "main"}
    given |= {"data.train": "someone/pairs:train", "data.validation": "someone/pairs@main"}
    cache = {"HF_HOME": str(workplace / "hf"), "HF_HUB_DOWNLOAD_TIMEOUT": "5"}
    repositories = {"models/someone/sdxl": sdxl, "datasets/someone/pairs": Path(settings["data.train"])}
    train, typo = (["train", *overrides(given | changed)] for changed in ({}, {"data.train": "someone/pairs:trian"}))
    absent = ["encode", *overrides(given | {"data.train": "someone/else"})]
    with serve(repositories) as (address, asked):
        first, mistyped, missing = in_one_process(train, typo, absent, HF_ENDPOINT=address, **cache)
    assert first.returncode == 0, (first.stderr, asked)
    assert any("unet/diffusion_pytorch_model.safetensors" in line for line in asked)
    assert any("train-00001-of-00002.parquet" in line for line in asked)
    assert mistyped.returncode == 2 and "someone/pairs:trian" in mistyped.stderr, mistyped.stderr
    assert missing.returncode == 2 and "nor a data set on the hub" in missing.stderr, missing.stderr
    gone = workbench("workbench.train", *overrides(given), cwd=workplace, HF_ENDPOINT=address, **cache)
    assert gone.returncode == 0, gone.stderr


def test_out_of_memory_says_what_to_lower():
    import torch

    from workbench.common.errors import Failure, memory_explained

    with (
        pytest.raises(Failure, match=r"lower train\.batch_size.*train\.checkpointing=true.*lora\.rank=8"),
        memory_explained(),
    ):
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 GiB")
    with pytest.raises(Failure), memory_explained():
        torch.empty(2**50)
    with pytest.raises(RuntimeError, match="shape"), memory_explained():
        torch.zeros(2) @ torch.zeros(3, 3)
