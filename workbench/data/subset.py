"""A random part of the rows of parquet files, chosen before any image is read."""

from dataclasses import replace

import numpy as np

from workbench.common import cache
from workbench.common.errors import UserError
from workbench.data.columns import score_columns
from workbench.data.parquet import open_parquet
from workbench.data.rows import ParquetRows, Rows, kind_of


def drawn(rows: Rows, limit: int, seed: int, scores: str = "") -> Rows:
    """At most `limit` of the rows that count, drawn without replacement, in the order of the files.

    Whether a row counts is read from its labels, without its images; of images that turn out to be damaged, none is
    drawn in place.

    Args:
        limit: > 0.
        scores: as `open_rows` takes it.
    Raises:
        UserError: the rows are those of a data set on the hub, which cannot be read without its images.
    """
    if not isinstance(rows, ParquetRows):
        raise UserError(
            f"data.limit_seed = {seed}: {rows.key} would have to be read whole for it; give local parquet files, or "
            "leave it at 0 for the first pairs"
        )
    counted = np.flatnonzero([kind_of(row, scores) == "used" for row in _labels(rows, scores)])
    size = min(limit, len(counted))
    chosen = np.sort(np.random.default_rng(seed).choice(counted, size, replace=False))
    key = cache.digest(rows.digest, "drawn", limit, seed)
    return replace(rows, digest=key, total=size, chosen=tuple(chosen.tolist()))


def _labels(rows: ParquetRows, scores: str):
    """Every row without its caption and images, in place of which stand values that `kind_of` takes for good ones."""
    layout = rows.layout
    labels = [layout.columns[column] for column in ("label_0", "label_1") if column in layout.columns]
    names = [*labels, *(name for name in rows.schema.names if name == "has_label")]
    for path in rows.files:
        with open_parquet(path, rows.key) as file:
            # Of pairs without labels every row counts; a column must be read all the same, to know how many there are.
            for batch in file.iter_batches(columns=[*names, *score_columns(scores)] or [layout.columns["caption"]]):
                for row in batch.to_pylist():
                    yield layout.row(row) | {"caption": "", "jpg_0": b"-", "jpg_1": b"-"}
