"""Pairs from lists of picture files."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch

from tests.support.commands import invoke
from tests.support.helpers import overrides, picture
from workbench.common.errors import UserError
from workbench.data.columns import Names
from workbench.data.encoding import encode
from workbench.data.listed import open_source
from workbench.data.rows import decode, kind_of
from workbench.models import load


@pytest.fixture
def pictures(workplace):
    rng = np.random.default_rng(0)
    (workplace / "images").mkdir()
    for name in "abcd":
        (workplace / "images" / f"{name}.png").write_bytes(picture(rng))
    return workplace


def rows(source, **options):
    return [row for chunk, _ in open_source(source, "train", **options).chunks(2) for row in chunk]


CSV = (
    'caption,chosen,rejected,rating\n"a fox, sitting",images/a.png,images/b.png,5\na bee,images/c.png,images/d.png,1\n'
)


def test_a_csv_with_a_caption_and_two_paths_a_row(pictures):
    Path("pairs.csv").write_text(CSV, "utf-8-sig")
    first, second = rows("pairs.csv")
    assert (first["caption"], second["caption"]) == ("a fox, sitting", "a bee")
    assert first["jpg_0"] == Path("images/a.png").read_bytes() and kind_of(first) == "used"
    pair = decode(second, 32)
    assert pair is not None and pair.w.shape == (32, 32, 3)
    (half,) = [chunk for chunk, _ in open_source("pairs.csv", "train").chunks(5, done=1)]
    assert half == [second]


def test_json_lines_under_other_names_in_a_folder(pictures):
    found = [{"prompt": "a fox", "good": "a.png", "bad": "b.png"}, {"prompt": "", "good": "c.png", "bad": "d.png"}]
    Path("images/train.jsonl").write_text("\n".join(map(json.dumps, found)) + "\n\n", "utf-8")
    assert [row["caption"] for row in rows("images", names=Names("prompt", "good", "bad"))] == ["a fox", ""]


def test_a_changed_picture_is_other_data(pictures):
    Path("pairs.csv").write_text(CSV)
    before = open_source("pairs.csv", "train").digest
    assert open_source("pairs.csv", "train").digest == before
    Path("images/a.png").write_bytes(picture(np.random.default_rng(7)) + b"\0")
    assert open_source("pairs.csv", "train").digest != before


def test_they_are_encoded_and_trained(pictures, tiny):
    Path("pairs.csv").write_text(CSV.replace("caption,chosen", "caption,better"))
    assert len(encode(open_source("pairs.csv", "train", names=Names(chosen="better")), backend(tiny))) == 2
    given = tiny | {"data.train": "pairs.csv", "data.columns.chosen": "better", "train.steps": 1, "train.batch_size": 2}
    given |= {"evaluation.seeds": 0, "evaluation.grid": 0}
    done = invoke("train", *overrides(given), "--no-tracking", "--output", "out")
    assert done.returncode == 0, done.stderr
    assert json.loads(Path("out/run.json").read_text())["settings"]["data.columns.chosen"] == "better"


def backend(tiny):
    return load(tiny["model.path"], torch.device("cpu"))


@pytest.mark.parametrize(
    ("text", "options", "says"),
    [
        (
            "caption,chosen\na,images/a.png\n",
            {},
            r"line 2: no text in column 'rejected' \(data.columns.rejected\); the",
        ),
        (CSV.replace("images/d", "images/e"), {}, "line 3: rejected: e.png cannot be read"),
        (CSV.replace("images/d", "images/c"), {}, "line 3: chosen and rejected are the same picture, images/c.png"),
        (CSV.replace("images/d.png", "images"), {}, "line 3: rejected: images is a folder, not a file"),
        ("caption,chosen,rejected\n", {}, "no row in it"),
        (CSV, {"scores": "reward"}, "data.scores = 'reward': data.train = 'pairs.csv' is a list of pictures"),
        (CSV, {"names": Names(chosen="best")}, "line 2: no text in column 'best'"),
    ],
)
def test_mistakes_are_one_clear_line(pictures, text, options, says):
    Path("pairs.csv").write_text(text)
    with pytest.raises(UserError, match=says):
        open_source("pairs.csv", "train", **options)


def test_lines_that_are_no_json_and_files_that_are_not_there(pictures):
    Path("pairs.jsonl").write_text('{"caption": "a"\n')
    with pytest.raises(UserError, match=r"pairs\.jsonl cannot be read"):
        open_source("pairs.jsonl", "train")
    Path("pairs.jsonl").write_text("[1, 2]\n")
    with pytest.raises(UserError, match="line 1: no text in column 'caption'"):
        open_source("pairs.jsonl", "train")
    with pytest.raises(UserError, match=r"nowhere\.csv cannot be read"):
        open_source("nowhere.csv", "train")


def pair_folder(place: Path, name: str, prompt: str, chosen: str, rejected: str) -> None:
    (place / name).mkdir(parents=True)
    (place / name / "prompt.txt").write_text(prompt)
    for kind, source in (("chosen", chosen), ("rejected", rejected)):
        (place / name / f"{kind}.png").write_bytes(Path("images", f"{source}.png").read_bytes())


def test_a_folder_of_pairs(pictures):
    pair_folder(Path("mine"), "2", "a fox,\nsitting\n", "a", "b")
    pair_folder(Path("mine"), "1", "a bee", "c", "d")
    (Path("mine") / "notes").mkdir()  # no pair: it has no prompt
    bee, fox = rows("mine")
    assert (bee["caption"], fox["caption"]) == ("a bee", "a fox, sitting") and kind_of(fox) == "used"
    assert fox["jpg_0"] == Path("images/a.png").read_bytes() and fox["jpg_1"] == Path("images/b.png").read_bytes()
    before = open_source("mine", "train").digest
    (Path("mine") / "2" / "prompt.txt").write_text("a dog")
    assert open_source("mine", "train").digest != before


def test_a_folder_of_pairs_may_have_splits(pictures):
    pair_folder(Path("mine/train"), "1", "a fox", "a", "b")
    pair_folder(Path("mine/validation"), "1", "a bee", "c", "d")
    assert [row["caption"] for row in rows("mine")] == ["a fox"]
    found = [row for chunk, _ in open_source("mine", "validation").chunks(2) for row in chunk]
    assert [row["caption"] for row in found] == ["a bee"]


def test_mistakes_in_a_folder_of_pairs_are_one_clear_line(pictures):
    pair_folder(Path("mine"), "1", "a fox", "a", "b")
    (Path("mine") / "1" / "chosen.jpg").write_bytes(b"")
    with pytest.raises(UserError, match=r"'mine': 1: .* picture called chosen, .*; found chosen.jpg, chosen.png"):
        open_source("mine", "train")
    (Path("mine") / "1" / "chosen.jpg").unlink()
    (Path("mine") / "1" / "rejected.png").unlink()
    with pytest.raises(UserError, match=r"expected one picture called rejected, .*; found none"):
        open_source("mine", "train")
    with pytest.raises(UserError, match="is a list of pictures, which has no scores"):
        open_source("mine", "train", scores="reward")
    (Path("mine") / "1" / "rejected.png").hardlink_to(Path("mine") / "1" / "chosen.png")
    with pytest.raises(UserError, match=r"'mine': 1: chosen\.png and rejected\.png are the same picture"):
        open_source("mine", "train")
    pair_folder(Path("half"), "1", "a fox", "a", "b")
    pair_folder(Path("half"), "2", "a bee", "c", "d")
    (Path("half") / "2" / "prompt.txt").unlink()
    with pytest.raises(UserError, match=r"'half': 2: prompt\.txt cannot be read"):
        open_source("half", "train")
