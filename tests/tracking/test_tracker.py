import threading
import time
from base64 import b64encode
from concurrent.futures import ThreadPoolExecutor
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import numpy as np
import polars as pl
import pytest

from workbench import tracking
from workbench.common.errors import Failure, UserError
from workbench.tracking import study_runs


def tracker(client, name="run", parent=None, **tags):
    return tracking.Tracker(client, name, params={"a.b": 1}, tags=tags, parent=parent)


def test_metrics_reach_the_store_and_the_history_alike(workplace):
    client = tracking.connect()
    run = tracker(client)
    for step in range(1, 6):
        run.log(step, {"train/loss": step / 2})
        run.log(step, {"reference/updates": float(step)})
    run.close("complete")
    stored = client.get_metric_history(run.run_id, "train/loss")
    assert [(m.step, m.value) for m in stored] == [(s, s / 2) for s in range(1, 6)]
    frame = pl.read_parquet(client.download_artifacts(run.run_id, "history.parquet", str(workplace)))
    assert frame["train/loss"].to_list() == [0.5, 1, 1.5, 2, 2.5] and frame["step"].to_list() == [1, 2, 3, 4, 5]


def test_more_metrics_than_one_batch_takes_arrive_all(workplace):
    client = tracking.connect()
    run = tracker(client)
    run.log(1, {f"m/{i}": float(i) for i in range(2500)})
    run.close("complete")
    assert len(client.get_run(run.run_id).data.metrics) == 2500


def test_runs_that_name_a_data_set_for_the_first_time_at_once_do_not_collide(workplace):
    clients = [tracking.connect() for _ in range(8)]
    barrier = threading.Barrier(8)

    def begin(client):
        barrier.wait()
        run = tracking.Tracker(client, "run", params={}, tags={}, datasets={"train": ("digest", {"used": 1})})
        run.close("complete")
        return client.get_run(run.run_id).inputs.dataset_inputs

    with ThreadPoolExecutor(8) as pool:
        found = list(pool.map(begin, clients))
    assert [[i.dataset.digest for i in inputs] for inputs in found] == [["digest"]] * 8


@pytest.mark.parametrize(
    ("state", "status"),
    [("complete", "FINISHED"), ("pruned", "FINISHED"), ("interrupted", "KILLED"), ("failed", "FAILED")],
)
def test_states_are_tagged_and_mapped(workplace, state, status):
    client = tracking.connect()
    run = tracker(client)
    run.close(state, "because")
    found = client.get_run(run.run_id)
    assert found.info.status == status
    assert found.data.tags["workbench.state"] == state and found.data.tags["workbench.reason"] == "because"


def test_what_the_store_refuses_is_raised_on_a_later_call(workplace, monkeypatch):
    client = tracking.connect()
    run = tracker(client)

    def broken(*args, **kwargs):
        raise RuntimeError("disk on fire")

    monkeypatch.setattr(client, "log_batch", broken)
    run.log(1, {"x": 1.0})
    with pytest.raises(Failure, match="tracking of run run failed: disk on fire"):
        run.finish()
    with pytest.raises(Failure, match="disk on fire"):
        run.log(2, {"x": 1.0})


def test_logging_does_not_wait_for_the_store(workplace, monkeypatch):
    client = tracking.connect()
    run = tracker(client)
    slow = client.log_batch
    monkeypatch.setattr(client, "log_batch", lambda *a, **k: (time.sleep(0.5), slow(*a, **k)))
    start = time.monotonic()
    for step in range(80):
        run.log(step, {f"m/{i}": 1.0 for i in range(30)})
    assert time.monotonic() - start < 0.5
    run.close("complete")
    assert len(client.get_metric_history(run.run_id, "m/0")) == 80


def test_a_study_is_one_parent_run_and_its_trials_are_read_back(workplace):
    client = tracking.connect()
    parent = study_runs.open_group(client, "s", "note").info.run_id
    assert study_runs.open_group(client, "s", "note").info.run_id == parent
    for arm in ("frozen", "update"):
        run = tracker(client, arm, parent, **{"workbench.arm": arm})
        run.log(1, {"x/y": 2.0})
        run.image("samples", 1, np.zeros((4, 4, 3), np.uint8))
        run.close("complete")
    runs = tracking.load_runs("s")
    assert runs["arm"].to_list() == ["frozen", "update"] and runs["a.b"].to_list() == ["1", "1"]
    assert runs["x/y"].to_list() == [2.0, 2.0]
    assert tracking.load_runs("s", "update")["name"].to_list() == ["update"]
    assert tracking.load_history(runs).select("arm", "step", "x/y").rows() == [("frozen", 1, 2.0), ("update", 1, 2.0)]


def test_unknown_studies_and_runs_name_what_there_is(workplace):
    client = tracking.connect()
    parent = study_runs.open_group(client, "known", "note").info.run_id
    with pytest.raises(UserError, match="study 'other': not found; there are: known"):
        tracking.load_runs("other")
    with pytest.raises(UserError, match="has no ended runs yet"):
        tracking.load_runs("known")
    tracker(client, "a", parent).close("complete")
    with pytest.raises(UserError, match="runs b: not in study"):
        tracking.load_runs("known", "a,b")


def test_an_unreachable_server_is_one_line_without_its_password(workplace, monkeypatch):
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "http://me:secret@127.0.0.1:9")
    with pytest.raises(Failure, match="cannot be reached") as error:
        tracking.connect()
    assert "secret" not in str(error.value)


class Guarded(BaseHTTPRequestHandler):
    """A server that is healthy and lets nobody in."""

    def do_GET(self):
        self.answer(200)

    def do_POST(self):
        self.answer(401)

    def answer(self, status):
        self.send_response(status)
        self.end_headers()
        self.wfile.write(b"who are you, " + self.headers["Authorization"].encode())

    def log_message(self, *_):
        pass


@pytest.mark.parametrize("where", ["in the address", "in the environment"])
def test_a_server_that_lets_nobody_in_is_one_line_without_a_password(workplace, monkeypatch, where):
    server = ThreadingHTTPServer(("127.0.0.1", 0), Guarded)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    who = "me:secret-word@" if where == "in the address" else ""
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"http://{who}127.0.0.1:{server.server_port}")
    if not who:
        monkeypatch.setenv("MLFLOW_TRACKING_USERNAME", "me")
        monkeypatch.setenv("MLFLOW_TRACKING_PASSWORD", "secret-word")
    with pytest.raises(Failure, match=r"cannot be opened .*401") as error:
        tracking.connect()
    assert "secret" not in str(error.value) and b64encode(b"me:secret-word").decode() not in str(error.value)
    server.shutdown()


def test_history_fills_gaps_with_nulls():
    frame = tracking.history({2: {"b": 1.0}, 1: {"a": 0.5}})
    assert frame.rows() == [(1, 0.5, None), (2, None, 1.0)]
