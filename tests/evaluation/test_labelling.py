"""Labelling by eye: which images are shown, what is kept of each answer, and the page's server."""

import json
import socket
import threading
from http.client import HTTPConnection
from pathlib import Path

import numpy as np
import polars as pl
import pytest

from tests.support.commands import invoke
from tests.support.helpers import picture
from workbench.common.errors import UserError
from workbench.data.rows import kind_of, open_rows
from workbench.evaluation import label_page, labelling, prompt_sets, sample_store

ABOUT = {"left": "/l", "right": "/r", "seed": 0}


@pytest.fixture
def sources(workplace):
    """Six pictures each of two models, and their prompts."""
    rng = np.random.default_rng(0)
    for folder in ("before", "after"):
        (workplace / folder).mkdir()
        for i in range(6):
            (workplace / folder / f"{i:02d}.png").write_bytes(picture(rng))
    (workplace / "after" / "notes.txt").write_text("no picture")
    (workplace / "prompts.txt").write_text("".join(f"prompt {i}\n" for i in range(6)))
    return workplace


def plan(seed=0):
    return labelling.plan("before", "after", "prompts.txt", seed)


def begin(questions, folder="labels", about=ABOUT):
    return labelling.Labels(Path(folder), questions, about)


def answer(labels, *answers):
    for each in answers:
        assert labels.answer(labels.current().key, each)


def rows(folder="labels"):
    return pl.concat([pl.read_parquet(file) for file in sorted(Path(folder).glob("*.parquet"))]).to_dicts()


def test_order_and_sides_are_the_seeds_and_captions_stay_with_their_pictures(sources):
    first, again, other = plan(), plan(), plan(1)
    assert [q[:2] for q in first] == [q[:2] for q in again] and [q.models for q in first] == [q.models for q in again]
    assert [q.key for q in first] != [q.key for q in other] and {q.key for q in first} == {q.key for q in other}
    every = [question.models for seed in range(20) for question in plan(seed)]
    assert 30 < every.count(("before", "after")) < 90  # of 120
    for question in first:
        number = int(question.caption.split()[1])
        folders = dict(zip(question.models, (question.left, question.right), strict=True))
        for folder, image in folders.items():
            assert image.read() == Path(folder, f"{number:02d}.png").read_bytes()


def test_each_answer_is_a_pair_that_training_reads(sources):
    labels = begin(plan())
    asked = labels.questions[:4]
    answer(labels, "left", "right", "tie", "skip")
    found = rows()
    assert [(row["label_0"], row["label_1"]) for row in found] == [(1, 0), (0, 1), (0.5, 0.5), (None, None)]
    assert [kind_of(row) for row in found] == ["used", "used", "ties", "unlabelled"]
    for row, question in zip(found, asked, strict=True):
        assert (row["model_0"], row["model_1"]) == question.models and row["caption"] == question.caption
        assert (row["jpg_0"], row["jpg_1"]) == (question.left.read(), question.right.read())
    assert (
        found[0]["best_image_uid"] == found[0]["image_0_uid"] and found[1]["best_image_uid"] == found[1]["image_1_uid"]
    )
    read = [row for chunk, _ in open_rows("labels", "train").chunks(9) for row in chunk]
    assert [row["caption"] for row in read] == [question.caption for question in asked]
    counts = labelling.tally(labels, ("before", "after"))
    preferred = [asked[0].models[0], asked[1].models[1]]
    assert counts == {m: preferred.count(m) for m in ("before", "after")} | {"ties": 1, "skipped": 1}
    assert labelling.sides(labels) == 0.5


def test_it_goes_on_where_it_was_over_several_files(sources, monkeypatch):
    monkeypatch.setattr(labelling, "SHARD", 2)
    answer(begin(plan()), "left", "left", "right")
    labels = begin(plan())
    assert list(labels.answered.values()) == [1, 1, 0]
    answer(labels, "tie", "left", "right")
    assert labels.current() is None and not labels.answer("x", "left")
    assert sorted(file.name for file in Path("labels").glob("*.parquet")) == [
        f"labels-0000{i}.parquet" for i in range(3)
    ]
    assert [row["label_0"] for row in rows()] == [1, 1, 0, 0.5, 1, 0]
    assert begin(plan()).current() is None


def test_the_newest_answer_can_be_taken_back(sources):
    labels = begin(plan())
    answer(labels, "left", "left")
    second = labels.questions[1]
    assert labels.undo() and labels.current() is second and len(rows()) == 1
    answer(labels, "right")
    assert begin(plan()).answered[second.key] == 0
    assert labels.undo() and labels.undo() and not labels.undo() and rows() == []


def test_an_answer_that_cannot_be_stored_is_asked_for_again(sources, monkeypatch):
    labels = begin(plan())
    answer(labels, "left")

    def full(*arguments):
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch, pytest.raises(OSError, match="No space"):
        patch.setattr(labelling.pq, "write_table", full)
        answer(labels, "right")
    assert labels.current() is labels.questions[1] and len(rows()) == 1
    answer(labels, "tie")
    assert [row["label_0"] for row in rows()] == [1, 0.5]


def test_another_comparison_and_other_peoples_files_stay(sources):
    answer(begin(plan()), "left")
    with pytest.raises(UserError, match="--output labels: was made with seed = 0, not 1; choose another folder"):
        begin(plan(1), about=ABOUT | {"seed": 1})
    Path("theirs").mkdir()
    Path("theirs/labels-00000.parquet").write_text("years of work")
    with pytest.raises(UserError, match="is there, and not among the files that the workbench wrote"):
        begin(plan(), "theirs")
    assert Path("theirs/labels-00000.parquet").read_text() == "years of work"


def test_samples_of_an_evaluation_are_matched_by_prompt_and_seed(workplace):
    (workplace / "p.txt").write_text("a fox\na bee\n")
    prompts = prompt_sets.read("p.txt")
    for model, shade in (("ours", 200), ("theirs", 50)):
        (shard,) = sample_store.shards(Path("samples"), model, prompts, 2)
        sample_store.write_images(shard, np.full((4, 8, 8, 3), shade, np.uint8))
    questions = labelling.plan("samples/data/p/ours", "samples/data/p/theirs", "", 0)
    assert sorted(question.caption for question in questions) == ["a bee"] * 2 + ["a fox"] * 2
    for question in questions:
        shade = 200 if question.models[0] == "samples/data/p/ours" else 50
        assert (sample_store.decoded(question.left.read()) == shade).all()


def test_samples_keep_their_own_prompts_and_another_model_is_not_taken_for_a_shard(workplace):
    (workplace / "p.txt").write_text("a fox\na bee\n")
    prompts = prompt_sets.read("p.txt")
    for model, shade in (("ours", 200), ("ours-0", 100), ("theirs", 50)):
        (shard,) = sample_store.shards(Path("samples"), model, prompts, 1)
        sample_store.write_images(shard, np.full((2, 8, 8, 3), shade, np.uint8))
    Path("samples/data/p/ours-00000.parquet").unlink()
    with pytest.raises(UserError, match="LEFT samples/data/p/ours: no such folder"):
        labelling.plan("samples/data/p/ours", "samples/data/p/theirs", "", 0)
    with pytest.raises(UserError, match=r"--prompts p\.txt: samples of models have prompts of their own"):
        labelling.plan("samples/data/p/ours-0", "samples/data/p/theirs", "p.txt", 0)


def test_names_are_counted_as_people_do(sources):
    for folder in ("left", "right"):
        Path(folder).mkdir()
        for i in range(6):
            Path(folder, f"{2 * i}.png").write_bytes(Path("before", f"{i:02d}.png").read_bytes())
    found = {q.left.place.partition("/")[2]: q.caption for q in labelling.plan("left", "right", "prompts.txt", 0)}
    assert found == {f"{2 * i}.png": f"prompt {i}" for i in range(6)}


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (("before", "nowhere"), "RIGHT nowhere: no such folder of pictures or samples"),
        (("before", "before/"), "LEFT and RIGHT are the same, before"),
        (("before", "other"), "before and other: no image in both"),
        (("before", "empty"), "RIGHT empty: no picture in it"),
    ],
)
def test_mistakes_are_one_clear_line(sources, arguments, says):
    for folder in ("other", "empty"):
        Path(folder).mkdir()
    Path("other/x.png").write_bytes(picture(np.random.default_rng(1)))
    done = invoke("label", *arguments, "--prompts", "prompts.txt", "--output", "labels")
    assert done.returncode == 2 and says in done.stderr and not Path("labels").exists()


def test_prompts_must_fit_the_pictures(sources):
    with pytest.raises(UserError, match="--prompts: pictures have none of their own"):
        labelling.plan("before", "after", "", 0)
    Path("prompts.txt").write_text("one\n")
    with pytest.raises(UserError, match=r"--prompts prompts\.txt: 1 prompts for 6 pairs of pictures"):
        plan()


@pytest.fixture
def page(sources):
    """A running page: a function that asks it, and its labels."""
    labels = begin(plan())
    with label_page.server(labels, 0) as server:
        thread = threading.Thread(target=server.serve_forever, daemon=True)
        thread.start()

        def ask(method, path, body=None, **head):
            connection = HTTPConnection("127.0.0.1", server.server_port, timeout=20)
            connection.request(method, path, body, head)
            reply = connection.getresponse()
            return reply.status, reply.read(), reply.headers

        yield ask, labels
        server.shutdown()
        thread.join()


def send(ask, key, answer):
    head = {"Content-Type": "application/json"}
    status, body, _ = ask("POST", "/answer", json.dumps({"key": key, "answer": answer}), **head)
    assert status == 200
    return json.loads(body)


def test_the_page_shows_the_pair_without_its_models_and_takes_answers(page):
    ask, labels = page
    assert b"/answer" in ask("GET", "/")[1]
    status, body, _ = ask("GET", "/pair")
    state = json.loads(body)
    question = labels.questions[0]
    assert status == 200 and state["caption"] == question.caption and "before" not in body.decode()
    for side in ("left", "right"):
        status, image, head = ask("GET", f"/image/{state['key']}/{side}")
        assert (status, image, head["Content-Type"]) == (200, getattr(question, side).read(), "image/png")
    after = send(ask, state["key"], "left")
    assert after["answered"] == 1 and after["key"] == labels.questions[1].key and len(rows()) == 1
    assert send(ask, state["key"], "left")["answered"] == 1  # a double click answers once
    assert send(ask, None, "undo")["key"] == state["key"]
    assert send(ask, None, "undo")["error"] == "Nothing to take back"
    for _ in labels.questions:
        after = send(ask, labels.current().key, "tie")
    assert after["key"] is None and after["answered"] == after["total"] == 6


def test_the_page_answers_this_machine_alone(page):
    ask, labels = page
    key = labels.current().key
    told = json.dumps({"key": key, "answer": "left"})
    assert ask("GET", "/pair", Host="evil.example")[0] == 403
    assert ask("POST", "/answer", told, Host="evil.example", **{"Content-Type": "application/json"})[0] == 403
    assert ask("POST", "/answer", told, **{"Content-Type": "text/plain"})[0] == 403
    assert ask("POST", "/answer", "[]", **{"Content-Type": "application/json"})[0] == 400
    assert [ask("GET", path)[0] for path in ("/image/x/left", "/image", "/etc/passwd")] == [404] * 3
    assert not labels.answered


def test_a_pair_whose_picture_is_gone_or_damaged_can_be_passed_over(page):
    ask, labels = page
    gone, damaged, whole = labels.questions[:3]
    Path(*gone.left.place.replace("LEFT", "before").replace("RIGHT", "after").split("/")).unlink()
    Path(*damaged.right.place.replace("LEFT", "before").replace("RIGHT", "after").split("/")).write_bytes(b"no picture")
    assert ask("GET", f"/image/{gone.key}/left")[:2] == (404, b"cannot be read")
    told = send(ask, gone.key, "left")
    assert told["error"].startswith("Not stored: ") and told["key"] == gone.key
    assert send(ask, gone.key, "skip")["key"] == damaged.key
    assert ask("GET", f"/image/{damaged.key}/right")[:2] == (404, b"cannot be read")
    assert send(ask, damaged.key, "skip")["key"] == whole.key
    assert send(ask, whole.key, "left")["answered"] == 2  # of the damaged one, its bytes are kept
    assert send(ask, None, "undo")["key"] == whole.key and send(ask, None, "undo")["key"] == damaged.key
    assert gone.key in labels.unreadable and labels.current() is damaged


def test_a_silent_connection_holds_nobody_up(page):
    ask, labels = page
    port = int(ask.__closure__[0].cell_contents.server_port)
    with socket.create_connection(("127.0.0.1", port)):
        assert send(ask, labels.current().key, "left")["answered"] == 1
