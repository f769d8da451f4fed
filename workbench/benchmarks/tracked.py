"""What tracking costs: training steps that are told to a tracking store against steps that are not."""

import os
import signal
import socket
import subprocess
import sys
import threading
import time
from collections import deque
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from itertools import count, islice
from pathlib import Path
from typing import NamedTuple

import numpy as np
import requests
import torch

from workbench.benchmarks import timing
from workbench.benchmarks.commands import folder, workplace
from workbench.benchmarks.figure import Figure, Options, control, figure
from workbench.benchmarks.step import loop, open_model
from workbench.method.noise import bucket_names
from workbench.models import Backend, Shape
from workbench.tracking import Client, Tracker, connect, tags
from workbench.training.loop import StepRecord

GROUP = "tracking"
METRICS, EVERY = 40, 10  # numbers of each step, and steps between the numbers of the buckets
FLUSH = 20  # steps whose numbers, 900 of them, the tracker delivers at once
LEAD = 5  # steps before untold ones that are measured, since what was done before slows the first


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
    """Steps of the small model, 8 pairs each, told to sqlite and to a local server, and untold, in turn.

    Args:
        seconds: that a chunk of steps takes at least; several times what the tracker keeps numbers back for.
        backend, shape: of another model.
    """
    if backend is None or shape is None:
        backend, shape = open_model("embedded", options.device)
    made = loop(backend, shape, pairs=8)
    records = made.started.records
    steps = _steps_in(records, seconds, options.device)
    with ExitStack() as stack:
        place = Path(stack.enter_context(folder(options.place)))
        stack.enter_context(workplace(place))
        stores = {"sqlite": f"sqlite:///{place / 'tracking.db'}", "a local server": stack.enter_context(server(place))}
        clients = {}
        for name, uri in stores.items():
            os.environ["MLFLOW_TRACKING_URI"] = uri
            clients[name] = connect()
            tracked(clients[name], records, EVERY, 0, options.device)  # the first delivery opens what later ones use
        found: dict[str, list[Chunk]] = {name: [] for name in (*stores, *map(_untold, stores))}
        for _ in range(max(4, options.repeats // 3)):
            for name, client in clients.items():
                found[_untold(name)].append(untracked(records, steps, options.device))
                os.environ["MLFLOW_TRACKING_URI"] = stores[name]
                found[name].append(tracked(client, records, steps, FLUSH, options.device))
    yield from _figures(found, steps)


def _untold(name: str) -> str:
    return f"before {name}"


def _figures(found: Mapping[str, list[Chunk]], steps: int) -> Iterator[Figure]:
    values = {name: np.array(chunks).T for name, chunks in found.items()}
    names = [name for name in values if _untold(name) in values]
    first, second = (values[_untold(name)][0] for name in names)
    yield control(GROUP, "control: training steps against themselves", second / first)
    untold = (first + second) / 2
    for name in names:
        wall, logging, delivering, around = values[name]
        share, most = 100 * (wall / untold - 1), 100 * (logging + delivering) / untold
        yield figure(GROUP, f"tracking to {name}, share of training time", share, 1.0, unit="%", note=f"{steps} steps")
        at_most = "were nothing of it done beside the training"
        yield figure(GROUP, f"tracking to {name}, its own processor time", most, None, unit="%", note=at_most)
        yield figure(GROUP, f"tracking to {name}, telling of a step", 1e6 * logging / steps, None, unit="us")
        yield figure(GROUP, f"tracking to {name}, begin and end of a run", around, None, unit="s")


def untracked(records: Iterator[StepRecord], steps: int, device: torch.device) -> Chunk:
    """Take steps and tell nobody."""
    deque(islice(records, LEAD), 0)
    return Chunk(timing.seconds(lambda: deque(islice(records, steps), 0), device))


def tracked(client: Client, records: Iterator[StepRecord], steps: int, lead: int, device: torch.device) -> Chunk:
    """Take steps and tell a run of its own of each; all is delivered before this returns.

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
        now = time.perf_counter()
        tracker.log(step, step_metrics | of_buckets if step % EVERY == 0 else step_metrics)
        logging += time.perf_counter() - now
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
    """So many steps that they take at least so long, in whole deliveries."""
    untracked(records, 5, device)
    one = untracked(records, 10, device).wall / 10
    return next(n for n in count(FLUSH, FLUSH) if n * one >= seconds)


@contextmanager
def server(place: Path, patience: float = 120.0) -> Iterator[str]:
    """A tracking server on this machine alone, and its address; it has stopped when the context ends.

    Args:
        place: gets its database, its artifacts and its log.
        patience: seconds for its start.
    Raises:
        RuntimeError: it does not start; with what it said.
    """
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    environment = {name: value for name, value in os.environ.items() if name != "MLFLOW_TRACKING_URI"} | {
        "MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false",
        "MLFLOW_BACKEND_STORE_URI": f"sqlite:///{place / 'server.db'}",
        "MLFLOW_DISABLE_TELEMETRY": "true",
    }
    where = ["--host", "127.0.0.1", "--port", str(port), "--workers", "1"]
    said = place / "server.log"
    with said.open("ab") as log:
        process = subprocess.Popen(
            [sys.executable, "-m", "mlflow", "server", *where, "--artifacts-destination", str(place / "artifacts")],
            cwd=place, env=environment, stdout=log, stderr=log, start_new_session=True,
        )  # fmt: skip
    url = f"http://127.0.0.1:{port}"
    try:
        deadline = time.monotonic() + patience
        while not _answers(url):
            if process.poll() is not None or time.monotonic() > deadline:
                raise RuntimeError(f"the tracking server does not start: {said.read_text()[-2000:]}")
            time.sleep(0.2)
        yield url
    finally:
        _stop(process)


def _answers(url: str) -> bool:
    try:
        return requests.get(f"{url}/health", timeout=5).ok
    except requests.RequestException:
        return False


def _stop(process: subprocess.Popen) -> None:
    """End a process and those that it started, in a session of its own: asked first, then told."""
    for how, patience in ((signal.SIGTERM, 15), (signal.SIGKILL, 60)):
        try:
            os.killpg(process.pid, how)
            process.wait(patience)
        except ProcessLookupError:
            break
        except subprocess.TimeoutExpired:
            continue
    process.poll()
