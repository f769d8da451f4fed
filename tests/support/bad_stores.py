"""Encoded pairs that are broken, that do not fit, or whose index leads elsewhere."""

import hashlib
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from tests.support.bad_checkpoints import cut, disguised, edited, gone, head_of, reweighed, written
from tests.support.bad_inputs import Bad, Place

SHARD, CAPTIONS = "pairs-00000.safetensors", "text.text"


def _store(change: Callable[[Path], Any]) -> Callable[[Place], list[str]]:
    """Encoded pairs after a change."""

    def make(place: Place) -> list[str]:
        change(place.store)
        return ["train", "--output", "out", *place.given(data_train="store")]

    return make


def _entry(**changed: Any) -> Callable[[Path], Any]:
    """Other values for a shard in the index."""

    def change(store: Path) -> None:
        (entry,) = json.loads((store / "index.json").read_text())["shards"]
        edited("index.json", shards=[entry | changed])(store)

    return change


def _true(change: Callable[[dict[str, torch.Tensor]], Any]) -> Callable[[Path], Any]:
    """Other tensors in the shard, and an index that knows them."""

    def rewrite(store: Path) -> None:
        reweighed(SHARD, change)(store)
        data = (store / SHARD).read_bytes()
        _entry(bytes=len(data), sha256=hashlib.sha256(data).hexdigest())(store)

    return rewrite


def _set(name: str, change: Callable[[torch.Tensor], torch.Tensor]) -> Callable[[dict[str, torch.Tensor]], Any]:
    def replace(tensors: dict[str, torch.Tensor]) -> None:
        tensors[name] = change(tensors[name]).contiguous()

    return replace


def _moved(name: str) -> Callable[[Path], Any]:
    """The shard at another place, by which the index calls it."""

    def change(store: Path) -> None:
        target = store / name if not name.startswith("/") else Path(f"{store.parent}{name}")
        target.parent.mkdir(parents=True, exist_ok=True)
        (store / SHARD).rename(target)
        _entry(file=name if not name.startswith("/") else str(target))(store)

    return change


def _flipped(place: Place) -> list[str]:
    """A finished encoding of which one byte is another."""
    shutil.copytree(place.store, place.folder / "out" / "train")
    shutil.rmtree(place.store)
    path = place.folder / "out" / "train" / SHARD
    data = bytearray(path.read_bytes())
    data[-5] ^= 1
    path.write_bytes(data)
    return ["encode", "--split", "train", "--output", "out", *place.given()]


def _other(place: Place) -> list[str]:
    """Where an encoding of other data lies."""
    shutil.copytree(place.store, place.folder / "out" / "train")
    return ["encode", "--split", "train", "--output", "out", *place.given(data_limit="3")]


def _is_nan(x: torch.Tensor) -> torch.Tensor:
    return torch.full_like(x, float("nan"))


STORES: dict[str, tuple[Callable[[Place], list[str]], str]] = {
    "an index that is no JSON": (_store(cut("index.json", 100)), "store: index.json cannot be read"),
    "an index that is a list": (_store(written("index.json", "[]")), "store: index.json holds []"),
    "an index of another format": (_store(edited("index.json", format="pairs-9")), "store: format 'pairs-9'"),
    "an index without a format": (_store(written("index.json", "{}")), "store: format None"),
    "no shards": (_store(edited("index.json", shards=[])), "store: shards = [] in index.json"),
    "a word for the shards": (_store(edited("index.json", shards="all")), "store: shards = 'all' in index.json"),
    "a number for the digest": (_store(edited("index.json", digest=7)), "store: digest = 7 in index.json"),
    "a word for a truth value": (_store(edited("index.json", flip="no")), "store: flip = 'no' in index.json"),
    "a list for the counts": (_store(edited("index.json", counts=[1])), "store: counts = [1] in index.json"),
    "counts below nothing": (
        _store(edited("index.json", counts={"used": -1})),
        "store: counts.used = -1 in index.json",
    ),
    "other encoders": (_store(edited("index.json", encoders="0" * 64)), "store: encoded by another autoencoder"),
    "a shard above the folder": (_store(_moved("../pairs-00000.safetensors")), "shards.0.file = '../pairs-00000"),
    "a shard at the root": (_store(_moved("/elsewhere/pairs-00000.safetensors")), "shards.0.file = '/"),
    "a shard of another name": (_store(_moved("harm.safetensors")), "shards.0.file = 'harm.safetensors'"),
    "a shard twice": (
        _store(lambda store: edited("index.json", shards=[_shard_of(store)] * 2)(store)),
        "is there twice",
    ),
    "a shard too few": (_store(gone(SHARD)), f"{SHARD}: missing"),
    "half a shard": (_store(cut(SHARD, 3000)), f"{SHARD}: 3000 of "),
    "half a shard, as the index says": (_store(lambda s: [cut(SHARD, 3000)(s), _entry(bytes=3000)(s)]), "damaged"),
    "a head of 4 exbibytes": (_store(lambda s: [written(SHARD, head_of(2**62))(s), _entry(bytes=10)(s)]), "damaged"),
    "a pickle": (_store(lambda s: [disguised(SHARD)(s), _entry(bytes=(s / SHARD).stat().st_size)(s)]), "damaged"),
    "more pairs than there are": (_store(_entry(pairs=10**15)), "does not hold 1000000000000000 encoded pairs"),
    "losers too few": (_store(_true(_set("x_l", lambda x: x[:-1]))), "does not hold 24 encoded pairs"),
    "no losers": (_store(_true(lambda tensors: tensors.pop("x_l"))), "does not hold 24 encoded pairs"),
    "no captions": (_store(_true(lambda tensors: tensors.pop(CAPTIONS))), "does not hold 24 encoded pairs"),
    "whole numbers": (_store(_true(_set("x_w", lambda x: x.to(torch.int8)))), "does not hold 24 encoded pairs"),
    "fractions for captions": (_store(_true(_set("caption", torch.Tensor.float))), "does not hold 24 encoded pairs"),
    "a caption beyond the last": (_store(_true(_set("caption", lambda x: x + 10**6))), "a caption that is none"),
    "a caption before the first": (_store(_true(_set("caption", lambda x: x - 1))), "a caption that is none"),
    "flat latents": (_store(_true(_set("x_w", lambda x: x.flatten(1)))), "does not hold 24 encoded pairs"),
    "latents of other channels": (
        _store(_true(lambda t: [_set(name, lambda x: x[:, :3])(t) for name in ("x_w", "x_l")])),
        "its unet does not take what",
    ),
    "narrow embeddings": (_store(_true(_set(CAPTIONS, lambda x: x[..., :-1]))), "its unet does not take what"),
    "latents that are no numbers": (_store(_true(_set("x_w", _is_nan))), "x_w has values that are not finite"),
    "infinite embeddings": (_store(_true(_set(CAPTIONS, lambda x: x / 0))), "text has values that are not finite"),
    "a byte that is another": (_flipped, f"{SHARD}: is not what was written"),
    "other data's place": (_other, "out/train: holds pairs encoded from other data"),
}


def _shard_of(store: Path) -> dict[str, Any]:
    return json.loads((store / "index.json").read_text())["shards"][0]


def cases() -> list[Bad]:
    """All of them."""
    return [Bad(f"store: {name}", make, (says,)) for name, (make, says) in STORES.items()]
