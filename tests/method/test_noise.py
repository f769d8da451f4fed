import pytest
import torch
from diffusers import DDIMScheduler, DDPMScheduler, FlowMatchEulerDiscreteScheduler

from workbench.method.noise import bucket_names, bucket_of, diffusion, flow, snr, squared_error, stratified

SD15 = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear", "num_train_timesteps": 1000}


@pytest.mark.parametrize("predicts", ["epsilon", "v_prediction"])
def test_the_diffusion_process_agrees_with_diffusers(predicts):
    scheduler = DDPMScheduler(**SD15, prediction_type=predicts)
    x0, eps = torch.randn(5, 4, 8, 8), torch.randn(5, 4, 8, 8)
    t = torch.tensor([0, 1, 500, 998, 999])
    process = diffusion(scheduler.alphas_cumprod, predicts)
    torch.testing.assert_close(process.x_t(x0, eps, t), scheduler.add_noise(x0, eps, t))
    target = eps if predicts == "epsilon" else scheduler.get_velocity(x0, eps, t)
    torch.testing.assert_close(process.target(x0, eps, t), target, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(process.abar, scheduler.alphas_cumprod)


def test_the_flow_agrees_with_diffusers_and_has_diffusions_terms():
    scheduler = FlowMatchEulerDiscreteScheduler(shift=3.0)
    process = flow(scheduler.sigmas.flip(0), scheduler.timesteps.flip(0))
    x0, eps = torch.randn(3, 4, 8, 8), torch.randn(3, 4, 8, 8)
    t = torch.tensor([0, 500, 999])
    scheduler.set_begin_index(None)
    torch.testing.assert_close(process.x_t(x0, eps, t), scheduler.scale_noise(x0, process.time[t], eps))
    torch.testing.assert_close(process.target(x0, eps, t), eps - x0)
    sigma = scheduler.sigmas.flip(0)[500]
    torch.testing.assert_close(snr(process.abar)[500], ((1 - sigma) / sigma) ** 2)
    assert process.abar[999] == 0 and (process.x_t(x0, eps, t)[2] == eps[2]).all()


def test_snr_is_the_ratio_of_signal_to_noise_power():
    abar = DDIMScheduler(**SD15).alphas_cumprod
    torch.testing.assert_close(snr(abar) * (1 - abar), abar)


def test_squared_error_is_a_mean_over_elements_in_float32():
    a = torch.full((2, 3, 4), 2.0, dtype=torch.bfloat16)
    error = squared_error(a, torch.zeros_like(a))
    assert error.dtype == torch.float32
    assert error.tolist() == [4.0, 4.0]


def test_buckets_are_equal_intervals_with_sortable_names():
    names = bucket_names(10, 1000)
    assert names[0] == "t000-099" and names[-1] == "t900-999" and names == sorted(names)
    assert bucket_of(torch.tensor([0, 99, 100, 999]), 10, 1000).tolist() == [0, 0, 1, 9]


@pytest.mark.parametrize("buckets", [3, 7, 10])
def test_names_state_the_timesteps_that_fall_into_each_bucket(buckets):
    t = torch.arange(1000)
    for i, name in enumerate(bucket_names(buckets, 1000)):
        inside = t[bucket_of(t, buckets, 1000) == i]
        assert name == f"t{inside[0]:03d}-{inside[-1]:03d}"


def test_stratified_draws_lie_in_their_buckets_and_cover_them():
    t = stratified(torch.rand(7, 10), torch.arange(7) % 10, 10, 1000)
    buckets = bucket_of(t, 10, 1000)
    assert (buckets[:, 0] == torch.arange(7)).all()
    assert (buckets.sort(1).values == torch.arange(10)).all()


def test_stratified_never_leaves_the_range_at_the_edge_of_the_unit_interval():
    edge = torch.full((1, 1), 1 - 2**-24)
    assert stratified(edge, torch.tensor([9]), 10, 1000).item() == 999
