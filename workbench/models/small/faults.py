"""The mixed pictures that the small model learns from: well-made drawings, and ones with faults, captioned alike.

Faults of pose (small, aslant, off-centre) are rendered, see `artwork.POSES`; those here are applied to pictures.
Everything works on whole batches, on the device that the drawings lie on.
"""

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Generator, Tensor

from workbench.models.small import artwork
from workbench.models.small.artwork import Artwork
from workbench.models.small.prompts import COLOURS, CONCEPTS, STYLES

FAULTS = ("small", "aslant", "off-centre", "washed out", "blurred", "grainy", "cluttered")
CLEAN = 0.4  #: share of pictures without a fault
HELD_OUT_POSES = 2  #: renderings of each drawing in each kind of pose that no classifier is trained on
SECOND = 0.35  #: share of the others that have a second one


class Pictures(NamedTuple):
    """Composed pictures.

    Attributes:
        images: (N, 3, SIZE, SIZE), in -1..1.
        faults: which of FAULTS each has, (N, 7), bool.
        pose: of the drawing: edge, angle, dx, dy, (N, 4).
    """

    images: Tensor
    faults: Tensor
    pose: Tensor


def uniform(g: Generator, shape: tuple[int, ...], low: float = 0.0, high: float = 1.0) -> Tensor:
    """Uniform numbers on the generator's device."""
    return torch.rand(shape, generator=g, device=g.device) * (high - low) + low


def pick(count: int, below: int, g: Generator) -> Tensor:
    """Random indices, (count,), on the generator's device."""
    return torch.randint(below, (count,), generator=g, device=g.device)


def draw_faults(count: int, g: Generator, clean: float = CLEAN) -> Tensor:
    """Which faults each of `count` pictures gets, (count, 7): none, one, or two different ones."""
    # A random order of all faults: its first two are different ones.
    order = uniform(g, (count, len(FAULTS))).argsort(1)
    faults = F.one_hot(order[:, 0], len(FAULTS)).bool()
    faults |= F.one_hot(order[:, 1], len(FAULTS)).bool() & (uniform(g, (count, 1)) < SECOND)
    return faults & (uniform(g, (count, 1)) >= clean)


def rendering(drawing: Tensor, faults: Tensor, g: Generator, part: str = "all") -> Tensor:
    """Row of `Artwork.named` that shows each drawing in a random pose with the named faults of pose, (N,).

    Args:
        drawing: concept * len(STYLES) + style, (N,).
        faults: (N, 7).
        part: "held out" for the last `HELD_OUT_POSES` renderings of each kind, "train" for the rest, or "all".
    """
    counts = torch.tensor(list(artwork.POSES.values()))
    starts = counts.cumsum(0) - counts
    # The three faults of pose as bits of a number -> their place in POSES, which is ordered otherwise.
    code = torch.zeros(8, dtype=torch.long)
    for place, (small, aslant, displaced) in enumerate(artwork.POSES):
        code[small + 2 * aslant + 4 * displaced] = place
    kind = code.to(drawing.device)[(faults[:, :3] * torch.tensor([1, 2, 4], device=drawing.device)).sum(1)]
    first = {"all": 0 * counts, "train": 0 * counts, "held out": counts - HELD_OUT_POSES}[part]
    number = {"all": counts, "train": counts - HELD_OUT_POSES, "held out": 0 * counts + HELD_OUT_POSES}[part]
    within = (uniform(g, drawing.shape) * number.to(drawing.device)[kind]).long()
    return drawing * int(counts.sum()) + (starts + first).to(drawing.device)[kind] + within


def compose(rgba: Tensor, ground: Tensor, faults: Tensor, clutter: Tensor, g: Generator) -> Tensor:
    """Drawings on grounds, with faults.

    Args:
        rgba: premultiplied, (N, 4, H, W), uint8.
        ground: plain backgrounds, (N, 3), in 0..1.
        faults: (N, 7); those of pose are in the drawings already.
        clutter: premultiplied, (M, 4, H, W), uint8.
    Returns:
        Images, (N, 3, H, W), in -1..1.
    """
    n, _, size, _ = rgba.shape
    washed, blurred, grainy, cluttered = faults[:, 3:, None, None, None].unbind(1)
    plain = ground[:, :, None, None]
    behind = artwork.over(clutter[(uniform(g, (n,)) * len(clutter)).long()], plain)
    images = artwork.over(rgba, torch.where(cluttered, behind, plain))
    haze, strength = uniform(g, (n, 1, 1, 1), 0.6, 0.85), uniform(g, (n, 1, 1, 1), 0.4, 0.65)
    images = torch.where(washed, images + (haze - images) * strength, images)
    sigma, soft = uniform(g, (n,), 1.0, 2.2), blurred.view(n).nonzero()[:, 0]
    images[soft] = blur(images[soft], sigma[soft])
    # Grain comes after the blur, which would smooth it away.
    cells = torch.randn(n, 1, size // 3, size // 3, generator=g, device=g.device)
    grain = F.interpolate(cells, size=size, mode="bicubic") * uniform(g, (n, 1, 1, 1), 0.07, 0.16)
    images = torch.where(grainy, images + grain, images)
    return images.clamp(0, 1) * 2 - 1


def blur(images: Tensor, sigma: Tensor) -> Tensor:
    """Images blurred by a Gaussian of each one's sigma, in pixels, (N,)."""
    x = torch.arange(-5, 6, device=images.device)
    kernel = torch.exp(-0.5 * (x / sigma[:, None]) ** 2)
    weights = (kernel / kernel.sum(1, keepdim=True)).T[:, :, None, None, None]
    for axis in (2, 3):
        size = images.shape[axis]
        padded = F.pad(images, (5, 5, 0, 0) if axis == 3 else (0, 0, 5, 5), mode="replicate")
        images = sum(w * padded.narrow(axis, i, size) for i, w in enumerate(weights))
    return images


def named(
    art: Artwork, drawing: Tensor, ground: Tensor, g: Generator, clean: float = CLEAN, part: str = "all"
) -> Pictures:
    """Pictures of the named concepts as the small model learns from them.

    Args:
        drawing: concept * len(STYLES) + style, (N,).
        ground: (N, 3) in 0..1.
        clean: share without a fault.
        part: of the renderings, see `rendering`.
    """
    faults = draw_faults(len(drawing), g, clean)
    row = rendering(drawing, faults, g, part).to(art.named.rgba.device)
    images = compose(art.named.rgba[row], ground, faults, art.clutter, g)
    return Pictures(images, faults, art.named.pose[row])


def others(art: Artwork, count: int, g: Generator, clean: float = 0.6) -> Tensor:
    """Pictures of anything else, on any colour, images in -1..1."""
    row = (uniform(g, (count,)) * len(art.others.rgba)).long()
    faults = draw_faults(count, g, clean)
    return compose(art.others.rgba[row], uniform(g, (count, 3)), faults, art.clutter, g)


def pictures(
    art: Artwork, count: int, g: Generator, clean: float = CLEAN, part: str = "all"
) -> tuple[Pictures, Tensor]:
    """Random drawings of the named concepts as pictures with faults on named colours, and which they are, (count,)."""
    drawing = pick(count, len(CONCEPTS) * len(STYLES), g)
    ground = artwork.palette().to(g.device)[pick(count, len(COLOURS), g)]
    return named(art, drawing, ground, g, clean, part), drawing
