import json
import math
import os
import re
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from mlflow.exceptions import MlflowException
from mlflow.protos.databricks_pb2 import ErrorCode
from requests import HTTPError, Response

from workbench import tracking
from workbench.common.errors import Failure, UserError
from workbench.tracking import delivery
from workbench.tracking.delivery import deliver_outbox, is_away
from workbench.tracking.outbox import Outbox


@pytest.fixture
def place(tmp_path, monkeypatch):
    monkeypatch.setenv("WORKBENCH_STATE", str(tmp_path / "state"))
    return tmp_path


@pytest.fixture(scope="module")
def client(tmp_path_factory):
    """One store for all tests, since a new one takes seconds."""
    with pytest.MonkeyPatch.context() as patch:
        folder = tmp_path_factory.mktemp("store")
        patch.chdir(folder)
        patch.setenv("MLFLOW_TRACKING_URI", f"sqlite:///{folder / 'mlflow.db'}")
        yield tracking.connect()


@pytest.fixture
def outbox(place):
    outbox = Outbox("run")
    outbox.open()
    return outbox


@pytest.fixture
def run(client, place):
    return tracking.Tracker(client, "run", params={}, tags={}, seconds=0.1)


def test_records_come_back_in_order_metrics_together_and_others_alone(outbox):
    for step in range(3):
        outbox.add("metrics", step=step, values={f"m{i}": np.float32(i) for i in range(400)})
    outbox.add("tags", values={"a": "b"})
    outbox.add("metrics", step=3, values={"odd": math.nan, "big": math.inf, "small": -math.inf})
    found = [[(r["kind"], r.get("step")) for r in batch] for batch in outbox.batches()]
    assert found == [[("metrics", 0), ("metrics", 1)], [("metrics", 2)], [("tags", None)], [("metrics", 3)]]
    assert not outbox.waiting and list(outbox.batches()) == []


def test_numbers_that_are_not_finite_survive(outbox):
    outbox.add("metrics", step=3, values={"odd": math.nan, "big": math.inf, "small": -math.inf})
    [[record]] = outbox.batches()
    assert str(record["values"]) == "{'odd': nan, 'big': inf, 'small': -inf}"


def test_half_a_line_is_left_out_and_a_damaged_one_put_aside(outbox, client):
    outbox.add("tags", values={"a": "b"})
    with (outbox.folder / "journal.jsonl").open("a") as journal:
        journal.write('{"kind": "tags", "val\n')
        journal.write('{"kind": "metrics", "step": 1, "val')
    assert [[r["kind"] for r in batch] for batch in outbox.batches()] == [["tags"], ["damaged"]]
    assert not outbox.waiting


def test_a_batch_that_was_not_taken_comes_again(outbox):
    outbox.add("tags", values={"a": "b"})
    outbox.add("tags", values={"c": "d"})
    batches = outbox.batches()
    next(batches), next(batches)  # asking for the second says that the first was taken
    batches.close()
    assert [batch[0]["values"] for batch in Outbox("run").batches()] == [{"c": "d"}]


def test_a_full_disk_is_one_line(outbox):
    (outbox.folder / "journal.jsonl").unlink()
    (outbox.folder / "journal.jsonl").symlink_to("/dev/full")
    outbox._stream = (outbox.folder / "journal.jsonl").open("ab", buffering=0)
    with pytest.raises(Failure, match=r"cannot be kept .*No space left on device.*set WORKBENCH_STATE") as error:
        outbox.add("tags", values={"a": "b"})
    assert "\n" not in str(error.value)


def test_what_is_no_file_is_not_opened_as_a_journal(place, client):
    """Whoever opens a named pipe waits; a test that hangs here has failed."""
    other = Outbox("other")
    other.folder.mkdir(parents=True)
    os.mkfifo(other.folder / "journal.jsonl")
    assert delivery.deliver(client) == [] == delivery.undelivered()
    for use in (other.open, lambda: other.waiting):
        with pytest.raises(UserError, match=r"journal\.jsonl is a named pipe, not a file"):
            use()


def test_what_is_delivered_again_after_a_crash_is_there_once(client, run, place, monkeypatch):
    batches = Outbox.batches
    monkeypatch.setattr(Outbox, "batches", lambda self: (again for batch in batches(self) for again in (batch, batch)))
    run.log(1, {"a": 1.0, "odd": math.nan, "big": math.inf})
    run.image("samples", 1, np.zeros((4, 6, 3), np.uint8))
    run.table("t.json", {"x": [1, 2]})
    (place / "file").write_text("text")
    run.artifact(place / "file", "folder")
    assert run.close("complete")
    for name in ("a", "odd", "big"):
        assert len(client.get_metric_history(run.run_id, name)) == 1
    assert len(client.list_artifacts(run.run_id, "images")) == 2
    assert read_table(client, run, place)["x"].to_list() == [1, 2]
    assert len(json.loads(client.get_run(run.run_id).data.tags["mlflow.loggedArtifacts"])) == 1


def read_table(client, run, place):
    return pd.read_json(client.download_artifacts(run.run_id, "t.json", str(place)), orient="split")


def test_images_and_tables_are_what_mlflow_itself_would_make(client, run, place):
    pixels = np.zeros((300, 600, 3), np.uint8)
    run.image("a/b c", 7, pixels)
    run.table("t.json", {"x": [1.5, math.nan], "y": ["a", None]})
    run.close("complete")
    theirs = client.create_run(client.get_run(run.run_id).info.experiment_id).info.run_id
    client.log_image(theirs, pixels, key="a/b c", step=7)
    client.log_table(theirs, {"x": [1.5, math.nan], "y": ["a", None]}, "t.json")
    names = [
        sorted(re.sub(r"(timestamp.)\d+", r"\1T", re.sub(r"[0-9a-f]{8}-[0-9a-f-]{27}", "U", file.path))
               for file in client.list_artifacts(run_id, "images"))
        for run_id in (run.run_id, theirs)
    ]  # fmt: skip
    assert names[0] == names[1]
    tables = [Path(client.download_artifacts(run_id, "t.json")) for run_id in (run.run_id, theirs)]
    assert tables[0].read_text() == tables[1].read_text()
    tags = [client.get_run(run_id).data.tags for run_id in (run.run_id, theirs)]
    assert tags[0].items() >= {k: v for k, v in tags[1].items() if "logged" in k}.items() != set()


def test_what_the_store_refuses_is_put_aside_and_the_rest_delivered(client, run, caplog):
    run.log(1, {"fine": 1.0})
    run.log(2, {"not, fine": 1.0})
    run.log(3, {"fine": 2.0})
    assert run._thread.is_alive() and run.close("failed", "another fault") is False
    assert [m.value for m in client.get_metric_history(run.run_id, "fine")] == [1.0, 2.0]
    kept = [json.loads(line) for line in (run._outbox.folder / "refused.jsonl").read_text().splitlines()]
    assert [record["values"] for record in kept] == [{"not, fine": 1.0}] and "Invalid" in kept[0]["refused"]
    assert client.get_run(run.run_id).info.status == "FAILED"
    assert delivery.undelivered() == [] and "what the store refused is kept in" in caplog.text


def test_a_complete_run_that_cannot_be_tracked_has_failed(client, run):
    run.log(1, {"not, fine": 1.0})
    with pytest.raises(Failure, match="tracking of run run failed"):
        run.close("complete")
    found = client.get_run(run.run_id)
    assert found.info.status == "FAILED" and "tracking of run" in found.data.tags["workbench.reason"]


def test_a_run_that_is_stopped_during_an_outage_tells_its_end_before_it_waits(client, run, place, monkeypatch):
    assert run.finish()
    monkeypatch.setattr(client, "log_batch", away)
    run.log(1, {"a": 1.0})
    assert not run.close("interrupted", patience=0.2)
    monkeypatch.undo()
    monkeypatch.setenv("WORKBENCH_STATE", str(place / "state"))
    assert delivery.undelivered() == [run.run_id] and delivery.deliver(client) == []
    assert client.get_run(run.run_id).info.status == "KILLED"
    assert "history.parquet" in [file.path for file in client.list_artifacts(run.run_id)]


def away(*_, **__):
    raise MlflowException("connection refused")


def test_a_run_whose_disk_is_full_still_ends(client, run, monkeypatch):
    def full(*_, **__):
        raise Failure("no space left")

    assert run.finish()
    monkeypatch.setattr(run._outbox, "add", full)
    with pytest.raises(Failure, match="no space left"):
        run.log(1, {"a": 1.0})
    run.close("failed", "no space left")
    found = client.get_run(run.run_id)
    assert found.info.status == "FAILED" and found.data.tags["workbench.reason"] == "no space left"


def test_a_live_run_is_left_alone(client, place):
    run = tracking.Tracker(client, "run", params={}, tags={}, seconds=60)
    run.log(1, {"a": 1.0})
    assert delivery.deliver(client) == [] == delivery.undelivered() and run._outbox.folder.exists()
    assert run.close("complete") and run.close("complete") and run.finish()
    assert delivery.deliver(client) == [] and not run._outbox.folder.exists()


def test_a_run_of_another_store_keeps_waiting(client, outbox, caplog):
    outbox.run_id = "0" * 32
    outbox.add("tags", values={"a": "b"})
    with pytest.raises(MlflowException):
        deliver_outbox(client, outbox)
    outbox.close()
    assert delivery.deliver(client) == ["run"] == delivery.undelivered() and "still waits in" in caplog.text


def answer(status):
    response = Response()
    response.status_code = status
    return HTTPError("no", response=response)


@pytest.mark.parametrize(
    ("error", "away"),
    [
        (MlflowException("API request failed: connection refused"), True),
        (MlflowException("x", error_code=ErrorCode.Value("TEMPORARILY_UNAVAILABLE")), True),
        (ConnectionResetError(), True),
        (OSError(28, "No space left on device"), True),
        (answer(503), True),
        (answer(401), True),  # a token that has run out
        (answer(413), False),
        (PermissionError(), False),
        (MlflowException.invalid_parameter_value("no such name"), False),
        (RuntimeError("a mistake of ours"), False),
    ],
)
def test_an_outage_is_told_from_a_refusal(error, away):
    assert is_away(error) == away


@pytest.mark.parametrize(
    ("kind", "away"), [("OperationalError", True), ("InterfaceError", True), ("IntegrityError", False)]
)
def test_errors_of_a_database_that_mlflow_calls_bad_requests(kind, away):
    text = f"(psycopg.{kind}) the connection is closed (Background on this error at: https://sqlalche.me/e/21/rvf5)"
    assert is_away(MlflowException(text, error_code=ErrorCode.Value("BAD_REQUEST"))) == away
