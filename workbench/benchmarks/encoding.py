"""The share of encoding that is spent neither in the autoencoder nor in the text encoders."""

import io
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import polars as pl
import torch
from PIL import Image

from workbench import models
from workbench.benchmarks.figure import Figure, Options, figure
from workbench.benchmarks.sandbox import sandbox, temporary_folder
from workbench.benchmarks.stopwatch import stopwatch
from workbench.benchmarks.timing import seconds
from workbench.data.encoding import encode as encode_pairs
from workbench.data.encoding import encoders
from workbench.data.rows import open_rows
from workbench.models import ASSETS, Backend, fetch
from workbench.models.random_weights import VAE


def encode(options: Options, pairs: int = 2000, large: int = 2) -> Iterator[Figure]:
    """The share of encoding outside of the networks, for the small model and for an autoencoder of SD1.5's size.

    Args:
        pairs: of the small model's images; most of those that come with the workbench.
        large: pairs of 768 pixels for the large autoencoder, whose weights are random; 0 = none.
    """
    what = "time outside of autoencoder and text encoder"
    with temporary_folder(options.folder) as folder, sandbox(folder):
        backend = models.load("embedded", options.device)
        file = pairs_file(folder / "small.parquet", pairs)
        encode_once(backend, file)  # the first encoding loads models and warms them up
        shares = encoding_shares(backend, file, max(5, options.repeats // 3))
        note = f"{pairs} pairs of 64 px; captions are encoded by one thread, the others count as outside meanwhile"
        yield figure("encode", f"encoding for the small model, {what}", shares, 10.0, unit="%", note=note)
        if large:
            file = pairs_file(folder / "large.parquet", large, edge=768)
            backend = with_large_autoencoder(folder / "model", options.device)
            shares = encoding_shares(backend, file, 1)
            note = f"{large} pairs of 768 px, random weights"
            yield figure("encode", f"encoding at 512 px, {what}", shares, 10.0, unit="%", note=note)


def encoding_shares(backend: Backend, file: Path, repeats: int) -> list[float]:
    """The share of the encoding threads' time outside of the networks, in %, of encodings of a file's pairs.

    Where several threads encode images, only the main thread encodes captions: what the others idle is outside too.
    """
    shares = []
    for _ in range(repeats):
        with stopwatch(backend, "encode_images", "encode_text") as spent:
            took = seconds(lambda: encode_once(backend, file), backend.device)
        shares.append(100 * (1 - sum(spent.values()) / (took * encoders(backend))))
    return shares


def encode_once(backend: Backend, file: Path) -> None:
    """Encode a parquet file's pairs as the command does, into a folder that is removed afterwards."""
    with TemporaryDirectory(dir=file.parent) as name:
        encode_pairs(open_rows(str(file), "train"), backend, into=Path(name) / "store")


def pairs_file(path: Path, pairs: int, edge: int = 0) -> Path:
    """Write some of the pairs that come with the workbench, as parquet.

    Args:
        edge: of the images, which are then JPEG, in pixels; 0 = as they are.
    """
    frame = pl.read_parquet(ASSETS / "pairs" / "train.parquet")
    # Ties are not encoded, and would only be read past.
    frame = frame.filter(pl.col("label_0") != 0.5).head(pairs)
    if edge:
        frame = frame.with_columns(pl.col("jpg_0", "jpg_1").map_elements(partial(_enlarged, edge), pl.Binary))
    frame.write_parquet(path)
    return path


def _enlarged(edge: int, data: bytes) -> bytes:
    stream = io.BytesIO()
    Image.open(io.BytesIO(data)).convert("RGB").resize((edge, edge)).save(stream, "JPEG", quality=95)
    return stream.getvalue()


def with_large_autoencoder(folder: Path, device: torch.device) -> Backend:
    """The small model with an untrained autoencoder of SD1.x's shape, 512 px; written to a folder."""
    from diffusers import AutoencoderKL

    small = fetch("embedded")
    small.copy_parts(folder, without="vae")
    blocks = len(VAE["block_out_channels"])
    shape: dict[str, Any] = {
        "down_block_types": ["DownEncoderBlock2D"] * blocks,
        "up_block_types": ["UpDecoderBlock2D"] * blocks,
        "layers_per_block": 2,
        "latent_channels": small.number("vae", "latent_channels", 4, 1, 1024),  # those that the small denoiser takes
    }
    autoencoder: Any = AutoencoderKL(**VAE, **shape)
    autoencoder.save_pretrained(folder / "vae")
    return models.load(str(folder), device, resolution=512)
