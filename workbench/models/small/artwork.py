"""The artwork that the small model, its scorer and its judge are trained on: fetched by name, never committed.

Three emoji sets, drawn by different artists under open licences, come from the npm registry at pinned
versions. Nothing here is needed to use the shipped model; only `python -m workbench.pretrain` calls it.
"""

import io
import json
import random
import shutil
import subprocess
import tarfile
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from tqdm import tqdm

from workbench.common.errors import UserError
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

SIZE = 32  #: native size of the small model's images, in pixels
EDGES = (26, 27, 28, 29, 30)  #: sizes of a framed drawing, in pixels
SCATTERINGS = 60  #: scattered renderings of each drawing
SHIFTS = tuple((dy, dx) for dy in (-1, 0, 1) for dx in (-1, 0, 1))  #: of a framed drawing, in pixels


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
    licence = json.loads((target / "info.json").read_text())["license"]["spdx"]
    if licence != package.licence:
        raise UserError(f"artwork {package.name}: licence is now {licence}, expected {package.licence}")
    return json.loads((target / "icons.json").read_text())


class Placement(NamedTuple):
    """How a drawing lies on its canvas: edge and offsets in pixels, angle in degrees."""

    edge: float
    angle: float = 0.0
    dx: float = 0.0
    dy: float = 0.0
    mirrored: bool = False


def framed(edge: int) -> Placement:
    """As published: upright and centred, to the pixel."""
    offset = (SIZE - edge) // 2 + edge / 2 - SIZE / 2
    return Placement(edge, dx=offset, dy=offset)


def scattered(rng: random.Random) -> Placement:
    """Of any size from two thirds of the canvas up, turned by up to 15 degrees, anywhere that keeps it inside."""
    edge = rng.uniform(21, 30)
    room = (SIZE - edge) / 2
    return Placement(edge, rng.uniform(-15, 15), rng.uniform(-room, room), rng.uniform(-room, room), rng.random() < 0.5)


def render(icons: dict, slug: str, placement: Placement) -> Tensor:
    """One drawing on its canvas as premultiplied RGBA, shape (4, SIZE, SIZE), float32 in 0..1."""
    import resvg_py

    icon = icons["icons"][slug]
    width = icon.get("width", icons.get("width", 16))
    height = icon.get("height", icons.get("height", 16))
    centre_x, centre_y = icon.get("left", 0) + width / 2, icon.get("top", 0) + height / 2
    x, y = SIZE / 2 + placement.dx, SIZE / 2 + placement.dy
    zoom_x, zoom_y = placement.edge / width * (-1 if placement.mirrored else 1), placement.edge / height
    svg = (
        '<svg xmlns="http://www.w3.org/2000/svg" xmlns:xlink="http://www.w3.org/1999/xlink" '
        f'viewBox="0 0 {SIZE} {SIZE}" width="{SIZE}" height="{SIZE}"><g transform="translate({x} {y}) '
        f'rotate({placement.angle}) scale({zoom_x} {zoom_y}) translate({-centre_x} {-centre_y})">'
        f"{icon['body']}</g></svg>"
    )
    png = bytes(resvg_py.svg_to_bytes(svg_string=svg, width=SIZE, height=SIZE))
    rgba = torch.from_numpy(np.array(Image.open(io.BytesIO(png)).convert("RGBA"))).permute(2, 0, 1).float() / 255
    return torch.cat([rgba[:3] * rgba[3:], rgba[3:]])


class Drawings(NamedTuple):
    """Drawings on transparent canvases.

    Attributes:
        rgba: premultiplied, (N, 4, SIZE, SIZE), float32 in 0..1.
        concept: index into CONCEPTS, or len(CONCEPTS) for a drawing of anything else, (N,).
        style: index into STYLES, (N,).
    """

    rgba: Tensor
    concept: Tensor
    style: Tensor


class Artwork(NamedTuple):
    """All drawings: of the named concepts framed and scattered, and of everything else that the sets share."""

    framed: Drawings
    scattered: Drawings
    others: Drawings


def load(folder: Path) -> Artwork:
    """Fetch and render the artwork; the same drawings at the same places every time.

    Raises:
        UserError: a package cannot be had, or lacks a drawing.
    """
    icons = {style: fetch(style, folder) for style in STYLES}
    shared = set.intersection(*(set(i["icons"]) for i in icons.values()))
    missing = [slug for slug in CONCEPTS.values() if slug not in shared]
    if missing:
        raise UserError(f"artwork: no drawing of {', '.join(missing)} in all of {', '.join(STYLES)}")
    unfit = ("flag", "button", "keycap", "clock", "person", "man-", "woman-", "hand", "skin-tone", "square")
    others = sorted(s for s in shared - set(CONCEPTS.values()) if not any(word in s for word in unfit))
    slugs, rng = list(CONCEPTS.values()), random.Random(0)
    pairs = [(c, s) for c in range(len(slugs)) for s in range(len(STYLES))]

    def drawings(kind: str, wanted: list[tuple[int, int, str, Placement]]) -> Drawings:
        rows = tqdm(wanted, desc=f"render {kind}", leave=False)
        rgba = torch.stack([render(icons[STYLES[s]], slug, place) for _, s, slug, place in rows])
        return Drawings(rgba, torch.tensor([w[0] for w in wanted]), torch.tensor([w[1] for w in wanted]))

    return Artwork(
        drawings("framed", [(c, s, slugs[c], framed(edge)) for c, s in pairs for edge in EDGES]),
        drawings("scattered", [(c, s, slugs[c], scattered(rng)) for c, s in pairs for _ in range(SCATTERINGS)]),
        drawings("others", [(len(slugs), s, slug, framed(28)) for slug in others for s in range(len(STYLES))]),
    )


def compose(rgba: Tensor, background: Tensor) -> Tensor:
    """Drawings over plain backgrounds.

    Args:
        rgba: premultiplied, (N, 4, H, W) in 0..1.
        background: (N, 3) in 0..1.
    Returns:
        Images, (N, 3, H, W) in -1..1, as the autoencoder takes them.
    """
    over = rgba[:, :3] + background[:, :, None, None] * (1 - rgba[:, 3:])
    return over * 2 - 1


def palette() -> Tensor:
    """The named background colours, (len(COLOURS), 3) in 0..1."""
    return torch.tensor(list(COLOURS.values()), dtype=torch.float32) / 255
