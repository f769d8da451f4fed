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
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray
from PIL import Image

from workbench.common.cache import digest
from workbench.evaluation import sample_store
from workbench.evaluation.filling import Scores, Undrawn, Unscored
from workbench.evaluation.scorers import Located
from workbench.evaluation.scoring import TOTAL

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


def undrawn(wanted: Sequence[Batch], kind: str) -> list[Undrawn]:
    """The shards that are not there.

    Args:
        kind: a name in FORMATS, in which images are stored.
    """

    def shard(batch: Batch) -> Undrawn:
        first = batch.drawings[0]  # model, steps and guidance are those of all
        write = lambda images: _write(batch, [encode(image, kind) for image in images])  # noqa: E731
        return Undrawn(
            first.model, _captions(batch), [d.seed for d in batch.drawings], first.steps, first.guidance, write
        )

    return [shard(batch) for batch in wanted if "image" not in _columns(batch)]


def unscored(wanted: Sequence[Batch], scorer: Located) -> list[Unscored]:
    """The shards that lack a scorer's scores."""
    missing = [batch for batch in wanted if column(scorer) not in _columns(batch)]
    return [Unscored(batch.path, batch.drawings[0].model, _captions(batch)) for batch in missing]


def column(scorer: Located) -> str:
    """The column of a scorer's scores; those of its parts have the part's name behind it."""
    return f"{scorer.name}@{scorer.digest[:12]}"


def score_columns(scorer: Located, scores: Scores) -> Scores:
    """A scorer's scores and those of its parts, by column."""
    its = column(scorer)
    return {its if part == TOTAL else f"{its}.{part}": values for part, values in scores.items()}


def _columns(batch: Batch) -> set[str]:
    return sample_store.columns(batch.path, len(batch.places), WORK)


def _captions(batch: Batch) -> list[str]:
    return [d.caption for d in batch.drawings]


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
        table = pa.concat_tables(
            [sample_store.read_but_images(batch.path) for batch in shards], promote_options="default"
        )
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
