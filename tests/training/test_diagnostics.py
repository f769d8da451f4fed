import numpy as np
import pytest
import torch

from workbench.common.contact_sheet import contact_sheet
from workbench.data.encoding import encode
from workbench.data.rows import open_rows
from workbench.method.noise import squared_error
from workbench.models import load
from workbench.training.diagnostics import BucketDiagnostics, Probe, bucket_means
from workbench.training.samples import Samples, compare

CPU = torch.device("cpu")


@pytest.fixture
def parts(tiny_model, tiny_pairs, workplace):
    backend = load(str(tiny_model), CPU)
    pairs = encode(open_rows(str(tiny_pairs), "train"), backend)
    moved = backend.denoiser()
    with torch.no_grad():
        for parameter in moved.parameters():
            parameter += 0.02 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(parameter.numel()))
    return backend, pairs, backend.denoiser(), moved


def test_the_pretrained_model_has_not_moved_from_itself(parts):
    backend, pairs, pretrained, _ = parts
    probe = Probe(backend.denoise, pretrained, pairs, backend.process, size=16, device=CPU)
    assert probe(pretrained) == (0.0, 0.0, 0.0)


def test_the_probe_is_eq_8_on_its_own_draws_whatever_the_batch(parts):
    backend, pairs, pretrained, moved = parts
    probe = Probe(backend.denoise, pretrained, pairs, backend.process, size=16, device=CPU, batch_size=5)
    with torch.no_grad():
        errors = [
            squared_error(backend.denoise(m, probe.x_t, probe.t, probe.condition), probe.target).mean()
            for m in (moved, pretrained)
        ]
    found = probe(moved)
    assert found.error_difference == pytest.approx((errors[0] - errors[1]).item(), abs=1e-5)
    assert found.kernel_kl > 0
    every = squared_error(backend.denoise(moved, probe.x_t, probe.t, probe.condition), probe.target) - probe.error_init
    assert found.error == pytest.approx((every.std() / 4).item(), rel=1e-3)  # 16 images


def test_the_probe_is_stratified_over_timesteps(parts):
    backend, pairs, pretrained, _ = parts
    probe = Probe(backend.denoise, pretrained, pairs, backend.process, size=20, device=CPU)
    assert sorted((probe.t // 50).tolist()) == list(range(20))


def diagnostics(parts, draws, curve=24):
    backend, pairs, pretrained, _ = parts
    return BucketDiagnostics(
        backend.denoise, pretrained, pairs, backend.process,
        pretrained_digest="x", buckets=10, curve=curve, draws=draws, device=CPU, batch_size=7,
    )  # fmt: skip


def test_every_bucket_counts_every_pair_when_all_are_drawn(parts):
    metrics = diagnostics(parts, 10)(parts[3], full=True)
    counts = {k: v for k, v in metrics.items() if k.startswith("timestep_count/")}
    assert len(counts) == 10 and set(counts.values()) == {24}


def test_the_pretrained_model_has_no_reward_and_accuracy_one_half(parts):
    metrics = diagnostics(parts, 3)(parts[2], full=True)
    for name, value in metrics.items():
        if name.startswith(("timestep_reward", "timestep_margin/", "timestep_divergence/")):
            assert value == 0
        if name.startswith("timestep_accuracy/"):
            assert value == 0.5


def test_divergence_by_bucket_is_the_winners_error_difference(parts):
    _, _, pretrained, moved = parts
    d = diagnostics(parts, 1)
    metrics = d(moved, full=True)
    inside = [i for i in range(24) if i % 10 == 3]  # draw 0 of the i-th pair lies in bucket i mod 10
    assert metrics["timestep_count/t300-399"] == len(inside)
    errors = d._errors(moved, 0, 24)[0] - d._errors(pretrained, 0, 24)[0]
    assert metrics["timestep_divergence/t300-399"] == pytest.approx(errors[inside].mean().item(), abs=1e-6)


def test_the_points_of_a_curve_see_the_same_pairs_and_noise_whether_the_pass_is_full_or_not(parts):
    d = diagnostics(parts, 2, curve=14)
    short, full = d(parts[3], full=False), d(parts[3], full=True)
    means = {f"validation/{name}" for name in (*d.MEANS, *d.ROBUST)}
    assert set(short) < set(full) and {name for name in short if name.startswith("validation/")} == means
    assert short == pytest.approx({name: full[name] for name in short}, abs=1e-6)
    errors, init = d._errors(parts[3], 0, 24)[:, :14], d._errors(parts[2], 0, 24)[:, :14]
    margin = ((init[0] - errors[0]) - (init[1] - errors[1])).mean().item()
    assert short["validation/margin"] == pytest.approx(margin, abs=1e-6)


def test_the_margins_error_is_that_of_a_mean_over_strata(parts):
    d = diagnostics(parts, 1)
    short, table = d(parts[3], full=False), d._table(parts[3], 0, 24)
    by_bucket = [table["margin"][table["bucket"] == bucket] for bucket in range(10)]  # of 2 or 3 pairs
    for bucket, values in enumerate(by_bucket):
        assert short[f"validation_margin/t{100 * bucket:03d}-{100 * bucket + 99:03d}"] == pytest.approx(values.mean())
    variance = sum(len(values) * values.var(ddof=1) for values in by_bucket) / 24**2
    assert short["validation/margin_error"] == pytest.approx(variance**0.5)
    assert short["validation/margin_median"] == pytest.approx(np.median(table["margin"]))


def test_a_curve_is_over_all_pairs_where_there_are_fewer(parts):
    assert diagnostics(parts, 1, curve=1000)(parts[3], full=False) == diagnostics(parts, 1)(parts[3], full=False)


def test_pretrained_errors_come_from_the_cache_the_second_time(parts):
    first = diagnostics(parts, 2)(parts[3], full=True)
    backend, pairs, _, _ = parts
    again = diagnostics((backend, pairs, None, None), 2)(parts[3], full=True)
    assert first == again


def test_lambda_by_bucket():
    means = bucket_means(torch.arange(100.0), 10)
    assert means["timestep_lambda/t00-09"] == pytest.approx(4.5)
    assert means["timestep_lambda/t90-99"] == pytest.approx(94.5)


def test_compare_counts_ties_as_half_and_resamples_prompts():
    captions, seeds, images = ["a", "b", "a", "b"], [0, 0, 1, 1], np.zeros((4, 2, 2, 3), np.uint8)
    ours = Samples(captions, seeds, images, np.array([1.0, 0.0, 1.0, 0.0]), np.full(4, -1.0), {"colour": np.ones(4)})
    theirs = Samples(captions, seeds, images, np.zeros(4), np.full(4, -3.0), {"colour": np.full(4, 0.25)})
    result = compare(ours, theirs)
    assert result["eval/win_rate"] == pytest.approx(0.75)
    assert result["eval/reward_gain"] == pytest.approx(0.5)
    assert (result["eval/judge"], result["eval/judge_gain"]) == (-1.0, 2.0)
    assert result["eval/colour_gain"] == pytest.approx(0.75)
    assert (result["eval/win_rate_low"], result["eval/win_rate_high"]) == (0.5, 1.0)  # two prompts: one won, one tied


def test_contact_sheet_goes_row_by_row():
    images = np.stack([np.full((2, 2, 3), i, np.uint8) for i in range(5)])
    sheet = contact_sheet(images, columns=3, zoom=1)
    assert sheet.shape == (4, 6, 3)
    assert sheet[0, ::2, 0].tolist() == [0, 1, 2] and sheet[2, ::2, 0].tolist() == [3, 4, 255]
