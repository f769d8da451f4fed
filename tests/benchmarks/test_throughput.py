"""FLOPs, memory and times of the real models' shapes; nothing here needs a GPU."""

import dataclasses
import json

import pytest
import torch
from click.testing import CliRunner

from workbench import throughput
from workbench.benchmarks import costs, measurement
from workbench.models import SHAPES, Shape, random_backend
from workbench.training.config import resolve
from workbench.training.experiment_file import load

META, CPU = torch.device("meta"), torch.device("cpu")


@pytest.fixture(autouse=True, scope="module")
def counted_once():
    """A shape is counted once for all tests: torch's counter takes seconds for each."""
    real, known = costs.count, {}

    def count(shape: Shape, lora: int = 0) -> costs.Cost:
        key = json.dumps([dataclasses.asdict(shape), lora], sort_keys=True, default=str)
        return known[key] if key in known else known.setdefault(key, real(shape, lora))

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(costs, "count", count)
        yield


@pytest.mark.parametrize(
    ("name", "weights", "resolution"),
    [
        ("sd15", 859_520_964, 512),
        ("sdxl", 2_567_463_684, 1024),
        ("sd3", 2_028_328_000, 1024),
        ("flux1", 11_901_408_320, 1024),
        ("flux2-klein", 3_875_544_576, 1024),
        ("qwen-image", 20_430_401_088, 1024),
        ("z-image", 6_154_908_736, 1024),
        ("sana", 1_604_462_752, 1024),
    ],
)
def test_a_shape_has_the_published_number_of_weights_and_resolution(name, weights, resolution):
    backend = random_backend(SHAPES[name], META)
    assert sum(p.numel() for p in backend.denoiser().parameters()) == weights
    assert backend.resolution == resolution and backend.timesteps == 1000


def test_random_denoisers_are_alike_and_leave_the_global_generator_alone():
    backend = random_backend(SHAPES["tiny"], CPU)
    torch.manual_seed(5)
    expected = torch.rand(3)
    torch.manual_seed(5)
    first, second = backend.denoiser(), backend.denoiser()
    assert torch.equal(torch.rand(3), expected)
    for a, b in zip(first.parameters(), second.parameters(), strict=True):
        assert torch.equal(a, b) and not a.requires_grad


def test_flops_of_a_transformer_are_those_of_its_matrices():
    """One SD3 block by hand: with n image and m text tokens of width d, every matrix and both attention products."""
    one, two = (costs.count(small_sd3(layers)).forward for layers in (2, 3))  # a middle layer alone
    n, m, d = 16, 6, 32
    linear = 2 * (n + m) * (4 * d * d + 8 * d * d)  # q, k, v, out and the two of the feed-forward part
    attention = 2 * 2 * (n + m) ** 2 * d
    modulation = 2 * 2 * d * 6 * d
    assert two - one == linear + attention + modulation


def small_sd3(layers: int) -> Shape:
    return Shape(
        "sd3",
        {
            "in_channels": 4, "out_channels": 4, "sample_size": 8, "patch_size": 2, "num_layers": layers,
            "attention_head_dim": 8, "num_attention_heads": 4, "joint_attention_dim": 24, "caption_projection_dim": 32,
            "pooled_projection_dim": 16, "pos_embed_max_size": 8,
        },
        {"text": (6, 24), "pooled": (16,)},
        scheduler={"shift": 3.0},
    )  # fmt: skip


def test_lora_takes_about_six_forward_passes_and_checkpointing_up_to_two_more():
    lora = costs.count(SHAPES["tiny"], lora=4)
    assert lora.step / lora.forward == pytest.approx(6.2, abs=0.15)
    assert (lora.recomputed - lora.step) / lora.forward == pytest.approx(1.5, abs=0.5)
    assert lora.weights == sum(p.numel() for p in random_backend(SHAPES["tiny"], META).denoiser().parameters())
    assert lora.trained < 0.3 * lora.weights


def test_hours_follow_from_pairs_flops_and_rate():
    assert costs.gpu_hours(1000, 3.6e12, 1e12) == 1.0
    settings = load(throughput.EXPERIMENTS / "sd15.toml").flat()
    assert costs.pairs_of(settings) == 2000 * 2048


def test_counted_table_is_printed_and_written(tmp_path):
    done = CliRunner().invoke(throughput.main, ["--shape", "sd15", "--variant", "full", "--out", str(tmp_path)])
    assert done.exit_code == 0, done.output
    assert "| sd15 | full | 6.4 | 7.6 | 17 | 4,096,000 | no checkpointing | 18 | 59 |" in done.output
    assert "not measured" in done.output
    (row,) = json.loads((tmp_path / "costs.json").read_text())
    full = costs.Cost(**row["cost"])
    assert full.trained == full.weights == 859_520_964
    assert full.forward == pytest.approx(0.803e12, rel=1e-3)
    assert full.step / full.forward == pytest.approx(8, abs=0.05)  # policy there and back, reference there
    assert (full.recomputed - full.step) / full.forward == pytest.approx(1.5, abs=0.5)
    assert costs.state_bytes(full, "adamw") == pytest.approx(20 * 0.8595e9, rel=1e-3)
    head = (throughput.EXPERIMENTS / "sd15.toml").read_text().split("[model]")[0]
    assert all(part in head for part in ("6.4 TFLOP a pair", "18 GPU-hours", "59 on an A100", "17 GB of weights"))


def test_measured_table_of_the_tiny_shape(tmp_path):
    arguments = "--measure --shape tiny --steps 4 --batch-size 2 --device cpu --out"
    done = CliRunner().invoke(throughput.main, [*arguments.split(), str(tmp_path)])
    assert done.exit_code == 0, done.output
    rows = json.loads((tmp_path / "measured.json").read_text())
    assert [row["variant"] for row in rows] == ["full", "lora"]
    for row in rows:
        assert row["exact"] == "yes" and row["steps"] == measurement.WARM + 4 + 1 and not row["problem"]
        assert row["measured"]["seconds"] > 0 and row["measured"]["updates"] > 0
    assert (tmp_path / "measured.md").read_text().count("| tiny |") == 2


def test_settings_of_a_real_model_are_measured_whatever_else_they_ask_for():
    """sd15.toml leaves out captions, and the empty one cannot be encoded: a shape has no text encoders."""
    settings = throughput._settings("sd15", "full", {"train.batch_size": 2, "model.dtype": "float32"})
    assert settings["data.caption_dropout"]
    assert not measurement.measure(settings, SHAPES["tiny"], steps=4, device=CPU).problem


@pytest.mark.parametrize(("shape", "alike"), [("sd15", False), ("sdxl", False), ("flux1", True), ("qwen-image", True)])
def test_of_a_transformer_the_blocks_are_compiled_and_a_u_net_as_a_whole(shape, alike):
    backend = random_backend(SHAPES[shape], META)
    denoiser = backend.denoiser()
    backend.compile(denoiser)
    compiled = {type(m).__name__ for m in denoiser.modules() if m._compiled_call_impl}
    assert compiled == (set(type(denoiser)._repeated_blocks) if alike else {type(denoiser).__name__})


def test_what_does_not_fit_is_a_line_and_is_tried_with_half_the_batch(tmp_path, monkeypatch):
    real = measurement.build

    def build(config, *parts):
        if config.train.batch_size > 2:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return real(config, *parts)

    monkeypatch.setattr(measurement, "build", build)
    arguments = "--measure --shape tiny --variant full --steps 4 --batch-size 8 --device cpu --out"
    done = CliRunner().invoke(throughput.main, [*arguments.split(), str(tmp_path)])
    assert done.exit_code == 0, done.output
    rows = json.loads((tmp_path / "measured.json").read_text())
    assert [(row["batch"], bool(row["problem"])) for row in rows] == [(8, True), (4, True), (2, False)]
    assert "out of memory at 8 pairs a pass" in done.output


def test_a_number_that_is_not_finite_is_a_result_too():
    settings = resolve({"train.lr": 1e30, "train.batch_size": 2, "train.clip": 1e30}).flat()
    found = measurement.measure(settings, SHAPES["tiny"], steps=8, device=CPU)
    assert "not finite" in found.problem and found.seconds == 0


def test_the_logit_test_can_fail(monkeypatch):
    """A reference in another half precision is not the policy."""
    real = measurement.build

    def build(config, *parts):
        training = real(config, *parts)
        training.reference.model.to(torch.float16)
        return training

    monkeypatch.setattr(measurement, "build", build)
    settings = resolve({"train.batch_size": 2, "model.dtype": "bfloat16"}).flat()
    assert not measurement.measure(settings, SHAPES["tiny"], steps=4, device=CPU).exact_zero
