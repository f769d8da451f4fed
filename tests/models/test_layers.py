"""Denoisers' layers as they are changed: norms in their input's precision."""

import pytest
import torch
from diffusers.models import normalization
from torch import nn

from workbench.models.layers import prepare

NORMS = {
    "group": lambda: nn.GroupNorm(4, 8),
    "layer": lambda: nn.LayerNorm(8),
    "layer without weights": lambda: nn.LayerNorm(8, elementwise_affine=False),
    "RMS": lambda: nn.RMSNorm(8, eps=1e-6),
    "diffusers' RMS": lambda: normalization.RMSNorm(8, eps=1e-6),
    "diffusers' RMS with a bias": lambda: normalization.RMSNorm(8, eps=1e-6, bias=True),
}


def _norm(kind):
    """A prepared norm of weights that are not 1 and 0, and a plain one of the same weights."""
    g = torch.Generator().manual_seed(0)
    made = [nn.Sequential(NORMS[kind]()) for _ in range(2)]
    with torch.no_grad():
        for ours, theirs in zip(*(m.parameters() for m in made), strict=True):
            ours.copy_(1 + 0.3 * torch.randn(8, generator=g))
            theirs.copy_(ours)
    return prepare(made[0]), made[1]


@pytest.fixture
def x():
    return torch.randn(16, 8, generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize("kind", NORMS)
def test_a_norm_in_float32_is_the_plain_one_to_the_bit(kind, x):
    ours, plain = _norm(kind)
    assert torch.equal(ours(x), plain(x))


@pytest.mark.parametrize("kind", NORMS)
def test_a_norm_of_half_precision_is_one_kernel_that_autocast_does_not_see(kind, x, monkeypatch):
    """A GPU's autocast would cast its input to float32; the CPU's leaves norms alone, and cannot show it."""
    seen = []
    for name in ("group_norm", "layer_norm", "rms_norm"):
        real = getattr(nn.functional, name)

        def norm(x, shape, weight=None, *rest, _real=real):
            seen.append((torch.is_autocast_enabled("cpu"), x.dtype, None if weight is None else weight.dtype))
            return _real(x, shape, weight, *rest)

        monkeypatch.setattr(nn.functional, name, norm)
    ours, _ = _norm(kind)
    with torch.autocast("cpu", torch.bfloat16):
        ours(x.bfloat16())
        assert torch.is_autocast_enabled("cpu")
    assert seen == [(False, torch.bfloat16, None if kind == "layer without weights" else torch.bfloat16)]


@pytest.mark.parametrize("kind", NORMS)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_a_norm_of_half_precision_is_near_the_one_in_float32_and_stays_there(kind, dtype, x):
    ours, plain = _norm(kind)
    half = x.to(dtype).requires_grad_(True)
    with torch.autocast("cpu", dtype):
        result = ours(half)
    assert result.dtype == dtype
    exact = plain(half.detach().float())
    # Weight, bias and result are rounded: three times half a unit in the last place, of numbers up to 4.
    assert (result.float() - exact).abs().max() < 4 * 1.5 * torch.finfo(dtype).eps
    result.float().square().sum().backward()
    assert half.grad.dtype == dtype and torch.isfinite(half.grad).all()
    assert all(p.grad.dtype == torch.float32 for p in ours.parameters())


def test_preparing_twice_changes_nothing_more():
    model = nn.Sequential(nn.Linear(8, 8), nn.LayerNorm(8))
    once = [type(m) for m in prepare(model)]
    assert [type(m) for m in prepare(model)] == once
    assert len(model[0]._forward_pre_hooks) == 1
