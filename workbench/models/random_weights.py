"""Shapes of the real models: each family's published configuration, and a backend of it with random weights.

What a training step costs depends on a model's shape and not on what it has learned, so costs can be counted and
measured on a machine that has no checkpoint.
"""

import json
from collections.abc import Mapping
from contextlib import nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from torch import nn

from workbench.models.backend import Backend
from workbench.models.checkpoints import fetch
from workbench.models.families import FAMILIES

#: Blocks of the autoencoder of SD1.x, SDXL and SD3: eight pixels to a latent along each edge.
VAE = {"block_out_channels": [128, 256, 512, 512]}
#: The autoencoders of SD3 and FLUX.1: the same blocks, 16 channels.
VAE16 = VAE | {"latent_channels": 16}
#: The noise schedule of SD1.x and SDXL (scheduler/scheduler_config.json of both).
SCHEDULE = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear", "clip_sample": False}
#: FLUX.1-dev: transformer/config.json, what the transformer is given, and scheduler/scheduler_config.json.
FLUX1 = {
    "in_channels": 64, "num_layers": 19, "num_single_layers": 38, "attention_head_dim": 128, "num_attention_heads": 24,
    "joint_attention_dim": 4096, "pooled_projection_dim": 768, "guidance_embeds": True, "axes_dims_rope": [16, 56, 56],
}  # fmt: skip
FLUX1_CONDITION = {"text": (512, 4096), "pooled": (768,)}
FLUX1_SCHEDULER = {"shift": 3.0, "use_dynamic_shifting": True}


@dataclass(frozen=True)
class Shape:
    """A model without its weights.

    Attributes:
        family: name in FAMILIES.
        denoiser: its config.json, without what equals the defaults of diffusers' class.
        condition: what the denoiser is given beside x_t and t, by name: the shape for one image.
        vae: the part of its config.json that decides the latents' shape.
        scheduler: its scheduler_config.json, without what equals the defaults.
    """

    family: str
    denoiser: Mapping[str, Any]
    condition: Mapping[str, tuple[int, ...]]
    vae: Mapping[str, Any] = field(default_factory=lambda: VAE)
    scheduler: Mapping[str, Any] = field(default_factory=lambda: SCHEDULE)


SHAPES = {
    # stable-diffusion-v1-5/stable-diffusion-v1-5: unet/config.json; 512 px; CLIP ViT-L/14, 77 tokens
    "sd15": Shape(
        "sd",
        {
            "in_channels": 4, "out_channels": 4, "sample_size": 64, "block_out_channels": [320, 640, 1280, 1280],
            "down_block_types": ["CrossAttnDownBlock2D"] * 3 + ["DownBlock2D"],
            "up_block_types": ["UpBlock2D"] + ["CrossAttnUpBlock2D"] * 3,
            "attention_head_dim": 8, "cross_attention_dim": 768,
        },
        {"text": (77, 768)},
    ),
    # stabilityai/stable-diffusion-xl-base-1.0: unet/config.json; 1024 px; CLIP-L beside OpenCLIP-bigG, 77 tokens
    "sdxl": Shape(
        "sdxl",
        {
            "in_channels": 4, "out_channels": 4, "sample_size": 128, "block_out_channels": [320, 640, 1280],
            "down_block_types": ["DownBlock2D"] + ["CrossAttnDownBlock2D"] * 2,
            "up_block_types": ["CrossAttnUpBlock2D"] * 2 + ["UpBlock2D"],
            "attention_head_dim": [5, 10, 20], "cross_attention_dim": 2048, "transformer_layers_per_block": [1, 2, 10],
            "use_linear_projection": True, "addition_embed_type": "text_time", "addition_time_embed_dim": 256,
            "projection_class_embeddings_input_dim": 2816,
        },
        {"text": (77, 2048), "pooled": (1280,), "time_ids": (6,)},
    ),
    # stabilityai/stable-diffusion-3-medium-diffusers: transformer/config.json; 1024 px; 77 CLIP and 256 T5 tokens
    "sd3": Shape(
        "sd3",
        {
            "in_channels": 16, "out_channels": 16, "sample_size": 128, "patch_size": 2, "num_layers": 24,
            "attention_head_dim": 64, "num_attention_heads": 24, "joint_attention_dim": 4096,
            "caption_projection_dim": 1536, "pooled_projection_dim": 2048, "pos_embed_max_size": 192,
        },
        {"text": (333, 4096), "pooled": (2048,)},
        vae=VAE16,
        scheduler={"shift": 3.0},
    ),
    # black-forest-labs/FLUX.1-dev: transformer/config.json; 1024 px; CLIP-L's pooled embedding, 512 T5 tokens
    "flux1": Shape("flux1", FLUX1, FLUX1_CONDITION, VAE16, FLUX1_SCHEDULER),
    # ours: FLUX.1-dev with 4 of its 19 double and 8 of its 38 single blocks, for one GPU; a block costs the same, so a
    # time measured on it times the ratio of their FLOPs is the time of the whole
    "flux1-part": Shape(
        "flux1", FLUX1 | {"num_layers": 4, "num_single_layers": 8}, FLUX1_CONDITION, VAE16, FLUX1_SCHEDULER
    ),
    # black-forest-labs/FLUX.2-klein-base-4B: transformer/config.json; 1024 px; three layers of Qwen3-4B, 512 tokens
    "flux2-klein": Shape(
        "flux2-klein",
        {
            "in_channels": 128, "num_layers": 5, "num_single_layers": 20, "attention_head_dim": 128,
            "num_attention_heads": 24, "joint_attention_dim": 7680, "guidance_embeds": False,
        },
        {"text": (512, 7680)},
        vae=VAE | {"latent_channels": 32},
        scheduler=FLUX1_SCHEDULER,
    ),
    # Qwen/Qwen-Image: transformer/config.json; 1024 px; Qwen2.5-VL-7B, at most 512 tokens, counted in full
    "qwen-image": Shape(
        "qwen-image",
        {
            "in_channels": 64, "out_channels": 16, "num_layers": 60, "attention_head_dim": 128,
            "num_attention_heads": 24, "joint_attention_dim": 3584, "axes_dims_rope": [16, 56, 56],
        },
        {"text": (512, 3584), "text_mask": (512,)},
        vae={"z_dim": 16, "temperal_downsample": [False, True, True]},
        scheduler={
            "use_dynamic_shifting": True, "max_image_seq_len": 8192, "max_shift": 0.9, "shift_terminal": 0.02
        },
    ),
    # Tongyi-MAI/Z-Image: transformer/config.json; 1024 px; Qwen3-4B, at most 512 tokens, counted in full
    "z-image": Shape(
        "z-image",
        {
            "in_channels": 16, "dim": 3840, "n_layers": 30, "n_refiner_layers": 2, "n_heads": 30, "n_kv_heads": 30,
            "cap_feat_dim": 2560, "axes_lens": [1536, 512, 512],
        },
        {"text": (512, 2560), "text_mask": (512,)},
        vae=VAE16,
        scheduler={"shift": 3.0},
    ),
    # Efficient-Large-Model/Sana_1600M_1024px_BF16_diffusers: transformer/config.json; 1024 px; Gemma-2-2B, 300 tokens
    "sana": Shape(
        "sana",
        {
            "in_channels": 32, "out_channels": 32, "num_layers": 20, "num_attention_heads": 70,
            "attention_head_dim": 32, "num_cross_attention_heads": 20, "cross_attention_head_dim": 112,
            "cross_attention_dim": 2240, "caption_channels": 2304, "sample_size": 32,
        },
        {"text": (300, 2304), "text_mask": (300,)},
        vae={"latent_channels": 32, "encoder_block_out_channels": [128, 256, 512, 512, 1024, 1024]},
        scheduler={"use_flow_sigmas": True, "flow_shift": 3.0, "prediction_type": "flow_prediction"},
    ),
    # ours: sd15 with a fifth of its channels and a quarter of its resolution, 34 M weights, for a CPU with patience
    "sd34m": Shape(
        "sd",
        {
            "in_channels": 4, "out_channels": 4, "sample_size": 16, "block_out_channels": [64, 128, 256, 256],
            "down_block_types": ["CrossAttnDownBlock2D"] * 3 + ["DownBlock2D"],
            "up_block_types": ["UpBlock2D"] + ["CrossAttnUpBlock2D"] * 3,
            "attention_head_dim": 8, "cross_attention_dim": 128,
        },
        {"text": (77, 128)},
    ),
    # ours: so small that a CPU measures it in seconds
    "tiny": Shape(
        "sd",
        {
            "in_channels": 4, "out_channels": 4, "sample_size": 8, "block_out_channels": [8, 16],
            "down_block_types": ["CrossAttnDownBlock2D"] * 2, "up_block_types": ["CrossAttnUpBlock2D"] * 2,
            "layers_per_block": 1, "attention_head_dim": 2, "cross_attention_dim": 64, "norm_num_groups": 4,
        },
        {"text": (16, 64)},
        vae={"block_out_channels": [8, 8, 8]},
    ),
}  # fmt: skip


def random_backend(shape: Shape, device: torch.device, dtype: torch.dtype = torch.float32) -> Backend:
    """The family's own backend, with denoisers of random weights, the same ones every time.

    It can denoise and train; it has no autoencoder and no text encoders.

    Args:
        device: "meta" counts FLOPs and weights without computing or holding any.
        dtype: precision of forward passes.
    """
    family = FAMILIES[shape.family]

    class Random(family):  # type: ignore[misc, valid-type]
        def _require_parts(self) -> None:
            pass  # there are only configs

        def _read_denoiser(self, folder: Path, name: str) -> nn.Module:
            import diffusers

            # Made on the device itself (SDXL takes a minute on the CPU), without disturbing its generator.
            generators = [self.device] if self.device.type == "cuda" else []
            with torch.random.fork_rng(generators), torch.device(self.device):
                torch.manual_seed(0)
                return getattr(diffusers, self.DENOISER_CLASS).from_config(dict(shape.denoiser))

        def _precision(self) -> Any:
            return nullcontext() if self.device.type == "meta" else super()._precision()  # meta has no autocast

    temporary = TemporaryDirectory()
    # Real config files: the backend reads and checks them as it does those of a published checkpoint.
    folder = Path(temporary.name)
    for part in (family.DENOISER, "vae", "scheduler", *family.ENCODERS):
        (folder / part).mkdir()
    (folder / "model_index.json").write_text(json.dumps({"_class_name": family.PIPELINE}), "utf-8")
    (folder / family.DENOISER / "config.json").write_text(json.dumps(dict(shape.denoiser)), "utf-8")
    (folder / "vae" / "config.json").write_text(json.dumps(dict(shape.vae)), "utf-8")
    (folder / "scheduler" / "scheduler_config.json").write_text(json.dumps(dict(shape.scheduler)), "utf-8")
    backend = Random(fetch(temporary.name), device, dtype)
    backend.temporary = temporary  # type: ignore[attr-defined]  # the configs are there as long as the backend is
    return backend
