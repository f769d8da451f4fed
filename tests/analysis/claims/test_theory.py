import pytest
import torch

from workbench.analysis.claims.theory import gaussian_divergences, margin_gradients

ABAR = torch.cumprod(1 - torch.linspace(0.00085**0.5, 0.012**0.5, 1000) ** 2, 0)


@pytest.mark.parametrize("seed", range(3))
def test_a_softmax_margins_gradient_stays_below_its_bound_at_every_scale(seed):
    found = margin_gradients(seed)
    assert (found.softmax <= found.bound).all() and (found.softmax > 0).all()
    assert found.softmax[-1] < 10 * found.softmax[0] and found.scales[-1] == 10_000


def test_a_squared_errors_gradient_grows_with_the_error():
    found = margin_gradients(0)
    assert found.squared[-1] > 1000 * found.squared[0]


def test_both_divergences_agree_with_the_optimal_denoiser_and_not_with_another():
    optimal = gaussian_divergences(0, ABAR)
    assert optimal.error_difference == pytest.approx(optimal.kernel_kl, rel=0.05)
    other = [gaussian_divergences(seed, ABAR, optimal=False) for seed in range(5)]
    assert any(abs(o.error_difference / o.kernel_kl - 1) > 0.2 for o in other)
