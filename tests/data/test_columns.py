"""Pairs whose columns are called otherwise: each style as parquet, on a hub, drawn at random, streamed; mistakes."""

import io
import json
from pathlib import Path

import datasets
import numpy as np
import polars as pl
import pytest
from huggingface_hub.hf_api import DatasetInfo
from PIL import Image

from tests.support.helpers import pair_rows, picture
from workbench.common.errors import UserError
from workbench.data.columns import COLUMNS, NAMES, Names
from workbench.data.listed import open_source
from workbench.data.rows import decode, kind_of
from workbench.data.subset import drawn

PAIRS = pair_rows(6)  # labels alternate
CHOSEN = Names(caption="prompt")
#: Pick-a-Pic's columns under other names.
OTHER = Names("text", jpg_0="image_a", jpg_1="image_b", label_0="a_wins", label_1="b_wins")


def chosen_rows() -> list[dict]:
    """The same pairs with a column of winners and one of losers."""
    order = [(row["jpg_0"], row["jpg_1"]) if row["label_0"] == 1 else (row["jpg_1"], row["jpg_0"]) for row in PAIRS]
    return [
        {"prompt": row["caption"], "chosen": winner, "rejected": loser, "chosen_model": "a"}
        for row, (winner, loser) in zip(PAIRS, order, strict=True)
    ]


def renamed_rows() -> list[dict]:
    called = {"caption": "text", "jpg_0": "image_a", "jpg_1": "image_b", "label_0": "a_wins", "label_1": "b_wins"}
    return [{called.get(name, name): value for name, value in row.items()} for row in PAIRS]


def read(rows) -> list[dict]:
    return [row for chunk, _ in rows.chunks(4) for row in chunk]


def same_pairs(found: list[dict]) -> bool:
    """Whether rows have the captions, winners and losers of PAIRS."""
    pairs = zip(PAIRS, found, strict=True)
    return all(
        kind_of(there) == "used"
        and there["caption"] == row["caption"]
        and np.array_equal(decode(there, 32)[1], decode(row, 32)[1])
        and np.array_equal(decode(there, 32)[2], decode(row, 32)[2])
        for row, there in pairs
    )


@pytest.mark.parametrize(
    ("rows", "names"),
    [(PAIRS, NAMES), (renamed_rows(), OTHER), (chosen_rows(), CHOSEN)],
    ids=["plain", "named", "chosen"],
)
def test_each_style_is_read_drawn_from_and_streamed_alike(tmp_path, rows, names):
    pl.DataFrame(rows).write_parquet(tmp_path / "p.parquet")
    found = open_source(str(tmp_path), "train", names=names)
    assert same_pairs(read(found)) and found.total == 6
    assert {*COLUMNS} <= {*read(found)[0]}
    part = drawn(found, 3, seed=1)
    assert part.total == 3 and [kind_of(row) for row in read(part)] == ["used"] * 3
    assert same_pairs(read(found.stream()))


def test_images_as_hugging_face_writes_them_from_files_and_a_hub(tmp_path, monkeypatch):
    decoded = [
        {**row, "chosen": Image.open(io.BytesIO(row["chosen"])), "rejected": Image.open(io.BytesIO(row["rejected"]))}
        for row in chosen_rows()
    ]
    features = {"prompt": datasets.Value("string"), "chosen": datasets.Image(), "rejected": datasets.Image()}
    features |= {"chosen_model": datasets.Value("string")}
    made = datasets.Dataset.from_list(decoded, features=datasets.Features(features))
    (tmp_path / "data").mkdir()
    made.to_parquet(tmp_path / "data" / "train-00000-of-00001.parquet")
    local = open_source(str(tmp_path), "train", names=CHOSEN)
    assert same_pairs(read(local))
    monkeypatch.setenv("WORKBENCH_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr("huggingface_hub.HfApi.dataset_info", lambda *a, **k: DatasetInfo(id="s/p", sha="c0de"))
    monkeypatch.setattr("datasets.load_dataset", lambda *a, **k: made.to_iterable_dataset())
    remote = open_source("someone/preferences", "train", names=CHOSEN)
    assert same_pairs(read(remote)) and same_pairs(read(remote.stream()))
    assert remote.digest not in ("someone/preferences@c0de:train", local.digest)


def test_a_json_list_as_hpdv3_has_it(tmp_path):
    rng = np.random.default_rng(0)
    (tmp_path / "images").mkdir()
    for name in "ab":
        (tmp_path / "images" / f"{name}.png").write_bytes(picture(rng))
    row = {
        "prompt": "a fox",
        "path1": "images/a.png",
        "path2": "images/b.png",
        "confidence": 0.9,
        "choice_dist": [9, 1],
    }
    (tmp_path / "train.json").write_text(json.dumps([row]))
    names = Names("prompt", "path1", "path2")
    for source in (str(tmp_path), str(tmp_path / "train.json")):
        (found,) = read(open_source(source, "train", names=names))
        assert found["jpg_0"] == (tmp_path / "images" / "a.png").read_bytes() and kind_of(found) == "used"
    (tmp_path / "train.json").write_text(json.dumps({"rows": [row]}))
    with pytest.raises(UserError, match=r"train\.json holds no list of rows"):
        open_source(str(tmp_path), "train", names=names)


def test_both_styles_in_one_file_go_by_labels_unless_the_others_are_named(tmp_path):
    both = [row | {"win": row["jpg_1"], "lose": row["jpg_0"]} for row in PAIRS]
    pl.DataFrame(both).write_parquet(tmp_path / "p.parquet")
    assert same_pairs(read(open_source(str(tmp_path), "train")))
    swapped = read(open_source(str(tmp_path), "train", names=Names(chosen="win", rejected="lose")))
    assert swapped[0]["jpg_0"] == PAIRS[0]["jpg_1"] and {row["label_0"] for row in swapped} == {1}


def test_other_names_are_other_data_and_the_usual_ones_are_what_they_were(tmp_path):
    both = [row | {"long": row["caption"] * 2} for row in PAIRS]
    pl.DataFrame(both).write_parquet(tmp_path / "p.parquet")
    plain, other = (open_source(str(tmp_path), "train", names=names).digest for names in (NAMES, Names("long")))
    assert plain != other and Names("long").keyed("a") != "a" and NAMES.keyed("a") == "a"


def test_names_that_are_for_other_data_change_nothing(tmp_path, caplog):
    pl.DataFrame(PAIRS).write_parquet(tmp_path / "p.parquet")
    plain = open_source(str(tmp_path), "validation")
    for names in (Names(caption="text"), Names("text", "better", "worse"), Names(chosen="typo")):
        found = open_source(str(tmp_path), "validation", names=names)
        assert same_pairs(read(found)) and found.digest == plain.digest
    assert "no column 'text' (data.columns.caption); 'caption' is read" in caplog.text
    assert "no column 'typo' (data.columns.chosen)" in caplog.text
    pl.DataFrame(PAIRS).rename({"jpg_0": "first"}).write_parquet(tmp_path / "p.parquet")
    (used, also) = (
        open_source(str(tmp_path), "train", names=n) for n in (Names(jpg_0="first"), Names("text", jpg_0="first"))
    )
    assert same_pairs(read(also)) and used.digest == also.digest


def test_a_list_under_usual_names_is_read_whatever_other_data_are_called(tmp_path):
    rng = np.random.default_rng(0)
    for name in "ab":
        (tmp_path / f"{name}.png").write_bytes(picture(rng))
    (tmp_path / "l.csv").write_text("caption,chosen,rejected\na fox,a.png,b.png\n")
    plain, other = (open_source(str(tmp_path / "l.csv"), "train", names=n) for n in (NAMES, OTHER))
    assert plain.digest == other.digest and read(plain) == read(other)


def test_the_workbenchs_own_pairs_keep_their_names():
    assert open_source("embedded", "validation", names=OTHER).digest == open_source("embedded", "validation").digest


@pytest.mark.parametrize(
    ("rows", "names", "says"),
    [
        (
            chosen_rows(),
            NAMES,
            "no column caption \\(expected caption, chosen, rejected; data.columns gives",
        ),
        (chosen_rows(), Names("promt"), "no column promt \\(expected promt, chosen, rejected"),
        (renamed_rows(), Names("text", jpg_0="image_a", jpg_1="image_b"), "no column label_0, label_1 "),
        (PAIRS, Names(jpg_0="jpg_1"), "data.columns: two columns are called 'jpg_1'"),
        ([{"prompt": "a", "chosen": "a.png", "rejected": "b.png"}], CHOSEN, "chosen holds text and no images; a list"),
    ],
)
def test_mistakes_are_one_clear_line(tmp_path, rows, names, says):
    pl.DataFrame(rows).write_parquet(tmp_path / "p.parquet")
    with pytest.raises(UserError, match=says) as error:
        open_source(str(Path(tmp_path)), "train", names=names)
    assert "\n" not in str(error.value)
