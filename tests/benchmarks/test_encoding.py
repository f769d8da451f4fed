"""The encoding's benchmark: that what is timed is the encoding."""

import torch

from workbench import models
from workbench.benchmarks import encoding
from workbench.benchmarks.stopwatch import stopwatch
from workbench.data.encoding import encode
from workbench.data.rows import open_rows


def test_the_timed_encoding_is_the_encoding(tiny_model, tmp_path):
    backend, file = (
        models.load(str(tiny_model), torch.device("cpu")),
        encoding.pairs_file(tmp_path / "pairs.parquet", 12),
    )
    shares = encoding.encoding_shares(backend, file, 2)
    assert len(shares) == 2 and all(0 < share < 100 for share in shares)
    plain = encode(open_rows(str(file), "train"), backend, into=tmp_path / "plain")
    with stopwatch(backend, "encode_images", "encode_text"):
        counted = encode(open_rows(str(file), "train"), backend, into=tmp_path / "timed")
    assert len(plain) == 12 and plain.digest == counted.digest
    for name, tensor in plain.shards[0].items():
        assert torch.equal(tensor, counted.shards[0][name])


def test_large_pairs_are_large(tmp_path):
    rows = open_rows(str(encoding.pairs_file(tmp_path / "pairs.parquet", 1, edge=96)), "train")
    (row,) = next(rows.chunks(4))[0]
    assert row["jpg_0"][:3] == b"\xff\xd8\xff" and len(row["jpg_1"]) > 1000
