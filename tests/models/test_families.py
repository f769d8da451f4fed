"""Every family against diffusers' own parts, on random weights of exactly its format."""

import json
import shutil
from typing import get_args

import diffusers
import numpy as np
import pytest
import torch
from torch import Generator, nn

from tests.support.families import NAMES
from tests.support.oracles import ORACLES, drawing, latents_of
from workbench.common.errors import UserError
from workbench.data.pairs import Batch
from workbench.method.objectives import dpo
from workbench.models import FAMILIES, adapt, load
from workbench.training.loop import pair_errors
from workbench.training.tables import Model

CPU = torch.device("cpu")
#: bfloat16, which loses the most, stands for both in every run; runs of other tests train in float32.
DTYPES = [pytest.param(torch.float32, marks=pytest.mark.slow), torch.bfloat16]
#: Z-Image's pipeline writes into the list that it is given: pass a copy.
CAPTIONS = ("a fox on a blue background, noto style", "a pig on a red background, twemoji style")


@pytest.fixture(params=NAMES)
def family(request, checkpoint):
    return request.param, checkpoint(request.param)


def plain(folder):
    return diffusers.DiffusionPipeline.from_pretrained(folder, torch_dtype=torch.float32)


def tiny(folder, dtype=torch.float32):
    return load(str(folder), CPU, dtype, resolution=32)


def batch(backend, seed=0, size=2):
    g = Generator().manual_seed(seed)
    x_w, x_l = torch.randn(2, size, *backend.latent_shape, generator=g)
    condition = backend.encode_text(CAPTIONS[:size])
    condition |= {k: torch.stack([v] * size) for k, v in backend.pair_condition(48, 40, 3, 1).items()}
    return Batch(x_w, x_l, condition)


@torch.no_grad()
def test_noised_latents_target_and_loss_are_those_of_diffusers_parts(family):
    name, folder = family
    backend = tiny(folder)
    data, t = batch(backend), torch.tensor([30, 970])
    eps = torch.randn(data.x_w.shape, generator=Generator().manual_seed(5))
    both = torch.cat([data.x_w, data.x_l]), torch.cat([eps, eps]), torch.cat([t, t])
    x_t, predicted, target = ORACLES[name](plain(folder), list(CAPTIONS * 2), *both)
    torch.testing.assert_close(backend.process.x_t(data.x_w, eps, t), x_t[:2])
    torch.testing.assert_close(backend.process.target(data.x_l, eps, t), target[2:])
    policy = backend.denoiser()
    errors = pair_errors(backend.denoise, policy, backend.denoiser(), data, t, eps, backend.process)
    m_w, m_l = (predicted - target).pow(2).mean(dim=[1, 2, 3]).chunk(2)
    torch.testing.assert_close(errors.policy_w, m_w, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(errors.policy_l, m_l, rtol=1e-4, atol=1e-5)
    fixed = torch.tensor([1.5, 1.0, 1.2, 0.9])  # another model's errors, to have a margin
    moved = errors._replace(reference_w=fixed[:2], reference_l=fixed[2:])
    ours = dpo(moved, torch.ones(2), beta=7.0).mean()
    logit = -0.5 * 7.0 * ((m_w - m_l) - (fixed[:2] - fixed[2:]))
    torch.testing.assert_close(ours, -nn.functional.logsigmoid(logit).mean(), rtol=1e-4, atol=1e-5)


def test_flux_without_a_guidance_input_and_with_a_constant_shift(checkpoint):
    """FLUX.1-schnell."""
    folder = checkpoint("flux1-schnell")
    backend = tiny(folder)
    sigma = torch.arange(1, 1001) / 1000
    torch.testing.assert_close(backend.process.noise, sigma)
    data, t = batch(backend), torch.tensor([30, 970])
    expected = ORACLES["flux1"](plain(folder), list(CAPTIONS), data.x_w, data.x_l, t)
    predicted = backend.denoise(backend.denoiser(), expected.x_t, t, data.condition)
    torch.testing.assert_close(predicted, expected.predicted, rtol=1e-4, atol=1e-5)


def test_a_long_caption_in_the_batch_changes_nothing_for_a_short_one(family):
    """Padding is part of the embedding or masked, but never depends on the other captions."""
    backend = tiny(family[1])
    short, long = CAPTIONS[0], ", ".join(CAPTIONS * 3)
    alone, together = backend.encode_text([short]), backend.encode_text([short, long])
    denoiser, data = backend.denoiser(), batch(backend)
    t, pair = torch.tensor([500, 500]), {k: v for k, v in data.condition.items() if k not in alone}
    for name, embedding in alone.items():
        assert embedding.shape[1:] == together[name].shape[1:]
        torch.testing.assert_close(together[name][:1], embedding, rtol=1e-4, atol=1e-5)
    predicted = backend.denoise(denoiser, data.x_w, t, together | pair)
    one = {k: v[:1] for k, v in pair.items()}
    expected = backend.denoise(denoiser, data.x_w[:1], t[:1], alone | one)
    torch.testing.assert_close(predicted[:1], expected, rtol=1e-4, atol=1e-5)


def test_latents_are_those_of_diffusers_parts(family):
    _, folder = family
    backend, pipe = tiny(folder), plain(folder)
    pixels = np.random.default_rng(0).integers(0, 256, (2, 32, 32, 3), dtype=np.uint8)
    with torch.no_grad():
        x = pipe.image_processor.preprocess(list(pixels.astype(np.float32) / 255))
        expected = latents_of(pipe, x)
    torch.testing.assert_close(backend.encode_images(pixels), expected)
    assert expected.shape[1:] == backend.latent_shape


def test_samples_are_those_of_the_plain_pipeline(family):
    name, folder = family
    backend, pipe = tiny(folder), plain(folder)
    ours = backend.sample(backend.denoiser(), CAPTIONS, [3, 4], steps=2, guidance=2.0, batch_size=1)
    if name == "sdxl":
        pipe.scheduler = backend.scheduler  # the checkpoint names Euler's
    images = pipe(
        prompt=list(CAPTIONS), num_inference_steps=2, height=32, width=32, output_type="np", **drawing(name, 2.0),
        generator=[Generator().manual_seed(s) for s in (3, 4)],
    ).images  # fmt: skip
    assert np.abs(ours.astype(float) - np.round(images * 255)).max() <= 1


def test_snr_falls_and_early_is_noisy_in_every_family(family):
    process = tiny(family[1]).process
    assert len(process) == 1000 and (process.abar.diff() < 0).all()
    assert process.noise[-1] > process.noise[0] and (process.time.diff() > 0).all()


@pytest.mark.parametrize("dtype", DTYPES)
def test_the_logit_is_exactly_zero_after_a_hard_copy(family, dtype):
    """Whole weights in float32 for the policy, halves for the reference: the same numbers to the bit."""
    from workbench.method.reference import Divergence, Reference, Rule

    backend = tiny(family[1], dtype)
    policy = backend.denoiser().requires_grad_(True)
    with torch.no_grad():
        for parameter in policy.parameters():
            parameter += 0.01 * torch.randn(parameter.shape, generator=Generator().manual_seed(parameter.numel()))
    reference = Reference(backend.denoiser(half=True), Rule(interval=1), lambda m: Divergence(0.0, 0.0), dict)
    data, t = batch(backend), torch.tensor([30, 970])
    errors = lambda: pair_errors(backend.denoise, policy, reference.model, data, t, data.x_l, backend.process)  # noqa: E731
    assert (errors().margin != 0).all() and errors().policy_w.dtype == torch.float32
    reference.after_step(1, policy)
    assert (errors().margin == 0).all() and (errors().distance_w == 0).all()


@pytest.mark.parametrize("dtype", DTYPES)
def test_adapters_policy_reference_and_pretrained_share_one_denoiser(family, dtype):
    from workbench.method.reference import Divergence, Reference, Rule

    backend = tiny(family[1], dtype)
    policy, other, pretrained = adapt(backend.denoiser(half=True), rank=2, alpha=2, targets=backend.LORA_TARGETS)
    data, t = batch(backend), torch.tensor([30, 970])
    alone = backend.denoiser()
    reference = Reference(other, Rule(interval=1), lambda m: Divergence(0.0, 0.0), dict)
    errors = lambda a, b: pair_errors(backend.denoise, a, b, data, t, data.x_l, backend.process)  # noqa: E731
    first = errors(policy, reference.model)
    assert (first.margin == 0).all() and torch.equal(first.policy_w, errors(alone, alone).policy_w)
    with torch.no_grad():
        for parameter in policy.parameters():
            parameter += 0.1
    assert (errors(policy, reference.model).margin != 0).all()
    assert torch.equal(errors(pretrained, alone).policy_w, first.policy_w)
    assert torch.equal(errors(reference.model, alone).policy_w, first.policy_w)
    reference.after_step(1, policy)
    after = errors(policy, reference.model)
    assert (after.margin == 0).all() and not torch.equal(after.policy_w, first.policy_w)
    after.policy_w.sum().backward()
    assert all(p.grad is not None for p in policy.parameters())
    assert all(p.grad is None for p in other.parameters())
    assert sum(p.numel() for p in policy.parameters()) < 0.3 * sum(p.numel() for p in alone.parameters())


@pytest.mark.parametrize("variant", ["full", "lora"])
def test_training_raises_the_margin(family, variant):
    """Three optimizer steps in bf16 on one batch. (Qwen-Image never uses what its last block makes of the text.)"""
    backend = tiny(family[1], torch.bfloat16)
    if variant == "full":
        policy, reference = backend.denoiser().requires_grad_(True), backend.denoiser(half=True)
    else:
        policy, reference, _ = adapt(backend.denoiser(half=True), rank=4, alpha=4, targets=backend.LORA_TARGETS)
    data, t = batch(backend), torch.tensor([300, 700])
    optimizer = torch.optim.AdamW(policy.parameters(), lr=1e-3 if variant == "full" else 1e-2)
    for _ in range(3):
        errors = pair_errors(backend.denoise, policy, reference, data, t, data.x_l.roll(1, 0), backend.process)
        dpo(errors, torch.ones(2), beta=100.0).mean().backward()
        without = [name for name, p in policy.named_parameters() if p.grad is None]
        assert all(family[0] == "qwen-image" and ".1." in name for name in without), without
        assert all(p.grad.isfinite().all() for p in policy.parameters() if p.grad is not None)
        optimizer.step()
        optimizer.zero_grad()
    with torch.no_grad():
        errors = pair_errors(backend.denoise, policy, reference, data, t, data.x_l.roll(1, 0), backend.process)
    assert errors.margin.mean() > 0


def test_gradient_checkpointing_recomputes_with_the_policys_adapters(family):
    """The reference runs between the policy's forward and its backward pass."""
    backend = tiny(family[1])
    data, t, found = batch(backend), torch.tensor([30, 970]), []
    for recompute in (False, True):
        torch.manual_seed(0)
        policy, reference, _ = adapt(backend.denoiser(), rank=2, alpha=2, targets=backend.LORA_TARGETS)
        with torch.no_grad():
            for i, parameter in enumerate(policy.parameters()):
                parameter.copy_(0.1 * torch.randn(parameter.shape, generator=Generator().manual_seed(i)))
        if recompute:
            policy.denoiser.enable_gradient_checkpointing()
        errors = pair_errors(backend.denoise, policy, reference, data, t, data.x_l, backend.process)
        dpo(errors, torch.ones(2)).mean().backward()
        found.append([p.grad.clone() for p in policy.parameters()])
    for a, b in zip(*found, strict=True):
        torch.testing.assert_close(a, b)


@pytest.mark.parametrize("dtype", DTYPES)
def test_a_saved_pipeline_draws_as_it_is_and_its_other_parts_are_the_originals(family, tmp_path, dtype):
    name, folder = family
    backend = tiny(folder, dtype)
    backend.save(backend.denoiser(), tmp_path / "saved")
    images = diffusers.DiffusionPipeline.from_pretrained(tmp_path / "saved")(
        prompt=list(CAPTIONS), num_inference_steps=2, height=32, width=32, output_type="np", **drawing(name, 1.0)
    ).images
    assert np.isfinite(images).all()
    again = tiny(tmp_path / "saved", dtype)
    parts = ("vae", *backend.ENCODERS)
    assert again.digest(*parts) == backend.digest(*parts)


def test_saved_results_load_in_plain_diffusers_and_draw(family, tmp_path):
    name, folder = family
    backend = tiny(folder)
    draw = lambda m: backend.sample(m, CAPTIONS, [1, 2], steps=2, guidance=1.0, batch_size=2)  # noqa: E731
    call = dict(num_inference_steps=2, height=32, width=32, output_type="np", **drawing(name, 1.0))
    seeds = lambda: [Generator().manual_seed(s) for s in (1, 2)]  # noqa: E731
    whole = backend.denoiser()
    policy, _, _ = adapt(backend.denoiser(), rank=2, alpha=4, targets=backend.LORA_TARGETS)
    with torch.no_grad():
        for model, change in ((whole, 0.05), (policy, 0.1)):
            for parameter in model.parameters():
                parameter += change
    backend.save(whole, tmp_path / "whole")
    pipe = plain(tmp_path / "whole")
    pipe.scheduler = backend.scheduler
    assert (
        np.abs(np.round(pipe(prompt=list(CAPTIONS), generator=seeds(), **call).images * 255) - draw(whole)).max() <= 1
    )
    backend.save(policy, tmp_path / "lora")
    assert [f.name for f in (tmp_path / "lora").iterdir()] == ["pytorch_lora_weights.safetensors"]
    pipe = plain(folder)
    pipe.scheduler = backend.scheduler
    pipe.load_lora_weights(tmp_path / "lora")
    with_lora = draw(policy)
    assert np.abs(np.round(pipe(prompt=list(CAPTIONS), generator=seeds(), **call).images * 255) - with_lora).max() <= 1
    assert np.abs(draw(backend.load_trained(tmp_path / "lora")).astype(int) - with_lora).max() <= 1
    backend.save(whole, tmp_path / "alone", whole=False)
    assert np.array_equal(draw(backend.load_trained(tmp_path / "alone")), draw(whole))
    assert np.abs(with_lora.astype(int) - draw(backend.denoiser())).max() > 1


def test_the_setting_knows_every_family():
    assert set(get_args(Model.model_fields["family"].annotation)) == {"auto", *FAMILIES}


def test_the_wrong_family_is_named(checkpoint):
    with pytest.raises(UserError, match=r"model\.family = 'sdxl': .* is a 'sd3' checkpoint"):
        load(str(checkpoint("sd3")), CPU, family="sdxl")


def test_a_pipeline_of_no_family_is_named(checkpoint, tmp_path):
    copy = shutil.copytree(checkpoint("sd"), tmp_path / "copy")
    index = json.loads((copy / "model_index.json").read_text())
    (copy / "model_index.json").write_text(json.dumps(index | {"_class_name": "StableCascadePipeline"}))
    with pytest.raises(
        UserError, match="a checkpoint for StableCascadePipeline; expected one of StableDiffusionPipeline"
    ):
        load(str(copy), CPU)


@pytest.mark.parametrize("part", ["text_encoder_2", "vae", "tokenizer_3"])
def test_a_missing_part_is_named(checkpoint, tmp_path, part):
    copy = shutil.copytree(checkpoint("sd3"), tmp_path / "copy")
    shutil.rmtree(copy / part)
    with pytest.raises(UserError, match=rf"no {part} in"):
        load(str(copy), CPU)


def test_sd3_draws_without_its_third_text_encoder(checkpoint, tmp_path):
    copy = shutil.copytree(checkpoint("sd3"), tmp_path / "copy")
    index = json.loads((copy / "model_index.json").read_text())
    for part in ("text_encoder_3", "tokenizer_3"):
        shutil.rmtree(copy / part)
        index[part] = [None, None]
    (copy / "model_index.json").write_text(json.dumps(index))
    backend = load(str(copy), CPU)
    assert not backend.encode_text(CAPTIONS)["text"][:, 77:].any()
    assert backend.sample(backend.denoiser(), CAPTIONS[:1], [0], steps=1, guidance=1.0, batch_size=1).shape == (
        1,
        32,
        32,
        3,
    )


def test_adapters_that_match_nothing_are_an_error_that_lists_what_there_is(checkpoint):
    with pytest.raises(UserError, match=r"lora\.targets = \['to_x'\]: matches no layer of UNet2D.*to_q"):
        adapt(load(str(checkpoint("sd")), CPU).denoiser(), rank=2, alpha=2, targets=["to_x"])


def test_pickled_weights_are_refused(checkpoint, tmp_path):
    copy = shutil.copytree(checkpoint("sd"), tmp_path / "copy")
    (weights,) = (copy / "unet").glob("*.safetensors")
    weights.rename(copy / "unet" / "diffusion_pytorch_model.bin")
    with pytest.raises(UserError, match="unet has only pickled weights"):
        load(str(copy), CPU)
