"""Random-weight checkpoints of exactly each family's format, tiny; made here, no network."""

from pathlib import Path

import torch
from diffusers import (
    AutoencoderKL,
    DDIMScheduler,
    EulerDiscreteScheduler,
    FlowMatchEulerDiscreteScheduler,
    FluxPipeline,
    FluxTransformer2DModel,
    SD3Transformer2DModel,
    StableDiffusion3Pipeline,
    StableDiffusionPipeline,
    StableDiffusionXLPipeline,
    UNet2DConditionModel,
)
from transformers import (
    CLIPTextConfig,
    CLIPTextModel,
    CLIPTextModelWithProjection,
    T5Config,
    T5EncoderModel,
    T5Tokenizer,
)

from tests.support.helpers import random_text_encoder
from workbench.models.small.prompts import split

NAMES = ("sd", "sd-v", "sdxl", "sd3", "flux1")
SCHEDULE = dict(num_train_timesteps=1000, beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear")


def autoencoder(channels: int, shift: float | None = None) -> AutoencoderKL:
    """An untrained autoencoder of 8 channels, 32 px to 8 x 8 latents."""
    return AutoencoderKL(
        down_block_types=("DownEncoderBlock2D",) * 3,
        up_block_types=("UpDecoderBlock2D",) * 3,
        block_out_channels=(8, 8, 8),
        layers_per_block=1,
        latent_channels=channels,
        norm_num_groups=4,
        sample_size=32,
        scaling_factor=0.5,
        shift_factor=shift,
        mid_block_add_attention=False,
    )


def clip(tokenizer, projected: bool, seed: int):
    torch.manual_seed(seed)
    config = CLIPTextConfig(
        vocab_size=len(tokenizer),
        hidden_size=32,
        intermediate_size=64,
        projection_dim=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        max_position_embeddings=tokenizer.model_max_length,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    return (CLIPTextModelWithProjection if projected else CLIPTextModel)(config)


def t5():
    words = sorted({word for prompts in split().values() for p in prompts for word in str(p).split()})
    vocab = [("<pad>", 0.0), ("</s>", 0.0), ("<unk>", 0.0), *((f"▁{w}", -2.0) for w in words)]
    tokenizer = T5Tokenizer(vocab=[*vocab, *((c, -9.0) for c in "abcdefghijklmnopqrstuvwxyz▁,")], extra_ids=0)
    config = T5Config(vocab_size=len(tokenizer), d_model=96, d_kv=8, d_ff=32, num_layers=1, num_heads=2)
    return tokenizer, T5EncoderModel(config)


def unet(**options) -> UNet2DConditionModel:
    """An untrained denoiser of latents of 8 x 8."""
    return UNet2DConditionModel(
        sample_size=8,
        block_out_channels=(8, 16),
        layers_per_block=1,
        down_block_types=("CrossAttnDownBlock2D",) * 2,
        up_block_types=("CrossAttnUpBlock2D",) * 2,
        attention_head_dim=2,
        norm_num_groups=4,
        **options,
    )


def make(name: str, folder: Path) -> Path:
    """Save a checkpoint of a family into a folder; float32, norms and biases away from their initial 0 and 1."""
    torch.manual_seed(0)
    tokenizer, encoder = random_text_encoder()
    torch.manual_seed(0)
    off = dict(safety_checker=None, feature_extractor=None, requires_safety_checker=False)
    if name in ("sd", "sd-v"):
        predicts = "v_prediction" if name == "sd-v" else "epsilon"
        scheduler = DDIMScheduler(**SCHEDULE, prediction_type=predicts, clip_sample=False, set_alpha_to_one=False)
        pipe = StableDiffusionPipeline(
            autoencoder(4), encoder, tokenizer, unet(cross_attention_dim=64), scheduler, **off
        )
    elif name == "sdxl":
        denoiser = unet(
            cross_attention_dim=64,
            addition_embed_type="text_time",
            addition_time_embed_dim=8,
            projection_class_embeddings_input_dim=6 * 8 + 32,
            transformer_layers_per_block=(1, 2),
            use_linear_projection=True,
        )
        pipe = StableDiffusionXLPipeline(
            autoencoder(4), clip(tokenizer, False, 1), clip(tokenizer, True, 2), tokenizer, tokenizer, denoiser,
            EulerDiscreteScheduler(**SCHEDULE),
        )  # fmt: skip
    elif name.startswith("flux1"):
        distilled = name == "flux1"  # dev; schnell has no guidance input and no shift
        denoiser = FluxTransformer2DModel(
            in_channels=64, num_layers=1, num_single_layers=1, attention_head_dim=16, num_attention_heads=2,
            joint_attention_dim=96, pooled_projection_dim=32, guidance_embeds=distilled, axes_dims_rope=(4, 6, 6),
        )  # fmt: skip
        t5_tokenizer, t5_encoder = t5()
        pipe = FluxPipeline(
            FlowMatchEulerDiscreteScheduler(shift=1.0, use_dynamic_shifting=distilled), autoencoder(16, 0.1),
            clip(tokenizer, False, 1), tokenizer, t5_encoder, t5_tokenizer, denoiser,
        )  # fmt: skip
    else:
        denoiser = SD3Transformer2DModel(
            sample_size=8, patch_size=2, in_channels=16, out_channels=16, num_layers=2, attention_head_dim=8,
            num_attention_heads=4, joint_attention_dim=96, caption_projection_dim=32, pooled_projection_dim=64,
            pos_embed_max_size=16,
        )  # fmt: skip
        t5_tokenizer, t5_encoder = t5()
        pipe = StableDiffusion3Pipeline(
            denoiser, FlowMatchEulerDiscreteScheduler(shift=3.0), autoencoder(16, 0.1),
            clip(tokenizer, True, 1), tokenizer, clip(tokenizer, True, 2), tokenizer, t5_encoder, t5_tokenizer,
        )  # fmt: skip
    generator = torch.Generator().manual_seed(1)
    for part in pipe.components.values():
        if isinstance(part, torch.nn.Module):
            for parameter in part.parameters():
                if parameter.ndim == 1:
                    parameter.data += 0.3 * torch.randn(parameter.shape, generator=generator)
    pipe.save_pretrained(folder)
    return folder
