"""The folder of samples and scores that `python -m workbench.evaluate` writes, and can continue.

    settings.json                      how the samples are drawn, and digests of all that decides them
    data/PROMPTS/MODEL-00000.parquet   shards: model, prompts, row, prompt, category, seed, image, a column a scorer

A shard appears whole: first with its images, then again with each scorer's column. What a shard lacks is what is left
to do. `datasets.load_dataset("FOLDER/data")` of Hugging Face reads them, with decoded images.
"""

import io
import json
import logging
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
from workbench.common.files import in_place, require_readable
from workbench.common.reading import require_regular
from workbench.data.parquet import is_image, is_text, open_parquet, read_table
from workbench.evaluation.prompt_sets import PromptSet
from workbench.models.safe_loading import read_json

log = logging.getLogger(__name__)

SHARD = 32  # images; a process that is killed loses at most so many
SETTINGS = "settings.json"
# The layout of an image in Hugging Face's datasets.
IMAGE = pa.struct([("bytes", pa.binary()), ("path", pa.string())])
TEXT = ("model", "prompts", "prompt", "category", "uid")
WHOLE = ("row", "seed", "steps")

PROMPT_OPTIONS = ("seeds", "limit")  # each prompt set has its own
KINDS = ("sampling", "prompts", "models", "scorers")
#: "sampling" -> option -> value; each other kind -> name -> source, digest and more.
Settings = dict[str, dict[str, Any]]


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
    # A factor above the size of prompt sets, so that no two images share their noise.
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


def columns(path: Path, rows: int = 0, option: str = "--output") -> set[str]:
    """The columns that a shard has; none where it is not there, or damaged, so that it is drawn again.

    Args:
        rows: how many it must have; 0 = any number.
        option: the one that names the folder, for messages.
    Raises:
        UserError: there is something else in its place, which is not drawn over.
        Failure: this user may not read it.
    """
    if not path.exists() and not path.is_symlink():
        return set()
    if path.is_file():
        # First: a shard that this user may not read must not pass for a damaged one, and be drawn again.
        require_readable(path, f"choose another {option}")
    what = f"{path.parent.name}/{path.name} in the folder of {option}"
    require_regular(path, f"{what} (move it, or choose another {option})")
    try:
        with open_parquet(path, what) as file:
            schema, count = file.schema_arrow, file.metadata.num_rows
    except UserError:
        log.warning("%s is damaged: drawing it again", path)
        return set()
    # By index: a damaged file may have a name twice, over which schema.field(name) fails.
    other = [name for name in schema.names if not _is_column(name, schema.field(schema.names.index(name)).type)]
    twice = [name for name in schema.names if schema.names.count(name) > 1]
    if other or twice or rows not in (0, count):
        problem = (
            f"{twice[0]} is there twice" if twice else f"{other[0]} is of another type" if other else f"{count} rows"
        )
        raise UserError(f"{what}: is not as it was written ({problem}); remove it, and it is drawn again")
    return set(schema.names)


def _is_column(name: str, kind: pa.DataType) -> bool:
    """Whether a column has the type in which it is written; what is not named here is a scorer's."""
    if name in TEXT:
        return is_text(kind)
    if name == "image":
        return is_image(kind)
    return kind == (pa.int64() if name in WHOLE else pa.float64())


def write_images(shard: Shard, images: NDArray[np.uint8]) -> None:
    """Write a shard's images (N, H, W, 3)."""
    count = len(shard.rows)
    table = {
        "model": pa.array([shard.model] * count),
        "prompts": pa.array([shard.prompts.name] * count),
        "row": pa.array(shard.rows, pa.int64()),
        "prompt": pa.array(shard.captions),
        "category": pa.array([shard.prompts.categories[row] for row in shard.rows]),
        "seed": pa.array(shard.seeds, pa.int64()),
        "image": encoded([_png(image) for image in images]),
    }
    write(shard.path, pa.table(table))


def encoded(images: Sequence[bytes]) -> pa.Array:
    """Images' files as a column that Hugging Face's datasets decode."""
    return pa.array([{"bytes": image, "path": None} for image in images], IMAGE)


def add_scores(path: Path, scores: Mapping[str, NDArray[np.float64]]) -> None:
    """Write columns of scores into a shard."""
    table = read_table(path, str(path))
    for name, values in scores.items():
        table = table.append_column(name, pa.array(values, pa.float64()))
    write(path, table)


def read_images(path: Path, where: pl.Expr | None = None) -> list[NDArray[np.uint8]]:
    """A shard's images, or those of the rows that fit a condition, each (H, W, 3)."""
    if where is None:
        return [decoded(image) for image in read_bytes(path)]
    table = pl.DataFrame(read_table(path, str(path), ["row", "seed", "image"])).filter(where)
    return [decoded(image["bytes"]) for image in table["image"]]


def read_bytes(path: Path) -> list[bytes]:
    """A shard's images as the files that they were encoded to."""
    return [image["bytes"] for image in read_table(path, str(path), ["image"])["image"].to_pylist()]


def decoded(image: bytes) -> NDArray[np.uint8]:
    """The pixels of an image's file, (H, W, 3)."""
    return np.asarray(Image.open(io.BytesIO(image)).convert("RGB"))


def read_but_images(path: Path) -> pa.Table:
    """All columns of a shard but the images, which are most of its bytes."""
    with open_parquet(path, str(path)) as file:
        return file.read([name for name in file.schema_arrow.names if name != "image"])


def read_scores(paths: Sequence[Path], scorers: Sequence[str]) -> pl.DataFrame:
    """All columns but the images, of all shards, in their order."""
    wanted = ["model", "prompts", "row", "prompt", "category", "seed", *scorers]
    return pl.concat([pl.DataFrame(read_table(path, str(path), wanted)) for path in paths])


def _png(image: NDArray[np.uint8]) -> bytes:
    stream = io.BytesIO()
    Image.fromarray(image).save(stream, "PNG")
    return stream.getvalue()


def write(path: Path, table: pa.Table) -> None:
    """Write a table whole or not at all, with the features that Hugging Face's datasets look for."""
    kinds: dict[str, Any] = {"image": {"_type": "Image"}}
    kinds |= {name: {"dtype": "string", "_type": "Value"} for name in TEXT}
    kinds |= {name: {"dtype": "int64", "_type": "Value"} for name in WHOLE}
    features = {name: kinds.get(name, {"dtype": "float64", "_type": "Value"}) for name in table.column_names}
    about = {"huggingface": json.dumps({"info": {"features": features}})}
    path.parent.mkdir(parents=True, exist_ok=True)
    with in_place(path) as partial:  # a killed process must not leave half a shard, which would count as drawn
        pq.write_table(table.replace_schema_metadata(about), partial)


# --- settings -------------------------------------------------------------------------------------------------


def read_settings(folder: Path, sampling: Mapping[str, Any]) -> Settings:
    """What the samples and scores in a folder were made with; empty for a new folder.

    Entries of which the folder holds neither an image nor a score are left out, so that they can be changed.

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
        settings: Settings = read_json(path, f"--output {folder}", longest=2**30)
    except UserError:
        settings = {}
    if not _is_valid(settings, sampling):
        raise UserError(f"--output {folder}: its {SETTINGS} is damaged; choose another folder")
    # Settings are written before the first image, so an entry may be of a command that drew nothing.
    used = _used(folder)
    settings |= {kind: {name: e for name, e in settings[kind].items() if name in used[kind]} for kind in used}
    for key, old in settings["sampling"].items():
        if sampling[key] != old and used["models"]:
            option = f"--{key} {old}, not {sampling[key]}"
            raise UserError(f"--output {folder}: its samples were drawn with {option}; choose another folder")
    return settings


def _is_valid(settings: Any, sampling: Mapping[str, Any]) -> bool:
    """Whether a file's contents have the form that `write_settings` writes."""
    texts = dict.fromkeys(KINDS[1:], ("source", "digest")) | {"models": ("source", "digest", "base", "variant")}
    numbers = {"prompts": PROMPT_OPTIONS}
    if not isinstance(settings, dict) or not all(isinstance(settings.get(kind), dict) for kind in KINDS):
        return False
    entries = [(kind, entry) for kind in KINDS[1:] for entry in settings[kind].values()]
    return settings["sampling"].keys() <= sampling.keys() and all(
        isinstance(entry, dict)
        and all(isinstance(entry.get(key), str) for key in texts[kind])
        and all(isinstance(entry.get(key), int) for key in numbers.get(kind, ()))
        for kind, entry in entries
    )


def _used(folder: Path) -> dict[str, set[str]]:
    """Names of the models, prompt sets and reward models that a folder holds images or scores of."""
    paths = list(folder.glob("data/*/*.parquet"))
    return {
        "models": {path.stem.rpartition("-")[0] for path in paths},
        "prompts": {path.parent.name for path in paths},
        "scorers": {name for path in paths for name in columns(path)},
    }


def write_settings(folder: Path, before: Settings, wanted: Settings) -> Settings:
    """Write a folder's settings: all that it had, and what is new.

    Models, prompt sets and reward models may be added; none may change, since its samples would then mix two.

    Args:
        before: from `read_settings`.
    Returns:
        The settings as written.
    Raises:
        UserError: an entry has changed.
    """
    for kind in KINDS[1:]:
        for name, new in wanted[kind].items():
            old: Any = before[kind].get(name, new)
            if new["digest"] != old["digest"]:
                raise UserError(
                    f"--output {folder}: {kind} {name!r} was {old['source']!r} ({old['digest'][:8]}) there, not "
                    f"{new['source']!r} ({new['digest'][:8]}); choose another name or another folder"
                )
    settings = {kind: before[kind] | wanted[kind] for kind in KINDS}
    folder.mkdir(parents=True, exist_ok=True)
    with in_place(folder / SETTINGS) as partial:
        partial.write_text(json.dumps(settings, indent=2) + "\n", encoding="utf-8")
    return settings
