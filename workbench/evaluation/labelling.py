"""Preference pairs that a person labels: which images are shown together, on which side, and the answers as parquet.

    OUTPUT/labelling.json         what is compared, so that another comparison is never mixed in
    OUTPUT/labels-00000.parquet   Pick-a-Pic v2's columns, 32 answers a file; the newest is written anew by each answer

The first image of a row was shown on the left. Its model_0 says from which of the two sources it came, so that a
preference for a side can be found afterwards. A pair that was passed over has no label, and training leaves it out.
"""

import hashlib
import io
import json
import re
from collections.abc import Callable, Sequence
from contextlib import suppress
from datetime import UTC, datetime
from functools import partial
from pathlib import Path
from typing import Any, Literal, NamedTuple, get_args

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from PIL import Image, UnidentifiedImageError

from workbench.common.cache import digest
from workbench.common.errors import UserError, shown
from workbench.common.outputs import output_file, require_own
from workbench.common.reading import near, read_lines
from workbench.common.validation import writable_folder
from workbench.data.images import FORMATS
from workbench.data.parquet import read_table
from workbench.evaluation.pair_files import COLUMNS
from workbench.evaluation.sample_store import read_bytes
from workbench.models.safe_loading import read_json

Answer = Literal["left", "right", "tie", "skip"]
ANSWERS: tuple[str, ...] = get_args(Answer)
LABELS = {"left": 1.0, "right": 0.0, "tie": 0.5, "skip": None}
SETTINGS, SHARD = "labelling.json", 32


class Picture(NamedTuple):
    """An image of a source.

    Attributes:
        place: by which it is known again: LEFT or RIGHT, and its file there.
        read: its file's bytes.
    """

    place: str
    read: Callable[[], bytes]


class Question(NamedTuple):
    """Two images to compare, as they are shown.

    Attributes:
        key: of the pair, whatever its sides.
        models: the sources that the left and the right image come from.
    """

    key: str
    caption: str
    left: Picture
    right: Picture
    models: tuple[str, str]


# --- what is compared -----------------------------------------------------------------------------------------


def plan(left: str, right: str, prompts: str, seed: int) -> list[Question]:
    """All pairs of two sources, in an order and on sides that the seed alone decides.

    Args:
        left, right: each a folder of pictures, matched by name without ending; or what `python -m workbench.evaluate`
            kept of a model, SAMPLES/data/PROMPTS/MODEL without the shards' numbers, matched by prompt and seed.
        prompts: a text file, one a line, in the order of the pictures' names, in which 2 comes before 10; "" for
            samples, which have their own.
        seed: of the order and the sides.
    Raises:
        UserError: no such source, no image in both, prompts for samples, or not as many as pictures.
    """
    if not prompts and any(Path(source).is_dir() for source in (left, right)):
        raise UserError("--prompts: pictures have none of their own; give a text file, one prompt a line")
    one, other = _images(left, "LEFT"), _images(right, "RIGHT")
    if prompts and not all(Path(source).is_dir() for source in (left, right)):
        raise UserError(f"--prompts {prompts}: samples of models have prompts of their own; leave it out")
    both = sorted(one.keys() & other.keys(), key=_natural)
    if not both:
        raise UserError(f"{left} and {right}: no image in both; pictures are matched by name, samples by prompt")
    if Path(left).resolve() == Path(right).resolve():
        raise UserError(f"LEFT and RIGHT are the same, {left}")
    captions = _captions(prompts, both)
    questions = []
    for name in both:
        pair, models = (one[name], other[name]), (left, right)
        # By the pair itself: a pair that is added later leaves the sides of the others as they were.
        if int(digest("sides", seed, name), 16) % 2:
            pair, models = (other[name], one[name]), (right, left)
        questions.append(Question(digest("pair", name)[:16], captions[name], *pair, models))
    return sorted(questions, key=lambda question: digest("order", seed, question.key))


def _natural(name: tuple[str, int]) -> tuple:
    """By which names are sorted as people count them: 1, 2, 10; names that are alike but for zeros by their letters."""
    # Texts and numbers take turns in what `split` returns, so that each is compared with its kind.
    parts = re.split(r"([0-9]+)", name[0])
    return [int(part) if i % 2 else part for i, part in enumerate(parts)], name


def _images(source: str, what: str) -> dict[tuple[str, int], Picture]:
    """The images of a source by what they are matched by: name and 0, or prompt and seed."""
    path = Path(source)
    if path.is_dir():
        return _pictures(path, what)
    found: dict[tuple[str, int], Picture] = {}
    # In full: another model may be called NAME-0.
    shard_name = re.compile(re.escape(path.name) + r"-\d{5,}\.parquet")
    for shard in sorted(each for each in path.parent.glob("*.parquet") if shard_name.fullmatch(each.name)):
        table = read_table(shard, f"{what} {shard}", ["prompt", "seed"])
        for row, (prompt, seed) in enumerate(zip(*table.to_pydict().values(), strict=True)):
            place = f"{what}/{shard.name}:{row}"
            found.setdefault((prompt, seed), Picture(place, partial(_sample, shard, row)))
    if not found:
        raise UserError(f"{what} {source}: no such folder of pictures or samples of a model{near(path)}")
    return found


def _sample(shard: Path, row: int) -> bytes:
    """The file of one image of a shard."""
    return read_bytes(shard)[row]


def _pictures(folder: Path, what: str) -> dict[tuple[str, int], Picture]:
    found: dict[tuple[str, int], Picture] = {}
    for file in sorted(each for each in folder.iterdir() if each.is_file() and not each.name.startswith(".")):
        # Only headers are read here. Files that are no pictures, such as prompts, may lie beside them.
        with suppress(UnidentifiedImageError, OSError, Image.DecompressionBombError), Image.open(file, formats=FORMATS):
            if (file.stem, 0) in found:
                raise UserError(f"{what} {folder}: two pictures are called {file.stem}")
            found[file.stem, 0] = Picture(f"{what}/{file.name}", file.read_bytes)
    if not found:
        raise UserError(f"{what} {folder}: no picture in it")
    return found


def _captions(prompts: str, names: Sequence[tuple[str, int]]) -> dict[tuple[str, int], str]:
    if not prompts:
        return {name: name[0] for name in names}  # of samples it is the prompt
    lines = [line.strip() for line in read_lines(Path(prompts), f"--prompts {prompts}") if line.strip()]
    if len(lines) != len(names):
        raise UserError(f"--prompts {prompts}: {len(lines)} prompts for {len(names)} pairs of pictures; one a line")
    return dict(zip(names, lines, strict=True))


# --- answers --------------------------------------------------------------------------------------------------


class Labels:
    """The answers to a plan, each on disk before the next question is asked.

    Attributes:
        questions: all of the plan.
        answered: what was answered, by the question's key, in the order of the answers.
        unreadable: keys of questions that were passed over because a picture of theirs cannot be read; no row is
            stored of them, and they are asked again when the folder is opened again.
    """

    def __init__(self, folder: Path, questions: Sequence[Question], about: dict[str, Any]):
        """Open a folder of answers, or begin one.

        Args:
            about: what is compared and how, as the folder remembers it.
        Raises:
            UserError: the folder belongs to another comparison, or to somebody else.
        """
        self.folder, self.questions = folder, list(questions)
        path = writable_folder("--output", folder) / SETTINGS
        if path.exists():
            before = read_json(path, f"--output {folder}")
            before = before if isinstance(before, dict) else {}
            for name, value in about.items():
                if before.get(name) != value:
                    raise UserError(
                        f"--output {folder}: was made with {name} = {shown(before.get(name))}, not {shown(value)}; "
                        "choose another folder"
                    )
        else:
            require_own(folder, SETTINGS, self._shard(0).name)
            with output_file(path) as fresh:
                fresh.write_text(json.dumps(about, indent=1) + "\n", encoding="utf-8")
        self._key = {frozenset((one.left.place, one.right.place)): one.key for one in questions}
        self._last: list[dict[str, Any]] = []
        self._shards, self.answered = 0, dict[str, float | None]()
        self.unreadable: set[str] = set()
        while self._shard(self._shards).exists():
            self._read(self._shard(self._shards))
            self._shards += 1
        # The newest file is the one that is written anew, unless it is full.
        self._shards = max(0, self._shards - 1)

    def current(self) -> Question | None:
        """The next question that has no answer and is not passed over; None where there is none."""
        return next((one for one in self.questions if one.key not in {*self.answered, *self.unreadable}), None)

    def answer(self, key: str, answer: str) -> bool:
        """Store the answer to the current question.

        Args:
            key: of the question that was answered.
            answer: one of ANSWERS.
        Returns:
            False where another question is the current one, as after a double click; nothing is stored then.
        Raises:
            OSError, UserError: it could not be stored, or a picture cannot be read; such a question can be skipped.
        """
        question = self.current()
        if question is None or question.key != key or answer not in ANSWERS:
            return False
        try:
            row = self._row(question, LABELS[answer])
        except (OSError, UserError):
            if answer != "skip":
                raise
            self.unreadable.add(key)
            return True
        if len(self._last) == SHARD:
            self._last, self._shards = [], self._shards + 1
        rows = [*self._last, row]
        self._write(rows)
        # After the write: an answer that could not be stored is asked for again.
        self._last, self.answered[key] = rows, LABELS[answer]
        return True

    def undo(self) -> bool:
        """Take the newest answer back; False where there is none in the newest file."""
        if not self._last:
            return False
        rows = self._last[:-1]
        self._write(rows)
        self._last = rows
        self.answered.popitem()
        return True

    def _shard(self, number: int) -> Path:
        return self.folder / f"labels-{number:05d}.parquet"

    def _read(self, path: Path) -> None:
        rows = read_table(path, f"--output {self.folder}: {path.name}", [*COLUMNS]).to_pylist()
        for row in rows:
            key = self._key.get(frozenset((row["image_0_url"], row["image_1_url"])))
            # A pair whose pictures are no longer there keeps its answer in the file, and is not asked again.
            self.answered[key or row["image_0_url"]] = row["label_0"]
        self._last = rows

    def _write(self, rows: Sequence[dict[str, Any]]) -> None:
        with output_file(self._shard(self._shards)) as fresh:
            pq.write_table(pa.Table.from_pylist(list(rows), pa.schema(list(COLUMNS.items()))), fresh)

    def _row(self, question: Question, label: float | None) -> dict[str, Any]:
        images = question.left.read(), question.right.read()
        uids = [hashlib.sha256(image).hexdigest()[:32] for image in images]
        best = {None: None, 1.0: uids[0], 0.0: uids[1], 0.5: "tie"}[label]
        return {
            "are_different": images[0] != images[1],
            "best_image_uid": best,
            "caption": question.caption,
            "created_at": datetime.now(UTC).replace(tzinfo=None),
            "has_label": label is not None,
            "image_0_uid": uids[0],
            "image_1_uid": uids[1],
            "image_0_url": question.left.place,
            "image_1_url": question.right.place,
            "jpg_0": images[0],
            "jpg_1": images[1],
            "label_0": label,
            "label_1": None if label is None else 1.0 - label,
            "model_0": question.models[0],
            "model_1": question.models[1],
            "ranking_id": len(self.answered),
            "user_id": 0,
            "num_example_per_prompt": sum(one.caption == question.caption for one in self.questions),
        }


def tally(labels: Labels, sources: Sequence[str]) -> dict[str, int]:
    """How often each source was preferred, and how many ties and passed-over pairs there are.

    Args:
        sources: the two, as `plan` took them.
    """
    counts = dict.fromkeys((*sources, "ties", "skipped"), 0)
    for question in labels.questions:
        if question.key in labels.answered:
            label = labels.answered[question.key]
            side = {1.0: question.models[0], 0.0: question.models[1], 0.5: "ties", None: "skipped"}
            counts[side[label]] += 1
    return counts


def media_type(image: bytes) -> str:
    """What a browser calls the format of an image's file."""
    with Image.open(io.BytesIO(image), formats=FORMATS) as opened:
        return Image.MIME.get(str(opened.format), "application/octet-stream")


def sides(labels: Labels) -> float | None:
    """The share of decided answers that preferred the left image; None where none is decided.

    Far from a half it says that a side was preferred, and not an image.
    """
    decided = [label for label in labels.answered.values() if label in (0.0, 1.0)]
    return float(np.mean(decided)) if decided else None
