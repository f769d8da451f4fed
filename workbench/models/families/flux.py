"""Black Forest Labs' families: FLUX.1 (dev and schnell) and FLUX.2 klein."""

from functools import cached_property
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import pixel_shuffle, pixel_unshuffle

from workbench.models.backend import Condition
from workbench.models.families.flow_matching import FlowMatching

#: Guidance that a guidance-distilled model is given in training: the default of diffusers' training scripts for FLUX.
GUIDANCE = 3.5


class Flux(FlowMatching):
    """What FLUX.1 and FLUX.2 share: transformers over packed latents, with a position of each token.

    Text is padded to 512 tokens, to which the transformers attend without a mask, as they were trained; so the
    embeddings of a caption do not depend on the other captions of a batch.
    """

    SAMPLE_SIZE = 128
    PACKING = 2

    @cached_property
    def _takes_guidance(self) -> bool:
        """Whether the transformer was distilled from guided predictions, and takes the guidance's scale as an input."""
        return bool(self.checkpoint.config(self.DENOISER).get("guidance_embeds", False))

    def _guidance(self, time: Tensor) -> Tensor | None:
        return torch.full_like(time, GUIDANCE) if self._takes_guidance else None


class Flux1(Flux):
    """FLUX.1: a transformer with CLIP's pooled embedding and T5's tokens.

    FLUX.1-dev was distilled from guided predictions and takes the scale of the guidance as an input: in training it is
    GUIDANCE, in sampling the sampler's. FLUX.1-schnell has no such input.
    """

    PIPELINE = "FluxPipeline"
    DENOISER_CLASS = "FluxTransformer2DModel"
    ENCODERS = ("text_encoder", "tokenizer", "text_encoder_2", "tokenizer_2")
    LORA_TARGETS = (
        "attn.to_q", "attn.to_k", "attn.to_v", "attn.to_out.0",
        "attn.add_q_proj", "attn.add_k_proj", "attn.add_v_proj", "attn.to_add_out",
        "ff.net.0.proj", "ff.net.2", "ff_context.net.0.proj", "ff_context.net.2",
    )  # fmt: skip

    def _predict(self, denoiser: nn.Module, x_t: Tensor, time: Tensor, condition: Condition) -> Tensor:
        text, (height, width) = condition["text"], (edge // 2 for edge in x_t.shape[2:])
        velocity = denoiser(
            hidden_states=pack(x_t),
            timestep=time / 1000,  # which the transformer multiplies again
            guidance=self._guidance(time),
            pooled_projections=condition["pooled"],
            encoder_hidden_states=text,
            # FLUX.1's text tokens all have position 0; those of FLUX.2 are numbered.
            txt_ids=torch.zeros(text.shape[1], 3, device=x_t.device),
            img_ids=positions(1, height, width, device=x_t.device),
            return_dict=False,
        )[0]
        return unpack(velocity, height, width)

    def _embed(self, captions: list[str]) -> dict[str, Tensor]:
        text, pooled, _ = self.pipeline.encode_prompt(captions, device=self.device)
        return {"text": text, "pooled": pooled}

    def _from_pipeline(self, latents: Tensor) -> Tensor:
        _, height, width = self.latent_shape
        return unpack(latents, height // 2, width // 2)


class Flux2Klein(Flux):
    """FLUX.2 klein: a transformer with intermediate layers of Qwen3 as its text embedding.

    The autoencoder's latents are packed (2 x 2 of 32 channels) before they are normalized and noised, so everything
    here sees latents of 128 channels, a sixteenth of an image's edge.
    """

    PIPELINE = "Flux2KleinPipeline"
    DENOISER_CLASS = "Flux2Transformer2DModel"
    ENCODERS = ("text_encoder", "tokenizer")
    LORA_TARGETS = ("to_q", "to_k", "to_v", "to_out.0", "to_qkv_mlp_proj", "attn.to_out")

    @property
    def latent_shape(self) -> tuple[int, int, int]:
        """Channels, height and width of one image's packed latents."""
        channels, height, width = super().latent_shape
        return 4 * channels, height // 2, width // 2

    def _shift(self) -> float:
        """The pipeline's shift for 50 steps, its default; it shifts a little less, the more steps there are."""
        from diffusers.pipelines.flux2.pipeline_flux2_klein import compute_empirical_mu

        return compute_empirical_mu(self._image_tokens, num_steps=50)

    def _predict(self, denoiser: nn.Module, x_t: Tensor, time: Tensor, condition: Condition) -> Tensor:
        text, (height, width) = condition["text"], x_t.shape[2:]
        velocity = denoiser(
            hidden_states=x_t.flatten(2).mT,
            timestep=time / 1000,  # which the transformer multiplies again
            guidance=self._guidance(time),
            encoder_hidden_states=text,
            txt_ids=positions(1, 1, 1, text.shape[1], device=x_t.device),
            img_ids=positions(1, height, width, 1, device=x_t.device),
            return_dict=False,
        )[0]
        return velocity.mT.unflatten(2, (height, width))

    def _embed(self, captions: list[str]) -> dict[str, Tensor]:
        text, _ = self.pipeline.encode_prompt(captions, device=self.device)
        return {"text": text}

    def _encode(self, vae: Any, images: Tensor) -> Tensor:
        return self._normalize(vae, pixel_unshuffle(vae.encode(images).latent_dist.mean, 2))

    def _decode(self, vae: Any, latents: Tensor) -> Tensor:
        mean, deviation = _batch_norm(vae)
        return vae.decode(pixel_shuffle(latents * deviation + mean, 2), return_dict=False)[0]

    def _from_pipeline(self, latents: Tensor) -> Tensor:
        return self._normalize(self.pipeline.vae, pixel_unshuffle(latents, 2))  # it unpacks what it returns

    def _normalize(self, vae: Any, packed: Tensor) -> Tensor:
        mean, deviation = _batch_norm(vae)
        return (packed - mean) / deviation


def _batch_norm(vae: Any) -> tuple[Tensor, Tensor]:
    """Mean and standard deviation of FLUX.2's packed latents, (1, C, 1, 1), from its autoencoder's batch norm."""
    mean, variance = (x.view(1, -1, 1, 1) for x in (vae.bn.running_mean, vae.bn.running_var))
    return mean, (variance + vae.config.batch_norm_eps).sqrt()


def pack(latents: Tensor) -> Tensor:
    """Tokens of latents: each patch of 2 x 2 becomes one, row by row; (B, C, 2h, 2w) -> (B, h w, 4C)."""
    return pixel_unshuffle(latents, 2).flatten(2).mT


def unpack(tokens: Tensor, height: int, width: int) -> Tensor:
    """Latents of packed tokens: (B, h w, 4C) -> (B, C, 2h, 2w)."""
    return pixel_shuffle(tokens.mT.unflatten(2, (height, width)), 2)


def positions(*sizes: int, device: torch.device) -> Tensor:
    """Coordinates of the points of a grid, the last varying fastest, for rotary embeddings: (points, axes), float32."""
    return torch.cartesian_prod(*(torch.arange(size, device=device, dtype=torch.float32) for size in sizes))
