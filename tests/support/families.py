"""Random-weight checkpoints of exactly each family's format, tiny; made here, no network.

Classes are looked up where they are used: both libraries load them on first use, and most tests need few of them.
"""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import diffusers
import torch
import transformers

from tests.support.helpers import random_text_encoder
from workbench.models.small.prompts import split

SCHEDULE = dict(num_train_timesteps=1000, beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear")
BLOCKS = dict(
    down_block_types=("DownEncoderBlock2D",) * 3,
    up_block_types=("UpDecoderBlock2D",) * 3,
    block_out_channels=(8, 8, 8),
    layers_per_block=1,
    norm_num_groups=4,
    sample_size=32,
    mid_block_add_attention=False,
)
#: Of a small language model with rotary positions; byte-level tokens leave room for a template.
LANGUAGE = dict(
    hidden_size=32, intermediate_size=48, num_hidden_layers=3, num_attention_heads=2, num_key_value_heads=1,
    max_position_embeddings=2048,
)  # fmt: skip
CHAT = (
    "{% for message in messages %}<|im_start|>{{ message.role }}\n{{ message.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% if not enable_thinking %}<think></think>{% endif %}"
    "{% endif %}"
)


# Parts


def autoencoder(channels: int, shift: float | None = None) -> diffusers.AutoencoderKL:
    """An untrained autoencoder of 8 channels, 32 px to 8 x 8 latents."""
    return diffusers.AutoencoderKL(**BLOCKS, latent_channels=channels, scaling_factor=0.5, shift_factor=shift)


def clip(tokenizer, projected: bool, seed: int):
    torch.manual_seed(seed)
    config = transformers.CLIPTextConfig(
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
    return (transformers.CLIPTextModelWithProjection if projected else transformers.CLIPTextModel)(config)


def t5():
    words = sorted({word for prompts in split().values() for p in prompts for word in str(p).split()})
    vocab = [("<pad>", 0.0), ("</s>", 0.0), ("<unk>", 0.0), *((f"▁{w}", -2.0) for w in words)]
    tokenizer = transformers.T5Tokenizer(
        vocab=[*vocab, *((c, -9.0) for c in "abcdefghijklmnopqrstuvwxyz▁,")], extra_ids=0
    )
    config = transformers.T5Config(vocab_size=len(tokenizer), d_model=96, d_kv=8, d_ff=32, num_layers=1, num_heads=2)
    return tokenizer, transformers.T5EncoderModel(config)


def qwen_tokenizer() -> transformers.Qwen2Tokenizer:
    """One token a byte."""
    from transformers.convert_slow_tokenizer import bytes_to_unicode

    vocab = {character: number for number, character in enumerate(bytes_to_unicode().values())}
    special = {name: len(vocab) + i for i, name in enumerate(("<|endoftext|>", "<|im_start|>", "<|im_end|>"))}
    tokenizer = transformers.Qwen2Tokenizer(vocab=vocab | special, merges=[], model_max_length=2048)
    tokenizer.add_special_tokens({"additional_special_tokens": list(special)[1:]})
    tokenizer.chat_template = CHAT
    return tokenizer


def gemma():
    letters = [chr(number) for number in range(33, 127)]
    names = ["<pad>", "<eos>", "<bos>", "<unk>", "▁", "\n", *letters]
    tokenizer = transformers.GemmaTokenizer(
        vocab={name: i for i, name in enumerate(names)}, merges=[], model_max_length=2048
    )
    small = LANGUAGE | {"num_hidden_layers": 1, "num_attention_heads": 1}  # the instruction is of a thousand tokens
    config = transformers.Gemma2Config(vocab_size=len(tokenizer), head_dim=16, sliding_window=64, **small)
    return tokenizer, transformers.Gemma2Model(config)


def unet(**options) -> diffusers.UNet2DConditionModel:
    """An untrained denoiser of latents of 8 x 8."""
    return diffusers.UNet2DConditionModel(
        sample_size=8,
        block_out_channels=(8, 16),
        layers_per_block=1,
        down_block_types=("CrossAttnDownBlock2D",) * 2,
        up_block_types=("CrossAttnUpBlock2D",) * 2,
        attention_head_dim=2,
        norm_num_groups=4,
        **options,
    )


# Families


def sd(predicts: str = "epsilon") -> diffusers.StableDiffusionPipeline:
    tokenizer, encoder = random_text_encoder()
    torch.manual_seed(0)
    return diffusers.StableDiffusionPipeline(
        autoencoder(4), encoder, tokenizer, unet(cross_attention_dim=64),
        diffusers.DDIMScheduler(**SCHEDULE, prediction_type=predicts, clip_sample=False, set_alpha_to_one=False),
        safety_checker=None, feature_extractor=None, requires_safety_checker=False,
    )  # fmt: skip


def sdxl() -> diffusers.StableDiffusionXLPipeline:
    tokenizer, _ = random_text_encoder()
    torch.manual_seed(0)
    denoiser = unet(
        cross_attention_dim=64,
        addition_embed_type="text_time",
        addition_time_embed_dim=8,
        projection_class_embeddings_input_dim=6 * 8 + 32,
        transformer_layers_per_block=(1, 2),
        use_linear_projection=True,
    )
    return diffusers.StableDiffusionXLPipeline(
        autoencoder(4), clip(tokenizer, False, 1), clip(tokenizer, True, 2), tokenizer, tokenizer, denoiser,
        diffusers.EulerDiscreteScheduler(**SCHEDULE),
    )  # fmt: skip


def sd3(**options) -> diffusers.StableDiffusion3Pipeline:
    tokenizer, _ = random_text_encoder()
    torch.manual_seed(0)
    denoiser = diffusers.SD3Transformer2DModel(
        sample_size=8, patch_size=2, in_channels=16, out_channels=16, num_layers=2, attention_head_dim=8,
        num_attention_heads=4, joint_attention_dim=96, caption_projection_dim=32, pooled_projection_dim=64,
        pos_embed_max_size=16, **options,
    )  # fmt: skip
    t5_tokenizer, t5_encoder = t5()
    return diffusers.StableDiffusion3Pipeline(
        denoiser, diffusers.FlowMatchEulerDiscreteScheduler(shift=3.0), autoencoder(16, 0.1),
        clip(tokenizer, True, 1), tokenizer, clip(tokenizer, True, 2), tokenizer, t5_encoder, t5_tokenizer,
    )  # fmt: skip


def flux1(distilled: bool = True) -> diffusers.FluxPipeline:
    """FLUX.1-dev; schnell has no guidance input and no shift."""
    tokenizer, _ = random_text_encoder()
    torch.manual_seed(0)
    denoiser = diffusers.FluxTransformer2DModel(
        in_channels=64, num_layers=1, num_single_layers=1, attention_head_dim=16, num_attention_heads=2,
        joint_attention_dim=96, pooled_projection_dim=32, guidance_embeds=distilled, axes_dims_rope=(4, 6, 6),
    )  # fmt: skip
    t5_tokenizer, t5_encoder = t5()
    return diffusers.FluxPipeline(
        diffusers.FlowMatchEulerDiscreteScheduler(shift=1.0, use_dynamic_shifting=distilled), autoencoder(16, 0.1),
        clip(tokenizer, False, 1), tokenizer, t5_encoder, t5_tokenizer, denoiser,
    )  # fmt: skip


def flux2_klein() -> diffusers.Flux2KleinPipeline:
    tokenizer = qwen_tokenizer()
    torch.manual_seed(0)
    config = transformers.Qwen3Config(vocab_size=len(tokenizer), head_dim=16, **LANGUAGE | {"num_hidden_layers": 28})
    vae = diffusers.AutoencoderKLFlux2(**BLOCKS, latent_channels=8)
    vae.bn.running_mean.normal_()
    vae.bn.running_var.uniform_(0.5, 2)
    denoiser = diffusers.Flux2Transformer2DModel(
        in_channels=32, num_layers=1, num_single_layers=1, attention_head_dim=16, num_attention_heads=2,
        joint_attention_dim=96, axes_dims_rope=(4, 4, 4, 4), guidance_embeds=False,
    )  # fmt: skip
    scheduler = diffusers.FlowMatchEulerDiscreteScheduler(shift=3.0, use_dynamic_shifting=True)
    return diffusers.Flux2KleinPipeline(scheduler, vae, transformers.Qwen3ForCausalLM(config), tokenizer, denoiser)


def qwen_image() -> diffusers.QwenImagePipeline:
    tokenizer = qwen_tokenizer()
    torch.manual_seed(0)
    vision = dict(depth=1, hidden_size=16, intermediate_size=16, num_heads=2, out_hidden_size=32, patch_size=4)
    rope = {"rope_type": "default", "mrope_section": [2, 3, 3]}
    text = {"vocab_size": len(tokenizer), "rope_parameters": rope, "max_window_layers": 3} | LANGUAGE
    text |= {"bos_token_id": None, "eos_token_id": None}
    encoder = transformers.Qwen2_5_VLForConditionalGeneration(
        transformers.Qwen2_5_VLConfig(text_config=text, vision_config=vision)
    )
    vae = diffusers.AutoencoderKLQwenImage(
        base_dim=8, z_dim=16, dim_mult=[1, 1, 1], num_res_blocks=1, temperal_downsample=[False, True]
    )
    denoiser = diffusers.QwenImageTransformer2DModel(
        in_channels=64, out_channels=16, num_layers=2, attention_head_dim=16, num_attention_heads=2,
        joint_attention_dim=32, axes_dims_rope=(4, 6, 6),
    )  # fmt: skip
    scheduler = diffusers.FlowMatchEulerDiscreteScheduler(
        use_dynamic_shifting=True, max_image_seq_len=8192, max_shift=0.9, shift_terminal=0.02
    )
    return diffusers.QwenImagePipeline(scheduler, vae, encoder, tokenizer, denoiser)


def z_image() -> diffusers.ZImagePipeline:
    tokenizer = qwen_tokenizer()
    torch.manual_seed(0)
    encoder = transformers.Qwen3Model(transformers.Qwen3Config(vocab_size=len(tokenizer), head_dim=16, **LANGUAGE))
    denoiser = diffusers.ZImageTransformer2DModel(
        in_channels=16, dim=32, n_layers=2, n_refiner_layers=1, n_heads=2, n_kv_heads=2, cap_feat_dim=32,
        axes_dims=[4, 6, 6], axes_lens=[1024, 64, 64],
    )  # fmt: skip
    scheduler = diffusers.FlowMatchEulerDiscreteScheduler(shift=3.0)
    return diffusers.ZImagePipeline(scheduler, autoencoder(16, 0.1), encoder, tokenizer, denoiser)


def sana() -> diffusers.SanaPipeline:
    tokenizer, encoder = gemma()
    torch.manual_seed(0)
    vae = diffusers.AutoencoderDC(
        latent_channels=8, attention_head_dim=2,
        encoder_block_out_channels=(8, 8, 8), decoder_block_out_channels=(8, 8, 8),
        encoder_layers_per_block=(1, 1, 1), decoder_layers_per_block=(1, 1, 1),
        encoder_qkv_multiscales=((), (), ()), decoder_qkv_multiscales=((), (), ()), scaling_factor=0.4,
    )  # fmt: skip
    denoiser = diffusers.SanaTransformer2DModel(
        in_channels=8, out_channels=8, num_attention_heads=2, attention_head_dim=8, num_layers=1,
        num_cross_attention_heads=2, cross_attention_head_dim=8, cross_attention_dim=16, caption_channels=32,
        sample_size=8,
    )  # fmt: skip
    scheduler = diffusers.DPMSolverMultistepScheduler(
        prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=3.0, algorithm_type="dpmsolver++"
    )
    return diffusers.SanaPipeline(tokenizer, encoder, vae, denoiser, scheduler)


MAKERS: dict[str, Callable[[], Any]] = {
    "sd": sd,
    "sd-v": lambda: sd("v_prediction"),
    "sdxl": sdxl,
    "sd3": sd3,
    "sd35": lambda: sd3(qk_norm="rms_norm", dual_attention_layers=(0,)),
    "flux1": flux1,
    "flux1-schnell": lambda: flux1(distilled=False),
    "flux2-klein": flux2_klein,
    "qwen-image": qwen_image,
    "z-image": z_image,
    "sana": sana,
}
#: What the test of every family takes: each family, and variants that differ in more than numbers.
NAMES = tuple(name for name in MAKERS if name != "flux1-schnell")


def make(name: str, folder: Path) -> Path:
    """Save a checkpoint of a family into a folder; float32, norms and biases away from their initial 0 and 1."""
    torch.manual_seed(0)
    pipe = MAKERS[name]()
    generator = torch.Generator().manual_seed(1)
    for part in pipe.components.values():
        if isinstance(part, torch.nn.Module):
            for parameter in part.parameters():
                if parameter.ndim == 1:
                    parameter.data += 0.3 * torch.randn(parameter.shape, generator=generator)
    pipe.save_pretrained(folder)
    return folder
