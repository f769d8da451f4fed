"""What diffusers itself makes of noised latents: by its pipelines' parts, or by one step of the whole pipeline."""

import inspect
import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from diffusers import (
    DDPMScheduler,
    FlowMatchEulerDiscreteScheduler,
    Flux2KleinPipeline,
    QwenImageEditPipeline,
    QwenImagePipeline,
    SanaPipeline,
)
from diffusers.pipelines.flux2.pipeline_flux2_klein import compute_empirical_mu
from torch import Tensor


class Expected(NamedTuple):
    """Noised latents, the model's prediction of them and the training target, (B, C, H, W)."""

    x_t: Tensor
    predicted: Tensor
    target: Tensor


def sd(pipe: Any, captions: Sequence[str], x0: Tensor, eps: Tensor, t: Tensor) -> Expected:
    x_t, target = _diffusion(pipe, x0, eps, t)
    tokens = pipe.tokenizer(captions, padding="max_length", truncation=True, return_tensors="pt").input_ids
    return Expected(x_t, pipe.unet(x_t, t, pipe.text_encoder(tokens)[0]).sample, target)


def sdxl(pipe: Any, captions: Sequence[str], x0: Tensor, eps: Tensor, t: Tensor) -> Expected:
    x_t, target = _diffusion(pipe, x0, eps, t)
    text, _, pooled, _ = pipe.encode_prompt(captions, do_classifier_free_guidance=False)
    ids = pipe._get_add_time_ids((48, 40), (3, 1), (32, 32), text.dtype, 32).repeat(len(x0), 1)
    added = {"text_embeds": pooled, "time_ids": ids}
    return Expected(x_t, pipe.unet(x_t, t, text, added_cond_kwargs=added).sample, target)


def _diffusion(pipe: Any, x0: Tensor, eps: Tensor, t: Tensor) -> tuple[Tensor, Tensor]:
    ddpm = DDPMScheduler.from_config(pipe.scheduler.config)
    velocity = ddpm.config.prediction_type == "v_prediction"
    return ddpm.add_noise(x0, eps, t), ddpm.get_velocity(x0, eps, t) if velocity else eps


def sd3(pipe: Any, captions: Sequence[str], x0: Tensor, eps: Tensor, t: Tensor) -> Expected:
    place = 999 - t  # diffusers counts from the noisy end
    sigma = pipe.scheduler.sigmas[place].view(-1, 1, 1, 1)
    x_t = (1 - sigma) * x0 + sigma * eps
    text, _, pooled, _ = pipe.encode_prompt(captions, captions, captions, do_classifier_free_guidance=False)
    predicted = pipe.transformer(x_t, text, pooled, pipe.scheduler.timesteps[place], return_dict=False)[0]
    return Expected(x_t, predicted, eps - x0)


def sana(pipe: Any, captions: Sequence[str], x0: Tensor, eps: Tensor, t: Tensor) -> Expected:
    pipe.scheduler.set_timesteps(1000)
    sigma = pipe.scheduler.sigmas[999 - t]  # it counts from the noisy end
    x_t = (1 - sigma.view(-1, 1, 1, 1)) * x0 + sigma.view(-1, 1, 1, 1) * eps
    defaults = inspect.signature(type(pipe).__call__).parameters
    instruction = defaults["complex_human_instruction"].default
    text, mask, _, _ = pipe.encode_prompt(captions, False, complex_human_instruction=instruction)
    predicted = pipe.transformer(x_t, text, 1000 * sigma, encoder_attention_mask=mask, return_dict=False)[0]
    return Expected(x_t, predicted, eps - x0)


def flux1(pipe: Any, captions: Sequence[str], x0: Tensor, eps: Tensor, t: Tensor) -> Expected:
    def step(caption: str, level: float, x: Tensor) -> Tensor:
        _, channels, height, width = x.shape
        packed = pipe._pack_latents(x, 1, channels, height, width)
        out = pipe(caption, sigmas=[level], latents=packed, guidance_scale=3.5, **LATENTS).images
        return pipe._unpack_latents(out, 32, 32, pipe.vae_scale_factor)

    return _one_step(pipe, step, captions, x0, eps, t)


def flux2_klein(pipe: Any, captions: Sequence[str], x0: Tensor, eps: Tensor, t: Tensor) -> Expected:
    mean = pipe.vae.bn.running_mean.view(1, -1, 1, 1)
    deviation = (pipe.vae.bn.running_var.view(1, -1, 1, 1) + pipe.vae.config.batch_norm_eps).sqrt()
    tokens = x0.shape[2] * x0.shape[3]

    def step(caption: str, level: float, x: Tensor) -> Tensor:
        # Its shift depends on the number of steps: the level that one step shifts to where 50 steps shift this one.
        odds = level / (1 - level) * math.exp(compute_empirical_mu(tokens, 50) - compute_empirical_mu(tokens, 1))
        out = pipe(prompt=caption, sigmas=[odds / (1 + odds)], latents=x, guidance_scale=1.0, **LATENTS).images
        return (pipe._patchify_latents(out) - mean) / deviation

    return _one_step(pipe, step, captions, x0, eps, t)


def qwen_image(pipe: Any, captions: Sequence[str], x0: Tensor, eps: Tensor, t: Tensor) -> Expected:
    # With a terminal level a sampler of one step starts there, whatever it is told.
    pipe.scheduler = FlowMatchEulerDiscreteScheduler.from_config(pipe.scheduler.config, shift_terminal=None)

    def step(caption: str, level: float, x: Tensor) -> Tensor:
        _, channels, height, width = x.shape
        packed = pipe._pack_latents(x, 1, channels, height, width)
        out = pipe(caption, sigmas=[level], latents=packed, true_cfg_scale=1.0, **LATENTS).images
        return pipe._unpack_latents(out, 32, 32, pipe.vae_scale_factor)[:, :, 0]

    return _one_step(pipe, step, captions, x0, eps, t)


def z_image(pipe: Any, captions: Sequence[str], x0: Tensor, eps: Tensor, t: Tensor) -> Expected:
    def step(caption: str, level: float, x: Tensor) -> Tensor:
        return pipe(caption, sigmas=[level], latents=x, guidance_scale=0.0, **LATENTS).images

    return _one_step(pipe, step, captions, x0, eps, t)


#: Of every call of a pipeline: one step, to latents, at the resolution of the tests.
LATENTS = dict(num_inference_steps=1, height=32, width=32, output_type="latent")


def _one_step(pipe: Any, step: Any, captions: Sequence[str], x0: Tensor, eps: Tensor, t: Tensor) -> Expected:
    """The velocity by which a whole pipeline goes from sigma(t) to 0, each sample alone.

    Args:
        step: the pipeline's result from (caption, level before the shift, x_t), as (1, C, H, W).
    """
    noised, predicted = [], []
    pipe.set_progress_bar_config(disable=True)
    for caption, x, noise, place in zip(captions, x0.split(1), eps.split(1), t.tolist(), strict=True):
        level = (place + 1) / 1000
        step(caption, level, x)  # the scheduler knows its sigma only then
        sigma = pipe.scheduler.sigmas[0]
        x_t = (1 - sigma) * x + sigma * noise
        noised.append(x_t)
        predicted.append((x_t - step(caption, level, x_t)) / sigma)
    return Expected(torch.cat(noised), torch.cat(predicted), eps - x0)


ORACLES = {
    "sd": sd, "sd-v": sd, "sdxl": sdxl, "sd3": sd3, "sd35": sd3, "flux1": flux1, "flux2-klein": flux2_klein,
    "qwen-image": qwen_image, "z-image": z_image, "sana": sana,
}  # fmt: skip


def latents_of(pipe: Any, images: Tensor) -> Tensor:
    """Latents of images (N, 3, H, W) in -1..1, as pipelines that take images make them."""
    if isinstance(pipe, Flux2KleinPipeline):
        return pipe._encode_vae_image(images, generator=None)
    if isinstance(pipe, QwenImagePipeline):
        edits = QwenImageEditPipeline(**pipe.components, processor=None)
        return edits._encode_vae_image(images[:, :, None], generator=None)[:, :, 0]
    encoded = pipe.vae.encode(images)
    if isinstance(pipe, SanaPipeline):
        return encoded.latent * pipe.vae.config.scaling_factor
    return (encoded.latent_dist.mean - (pipe.vae.config.shift_factor or 0)) * pipe.vae.config.scaling_factor


def drawing(name: str, guidance: float) -> dict[str, Any]:
    """Arguments of a plain pipeline's call for two captions, as a reader of its documentation would write them."""
    if name == "qwen-image":
        return {"true_cfg_scale": guidance} | ({"negative_prompt": [" ", " "]} if guidance > 1 else {})
    sizes = {"use_resolution_binning": False} if name == "sana" else {}
    return {"guidance_scale": guidance} | sizes
