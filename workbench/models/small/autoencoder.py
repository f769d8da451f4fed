"""The small model's autoencoder: architecture, loss, and the latents that the denoiser trains on."""

import itertools
from typing import Any

import torch
import torch.nn.functional as F
from torch import Generator, Tensor

from workbench.models.small import artwork, faults
from workbench.models.small.artwork import SIZE, Artwork
from workbench.models.small.faults import pick, pictures
from workbench.models.small.fit import Loss
from workbench.models.small.prompts import COLOURS, CONCEPTS, STYLES, UNSEEN

LATENT_CHANNELS = 24


def new_autoencoder():
    """An untrained AutoencoderKL, 64x64x3 pixels to 8x8x24 latents."""
    from diffusers import AutoencoderKL

    vae: Any = AutoencoderKL(
        down_block_types=("DownEncoderBlock2D",) * 4,
        up_block_types=("UpDecoderBlock2D",) * 4,
        block_out_channels=(16, 32, 64, 128),
        layers_per_block=1,
        latent_channels=LATENT_CHANNELS,
        norm_num_groups=8,
        sample_size=SIZE,
        mid_block_add_attention=False,
    )
    vae.quant_conv.bias.data[LATENT_CHANNELS:] -= 4  # little noise until there is something to drown
    return vae


def autoencoder_loss(vae, scorer, art: Artwork, batch: int) -> Loss:
    """4 MSE + L1 + half the image gradients' L1 + 0.05 of the scorer's features + 1e-3 KL (mean over elements).

    Half of the pictures show named concepts, half anything else. The features are those of the scorer's stages,
    normalised over channels at each place, as in LPIPS (Zhang et al. 2018).

    Args:
        scorer: a trained classifier, frozen.
    """

    def features(images: Tensor) -> list[Tensor]:
        return [F.normalize(x, dim=1) for x in scorer(images, output_hidden_states=True).hidden_states[1:]]

    def loss(g: Generator) -> Tensor:
        images = torch.cat([pictures(art, batch // 2, g)[0].images, faults.others(art, batch - batch // 2, g)])
        posterior = vae.encode(images).latent_dist
        noise = torch.randn(posterior.mean.shape, generator=g, device=g.device)
        decoded = vae.decode(posterior.mean + posterior.std * noise).sample
        error = decoded - images
        gradients = error.diff(dim=2).abs().mean() + error.diff(dim=3).abs().mean()
        with torch.no_grad():
            wanted = features(images)
        seen = sum((a - b).square().sum(1).mean() for a, b in zip(features(decoded), wanted, strict=True))
        # diffusers sums the divergence over elements; all other terms are means.
        kl = posterior.kl().mean() / posterior.mean[0].numel()
        return 4 * error.square().mean() + error.abs().mean() + 0.5 * gradients + 0.05 * seen + 1e-3 * kl

    return loss


@torch.no_grad()
def psnr(vae, images: Tensor) -> Tensor:
    """Peak signal-to-noise ratio of each image's reconstruction, in dB, (N,)."""
    decoded = torch.cat([vae.decode(vae.encode(x).latent_dist.mean).sample for x in images.split(64)])
    # Halved: the range -1..1 has a peak of 2, and the formula assumes 1.
    return -10 * ((decoded.clamp(-1, 1) - images) / 2).square().mean((1, 2, 3)).log10()


@torch.no_grad()
def latent_pool(vae, art: Artwork, count: int, g: Generator, batch: int = 512) -> tuple[Tensor, Tensor]:
    """Latents (posterior means, unscaled) of `count` pictures that the denoiser trains on.

    Returns:
        Latents, (count, C, 8, 8), in half precision on a GPU, and each one's caption: its place in
        `denoiser.every_caption()`, (count,).
    """
    # Concepts in the style of UNSEEN are kept from the denoiser alone: scorer and judge must know them.
    seen = torch.tensor([UNSEEN.get(c) != s for c, s in itertools.product(CONCEPTS, STYLES)]).nonzero()[:, 0]
    latents, captions = [], []
    half = torch.float16 if g.device.type == "cuda" else torch.float32
    for start in range(0, count, batch):
        drawing = seen.to(g.device)[pick(min(batch, count - start), len(seen), g)]
        colour = pick(len(drawing), len(COLOURS), g)
        images = faults.named(art, drawing, artwork.palette().to(g.device)[colour], g).images
        latents.append(vae.encode(images).latent_dist.mean.to(half))
        captions.append(drawing * len(COLOURS) + colour)
    return torch.cat(latents), torch.cat(captions)
