"""What the benchmark measures beside training: that the right thing is measured, not how long it takes."""

import json
import os
import shutil

import pytest
import requests
import torch

from workbench import models, tracking
from workbench.benchmarks import growth, sides, step, tracked
from workbench.benchmarks.figure import Options
from workbench.common.paths import shipped
from workbench.data.encoding import encode
from workbench.data.rows import open_rows
from workbench.models import SHAPES, random_backend
from workbench.tracking import store

CPU = torch.device("cpu")


@pytest.fixture
def options(tmp_path) -> Options:
    return Options(5, CPU, tmp_path / "work")


@pytest.fixture(scope="module")
def tiny_backend():
    return random_backend(SHAPES["tiny"], CPU)


def test_a_tracked_chunk_delivers_all_that_it_was_told(workplace, tiny_backend):
    client, records = tracking.connect(), step.loop(tiny_backend, SHAPES["tiny"], pairs=2).started.records
    chunk = tracked.tracked(client, records, 10, 2, CPU)
    assert 0 < chunk.logging < chunk.wall and chunk.around > 0 and chunk.delivering >= 0
    (run,) = client.search_runs([store.experiment(client).experiment_id])
    assert run.data.tags["workbench.state"] == "complete"
    assert len(run.data.metrics) == tracked.METRICS + 5 * 10
    assert len(client.get_metric_history(run.info.run_id, "train/metric-00")) == 12
    assert not list((workplace / ".workbench").glob("outbox/*"))
    assert next(records).step == 13


def test_shares_are_of_the_steps_that_nobody_was_told_of():
    wall = tracked.Chunk(10.0)
    told = tracked.Chunk(10.2, 0.05, 0.05, 0.3)
    found = {"sqlite": [told] * 3, "a local server": [told] * 3}
    found |= {tracked._untold(name): [wall] * 3 for name in tuple(found)}
    control, share, own, told_of, around, *_ = tracked._figures(found, 50)
    assert control.median == 1 and control.met
    assert share.median == pytest.approx(2.0) and share.goal == 1 and not share.met
    assert own.median == pytest.approx(1.0) and own.met is None
    assert told_of.median == pytest.approx(1000) and around.median == pytest.approx(0.3)


def test_the_server_answers_and_stops(tmp_path):
    with tracked.server(tmp_path) as url:
        assert requests.get(f"{url}/health", timeout=5).ok
    with pytest.raises(requests.ConnectionError):
        requests.get(f"{url}/health", timeout=5)


def test_a_workplace_leaves_nothing_behind(tmp_path):
    before, place = dict(os.environ), os.getcwd()
    with tracked.workplace(tmp_path, MLFLOW_TRACKING_URI="sqlite:///x.db"):
        os.environ["ADDED"] = "1"
        assert os.getcwd() == str(tmp_path) and os.environ["WORKBENCH_STATE"] == str(tmp_path / "state")
    assert dict(os.environ) == before and os.getcwd() == place


def test_timers_count_and_are_taken_off_again(tiny_model):
    backend = models.load(str(tiny_model), CPU)
    with sides.timed(backend, "encode_text") as spent:
        backend.encode_text(["a fox"])
    assert spent["encode_text"] > 0 and "encode_text" not in vars(backend)
    before = tracking.load_runs
    with sides.timed(tracking, "load_runs"):
        assert tracking.load_runs is not before
    assert tracking.load_runs is before


def test_diagnostics_are_set_against_their_own_forwards(workplace, tiny_backend):
    diagnose, forwards = sides.passes(tiny_backend, SHAPES["tiny"], 40)
    with sides.timed(tiny_backend, "denoise") as spent:
        forwards()
    assert spent["denoise"] > 0
    counts = {name: value for name, value in diagnose().items() if name.startswith("timestep_count/")}
    assert len(counts) == 10 and sum(counts.values()) == 3 * 40


def test_the_timed_encoding_is_the_encoding(tiny_model, tmp_path):
    backend, file = models.load(str(tiny_model), CPU), sides.pairs_file(tmp_path / "pairs.parquet", 12)
    shares = sides.encoding_shares(backend, file, 2)
    assert len(shares) == 2 and all(0 < share < 100 for share in shares)
    plain = encode(open_rows(str(file), "train"), backend, into=tmp_path / "plain")
    with sides.timed(backend, "encode_images", "encode_text"):
        counted = encode(open_rows(str(file), "train"), backend, into=tmp_path / "timed")
    assert len(plain) == 12 and plain.digest == counted.digest
    for name, tensor in plain.shards[0].items():
        assert torch.equal(tensor, counted.shards[0][name])


def test_large_pairs_are_large(tmp_path):
    rows = open_rows(str(sides.pairs_file(tmp_path / "pairs.parquet", 1, edge=96)), "train")
    (row,) = next(rows.chunks(4))[0]
    assert row["jpg_0"][:3] == b"\xff\xd8\xff" and len(row["jpg_1"]) > 1000


def test_a_command_that_fails_is_no_measurement():
    with pytest.raises(RuntimeError, match="no_such_command"):
        sides._python("workbench.no_such_command")


@pytest.mark.parametrize("runs", [4, pytest.param(22, marks=pytest.mark.slow)])
def test_an_invented_study_suits_the_notebooks(runs, options, empty_store):
    options.place.mkdir()
    stores = {
        "MLFLOW_TRACKING_URI": f"sqlite:///{shutil.copy(empty_store, options.place / 'mlflow.db')}",
        "WORKBENCH_STORAGE": f"sqlite:///{options.place / 'optuna.db'}",
    }
    with tracked.workplace(options.place, **stores, MPLBACKEND="agg"):
        sides.invent("bench", runs, steps=16)
        assert len(tracking.load_runs("bench")) == runs
        done, took, reading = sides.draw_all("bench", options.place / "figures")
    every = sorted(path.stem for path in shipped("notebooks").glob("*.ipynb"))
    assert done == (every if runs > 20 else ["divergence", "imbalance", "search"])
    assert 0 < reading < took and (options.place / "figures" / "search.png").is_file()


def test_costs_that_grow_are_measured_drawn_and_kept(options):
    found = [
        growth.batches(CPU, (1, 2), 2, model="tiny"),
        growth.resolutions(CPU, (8, 16), 2),
        growth.trials(options.place, (5, 10), 2),
        *growth.passes(options, (5, 10), (20, 40), 2, model="tiny"),
    ]
    assert [one.x for one in found] == [(1, 2), (8, 16), (5, 10), (5, 10), (20, 40)]
    for one in found:
        assert all(0 < a <= b <= c for a, b, c in zip(one.low, one.median, one.high, strict=True))
    again = [growth.Series.from_dict(one) for one in json.loads(json.dumps([one.as_dict() for one in found]))]
    assert again == found
    path = options.place / "reports" / "growth.png"
    growth.draw(found, path)
    assert path.stat().st_size > 10_000
