"""Black Forest Labs' family FLUX.1 (dev and schnell)."""

from functools import cached_property

import torch
from torch import Tensor, nn
from torch.nn.functional import pixel_shuffle, pixel_unshuffle

from workbench.models.backend import Condition
from workbench.models.families.flow_matching import FlowMatching

#: Guidance that a guidance-distilled model is given in training: the default of diffusers' training scripts for FLUX.
GUIDANCE = 3.5


class Flux1(FlowMatching):
    """FLUX.1: a transformer over packed latents, with CLIP's pooled embedding and 512 tokens of T5.

    FLUX.1-dev was distilled from guided predictions and takes the scale of the guidance as an input; in training it is
    GUIDANCE, in sampling the sampler's. FLUX.1-schnell has no such input. Text is padded to 512 tokens, to which the
    transformer attends without a mask, as it was trained: embeddings do not depend on the other captions of a batch.
    """

    PIPELINE = "FluxPipeline"
    DENOISER_CLASS = "FluxTransformer2DModel"
    SAMPLE_SIZE = 128
    PACKING = 2
    ENCODERS = ("text_encoder", "tokenizer", "text_encoder_2", "tokenizer_2")
    LORA_TARGETS = (
        "attn.to_q", "attn.to_k", "attn.to_v", "attn.to_out.0",
        "attn.add_q_proj", "attn.add_k_proj", "attn.add_v_proj", "attn.to_add_out",
        "ff.net.0.proj", "ff.net.2", "ff_context.net.0.proj", "ff_context.net.2",
    )  # fmt: skip

    @cached_property
    def _takes_guidance(self) -> bool:
        return bool(self.checkpoint.config(self.DENOISER).get("guidance_embeds", False))

    def _predict(self, denoiser: nn.Module, x_t: Tensor, time: Tensor, condition: Condition) -> Tensor:
        text, (height, width) = condition["text"], (edge // 2 for edge in x_t.shape[2:])
        velocity = denoiser(
            hidden_states=pack(x_t),
            timestep=time / 1000,  # which the transformer multiplies again
            guidance=torch.full_like(time, GUIDANCE) if self._takes_guidance else None,
            pooled_projections=condition["pooled"],
            encoder_hidden_states=text,
            txt_ids=torch.zeros(text.shape[1], 3, device=x_t.device),
            img_ids=image_ids(height, width, x_t.device),
            return_dict=False,
        )[0]
        return unpack(velocity, height, width)

    def _embed(self, captions: list[str]) -> dict[str, Tensor]:
        text, pooled, _ = self.pipeline.encode_prompt(captions, device=self.device)
        return {"text": text, "pooled": pooled}

    def _from_pipeline(self, latents: Tensor) -> Tensor:
        _, height, width = self.latent_shape
        return unpack(latents, height // 2, width // 2)


def pack(latents: Tensor) -> Tensor:
    """Tokens of latents: each patch of 2 x 2 becomes one, row by row; (B, C, 2h, 2w) -> (B, h w, 4C)."""
    return pixel_unshuffle(latents, 2).flatten(2).mT


def unpack(tokens: Tensor, height: int, width: int) -> Tensor:
    """Latents of packed tokens: (B, h w, 4C) -> (B, C, 2h, 2w)."""
    return pixel_shuffle(tokens.mT.unflatten(2, (height, width)), 2)


def image_ids(height: int, width: int, device: torch.device) -> Tensor:
    """Position of each image token for the rotary embedding: (0, row, column), shape (h w, 3), float32."""
    ranges = (torch.arange(size, device=device, dtype=torch.float32) for size in (1, height, width))
    return torch.cartesian_prod(*ranges)
