"""Preference pairs that the small model draws and that its reward labels, in Pick-a-Pic's columns.

A prompt's images come in groups of four, each with its own checkpoint, steps, guidance and noise. Of a group (a, b, c,
d) the pairs (a, b), (d, c) and (a, c) are labelled, so that two images serve twice and a file holds each once.
"""

import hashlib
import io
import math
import random
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from safetensors.numpy import load_file, save_file

from workbench.common.files import in_place
from workbench.models.backend import Backend
from workbench.models.small.reward import PARTS, Reward

GROUP = 4  #: images of a group
PAIRS = ((0, 1), (3, 2), (0, 2))  #: of each group: the first image and the second
QUALITY = 80  #: of the AVIF images, at full colour resolution


class Drawing(NamedTuple):
    """An image to draw.

    Attributes:
        model: name of the checkpoint that draws it.
        steps: of DDIM.
        guidance: classifier-free.
        seed: of its noise.
    """

    caption: str
    model: str
    steps: int
    guidance: float
    seed: int


def plan(
    captions: Sequence[str],
    groups: int,
    models: Sequence[str],
    *,
    steps: Sequence[int],
    guidance: Sequence[float],
    seed: int,
) -> list[Drawing]:
    """The drawings of `groups` groups a caption, group by group.

    Args:
        models: the first draws 60 % of the images, the others share the rest.
        steps, guidance: drawn uniformly from these.
        seed: of the plan; images have 10^7 seeds for each plan, so that two plans share no noise.
    """
    rng, rest = random.Random(seed), len(models) - 1
    weights = [0.6, *[0.4 / rest] * rest] if rest else [1.0]
    return [
        Drawing(
            caption, rng.choices(models, weights)[0], rng.choice(steps), rng.choice(guidance), seed * 10_000_000 + image
        )
        for image, caption in enumerate(c for c in captions for _ in range(GROUP * groups))
    ]


def draw(
    drawings: Sequence[Drawing], backends: Mapping[str, Backend], work: Path, batch_size: int = 64
) -> NDArray[np.uint8]:
    """Draw all images, (N, H, W, 3), or read what an earlier call left in `work`, a file a batch."""
    work.mkdir(parents=True, exist_ok=True)
    drawn: dict[int, NDArray[np.uint8]] = {}
    for number, places in enumerate(_batches(drawings, batch_size)):
        some = [drawings[i] for i in places]
        key = hashlib.sha1(repr(some).encode()).hexdigest()[:16]  # other settings draw anew
        path = work / f"{number:04}-{key}.safetensors"
        if not path.exists():
            backend, first = backends[some[0].model], some[0]
            images = backend.sample(
                backend.denoiser(),
                [d.caption for d in some],
                [d.seed for d in some],
                steps=first.steps,
                guidance=first.guidance,
                batch_size=batch_size,
            )
            with in_place(path) as partial:
                save_file({"images": images}, partial)
        drawn |= dict(zip(places, load_file(path)["images"], strict=True))
    return np.stack([drawn[i] for i in range(len(drawings))])


def _batches(drawings: Sequence[Drawing], size: int) -> Iterator[list[int]]:
    """Places of drawings that one call of the sampler can make: same model, steps and guidance."""
    from tqdm import tqdm

    alike: dict[tuple[str, int, float], list[int]] = {}
    for i, d in enumerate(drawings):
        alike.setdefault((d.model, d.steps, d.guidance), []).append(i)
    chunks = [places[i : i + size] for _, places in sorted(alike.items()) for i in range(0, len(places), size)]
    yield from tqdm(chunks, desc="draw", unit="batch", mininterval=5)


def encode(image: NDArray[np.uint8]) -> bytes:
    """An image (H, W, 3) as the bytes of an AVIF file."""
    stream = io.BytesIO()
    Image.fromarray(image).save(stream, "AVIF", quality=QUALITY, subsampling="4:4:4", speed=6, max_threads=1)
    return stream.getvalue()


def label(difference: float, slope: float, tie: float, uniform: float) -> float:
    """Label of the first image: Bradley-Terry, 1 with probability sigmoid(slope * difference), 0.5 for a tie.

    Args:
        difference: reward of the first image minus the second's.
        slope: how sure the labeller is, per unit of reward.
        tie: differences smaller than this are ties.
        uniform: a draw from [0, 1).
    """
    if abs(difference) < tie:
        return 0.5
    return float(uniform < 1 / (1 + math.exp(-slope * difference)))


def rows(
    drawings: Sequence[Drawing],
    images: NDArray[np.uint8],
    reward: Reward,
    *,
    slope: float,
    tie: float,
    seed: int,
) -> list[dict[str, Any]]:
    """Labelled pairs in Pick-a-Pic's columns, with each image's reward and its parts beside them.

    The reward is that of the images as they are stored.
    """
    coded = [encode(image) for image in images]
    # Scored as decoded again: compression changes pixels, and a label must be true of what training sees.
    stored = np.stack([np.asarray(Image.open(io.BytesIO(jpg)).convert("RGB")) for jpg in coded])
    parts = reward.parts(stored, [d.caption for d in drawings])
    total = np.sum(list(parts.values()), axis=0)
    uids = [hashlib.sha1(jpg).hexdigest()[:16] for jpg in coded]
    models = [f"{d.model}, {d.steps} steps, guidance {d.guidance:g}" for d in drawings]
    rng = random.Random(seed)
    made: list[dict[str, Any]] = []
    count = len(PAIRS) * max(1, sum(d.caption == drawings[0].caption for d in drawings) // GROUP)
    for start in range(0, len(drawings), GROUP):
        for pair in PAIRS:
            i, j = (start + place for place in pair)
            # A number is drawn for ties too, so that the other labels do not depend on how many ties there are.
            label_0 = label(total[i] - total[j], slope, tie, rng.random())
            row: dict[str, Any] = {
                "are_different": uids[i] != uids[j],
                "best_image_uid": "tie" if label_0 == 0.5 else uids[i if label_0 == 1 else j],
                "caption": drawings[i].caption,
                "created_at": None,
                "has_label": True,
                "image_0_uid": uids[i],
                "image_1_uid": uids[j],
                "image_0_url": "",
                "image_1_url": "",
                "jpg_0": coded[i],
                "jpg_1": coded[j],
                "label_0": label_0,
                "label_1": 1.0 - label_0,
                "model_0": models[i],
                "model_1": models[j],
                "ranking_id": len(made),
                "user_id": 0,
                "num_example_per_prompt": count,
            }
            for side, image in ((0, i), (1, j)):
                row[f"reward_{side}"] = float(total[image])
                row |= {f"{part}_{side}": float(parts[part][image]) for part in PARTS}
            made.append(row)
    return made


def write(made: Sequence[Mapping[str, Any]], path: Path) -> None:
    """Write pairs as parquet; an image that is in a column twice is stored once."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    exact = {name: pa.float32() for name in made[0] if name.startswith(("reward_", *(f"{part}_" for part in PARTS)))}
    table = pa.Table.from_pylist([dict(row) for row in made])
    for i, field in enumerate(table.schema):
        # A column of None alone would have no type, unlike Pick-a-Pic's.
        kind = pa.timestamp("us") if field.name == "created_at" else exact.get(field.name, field.type)
        table = table.set_column(i, field.name, table.column(i).cast(kind))
    with in_place(path) as partial:
        # The dictionary must hold all images: beyond its limit, 1 MiB by default, parquet stores repeated ones again.
        pq.write_table(table, partial, compression="zstd", dictionary_pagesize_limit=2**25, write_statistics=False)


def agreement(made: Sequence[Mapping[str, Any]]) -> tuple[int, float]:
    """How many pairs are ties, and the share of the others whose label favours the image with more reward."""
    used = [row for row in made if row["label_0"] != 0.5]
    right = [(row["reward_0"] > row["reward_1"]) == (row["label_0"] == 1) for row in used]
    return len(made) - len(used), float(np.mean(right))


def load_models(sources: Sequence[str], device: torch.device) -> dict[str, Backend]:
    """The checkpoints that draw, by name: the first is "small-diffusion", the others by their folders."""
    from workbench.models import load

    names = ["small-diffusion", *(f"small-diffusion, {Path(source).name}" for source in sources[1:])]
    return {name: load(source, device) for name, source in zip(names, sources, strict=True)}
