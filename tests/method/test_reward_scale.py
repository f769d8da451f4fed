import pytest
import torch
from diffusers import DDPMScheduler

from workbench.method.reward_scale import SHAPES, constant, inverse_sqrt_snr, power, scale

ABAR = DDPMScheduler(beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear").alphas_cumprod.double()


@pytest.mark.parametrize("name", [n for n in SHAPES if n != "constant"])
def test_every_shape_runs_from_1_to_2_and_never_falls_with_noise(name):
    lam = scale(SHAPES[name](ABAR))
    assert lam.shape == ABAR.shape and lam.dtype == torch.float32
    assert lam.min().item() == pytest.approx(1) and lam.max().item() == pytest.approx(2)
    assert (lam.diff() >= 0).all()


def test_constant_is_one_everywhere():
    assert (scale(constant(ABAR)) == 1).all()


def test_the_papers_shape_on_sd15s_schedule():
    lam = scale(inverse_sqrt_snr(ABAR))
    assert lam[500].item() == pytest.approx(1.109, abs=5e-4)
    assert lam[900].item() == pytest.approx(1.570, abs=5e-4)
    assert lam[999].item() == pytest.approx(2)
    assert lam.mean().item() == pytest.approx(1.205, abs=5e-4)


def test_power_one_half_is_the_papers():
    torch.testing.assert_close(scale(power(ABAR, exponent=0.5)), scale(inverse_sqrt_snr(ABAR)))


def test_rise_sets_the_top_and_unit_mean_the_mean():
    assert scale(inverse_sqrt_snr(ABAR), rise=3.0).max().item() == pytest.approx(4)
    assert scale(inverse_sqrt_snr(ABAR), rise=-0.5).min().item() == pytest.approx(0.5)
    assert scale(inverse_sqrt_snr(ABAR), unit_mean=True).mean().item() == pytest.approx(1)
