"""Preference pairs, images and prompts that are not what they should be."""

import io
import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
import pyarrow as pa
import pyarrow.parquet as pq
from PIL import Image

from tests.support.bad_inputs import Bad, Place
from tests.support.helpers import pair_rows, picture

IMAGE = pa.struct([("bytes", pa.binary()), ("path", pa.string())])
SVG = b'<svg xmlns="http://www.w3.org/2000/svg" width="8" height="8"><rect width="8" height="8"/></svg>'


def _encode(place: Place, source: str = "x.parquet") -> list[str]:
    return ["encode", "--split", "train", "--output", "out", *place.given(data_train=source)]


# --- files ---------------------------------------------------------------------------------------------------------


def _bytes(change: Callable[[bytes], bytes]) -> Callable[[Place], list[str]]:
    """Pairs whose file's bytes were changed."""

    def make(place: Place) -> list[str]:
        whole = Path(place.settings["data.train"]).read_bytes()
        (place.folder / "x.parquet").write_bytes(change(whole))
        return _encode(place)

    return make


def _rows(change: Callable[[dict[str, Any]], dict[str, Any]], count: int = 8, **options: Any):
    """Pairs each of whose rows was changed."""

    def make(place: Place) -> list[str]:
        rows = [change(row) for row in pair_rows(count)]
        pl.DataFrame(rows, **options).write_parquet(place.folder / "x.parquet")
        return _encode(place)

    return make


def _columns(about: dict[str, str | bytes] | None = None, **columns: Any):
    """Pairs some of whose columns are others, with what the file says of itself."""

    def make(place: Place) -> list[str]:
        plain = {name: [row[name] for row in pair_rows(4)] for name in pair_rows(1)[0]}
        table = pa.table(plain | {name: value(place) if callable(value) else value for name, value in columns.items()})
        pq.write_table(table.replace_schema_metadata(about), place.folder / "x.parquet")
        return _encode(place)

    return make


def _paths(path: str):
    """Images that are not in the file, but somewhere else."""

    def make(place: Place) -> Any:
        (place.folder / "secret.png").write_bytes(picture(np.random.default_rng(0)))
        named = path.format(folder=place.folder)
        return pa.array([{"bytes": None, "path": named}] * 4, IMAGE)

    return make


def _features(**kinds: str) -> dict[str, str]:
    """What datasets writes into a file of its features."""
    every = {"caption": "Value", "jpg_0": "Image", "jpg_1": "Image", "label_0": "Value", "label_1": "Value"} | kinds
    dtypes = {"caption": "string", "label_0": "float64", "label_1": "float64"}
    features = {n: {"_type": kind} | ({"dtype": dtypes[n]} if kind == "Value" else {}) for n, kind in every.items()}
    return {"huggingface": json.dumps({"info": {"features": features}})}


def _twice(place: Place) -> list[str]:
    table = pa.table({name: [row[name] for row in pair_rows(4)] for name in pair_rows(1)[0]})
    pq.write_table(table.append_column("jpg_0", table["jpg_1"]), place.folder / "x.parquet")
    return _encode(place)


def _folder(name: str):
    def make(place: Place) -> list[str]:
        (place.folder / name).mkdir()
        return _encode(place, name)

    return make


def _linked(target: str):
    def make(place: Place) -> list[str]:
        (place.folder / "x.parquet").symlink_to(target)
        return _encode(place)

    return make


def _mixed(place: Place) -> list[str]:
    (place.folder / "pairs").mkdir()
    for i, rows in enumerate(
        [pair_rows(2), [{k: v for k, v in row.items() if k != "has_label"} for row in pair_rows(2)]]
    ):
        pl.DataFrame(rows).write_parquet(place.folder / "pairs" / f"{i}.parquet")
    return _encode(place, "pairs")


def _kinds(**columns: Any):
    """Two files of pairs, whose columns differ in type."""

    def make(place: Place) -> list[str]:
        _columns(**columns)(place)
        (place.folder / "pairs").mkdir()
        (place.folder / "x.parquet").rename(place.folder / "pairs" / "0.parquet")
        pl.DataFrame(pair_rows(4)).write_parquet(place.folder / "pairs" / "1.parquet")
        return _encode(place, "pairs")

    return make


def _not_empty(place: Place) -> list[str]:
    """A folder with somebody's files in it, and data of which nothing can be written there."""
    (place.folder / "out" / "train").mkdir(parents=True)
    (place.folder / "out" / "train" / "thesis.txt").write_text("years of work")
    return _rows(lambda row: row | {"label_0": 0.5, "label_1": 0.5})(place)


WHOLE = "is not a whole parquet file"
NONE = "no usable row (4 rows: 0 used, 0 ties, 0 unlabelled, 4 invalid, 0 undecodable)"
UNDECODABLE = "no usable row (4 rows: 0 used, 0 ties, 0 unlabelled, 0 invalid, 4 undecodable)"
PARQUET: dict[str, tuple[Callable[[Place], list[str]], str]] = {
    "nothing in it": (_bytes(lambda whole: b""), WHOLE),
    "one byte": (_bytes(lambda whole: b"P"), WHOLE),
    "its end cut off": (_bytes(lambda whole: whole[:-100]), WHOLE),
    "its beginning cut off": (_bytes(lambda whole: whole[100:]), "damaged"),
    "only its ends": (_bytes(lambda whole: b"PAR1PAR1"), WHOLE),
    "other magic": (_bytes(lambda whole: whole[:-4] + b"PARX"), WHOLE),
    "a footer of 4 GB": (_bytes(lambda whole: whole[:-8] + b"\xff\xff\xff\xff" + b"PAR1"), WHOLE),
    "a footer of nothing": (_bytes(lambda whole: whole[:-8] + bytes(4) + b"PAR1"), WHOLE),
    "a footer of zeros": (_bytes(lambda whole: whole[:-208] + bytes(200) + whole[-8:]), WHOLE),
    "zeros in its middle": (_bytes(lambda whole: whole[:100] + bytes(3000) + whole[3100:]), "damaged"),
    "a table of text": (_bytes(lambda whole: b"caption,jpg_0\na,b\n"), WHOLE),
    "a folder of its name": (_folder("x.parquet"), "no such parquet file"),
    "an empty folder": (_folder("pairs"), "no such parquet file"),
    "a link to itself": (_linked("x.parquet"), "data.train = 'x.parquet'"),
    "a link to nothing": (_linked("../../nothing"), "data.train = 'x.parquet'"),
    "a link to endless bytes": (_linked("/dev/zero"), "data.train = 'x.parquet'"),
    "no rows": (_rows(lambda row: row, 0, schema=pl.DataFrame(pair_rows(1)).schema), "no usable row (0 rows"),
    "no column of images": (_rows(lambda row: {k: v for k, v in row.items() if k != "jpg_1"}), "no column jpg_1"),
    "no column of labels": (
        _rows(lambda row: {k: v for k, v in row.items() if "label_" not in k}),
        "no column label_0, label_1",
    ),
    "other columns": (_rows(lambda row: {"a": 1}), "no column caption, jpg_0, jpg_1, label_0, label_1"),
    "a column twice": (_twice, "jpg_0 is there twice"),
    "has_label in some files": (_mixed, "has_label is a column of some of its files"),
    "words and numbers for labels": (_kinds(label_0=pa.array(["1"] * 4)), "label_0 holds string in "),
    "bytes and texts for captions": (_kinds(caption=pa.array([b"a"] * 4)), "caption holds binary in "),
    "lists and numbers for labels": (_kinds(label_1=pa.array([[1.0]] * 4)), "label_1 holds list<"),
    "all ties": (_rows(lambda row: row | {"label_0": 0.5, "label_1": 0.5}), "0 used, 8 ties"),
    "all ties, somebody's folder": (_not_empty, "0 used, 8 ties"),
    "no labels": (_rows(lambda row: row | {"has_label": False}), "0 used, 0 ties, 8 unlabelled"),
    "words for has_label": (_rows(lambda row: row | {"has_label": "false"}), "0 used, 0 ties, 8 unlabelled"),
    "labels that are no numbers": (_rows(lambda row: row | {"label_0": float("nan")}), "8 invalid"),
    "labels beyond 1": (_rows(lambda row: row | {"label_0": 7.0}), "8 invalid"),
    "words for labels": (_rows(lambda row: row | {"label_0": "1", "label_1": "0"}), "8 invalid"),
    "lists for labels": (_rows(lambda row: row | {"label_0": [1.0]}), "8 invalid"),
    "numbers for images": (_rows(lambda row: row | {"jpg_0": 7}), "8 undecodable"),
    "text for images": (_rows(lambda row: row | {"jpg_0": "secret.png"}), "jpg_0 holds text and no images"),
    "no images": (_rows(lambda row: row | {"jpg_0": None, "jpg_1": None}), "8 invalid"),
    "lists for captions": (_rows(lambda row: row | {"caption": ["a", "b"]}), "8 invalid"),
    "bytes for captions": (_columns(caption=pa.array([b"\xff"] * 4)), NONE),
    "no captions": (_rows(lambda row: row | {"caption": None}), "8 invalid"),
    "decimals for labels": (_columns(label_0=pa.array([1, 0, 1, 0]).cast(pa.decimal128(38, 2))), "no usable row"),
    "times for captions": (_columns(caption=pa.array([1] * 4, pa.duration("s"))), "no usable row"),
    "images in other files": (_columns(jpg_0=_paths("{folder}/secret.png")), UNDECODABLE),
    "images in other files, said to be images": (
        _columns(_features(), jpg_0=_paths("{folder}/secret.png")),
        UNDECODABLE,
    ),
    "images above the folder": (_columns(_features(), jpg_0=_paths("../work/secret.png")), UNDECODABLE),
    "images of the system": (_columns(_features(), jpg_0=_paths("/etc/passwd")), UNDECODABLE),
    "images on the network": (_columns(_features(), jpg_0=_paths("http://127.0.0.1:9/a.png")), UNDECODABLE),
    "images in an archive": (_columns(_features(), jpg_0=_paths("zip://a.png::/etc/passwd")), UNDECODABLE),
    "features that are none": (_columns(_features(caption="os.system"), label_0=pa.array([2.0] * 4)), NONE),
    "features of PDFs": (_columns(_features(jpg_0="Pdf"), label_0=pa.array([2.0] * 4)), NONE),
    "features that are no JSON": (_columns({"huggingface": b"\xff{"}, label_0=pa.array([2.0] * 4)), NONE),
}

# --- images --------------------------------------------------------------------------------------------------------


def saved(image: Image.Image, kind: str, **options: Any) -> bytes:
    """An image file's bytes."""
    stream = io.BytesIO()
    image.save(stream, kind, **options)
    return stream.getvalue()


def _declared(width: int, height: int) -> bytes:
    """A PNG whose head says that it has this size."""
    import struct
    import zlib

    head = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    chunk = lambda name, data: struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data))  # noqa: E731
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", head) + chunk(b"IDAT", zlib.compress(bytes(100))) + chunk(b"IEND", b"")


def _noise(mode: str = "RGB", size: tuple[int, int] = (40, 30)) -> Image.Image:
    pixels = np.random.default_rng(0).integers(0, 256, (size[1], size[0], 3), dtype=np.uint8)
    return Image.fromarray(pixels).convert(mode)


def _sixteen_bits() -> bytes:
    return saved(Image.fromarray(np.linspace(0, 65535, 1200).astype(np.uint16).reshape(30, 40)), "PNG")


def _palette() -> bytes:
    return saved(_noise("P"), "PNG", transparency=bytes(range(256)))


#: Not images, or not whole.
BROKEN: dict[str, Callable[[], bytes]] = {
    "text": lambda: b"not an image",
    "HTML": lambda: b"<!doctype html><img src='file:///etc/passwd'>",
    "SVG": lambda: SVG,
    "a PNG's head": lambda: saved(_noise(), "PNG")[:40],
    "half a PNG": lambda: saved(_noise(), "PNG")[:1500],
    "half a JPEG": lambda: saved(_noise(size=(200, 200)), "JPEG")[:5000],
    "half a WebP": lambda: saved(_noise(size=(200, 200)), "WEBP")[:2000],
    "a PNG of 60,000 x 60,000": lambda: _declared(60_000, 60_000),
    "a PNG of 2 billion pixels a side": lambda: _declared(2**31 - 1, 2**31 - 1),
    "a PNG of no pixels": lambda: _declared(0, 0),
    "a strip of 1 x 20,000": lambda: saved(_noise(size=(1, 20_000)), "PNG"),
    "fractions for pixels": lambda: saved(_noise("F"), "TIFF"),
    "a script for Ghostscript": lambda: (
        b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n%%EndComments\nquit\n%%EOF\n"
    ),
}
#: Rare, and still images.
ODD: dict[str, Callable[[], bytes]] = {
    "one pixel": lambda: saved(_noise(size=(1, 1)), "PNG"),
    "grey": lambda: saved(_noise("L"), "PNG"),
    "black and white": lambda: saved(_noise("1"), "PNG"),
    "16 bits": _sixteen_bits,
    "transparent": lambda: saved(_noise("RGBA"), "PNG"),
    "a transparent palette": _palette,
    "CMYK": lambda: saved(_noise("CMYK"), "JPEG"),
    "an animation": lambda: saved(_noise("P"), "GIF", save_all=True, append_images=[_noise("P")] * 3),
    "WebP": lambda: saved(_noise(), "WEBP"),
    "BMP": lambda: saved(_noise(), "BMP"),
    "bytes after its end": lambda: saved(_noise(), "JPEG") + b"\0" * 1000,
}

# --- prompts -------------------------------------------------------------------------------------------------------


def _prompts(content: bytes | None, name: str = "p.txt"):
    """A file of prompts for training; None = a folder."""

    def make(place: Place) -> list[str]:
        _put(place.folder / name, content)
        return ["train", *place.given(data_prompts=name)]

    return make


def _put(path: Path, content: bytes | None) -> None:
    if content is None:
        path.mkdir()
    else:
        path.write_bytes(content)


def _set(name: str, content: bytes | None):
    """A prompt set for an evaluation."""

    def make(place: Place) -> list[str]:
        _put(place.folder / name, content)
        model = place.settings["model.path"]
        return ["evaluate", "--model", f"a={model}", "--prompts", name, "--output", "out"]

    return make


def _pipe(command: str, key: str = "") -> Callable[[Place], list[str]]:
    """A named pipe in the place of prompts, which whoever opens it waits for."""

    def make(place: Place) -> list[str]:
        os.mkfifo(place.folder / "p.txt")
        if key:
            return [command, *place.given(**{key: "p.txt"})]
        model = place.settings["model.path"]
        return [command, "--model", f"a={model}", "--prompts", "p.txt", "--output", "out"]

    return make


def _frame(**columns: list) -> bytes:
    stream = io.BytesIO()
    pl.DataFrame(columns).write_parquet(stream)
    return stream.getvalue()


PROMPTS: dict[str, tuple[Callable[[Place], list[str]], str]] = {
    "binary": (_prompts(bytes(range(256))), "data.prompts = 'p.txt': not a text file"),
    "empty": (_prompts(b""), "data.prompts = 'p.txt': no prompt in it"),
    "blank": (_prompts(b"\n \n\t\n"), "data.prompts = 'p.txt': no prompt in it"),
    "a folder": (_prompts(None), "data.prompts = 'p.txt': no such file"),
    "not of the grammar": (_prompts(b"a \x1b[2Jfox\n"), "the ground-truth reward cannot judge this prompt"),
    "one of a million letters": (_prompts(b"x" * 10**6), "the ground-truth reward cannot judge this prompt"),
    "a pipe": (_pipe("train", "data_prompts"), "data.prompts = 'p.txt': no such file"),
    "set: a pipe": (_pipe("evaluate"), "--prompts p.txt: p.txt is a named pipe, not a file"),
    "set: a folder by a text's name": (_set("p.txt", None), "--prompts p.txt: neither"),
    "set: binary": (_set("p.txt", bytes(range(128, 256))), "--prompts p.txt: not a text file in UTF-8"),
    "set: empty": (_set("p.txt", b""), "--prompts p.txt: no prompt in it"),
    "set: an unknown ending": (_set("p.exe", b"MZ"), "--prompts p.exe: unknown ending"),
    "set: an empty folder": (_set("p", None), "--prompts p: neither"),
    "set: half a JSON": (_set("p.json", b'["a", '), "--prompts p.json: cannot be read"),
    "set: an object": (_set("p.json", b'{"a": 1}'), "--prompts p.json: p.json is not a list of prompts"),
    "set: a list of numbers": (_set("p.json", b"[1, 2]"), "--prompts p.json: p.json is not a list of prompts"),
    "set: lists in lists": (_set("p.json", b"[" * 100_000), "--prompts p.json: cannot be read"),
    "set: a table without columns": (_set("p.tsv", b"a\tb\n1\t2\n"), "--prompts p.tsv: no column Prompt, Category"),
    "set: a table without end": (_set("p.tsv", b"\0" * 1000), "--prompts p.tsv: "),
    "set: a table of nothing": (_set("p.tsv", b""), "--prompts p.tsv: cannot be read"),
    "set: half a parquet": (_set("p.parquet", _frame(caption=["a"])[:-20]), f"--prompts p.parquet: p.parquet {WHOLE}"),
    "set: no captions": (_set("p.parquet", _frame(text=["a"])), "--prompts p.parquet: no column 'caption'"),
    "set: numbers for captions": (_set("p.parquet", _frame(caption=[1, 2])), "--prompts p.parquet: "),
    "set: lists for captions": (_set("p.parquet", _frame(caption=[["a"], ["b"]])), "--prompts p.parquet: "),
}


def cases() -> list[Bad]:
    """All of them."""
    found = [Bad(f"parquet: {name}", make, ("data.train", says)) for name, (make, says) in PARQUET.items()]
    found += [
        Bad(f"image: {name}", _rows(lambda row, image=image: row | {"jpg_1": image()}), ("data.train", "8 undecodable"))
        for name, image in BROKEN.items()
    ]
    return found + [Bad(f"prompts: {name}", make, (says,)) for name, (make, says) in PROMPTS.items()]
