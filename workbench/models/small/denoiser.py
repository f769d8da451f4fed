"""The small model's denoiser and text encoder: architectures, loss, and the checkpoint folder that holds them."""

import copy
import itertools
import json
from pathlib import Path
from typing import Any

import torch
from torch import Generator, Tensor, nn

from workbench.models.small.autoencoder import LATENT_CHANNELS
from workbench.models.small.faults import pick, uniform
from workbench.models.small.fit import Loss
from workbench.models.small.prompts import COLOURS, CONCEPTS, STYLES, Prompt, probes


def every_caption() -> list[str]:
    """Every caption of the grammar: concept by concept, style by style, colour by colour."""
    return [str(Prompt(c, k, s)) for c, s, k in itertools.product(CONCEPTS, STYLES, COLOURS)]


def new_text_encoder(folder: Path):
    """A byte-pair tokenizer made from the captions (and the probes' words), and an untrained CLIP text encoder."""
    from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, trainers
    from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizer

    bpe = Tokenizer(models.BPE(continuing_subword_prefix="", end_of_word_suffix="</w>", unk_token="<|endoftext|>"))
    bpe.normalizer = normalizers.Lowercase()
    bpe.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.WhitespaceSplit(),
            pre_tokenizers.Punctuation(),
            pre_tokenizers.ByteLevel(add_prefix_space=False),
        ]
    )
    trainer = trainers.BpeTrainer(
        vocab_size=1400,
        min_frequency=1,
        show_progress=False,
        special_tokens=["<|startoftext|>", "<|endoftext|>"],
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        end_of_word_suffix="</w>",
    )
    bpe.train_from_iterator(itertools.chain(every_caption(), *probes().values()), trainer)
    folder.mkdir(parents=True, exist_ok=True)
    bpe.model.save(str(folder))
    # The first line of merges.txt is its version.
    merges = [tuple(line.split()) for line in (folder / "merges.txt").read_text("utf-8").splitlines()[1:]]
    vocab = json.loads((folder / "vocab.json").read_text("utf-8"))
    tokenizer = CLIPTokenizer(vocab=vocab, merges=merges, model_max_length=16)  # type: ignore[arg-type]
    config = CLIPTextConfig(
        vocab_size=len(tokenizer),
        hidden_size=128,
        intermediate_size=384,
        projection_dim=128,
        num_hidden_layers=2,
        num_attention_heads=4,
        max_position_embeddings=16,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    return tokenizer, CLIPTextModel(config)


def new_unet():
    """An untrained UNet, 4.3M parameters, two resolutions, cross-attention at both."""
    from diffusers import UNet2DConditionModel

    return UNet2DConditionModel(
        sample_size=8,
        in_channels=LATENT_CHANNELS,
        out_channels=LATENT_CHANNELS,
        block_out_channels=(64, 128),
        layers_per_block=1,
        down_block_types=("CrossAttnDownBlock2D",) * 2,
        up_block_types=("CrossAttnUpBlock2D",) * 2,
        cross_attention_dim=128,
        attention_head_dim=4,  # the number of heads, for historical reasons
        norm_num_groups=16,
    )


def new_scheduler():
    """DDIM on Stable Diffusion 1.5's noise schedule, epsilon prediction."""
    from diffusers import DDIMScheduler

    return DDIMScheduler(
        beta_start=0.00085,
        beta_end=0.012,
        beta_schedule="scaled_linear",
        clip_sample=False,
        set_alpha_to_one=False,
        steps_offset=1,
    )


def denoiser_loss(
    model: nn.ModuleDict, tokens: Tensor, latents: Tensor, caption: Tensor, scale: float, batch: int
) -> Loss:
    """Epsilon loss weighted by min(SNR, 5) / SNR (Hang et al. 2023), a tenth of the captions dropped.

    Args:
        tokens: of `every_caption()` and of the empty caption after them, (V + 1, 16).
        latents: unscaled, (N, C, 8, 8), with N indices of captions.
        scale: latents' scaling factor.
    """
    abar = new_scheduler().alphas_cumprod.to(latents.device)

    def loss(g: Generator) -> Tensor:
        chosen = pick(batch, len(latents), g)
        x0 = latents[chosen].float() * scale
        # The last row of tokens is the empty caption.
        text = caption[chosen].masked_fill(uniform(g, (batch,)) < 0.1, len(tokens) - 1)
        # One timestep from each of `batch` equal parts of the axis: less noise than free draws. Rounding can give 1000.
        t = ((torch.arange(batch, device=g.device) + uniform(g, (batch,))) / batch * 1000).long().clamp(max=999)
        eps = torch.randn(x0.shape, generator=g, device=g.device)
        a = abar[t].view(-1, 1, 1, 1)
        hidden = model["text_encoder"](tokens[text]).last_hidden_state
        predicted = model["unet"](a.sqrt() * x0 + (1 - a).sqrt() * eps, t, hidden).sample
        snr = abar[t] / (1 - abar[t])
        return (snr.clamp(max=5) / snr * (predicted - eps).square().mean((1, 2, 3))).mean()

    return loss


def save_model(out: Path, vae, model: nn.ModuleDict, tokenizer, scaling_factor: float) -> None:
    """Write a diffusers checkpoint folder in half precision that loads in float32.

    Args:
        model: the modules `unet` and `text_encoder`.
        scaling_factor: the latents', see `StableDiffusionPipeline`.
    """
    from diffusers import StableDiffusionPipeline

    from workbench.models.checkpoints import declare_float32

    vae.register_to_config(scaling_factor=scaling_factor)
    # Copies of the networks: `half` changes in place, and the caller goes on with them in float32.
    pipeline: Any = StableDiffusionPipeline(
        vae=copy.deepcopy(vae),
        text_encoder=copy.deepcopy(model["text_encoder"]),
        tokenizer=tokenizer,
        unet=copy.deepcopy(model["unet"]),
        scheduler=new_scheduler(),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )
    for part in (pipeline.vae, pipeline.text_encoder, pipeline.unet):
        part.half()
    pipeline.save_pretrained(out, safe_serialization=True)
    declare_float32(out / "text_encoder" / "config.json")
