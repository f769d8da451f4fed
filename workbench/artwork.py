"""The artwork that the small model, its scorer and its judge are trained on: fetched by name, never committed.

Three emoji sets, drawn by different artists under open licences, come from the npm registry at pinned
versions. Nothing here is needed to use the shipped model; only `python -m workbench.pretrain` calls it.
"""

import io
import json
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

from workbench.prompts import COLOURS, CONCEPTS, STYLES


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
SCALES = (26, 27, 28, 29, 30)  #: sizes at which a drawing is rendered onto its canvas
SHIFTS = tuple((dy, dx) for dy in (-1, 0, 1) for dx in (-1, 0, 1))  #: placements, in pixels


def fetch(style: str, folder: Path) -> dict:
    """The icon set of a style, through `npm pack` at the pinned version; kept in `folder`.

    Raises:
        ValueError: npm is missing, cannot fetch the package, or the package states another licence.
    """
    package = PACKAGES[style]
    target = folder / f"{style}-{package.version}"
    if not (target / "icons.json").exists():
        npm = shutil.which("npm")
        if npm is None:
            raise ValueError(f"artwork {package.name}: npm is not installed; install Node.js, which brings npm")
        folder.mkdir(parents=True, exist_ok=True)
        packed = subprocess.run(
            [npm, "pack", "--json", f"{package.name}@{package.version}"], cwd=folder, capture_output=True, text=True
        )
        if packed.returncode != 0:
            reason = (packed.stderr.strip() or "no reason given").splitlines()[-1]
            raise ValueError(f"artwork {package.name}@{package.version}: npm could not fetch it ({reason})")
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
        raise ValueError(f"artwork {package.name}: licence is now {licence}, expected {package.licence}")
    return json.loads((target / "icons.json").read_text())


def render(icons: dict, slug: str, size: int) -> np.ndarray:
    """One drawing as premultiplied RGBA, shape (size, size, 4), float32 in 0..1."""
    import resvg_py

    icon = icons["icons"][slug]
    width = icon.get("width", icons.get("width", 16))
    height = icon.get("height", icons.get("height", 16))
    svg = (
        '<svg xmlns="http://www.w3.org/2000/svg" xmlns:xlink="http://www.w3.org/1999/xlink" '
        f'viewBox="{icon.get("left", 0)} {icon.get("top", 0)} {width} {height}" '
        f'width="{size}" height="{size}">{icon["body"]}</svg>'
    )
    png = bytes(resvg_py.svg_to_bytes(svg_string=svg, width=size, height=size))
    rgba = np.asarray(Image.open(io.BytesIO(png)).convert("RGBA"), dtype=np.float32) / 255
    return np.concatenate([rgba[..., :3] * rgba[..., 3:], rgba[..., 3:]], axis=-1)


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


def load(folder: Path) -> tuple[Drawings, Drawings]:
    """The named drawings at every scale, and all other drawings that the three sets share, at one scale."""
    icons = {style: fetch(style, folder) for style in STYLES}
    shared = set.intersection(*(set(i["icons"]) for i in icons.values()))
    missing = [slug for slug in CONCEPTS.values() if slug not in shared]
    if missing:
        raise ValueError(f"artwork: no drawing of {', '.join(missing)} in all of {', '.join(STYLES)}")
    flat = ("flag", "button", "keycap", "clock", "person", "man-", "woman-", "hand", "skin-tone", "square")
    others = sorted(s for s in shared - set(CONCEPTS.values()) if not any(word in s for word in flat))

    def canvas(style: str, slug: str, scale: int) -> Tensor:
        image = np.zeros((SIZE, SIZE, 4), dtype=np.float32)
        edge = (SIZE - scale) // 2
        image[edge : edge + scale, edge : edge + scale] = render(icons[style], slug, scale)
        return torch.from_numpy(image).permute(2, 0, 1)

    named = [(c, s, scale) for c in range(len(CONCEPTS)) for s in range(len(STYLES)) for scale in SCALES]
    slugs = list(CONCEPTS.values())
    ours = Drawings(
        torch.stack([canvas(STYLES[s], slugs[c], scale) for c, s, scale in named]),
        torch.tensor([c for c, _, _ in named]),
        torch.tensor([s for _, s, _ in named]),
    )
    rest = [(s, slug) for slug in others for s in range(len(STYLES))]
    return ours, Drawings(
        torch.stack([canvas(STYLES[s], slug, 28) for s, slug in tqdm(rest, desc="render", leave=False)]),
        torch.full((len(rest),), len(CONCEPTS)),
        torch.tensor([s for s, _ in rest]),
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
