import torch
from hypothesis import given
from hypothesis import strategies as st

from workbench.method.divergence import error_difference, kernel_kl
from workbench.method.noise import squared_error


@given(st.integers(0, 1000))
def test_eq_8_is_the_kernel_kl_and_a_cross_term(seed):
    g = torch.Generator().manual_seed(seed)
    eps, model, init = (torch.randn(3, 2, 4, 4, generator=g) for _ in range(3))
    eq8 = error_difference(squared_error(model, eps), squared_error(init, eps))
    cross = ((model - init) * (init - eps)).flatten(1).mean(1)
    torch.testing.assert_close(eq8, kernel_kl(model, init) + 2 * cross, atol=1e-5, rtol=1e-5)


def test_a_model_does_not_diverge_from_itself_and_the_kernel_kl_is_never_negative():
    eps, model, init = torch.randn(3, 8, 2, 4, 4)
    assert (error_difference(squared_error(model, eps), squared_error(model, eps)) == 0).all()
    assert (kernel_kl(model, model) == 0).all()
    assert (kernel_kl(model, init) > 0).all()


def test_where_the_pretrained_model_is_the_optimal_denoiser_the_two_agree_in_expectation():
    # x0 ~ N(0, 1), x_t = sqrt(a) x0 + sqrt(1 - a) eps: the MMSE estimate of eps is sqrt(1 - a) x_t.
    g, a, n = torch.Generator().manual_seed(0), 0.3, 200_000
    x0, eps = torch.randn(2, n, 1, generator=g)
    x_t = a**0.5 * x0 + (1 - a) ** 0.5 * eps
    init = (1 - a) ** 0.5 * x_t
    other = 0.6 * x_t + 0.1
    eq8 = error_difference(squared_error(other, eps), squared_error(init, eps)).mean()
    torch.testing.assert_close(eq8, kernel_kl(other, init).mean(), rtol=0.02, atol=0)
