"""Prompt sets in the formats in which they are published: Pick-a-Pic, PartiPrompts, HPDv2, or a plain text file.

| source | format |
| --- | --- |
| `embedded`, `validation`, `train`, `unseen` | the small model's test prompts, or its others |
| `*.txt` | one prompt a line |
| `*.parquet`, or a folder of them | Pick-a-Pic's: distinct `caption`s, in their order |
| `*.tsv` | PartiPrompts': columns `Prompt`, `Category`, `Challenge`; nothing is quoted |
| `*.json`, or a folder of them | HPDv2's benchmark: lists of prompts, the file's name their category |
"""

import json
from pathlib import Path
from typing import NamedTuple

import polars as pl

from workbench.common.cache import digest
from workbench.common.errors import UserError, one_line
from workbench.common.reading import near, read_lines, read_text
from workbench.common.validation import is_place
from workbench.data.parquet import is_text, open_parquet, require_columns
from workbench.models.small.prompts import split

#: HPDv2's benchmark files, in the order in which its package reads them.
HPD_STYLES = ("anime", "concept-art", "paintings", "photo")
#: Name of a source -> the set of the small model's prompts that it is.
OWN = {"embedded": "test", "validation": "validation", "train": "train", "unseen": "unseen"}
ACCEPTED = (
    "'embedded', 'validation', 'train', 'unseen', a .txt file, Pick-a-Pic's .parquet, PartiPrompts' .tsv, or HPDv2's "
    ".json or a folder of anime.json, concept-art.json, paintings.json and photo.json"
)

Rows = list[tuple[str, str]]  # prompt, category


class PromptSet(NamedTuple):
    """Prompts to draw.

    Attributes:
        name: as tables call it.
        source: where they come from, as the user said it.
        prompts: in the source's order.
        categories: of each prompt; "" where the source has none.
    """

    name: str
    source: str
    prompts: list[str]
    categories: list[str]

    @property
    def digest(self) -> str:
        """Digest of the prompts and their order."""
        return digest("prompts-1", *map(json.dumps, self.prompts))

    def head(self, limit: int) -> "PromptSet":
        """The set of its first `limit` prompts; all of them where that is 0."""
        return self._replace(prompts=self.prompts[: limit or None], categories=self.categories[: limit or None])


def read(source: str, name: str = "") -> PromptSet:
    """Read a prompt set.

    Args:
        source: a file, a folder or a name in the table above.
        name: of the set in tables; empty = the file's name without its ending.
    Raises:
        UserError: no such file, another format, or no prompt in it.
    """
    if source in OWN:
        # From the grammar and not from the files beside the shipped pairs, which are made anew with these.
        prompts = [str(prompt) for prompt in split()[OWN[source]]]
        return PromptSet(name or source, source, prompts, [""] * len(prompts))
    if not is_place(source):
        raise UserError(f"--prompts {source}: no file or folder has such a name")
    path = Path(source)
    reader = READERS.get("folder" if path.is_dir() else path.suffix.lower())
    if reader is None or not path.exists():
        reason = f"no such file or folder{near(path)}" if not path.exists() else f"unknown ending {path.suffix!r}"
        raise UserError(f"--prompts {source}: {reason}; expected {ACCEPTED}")
    what = f"--prompts {source}"
    try:
        rows = [(prompt.strip(), category) for prompt, category in reader(path, what) if prompt and prompt.strip()]
        for prompt, _ in rows:
            prompt.encode()  # JSON can hold half a character, which is no text
    except UserError:
        raise
    except (OSError, ValueError, RecursionError, pl.exceptions.PolarsError) as error:
        raise UserError(f"{what}: cannot be read ({one_line(error)})") from None
    if not rows:
        raise UserError(f"--prompts {source}: no prompt in it")
    return PromptSet(name or path.stem, source, [p for p, _ in rows], [c for _, c in rows])


def _text(path: Path, what: str) -> Rows:
    return [(line, "") for line in read_lines(path, what)]


def _pick_a_pic(path: Path, what: str) -> Rows:
    captions: dict[str, str] = {}
    for shard in sorted(path.rglob("*.parquet")) if path.is_dir() else [path]:
        with open_parquet(shard, what) as file:
            names = file.schema_arrow.names
            if "caption" not in names:
                raise UserError(f"{what}: no column 'caption' (Pick-a-Pic's), only {', '.join(names)}")
            require_columns(names, ["caption"], what)
            if not is_text(kind := file.schema_arrow.field("caption").type):
                raise UserError(f"{what}: its column 'caption' holds {kind}, not texts")
            captions |= dict.fromkeys(file.read(["caption"])["caption"].to_pylist(), "")
    return list(captions.items())


def _parti(path: Path, what: str) -> Rows:
    text = read_text(path, what)
    # A prompt's quotation marks are its own, and one that looks like a number stays a text.
    table = pl.read_csv(text.encode(), separator="\t", quote_char=None, infer_schema=False)
    missing = [column for column in ("Prompt", "Category") if column not in table.columns]
    if missing:
        raise UserError(f"{what}: no column {', '.join(missing)} (PartiPrompts has Prompt, Category, Challenge)")
    return table.select("Prompt", pl.col("Category").fill_null("")).rows()


def _hpd_file(path: Path, what: str) -> Rows:
    prompts = json.loads(read_text(path, what))
    if not isinstance(prompts, list) or not all(isinstance(prompt, str) for prompt in prompts):
        raise UserError(f"{what}: {path.name} is not a list of prompts, as HPDv2's benchmark files are")
    return [(prompt, path.stem) for prompt in prompts]


def _folder(path: Path, what: str) -> Rows:
    files = [path / f"{style}.json" for style in HPD_STYLES]
    there = [file.name for file in files if file.is_file()]
    if len(there) == len(files):
        return [row for file in files for row in _hpd_file(file, what)]
    if there:
        lacking = ", ".join(file.name for file in files if file.name not in there)
        raise UserError(f"{what}: no {lacking} beside {there[0]}")
    if any(path.rglob("*.parquet")):
        return _pick_a_pic(path, what)
    raise UserError(f"{what}: neither .parquet files nor HPDv2's .json files in it; expected {ACCEPTED}")


READERS = {".txt": _text, ".parquet": _pick_a_pic, ".tsv": _parti, ".json": _hpd_file, "folder": _folder}
