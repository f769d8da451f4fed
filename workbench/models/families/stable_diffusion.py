"""Stability's families: SD1.x and SD2.x, SDXL, SD3 and SD3.5."""

from typing import Any

import torch
from torch import Tensor, nn

from workbench.models.backend import Backend, Condition
from workbench.models.families.flow_matching import FlowMatching


class StableDiffusion(Backend):
    """SD1.x and SD2.x: a UNet that predicts noise, or v, from the embeddings of one text encoder."""

    PIPELINE = "StableDiffusionPipeline"
    ENCODERS = ("text_encoder", "tokenizer")

    def _predict(self, denoiser: nn.Module, x_t: Tensor, time: Tensor, condition: Condition) -> Tensor:
        return denoiser(x_t, time, encoder_hidden_states=condition["text"], return_dict=False)[0]

    def _embed(self, captions: list[str]) -> dict[str, Tensor]:
        # One image a prompt, and no embeddings of the empty prompt beside it.
        text, _ = self.pipeline.encode_prompt(captions, self.device, 1, False)
        return {"text": text}


class StableDiffusionXL(Backend):
    """SDXL: a UNet with two text encoders, pooled embeddings, and the sizes and crop of the image (`time_ids`)."""

    PIPELINE = "StableDiffusionXLPipeline"
    ENCODERS = ("text_encoder", "tokenizer", "text_encoder_2", "tokenizer_2")

    def _corrections(self) -> dict[str, Any]:
        """What the pipeline of SD1.x corrects in a scheduler's config, and SDXL's does not.

        A config that another scheduler has written, such as Euler's, lacks these keys. DDIM's defaults for them are
        those of models of pixels: predicted images, here latents, would be cut off at -1 and 1.
        """
        config = self.checkpoint.config("scheduler", "scheduler_config.json")
        clips = {"clip_sample": False} if config.get("clip_sample", True) is not False else {}
        return clips | ({} if "steps_offset" in config else {"steps_offset": 1})

    def _predict(self, denoiser: nn.Module, x_t: Tensor, time: Tensor, condition: Condition) -> Tensor:
        added = {"text_embeds": condition["pooled"], "time_ids": condition["time_ids"]}
        text = condition["text"]
        return denoiser(x_t, time, encoder_hidden_states=text, added_cond_kwargs=added, return_dict=False)[0]

    def _embed(self, captions: list[str]) -> dict[str, Tensor]:
        text, _, pooled, _ = self.pipeline.encode_prompt(
            captions, device=self.device, num_images_per_prompt=1, do_classifier_free_guidance=False
        )
        return {"text": text, "pooled": pooled}

    def pair_condition(self, height: int, width: int, top: int, left: int) -> dict[str, Tensor]:
        """Original size, corner of the crop and size trained at, as in diffusers' training scripts; pixels, (6,)."""
        return {"time_ids": torch.tensor([height, width, top, left, self.resolution, self.resolution]).float()}


class StableDiffusion3(FlowMatching):
    """SD3 and SD3.5: a transformer with two CLIP text encoders and T5, which a checkpoint may leave out."""

    PIPELINE = "StableDiffusion3Pipeline"
    DENOISER_CLASS = "SD3Transformer2DModel"
    LORA_TARGETS = (
        "attn.to_q", "attn.to_k", "attn.to_v", "attn.to_out.0",
        "attn.add_q_proj", "attn.add_k_proj", "attn.add_v_proj", "attn.to_add_out",
    )  # fmt: skip
    ENCODERS = ("text_encoder", "tokenizer", "text_encoder_2", "tokenizer_2", "text_encoder_3", "tokenizer_3")

    def _predict(self, denoiser: nn.Module, x_t: Tensor, time: Tensor, condition: Condition) -> Tensor:
        return denoiser(
            hidden_states=x_t,
            timestep=time,
            encoder_hidden_states=condition["text"],
            pooled_projections=condition["pooled"],
            return_dict=False,
        )[0]

    def _embed(self, captions: list[str]) -> dict[str, Tensor]:
        text, _, pooled, _ = self.pipeline.encode_prompt(
            captions, captions, captions, device=self.device, do_classifier_free_guidance=False
        )
        return {"text": text, "pooled": pooled}
