"""Stores of encoded pairs, read: a folder of safetensors shards and the index.json that names them.

A store may come from anybody: what its index says is checked against its shards before anything uses it, and no name in
it leads out of the folder.
"""

import hashlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

import torch
from pydantic import BaseModel, ConfigDict, Field, ValidationError
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from workbench.common.errors import UserError, shown
from workbench.common.files import require_readable
from workbench.common.progress import Progress
from workbench.common.validation import NotNegative, Positive
from workbench.data.pairs import EncodedPairs
from workbench.models import Backend
from workbench.models.safe_loading import read_json

FORMAT = "pairs-2"  # part of every digest: raise it when encoding changes
INDEX = "index.json"


class Entry(BaseModel):
    """What an index says of a shard."""

    model_config = ConfigDict(strict=True, frozen=True)

    file: str = Field(pattern=r"^pairs-\d{5,9}\.safetensors$")
    pairs: Positive
    bytes: NotNegative
    sha256: str


class Index(BaseModel):
    """A store's index.

    Attributes:
        encoders: digest of the autoencoder and text encoders.
        counts: how many rows were read and what became of them.
    """

    model_config = ConfigDict(strict=True, frozen=True)

    format: str
    digest: str
    source: str
    model: str
    encoders: str
    resolution: Positive
    dtype: str
    flip: Literal[True, False, "independent"]
    scores: str = ""
    resize: str = "bicubic"
    crop: str = "center"
    pairs: Positive
    captions: NotNegative
    counts: dict[str, NotNegative]
    shards: list[Entry] = Field(min_length=1)


class Header(BaseModel):
    """What a shard's head tells an encoding that goes on after it.

    Attributes:
        captions: those that are new in it.
        counts: of all rows so far.
        state: from which the next row is read.
    """

    digest: str
    captions: list[str]
    counts: dict[str, NotNegative]
    state: dict[str, Any] | None


def read_index(place: Path) -> Index:
    """A store's index.

    Raises:
        UserError: it is not there, of another format or damaged.
    """
    again = "encode again (python -m workbench.encode)"
    if not (place / INDEX).is_file():
        raise UserError(f"{place}: no {INDEX}; {again}")
    found = read_json(place / INDEX, str(place), longest=2**30)
    if found.get("format") != FORMAT:
        raise UserError(
            f"{place}: format {shown(found.get('format'))}, expected {FORMAT!r}; delete the folder and encode again"
        )
    try:
        index = Index.model_validate(found)
    except ValidationError as error:
        first = error.errors()[0]
        key = ".".join(str(part) for part in first["loc"])
        raise UserError(f"{place}: {key} = {shown(first['input'])} in {INDEX}: {first['msg']}; {again}") from None
    # Each shard could be right in itself and still be counted twice.
    if len({entry.file for entry in index.shards}) < len(index.shards):
        raise UserError(f"{place}: a shard is there twice in {INDEX}; {again}")
    return index


def open_store(
    place: Path,
    *,
    key: str = "",
    backend: Backend | None = None,
    flip: bool | Literal["independent"] | None = None,
    limit: int = 0,
    scores: str = "",
    resize: str = "",
    crop: str = "",
) -> EncodedPairs:
    """An encoded store.

    Args:
        key: the digest that it must have.
        backend: whose autoencoder and text encoders it must come from.
        flip: which mirrored pairs it must hold; None = whatever it does.
        limit: take the first so many; 0 = all.
        scores: whose gaps it must hold; empty = no matter.
        resize, crop: how its images must have been resized and cropped; empty = no matter.
    Raises:
        UserError: it is other data, another model's, incomplete or damaged.
    """
    index = read_index(place)
    if key and index.digest != key:
        raise UserError(
            f"{place}: holds pairs encoded from other data, model or settings (digest {index.digest[:12]}, these "
            f"have {key[:12]}); choose another folder or delete it"
        )
    if backend and index.encoders != backend.digest("vae", *backend.ENCODERS):
        raise UserError(
            f"{place}: encoded by another autoencoder, text encoder, precision or resolution ({index.model}, "
            f"{index.resolution} px) than {backend.checkpoint.source} ({backend.resolution} px); encode again"
        )
    # Mirrored pairs lie after each group of pairs that was encoded at once: the first N rows are not the first N pairs.
    if index.flip and 0 < limit < index.counts.get("used", 0):
        raise UserError(
            f"{place}: holds mirrored pairs too, so no {limit} of them can be taken; encode again with that limit"
        )
    if flip not in (None, index.flip):
        raise UserError(f"data.flip = {str(flip).lower()}: {place} was encoded with {str(index.flip).lower()}")
    if scores and index.scores != scores:
        held = f"those of {index.scores!r}" if index.scores else "none"
        raise UserError(f"data.scores = {scores!r}: {place} was encoded with {held}; encode again")
    for name, wanted, held in (("resize", resize, index.resize), ("crop", crop, index.crop)):
        if wanted and held != wanted:
            raise UserError(f"data.{name} = {wanted!r}: {place} was encoded with {held!r}")
    shards = [_shard(place, entry) for entry in index.shards]
    _check(place, shards)
    pairs = EncodedPairs(shards, index.counts, index.digest)
    if backend:
        require_fit(pairs, backend)
    return pairs.first(limit or len(pairs))


def require_fit(pairs: EncodedPairs, backend: Backend) -> None:
    """Raise UserError unless the backend's denoiser takes such pairs."""
    first = pairs.gather(torch.tensor([0]), torch.device("cpu"))
    backend.require_fit(first.x_w, first.condition)


def _shard(place: Path, entry: Entry) -> dict[str, Tensor]:
    path = place / entry.file
    # The size finds a shard that was cut off, without reading it; checksums are for `verify`.
    if not path.is_file() or path.stat().st_size != entry.bytes:
        have = f"{path.stat().st_size} of {entry.bytes} bytes" if path.is_file() else "missing"
        raise UserError(f"{path}: {have}; delete {INDEX} and run the encoding again: whole shards are kept")
    require_readable(path, "encode into another folder")
    try:
        tensors = load_file(path)
    except (SafetensorError, OSError) as error:
        raise UserError(f"{path}: damaged ({error}); delete it and {INDEX} and run the encoding again") from None
    if not _is_shard(tensors, entry.pairs):
        raise UserError(f"{path}: does not hold {entry.pairs} encoded pairs; encode again")
    return tensors


def _is_shard(tensors: Mapping[str, Tensor], pairs: int) -> bool:
    """Whether these are latents of so many pairs, what is told of each, and embeddings of captions."""
    if not {"x_w", "x_l", "caption"} <= tensors.keys() or tensors["caption"].dtype != torch.int64:
        return False
    texts = [x for name, x in tensors.items() if name.startswith("text.")]
    numbers = [x for name, x in tensors.items() if name != "caption"]
    of_pairs = [x for name, x in tensors.items() if not name.startswith("text.")]
    return (
        tensors["x_w"].ndim == 4
        and tensors["x_w"].shape == tensors["x_l"].shape
        and tensors["caption"].ndim == 1
        and all(x.is_floating_point() for x in numbers)
        and all(x.ndim and len(x) == pairs for x in of_pairs)
        and bool(texts)
        and all(x.ndim and len(x) == len(texts[0]) for x in texts)
    )


def _check(place: Path, shards: list[dict[str, Tensor]]) -> None:
    """Raise UserError where shards differ in kind, or name captions that none of them has."""
    kinds = [{name: (x.dtype, x.shape[1:]) for name, x in tensors.items()} for tensors in shards]
    if any(kind != kinds[0] for kind in kinds):
        raise UserError(f"{place}: its shards hold different tensors; encode again")
    text = next(name for name in shards[0] if name.startswith("text."))
    # Checked now: an index out of range would end a run at whichever step draws that pair.
    captions = sum(len(tensors[text]) for tensors in shards)
    if any(x.min() < 0 or x.max() >= captions for x in (tensors["caption"] for tensors in shards)):
        raise UserError(f"{place}: a pair has a caption that is none of its {captions}; encode again")


def verify(place: Path) -> None:
    """Read a whole store and compare its checksums; training looks at its form alone.

    Raises:
        UserError: a shard is not what was written.
    """
    for entry in Progress(desc="verify", iterable=read_index(place).shards, unit="shard", leave=False):
        path = place / entry.file
        if sha256(path) != entry.sha256:
            raise UserError(f"{path}: is not what was written; delete it and {INDEX} and run the encoding again")


def sha256(path: Path) -> str:
    """Checksum of a file."""
    with path.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()
