"""NVIDIA's family Sana, the smallest here: 0.6 or 1.6 billion weights, linear attention, few latents."""

import copy
import inspect
from functools import cached_property
from typing import Any

from torch import Tensor, nn

from workbench.method.noise import ForwardProcess, flow
from workbench.models import checks
from workbench.models.backend import Condition
from workbench.models.families.flow_matching import FlowMatching


class Sana(FlowMatching):
    """Sana: a transformer with linear attention over latents of a thirty-second of an image's edge, with Gemma 2.

    Text is padded to 300 tokens; `text_mask` is 1 where they are a caption's. As in the pipeline, captions follow an
    instruction that asks the text encoder to enrich them, whose own tokens are cut off again.
    """

    PIPELINE = "SanaPipeline"
    DENOISER_CLASS = "SanaTransformer2DModel"
    SCHEDULER = "DPMSolverMultistepScheduler"
    ENCODERS = ("text_encoder", "tokenizer")
    LORA_TARGETS = ("to_q", "to_k", "to_v")

    def _process(self) -> ForwardProcess:
        """The sampler's own noise levels over T steps, turned around; they hold its config's `flow_shift`."""
        # A copy, since set_timesteps changes the scheduler that draws samples.
        scheduler = copy.deepcopy(self.scheduler)
        timesteps = scheduler.config.num_train_timesteps
        scheduler.set_timesteps(timesteps)
        sigma = scheduler.sigmas[:timesteps].flip(0).float()  # after them comes 0, the image
        return flow(sigma, timesteps * sigma)

    @cached_property
    def _pixels_per_latent(self) -> int:
        return 2 ** checks.halvings(self.checkpoint, "vae", "encoder_block_out_channels")

    def _predict(self, denoiser: nn.Module, x_t: Tensor, time: Tensor, condition: Condition) -> Tensor:
        return denoiser(
            x_t,
            encoder_hidden_states=condition["text"],
            encoder_attention_mask=condition["text_mask"],
            timestep=time,
            return_dict=False,
        )[0]

    def _embed(self, captions: list[str]) -> dict[str, Tensor]:
        # The instruction is a default of the pipeline's call, not of encode_prompt, and would be missing here.
        instruction = inspect.signature(type(self.pipeline).__call__).parameters["complex_human_instruction"].default
        text, mask, _, _ = self.pipeline.encode_prompt(
            captions, False, device=self.device, complex_human_instruction=instruction
        )
        return {"text": text, "text_mask": mask.float()}

    def _encode(self, vae: Any, images: Tensor) -> Tensor:
        return (
            vae.encode(images).latent * vae.config.scaling_factor
        )  # its autoencoder makes one latent, no distribution

    def _decode(self, vae: Any, latents: Tensor) -> Tensor:
        return vae.decode(latents / vae.config.scaling_factor, return_dict=False)[0]

    def _sampler_options(self, captions: list[str], guidance: float) -> dict[str, Any]:
        # Without the option the pipeline draws in the nearest of its own sizes and resizes.
        return {"guidance_scale": guidance, "use_resolution_binning": False}
