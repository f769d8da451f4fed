"""Preference pairs from a list of picture files: a CSV or JSON-lines file with a caption and two paths a row."""

import csv
import io
import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from workbench.common.cache import digest
from workbench.common.errors import UserError, one_line, shown
from workbench.common.reading import read_text, require_regular
from workbench.common.validation import is_place
from workbench.data.rows import Chunk, Rows, StreamedRows, open_rows
from workbench.models import digest_of

ENDINGS = (".csv", ".jsonl")


class Names(NamedTuple):
    """What the columns are called in a list."""

    caption: str = "caption"
    chosen: str = "chosen"
    rejected: str = "rejected"


NAMES = Names()


class Listed(NamedTuple):
    """A row: the preferred picture, and the other."""

    caption: str
    chosen: Path
    rejected: Path


@dataclass(frozen=True)
class ListedRows(Rows):
    """Rows whose pictures are files of their own, read when they are needed."""

    rows: Sequence[Listed]

    def chunks(self, size: int, done: int = 0, state: Mapping[str, Any] | None = None) -> Iterator[Chunk]:
        """As `Rows` says, in Pick-a-Pic's columns, the preferred picture first."""
        for start in range(done, self.total, size):
            yield [self._read(one) for one in self.rows[start : start + size]], None

    def _read(self, one: Listed) -> dict[str, Any]:
        try:
            images = one.chosen.read_bytes(), one.rejected.read_bytes()
        except OSError as error:
            raise UserError(f"{self.key}: {error.filename} cannot be read ({error.strerror})") from None
        return {"caption": one.caption, "jpg_0": images[0], "jpg_1": images[1], "label_0": 1, "label_1": 0}

    def stream(self) -> StreamedRows:
        """As `Rows` says; a list is never streamed."""
        raise UserError("data.cache = false: a list of pictures is encoded first; leave it at true")


def open_source(source: str, split: str, scores: str = "", names: Names = NAMES) -> Rows:
    """Preference pairs from a list of pictures, or from whatever `open_rows` reads.

    Args:
        source: a .csv or .jsonl file, or a folder with SPLIT.csv or SPLIT.jsonl in it; else as `open_rows` takes it.
        split, scores: as `open_rows` takes them.
        names: of a list's columns.
    Raises:
        UserError, Failure: as `open_rows` does; a column or a picture is missing, or both pictures of a pair are one.
    """
    path = _list_in(Path(source), split) if is_place(source) else None
    if path is None:
        return open_rows(source, split, scores)
    key = f"data.{split} = {source!r}"
    if scores:
        raise UserError(f"data.scores = {scores!r}: {key} is a list of pictures, which has no scores")
    rows = [_checked(row, f"{key}: {where}", path.parent, names) for where, row in _rows(path, key)]
    if not rows:
        raise UserError(f"{key}: no row in it")
    # A picture's time of change stands for its contents: to read all of them at every start would take long.
    files = [(str(file), file.stat().st_size, file.stat().st_mtime_ns) for one in rows for file in one[1:]]
    return ListedRows(digest("listed-1", digest_of([path]), names, *files), key, len(rows), rows)


def _list_in(path: Path, split: str) -> Path | None:
    """The list that a source is or holds; None where it is something else."""
    if path.suffix.lower() in ENDINGS and not path.is_dir():
        return path
    found = [path / f"{split}{ending}" for ending in ENDINGS if (path / f"{split}{ending}").is_file()]
    return found[0] if found else None


def _rows(path: Path, key: str) -> Iterator[tuple[str, Mapping[str, Any]]]:
    """The rows of a list, each after a word on where it stands."""
    text = read_text(path, key)
    try:
        if path.suffix.lower() == ".csv":
            reader = csv.DictReader(io.StringIO(text), strict=True)
            yield from ((f"line {reader.line_num}", row) for row in reader)
            return
        for number, line in enumerate(text.split("\n"), 1):
            if line.strip():
                yield f"line {number}", json.loads(line)
    except (csv.Error, ValueError, RecursionError) as error:
        raise UserError(f"{key}: {path.name} cannot be read ({one_line(error)})") from None


def _checked(row: Any, where: str, folder: Path, names: Names) -> Listed:
    """A row with its pictures found beside the list.

    Raises:
        UserError: a column is missing or empty, a picture is not there, or both are the same.
    """
    values: list[Any] = [row.get(name) if isinstance(row, dict) else None for name in names]
    for key, name, value in zip(Names._fields, names, values, strict=True):
        if not isinstance(value, str) or not (value.strip() or key == "caption"):
            columns = ", ".join(map(str, row)) if isinstance(row, dict) else shown(row)
            raise UserError(f"{where}: no text in column {name!r} (data.columns.{key}); the row has {columns}")
    pictures = []
    for name, value in zip(names[1:], values[1:], strict=True):
        if not is_place(value):
            raise UserError(f"{where}: {name} = {shown(value)}: no file has such a name")
        pictures.append(folder / value)
        require_regular(pictures[-1], f"{where}: {name}")
    if pictures[0].samefile(pictures[1]):
        raise UserError(f"{where}: {names.chosen} and {names.rejected} are the same picture, {values[1]}")
    return Listed(values[0], *pictures)
