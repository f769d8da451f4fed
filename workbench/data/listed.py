"""Preference pairs from picture files.

Either a list of them, a CSV, JSON or JSON-lines file with a caption and two paths a row; or a folder of pairs:

    FOLDER/fox/prompt.txt     the caption
    FOLDER/fox/chosen.png     the preferred picture, of whatever format
    FOLDER/fox/rejected.jpg   the other

with one folder a pair, of any name; or FOLDER/train/fox/... and FOLDER/validation/... where there are both.
"""

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
from workbench.data.columns import NAMES, Names
from workbench.data.rows import RawChunk, Rows, StreamedRows, open_rows
from workbench.models import digest_of

ENDINGS = (".csv", ".jsonl", ".json")
PATHS = ("chosen", "rejected")
PROMPT = "prompt.txt"


class Listed(NamedTuple):
    """A row: the preferred picture, and the other."""

    caption: str
    chosen: Path
    rejected: Path


@dataclass(frozen=True)
class ListedRows(Rows):
    """Rows whose pictures are files of their own, read when they are needed."""

    rows: Sequence[Listed]

    def chunks(self, size: int, done: int = 0, state: Mapping[str, Any] | None = None) -> Iterator[RawChunk]:
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
        source: a .csv, .jsonl or .json file, a folder with SPLIT.csv, SPLIT.jsonl or SPLIT.json in it, or a folder of
            pairs; else as `open_rows` takes it.
        split, scores, names: as `open_rows` takes them; a list has the columns caption, chosen and rejected.
    Raises:
        UserError, Failure: as `open_rows` does; a column or a picture is missing, or both pictures of a pair are one.
    """
    path = _list_in(Path(source), split) if is_place(source) else None
    folders = _pairs_in(Path(source), split) if path is None and is_place(source) else []
    if path is None and not folders:
        return open_rows(source, split, scores, names)
    key = f"data.{split} = {source!r}"
    if scores:
        raise UserError(f"data.scores = {scores!r}: {key} is a list of pictures, which has no scores")
    if path is None:
        rows = [_pair_in(folder, key) for folder in folders]
        captions = [one.caption for one in rows]
        return ListedRows(digest("pair-folders-1", *captions, *_states(rows)), key, len(rows), rows)
    found = list(_rows(path, key))
    columns = found[0][1] if found and isinstance(found[0][1], dict) else {}
    # The caption may be called so in other data alone; which picture is preferred is never guessed.
    names = Names(Names(names.caption).within(columns, key).caption, names.chosen, names.rejected)
    rows = [_checked(row, f"{key}: {where}", path.parent, names) for where, row in found]
    if not rows:
        raise UserError(f"{key}: no row in it")
    # As earlier versions wrote it, whose encoded pairs are found by it.
    called = "Names(" + ", ".join(f"{key}={getattr(names, key)!r}" for key in ("caption", *PATHS)) + ")"
    return ListedRows(digest("listed-1", digest_of([path]), called, *_states(rows)), key, len(rows), rows)


def _states(rows: Sequence[Listed]) -> list[tuple[str, int, int]]:
    """Each picture's path, size and time of change.

    The time stands for the contents: to read all of them at every start would take long.
    """
    return [(str(file), file.stat().st_size, file.stat().st_mtime_ns) for one in rows for file in one[1:]]


def _pairs_in(path: Path, split: str) -> list[Path]:
    """The folders of pairs that a source holds for a split, by name; none where it is something else."""
    for place in (path / split, path):
        # One that lacks a file is a pair all the same, and a mistake: left out, nobody would miss it.
        files = (file for name in (PROMPT, *(f"{kind}.*" for kind in PATHS)) for file in place.glob(f"*/{name}"))
        if found := sorted({file.parent for file in files if file.suffix != ".parquet"}):
            return found
    return []


def _pair_in(folder: Path, key: str) -> Listed:
    """The pair that a folder holds.

    Raises:
        UserError: a file is missing, there twice, or cannot be read, or both pictures are the same file.
    """
    pictures: list[Path] = []
    for kind in PATHS:
        found = sorted(each for each in folder.iterdir() if each.stem == kind)
        if len(found) != 1:
            there = ", ".join(each.name for each in found) or "none"
            raise UserError(f"{key}: {folder.name}: expected one picture called {kind}, as {kind}.png; found {there}")
        require_regular(found[0], f"{key}: {folder.name}")
        pictures.append(found[0])
    if pictures[0].samefile(pictures[1]):
        raise UserError(f"{key}: {folder.name}: {' and '.join(each.name for each in pictures)} are the same picture")
    return Listed(" ".join(read_text(folder / PROMPT, f"{key}: {folder.name}").split()), *pictures)


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
        if path.suffix.lower() == ".json":
            found = json.loads(text)
            if not isinstance(found, list):
                raise UserError(f"{key}: {path.name} holds no list of rows; one row a line is a .jsonl file")
            yield from ((f"row {number}", row) for number, row in enumerate(found, 1))
            return
        for number, line in enumerate(text.split("\n"), 1):
            if line.strip():
                yield f"line {number}", json.loads(line)
    except UserError:
        raise
    except (csv.Error, ValueError, RecursionError) as error:
        raise UserError(f"{key}: {path.name} cannot be read ({one_line(error)})") from None


def _checked(row: Any, where: str, folder: Path, names: Names) -> Listed:
    """A row with its pictures found beside the list.

    Raises:
        UserError: a column is missing or empty, a picture is not there, or both are the same.
    """
    called = {key: getattr(names, key) for key in ("caption", *PATHS)}
    values: list[Any] = [row.get(name) if isinstance(row, dict) else None for name in called.values()]
    for (key, name), value in zip(called.items(), values, strict=True):
        if not isinstance(value, str) or not (value.strip() or key == "caption"):
            columns = ", ".join(map(str, row)) if isinstance(row, dict) else shown(row)
            raise UserError(f"{where}: no text in column {name!r} (data.columns.{key}); the row has {columns}")
    pictures = []
    for name, value in zip((names.chosen, names.rejected), values[1:], strict=True):
        if not is_place(value):
            raise UserError(f"{where}: {name} = {shown(value)}: no file has such a name")
        pictures.append(folder / value)
        require_regular(pictures[-1], f"{where}: {name}")
    if pictures[0].samefile(pictures[1]):
        raise UserError(f"{where}: {names.chosen} and {names.rejected} are the same picture, {values[1]}")
    return Listed(values[0], *pictures)
