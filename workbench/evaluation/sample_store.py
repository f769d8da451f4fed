"""A folder of samples and their scores: what `python -m workbench.evaluate` makes, so that it can be gone on with.

    settings.json                      how the samples are drawn, and digests of all that decides them
    data/PROMPTS/MODEL-00000.parquet   shards: model, prompts, row, prompt, category, seed, image, a column a scorer

A shard appears whole: first with its images, then again with each scorer's column. What a shard lacks is what is left
to do. `datasets.load_dataset("FOLDER/data")` of Hugging Face reads them, with decoded images.
"""

import io
import json
import logging
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import polars as pl
import pyarrow as pa
import pyarrow.parquet as pq
from numpy.typing import NDArray
from PIL import Image

from workbench.common.errors import UserError
from workbench.evaluation.prompt_sets import PromptSet

log = logging.getLogger(__name__)

SHARD = 32  # images: what a kill can cost
SETTINGS = "settings.json"
IMAGE = pa.struct([("bytes", pa.binary()), ("path", pa.string())])
TEXT = ("model", "prompts", "prompt", "category")

#: "sampling" -> setting -> value; the others -> name -> source, digest and more
OF_PROMPTS = ("seeds", "limit")  # each prompt set has its own
KINDS = ("sampling", "prompts", "models", "scorers")
Record = dict[str, dict[str, Any]]


class Shard(NamedTuple):
    """Images of one model for one prompt set.

    Attributes:
        rows: places in the prompt set, one an image.
        seeds: of each image; 0 is a prompt's first.
    """

    path: Path
    model: str
    prompts: PromptSet
    rows: list[int]
    seeds: list[int]

    @property
    def captions(self) -> list[str]:
        """The prompt of each image."""
        return [self.prompts.prompts[row] for row in self.rows]

    @property
    def noise_seeds(self) -> list[int]:
        """What each image's initial noise is drawn from: the same for all models."""
        return [noise_seed(row, seed) for row, seed in zip(self.rows, self.seeds, strict=True)]


def noise_seed(row: int, seed: int) -> int:
    """The generator's seed for image `seed` of the prompt at `row`."""
    return seed * 1_000_000 + row


def shards(folder: Path, model: str, prompts: PromptSet, seeds: int) -> list[Shard]:
    """All shards of a model and prompt set, drawn or not; the images of a prompt lie together."""
    plan = [(row, seed) for row in range(len(prompts.prompts)) for seed in range(seeds)]
    return [
        Shard(
            folder / "data" / prompts.name / f"{model}-{start // SHARD:05d}.parquet",
            model,
            prompts,
            *map(list, zip(*plan[start : start + SHARD], strict=True)),
        )
        for start in range(0, len(plan), SHARD)
    ]


# --- shards on disk -------------------------------------------------------------------------------------------


def columns(path: Path) -> set[str]:
    """The columns that a shard has; none where it is not there, or damaged."""
    if not path.is_file():
        return set()
    try:
        return set(pq.read_schema(path).names)
    except (pa.ArrowInvalid, OSError):
        log.warning("%s is damaged: drawing it again", path)
        return set()


def write_images(shard: Shard, images: NDArray[np.uint8]) -> None:
    """Write a shard's images (N, H, W, 3)."""
    encoded = [{"bytes": _png(image), "path": None} for image in images]
    count = len(shard.rows)
    table = {
        "model": pa.array([shard.model] * count),
        "prompts": pa.array([shard.prompts.name] * count),
        "row": pa.array(shard.rows, pa.int64()),
        "prompt": pa.array(shard.captions),
        "category": pa.array([shard.prompts.categories[row] for row in shard.rows]),
        "seed": pa.array(shard.seeds, pa.int64()),
        "image": pa.array(encoded, IMAGE),
    }
    _write(shard.path, pa.table(table))


def add_scores(shard: Shard, scorer: str, scores: NDArray[np.float64]) -> None:
    """Write a scorer's column into a shard."""
    table = pq.read_table(shard.path)
    _write(shard.path, table.append_column(scorer, pa.array(scores, pa.float64())))


def read_images(path: Path, where: pl.Expr | None = None) -> list[NDArray[np.uint8]]:
    """A shard's images, or those of the rows that fit a condition, each (H, W, 3)."""
    scan = pl.scan_parquet(path)
    found = (scan if where is None else scan.filter(where)).select(pl.col("image").struct.field("bytes")).collect()
    return [np.asarray(Image.open(io.BytesIO(png)).convert("RGB")) for png in found["bytes"]]


def read_scores(paths: Sequence[Path], scorers: Sequence[str]) -> pl.DataFrame:
    """All columns but the images, of all shards, in their order."""
    wanted = ["model", "prompts", "row", "prompt", "category", "seed", *scorers]
    return pl.concat([pl.read_parquet(path, columns=wanted).select(wanted) for path in paths])


def _png(image: NDArray[np.uint8]) -> bytes:
    stream = io.BytesIO()
    Image.fromarray(image).save(stream, "PNG")
    return stream.getvalue()


def _write(path: Path, table: pa.Table) -> None:
    """Write a table whole or not at all, with the features that Hugging Face's datasets look for."""
    kinds: dict[str, Any] = {"image": {"_type": "Image"}}
    kinds |= {name: {"dtype": "string", "_type": "Value"} for name in TEXT}
    kinds |= {name: {"dtype": "int64", "_type": "Value"} for name in ("row", "seed")}
    features = {name: kinds.get(name, {"dtype": "float64", "_type": "Value"}) for name in table.column_names}
    about = {"huggingface": json.dumps({"info": {"features": features}})}
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f".{path.name}.partial")
    pq.write_table(table.replace_schema_metadata(about), partial)
    os.replace(partial, path)


# --- settings -------------------------------------------------------------------------------------------------


def recorded(folder: Path, sampling: Mapping[str, Any]) -> Record:
    """What the samples and scores in a folder were made with; nothing for a new one.

    Args:
        sampling: how samples are to be drawn now.
    Raises:
        UserError: the folder holds something else, or samples drawn in another way.
    """
    path = folder / SETTINGS
    if not path.is_file():
        if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
            raise UserError(f"--output {folder}: neither empty nor an evaluation's folder (no {SETTINGS} in it)")
        return {kind: {} for kind in KINDS}
    try:
        had: Record = json.loads(path.read_text())
    except (ValueError, RecursionError):
        had = {}
    if not _is_record(had, sampling):
        raise UserError(f"--output {folder}: its {SETTINGS} is damaged; choose another folder")
    made = _made(folder)
    had |= {kind: {name: e for name, e in had[kind].items() if name in made[kind]} for kind in made}
    for key, old in had["sampling"].items():
        if sampling[key] != old and made["models"]:
            option = f"--{key} {old}, not {sampling[key]}"
            raise UserError(f"--output {folder}: its samples were drawn with {option}; choose another folder")
    return had


def _is_record(found: Any, sampling: Mapping[str, Any]) -> bool:
    """Whether this is what `agree` writes."""
    texts = dict.fromkeys(KINDS[1:], ("source", "digest")) | {"models": ("source", "digest", "base", "variant")}
    numbers = {"prompts": OF_PROMPTS}
    if not isinstance(found, dict) or not all(isinstance(found.get(kind), dict) for kind in KINDS):
        return False
    entries = [(kind, entry) for kind in KINDS[1:] for entry in found[kind].values()]
    return found["sampling"].keys() <= sampling.keys() and all(
        isinstance(entry, dict)
        and all(isinstance(entry.get(key), str) for key in texts[kind])
        and all(isinstance(entry.get(key), int) for key in numbers.get(kind, ()))
        for kind, entry in entries
    )


def _made(folder: Path) -> dict[str, set[str]]:
    """The models, prompt sets and scorers of which a folder has something: all else can still be changed."""
    paths = list(folder.glob("data/*/*.parquet"))
    return {
        "models": {path.stem.rpartition("-")[0] for path in paths},
        "prompts": {path.parent.name for path in paths},
        "scorers": {name for path in paths for name in columns(path)},
    }


def agree(folder: Path, had: Record, wanted: Record) -> Record:
    """Write settings into a folder: all that it had, and what is new.

    Models, prompt sets and scorers may be added; none may change.

    Args:
        had: of `recorded`.
    Returns:
        The whole.
    Raises:
        UserError: something has changed.
    """
    for kind in KINDS[1:]:
        for name, new in wanted[kind].items():
            old: Any = had[kind].get(name, new)
            if new["digest"] != old["digest"]:
                raise UserError(
                    f"--output {folder}: {kind} {name!r} was {old['source']!r} ({old['digest'][:8]}) there, not "
                    f"{new['source']!r} ({new['digest'][:8]}); choose another name or another folder"
                )
    whole = {kind: had[kind] | wanted[kind] for kind in KINDS}
    folder.mkdir(parents=True, exist_ok=True)
    partial = folder / f".{SETTINGS}.partial"
    partial.write_text(json.dumps(whole, indent=2) + "\n")
    os.replace(partial, folder / SETTINGS)
    return whole
