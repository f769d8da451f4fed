"""The networks that look at images: scorer, judge and critic; architectures, augmentations, loss.

The scorer and the critic belong to the ground-truth reward. The judge shares no weights and no architecture with them,
and sees other augmentations.
"""

import itertools
import math
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Generator, Tensor, nn

from workbench.models.small import artwork, faults
from workbench.models.small.artwork import SIZE, Artwork
from workbench.models.small.faults import pick, pictures, uniform
from workbench.models.small.fit import Loss
from workbench.models.small.prompts import COLOURS, CONCEPTS, STYLES

# --- architectures -------------------------------------------------------------------------------------------


def labels() -> list[str]:
    """Classes of the scorer and the judge: each concept in each style, then anything else."""
    return [f"{c}, {s}" for c, s in itertools.product(CONCEPTS, STYLES)] + ["something else"]


def _resnet(**outputs):
    from transformers import ResNetConfig, ResNetForImageClassification

    return ResNetForImageClassification(
        ResNetConfig(embedding_size=48, hidden_sizes=[48, 96, 160], depths=[2, 2, 2], layer_type="basic", **outputs)
    )


def new_classifier(kind: str):
    """An untrained classifier of the drawings: the scorer is a ResNet, the judge a vision transformer."""
    from transformers import ViTConfig, ViTForImageClassification

    id2label = dict(enumerate(labels()))
    label2id = {label: i for i, label in id2label.items()}
    if kind == "scorer":
        return _resnet(id2label=id2label, label2id=label2id)
    return ViTForImageClassification(
        ViTConfig(
            image_size=SIZE,
            patch_size=8,
            hidden_size=144,
            num_hidden_layers=5,
            num_attention_heads=6,
            intermediate_size=288,
            hidden_dropout_prob=0.05,
            id2label=id2label,
            label2id=label2id,
        )
    )


def new_critic():
    """An untrained ResNet that reads a drawing's pose: see `pose_code`."""
    return _resnet(num_labels=4)


def pose_code(pose: Tensor) -> Tensor:
    """Poses as the critic gives them, of order 1: log2(edge / EDGE), angle / 30, dx / 16, dy / 16, (N, 4)."""
    return torch.stack([(pose[:, 0] / artwork.EDGE).log2(), pose[:, 1] / 30, pose[:, 2] / 16, pose[:, 3] / 16], 1)


# --- augmentations -------------------------------------------------------------------------------------------


def warp(rgba: Tensor, g: Generator, *, turn: float, zoom: tuple[float, float], move: float) -> Tensor:
    """Randomly turned (radians), zoomed and moved (fraction of the canvas) copies of drawings."""
    n = len(rgba)
    angle, scale = uniform(g, (n,), -turn, turn), uniform(g, (n,), *zoom)
    theta = torch.zeros(n, 2, 3, device=g.device)
    theta[:, 0, 0] = theta[:, 1, 1] = torch.cos(angle) / scale
    theta[:, 0, 1] = -torch.sin(angle) / scale
    theta[:, 1, 0] = torch.sin(angle) / scale
    theta[:, :, 2] = uniform(g, (n, 2), -move, move)
    return F.grid_sample(rgba, F.affine_grid(theta, list(rgba.shape), align_corners=False), align_corners=False)


def scrambled(images: Tensor, g: Generator) -> Tensor:
    """Images whose sixteen tiles are shuffled: the right texture without the right shape."""
    n, c, size, _ = images.shape
    tile = size // 4
    tiles = images.view(n, c, 4, tile, 4, tile).permute(0, 2, 4, 1, 3, 5).reshape(n, 16, c, tile, tile)
    order = uniform(g, (n, 16)).argsort(1)
    tiles = tiles[torch.arange(n, device=g.device)[:, None], order]
    return tiles.view(n, 4, 4, c, tile, tile).permute(0, 3, 1, 4, 2, 5).reshape(n, c, size, size)


def scorer_view(art: Artwork, drawing: Tensor, g: Generator) -> Tensor:
    """Pictures as the scorer trains on them: with the denoiser's faults, then noise, blur and other brightness."""
    n = len(drawing)
    some = lambda p: uniform(g, (n, 1, 1, 1)) < p  # noqa: E731
    plain = artwork.palette().to(g.device)[pick(n, len(COLOURS), g)]
    ground = torch.where(uniform(g, (n, 1)) < 0.6, plain, uniform(g, (n, 3)))
    images = faults.named(art, drawing, ground, g, clean=0.3, part="train").images
    images = torch.where(some(0.3), F.avg_pool2d(images, 3, 1, 1, count_include_pad=False), images)
    noise = torch.randn(images.shape, generator=g, device=g.device)
    images = images + uniform(g, (n, 1, 1, 1), 0, 0.3) * some(0.4) * noise
    wobble = F.interpolate(torch.randn(n, 3, 6, 6, generator=g, device=g.device), size=SIZE, mode="bicubic")
    images = images + uniform(g, (n, 1, 1, 1), 0, 0.25) * some(0.3) * wobble
    return images * uniform(g, (n, 1, 1, 1), 0.85, 1.15)


def judge_view(art: Artwork, drawing: Tensor, g: Generator) -> Tensor:
    """Pictures as the judge trains on them, most of them of its own making.

    A quarter are the denoiser's pictures; the others are turned, zoomed and moved over two-colour grounds and other
    drawings. Then all get shifted hues, noise of several grains, low resolution, a veil, a hole.
    """
    n = len(drawing)
    some = lambda p: uniform(g, (n, 1, 1, 1)) < p  # noqa: E731
    none = torch.zeros(n, len(faults.FAULTS), dtype=torch.bool, device=g.device)
    rgba = art.named.rgba[faults.rendering(drawing, none, g, "train")].float() / 255
    rgba = warp(rgba, g, turn=0.7, zoom=(0.4, 1.15), move=0.45)
    plain = artwork.palette().to(g.device)[pick(n, len(COLOURS), g)]
    plain = torch.where(uniform(g, (n, 1)) < 0.5, plain, uniform(g, (n, 3)))
    other = torch.where(uniform(g, (n, 1)) < 0.5, plain, uniform(g, (n, 3)))
    ramp = torch.linspace(-1, 1, SIZE, device=g.device)
    turn = uniform(g, (n, 1, 1), 0, 2 * math.pi)
    slope = ramp[None, :, None] * turn.sin() + ramp[None, None, :] * turn.cos()
    mix = (slope * uniform(g, (n, 1, 1), 0.5, 6)).sigmoid()[:, None]
    ground = plain[:, :, None, None] * (1 - mix) + other[:, :, None, None] * mix
    for _ in range(2):  # smaller drawings of anything else behind
        behind = art.others.rgba[pick(n, len(art.others.rgba), g)].float() / 255
        behind = warp(behind, g, turn=math.pi, zoom=(0.25, 0.6), move=1.5) * some(0.35)
        ground = behind[:, :3] + ground * (1 - behind[:, 3:])
    images = (rgba[:, :3] + ground * (1 - rgba[:, 3:])) * 2 - 1
    quarter = n // 4
    images[:quarter] = faults.named(art, drawing[:quarter], plain[:quarter], g, part="train").images
    hues = torch.eye(3, device=g.device) + 0.1 * torch.randn(n, 3, 3, generator=g, device=g.device)
    images = torch.einsum("nij,njhw->nihw", hues, images)
    for cells in (16, 26, 64):
        noise = torch.randn(n, 1, cells, cells, generator=g, device=g.device)
        noise = F.interpolate(noise, size=SIZE, mode="bilinear") if cells < SIZE else noise
        images = images + uniform(g, (n, 1, 1, 1), 0, 0.5) * some(0.2) * noise
    for size in (16, 28):
        small = F.interpolate(F.interpolate(images, size=size, mode="area"), size=SIZE, mode="bilinear")
        images = torch.where(some(0.15), small, images)
    veil = uniform(g, (n, 1, 1, 1), -1, 1)
    images = torch.where(some(0.25), veil + (images - veil) * uniform(g, (n, 1, 1, 1), 0.3, 0.9), images)
    y, x = uniform(g, (2, n, 1, 1), 0, SIZE - 16)
    place = torch.arange(SIZE, device=g.device)
    inside = ((place[None, :, None] - y - 8).abs() < 8) & ((place[None, None, :] - x - 8).abs() < 8)
    return torch.where(inside[:, None] & some(0.3), uniform(g, (n, 3, 1, 1), -1, 1), images)


VIEWS = {"scorer": scorer_view, "judge": judge_view}


# --- batches and loss ----------------------------------------------------------------------------------------


#: Draws so many images, in -1..1, and what a network is to say of each: classes, (N,), or poses, (N, 4).
Draw = Callable[[int, Generator], tuple[Tensor, Tensor]]
BLOCK = 8  #: batches that are drawn at once, for the many small operations of the augmentations cost less so


def labelled(kind: str, art: Artwork) -> Draw:
    """What a classifier trains on: named drawings (three quarters), anything else, and scrambled drawings."""

    def draw(count: int, g: Generator) -> tuple[Tensor, Tensor]:
        eighth, drawings = count // 8, len(labels()) - 1
        drawing = pick(count - eighth, drawings, g)
        images = VIEWS[kind](art, drawing, g)
        images[-eighth:] = scrambled(images[-eighth:], g)
        images = torch.cat([images, faults.others(art, eighth, g)]).clamp(-1, 1)
        wanted = torch.cat([drawing[:-eighth], torch.full((2 * eighth,), drawings, device=g.device)])
        order = torch.rand(count, generator=g, device=g.device).argsort()
        return images[order], wanted[order]

    return draw


def posed(art: Artwork) -> Draw:
    """What the critic trains on: pictures with a little noise and blur besides their faults, and their pose."""

    def draw(count: int, g: Generator) -> tuple[Tensor, Tensor]:
        shown, _ = pictures(art, count, g, clean=0.25, part="train")
        noise = torch.randn(shown.images.shape, generator=g, device=g.device)
        images = shown.images + uniform(g, (count, 1, 1, 1), 0, 0.15) * noise
        soft = F.avg_pool2d(images, 3, 1, 1, count_include_pad=False)
        images = torch.where(uniform(g, (count, 1, 1, 1)) < 0.3, soft, images)
        return images, pose_code(shown.pose)

    return draw


def image_loss(model, draw: Draw, batch: int) -> Loss:
    """A classifier's or the critic's loss, on batches that are drawn `BLOCK` at a time.

    Cross-entropy with a little label smoothing, which keeps log-probabilities informative; or the Huber loss of poses.
    On a GPU the network works in bfloat16.
    """
    held: list[Any] = [-1, None]

    def loss(g: Generator) -> Tensor:
        # `fit` seeds g with the step: BLOCK steps share a draw, and a resumed run cuts the same batch out of it.
        block, place = divmod(g.initial_seed(), BLOCK)
        if held[0] != block:
            with torch.no_grad():
                held[:] = block, draw(BLOCK * batch, g.manual_seed(block))
        images, wanted = (x[place * batch : (place + 1) * batch] for x in held[1])
        outputs = run(model, images)
        if wanted.dtype == torch.long:
            return F.cross_entropy(outputs, wanted, label_smoothing=0.02)
        return F.huber_loss(outputs, wanted, delta=0.2) * 5

    return loss


def run(model, images: Tensor) -> Tensor:
    """A network's outputs, in bfloat16 on a GPU."""
    gpu = images.device.type == "cuda"
    with torch.autocast(images.device.type, torch.bfloat16, enabled=gpu):
        return model(images.contiguous(memory_format=torch.channels_last)).logits.float()


@torch.no_grad()
def settle(model, draw: Draw, batch: int, batches: int = 48) -> None:
    """Take the batch normalisations' statistics anew, for averaged weights go with no statistics that training kept."""
    norms = [m for m in model.modules() if isinstance(m, nn.BatchNorm2d)]
    if not norms:
        return
    for norm in norms:
        norm.reset_running_stats()
        norm.momentum = None  # a plain mean over batches
        norm.train()
    g = Generator(next(model.parameters()).device).manual_seed(10**8)
    for _ in range(-(-batches // BLOCK)):
        for images in draw(BLOCK * batch, g)[0].split(batch):
            run(model, images)
    for norm in norms:
        norm.momentum = 0.1
    model.eval()
