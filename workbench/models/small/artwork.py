"""The artwork that the small model, its scorer and its judge are trained on: fetched by name, never committed.

Three emoji sets, drawn by different artists under open licences, come from the npm registry at pinned versions.
Nothing here is needed to use the shipped model; only `python -m workbench.pretrain` calls it.
"""

import io
import json
import multiprocessing
import random
import shutil
import subprocess
import tarfile
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor

from workbench.common.errors import UserError
from workbench.common.files import in_place
from workbench.models.small.prompts import COLOURS, CONCEPTS, STYLES


class Package(NamedTuple):
    """An npm package of icons, with the licence it states."""

    name: str
    version: str
    licence: str


PACKAGES: dict[str, Package] = {
    "noto": Package("@iconify-json/noto", "1.2.9", "Apache-2.0"),
    "fluent": Package("@iconify-json/fluent-emoji-flat", "1.2.6", "MIT"),
    "twemoji": Package("@iconify-json/twemoji", "1.2.5", "CC-BY-4.0"),
}

SIZE = 64  #: native size of the small model's images, in pixels
EDGE = 53.0  #: edge of a well-framed drawing, in pixels
CLUTTERS = 800  #: cluttered backgrounds
HELD_OUT = 60  #: drawings of each set that nothing is trained on

#: Renderings of each drawing, by how it lies on the canvas; (small, aslant, off-centre) -> count
POSES: dict[tuple[bool, bool, bool], int] = {
    (False, False, False): 14,
    (True, False, False): 16,
    (False, True, False): 20,
    (False, False, True): 20,
    (True, True, False): 12,
    (True, False, True): 12,
    (False, True, True): 12,
    (True, True, True): 8,
}


def fetch(style: str, folder: Path) -> dict:
    """The icon set of a style, through `npm pack` at the pinned version; kept in `folder`.

    Raises:
        UserError: npm is missing, cannot fetch the package, or the package states another licence.
    """
    package = PACKAGES[style]
    target = folder / f"{style}-{package.version}"
    if not (target / "icons.json").exists():
        npm = shutil.which("npm")
        if npm is None:
            raise UserError(f"artwork {package.name}: npm is not installed; install Node.js, which brings npm")
        folder.mkdir(parents=True, exist_ok=True)
        packed = subprocess.run(
            [npm, "pack", "--json", f"{package.name}@{package.version}"], cwd=folder, capture_output=True, text=True
        )
        if packed.returncode != 0:
            reason = (packed.stderr.strip() or "no reason given").splitlines()[-1]
            raise UserError(f"artwork {package.name}@{package.version}: npm could not fetch it ({reason})")
        archive = folder / json.loads(packed.stdout)[0]["filename"]
        target.mkdir(exist_ok=True)
        with tarfile.open(archive) as tar:
            for name in ("info.json", "icons.json"):  # icons.json last: its presence says that all is there
                member = tar.extractfile(f"package/{name}")
                assert member is not None
                (target / name).write_bytes(member.read())
        archive.unlink()
    licence = json.loads((target / "info.json").read_text("utf-8"))["license"]["spdx"]
    if licence != package.licence:
        raise UserError(f"artwork {package.name}: licence is now {licence}, expected {package.licence}")
    return json.loads((target / "icons.json").read_text("utf-8"))


class Pose(NamedTuple):
    """How a drawing lies on its canvas: edge in pixels, angle in degrees, centre's offset in pixels."""

    edge: float = EDGE
    angle: float = 0.0
    dx: float = 0.0
    dy: float = 0.0


def pose(rng: random.Random, small: bool, aslant: bool, displaced: bool) -> Pose:
    """A random pose: well framed but for the faults that are True."""
    edge = rng.uniform(24, 36) if small else rng.uniform(51, 55)
    angle = rng.choice((-1, 1)) * rng.uniform(14, 40) if aslant else 0.0
    if not small and (aslant or displaced):
        edge = rng.uniform(42, 50)
    if not displaced:
        return Pose(round(edge), angle) if not angle else Pose(edge, angle)
    while True:  # far enough from the middle, and at most a fifth of it outside
        # Half an edge minus three tenths: a fifth of the drawing lies outside at most.
        reach = SIZE / 2 - 0.3 * edge
        dx, dy = rng.uniform(-reach, reach), rng.uniform(-reach, reach)
        if max(abs(dx), abs(dy)) > 8:
            return Pose(edge, angle, dx, dy)


def svg(body: str) -> str:
    """An SVG image of the canvas's size."""
    return (
        '<svg xmlns="http://www.w3.org/2000/svg" xmlns:xlink="http://www.w3.org/1999/xlink" '
        f'viewBox="0 0 {SIZE} {SIZE}" width="{SIZE}" height="{SIZE}">{body}</svg>'
    )


def drawing(icons: dict, slug: str, pose: Pose) -> str:
    """A drawing on its canvas, as SVG."""
    icon = icons["icons"][slug]
    width = icon.get("width", icons.get("width", 16))
    height = icon.get("height", icons.get("height", 16))
    centre_x, centre_y = icon.get("left", 0) + width / 2, icon.get("top", 0) + height / 2
    odd = round(pose.edge) % 2 / 2 if pose == Pose(round(pose.edge)) else 0  # keeps edges on pixels
    return svg(
        f'<g transform="translate({SIZE / 2 + pose.dx + odd} {SIZE / 2 + pose.dy + odd}) rotate({pose.angle}) '
        f'scale({pose.edge / width} {pose.edge / height}) translate({-centre_x} {-centre_y})">{icon["body"]}</g>'
    )


def clutter(rng: random.Random) -> str:
    """Eight to sixteen discs, bars and triangles of random colours, as SVG."""
    shapes = []
    for _ in range(rng.randint(8, 16)):
        x, y, size = rng.uniform(0, SIZE), rng.uniform(0, SIZE), rng.uniform(4, 11)
        fill = "#" + "".join(f"{rng.randint(20, 245):02x}" for _ in range(3))
        shape = rng.choice(
            (
                f'<circle r="{size * 0.7}"',
                f'<rect x="{-size}" y="{-size / 4}" width="{2 * size}" height="{size / 2}"',
                f'<path d="M0 {-size}L{size} {size}L{-size} {size}Z"',
            )
        )
        shapes.append(f'{shape} fill="{fill}" transform="translate({x} {y}) rotate({rng.uniform(0, 360)})"/>')
    return svg("".join(shapes))


def rasterise(image: str) -> NDArray[np.uint8]:
    """Premultiplied RGBA of an SVG image of the canvas's size, (4, SIZE, SIZE)."""
    import resvg_py

    png = bytes(resvg_py.svg_to_bytes(svg_string=image, width=SIZE, height=SIZE))
    rgba = np.array(Image.open(io.BytesIO(png)).convert("RGBA")).transpose(2, 0, 1).astype(np.float32)
    # Premultiplied, so that to resample (`image_models.warp`) does not mix in the colour of transparent pixels.
    rgba[:3] *= rgba[3:] / 255
    return rgba.round().astype(np.uint8)


class Drawings(NamedTuple):
    """Drawings on transparent canvases.

    Attributes:
        rgba: premultiplied, (N, 4, SIZE, SIZE), uint8.
        concept: index into CONCEPTS, or len(CONCEPTS) for a drawing of anything else, (N,).
        style: index into STYLES, (N,).
        pose: edge, angle, dx and dy, (N, 4).
    """

    rgba: Tensor
    concept: Tensor
    style: Tensor
    pose: Tensor

    def to(self, device: torch.device | str) -> "Drawings":
        """These drawings on a device."""
        return Drawings(*(x.to(device) for x in self))


class Artwork(NamedTuple):
    """All drawings.

    Attributes:
        named: of the concepts: each (concept, style) in all of POSES, in their order, so that rendering `k` of
            drawing `d = concept * len(STYLES) + style` lies at `d * sum(POSES.values()) + k`.
        others: of everything else, twice each: well framed, and in any pose.
        held_out: drawings of everything else on which nothing is trained, well framed.
        clutter: backgrounds' clutter, (CLUTTERS, 4, SIZE, SIZE), premultiplied, uint8.
    """

    named: Drawings
    others: Drawings
    held_out: Drawings
    clutter: Tensor

    def to(self, device: torch.device | str) -> "Artwork":
        """All drawings on a device."""
        named, others, held_out = (x.to(device) for x in (self.named, self.others, self.held_out))
        return Artwork(named, others, held_out, self.clutter.to(device))


def load(folder: Path, workers: int | None = None) -> Artwork:
    """Fetch and render the artwork, or read what an earlier call left in `folder`; the same every time.

    Raises:
        UserError: a package cannot be had, or lacks a drawing.
    """
    kept = folder / f"rendered-{SIZE}.pt"
    if not kept.exists():
        art = _render({style: fetch(style, folder) for style in STYLES}, workers)
        # Moved into place whole: that the file exists says that it is complete.
        with in_place(kept) as partial:
            torch.save([art.clutter, *art.named, *art.others, *art.held_out], partial)
    clutters, *rest = torch.load(kept, weights_only=True, mmap=True)
    return Artwork(Drawings(*rest[:4]), Drawings(*rest[4:8]), Drawings(*rest[8:]), clutters)


_Row = tuple[int, int, str, Pose]  # concept, style, slug, pose


def _render(icons: dict[str, dict], workers: int | None) -> Artwork:
    shared = set.intersection(*(set(i["icons"]) for i in icons.values()))
    missing = [slug for slug in CONCEPTS.values() if slug not in shared]
    if missing:
        raise UserError(f"artwork: no drawing of {', '.join(missing)} in all of {', '.join(STYLES)}")
    unfit = ("flag", "button", "keycap", "skin-tone", "square", "-oclock", "-thirty")
    # One generator for all: the order of the draws decides every rendering. Names are sorted, since sets have no order.
    slugs, rng = list(CONCEPTS.values()), random.Random(0)
    others = sorted(s for s in shared - set(slugs) if not any(word in s for word in unfit))
    held_out = set(rng.sample(others, HELD_OUT))
    anything = len(slugs)
    named: list[_Row] = [
        (c, s, slug, pose(rng, *faults))
        for c, slug in enumerate(slugs)
        for s in range(len(STYLES))
        for faults, count in POSES.items()
        for _ in range(count)
    ]
    rest: list[_Row] = []
    for s, style in enumerate(STYLES):
        for slug in sorted(icons[style]["icons"]):
            if slug not in held_out and slug not in slugs and not any(word in slug for word in unfit):
                faults = rng.choices(list(POSES), list(POSES.values()))[0]
                rest += [(anything, s, slug, Pose(rng.randint(50, 56))), (anything, s, slug, pose(rng, *faults))]
    unseen: list[_Row] = [(anything, s, slug, Pose()) for slug in sorted(held_out) for s in range(len(STYLES))]
    clutters = [clutter(rng) for _ in range(CLUTTERS)]

    with multiprocessing.get_context("fork").Pool(workers) as pool:

        def raster(images: list[str]) -> Tensor:
            return torch.from_numpy(np.stack(pool.map(rasterise, images, chunksize=64)))

        def drawings(rows: list[_Row]) -> Drawings:
            images = [drawing(icons[STYLES[s]], slug, place) for _, s, slug, place in rows]
            concept, style = torch.tensor([r[0] for r in rows]), torch.tensor([r[1] for r in rows])
            return Drawings(raster(images), concept, style, torch.tensor([r[3] for r in rows], dtype=torch.float32))

        return Artwork(drawings(named), drawings(rest), drawings(unseen), raster(clutters))


def palette() -> Tensor:
    """The named background colours, (len(COLOURS), 3) in 0..1."""
    return torch.tensor(list(COLOURS.values()), dtype=torch.float32) / 255


def over(rgba: Tensor, ground: Tensor) -> Tensor:
    """Drawings over grounds.

    Args:
        rgba: premultiplied, (N, 4, H, W), uint8.
        ground: (N, 3, H, W), or (N, 3, 1, 1) for plain ones, in 0..1.
    Returns:
        Images, (N, 3, H, W), in 0..1.
    """
    rgba = rgba.float() / 255
    return rgba[:, :3] + ground * (1 - rgba[:, 3:])
