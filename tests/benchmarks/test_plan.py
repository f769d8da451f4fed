"""The formulas of a plan against values worked by hand, and its bytes against what two processes hand to gloo."""

import json
from dataclasses import replace

import pytest
import torch
from click.testing import CliRunner

from tests.support.ranks import collectives
from workbench import throughput
from workbench.benchmarks import costs
from workbench.benchmarks.measurement import random_pairs
from workbench.benchmarks.plan import (
    DECODE,
    GPUS,
    PICK_A_PIC,
    STORE_ROWS,
    Cluster,
    Gpu,
    Payload,
    Work,
    gpu_bytes,
    passes,
    payload,
    plan,
    reached,
)
from workbench.models import SHAPES, random_backend
from workbench.training.config import resolve
from workbench.training.measurements import logged_values, metric_names

GPU = Gpu({"bfloat16": 100e12, "tf32": 50e12, "float32": 10e12}, memory=80e9, traffic=2e12, link=400e9)
COST = costs.Cost(forward=1e12, step=8e12, recomputed=10e12, weights=1_000_000_000, trained=1_000_000_000)
WORK = Work(
    COST, flops=8e12, precision="bfloat16", utilisation=0.5, optimizer="adamw", sharded=False, batch=4, pairs=256,
    steps=100, encode_images=4e12, encode_caption=1e9, pixels=512 * 512, pair_bytes=65_544, caption_bytes=118_272,
    rows=5000,
)  # fmt: skip


def test_a_ring_passes_on_all_but_its_own_part():
    """Four processes, 12 bytes: three parts of 3 bytes there, and for an all-reduce the same again."""
    assert Payload(gathered=12).sent(4) == Payload(scattered=12).sent(4) == 9
    assert Payload(reduced=12).sent(4) == 18
    assert Payload(12, 12, 12).sent(1) == 0


def test_the_seconds_of_a_step_by_hand():
    found = plan(WORK, Cluster(GPU, gpus=8))
    assert found.accumulation == passes(256, 4, 8) == 8
    # 32 pairs a GPU of 8 TFLOP at 50 of 100 TFLOP/s.
    assert found.arithmetic == pytest.approx(32 * 8 / 50)
    # 7 / 8 of 4 GB twice, at 400 GB/s; it can hide in half of one of eight passes.
    assert found.sent == pytest.approx(7e9) and found.communication == pytest.approx(7 / 400)
    assert found.hidden == found.communication
    # Ten numbers of 4 bytes a weight at 2 TB/s.
    assert found.optimizer == pytest.approx(0.02)
    assert found.step == pytest.approx(5.12 + 0.0175 + 0.02)
    assert found.training == pytest.approx(515.75)


def test_a_ring_over_several_machines_is_as_fast_as_its_network_and_hides_no_longer_than_a_backward_pass():
    found = plan(replace(WORK, pairs=64), Cluster(GPU, gpus=16, network=10e9))
    assert found.accumulation == 1 and found.arithmetic == pytest.approx(4 * 8 / 50)
    assert found.communication == pytest.approx(2 * 15 / 16 * 4 / 10)
    assert found.hidden == pytest.approx(0.32)


def test_fsdp_gathers_in_each_pass_and_scatters_once():
    sharded = replace(WORK, sharded=True)
    assert payload(COST, True, 8) == Payload(gathered=8 * 3 * 4e9, scattered=4e9)
    found = plan(sharded, Cluster(GPU, gpus=8))
    assert found.sent == pytest.approx(7 / 8 * 100e9) and found.hidden == pytest.approx(found.communication)
    # 16 bytes a weight of the policy and 4 of the reference in eight parts, and the gradients of 8 passes whole.
    assert found.memory == pytest.approx(20e9 / 8 + 4e9)
    assert gpu_bytes(replace(sharded, pairs=32), 8) == pytest.approx(20e9 / 8)
    assert found.optimizer == pytest.approx(0.02 / 8)


def test_a_copy_on_each_gpu_takes_what_one_gpu_does():
    assert gpu_bytes(WORK, 8) == gpu_bytes(WORK, 1) == 20e9
    assert gpu_bytes(replace(WORK, precision="float32"), 8) == 20e9  # no copies, but a reference of 4 bytes
    lora = replace(WORK, cost=replace(COST, trained=10_000_000))
    assert gpu_bytes(lora, 8) == pytest.approx(2e9 + 18 * 10e6)
    # A moving average is 4 bytes a trained weight, a reference that is a mixture 4 instead of 2.
    assert gpu_bytes(replace(WORK, averaged=True, mixed=True), 8) == 26e9
    assert gpu_bytes(replace(lora, averaged=True), 8) == pytest.approx(2e9 + 22 * 10e6)


def test_copies_are_those_that_the_settings_want():
    moving = {"reference.policy": "update", "reference.rate": 0.5, "train.ema": 0.999}
    assert costs.copies_of(resolve(moving)) == {"averaged": True, "mixed": True}
    assert costs.copies_of(resolve(moving | {"lora.rank": 4})) == {"averaged": True, "mixed": False}
    assert costs.copies_of(resolve({"reference.policy": "frozen"})) == {"averaged": False, "mixed": False}


def test_encoding_loading_and_storage_by_hand():
    found = plan(WORK, Cluster(GPU, gpus=8, cores=10))
    pairs, captions = PICK_A_PIC
    assert found.encoding == pytest.approx(pairs * 4e12 / 25e12 + captions * 1e9 / 50e12)
    assert found.decoding == pytest.approx(2 * pairs * (DECODE[0] + DECODE[1] * 262_144) / 10)
    assert found.encoded == pytest.approx(pairs / found.encoding)
    assert found.stored == pytest.approx(pairs * 65_544 + captions * 118_272)
    assert found.read == 256 * 183_816
    assert found.rows == pytest.approx(5000 / 515.75)
    # Mirrored independently: each image twice, four pairs of them; decoded and read as before.
    mirrored = plan(replace(WORK, encoded_ways=2, stored_ways=4), Cluster(GPU, gpus=8, cores=10))
    assert mirrored.encoding - found.encoding == pytest.approx(pairs * 4e12 / 25e12)
    assert mirrored.stored - found.stored == pytest.approx(3 * pairs * 65_544)
    assert (mirrored.decoding, mirrored.read) == (found.decoding, found.read)


def test_the_share_of_the_backward_pass_follows_from_the_flops():
    """4 F of 8 F; with activations computed anew 6 of 10; LoRA, whose frozen weights have no gradients, 2 of 6."""
    assert WORK.backward == 0.5
    assert replace(WORK, flops=10e12).backward == pytest.approx(0.6)
    assert replace(WORK, flops=6e12).backward == pytest.approx(1 / 3)


def test_a_measured_time_takes_the_place_of_flops():
    assert plan(replace(WORK, seconds_pair=0.25), Cluster(GPU, gpus=8)).arithmetic == 8.0


def test_the_limit_that_is_nearest_comes_first_and_is_reached_with_more_gpus():
    # 1.6 s of arithmetic a pair, so that encoding is no limit before there are many GPUs.
    work = replace(WORK, steps=40_000, rows=0)
    loads = plan(work, Cluster(GPU, gpus=8)).loads
    assert list(loads.values()) == sorted(loads.values(), reverse=True)
    assert loads["memory of a GPU, activations not counted"] == 0.25
    places = reached(work, Cluster(GPU, gpus=8, network=1e9))
    # 64 pairs each on 4 GPUs; of two machines communication takes 7.5 s beside 2.56 s.
    assert places["communication against arithmetic"] == 16
    assert places["memory of a GPU, activations not counted"] is None
    assert reached(replace(work, rows=10**12), Cluster(GPU, gpus=8))["metrics against what the store takes"] == 8
    assert STORE_ROWS < 10**12 / (40_000 * 5.16)


CASES = [("ddp", 1), ("ddp", 2), ("fsdp", 1), ("fsdp", 2)]


@pytest.fixture(scope="module")
def handed(tmp_path_factory):
    """What two processes hand to collectives in a step, by case: one list of both processes' each."""
    found = collectives(tmp_path_factory.mktemp("ranks"), CASES)
    return dict(zip(CASES, zip(*found, strict=True), strict=True))


@pytest.mark.parametrize(("how", "accumulation"), CASES)
def test_bytes_are_those_that_two_processes_hand_to_gloo(handed, how, accumulation):
    """One step of the real loop, tiny denoiser; what hooks see is what `payload` says."""
    weights = sum(p.numel() for p in random_backend(SHAPES["tiny"], torch.device("meta")).denoiser().parameters())
    expected = payload(costs.Cost(0, 0, 0, weights, weights), how == "fsdp", accumulation)
    assert len(handed[how, accumulation]) == 2
    for found in handed[how, accumulation]:
        assert found["reduced"] == expected.reduced
        # fsdp fills tensors up to a multiple of the processes.
        assert found["gathered"] == pytest.approx(expected.gathered, rel=0.01)
        assert found["scattered"] == pytest.approx(expected.scattered, rel=0.01)


def test_the_encoder_and_the_store_follow_from_the_shape():
    images, caption = costs.encoder_flops(SHAPES["sd15"])
    assert caption == 2 * 77 * 84_934_656
    # A convolution of the first level by hand is 2 * 9 * 128 * 128 * 512 * 512 FLOPs an image; there are 4 like it.
    assert images > 2 * 4 * 2 * 9 * 128 * 128 * 512 * 512
    # Cost grows as pixels do, but for the attention in the middle.
    assert 4 < costs.encoder_flops(SHAPES["sdxl"])[0] / images < 5
    backend = random_backend(SHAPES["tiny"], torch.device("cpu"))
    (shard,) = random_pairs(SHAPES["tiny"], backend, 4).shards
    of_text = sum(x.nbytes for name, x in shard.items() if name.startswith("text."))
    of_pairs = sum(x.nbytes for x in shard.values()) - of_text
    assert costs.store_bytes(SHAPES["tiny"], "float16") == (of_pairs / 4, of_text / 4)


def test_logged_values_are_all_metrics_once_where_a_run_has_one_step():
    config = resolve({"train.steps": 1, "reference.policy": "update", "reference.interval": 2})
    assert logged_values(config) == len(metric_names(config))
    more = resolve({"train.steps": 33, "diagnostics.interval": 16, "reference.policy": "frozen"})
    less = resolve({"train.steps": 32, "diagnostics.interval": 16, "reference.policy": "frozen"})
    # A step, and a pass: the policy's distance, what validation and the sample grid show, a margin a bucket.
    assert logged_values(more) - logged_values(less) == 13 + 2 + 7 + 3 + 10


def test_the_command_prints_and_writes_a_plan(tmp_path, monkeypatch):
    monkeypatch.setattr(costs, "count", lambda shape, lora: replace(COST, trained=COST.weights // (100 if lora else 1)))
    monkeypatch.setattr(costs, "encoder_flops", lambda shape: (4e12, 1e9))
    told = ["--plan", "--shape", "sd15", "--gpus", "16", "--out", str(tmp_path)]
    done = CliRunner().invoke(throughput.main, told)
    assert done.exit_code == 0, done.output
    assert "| pairs a pass x passes x GPUs | 8 x 16 x 16 |" in done.output
    found = json.loads((tmp_path / "plan.json").read_text())
    assert [*found] == ["sd15 full, 16 GPUs", "sd15 lora, 16 GPUs"]
    one = plan(replace(Work(**found["sd15 full, 16 GPUs"]["plan"]["work"]), cost=COST), Cluster(GPUS["H100"], gpus=16))
    assert one.step == pytest.approx(
        found["sd15 full, 16 GPUs"]["plan"]["arithmetic"] + one.optimizer + one.communication
    )
    assert "| sd15 full, 16 GPUs | sd15 lora, 16 GPUs |" in (tmp_path / "plan.md").read_text()

    (tmp_path / "measured.json").write_text(
        json.dumps(
            [
                {
                    "shape": "sd15", "variant": "full", "problem": "", "batch": 8, "compile": "no",
                    "checkpointing": "yes", "device": "NVIDIA H100 80GB HBM3", "measured": {"seconds": 0.035},
                }
            ]
        )
    )  # fmt: skip
    measured = [*told, "--measured", str(tmp_path / "measured.json"), "--variant"]
    output = CliRunner().invoke(throughput.main, [*measured, "full"]).output
    # 128 pairs of 35 ms, 4.48 s, less 16 times the optimizer's 12 ms: 40 bytes of 10^9 weights at 3.35 TB/s.
    assert "| of it arithmetic, s | 4.3 |" in output
    says = "NVIDIA H100 80GB HBM3, 8 pairs a pass, compile: no, checkpointing: yes"
    assert f"| arithmetic measured on | {says} |" in output
    for more, says in (
        ([*measured, "lora"], "holds no measurement of sd15 lora"),
        ([*told, "--variant", "lora", "--set", "train.parallel=fsdp"], "LoRA trains so few weights"),
        ([*told, "--shape", "sana"], "--plan knows the encoders of sd, sdxl, sd3, flux1 alone"),
        ([*told, "--shape", "tiny"], "--shape tiny: --plan knows the encoders of"),
        ([*told, "--set", "model.resolution=768"], "model.resolution = 768: --plan counts sd15 at 512 pixels alone"),
        ([*told, "--gpus", "5000"], "a step has 2048 pairs"),
        ([*told, "--gpus", "3"], "which passes of 8 pairs on each GPU do not come to"),
        ([*measured, "full", "--gpu", "A100"], "sd15 full was measured on NVIDIA H100 80GB HBM3, the plan is of A100s"),
    ):
        done = CliRunner().invoke(throughput.main, more)
        assert done.exit_code != 0 and says in str(done.output) + str(done.exception)
