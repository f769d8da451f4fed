"""What tracking costs: that the right thing is measured, not how long it takes."""

import pytest
import requests
import torch

from workbench import tracking
from workbench.benchmarks import step
from workbench.benchmarks import tracking as benchmark
from workbench.benchmarks.tracking_server import TrackingServer
from workbench.models import SHAPES, random_backend
from workbench.tracking import store

CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def tiny_backend():
    return random_backend(SHAPES["tiny"], CPU)


def test_a_tracked_chunk_delivers_all_its_metrics(workplace, tiny_backend):
    client, records = tracking.connect(), step.loop(tiny_backend, SHAPES["tiny"], pairs=2).training.records
    chunk = benchmark.tracked(client, records, 10, 2, CPU)
    assert 0 < chunk.logging < chunk.wall and chunk.around > 0 and chunk.delivering >= 0
    (run,) = client.search_runs([store.experiment(client).experiment_id])
    assert run.data.tags["workbench.state"] == "complete"
    assert len(run.data.metrics) == benchmark.METRICS + 5 * 10
    assert len(client.get_metric_history(run.info.run_id, "train/metric-00")) == 12
    assert not list((workplace / ".workbench").glob("outbox/*"))
    assert next(records).step == 13


def test_shares_are_of_the_untracked_steps():
    wall = benchmark.Chunk(10.0)
    logged = benchmark.Chunk(10.2, 0.05, 0.05, 0.3)
    chunks = {"sqlite": [logged] * 3, "a local server": [logged] * 3}
    chunks |= {benchmark._untracked(name): [wall] * 3 for name in tuple(chunks)}
    control, share, own, per_step, around, *_ = benchmark._figures(chunks, 50)
    assert control.median == 1 and control.met
    assert share.median == pytest.approx(2.0) and share.goal == 0.5 and not share.met
    assert own.median == pytest.approx(1.0) and own.met is None
    assert per_step.median == pytest.approx(1000) and around.median == pytest.approx(0.3)


@pytest.mark.slow  # the server of the benchmark and of slow tests alone
def test_the_server_answers_and_stops(tmp_path):
    with TrackingServer(tmp_path) as server:
        assert requests.get(f"{server.url}/health", timeout=5).ok
    with pytest.raises(requests.ConnectionError):
        requests.get(f"{server.url}/health", timeout=5)
