"""The small model's parts and how each is trained: architectures, augmentations, losses.

Loss functions here return closures that draw a batch from a generator and return a scalar, as `pretrain.fit`
takes them. The scorer and the critic make the ground-truth reward; the judge shares no weights and no
architecture with them, and adds other augmentations.
"""

import itertools
import json
from collections.abc import Callable
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Generator, Tensor, nn
from tqdm import tqdm

from workbench.models.small import artwork
from workbench.models.small.artwork import Drawings
from workbench.models.small.prompts import COLOURS, CONCEPTS, STYLES, Prompt

LATENT_CHANNELS = 12
Loss = Callable[[Generator], Tensor]


def draw(drawings: Drawings, count: int, background: Tensor, g: Generator) -> tuple[Tensor, Tensor]:
    """`count` random drawings, each shifted a little, over its background: images in -1..1 and concepts."""
    index = torch.randint(len(drawings.rgba), (count,), generator=g)
    shift = torch.randint(len(artwork.SHIFTS), (count,), generator=g)
    rgba = torch.stack(
        [torch.roll(drawings.rgba[i], artwork.SHIFTS[s], (1, 2)) for i, s in zip(index, shift, strict=True)]
    )
    return artwork.compose(rgba, background), drawings.concept[index]


def shifted(drawings: Drawings) -> Drawings:
    """Every drawing at every one of `artwork.SHIFTS`."""
    rgba = torch.cat([drawings.rgba.roll(shift, (2, 3)) for shift in artwork.SHIFTS])
    return Drawings(rgba, drawings.concept.repeat(len(artwork.SHIFTS)), drawings.style.repeat(len(artwork.SHIFTS)))


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
def all_latents(vae, drawings: Drawings, device: torch.device) -> tuple[Tensor, list[str]]:
    """Latents (posterior means, unscaled) of every drawing on every named colour.

    Returns:
        Latents (N, C, 8, 8) and their N captions.
    """
    names, colours, palette = list(CONCEPTS), list(COLOURS), artwork.palette()
    latents, captions = [], []
    for index in tqdm(torch.arange(len(drawings.rgba)).split(8), desc="encode artwork", mininterval=5):
        rgba = drawings.rgba[index].repeat_interleave(len(colours), 0)
        images = artwork.compose(rgba, palette.repeat(len(index), 1))
        latents.append(vae.encode(images.to(device)).latent_dist.mean.cpu())
        for i in index.tolist():
            concept, style = names[int(drawings.concept[i])], STYLES[int(drawings.style[i])]
            captions += [str(Prompt(concept, colour, style)) for colour in colours]
    return torch.cat(latents), captions


# --- classifiers ---------------------------------------------------------------------------------------------


def labels() -> list[str]:
    """Classes of the scorer and the judge: the concepts, then anything else."""
    return [*CONCEPTS, "something else"]


def _convnext(**outputs):
    from transformers import ConvNextConfig, ConvNextForImageClassification

    return ConvNextForImageClassification(
        ConvNextConfig(
            image_size=artwork.SIZE,
            patch_size=2,
            num_stages=3,
            hidden_sizes=[48, 96, 144],
            depths=[2, 2, 2],
            **outputs,
        )
    )


def new_classifier(kind: str):
    """An untrained classifier of the named concepts: the scorer is a ConvNeXt, the judge a vision transformer."""
    from transformers import ViTConfig, ViTForImageClassification

    id2label = dict(enumerate(labels()))
    label2id = {label: i for i, label in id2label.items()}
    if kind == "scorer":
        return _convnext(id2label=id2label, label2id=label2id)
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

    Both see drawings turned, zoomed, moved and mirrored; the scorer on plain backgrounds with noise and blur, the
    judge on two-colour backgrounds with shifted hues, low resolution and a hole.
    """
    n = len(rgba)
    chosen = artwork.palette()[torch.randint(len(COLOURS), (n,), generator=g)]
    plain = torch.where(torch.rand(n, 1, generator=g) < 0.6, chosen, torch.rand(n, 3, generator=g))
    some = lambda p: torch.rand(n, 1, 1, 1, generator=g) < p  # noqa: E731
    rgba = torch.where(some(0.5), rgba.flip(3), rgba)
    if kind == "scorer":
        images = artwork.compose(warp(rgba, g, turn=0.3, zoom=(0.65, 1.15), move=0.35), plain)
        images = torch.where(some(0.4), F.avg_pool2d(images, 3, 1, 1, count_include_pad=False), images)
        strength = torch.rand(n, 1, 1, 1, generator=g) * 0.25
        images = images + strength * torch.randn(images.shape, generator=g)
        return images * torch.empty(n, 1, 1, 1).uniform_(0.85, 1.15, generator=g)
    rgba = warp(rgba, g, turn=0.4, zoom=(0.6, 1.2), move=0.35)
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


def new_critic():
    """An untrained ConvNeXt with one output: how damaged a drawing is, from 0 to 1."""
    return _convnext(num_labels=1)


def damaged(rgba: Tensor, background: Tensor, g: Generator) -> tuple[Tensor, Tensor]:
    """Drawings damaged in the ways in which a diffusion model fails, each by a random strength, and how much in all.

    Small, off-centre and aslant; wobbled outlines; lost detail; blotches of colour; pixel noise; another drawing
    shining through. Each happens with probability one half at strength u in 0..1; the damage is 1 - prod(1 - u).

    Args:
        rgba: premultiplied framed drawings, (N, 4, H, W).
        background: (N, 3) in 0..1.
    Returns:
        Images in -1..1, (N, 3, H, W), and the damage, (N,).
    """
    n, _, size, _ = rgba.shape
    u = torch.rand(n, 6, generator=g) * (torch.rand(n, 6, generator=g) < 0.5)
    misplaced, wobble, blur, blotch, grain, ghost = u[:, :, None, None, None].unbind(1)
    smooth = lambda channels, cells: F.interpolate(  # noqa: E731
        torch.randn(n, channels, cells, cells, generator=g), size=size, mode="bicubic", align_corners=True
    )
    angle = 0.4 * misplaced * (torch.rand(n, 1, 1, 1, generator=g) * 2 - 1)
    shift = 0.35 * misplaced[..., 0] * (torch.rand(n, 1, 2, generator=g) * 2 - 1)
    line = torch.linspace(-1, 1, size)
    grid = torch.stack(torch.meshgrid(line, line, indexing="xy"), -1).expand(n, -1, -1, -1)
    turned = torch.stack(
        [
            grid[..., 0] * angle[..., 0].cos() - grid[..., 1] * angle[..., 0].sin(),
            grid[..., 0] * angle[..., 0].sin() + grid[..., 1] * angle[..., 0].cos(),
        ],
        -1,
    )
    where = turned / (1 - 0.3 * misplaced) + shift[:, None]
    where = where + (0.12 * wobble * smooth(2, 6)).permute(0, 2, 3, 1)
    rgba = F.grid_sample(rgba, where, align_corners=True)
    images = artwork.compose(rgba, background)
    images = images + 0.5 * ghost * (images.roll(1, 0) - images)
    soft = F.interpolate(F.interpolate(images, size=8, mode="area"), size=size, mode="bilinear")
    images = images + blur * (soft - images)
    images = images + 0.35 * blotch * smooth(3, 6) + 0.25 * grain * torch.randn(images.shape, generator=g)
    return images.clamp(-1, 1), 1 - (1 - u).prod(1)


def critic_loss(model, named: Drawings, device: torch.device, batch: int = 64) -> Loss:
    """Squared error of the predicted damage."""
    palette = artwork.palette()

    def loss(g: Generator) -> Tensor:
        rgba = named.rgba[torch.randint(len(named.rgba), (batch,), generator=g)]
        rgba = torch.where(torch.rand(batch, 1, 1, 1, generator=g) < 0.5, rgba.flip(3), rgba)
        images, damage = damaged(rgba, palette[torch.randint(len(palette), (batch,), generator=g)], g)
        return F.mse_loss(model(images.to(device)).logits[:, 0], damage.to(device))

    return loss


# --- denoiser ------------------------------------------------------------------------------------------------


def new_text_encoder(folder: Path):
    """A CLIP tokenizer learned from the prompt grammar, and an untrained text encoder for it."""
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
    tokenizer = CLIPTokenizer(vocab=vocab, merges=merges, model_max_length=16)  # type: ignore[arg-type]
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
