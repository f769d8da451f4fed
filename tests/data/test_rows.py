import io
from collections import Counter
from pathlib import Path

import polars as pl
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from datasets import load_dataset
from PIL import Image

from tests.support.helpers import pair_rows
from workbench.common.errors import Failure, UserError
from workbench.data.rows import decode, kind_of, open_rows, read_prompts, report


def write(tmp_path, rows, name="pairs.parquet", **kwargs):
    pl.DataFrame(rows, **kwargs).write_parquet(tmp_path / name)
    return str(tmp_path / name)


def read(source, split="train"):
    return [row for chunk, _ in open_rows(source, split).chunks(3) for row in chunk]


def test_the_label_decides_which_image_is_the_winner():
    for row in pair_rows(4):
        images = [list(Image.open(io.BytesIO(row[c])).convert("RGB").tobytes()) for c in ("jpg_0", "jpg_1")]
        pair = decode(row, 32)
        winner = 0 if row["label_0"] == 1 else 1
        assert pair.w.flatten().tolist() == images[winner] and pair.l.flatten().tolist() == images[1 - winner]


def test_ties_unlabelled_and_invalid_rows_are_dropped_and_counted(tmp_path):
    rows = pair_rows(9)
    rows[0] |= {"label_0": 0.5, "label_1": 0.5}
    rows[1] |= {"has_label": False}
    rows[2] |= {"label_0": 1.0, "label_1": 1.0}
    rows[3] |= {"jpg_0": None}
    rows[4] |= {"label_0": None}
    rows[8] |= {"has_label": None}
    counts = Counter(kind_of(row) for row in read(write(tmp_path, rows)))
    assert counts == {"used": 3, "ties": 1, "unlabelled": 2, "invalid": 3}
    assert report(counts) == "9 rows: 3 used, 1 ties, 2 unlabelled, 3 invalid, 0 undecodable"


def test_labels_are_compared_as_numbers():
    row = pair_rows(1)[0]
    assert kind_of(row | {"label_0": 1, "label_1": 0}) == "used"
    assert kind_of(row | {"label_0": "1", "label_1": "0"}) == "invalid"
    assert kind_of(row | {"label_0": float("nan"), "label_1": 1.0}) == "invalid"


def test_missing_columns_are_named_before_anything_is_read(tmp_path):
    rows = [{k: v for k, v in row.items() if k not in ("label_1", "jpg_0")} for row in pair_rows(2)]
    with pytest.raises(UserError, match="no column jpg_0, label_1 "):
        open_rows(write(tmp_path, rows), "train")


def test_has_label_may_be_absent(tmp_path):
    rows = [{k: v for k, v in row.items() if k != "has_label"} for row in pair_rows(2)]
    assert [kind_of(row) for row in read(write(tmp_path, rows))] == ["used"] * 2


def test_a_folder_of_shards_is_read_in_order(tmp_path):
    rows = pair_rows(4)
    write(tmp_path, rows[:2], "0.parquet"), write(tmp_path, rows[2:], "1.parquet")
    assert [r["caption"] for r in read(str(tmp_path))] == [r["caption"] for r in rows]
    assert open_rows(str(tmp_path), "train").total == 4


def test_a_folder_in_the_hubs_layout_is_read_by_split(tmp_path):
    rows = pair_rows(6)
    write(tmp_path, rows[:3], "train-00000-of-00001.parquet")
    write(tmp_path, rows[3:5], "validation-00000-of-00001.parquet")
    write(tmp_path, rows[5:], "validation_unique-00000-of-00001.parquet")
    captions = lambda source, split: [r["caption"] for r in read(source, split)]  # noqa: E731
    assert captions(str(tmp_path), "train") == [r["caption"] for r in rows[:3]]
    assert captions(str(tmp_path), "validation") == [r["caption"] for r in rows[3:5]]
    assert captions(f"{tmp_path}:validation_unique", "validation") == [rows[5]["caption"]]
    with pytest.raises(UserError, match="no such parquet file"):
        open_rows(f"{tmp_path}:test", "validation")


def test_files_that_are_not_pairs_are_one_line(tmp_path):
    whole = write(tmp_path, pair_rows(3), "whole.parquet")
    (tmp_path / "cut.parquet").write_bytes(Path(whole).read_bytes()[:-100])
    (tmp_path / "x.parquet").write_bytes(b"PAR1 nonsense")
    for source, message in (
        (str(tmp_path / "x.parquet"), "x.parquet is not a whole parquet file"),
        (str(tmp_path), "cut.parquet is not a whole parquet file"),
        (str(tmp_path / "no"), "no such parquet file"),
    ):
        with pytest.raises(UserError, match=message) as error:
            open_rows(source, "train")
        assert "\n" not in str(error.value) and "data.train" in str(error.value)


def test_damage_inside_a_shard_is_one_line(tmp_path):
    path = write(tmp_path, pair_rows(30))
    data = bytearray(Path(path).read_bytes())
    data[100:3000] = bytes(2900)
    Path(path).write_bytes(data)
    with pytest.raises(UserError, match=r"data\.train = .*damaged"):
        read(path)


@pytest.mark.parametrize("error", [OSError("no route"), RuntimeError("Name or service not known")])
def test_a_hub_that_does_not_answer_is_one_line_that_says_what_works(monkeypatch, error):
    def unreachable(*arguments, **options):
        raise error

    monkeypatch.setattr("huggingface_hub.HfApi.dataset_info", unreachable)
    with pytest.raises(Failure, match=r"data\.train = 'someone/pairs': .*hub could not be reached.*local parquet"):
        open_rows("someone/pairs", "train")


def test_without_the_hub_what_it_last_said_finds_the_encoded_pairs(monkeypatch, tmp_path):
    from huggingface_hub.hf_api import DatasetInfo

    monkeypatch.setenv("WORKBENCH_CACHE", str(tmp_path))
    monkeypatch.setattr(
        "huggingface_hub.HfApi.dataset_info", lambda *a, **k: DatasetInfo(id="someone/pairs", sha="c0de")
    )
    local = load_dataset("parquet", data_files=write(tmp_path, pair_rows(3)), split="train", streaming=True)
    monkeypatch.setattr("datasets.load_dataset", lambda *a, **k: local)
    online = open_rows("someone/pairs:validation_unique", "validation")
    assert online.digest == "someone/pairs@c0de:validation_unique" and len(list(online.chunks(2))) == 2

    def unreachable(*arguments, **options):
        raise OSError("no route")

    monkeypatch.setattr("huggingface_hub.HfApi.dataset_info", unreachable)
    offline = open_rows("someone/pairs:validation_unique", "validation")
    assert offline.digest == online.digest
    with pytest.raises(Failure, match="hub could not be reached"):
        next(offline.chunks(2))


def test_images_are_fitted_to_a_square_and_the_crop_is_known():
    stream = io.BytesIO()
    Image.new("RGBA", (100, 50)).save(stream, "PNG")
    pair = decode(pair_rows(1)[0] | {"jpg_0": stream.getvalue()}, 32)
    assert pair.w.shape == pair.l.shape == (32, 32, 3)
    assert pair.size == (50, 100) and pair.corner == (0, 16)


def test_images_are_turned_upright():
    exif, flat, turned = Image.Exif(), io.BytesIO(), io.BytesIO()
    exif[0x0112] = 6  # the camera's right side is up: a viewer turns the picture clockwise
    image = Image.open(io.BytesIO(pair_rows(1)[0]["jpg_0"])).convert("RGB").crop((0, 0, 32, 20))
    image.save(turned, "PNG", exif=exif)
    image.transpose(Image.Transpose.ROTATE_270).save(flat, "PNG")
    upright, expected = (decode(pair_rows(1)[0] | {"jpg_0": s.getvalue()}, 16) for s in (turned, flat))
    assert upright.size == (32, 20) and (upright.l == expected.l).all() and (upright.w == expected.w).all()


def test_an_image_with_broken_exif_is_one():
    stream = io.BytesIO()
    Image.new("RGB", (32, 32)).save(stream, "JPEG", exif=b"Exif\0\0II*\0\xff\xff\xff\xff")
    assert decode(pair_rows(1)[0] | {"jpg_0": stream.getvalue()}, 16) is not None


IMAGE = pa.struct([("bytes", pa.binary()), ("path", pa.string())])


@pytest.mark.parametrize("streamed", [False, True])
@pytest.mark.parametrize(
    "other",
    [
        {"label_0": pa.array([0, 1]), "label_1": pa.array([1, 0], pa.uint8()), "has_label": pa.array([1, 1])},
        {"jpg_0": lambda column: pa.array([{"bytes": data, "path": None} for data in column], IMAGE)},
        {"caption": lambda column: pa.array(column).dictionary_encode()},
        {"caption": lambda text: pa.array(text, pa.large_string()), "jpg_1": lambda b: pa.array(b, pa.large_binary())},
    ],
    ids=["labels", "images", "a dictionary of captions", "large types"],
)  # fmt: skip
def test_files_of_differing_types_are_one_data_set(tmp_path, other, streamed):
    plain = {name: [row[name] for row in pair_rows(2)] for name in pair_rows(1)[0]}
    changed = {name: value(plain[name]) if callable(value) else value for name, value in other.items()}
    pq.write_table(pa.table(plain | changed), tmp_path / "0.parquet")
    pq.write_table(pa.table(plain), tmp_path / "1.parquet")
    rows = open_rows(str(tmp_path), "train")
    found = [row for chunk, _ in (rows.stream() if streamed else rows).chunks(3) for row in chunk]
    pairs = [decode(row, 32) for row in found]
    assert [kind_of(row) for row in found] == ["used"] * 4
    assert all((pairs[i].w == pairs[i + 2].w).all() and pairs[i].caption == pairs[i + 2].caption for i in (0, 1))


def test_a_column_that_cannot_be_one_is_refused_before_anything_is_read(tmp_path):
    rows = pair_rows(2)
    write(tmp_path, rows, "0.parquet"), write(tmp_path, [row | {"label_0": "1"} for row in rows], "1.parquet")
    with pytest.raises(UserError, match=r"label_0 holds double in .*0\.parquet and .*string in .*1\.parquet; write"):
        open_rows(str(tmp_path), "train")


def test_a_file_that_must_not_be_read_is_not_called_damaged(tmp_path, monkeypatch):
    path = write(tmp_path, pair_rows(1))
    monkeypatch.setattr("os.access", lambda *_: False)  # root may read everything
    with pytest.raises(UserError, match=r"pairs\.parquet is not readable \(Permission denied\)"):
        open_rows(path, "train")


def test_an_image_that_cannot_be_decoded_is_no_pair():
    row = pair_rows(1)[0]
    assert decode(row | {"jpg_1": row["jpg_1"][:40]}, 32) is None
    assert decode(row | {"jpg_0": b"text"}, 32) is None


def test_prompts_are_lines(tmp_path):
    (tmp_path / "p.txt").write_text("one\n\n two \n")
    assert read_prompts(str(tmp_path / "p.txt")) == ["one", "two"]
    (tmp_path / "latin.txt").write_bytes("a café".encode("latin-1"))
    with pytest.raises(UserError, match="not a text file in UTF-8"):
        read_prompts(str(tmp_path / "latin.txt"))
    with pytest.raises(UserError, match="no such file"):
        read_prompts(str(tmp_path / "q.txt"))
