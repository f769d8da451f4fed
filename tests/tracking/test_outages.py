"""The tracking store goes away and comes back: a real `mlflow server` and a real PostgreSQL, stopped and started."""

import json
import multiprocessing
import os
import signal
import subprocess
import sys
import time

import numpy as np
import pandas as pd
import pytest

from tests.support.helpers import ROOT
from tests.support.postgres import PASSWORD, postgres  # noqa: F401
from workbench import tracking
from workbench.benchmarks.tracking_server import TrackingServer
from workbench.common.errors import Failure
from workbench.tracking import delivery
from workbench.tracking.outbox import Outbox

pytestmark = pytest.mark.slow  # in every run: stores that refuse and come back, in test_outbox.py and test_tracker.py
METRICS = 12
RUN = """
import itertools, json, time
from pathlib import Path
import numpy as np
from workbench import tracking

run = tracking.Tracker(tracking.connect(), "run", params={"a": 1}, tags={"t": "u"}, seconds=0.5)
print(run.run_id, flush=True)
slowest = 0.0
for step in itertools.count(1):
    begin = time.monotonic()
    run.log(step, {f"m/{i}": step * 100 + i for i in range(12)} | {"m/odd": [float("nan"), float("inf")][step % 2]})
    if step % 20 == 0:
        run.image("samples", step, np.full((8, 8, 3), step % 256, np.uint8))
        run.table(f"t{step}.json", {"step": [step], "x": [0.5]})
        run.picture(f"p{step}.png", np.full((4, 4, 3), step % 256, np.uint8))
    slowest = max(slowest, time.monotonic() - begin)
    time.sleep(0.02)
    print(step, flush=True)
    if Path("stop").exists():
        break
delivered = run.finish(120) and run.end("complete", "because")
print(json.dumps({"steps": step, "slowest": slowest, "delivered": delivered}))
"""


class Training:
    """A process that tracks a run, step after step, until it is to end."""

    def __init__(self, folder, uri):
        environment = os.environ | {"PYTHONPATH": str(ROOT), "MLFLOW_TRACKING_URI": uri}
        self.folder = folder
        (folder / "train.py").write_text(RUN)
        self.errors = (folder / "errors").open("w+")
        self.process = subprocess.Popen(
            [sys.executable, "train.py"],
            cwd=folder, env=environment, stdout=subprocess.PIPE, stderr=self.errors, text=True,
        )  # fmt: skip
        self.run_id = self.process.stdout.readline().strip()
        assert self.run_id, self.said()

    def go_on(self, steps):
        """Wait until it has told of so many more steps."""
        for _ in range(steps):
            assert self.process.stdout.readline(), self.said()

    def wait_until_said(self, text, times=1):
        deadline = time.monotonic() + 120
        while self.said().count(text) < times:
            assert time.monotonic() < deadline, self.said()
            self.go_on(1)

    def end(self):
        """Let it come to its end; the number of its steps."""
        (self.folder / "stop").touch()
        result = json.loads(self.process.communicate(timeout=240)[0].splitlines()[-1])
        assert result["delivered"] and result["slowest"] < 2, (result, self.said())  # an outage takes longer
        return result["steps"]

    def kill(self):
        self.process.send_signal(signal.SIGKILL)
        self.process.wait(30)

    def said(self):
        self.errors.seek(0)
        return self.errors.read()


def require_all(client, run_id, steps, folder):
    """Everything that RUN tells in so many steps is in the store, once."""
    for i in range(METRICS):
        found = client.get_metric_history(run_id, f"m/{i}")
        assert sorted((m.step, m.value) for m in found) == [(s, s * 100 + i) for s in range(1, steps + 1)]
    assert len(client.get_metric_history(run_id, "m/odd")) == steps
    told = range(20, steps + 1, 20)
    images = [a.path for a in client.list_artifacts(run_id, "images")]
    assert sorted(int(p.split("+step+")[1].split("+")[0]) for p in images) == [s for s in told for _ in "ab"]
    names = {a.path for a in client.list_artifacts(run_id)}
    assert {f"t{s}.json" for s in told} | {f"p{s}.png" for s in told} <= names
    for step in told:
        table = client.download_artifacts(run_id, f"t{step}.json", str(folder))
        assert pd.read_json(table, orient="split").values.tolist() == [[step, 0.5]]
    run = client.get_run(run_id)
    assert run.data.params == {"a": "1"} and run.data.tags["t"] == "u"
    assert len(json.loads(run.data.tags["mlflow.loggedArtifacts"])) == len(told)


@pytest.fixture
def place(tmp_path, monkeypatch):
    """A working folder whose state folder a test and its processes share."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("WORKBENCH_STATE", str(tmp_path / "state"))
    return tmp_path


@pytest.fixture(scope="module")
def server(postgres, tmp_path_factory):  # noqa: F811
    with TrackingServer(tmp_path_factory.mktemp("server"), postgres.create()) as running:
        yield running


@pytest.fixture(scope="module")
def database(postgres):  # noqa: F811
    return postgres.create()


def test_nothing_is_lost_while_the_server_or_its_database_is_away(postgres, server, place, monkeypatch):  # noqa: F811
    training = Training(place, server.url.replace("://", f"://me:{PASSWORD}@"))
    training.go_on(30)
    server.stop()
    training.wait_until_said("store is away")
    training.go_on(100)
    server.start()
    training.wait_until_said("store is back")
    postgres.stop()
    training.wait_until_said("store is away", 2)
    training.go_on(100)
    postgres.start()
    training.wait_until_said("store is back", 2)
    steps = training.end()
    said = training.said()
    assert len(said.splitlines()) == 4 and PASSWORD not in said, said
    monkeypatch.setenv("MLFLOW_TRACKING_URI", server.url)
    client = tracking.connect()
    require_all(client, training.run_id, steps, place)
    run = client.get_run(training.run_id)
    assert run.info.status == "FINISHED" and run.data.tags["workbench.reason"] == "because"
    assert not Outbox(training.run_id).folder.exists()


def test_what_a_killed_process_kept_is_delivered_afterwards(server, place, monkeypatch):
    training = Training(place, server.url)
    training.go_on(30)
    server.stop()
    training.wait_until_said("store is away")
    training.go_on(50)
    training.kill()
    assert delivery.undelivered() == [training.run_id]
    server.start()
    monkeypatch.setenv("MLFLOW_TRACKING_URI", server.url)
    client = tracking.connect()
    assert delivery.deliver(client) == [] == delivery.undelivered()
    steps = len(client.get_metric_history(training.run_id, "m/0"))
    assert steps >= 80
    require_all(client, training.run_id, steps, place)
    assert client.get_run(training.run_id).info.status == "RUNNING"


def test_a_database_that_is_tracked_to_directly_may_go_away_too(postgres, database, place, monkeypatch):  # noqa: F811
    training = Training(place, database)
    training.go_on(30)
    postgres.stop()
    training.wait_until_said("store is away")
    training.go_on(50)
    postgres.start()
    training.wait_until_said("store is back")
    steps = training.end()
    assert PASSWORD not in training.said()
    monkeypatch.setenv("MLFLOW_TRACKING_URI", database)
    require_all(tracking.connect(), training.run_id, steps, place)


def test_a_run_that_ends_during_an_outage_is_kept_and_ended_later(postgres, database, place, monkeypatch, caplog):  # noqa: F811
    monkeypatch.setenv("MLFLOW_TRACKING_URI", database)
    client = tracking.connect()
    run = tracking.Tracker(client, "run", params={}, tags={})
    assert run.finish()
    postgres.stop()
    try:
        with pytest.raises(Failure, match="the tracking store is away"):
            tracking.Tracker(client, "another", params={}, tags={})
        run.log(1, {"x": 1.0})
        run.image("samples", 1, np.zeros((4, 4, 3), np.uint8))
        begin = time.monotonic()
        assert not run.finish(patience=1.0) and not run.end("complete")
        assert time.monotonic() - begin < 10
        run.close("complete")  # once more does no harm
        assert delivery.undelivered() == [run.run_id] == delivery.deliver(client)
        assert not delivery.wait_until_reachable(seconds=0.5)
        assert not delivery.wait_until_reachable(stopping=lambda: True)
    finally:
        postgres.start()
    assert "`python -m workbench.study doctor` delivers it" in caplog.text
    assert delivery.wait_until_reachable() and delivery.deliver(client) == [] == delivery.undelivered()
    found = client.get_run(run.run_id)
    assert found.info.status == "FINISHED" and found.data.metrics == {"x": 1.0}
    assert PASSWORD not in caplog.text and PASSWORD not in str(found.to_dictionary())


def begin(uri, folder, start, results):
    """The body of a process that tracks at the very beginning."""
    os.chdir(folder)
    os.environ["MLFLOW_TRACKING_URI"] = uri
    start.wait()
    try:
        run = tracking.Tracker(tracking.connect(), "run", params={}, tags={})
        results.put(run.close("complete"))
    except Failure as error:
        results.put(str(error))


@pytest.mark.parametrize("kind", ["postgres", "sqlite"])
def test_an_empty_database_may_be_met_by_many_at_once(kind, postgres, place):  # noqa: F811
    uri = postgres.create() if kind == "postgres" else f"sqlite:///{place / 'mlflow.db'}"
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["workbench.tracking"])
    start, results = context.Barrier(8), context.Queue()
    processes = [context.Process(target=begin, args=(uri, place, start, results)) for _ in range(8)]
    for process in processes:
        process.start()
    assert [results.get(timeout=120) for _ in processes] == [True] * 8
    for process in processes:
        process.join()


def test_a_password_is_told_to_nobody(database, place, monkeypatch, caplog):
    monkeypatch.setenv("MLFLOW_TRACKING_URI", database.replace(PASSWORD, "mistyped-secret"))
    with pytest.raises(Failure, match=r"cannot be opened .*password authentication failed") as error:
        tracking.connect()
    assert "mistyped" not in str(error.value) and PASSWORD not in str(error.value)
    monkeypatch.setenv("MLFLOW_TRACKING_URI", database)
    client = tracking.connect()
    run = tracking.Tracker(client, "run", params={"data.train": database}, tags={"workbench.note": f"from {database}"})
    run.tag("workbench.more", database)
    run.log(1, {"x": 1.0})
    run.close("failed", f"{database} cannot be opened")
    stored = client.get_run(run.run_id)
    assert stored.data.tags["workbench.reason"].startswith("postgresql://***@127.0.0.1")
    assert PASSWORD not in str(stored.to_dictionary()) + caplog.text + tracking.ui_command()
