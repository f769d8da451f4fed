"""Preference pairs from parquet files and the hub: found, checked and read one after another as Pick-a-Pic's rows.

Parquet files are read with pyarrow alone. Hugging Face datasets is imported only for data on the hub and for pairs that
are shuffled while they stream, so that a machine without it encodes local files and trains.

`_w` is the preferred image of a pair, `_l` the other. A row counts when `has_label` (where there is such a
column) is true and its labels are 1/0 or 0/1; ties (0.5) are dropped as public training code drops them. Which of
its two images is which is all that is swapped.
"""

import glob
import json
import math
import re
from abc import ABC, abstractmethod
from bisect import bisect_left
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any, NamedTuple, TypeAlias

import numpy as np

from workbench.common import cache
from workbench.common.errors import Failure, UserError, one_line
from workbench.common.files import in_place
from workbench.common.paths import cache_folder
from workbench.common.reading import near, read_lines
from workbench.data.columns import NAMES, PLAIN, Layout, Names, require_images, score_columns, wanted_columns
from workbench.data.images import drawn_share, fit, opened
from workbench.data.parquet import is_image, is_text, open_parquet, unified
from workbench.models import ASSETS, HUB_ID, digest_of

#: What may become of a row.
KINDS = ("used", "ties", "unlabelled", "invalid", "undecodable")


class Pair(NamedTuple):
    """A pair that counts, fitted to a square.

    Attributes:
        w, l: pixels, (H, W, 3), uint8.
        size: height and width of the row's first image as it was.
        corner: top and left of that image's crop, after resizing.
        gap: score of the winner minus the loser's; 0 where no scores are read.
    """

    caption: str
    w: np.ndarray
    l: np.ndarray  # noqa: E741
    size: tuple[int, int]
    corner: tuple[int, int]
    gap: float = 0.0


#: Some undecoded rows, and what a data set on the hub needs to read on after them.
RawChunk: TypeAlias = tuple[list[dict[str, Any]], Mapping[str, Any] | None]


@dataclass(frozen=True)
class Rows(ABC):
    """Undecoded rows of `columns.COLUMNS` (and has_label), in a fixed order.

    Attributes:
        digest: of the files, or of the hub's commit.
        key: the setting they come from, for messages.
        total: how many, where it is known; else 0.
    """

    digest: str
    key: str
    total: int

    @abstractmethod
    def chunks(self, size: int, done: int = 0, state: Mapping[str, Any] | None = None) -> Iterator[RawChunk]:
        """Rows, `size` at a time, the last time fewer.

        Args:
            done: rows that were read before and are left out.
            state: what came with the last of them.
        Raises:
            UserError: a file is damaged.
            Failure: the hub does not answer.
        """

    @abstractmethod
    def stream(self) -> "StreamedRows":
        """The rows through Hugging Face datasets, which can shuffle them.

        Raises:
            UserError: datasets is not installed.
            Failure: the hub does not answer.
        """


@dataclass(frozen=True)
class ParquetRows(Rows):
    """Rows of parquet files on this machine.

    Attributes:
        schema: a pyarrow schema of the columns that are read.
        chosen: numbers of the rows that are read, counted over all files, ascending; None = every row.
        layout: of the files' columns.
    """

    files: Sequence[Path]
    schema: Any
    chosen: Sequence[int] | None = None
    layout: Layout = PLAIN

    def chunks(self, size: int, done: int = 0, state: Mapping[str, Any] | None = None) -> Iterator[RawChunk]:
        """As `Rows` says."""
        rows = self._after(done)
        while chunk := list(islice(rows, size)):
            yield chunk, None

    def _after(self, skip: int) -> Iterator[dict[str, Any]]:
        wanted = (range(self.total) if self.chosen is None else self.chosen)[skip:]
        first = 0  # number of the row that is read next

        def inside(count: int) -> Sequence[int]:
            return wanted[bisect_left(wanted, first) : bisect_left(wanted, first + count)]

        for path in self.files:
            with open_parquet(path, self.key) as file:
                for group in range(file.num_row_groups):
                    # Row groups are passed over by their length in the footer, without reading them.
                    if not inside(count := file.metadata.row_group(group).num_rows):
                        first += count
                        continue
                    # Few rows at once, since each holds two encoded images.
                    for batch in file.iter_batches(64, [group], self.schema.names):
                        taken = batch.take([i - first for i in inside(len(batch))])
                        yield from map(self.layout.row, taken.to_pylist())
                        first += len(batch)

    def stream(self) -> "StreamedRows":
        """As `Rows` says."""
        try:
            from datasets import Features, Image, load_dataset
        except ImportError:
            raise UserError("data.cache = false: needs the package datasets; install it, or leave it at true") from None
        try:  # the columns' plain types: what a file says of itself could make datasets open images by their paths
            features = Features.from_arrow_schema(self.schema)
            images = [field.name for field in self.schema if is_image(field.type)]
            features |= dict.fromkeys(images, Image(decode=False))  # which takes bare bytes from other files too
        except (ValueError, NotImplementedError) as error:
            raise UserError(f"{self.key}: columns of a type that is not read ({one_line(error)})") from None
        files = [glob.escape(str(path)) for path in self.files]  # datasets would take them for patterns
        try:
            dataset = load_dataset(
                "parquet", data_files=files, split="train", streaming=True, columns=self.schema.names, features=features
            )
        except OSError as error:
            raise UserError(f"{self.key}: cannot be read ({one_line(error)})") from None
        if self.chosen is not None:
            among = frozenset(self.chosen)
            dataset = dataset.filter(lambda row, number: number in among, with_indices=True)
        return StreamedRows(self.digest, self.key, self.total, dataset, layout=self.layout)


@dataclass(frozen=True)
class StreamedRows(Rows):
    """Rows of a Hugging Face IterableDataset.

    Attributes:
        remote: whether they come from the hub.
        problem: why they cannot be read now; their digest is known all the same.
        layout: of the dataset's columns.
    """

    dataset: Any
    remote: bool = False
    problem: str = ""
    layout: Layout = PLAIN

    def chunks(self, size: int, done: int = 0, state: Mapping[str, Any] | None = None) -> Iterator[RawChunk]:
        """As `Rows` says; `state` alone decides where it goes on."""
        dataset = self.stream().dataset
        if state is not None:
            dataset.load_state_dict(dict(state))
        try:
            for chunk in dataset.iter(size):
                rows = [dict(zip(chunk, row, strict=True)) for row in zip(*chunk.values(), strict=True)]
                yield [self.layout.row(row) for row in rows], dataset.state_dict()
        except Exception as error:  # pyarrow and datasets raise many kinds
            if self.remote:
                again = "run it again, encoding goes on where it was"
                raise Failure(f"{self.key}: reading stopped ({one_line(error)}); {again}") from None
            raise UserError(f"{self.key}: cannot be read ({one_line(error)})") from None

    def stream(self) -> "StreamedRows":
        """As `Rows` says."""
        if self.problem:
            raise Failure(self.problem)
        return self


def open_rows(source: str, split: str, scores: str = "", names: Names = NAMES) -> Rows:
    """Preference pairs from parquet files or the hub, with their columns checked and nothing yet read.

    Args:
        source: a parquet file, a folder of them, a hub id, or "embedded" for the pairs that come with the workbench.
            A ":SPLIT" at its end names another split than the setting's own: a hub split, or in a folder the files
            whose names begin so. A hub id may carry "@REVISION".
        split: "train" or "validation": names the setting in errors, and the split.
        scores: read the columns SCORES_0 and SCORES_1 too; empty = none.
        names: of the columns; those of the workbench's own pairs are the usual ones whatever this says.
    Raises:
        UserError: no such file, not parquet, or a column missing.
        Failure: the hub does not answer.
    """
    key = f"data.{split} = {source!r}"
    if source == "embedded":
        shards, names = [ASSETS / "pairs" / f"{split}.parquet"], NAMES
    else:
        place, _, other = source.partition(":") if not Path(source).exists() else (source, "", "")
        path = Path(place)
        if (
            not path.exists()
            and re.fullmatch(HUB_ID.pattern + r"(@[\w./-]+)?", place)
            and not place.endswith(".parquet")
        ):
            return _from_hub(place, other or split, key, scores, names)
        if (path / "index.json").is_file():
            raise UserError(f"{key}: is encoded already; give the images' parquet files")
        shards = _shards(path.absolute(), other or split, bool(other))  # else "zip:x.parquet" is something else
    if not shards or not all(shard.is_file() for shard in shards):
        raise UserError(f"{key}: no such parquet file, or a folder without any; a hub id is OWNER/NAME")
    schema, total, layout = _check_shards(shards, key, scores, names)
    return ParquetRows(layout.names.keyed(digest_of(shards)), key, total, shards, schema, layout=layout)


def _shards(path: Path, split: str, required: bool) -> list[Path]:
    """The parquet files of a file's or folder's split: those named after it, else (unless required) all."""
    if not path.is_dir():
        return [path]
    found = sorted(f for f in path.rglob("*.parquet") if not f.is_dir())
    # Names as the hub writes them (train-00000-of-00645.parquet), or train.parquet.
    named = [f for f in found if re.match(rf"{re.escape(split)}(-\d|\.)", f.name)]
    return named if named or required else found


def _check_shards(shards: Sequence[Path], key: str, scores: str, names: Names) -> tuple[Any, int, Layout]:
    """The columns to read, as a pyarrow schema, the number of rows, the layout; reads only the files' footers."""
    import pyarrow

    found: dict[str, Any] = {}
    total, layout = 0, PLAIN
    for shard in shards:
        with open_parquet(shard, key) as file:
            about, what = file.schema_arrow, f"{key}: {shard.name}"
            layout, wanted = wanted_columns(about.names, what, scores, names)
            require_images([name for name in layout.images if is_text(about.field(name).type)], what)
            found[str(shard)] = pyarrow.schema([about.field(name) for name in wanted])
            total += file.metadata.num_rows
    every = [{*schema.names} for schema in found.values()]
    if differing := set.union(*every) - set.intersection(*every):
        raise UserError(f"{key}: {min(differing)} is a column of some of its files and not of others")
    return unified(found, key), total, layout


def _from_hub(place: str, split: str, key: str, scores: str, names: Names) -> Rows:
    """A split of a data set on the hub, streamed: nothing is downloaded but what is read.

    Where the hub cannot be reached, what it last said of the data set is enough to find them encoded.
    """
    try:
        from datasets import load_dataset
        from datasets.exceptions import DatasetNotFoundError
    except ImportError:
        hint = "a data set on the hub needs the package datasets"
        raise UserError(f"{key}: no such file or folder{near(place) or f'; {hint}'}") from None
    from huggingface_hub import HfApi
    from huggingface_hub.errors import RepositoryNotFoundError, RevisionNotFoundError

    name, _, revision = place.partition("@")
    note = cache_folder() / f"hub-{cache.digest(place)[:32]}"
    try:
        # The commit is part of the digest and fixes what is read, whatever is pushed under that name meanwhile.
        commit = HfApi().dataset_info(name, revision=revision or None).sha or ""
        dataset = load_dataset(name, split=split, streaming=True, revision=commit)
        features = dataset.features or {}
    except RevisionNotFoundError:
        raise UserError(f"{key}: no such revision on the hub") from None
    except (RepositoryNotFoundError, DatasetNotFoundError):
        raise UserError(
            f"{key}: neither a file or folder here nor a data set on the hub (private ones need HF_TOKEN){near(place)}"
        ) from None
    except ValueError as error:  # no such split
        raise UserError(f"{key}: {one_line(error)}") from None
    except Exception as error:  # the hub's client and its transport raise many kinds
        problem = (
            f"{key}: no such file or folder, and the hub could not be reached for it; give local parquet files, a "
            f"folder that workbench.encode --output wrote, or try again ({one_line(error)[:200]}){near(place)}"
        )
        if not note.is_file():
            raise Failure(problem) from None
        commit, _, columns = note.read_text(encoding="utf-8").partition("\n")
        if columns:  # notes of earlier versions have none
            names = wanted_columns(json.loads(columns), key, scores, names)[0].names
        told = names.keyed(f"{name}@{commit}:{split}")
        return StreamedRows(told, key, 0, None, problem=problem)
    note.parent.mkdir(parents=True, exist_ok=True)
    # Kept for the day on which the hub does not answer: commit and columns are enough to find what is encoded.
    with in_place(note) as partial:
        partial.write_text(f"{commit}\n{json.dumps(list(features))}", encoding="utf-8")
    layout, wanted = wanted_columns(list(features), key, scores, names)
    require_images([each for each in layout.images if getattr(features[each], "dtype", "") == "string"], key)
    dataset = dataset.select_columns(wanted).decode(False)  # which would open images by the paths that files name
    counted = (dataset.info.splits or {}).get(split)
    total = counted.num_examples if counted else 0
    digest = layout.names.keyed(f"{name}@{commit}:{split}")
    return StreamedRows(digest, key, total, dataset, remote=True, layout=layout)


def kind_of(row: Mapping[str, Any], scores: str = "") -> str:
    """What becomes of a row: one of KINDS but "undecodable"; one whose scores are no numbers is invalid."""
    labels = row["label_0"], row["label_1"]
    # Compared as numbers: True, 1 and 1.0 are written by different tools.
    if row.get("has_label", 1) != 1:
        return "unlabelled"
    if labels == (0.5, 0.5):
        return "ties"
    if labels not in ((1, 0), (0, 1)) or not (isinstance(row["caption"], str) and row["jpg_0"] and row["jpg_1"]):
        return "invalid"
    if not all(isinstance(row[name], int | float) and math.isfinite(row[name]) for name in score_columns(scores)):
        return "invalid"
    return "used"


def decode(
    row: Mapping[str, Any], size: int, scores: str = "", resize: str = "bicubic", crop: str = "center"
) -> Pair | None:
    """A row's pair, winner first; None where an image cannot be decoded.

    Args:
        scores, resize: as `open_rows` and `images.fit` take them.
        crop: "center"; or "random": both images at the same place along their longer edges, as `drawn_share` says.
    """
    try:
        first, second = (opened(row[column]) for column in ("jpg_0", "jpg_1"))
        share = drawn_share((first, second)) if crop == "random" else None
        (pixels, corner), (other, _) = fit(first, size, resize, share), fit(second, size, resize, share)
    except Exception:  # Pillow raises many kinds for broken files
        return None
    w, l = (pixels, other) if row["label_0"] == 1 else (other, pixels)  # noqa: E741
    # 2 label - 1 is +1 where the first image is the winner, -1 where it is the loser.
    gap = (row[f"{scores}_0"] - row[f"{scores}_1"]) * (2 * row["label_0"] - 1) if scores else 0.0
    return Pair(row["caption"], w, l, (first.height, first.width), corner, gap)


def report(counts: Mapping[str, int]) -> str:
    """How many rows were read and what became of them, in one line."""
    total = sum(counts.get(kind, 0) for kind in KINDS)
    return f"{total} rows: " + ", ".join(f"{counts.get(kind, 0)} {kind}" for kind in KINDS)


def read_prompts(source: str) -> Sequence[str]:
    """Prompts to draw, one a line; "embedded" for the small model's test prompts, "validation" for its others.

    Raises:
        UserError: no such file, or no prompt in it.
    """
    shipped = {"embedded": "test_prompts.txt", "validation": "validation_prompts.txt"}
    path = ASSETS / "pairs" / shipped[source] if source in shipped else Path(source)
    if not path.is_file():
        raise UserError(f"data.prompts = {source!r}: no such file{near(source)}")
    prompts = [line.strip() for line in read_lines(path, f"data.prompts = {source!r}") if line.strip()]
    if not prompts:
        raise UserError(f"data.prompts = {source!r}: no prompt in it")
    return prompts
