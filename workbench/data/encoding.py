"""Preference pairs as the trainer reads them: latents and embeddings, encoded once and mapped from disk.

A store is a folder of safetensors shards and an index.json, which is written last. A shard holds x_w and x_l (latents),
`pair.NAME` (what the denoiser is given of a pair beside its caption), `gap` (by how much the winner's score is higher,
where scores are read), `caption` (which caption, counted over all shards) and, for the captions that are new in it,
`text.NAME`; its header says what a continued encoding has to know.
"""

import json
import logging
import time
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, TypeAlias

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from workbench.common import distributed
from workbench.common.cache import digest
from workbench.common.errors import Failure, UserError, one_line
from workbench.common.files import in_place, is_partial, require_readable
from workbench.common.paths import cache_folder
from workbench.common.processes import cores
from workbench.common.progress import Progress
from workbench.common.validation import is_place
from workbench.data.chunks import Chunk, Reading, counted, decoded, lagging
from workbench.data.pairs import EncodedPairs
from workbench.data.rows import Pair, Rows, report
from workbench.data.store import FORMAT, INDEX, Header, open_store, require_fit, sha256, verify
from workbench.models import Backend

log = logging.getLogger(__name__)
#: Which mirrored images are added to the pairs: none, both of a pair alike, or each by itself.
Flip: TypeAlias = bool | Literal["independent"]
SMALL = 128  # pixels of an edge up to which images are encoded side by side on a CPU


@dataclass(frozen=True)
class Encoding:
    """How pairs are encoded; all of it decides the numbers, and so the digest.

    The digest is of this object's repr. A field that comes later has repr=False and is one of `additions`: so encodings
    that were made before it, with what is now its default, keep their digest and are found again.

    Attributes:
        limit: at most so many pairs that count; 0 = all.
        flip: every pair also mirrored, both of its images alike; "independent" = also with one image mirrored.
        dtype: "float32" or "float16", of what is stored.
        scores: beginning of the names of the columns that hold the images' scores; empty = none are stored.
        resize, crop: how images are fitted to a square, as `rows.decode` takes them.
    """

    limit: int = 0
    flip: Flip = False
    dtype: str = "float32"
    scores: str = field(default="", repr=False)
    resize: str = field(default="bicubic", repr=False)
    crop: str = field(default="center", repr=False)

    @property
    def reading(self) -> Reading:
        """How rows are decoded."""
        return Reading(self.scores, self.resize, self.crop)

    @property
    def additions(self) -> list[str]:
        """What is not among the fields that every digest has, where it is not the default."""
        later = {"scores": "", "resize": "bicubic", "crop": "center"}
        return [f"{name}={getattr(self, name)}" for name, default in later.items() if getattr(self, name) != default]


def key_of(rows: Rows, backend: Backend, encoding: Encoding) -> str:
    """Digest of everything that an encoding of these rows depends on."""
    encoders = backend.digest("vae", *backend.ENCODERS)
    return digest(FORMAT, rows.digest, encoding, backend.PIPELINE, encoders, *encoding.additions)


def encode(
    rows: Rows,
    backend: Backend,
    encoding: Encoding = Encoding(),
    *,
    into: Path | None = None,
    shard: int = 4096,
    batch_size: int = 0,
    workers: int = 0,
    check: bool = False,
) -> EncodedPairs:
    """Encode what is not yet encoded, and open it. Killed at any moment, it goes on with the shard it was in.

    Args:
        into: the store's folder; default: under its digest in the cache.
        shard: pairs a shard, at least.
        batch_size: pairs in one call of the autoencoder; 0 = by resolution.
        workers: threads that decode images; 0 = one a core.
        check: verify what is there already, which reads all of it.
    Raises:
        UserError: the folder holds other data, a file is damaged, or no row counts.
        Failure: the disk is full, or the hub does not answer.
    """
    if into and not is_place(str(into)):
        raise UserError(f"{into}: no folder has such a name")
    key = key_of(rows, backend, encoding)
    place = into or cache_folder() / f"pairs-{key[:32]}"
    if check and (place / INDEX).is_file():
        # First whether it is of these data at all; reading a whole store for nothing takes long.
        open_store(place, key=key)
        verify(place)
    # The index is written last: where it is, the store is whole. The main process alone encodes, the others wait.
    while not (place / INDEX).is_file():
        if distributed.is_main():
            try:
                _build(place, key, rows, backend, encoding, shard, batch_size, workers)
            except (OSError, SafetensorError) as error:  # a full disk is either, depending on who wrote
                kept = "whole shards stay, run it again"
                raise Failure(f"{place}: cannot be written ({one_line(error)}); {kept}") from None
        else:
            time.sleep(0.2)  # no collective: this may take hours; the folder is the same on every machine
    return open_store(place, key=key, backend=backend)


def in_memory(rows: Rows, backend: Backend, encoding: Encoding, batch_size: int = 0, workers: int = 0) -> EncodedPairs:
    """Encode pairs without a store: all of them are kept in memory.

    Args:
        batch_size: pairs in one call of the autoencoder; 0 = by resolution.
        workers: threads that decode images; 0 = one a core.
    Raises:
        UserError: a file is damaged, or no row counts.
    """
    progress = _Progress()
    # 2**62: more pairs than there can be, so that all are one shard.
    shards = [tensors for tensors, _ in _shards(rows, backend, encoding, 2**62, batch_size, workers, progress)]
    if not shards:
        raise UserError(f"{rows.key}: no usable row ({report(progress.counts)})")
    pairs = EncodedPairs(shards, progress.counts, key_of(rows, backend, encoding))
    require_fit(pairs, backend)
    return pairs


@dataclass
class _Progress:
    """Where an encoding stands: what the next shard has to know.

    Attributes:
        counts: rows so far by what became of them; their total is also the number of rows that were read.
        captions: number of each caption so far.
        state: from which the next row is read; None where the number of rows is enough.
        shards: what the index will say of the shards so far.
    """

    counts: Counter = field(default_factory=Counter)
    captions: dict[str, int] = field(default_factory=dict)
    state: Mapping[str, Any] | None = None
    shards: list[dict[str, Any]] = field(default_factory=list)


def _build(
    place: Path, key: str, rows: Rows, backend: Backend, encoding: Encoding, shard: int, batch_size: int, workers: int
) -> None:
    place.mkdir(parents=True, exist_ok=True)
    progress = _resumed(place, key)
    if progress.shards:
        log.warning("%s: going on after %d pairs", place.name, progress.counts["used"])
    for tensors, new in _shards(rows, backend, encoding, shard, batch_size, workers, progress):
        path = place / f"pairs-{len(progress.shards):05d}.safetensors"
        header = Header(digest=key, captions=new, counts=progress.counts, state=progress.state)
        _write(path, tensors, {"workbench": header.model_dump_json()})  # one entry: several come in a random order
        progress.shards.append(_entry(path, len(tensors["x_w"])))
    if not progress.shards:
        with suppress(OSError):  # somebody else's files lie in it
            place.rmdir()
        raise UserError(f"{rows.key}: no usable row ({report(progress.counts)})")
    if progress.counts["undecodable"] or progress.counts["invalid"]:
        log.warning("%s: %s", rows.key, report(progress.counts))
    index = {
        "format": FORMAT,
        "digest": key,
        "source": rows.key,
        "model": backend.checkpoint.source,
        "encoders": backend.digest("vae", *backend.ENCODERS),
        "resolution": backend.resolution,
        "dtype": encoding.dtype,
        "flip": encoding.flip,
        "scores": encoding.scores,
        "resize": encoding.resize,
        "crop": encoding.crop,
        "pairs": sum(s["pairs"] for s in progress.shards),
        "captions": len(progress.captions),
        "counts": dict(progress.counts),
        "shards": progress.shards,
    }
    # Last: a store that has an index is whole.
    with in_place(place / INDEX) as partial:
        partial.write_text(json.dumps(index, indent=1), encoding="utf-8")


def _entry(path: Path, pairs: int) -> dict[str, Any]:
    """What the index says of a shard."""
    return {"file": path.name, "pairs": pairs, "bytes": path.stat().st_size, "sha256": sha256(path)}


def _write(path: Path, tensors: dict[str, Tensor], header: dict[str, str]) -> None:
    with in_place(path) as partial:
        # safetensors refuses tensors with gaps in memory.
        save_file({name: x.contiguous() for name, x in tensors.items()}, partial, metadata=header)


def _resumed(place: Path, key: str) -> _Progress:
    """Where an earlier encoding stopped, from its whole shards, up to the first that is missing or damaged."""
    progress = _Progress()
    # A younger one may be of another process that encodes into this folder now.
    for left in filter(is_partial, place.glob("*.partial")):
        if time.time() - left.stat().st_mtime > 3600:  # of a killed process
            left.unlink(missing_ok=True)
    while (path := place / f"pairs-{len(progress.shards):05d}.safetensors").is_file():
        require_readable(path, "encode into another folder")
        try:
            with safe_open(path, "pt") as shard:
                header = Header.model_validate_json((shard.metadata() or {}).get("workbench", ""))
                pairs = shard.get_slice("x_w").get_shape()[0]
        except (SafetensorError, OSError, ValueError):
            log.warning("%s is damaged: encoding it again", path)
            break
        if header.digest != key:
            raise UserError(
                f"{place}: holds shards of other data, another model or other settings; choose another folder or "
                "delete it"
            )
        # Each shard's header holds the counts of all rows up to its end, so that of the last whole one is enough.
        progress.counts, progress.state = Counter(header.counts), header.state
        # The right side is evaluated before the update: `len` is the number of captions before this shard.
        progress.captions |= {c: len(progress.captions) + i for i, c in enumerate(header.captions)}
        progress.shards.append(_entry(path, pairs))
    return progress


def _shards(
    rows: Rows, backend: Backend, encoding: Encoding, shard: int, batch_size: int, workers: int, progress: _Progress
) -> Iterator[tuple[dict[str, Tensor], list[str]]]:
    """Tensors of one shard after another, each with the captions that are new in it; `progress` is kept up."""
    parts: list[dict[str, Tensor]] = []
    new: list[str] = []
    # A pair is two images.
    size = batch_size or backend.images_at_once // 2
    captions = progress.captions
    # Every row that was read is counted as one kind, so the total is the number of rows to leave out.
    initial = progress.counts.total()
    bar = Progress(total=rows.total or None, initial=initial, desc="encode pairs", unit="row", leave=False)
    read = decoded(rows, backend.resolution, size, initial, progress.state, workers, encoding.reading)
    with bar:
        for chunk, ways in _encoded(counted(read, progress.counts, encoding.limit), backend, encoding.flip):
            bar.update(chunk.counts.total() - progress.counts.total())
            # Only now: an index or a header counts the rows of the chunks that are encoded, not of those read ahead.
            # A shard ends only where a chunk does: within a chunk there is no state from which reading could go on.
            progress.counts, progress.state = chunk.counts, chunk.state
            bar.set_postfix(used=progress.counts["used"], refresh=False)
            for pair in chunk.pairs:
                if pair.caption not in captions:
                    captions[pair.caption] = len(captions)
                    new.append(pair.caption)
            # The caption by its number: its embedding is stored once, however many pairs have it.
            shared = {"caption": torch.tensor([captions[p.caption] for p in chunk.pairs])}
            if encoding.scores:
                shared["gap"] = gaps_of(chunk.pairs)
            parts += [_stored(tensors | shared, encoding, rows.key) for tensors in ways]
            if parts and (chunk.last or sum(len(p["x_w"]) for p in parts) >= shard):
                yield _joined(parts, new, backend, encoding, rows.key), new
                parts, new = [], []
    if parts:
        yield _joined(parts, new, backend, encoding, rows.key), new


def encoders(backend: Backend) -> int:
    """Calls of the autoencoder that run at the same time, each on a thread of its own.

    For small images on a CPU one a core: commands give torch one thread, so that each call has the same bits as alone.
    A large image is encoded by itself, since it needs gigabytes, and a GPU is kept busy by one call.
    """
    small = backend.device.type == "cpu" and backend.resolution <= SMALL
    return cores() if small else 1


def _encoded(chunks: Iterable[Chunk], backend: Backend, flip: Flip) -> Iterator[tuple[Chunk, list[dict[str, Tensor]]]]:
    """Chunks in their order, each with the latents of its pairs, and of their mirror images as `flip` says."""
    threads = encoders(backend)
    if threads == 1:
        # In this thread, which Ctrl-C interrupts between two operations: on a CPU a large chunk takes a minute.
        for chunk in chunks:
            yield chunk, _with_mirrored(chunk.pairs, backend, flip)
        return
    # Before there are threads: from Python 3.12 on, cached_property has no lock, and each would load it.
    _ = backend.pipeline
    with ThreadPoolExecutor(threads) as pool:
        begun = ((chunk, pool.submit(_with_mirrored, chunk.pairs, backend, flip)) for chunk in chunks)
        for chunk, ways in lagging(begun, threads):
            yield chunk, ways.result()


def _joined(
    parts: list[dict[str, Tensor]], new: list[str], backend: Backend, encoding: Encoding, key: str
) -> dict[str, Tensor]:
    """One shard's tensors, of its parts and of the captions that are new in it, which are encoded here."""
    tensors = {name: torch.cat([p[name] for p in parts]) for name in parts[0]}
    asked = new or [""]  # a shard without new captions still says which embeddings there are
    chunks = [_stored(backend.encode_text(asked[i : i + 64]), encoding, key) for i in range(0, len(asked), 64)]
    return tensors | {f"text.{name}": torch.cat([c[name] for c in chunks])[: len(new)] for name in chunks[0]}


def _stored(tensors: Mapping[str, Tensor], encoding: Encoding, key: str) -> dict[str, Tensor]:
    """Tensors as a shard holds them: on the CPU, in the encoding's precision; sizes in pixels and scores stay exact.

    Raises:
        Failure: the autoencoder or a text encoder made what is no number in that precision.
    """
    dtype, stored = getattr(torch, encoding.dtype), {}
    for name, x in tensors.items():
        exact = name.startswith("pair.") or name == "gap" or not x.is_floating_point()
        stored[name] = x.to("cpu", x.dtype if exact else dtype)
        if not stored[name].isfinite().all():
            raise Failure(f"{key}: encoded in {encoding.dtype}, {name} is not finite; try data.dtype=float32")
    return stored


def latents_of(pairs: Sequence[Pair], backend: Backend) -> dict[str, Tensor]:
    """Latents of both images of each pair, in one call, and what the denoiser is given of it beside its caption."""
    x_w, x_l = backend.encode_images(np.stack([p.w for p in pairs] + [p.l for p in pairs])).chunk(2)
    conditions = [backend.pair_condition(*p.size, *p.corner) for p in pairs]
    stacked = {f"pair.{name}": torch.stack([each[name] for each in conditions]) for name in conditions[0]}
    return {"x_w": x_w, "x_l": x_l} | stacked


def _with_mirrored(pairs: Sequence[Pair], backend: Backend, flip: Flip) -> list[dict[str, Tensor]]:
    """Latents of pairs as they are, then of their mirror images as `flip` says; each image is encoded once."""
    if not pairs:
        return []
    plain = latents_of(pairs, backend)
    if not flip:
        return [plain]
    turned = latents_of([mirrored(pair) for pair in pairs], backend)
    mixed = [plain | {"x_l": turned["x_l"]}, turned | {"x_l": plain["x_l"]}] if flip == "independent" else []
    return [plain, turned, *mixed]


def gaps_of(pairs: Sequence[Pair]) -> Tensor:
    """The winner's score minus the loser's of each pair, (B,), float32."""
    return torch.tensor([pair.gap for pair in pairs], dtype=torch.float32)


def mirrored(pair: Pair, winner: bool = True, loser: bool = True) -> Pair:
    """The pair with its images mirrored, left to right: both, or one of them."""
    return pair._replace(
        w=pair.w[:, ::-1] if winner else pair.w,
        l=pair.l[:, ::-1] if loser else pair.l,
    )
