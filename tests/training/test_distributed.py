"""One run on two processes against the same run on one with batches twice as large."""

import numpy as np
import pytest
import torch
from diffusers import StableDiffusionPipeline

from tests.support.helpers import overrides, workbench
from tests.support.ranks import run, run_command
from workbench import tracking
from workbench.common.distributed import collect, part_of, spread


def close(a, b, name):
    a_pair = 0.07 if "accurac" in name else 2e-4  # rounding may turn one margin that is nearly 0
    assert a == pytest.approx(b, rel=2e-3, abs=a_pair), name


@pytest.mark.parametrize(
    "changes",
    [
        pytest.param({}, id="ddp"),
        pytest.param({"train.parallel": "fsdp", "reference.policy": "update"}, id="fsdp"),
        pytest.param(
            {"train.parallel": "fsdp", "reference.on_exceed": "reinit", "reference.delta": 0.0},
            id="reinit",
            marks=pytest.mark.slow,
        ),
        pytest.param(
            {"train.parallel": "fsdp", "reference.rate": 0.5, "reference.interval": 1, "train.lr": 3e-3},
            id="mixture",
            marks=pytest.mark.slow,
        ),
        pytest.param(
            {"objective.loss": "kto", "reference.policy": "frozen", "reference.interval": None},
            id="kto",
            marks=pytest.mark.slow,
        ),
        pytest.param({"objective.safeguard": True, "objective.mu": 0.3}, id="safeguard", marks=pytest.mark.slow),
        pytest.param(
            {"lora.rank": 4, "reference.rate": 0.5, "reference.policy": "update"}, id="lora", marks=pytest.mark.slow
        ),
    ],
)
def test_two_processes_are_one_with_twice_the_batch(tiny, tmp_path, changes):
    """Gradients, reference updates, divergence decisions, buckets and samples agree; all ranks decide alike."""
    common = tiny | {"train.accumulation": 2, "diagnostics.probe": 15} | changes
    common = {name: value for name, value in common.items() if value is not None}
    (one,) = run(common, tmp_path / "one", 1)
    two = run(common | {"train.batch_size": 2}, tmp_path / "two", 2)
    assert two[0]["tables"].get("reference_audit.json") == two[1]["tables"].get("reference_audit.json")
    for step, metrics in one["metrics"].items():
        for rank in two:
            assert rank["metrics"][step].keys() == metrics.keys()
            for name, value in metrics.items():
                close(rank["metrics"][step][name], value, f"{name} at step {step}")
    if "objective.loss" not in changes:
        ours, theirs = (found["tables"]["reference_audit.json"] for found in (one, two[0]))
        assert ours["decision"] == theirs["decision"] and ours["step"] == theirs["step"]
        np.testing.assert_allclose(ours["divergence"], theirs["divergence"], rtol=2e-3, atol=1e-5)
    close(two[0]["tables"]["samples.png"], one["tables"]["samples.png"], "mean pixel")
    if "lora.rank" not in changes:
        a, b = (StableDiffusionPipeline.from_pretrained(tmp_path / n / "trained").unet for n in ("one", "two"))
        for x, y in zip(a.parameters(), b.parameters(), strict=True):
            torch.testing.assert_close(x, y, rtol=1e-2, atol=2e-4)


@pytest.mark.parametrize(
    "changes",
    [
        pytest.param({}, id="ddp"),
        pytest.param({"train.parallel": "fsdp", "reference.rate": 0.5}, id="fsdp", marks=pytest.mark.slow),
    ],
)
def test_two_processes_go_on_to_the_same_bits(tiny, tmp_path, changes):
    settings = tiny | {"train.steps": 5, "train.batch_size": 2, "reference.policy": "update"} | changes
    whole = run(settings, tmp_path / "whole", 2)
    run(settings, tmp_path / "killed", 2, last=3)
    assert [path.name[:8] for path in (tmp_path / "killed" / "snapshots").iterdir()] == ["00000002"]
    assert run(settings, tmp_path / "killed", 2) == whole


def test_what_does_not_work_when_sharded_is_refused(tiny, tmp_path):
    wrong = tiny | {"train.parallel": "fsdp", "train.optimizer": "adafactor"}
    for done in run_command(tmp_path, "train", *overrides(wrong)):
        assert done.returncode == 2 and "train.parallel = 'fsdp' works with 'adamw' alone" in done.stderr


def test_the_main_process_alone_tracks(tiny, workplace):
    for done in run_command(workplace, "train", *overrides(tiny), "--study", "two"):
        assert done.returncode == 0, done.stderr
    assert len(tracking.load_runs("two")) == 1


@pytest.mark.slow
def test_torchrun_starts_one_tracked_run(tiny, workplace):
    launcher = ("torch.distributed.run", "--standalone", "--nproc-per-node", "2", "-m", "workbench.train")
    done = workbench(*launcher, *overrides(tiny), "--study", "two", cwd=workplace)
    assert done.returncode == 0, done.stderr[-3000:]
    runs = tracking.load_runs("two")
    assert len(runs) == 1 and runs["train.steps"].item() == "4"


def test_spread_and_collect_are_whole_with_one_process():
    assert spread(5).tolist() == [0, 1, 2, 3, 4] and part_of(3) == slice(0, 3)
    assert torch.equal(collect(torch.arange(5), 5), torch.arange(5))
