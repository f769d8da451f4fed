"""Alibaba's family Qwen-Image."""

from functools import cached_property
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import pad

from workbench.models.backend import Condition
from workbench.models.families.flow_matching import FlowMatching
from workbench.models.families.flux import pack, unpack

#: Text tokens that are stored and attended to: the pipeline's default. The rest of a longer caption is cut off.
TEXT_TOKENS = 512


class QwenImage(FlowMatching):
    """Qwen-Image: a transformer over packed latents, with the last layer of Qwen2.5-VL as its text embedding.

    A caption has as many embeddings as tokens; they are padded to TEXT_TOKENS, and `text_mask` is 1 where they are a
    caption's and 0 where they are padding, to which nothing attends. Guidance is classifier-free with an empty negative
    prompt, as the pipeline's authors recommend.
    """

    PIPELINE = "QwenImagePipeline"
    DENOISER_CLASS = "QwenImageTransformer2DModel"
    SAMPLE_SIZE = 128
    PACKING = 2
    ENCODERS = ("text_encoder", "tokenizer")

    @cached_property
    def _vae_channels(self) -> int:
        return self.checkpoint.number("vae", "z_dim", 16, 1, 1024)

    @cached_property
    def _pixels_per_latent(self) -> int:
        halved = self.checkpoint.config("vae").get("temperal_downsample", [False, True, True])  # one entry a halving
        return 2 ** len(halved)

    @cached_property
    def _patch(self) -> int:
        return self.PACKING  # which its config calls patch_size

    def _predict(self, denoiser: nn.Module, x_t: Tensor, time: Tensor, condition: Condition) -> Tensor:
        height, width = (edge // 2 for edge in x_t.shape[2:])
        velocity = denoiser(
            hidden_states=pack(x_t),
            timestep=time / 1000,  # which the transformer multiplies again
            encoder_hidden_states=condition["text"],
            # Stored as numbers like every embedding; attention wants a boolean.
            encoder_hidden_states_mask=condition["text_mask"] > 0.5,
            img_shapes=[[(1, height, width)]] * len(x_t),
            return_dict=False,
        )[0]
        return unpack(velocity, height, width)

    def _embed(self, captions: list[str]) -> dict[str, Tensor]:
        text, mask = self.pipeline.encode_prompt(captions, device=self.device, max_sequence_length=TEXT_TOKENS)
        if mask is None:  # all captions are equally long
            mask = torch.ones(text.shape[:2], device=text.device)
        missing = TEXT_TOKENS - text.shape[1]
        return {"text": pad(text, (0, 0, 0, missing)), "text_mask": pad(mask.float(), (0, missing))}

    def _encode(self, vae: Any, images: Tensor) -> Tensor:
        mean, deviation = _statistics(vae)
        return ((vae.encode(images[:, :, None]).latent_dist.mean - mean) / deviation)[:, :, 0]  # a video of one frame

    def _decode(self, vae: Any, latents: Tensor) -> Tensor:
        mean, deviation = _statistics(vae)
        return vae.decode(latents[:, :, None] * deviation + mean, return_dict=False)[0][:, :, 0]

    def _sampler_options(self, captions: list[str], guidance: float) -> dict[str, Any]:
        # Without a negative prompt the pipeline ignores the scale and draws without guidance.
        negative = {"negative_prompt": [" "] * len(captions)} if guidance > 1 else {}
        return {"true_cfg_scale": guidance} | negative

    def _from_pipeline(self, latents: Tensor) -> Tensor:
        _, height, width = self.latent_shape
        return unpack(latents, height // 2, width // 2)


def _statistics(vae: Any) -> tuple[Tensor, Tensor]:
    """Mean and standard deviation of the autoencoder's latents, from its config, (1, C, 1, 1, 1)."""
    values = (vae.config.latents_mean, vae.config.latents_std)
    mean, deviation = (torch.tensor(x, device=vae.device).view(1, -1, 1, 1, 1) for x in values)
    return mean, deviation
