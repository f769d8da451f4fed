"""Labelled pairs as files: parquet in Pick-a-Pic v2's columns with the scores beside them, and a sheet to look at."""

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from numpy.typing import NDArray
from PIL import Image, ImageDraw, ImageFont

from workbench.common.contact_sheet import evenly_spread
from workbench.common.outputs import output_file
from workbench.common.progress import Progress
from workbench.evaluation.drawing import Drawn
from workbench.evaluation.pairing import Preference
from workbench.evaluation.sample_store import decoded

#: Pick-a-Pic v2's columns.
COLUMNS: dict[str, pa.DataType] = {
    "are_different": pa.bool_(),
    "best_image_uid": pa.string(),
    "caption": pa.string(),
    "created_at": pa.timestamp("us"),
    "has_label": pa.bool_(),
    "image_0_uid": pa.string(),
    "image_1_uid": pa.string(),
    "image_0_url": pa.string(),
    "image_1_url": pa.string(),
    "jpg_0": pa.binary(),
    "jpg_1": pa.binary(),
    "label_0": pa.float64(),
    "label_1": pa.float64(),
    "model_0": pa.string(),
    "model_1": pa.string(),
    "ranking_id": pa.int64(),
    "user_id": pa.int64(),
    "num_example_per_prompt": pa.int64(),
}
#: Bytes of images in a row group: parquet stores an image of two rows once only where a group's fit one dictionary.
GROUP = 2**25
THUMB, LINE = 128, 14  #: of the sheet: edge of an image and height of a line of text, pixels


def write(path: Path, made: Sequence[Preference], drawn: Drawn, scores: Mapping[str, NDArray[np.float64]]) -> None:
    """Write pairs as parquet.

    Args:
        scores: what becomes the columns NAME_0 and NAME_1, over all images, (N,).
    Raises:
        UserError: somebody else's file has this name.
    """
    extra = {f"{name}_{side}": pa.float32() for side in (0, 1) for name in scores}
    schema = pa.schema(list((COLUMNS | extra).items()))
    rows: list[dict[str, Any]] = []
    size = 0
    with (
        output_file(path) as partial,
        pq.ParquetWriter(
            partial, schema, compression="zstd", dictionary_pagesize_limit=GROUP, write_statistics=False
        ) as writer,
        Progress(total=len(made), desc=path.name, unit="pair") as bar,
    ):
        for row in _rows(made, drawn, scores):
            bar.update()
            rows.append(row)
            size += len(row["jpg_0"]) + len(row["jpg_1"])
            if size > GROUP:
                writer.write_table(pa.Table.from_pylist(rows, schema))
                rows, size = [], 0
        if rows:
            writer.write_table(pa.Table.from_pylist(rows, schema))


def _rows(
    made: Sequence[Preference], drawn: Drawn, scores: Mapping[str, NDArray[np.float64]]
) -> Iterator[dict[str, Any]]:
    counts = Counter(drawn.drawings[one.first].caption for one in made)
    for number, (i, j, label) in enumerate(made):
        caption = drawn.drawings[i].caption
        row: dict[str, Any] = {
            "are_different": True,
            "best_image_uid": "tie" if label == 0.5 else drawn.uids[i if label == 1 else j],
            "caption": caption,
            "created_at": None,
            "has_label": True,
            "image_0_uid": drawn.uids[i],
            "image_1_uid": drawn.uids[j],
            "image_0_url": "",
            "image_1_url": "",
            "jpg_0": drawn.image(i),
            "jpg_1": drawn.image(j),
            "label_0": label,
            "label_1": 1.0 - label,
            "model_0": drawn.drawings[i].how,
            "model_1": drawn.drawings[j].how,
            "ranking_id": number,
            "user_id": 0,
            "num_example_per_prompt": counts[caption],
        }
        for side, image in ((0, i), (1, j)):
            row |= {f"{name}_{side}": float(values[image]) for name, values in scores.items()}
        yield row


def write_sheet(path: Path, made: Sequence[Preference], drawn: Drawn, total: NDArray[np.float64], pairs: int) -> None:
    """Draw some pairs as one picture: the preferred image left, the other right, prompt and both scores below.

    Args:
        made: at least one pair; ties are not shown unless there is nothing else.
        total: the score of each image, (N,).
        pairs: how many, spread evenly over the file.
    Raises:
        UserError: somebody else's file has this name.
    """
    shown = [one for one in made if one.label != 0.5] or list(made)
    chosen = [shown[place] for place in evenly_spread(len(shown), pairs)]
    across, width, height = min(4, len(chosen)), 2 * THUMB + 12, THUMB + 2 * LINE + 8
    sheet = Image.new("RGB", (across * width, -(-len(chosen) // across) * height), "white")
    brush, font = ImageDraw.Draw(sheet), ImageFont.load_default(LINE - 3)
    for place, (i, j, label) in enumerate(chosen):
        left, top = place % across * width, place // across * height
        best, other = (i, j) if label >= 0.5 else (j, i)
        for x, image in ((left, best), (left + THUMB + 2, other)):
            picture = Image.fromarray(decoded(drawn.image(image)))
            sheet.paste(picture.resize((THUMB, THUMB), Image.Resampling.LANCZOS), (x, top))
        caption = drawn.drawings[i].caption
        while brush.textlength(caption, font) > width - 12:
            caption = f"{caption[:-6]}..."
        signs = ">" if label != 0.5 else "="
        for line, text in enumerate((caption, f"{total[best]:.3f} {signs} {total[other]:.3f}")):
            brush.text((left, top + THUMB + 1 + line * LINE), text, "black", font)
    with output_file(path) as partial:
        sheet.save(partial, "PNG", optimize=True)
