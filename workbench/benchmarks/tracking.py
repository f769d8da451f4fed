"""What tracking costs: training steps whose numbers go to a tracking store, against steps that are not tracked."""

import os
import threading
import time
from collections import deque
from collections.abc import Iterator, Mapping
from contextlib import ExitStack
from itertools import count, islice
from typing import NamedTuple

import numpy as np
import torch

from workbench.benchmarks import timing
from workbench.benchmarks.figure import Figure, Options, control, figure
from workbench.benchmarks.sandbox import sandbox, temporary_folder
from workbench.benchmarks.step import loop, open_model
from workbench.benchmarks.tracking_server import TrackingServer
from workbench.method.noise import bucket_names
from workbench.models import Backend, Shape
from workbench.tracking import Client, Tracker, connect, tags
from workbench.training.loop import StepRecord

GROUP = "tracking"
METRICS, EVERY = 40, 10  # numbers of each step, and steps between the numbers of the buckets
FLUSH = 20  # steps whose numbers, 900 of them, the tracker delivers at once
LEAD = 5  # steps before untracked ones that are measured, since the tracked ones before slow the first


class Chunk(NamedTuple):
    """What some training steps took.

    Attributes:
        wall: seconds.
        logging: of those, inside of `Tracker.log`.
        delivering: seconds of a processor that the delivering thread took meanwhile.
        around: seconds in which the run began and ended.
    """

    wall: float
    logging: float = 0.0
    delivering: float = 0.0
    around: float = 0.0


def tracking(
    options: Options, seconds: float = 8.0, backend: Backend | None = None, shape: Shape | None = None
) -> Iterator[Figure]:
    """Steps of the small model, 8 pairs each, tracked in sqlite and by a local server, and untracked, in turn.

    Args:
        seconds: that a chunk of steps takes at least; several times what the tracker keeps numbers back for.
        backend, shape: of another model.
    """
    if backend is None or shape is None:
        backend, shape = open_model("embedded", options.device)
    made = loop(backend, shape, pairs=8)
    records = made.training.records
    steps = _steps_in(records, seconds, options.device)
    with ExitStack() as stack:
        folder = stack.enter_context(temporary_folder(options.folder))
        stack.enter_context(sandbox(folder))
        server = stack.enter_context(TrackingServer(folder))
        stores = {"sqlite": f"sqlite:///{folder / 'tracking.db'}", "a local server": server.url}
        clients = {}
        for name, uri in stores.items():
            os.environ["MLFLOW_TRACKING_URI"] = uri
            clients[name] = connect()
            # EVERY steps, so that the numbers of the buckets are delivered once, too.
            tracked(clients[name], records, EVERY, 0, options.device)  # the first delivery opens what later ones use
        chunks: dict[str, list[Chunk]] = {name: [] for name in (*stores, *map(_untracked, stores))}
        for _ in range(max(4, options.repeats // 3)):
            for name, client in clients.items():
                chunks[_untracked(name)].append(untracked(records, steps, options.device))
                # The client knows its store; where artifacts go, the tracker asks the environment.
                os.environ["MLFLOW_TRACKING_URI"] = stores[name]
                chunks[name].append(tracked(client, records, steps, FLUSH, options.device))
    yield from _figures(chunks, steps)


def _untracked(name: str) -> str:
    return f"before {name}"


def _figures(chunks: Mapping[str, list[Chunk]], steps: int) -> Iterator[Figure]:
    values = {name: np.array(measured).T for name, measured in chunks.items()}
    names = [name for name in values if _untracked(name) in values]
    first, second = (values[_untracked(name)][0] for name in names)
    yield control(GROUP, "control: training steps against themselves", second / first)
    untracked = (first + second) / 2
    for name in names:
        wall, logging, delivering, around = values[name]
        share, most = 100 * (wall / untracked - 1), 100 * (logging + delivering) / untracked
        yield figure(GROUP, f"tracking to {name}, share of training time", share, 0.5, unit="%", note=f"{steps} steps")
        at_most = "were nothing of it done beside the training"
        yield figure(GROUP, f"tracking to {name}, its own processor time", most, None, unit="%", note=at_most)
        yield figure(GROUP, f"tracking to {name}, telling of a step", 1e6 * logging / steps, None, unit="us")
        yield figure(GROUP, f"tracking to {name}, begin and end of a run", around, None, unit="s")


def untracked(records: Iterator[StepRecord], steps: int, device: torch.device) -> Chunk:
    """Take steps without tracking them."""
    deque(islice(records, LEAD), 0)
    return Chunk(timing.seconds(lambda: deque(islice(records, steps), 0), device))


def tracked(client: Client, records: Iterator[StepRecord], steps: int, lead: int, device: torch.device) -> Chunk:
    """Take steps and log each to a run of its own; all is delivered before this returns.

    Args:
        lead: steps before those that are measured. Their numbers are delivered among those, as the numbers of as many
            last steps are delivered after them.
    """
    step_metrics = {f"train/metric-{i:02d}": 0.1 * i for i in range(METRICS)}
    quantities = ("loss", "reward", "margin", "accuracy", "divergence")
    of_buckets = {f"timestep_{q}/{name}": 0.5 for q in quantities for name in bucket_names(10, 1000)}
    began = time.perf_counter()
    tracker = Tracker(client, "bench", params={"bench": True}, tags={tags.KIND: "bench"})
    around, logging, begin, busy = time.perf_counter() - began, 0.0, 0.0, 0.0
    for step in range(1, lead + steps + 1):
        if step == lead + 1:
            timing.wait(device)
            logging, begin, busy = 0.0, time.perf_counter(), _delivering()
        next(records)
        before = time.perf_counter()
        tracker.log(step, step_metrics | of_buckets if step % EVERY == 0 else step_metrics)
        logging += time.perf_counter() - before
    timing.wait(device)
    end, busy = time.perf_counter(), _delivering() - busy
    tracker.close("complete")
    return Chunk(end - begin, logging, busy, around + time.perf_counter() - end)


def _delivering() -> float:
    """Seconds of a processor that the tracker's thread has taken so far."""
    (thread,) = (thread for thread in threading.enumerate() if thread.name == "tracking")
    assert thread.ident is not None
    return time.clock_gettime(time.pthread_getcpuclockid(thread.ident))


def _steps_in(records: Iterator[StepRecord], seconds: float, device: torch.device) -> int:
    """The number of steps that take at least so many seconds, in whole deliveries."""
    untracked(records, 5, device)
    one = untracked(records, 10, device).wall / 10
    return next(n for n in count(FLUSH, FLUSH) if n * one >= seconds)
