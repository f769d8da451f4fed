"""Images to make pairs of: what is drawn, by which model and how, and the shards in which it is kept.

    WORK/PROMPTS/KEY.parquet    images that one call drew: model, prompt, steps, guidance, seed, image, uid, scores

A shard's name is a digest of all that decides its images, the weights included, and a column of scores has the digest
of its reward model in its name. So the same command goes on after a kill, another draws only what is not there, and
nothing that was made with other weights is taken for it.
"""

import hashlib
import io
import json
import random
from collections.abc import Mapping, Sequence
from functools import lru_cache
from itertools import groupby
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa
import torch
from numpy.typing import NDArray
from PIL import Image
from tqdm import tqdm

from workbench.common.cache import digest
from workbench.data.parquet import open_parquet, read_table
from workbench.evaluation import model_sources, sample_store
from workbench.evaluation.model_sources import ModelSource
from workbench.evaluation.scorers import Located
from workbench.evaluation.scoring import TOTAL, scored

WORK = "--work"  #: the option that names the folder of the shards
#: Noise seeds of a plan: two plans of different seeds share none.
SEEDS = 10_000_000
#: Pixels that a shard holds, and the most images: what a kill loses at most.
PIXELS, MOST = 2**22, 64
#: How images are stored -> Pillow's options. AVIF at full colour resolution; PNG loses nothing and takes far more.
FORMATS: dict[str, dict[str, Any]] = {
    "avif": {"quality": 80, "subsampling": "4:4:4", "speed": 6, "max_threads": 1},
    "png": {},
}


class Drawing(NamedTuple):
    """An image to draw.

    Attributes:
        model: name of the model that draws it.
        steps: of the sampler.
        guidance: the sampler's scale.
        seed: of its noise.
    """

    caption: str
    model: str
    steps: int
    guidance: float
    seed: int

    @property
    def how(self) -> str:
        """Model and settings in words."""
        return f"{self.model}, {self.steps} steps, guidance {self.guidance:g}"


class Batch(NamedTuple):
    """Images that one call of the sampler makes and one shard keeps: same model, steps and guidance.

    Attributes:
        places: their numbers in the plan.
    """

    path: Path
    places: list[int]
    drawings: list[Drawing]


def plan(
    captions: Sequence[str],
    images: int,
    models: Sequence[str],
    *,
    steps: Sequence[int],
    guidance: Sequence[float],
    every: bool,
    seed: int,
) -> list[Drawing]:
    """The images of a prompt set, prompt by prompt.

    Args:
        images: a prompt.
        steps, guidance: of the sampler, to choose from.
        every: draw each of a prompt's `images` with every combination of model, steps and guidance, from the same
            noise. Else each image has noise of its own, steps and guidance drawn uniformly, and a drawn model: the
            first draws 60 % of the images, the others share the rest.
        seed: of the plan.
    """
    if every:
        ways = [(model, n, scale) for model in models for n in steps for scale in guidance]
        return [
            Drawing(caption, *way, seed * SEEDS + row * images + image)
            for row, caption in enumerate(captions)
            for image in range(images)
            for way in ways
        ]
    rng, rest = random.Random(seed), len(models) - 1
    weights = [0.6, *[0.4 / rest] * rest] if rest else [1.0]
    # The order of these draws decides the small model's shipped pairs: do not change it.
    return [
        Drawing(caption, rng.choices(models, weights)[0], rng.choice(steps), rng.choice(guidance), seed * SEEDS + image)
        for image, caption in enumerate(c for c in captions for _ in range(images))
    ]


def batches(
    drawings: Sequence[Drawing], folder: Path, models: Mapping[str, Mapping[str, Any]], kind: str
) -> list[Batch]:
    """The shards of a plan, by model.

    Args:
        models: what `model_sources.describe` says of each.
        kind: a name in FORMATS.
    """
    alike: dict[tuple[str, int, float], list[int]] = {}
    for place, d in enumerate(drawings):
        alike.setdefault((d.model, d.steps, d.guidance), []).append(place)
    found = []
    for (model, *_), places in sorted(alike.items()):
        size = max(1, min(MOST, PIXELS // models[model]["resolution"] ** 2))
        for start in range(0, len(places), size):
            some = places[start : start + size]
            images = [drawings[place] for place in some]
            what = json.dumps([(d.caption, d.steps, d.guidance, d.seed) for d in images])
            key = digest("drawn-1", models[model]["digest"], kind, what)[:24]
            found.append(Batch(folder / f"{key}.parquet", some, images))
    return found


def encode(image: NDArray[np.uint8], kind: str) -> bytes:
    """An image (H, W, 3) as the bytes of a file."""
    stream = io.BytesIO()
    Image.fromarray(image).save(stream, kind.upper(), **FORMATS[kind])
    return stream.getvalue()


# --- drawing and scoring what is not there -----------------------------------------------------------------------


def draw(
    wanted: Sequence[Batch],
    sources: Mapping[str, ModelSource],
    *,
    device: torch.device,
    sampling: Mapping[str, Any],
    kind: str,
    batch_size: int,
) -> None:
    """Draw every shard that is not there, model by model.

    Args:
        sampling: settings dtype and resolution.
        batch_size: images at once.
    """
    missing = [batch for batch in wanted if "image" not in _columns(batch)]
    model_of = lambda batch: batch.drawings[0].model  # noqa: E731
    with tqdm(total=_count(missing), desc="draw", unit="image", disable=not missing) as bar:
        # Sorted, as groupby needs it, so that each model is loaded once.
        for name, some in groupby(sorted(missing, key=model_of), key=model_of):
            bar.set_postfix_str(name)
            backend, denoiser = model_sources.open_model(sources[name], device, sampling)
            for batch in some:
                images = backend.sample(
                    denoiser,
                    [d.caption for d in batch.drawings],
                    [d.seed for d in batch.drawings],
                    steps=batch.drawings[0].steps,
                    guidance=batch.drawings[0].guidance,
                    batch_size=batch_size,
                )
                _write(batch, [encode(image, kind) for image in images])
                bar.update(len(images))
            del backend, denoiser  # two models at once may be more than the device holds


def column(scorer: Located) -> str:
    """The column of a scorer's scores; those of its parts have the part's name behind it."""
    return f"{scorer.name}@{scorer.digest[:12]}"


def score(wanted: Sequence[Batch], scorers: Sequence[Located], device: torch.device, batch_size: int) -> None:
    """Score every shard that lacks a scorer's scores, scorer by scorer.

    The scores are those of the images as they are stored: compression changes pixels, and a label must be true of what
    training sees.

    Raises:
        Failure: as `scored` does.
    """
    for located in scorers:
        name, its = located.name, column(located)
        missing = [batch for batch in wanted if its not in _columns(batch)]
        if not missing:
            continue
        scorer = located.load(device, batch_size)
        with tqdm(total=_count(missing), desc=f"score {name}", unit="image") as bar:
            for batch in missing:
                captions = [d.caption for d in batch.drawings]
                found = scored(name, scorer, sample_store.read_images(batch.path), captions, batch.drawings[0].model)
                named = {f"{its}.{part}" if part != TOTAL else its: values for part, values in found.items()}
                sample_store.add_scores(batch.path, named)
                bar.update(len(captions))
        del scorer  # as above


def _columns(batch: Batch) -> set[str]:
    return sample_store.columns(batch.path, len(batch.places), WORK)


def _about(batch: Batch) -> pa.Table:
    """What a shard says of its images, without reading the images themselves."""
    what = str(batch.path)
    with open_parquet(batch.path, what) as file:
        names = [name for name in file.schema_arrow.names if name != "image"]
    return read_table(batch.path, what, names)


def _count(wanted: Sequence[Batch]) -> int:
    return sum(len(batch.places) for batch in wanted)


def _write(batch: Batch, images: Sequence[bytes]) -> None:
    d = batch.drawings
    table = {
        "model": pa.array([one.model for one in d]),
        "prompt": pa.array([one.caption for one in d]),
        "steps": pa.array([one.steps for one in d], pa.int64()),
        "guidance": pa.array([one.guidance for one in d], pa.float64()),
        "seed": pa.array([one.seed for one in d], pa.int64()),
        "image": sample_store.encoded(images),
        "uid": pa.array([hashlib.sha1(image).hexdigest()[:16] for image in images]),
    }
    sample_store.write(batch.path, pa.table(table))


# --- reading it --------------------------------------------------------------------------------------------------


class Drawn:
    """The images of a plan, drawn and scored.

    Attributes:
        drawings: what each image is of.
        uids: digests of their files, by which identical images are known.
        scores: each scorer's, (N,).
        parts: of the scores that are sums, by the parts' own names, (N,) each.
    """

    def __init__(self, drawings: Sequence[Drawing], shards: Sequence[Batch], scorers: Sequence[Located]):
        self.drawings = drawings
        self._at = {place: (batch.path, row) for batch in shards for row, place in enumerate(batch.places)}
        # Prompts go forward through the shards of all ways to draw at once, so that one of each is in memory.
        ways = {(d.model, d.steps, d.guidance) for d in drawings}
        self._images = lru_cache(maxsize=len(ways) + 1)(sample_store.read_bytes)
        table = pa.concat_tables([_about(batch) for batch in shards], promote_options="default")
        order = np.argsort(np.concatenate([batch.places for batch in shards]))
        values = lambda name: table[name].to_numpy()[order]  # noqa: E731
        self.uids: list[str] = values("uid").tolist()
        self.scores = {one.name: values(column(one)) for one in scorers}
        prefixes = tuple(f"{column(one)}." for one in scorers)
        parts = [name for name in table.column_names if name.startswith(prefixes)]
        self.parts = {name.partition(".")[2]: values(name) for name in parts}

    def image(self, number: int) -> bytes:
        """An image's file."""
        path, row = self._at[number]
        return self._images(path)[row]
