import json

import polars as pl
import pytest

from workbench.common.errors import UserError
from workbench.data.rows import read_prompts
from workbench.evaluation import prompt_sets


def test_the_small_models_prompts():
    found = prompt_sets.read("embedded")
    assert found.name == "embedded" and found.prompts == list(read_prompts("embedded")) and len(found.prompts) == 128
    assert prompt_sets.read("validation", "others").name == "others"


def test_a_text_file_one_a_line(tmp_path):
    (tmp_path / "mine.txt").write_text("a fox\n\n  a corgi, café \n", encoding="utf-8")
    found = prompt_sets.read(str(tmp_path / "mine.txt"))
    assert found[0] == "mine" and found.prompts == ["a fox", "a corgi, café"] and found.categories == ["", ""]


def test_pick_a_pic_gives_distinct_captions_in_order(tmp_path):
    pl.DataFrame({"caption": ["b", "a", "b"], "jpg_0": [b"", b"", b""]}).write_parquet(tmp_path / "part-0.parquet")
    pl.DataFrame({"caption": ["c", "a", None], "jpg_0": [b"", b"", b""]}).write_parquet(tmp_path / "part-1.parquet")
    assert prompt_sets.read(str(tmp_path / "part-0.parquet")).prompts == ["b", "a"]
    assert prompt_sets.read(str(tmp_path)).prompts == ["b", "a", "c"]


def test_parti_prompts_are_not_quoted(tmp_path):
    rows = [
        "Prompt\tCategory\tChallenge\tNote",
        '"Fly" an airplane, "now\tArts\tBasic\t',
        "42\tAbstract\tBasic\tnumbers",
    ]
    (tmp_path / "PartiPrompts.tsv").write_text("\n".join(rows) + "\n")
    found = prompt_sets.read(str(tmp_path / "PartiPrompts.tsv"))
    assert found.prompts == ['"Fly" an airplane, "now', "42"] and found.categories == ["Arts", "Abstract"]


def test_hpd_lists_in_one_file_or_four(tmp_path):
    for style in ("photo", "paintings", "concept-art", "anime"):
        (tmp_path / f"{style}.json").write_text(json.dumps([f"{style} 0", "the same"]))
    found = prompt_sets.read(str(tmp_path), "HPDv2")
    assert found.prompts[:3] == ["anime 0", "the same", "concept-art 0"] and found.prompts[-1] == "the same"
    assert found.categories == [s for s in ("anime", "concept-art", "paintings", "photo") for _ in range(2)]
    assert prompt_sets.read(str(tmp_path / "photo.json")).prompts == ["photo 0", "the same"]


@pytest.mark.parametrize("end", ["\n", "\r\n", "\r"])
@pytest.mark.parametrize("mark", [b"", b"\xef\xbb\xbf"])
def test_files_are_read_alike_whatever_editor_wrote_them(tmp_path, end, mark):
    for name, lines in {
        "p.txt": ["a fox", "a dog"],
        "p.tsv": ["Prompt\tCategory", "a fox\tArts", "a dog\tArts"],
        "p.json": ['["a fox",', '"a dog"]'],
    }.items():
        (tmp_path / name).write_bytes(mark + (end.join(lines) + end).encode())
        assert prompt_sets.read(str(tmp_path / name)).prompts == ["a fox", "a dog"]


def test_only_line_ends_part_prompts(tmp_path):
    (tmp_path / "p.txt").write_text("a fox\u2028with a\x0chat\x85\na dog\n", encoding="utf-8")
    assert prompt_sets.read(str(tmp_path / "p.txt")).prompts == ["a fox\u2028with a\x0chat", "a dog"]
    assert read_prompts(str(tmp_path / "p.txt")) == ["a fox\u2028with a\x0chat", "a dog"]


def test_the_first_ones_and_the_digest():
    whole = prompt_sets.read("embedded")
    assert whole.head(0) == whole and whole.head(3).prompts == whole.prompts[:3] and len(whole.head(3).categories) == 3
    assert whole.digest == prompt_sets.read("embedded", "x").digest != whole.head(3).digest


def test_mistakes_name_the_option_the_value_and_what_is_accepted(tmp_path):
    (tmp_path / "empty.txt").write_text("\n")
    (tmp_path / "x.csv").write_text("a")
    (tmp_path / "bad.json").write_text('{"a": 1}')
    (tmp_path / "broken.json").write_text("[")
    (tmp_path / "other.tsv").write_text("Text\tKind\na\tb\n")
    (tmp_path / "half").mkdir()
    (tmp_path / "half" / "anime.json").write_text("[]")
    (tmp_path / "none").mkdir()
    (tmp_path / "broken.parquet").write_bytes(b"no")
    (tmp_path / "utf-16.txt").write_text("a fox", "utf-16")
    (tmp_path / "half-a-character.json").write_text('["\\ud800"]')
    pl.DataFrame({"text": ["a"]}).write_parquet(tmp_path / "c.parquet")
    for file, message in {
        "nowhere.txt": "no such file or folder; expected 'embedded'",
        "x.csv": "unknown ending '.csv'; expected 'embedded'",
        "empty.txt": "no prompt in it",
        "bad.json": "bad.json is not a list of prompts",
        "broken.json": "cannot be read",
        "other.tsv": "no column Prompt, Category (PartiPrompts has",
        "half": "no concept-art.json, paintings.json, photo.json beside anime.json",
        "none": "neither .parquet files nor HPDv2's .json files",
        "broken.parquet": "broken.parquet is not a whole parquet file",
        "utf-16.txt": "not a text file in UTF-8",
        "half-a-character.json": "cannot be read",
        "c.parquet": "no column 'caption' (Pick-a-Pic's), only text",
    }.items():
        with pytest.raises(UserError) as caught:
            prompt_sets.read(str(tmp_path / file))
        assert f"--prompts {tmp_path / file}: " in str(caught.value) and message in str(caught.value)
        assert "\n" not in str(caught.value)
