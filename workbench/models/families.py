"""The families: how a denoiser is called, what its text embeddings are named, which scheduler draws."""

import torch
from torch import Tensor, nn

from workbench.method.noise import ForwardProcess, flow
from workbench.models.backend import Backend, Condition


class StableDiffusion(Backend):
    """SD1.x and SD2.x, which predict noise or v."""

    PIPELINE = "StableDiffusionPipeline"
    ENCODERS = ("text_encoder", "tokenizer")

    def _call(self, denoiser: nn.Module, x_t: Tensor, time: Tensor, condition: Condition) -> Tensor:
        return denoiser(x_t, time, encoder_hidden_states=condition["text"], return_dict=False)[0]

    def _embed(self, captions: list[str]) -> dict[str, Tensor]:
        text, _ = self.pipeline.encode_prompt(captions, self.device, 1, False)
        return {"text": text}


class StableDiffusionXL(Backend):
    """SDXL: two text encoders, pooled embeddings, size and crop conditioning."""

    PIPELINE = "StableDiffusionXLPipeline"
    ENCODERS = ("text_encoder", "tokenizer", "text_encoder_2", "tokenizer_2")

    def _call(self, denoiser: nn.Module, x_t: Tensor, time: Tensor, condition: Condition) -> Tensor:
        added = {"text_embeds": condition["pooled"], "time_ids": condition["time_ids"]}
        return denoiser(x_t, time, encoder_hidden_states=condition["text"], added_cond_kwargs=added, return_dict=False)[
            0
        ]

    def _embed(self, captions: list[str]) -> dict[str, Tensor]:
        text, _, pooled, _ = self.pipeline.encode_prompt(
            captions, device=self.device, num_images_per_prompt=1, do_classifier_free_guidance=False
        )
        return {"text": text, "pooled": pooled}

    def pair_condition(self, height: int, width: int, top: int, left: int) -> dict[str, Tensor]:
        """Size of the pair's first image before, crop after resizing, and the size trained at (diffusers' script)."""
        return {"time_ids": torch.tensor([height, width, top, left, self.resolution, self.resolution]).float()}


class StableDiffusion3(Backend):
    """SD3 and SD3.5: a transformer trained by flow matching; the third text encoder may be left out."""

    PIPELINE = "StableDiffusion3Pipeline"
    DENOISER, DENOISER_CLASS = "transformer", "SD3Transformer2DModel"
    SCHEDULER = "FlowMatchEulerDiscreteScheduler"
    LORA_TARGETS = (
        "attn.to_q", "attn.to_k", "attn.to_v", "attn.to_out.0",
        "attn.add_q_proj", "attn.add_k_proj", "attn.add_v_proj", "attn.to_add_out",
    )  # fmt: skip
    ENCODERS = ("text_encoder", "tokenizer", "text_encoder_2", "tokenizer_2", "text_encoder_3", "tokenizer_3")

    def _process(self) -> ForwardProcess:
        return flow(self.scheduler.sigmas.flip(0).float(), self.scheduler.timesteps.flip(0).float())

    def _call(self, denoiser: nn.Module, x_t: Tensor, time: Tensor, condition: Condition) -> Tensor:
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


FAMILIES: dict[str, type[Backend]] = {"sd": StableDiffusion, "sdxl": StableDiffusionXL, "sd3": StableDiffusion3}
