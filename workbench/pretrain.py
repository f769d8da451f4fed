"""`python -m workbench.pretrain`: rebuild the small model, its scorer and its judge from openly licensed artwork.

Stages, each resumable from its own checkpoint under the work folder: the autoencoder, the scorer and the
judge (two classifiers that share neither architecture nor augmentations), the denoiser with its text
encoder. The last step writes a diffusers checkpoint folder in half precision, a sample grid and the
judge's verdict on samples of every prompt.
"""

import copy
import itertools
import json
import os
import time
from collections.abc import Callable
from pathlib import Path

import click
import torch
import torch.nn.functional as F
from torch import Generator, Tensor, nn
from tqdm import tqdm

from workbench import artwork
from workbench.artwork import Drawings
from workbench.prompts import COLOURS, CONCEPTS, STYLES, Prompt

LATENT_CHANNELS = 12
Loss = Callable[[Generator], Tensor]


def fit(
    name: str,
    module: nn.Module,
    loss: Loss,
    work: Path,
    *,
    steps: int,
    lr: float,
    ema_decay: float = 0.0,
    save_every: float = 60.0,
) -> None:
    """Minimise `loss` over `module`'s weights with AdamW and a cosine decay, resumably.

    Each step's draws come from a generator seeded with the step, so a resumed run draws what an
    uninterrupted one would have. On return the module holds the averaged weights if `ema_decay` > 0.

    Args:
        loss: draws a batch from the generator and returns the scalar loss.
        work: folder of the checkpoint `NAME.pt`, written atomically every `save_every` seconds.
        ema_decay: largest decay of the weights' running average; 0 keeps the last weights.
    """
    optimizer = torch.optim.AdamW(module.parameters(), lr=lr, betas=(0.9, 0.99), weight_decay=1e-3, fused=True)
    warmup = min(300, steps // 10 + 1)
    schedule = torch.optim.lr_scheduler.SequentialLR(
        optimizer,
        [
            torch.optim.lr_scheduler.LinearLR(optimizer, 0.01, 1.0, warmup),
            torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps - warmup, eta_min=lr * 0.01),
        ],
        [warmup],
    )
    average = copy.deepcopy(module)
    path, start = work / f"{name}.pt", 0
    if path.exists():
        state = torch.load(path, weights_only=True, map_location=next(module.parameters()).device)
        module.load_state_dict(state["module"])
        average.load_state_dict(state["average"])
        optimizer.load_state_dict(state["optimizer"])
        schedule.load_state_dict(state["schedule"])
        start = state["step"]

    def save(step: int) -> None:
        state = {
            "step": step,
            "module": module.state_dict(),
            "average": average.state_dict(),
            "optimizer": optimizer.state_dict(),
            "schedule": schedule.state_dict(),
        }
        torch.save(state, path.with_suffix(".tmp"))
        os.replace(path.with_suffix(".tmp"), path)

    module.train()
    saved, recent = time.monotonic(), []
    bar = tqdm(range(start, steps), desc=name, initial=start, total=steps, mininterval=5)
    for step in bar:
        value = loss(Generator().manual_seed(step))
        optimizer.zero_grad(set_to_none=True)
        value.backward()
        nn.utils.clip_grad_norm_(module.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        decay = min(ema_decay, (step + 1) / (step + 10)) if ema_decay else 0.0
        with torch.no_grad():
            for slow, fast in zip(average.parameters(), module.parameters(), strict=True):
                slow.lerp_(fast, 1 - decay)
        recent.append(value.detach())
        if len(recent) == 100:
            mean = torch.stack(recent).mean().item()
            if mean != mean:
                raise FloatingPointError(f"{name}: loss is not finite near step {step}")
            bar.set_postfix(loss=f"{mean:.4f}")
            recent.clear()
        if time.monotonic() - saved > save_every:
            save(step + 1)
            saved = time.monotonic()
    save(steps)
    module.load_state_dict(average.state_dict())
    module.eval().requires_grad_(False)


def draw(drawings: Drawings, count: int, background: Tensor, g: Generator) -> tuple[Tensor, Tensor]:
    """`count` random drawings, each shifted a little, over its background: images in -1..1 and concepts."""
    index = torch.randint(len(drawings.rgba), (count,), generator=g)
    shift = torch.randint(len(artwork.SHIFTS), (count,), generator=g)
    rgba = torch.stack(
        [torch.roll(drawings.rgba[i], artwork.SHIFTS[s], (1, 2)) for i, s in zip(index, shift, strict=True)]
    )
    return artwork.compose(rgba, background), drawings.concept[index]


# --- autoencoder ---------------------------------------------------------------------------------------------


def new_autoencoder():
    """An untrained AutoencoderKL, 32x32x3 pixels to 8x8x12 latents."""
    from diffusers import AutoencoderKL

    return AutoencoderKL(
        down_block_types=("DownEncoderBlock2D",) * 3,
        up_block_types=("UpDecoderBlock2D",) * 3,
        block_out_channels=(32, 64, 96),
        layers_per_block=1,
        latent_channels=LATENT_CHANNELS,
        norm_num_groups=8,
        sample_size=artwork.SIZE,
        mid_block_add_attention=False,
    )


def autoencoder_loss(vae, named: Drawings, others: Drawings, device: torch.device, batch: int = 16) -> Loss:
    """4 MSE + L1 + half the L1 of image gradients + 1e-3 KL (mean over latent elements)."""
    palette = artwork.palette()

    def loss(g: Generator) -> Tensor:
        half = batch // 2
        named_colours = palette[torch.randint(len(palette), (half,), generator=g)]
        images = torch.cat(
            [
                draw(named, half, named_colours, g)[0],
                draw(others, batch - half, torch.rand(batch - half, 3, generator=g), g)[0],
            ]
        ).to(device)
        posterior = vae.encode(images).latent_dist
        noise = torch.randn(posterior.mean.shape, generator=g).to(device)
        decoded = vae.decode(posterior.mean + posterior.std * noise).sample
        error = decoded - images
        gradients = error.diff(dim=2).abs().mean() + error.diff(dim=3).abs().mean()
        kl = posterior.kl().mean() / posterior.mean[0].numel()
        return 4 * error.square().mean() + error.abs().mean() + 0.5 * gradients + 1e-3 * kl

    return loss


@torch.no_grad()
def all_latents(vae, named: Drawings, device: torch.device) -> tuple[Tensor, list[str]]:
    """Latents (posterior means, unscaled) of every drawing at every scale and shift on every named colour.

    Returns:
        Latents (N, C, 8, 8) and their N captions.
    """
    names, colours = list(CONCEPTS), list(COLOURS)
    latents, captions = [], []
    for i in tqdm(range(len(named.rgba)), desc="encode artwork", mininterval=5):
        for c, colour in enumerate(colours):
            rgba = torch.stack([torch.roll(named.rgba[i], shift, (1, 2)) for shift in artwork.SHIFTS])
            images = artwork.compose(rgba, artwork.palette()[c].expand(len(rgba), 3))
            latents.append(vae.encode(images.to(device)).latent_dist.mean.cpu())
            prompt = Prompt(names[int(named.concept[i])], colour, STYLES[int(named.style[i])])
            captions += [str(prompt)] * len(rgba)
    return torch.cat(latents), captions


# --- classifiers ---------------------------------------------------------------------------------------------


def labels() -> list[str]:
    """Classes of the scorer and the judge: the concepts, then anything else."""
    return [*CONCEPTS, "something else"]


def new_classifier(kind: str):
    """An untrained classifier of the named concepts: the scorer is a ConvNeXt, the judge a vision transformer."""
    from transformers import ConvNextConfig, ConvNextForImageClassification, ViTConfig, ViTForImageClassification

    id2label = dict(enumerate(labels()))
    label2id = {label: i for i, label in id2label.items()}
    if kind == "scorer":
        return ConvNextForImageClassification(
            ConvNextConfig(
                image_size=artwork.SIZE,
                patch_size=2,
                num_stages=3,
                hidden_sizes=[48, 96, 144],
                depths=[2, 2, 2],
                id2label=id2label,
                label2id=label2id,
            )
        )
    return ViTForImageClassification(
        ViTConfig(
            image_size=artwork.SIZE,
            patch_size=4,
            hidden_size=128,
            num_hidden_layers=4,
            num_attention_heads=4,
            intermediate_size=256,
            id2label=id2label,
            label2id=label2id,
        )
    )


def warp(rgba: Tensor, g: Generator, *, turn: float, zoom: tuple[float, float], move: float) -> Tensor:
    """Randomly turned (radians), zoomed and moved (fraction of the canvas) copies of drawings."""
    n = len(rgba)
    angle = (torch.rand(n, generator=g) * 2 - 1) * turn
    scale = torch.empty(n).uniform_(*zoom, generator=g)
    theta = torch.zeros(n, 2, 3)
    theta[:, 0, 0] = theta[:, 1, 1] = torch.cos(angle) / scale
    theta[:, 0, 1] = -torch.sin(angle) / scale
    theta[:, 1, 0] = torch.sin(angle) / scale
    theta[:, :, 2] = (torch.rand(n, 2, generator=g) * 2 - 1) * move
    return F.grid_sample(rgba, F.affine_grid(theta, list(rgba.shape), align_corners=False), align_corners=False)


def scrambled(images: Tensor, g: Generator) -> Tensor:
    """Images whose sixteen tiles are shuffled: the right texture without the right shape."""
    n, c, size, _ = images.shape
    tile = size // 4
    tiles = images.view(n, c, 4, tile, 4, tile).permute(0, 2, 4, 1, 3, 5).reshape(n, 16, c, tile, tile)
    tiles = torch.stack([t[torch.randperm(16, generator=g)] for t in tiles])
    return tiles.view(n, 4, 4, c, tile, tile).permute(0, 3, 1, 4, 2, 5).reshape(n, c, size, size)


def augmented(kind: str, rgba: Tensor, g: Generator) -> Tensor:
    """Drawings as the scorer or the judge trains on them, images in -1..1.

    The scorer sees small turns, plain backgrounds, noise and blur; the judge sees larger turns, mirrored
    drawings, two-colour backgrounds, shifted hues, low resolution and a hole.
    """
    n = len(rgba)
    chosen = artwork.palette()[torch.randint(len(COLOURS), (n,), generator=g)]
    plain = torch.where(torch.rand(n, 1, generator=g) < 0.6, chosen, torch.rand(n, 3, generator=g))
    some = lambda p: (torch.rand(n, 1, 1, 1, generator=g) < p)  # noqa: E731
    if kind == "scorer":
        images = artwork.compose(warp(rgba, g, turn=0.15, zoom=(0.85, 1.15), move=0.12), plain)
        images = torch.where(some(0.4), F.avg_pool2d(images, 3, 1, 1, count_include_pad=False), images)
        strength = torch.rand(n, 1, 1, 1, generator=g) * 0.25
        images = images + strength * torch.randn(images.shape, generator=g)
        return images * torch.empty(n, 1, 1, 1).uniform_(0.85, 1.15, generator=g)
    rgba = torch.where(some(0.5), rgba.flip(3), rgba)
    rgba = warp(rgba, g, turn=0.35, zoom=(0.75, 1.2), move=0.15)
    other = (plain + 0.4 * torch.rand(n, 3, generator=g) - 0.2).clamp(0, 1)
    ramp = torch.linspace(0, 1, artwork.SIZE)[None, None, :, None]
    ground = plain[:, :, None, None] * (1 - ramp) + other[:, :, None, None] * ramp
    images = (rgba[:, :3] + ground * (1 - rgba[:, 3:])) * 2 - 1
    mix = torch.eye(3) + 0.12 * torch.randn(n, 3, 3, generator=g)
    images = torch.einsum("nij,njhw->nihw", mix, images)
    small = F.interpolate(F.interpolate(images, size=20, mode="area"), size=artwork.SIZE, mode="bilinear")
    images = torch.where(some(0.5), small, images)
    y, x = torch.randint(0, artwork.SIZE - 8, (2, n), generator=g)
    rows, columns = torch.arange(artwork.SIZE)[None, :, None], torch.arange(artwork.SIZE)[None, None, :]
    inside = (rows >= y[:, None, None]) & (rows < y[:, None, None] + 8)
    inside = inside & (columns >= x[:, None, None]) & (columns < x[:, None, None] + 8)
    return torch.where(inside[:, None] & some(0.5), torch.zeros(()), images)


def classifier_batch(
    kind: str, named: Drawings, others: Drawings, g: Generator, batch: int = 64
) -> tuple[Tensor, Tensor]:
    """Augmented images and classes: two thirds named drawings, the rest other drawings and scrambled ones."""
    a = torch.randint(len(named.rgba), (batch * 2 // 3,), generator=g)
    b = torch.randint(len(others.rgba), (batch // 6,), generator=g)
    c = torch.randint(len(named.rgba), (batch - len(a) - len(b),), generator=g)
    images = augmented(kind, torch.cat([named.rgba[a], others.rgba[b], named.rgba[c]]), g)
    broken = scrambled(images[len(a) + len(b) :], g)
    images = torch.cat([images[: len(a) + len(b)], broken]).clamp(-1, 1)
    rest = torch.full((batch - len(a),), len(CONCEPTS))
    return images, torch.cat([named.concept[a], rest])


def classifier_loss(kind: str, model, named: Drawings, others: Drawings, device: torch.device) -> Loss:
    """Cross-entropy with a little label smoothing, so that log-probabilities stay informative."""

    def loss(g: Generator) -> Tensor:
        images, concept = classifier_batch(kind, named, others, g)
        return F.cross_entropy(model(images.to(device)).logits, concept.to(device), label_smoothing=0.02)

    return loss


# --- denoiser ------------------------------------------------------------------------------------------------


def new_text_encoder(folder: Path):
    """A CLIP tokenizer learned from the prompt grammar, and an untrained text encoder for it."""
    from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, trainers
    from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizer

    bpe = Tokenizer(models.BPE(continuing_subword_prefix="", end_of_word_suffix="</w>", unk_token="<|endoftext|>"))
    bpe.normalizer = normalizers.Lowercase()
    bpe.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.WhitespaceSplit(), pre_tokenizers.Punctuation(), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    trainer = trainers.BpeTrainer(
        vocab_size=1000,
        min_frequency=1,
        show_progress=False,
        special_tokens=["<|startoftext|>", "<|endoftext|>"],
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        end_of_word_suffix="</w>",
    )
    bpe.train_from_iterator((str(Prompt(*p)) for p in itertools.product(CONCEPTS, COLOURS, STYLES)), trainer)
    folder.mkdir(parents=True, exist_ok=True)
    bpe.model.save(str(folder))
    merges = [tuple(line.split()) for line in (folder / "merges.txt").read_text().splitlines()[1:]]
    vocab = json.loads((folder / "vocab.json").read_text())
    tokenizer = CLIPTokenizer(vocab=vocab, merges=merges, model_max_length=16)
    config = CLIPTextConfig(
        vocab_size=len(tokenizer),
        hidden_size=64,
        intermediate_size=256,
        projection_dim=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        max_position_embeddings=16,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    return tokenizer, CLIPTextModel(config)


def new_unet():
    """An untrained UNet, 4.2M parameters, two resolutions, cross-attention at both."""
    from diffusers import UNet2DConditionModel

    return UNet2DConditionModel(
        sample_size=8,
        in_channels=LATENT_CHANNELS,
        out_channels=LATENT_CHANNELS,
        block_out_channels=(64, 128),
        layers_per_block=1,
        down_block_types=("CrossAttnDownBlock2D",) * 2,
        up_block_types=("CrossAttnUpBlock2D",) * 2,
        cross_attention_dim=64,
        attention_head_dim=4,
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
    model: nn.ModuleDict, tokenizer, latents: Tensor, captions: list[str], device: torch.device, batch: int = 64
) -> Loss:
    """Epsilon loss weighted by min(SNR, 5) / SNR (Hang et al. 2023), a tenth of the captions dropped.

    Args:
        latents: scaled, (N, C, 8, 8), with N captions.
    """
    abar = new_scheduler().alphas_cumprod.to(device)
    vocabulary = sorted(set(captions))
    index = {caption: i for i, caption in enumerate(vocabulary)}
    caption_index = torch.tensor([index[c] for c in captions])
    tokens = tokenizer([*vocabulary, ""], padding="max_length", truncation=True, return_tensors="pt").input_ids

    def loss(g: Generator) -> Tensor:
        chosen = torch.randint(len(latents), (batch,), generator=g)
        x0 = latents[chosen].to(device)
        caption = caption_index[chosen].masked_fill(torch.rand(batch, generator=g) < 0.1, len(vocabulary))
        t = ((torch.arange(batch) + torch.rand(batch, generator=g)) / batch * 1000).long().to(device)
        eps = torch.randn(x0.shape, generator=g).to(device)
        a = abar[t].view(-1, 1, 1, 1)
        hidden = model["text_encoder"](tokens[caption].to(device)).last_hidden_state
        predicted = model["unet"](a.sqrt() * x0 + (1 - a).sqrt() * eps, t, hidden).sample
        snr = abar[t] / (1 - abar[t])
        return (snr.clamp(max=5) / snr * (predicted - eps).square().mean((1, 2, 3))).mean()

    return loss


# --- the whole build -----------------------------------------------------------------------------------------


def save_model(out: Path, vae, text_encoder, tokenizer, unet, scaling_factor: float) -> None:
    """Write the diffusers checkpoint folder in half precision."""
    from diffusers import StableDiffusionPipeline

    vae.register_to_config(scaling_factor=scaling_factor)
    pipeline = StableDiffusionPipeline(
        vae=copy.deepcopy(vae),
        text_encoder=copy.deepcopy(text_encoder),
        tokenizer=tokenizer,
        unet=copy.deepcopy(unet),
        scheduler=new_scheduler(),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )
    pipeline.to(torch.float16).save_pretrained(out, safe_serialization=True)


@click.command(help=__doc__)
@click.option("--out", type=click.Path(path_type=Path), default=Path("pretrain/assets"), show_default=True)
@click.option("--work", type=click.Path(path_type=Path), default=Path("pretrain"), show_default=True)
@click.option("--device", default="cuda" if torch.cuda.is_available() else "cpu", show_default=True)
@click.option("--threads", default=1, show_default=True, help="CPU threads.")
@click.option("--autoencoder-steps", default=4000, show_default=True)
@click.option("--classifier-steps", default=3000, show_default=True)
@click.option("--denoiser-steps", default=9000, show_default=True)
@click.option("--only", type=click.Choice(["autoencoder", "classifiers", "denoiser"]), help="Stop after one stage.")
def main(out, work, device, threads, autoencoder_steps, classifier_steps, denoiser_steps, only):
    torch.set_num_threads(threads)
    torch.manual_seed(0)
    device = torch.device(device)
    work.mkdir(parents=True, exist_ok=True)
    named, others = artwork.load(work / "artwork")

    if only in (None, "classifiers"):
        for kind in ("scorer", "judge"):
            classifier = new_classifier(kind).to(device)
            fit(
                kind, classifier, classifier_loss(kind, classifier, named, others, device), work,
                steps=classifier_steps, lr=1e-3, ema_decay=0.998,
            )  # fmt: skip
            classifier.half().save_pretrained(out / kind)
    if only == "classifiers":
        return

    vae = new_autoencoder().to(device)
    fit(
        "autoencoder", vae, autoencoder_loss(vae, named, others, device), work,
        steps=autoencoder_steps, lr=2e-3, ema_decay=0.998,
    )  # fmt: skip
    if only == "autoencoder":
        return

    latents, captions = all_latents(vae, named, device)
    scaling_factor = 1 / latents.std().item()
    tokenizer, text_encoder = new_text_encoder(work / "tokenizer")
    model = nn.ModuleDict({"unet": new_unet(), "text_encoder": text_encoder}).to(device)
    fit(
        "denoiser", model, denoiser_loss(model, tokenizer, latents * scaling_factor, captions, device), work,
        steps=denoiser_steps, lr=1.5e-3, ema_decay=0.999,
    )  # fmt: skip
    save_model(out / "model", vae, model["text_encoder"], tokenizer, model["unet"], scaling_factor)


if __name__ == "__main__":
    main()
