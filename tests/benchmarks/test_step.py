"""What the training step is measured against; no times are looked at."""

from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from click.testing import CliRunner

from workbench import profile
from workbench.benchmarks import limits, memory, step
from workbench.benchmarks.figure import Options
from workbench.method.noise import squared_error
from workbench.models import SHAPES, random_backend
from workbench.training.loop import as_floats

CPU = torch.device("cpu")
OPTIONS = Options(repeats=2, device=CPU, folder=Path())


@pytest.fixture
def tiny(monkeypatch):
    monkeypatch.setattr(step, "MODELS", ("tiny",))
    monkeypatch.setattr(step, "SIZES", (1,))


def test_the_34m_shape_has_sd15_blocks_and_34_million_weights():
    ours, theirs = SHAPES["sd34m"].denoiser, SHAPES["sd15"].denoiser
    assert all(ours[kind] == theirs[kind] for kind in ("down_block_types", "up_block_types"))
    weights = sum(p.numel() for p in random_backend(SHAPES["sd34m"], torch.device("meta")).denoiser().parameters())
    assert 33.5e6 < weights < 34.5e6


@pytest.mark.parametrize("rank", [0, 4])
def test_the_floor_predicts_what_the_step_predicts_to_the_bit(rank):
    made = step.loop(*step.open_model("tiny", CPU), pairs=3, rank=rank)
    learned = []
    for parameter in made.training.policy.parameters():
        parameter.register_post_accumulate_grad_hook(lambda p: learned.append(bool(p.grad.any())))
    predicted, fixed = made.floor()
    assert torch.equal(predicted, fixed)  # nothing is learned yet
    assert any(learned) and all(p.grad is None for p in made.training.policy.parameters())
    winner, loser = squared_error(predicted, made.inputs.target).chunk(2)
    (record,) = as_floats([made.step()])
    assert (record["train/error_winner"], record["train/error_loser"]) == (winner.mean().item(), loser.mean().item())


def test_a_loop_goes_on_without_moving_its_reference():
    made = step.loop(*step.open_model("tiny", CPU), pairs=2)
    assert [made.step().step for _ in range(3)] == [1, 2, 3]
    assert made.training.reference.updates == 0
    predicted, fixed = made.floor()
    assert not torch.equal(predicted, fixed)


def test_each_ratio_has_its_goal_and_a_control_in_the_same_rounds(tiny):
    found = list(step.steps(OPTIONS))
    ratios, controls, floors = found[::3], found[1::3], found[2::3]
    assert [(f.name, f.goal) for f in ratios] == [
        ("training step / floor: tiny, full, 1 pairs", 1.05),
        ("training step / floor: tiny, LoRA, 1 pairs", 1.10),
    ]
    assert all(f.name.startswith("control") and f.goal == 1.02 for f in controls)
    assert all(f.unit == "ms" and f.goal is None and f.met is None for f in floors)
    assert all(f.met == (f.median <= f.goal) for f in ratios)


def test_the_reference_s_moves_are_shares_of_the_steps_between_them(tiny):
    *found, of_study, _ = step.machinery(OPTIONS)
    for probe, (rarely, often, update) in ((32, found[:3]), (256, found[3:])):
        assert (rarely.goal, often.goal, update.goal) == (1.0, 4.0, None)
        assert often.median == pytest.approx(4 * rarely.median)
        assert all(f.name.endswith(f"tiny, 8 pairs, probe of {probe}") for f in (rarely, often, update))
    assert of_study.name == "reference moved every 4 steps: the default study's tiny, 4 pairs, probe of 128"
    assert of_study.goal == 16.0


def test_limits_are_rates_and_shares_of_them(tiny, monkeypatch):
    monkeypatch.setattr(limits, "MODELS", ("tiny",))
    monkeypatch.setattr(limits, "COPIED", 2**16)
    found = list(limits.limits(OPTIONS))
    assert [f.unit for f in found] == ["GFLOP/s", "GB/s", "%", "ms", "%"] and all(f.median > 0 for f in found)
    assert found[2].median < 100  # nothing multiplies faster than a matrix product


@pytest.mark.parametrize("rank", [0, 4])
def test_both_sides_of_the_memory_figure_take_their_steps(rank):
    memory.train("tiny", rank, CPU, 8)
    memory.floor("tiny", rank, CPU)


@pytest.mark.slow
def test_memory_is_that_of_a_process_of_its_own():
    large = memory.in_new_process("floor", "sd34m", 0, CPU, 8)
    assert large > 2 * 4 * 34e6  # two sets of weights and more


def test_profile_writes_a_table_and_a_trace(tmp_path):
    asked = ["--model", "tiny", "--pairs", "1", "--steps", "1", "--device", "cpu", "--out", str(tmp_path)]
    result = CliRunner().invoke(profile.main, asked, catch_exceptions=False)
    assert result.exit_code == 0, result.output
    text = (tmp_path / "profile.md").read_text()
    assert "| **total** |" in text and "aten::_fused_adamw_ |" in text and profile.PYTHON in text
    assert (tmp_path / "trace.json").read_text().count("aten::")


def test_kernels_of_a_gpu_count_once_and_have_a_kind():
    """As torch's profiler returns them: an operator, its kernel of the same time, and a mark around both."""
    from torch.autograd import DeviceType

    def event(key, device_type, mark=False):
        return SimpleNamespace(
            key=key, device_type=device_type, is_user_annotation=mark, count=4, self_device_time_total=6000.0
        )

    events = [
        event("aten::mm", DeviceType.CPU),
        event("nvjet_sm90_tst_320x128", DeviceType.CUDA),
        event(profile.PYTHON, DeviceType.CUDA, mark=True),
    ]
    assert profile.own_times(events, 2, torch.device("cuda")) == {"nvjet_sm90_tst_320x128": (3.0, 2.0)}


@pytest.mark.parametrize(
    ("kernel", "kind"),
    [
        ("cudnn_generated_fort_native_sdpa_sm90_flash_bprop_wgmma_f16", "attention"),
        ("void cudnn::engines_precompiled::nchwToNhwcKernel<__nv_bfloat16", "change of layout"),
        ("sm90_xmma_wgrad_indexed_implicit_gemm_bf16bf16", "matrix product, convolution"),
        ("void at::native::(anonymous namespace)::RowwiseMomentsCUDAKernel<float>", "norm"),
        ("void at::native::(anonymous namespace)::multi_tensor_apply_kernel<", "optimizer, clipping"),
        ("void at::native::unrolled_elementwise_kernel<at::native::direct_copy_kernel_cuda(", "copy, cast"),
        ("void at::native::vectorized_elementwise_kernel<4, at::native::silu_kernel", "elementwise"),
        (
            "void at::native::elementwise_kernel<128, 4, at::native::gpu_kernel_impl_nocast<"
            "at::native::direct_copy_kernel_cuda(at::TensorIteratorBase&)::{lambda()#3}",
            "copy, cast",
        ),
        ("void at::native::lpnorm_cleanup<float, (at::native::NormType)1, float>", "optimizer, clipping"),
        ("void at::native::(anonymous namespace)::CatArrayBatchedCopy_vectorized<", "concatenation"),
        ("void something_else", "other"),
    ],
)  # fmt: skip
def test_kernels_have_their_kind(kernel, kind):
    assert profile.kind_of(kernel) == kind


def test_profile_knows_its_models(tmp_path):
    result = CliRunner().invoke(profile.main, ["--model", "none", "--out", str(tmp_path)])
    assert result.exit_code == 2 and "expected embedded, sd15" in result.output
