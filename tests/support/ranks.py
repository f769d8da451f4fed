"""A run on several processes, and what each of them saw."""

import json
import os
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch.distributed.algorithms.ddp_comm_hooks.default_hooks import allreduce_hook

from tests.support import forked, runs
from tests.support.commands import invoke
from tests.support.postgres import free_port
from workbench.benchmarks.measurement import build_on, random_pairs
from workbench.common import distributed
from workbench.models import SHAPES, random_backend
from workbench.training.config import resolve
from workbench.training.snapshots import Snapshots


class Heard:
    """A listener that remembers."""

    def __init__(self):
        self.metrics, self.tables = {}, {}

    def log(self, step, metrics):
        self.metrics.setdefault(step, {}).update(metrics)

    def image(self, key, step, pixels):
        pass

    def picture(self, file, pixels):
        self.tables[file] = pixels.astype(float).mean()

    def table(self, file, columns):
        self.tables[file] = {name: list(values) for name, values in columns.items()}

    def artifact(self, path, folder=None):
        pass


def _rank(folder: Path, settings: dict, last: int) -> None:
    """The body of one process: writes FOLDER/RANK.json, or ends without a word after step `last`."""

    def on_step(step, news):
        if step == last:
            os._exit(0)

    heard, snapshots = Heard(), Snapshots(folder / "snapshots", interval=2)
    runs.run(settings, heard, save_to=folder / "trained", snapshots=snapshots, on_step=on_step)
    found = {"metrics": heard.metrics, "tables": heard.tables}
    (folder / f"{distributed.rank()}.json").write_text(json.dumps(found))


def _invoked(folder: Path, command: list[str]) -> None:
    """The body of one process that runs a command: writes FOLDER/RANK.json."""
    done = invoke(*command)
    (folder / f"{os.environ['RANK']}.json").write_text(json.dumps([done.returncode, done.stdout, done.stderr]))


def _start(target: Callable, folder: Path, *arguments: Any, count: int) -> list[int | None]:
    """Call a function on so many processes, as `torchrun` starts them; their exit codes."""
    environment = {"WORKBENCH_CACHE": str(folder / "cache"), "WORLD_SIZE": str(count)}
    environment |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port())}
    processes = [
        forked.start(target, folder, *arguments, RANK=str(rank), LOCAL_RANK=str(rank), **environment)
        for rank in range(count)
    ]
    for process in processes:
        process.join(300)
        process.kill()
    return [process.exitcode for process in processes]


def run(settings: dict, folder: Path, count: int, last: int = 0) -> list[dict]:
    """Train on so many processes, with snapshots every second step.

    Args:
        folder: gets the trained model and the snapshots, from which a second call goes on.
        last: end all processes after this step; 0 = train to the end.
    Returns:
        Metrics and tables of each process; nothing where `last` is given.
    """
    folder.mkdir(exist_ok=True)
    ended = _start(_rank, folder, settings, last, count=count)
    if last:  # a process that ends after the others may fail for their silence
        return []
    assert ended == [0] * count, ended
    return [json.loads((folder / f"{rank}.json").read_text()) for rank in range(count)]


def run_command(folder: Path, *command: str, count: int = 2) -> list[subprocess.CompletedProcess]:
    """Run a command, a name and its arguments, on so many processes."""
    ended = _start(_invoked, folder, [*command], count=count)
    assert ended == [0] * count, ended
    results = [json.loads((folder / f"{rank}.json").read_text()) for rank in range(count)]
    return [subprocess.CompletedProcess(command, *result) for result in results]


def _counted(folder: Path, cases: list[tuple[str, int]]) -> None:
    """The body of one process: steps of the tiny shape; FOLDER/RANK.json gets what the second gave to collectives.

    Args:
        cases: "ddp" or "fsdp", and passes of the step.
    """
    found = dict.fromkeys(("reduced", "gathered", "scattered"), 0)
    wrap = distributed.wrap

    def reduce(_: Any, bucket: torch.distributed.GradBucket) -> torch.futures.Future[torch.Tensor]:
        found["reduced"] += bucket.buffer().nbytes
        return allreduce_hook(torch.distributed.group.WORLD, bucket)

    def wrapped(*args: Any, **named: Any) -> torch.nn.Module:
        model = wrap(*args, **named)
        if isinstance(model, torch.nn.parallel.DistributedDataParallel):
            model.register_comm_hook(None, reduce)  # its own calls are not Python's
        return model

    def watch(name: str, kind: str) -> None:
        real = getattr(torch.distributed, name)

        def watched(*args: Any, **named: Any) -> Any:
            # The larger of input and output is the whole, the other one a process's part.
            found[kind] += max(x.nbytes for x in (*args, *named.values()) if isinstance(x, torch.Tensor))
            return real(*args, **named)

        setattr(torch.distributed, name, watched)

    torch.set_num_threads(1)
    shape, cpu, all_found = SHAPES["tiny"], torch.device("cpu"), []
    distributed.wrap = wrapped
    watch("all_gather_single", "gathered")
    watch("reduce_scatter_single", "scattered")
    backend = random_backend(shape, cpu)
    for how, accumulation in cases:
        settings = {"train.batch_size": 1, "train.accumulation": accumulation, "train.steps": 2, "train.warmup": 0}
        settings |= {"train.parallel": how, "reference.policy": "frozen", "diagnostics.probe": 4}
        training = build_on(resolve(settings), backend, random_pairs(shape, backend, 8))
        next(training.records)
        found |= dict.fromkeys(found, 0)
        next(training.records)
        all_found.append(dict(found))
    (folder / f"{distributed.rank()}.json").write_text(json.dumps(all_found))


def collectives(folder: Path, cases: list[tuple[str, int]]) -> list[list[dict[str, int]]]:
    """Bytes that each of two processes hands to all-reduces, all-gathers and reduce-scatters in a step of each case.

    Args:
        cases: "ddp" or "fsdp", and passes of the step.
    """
    assert _start(_counted, folder, cases, count=2) == [0, 0]
    return [json.loads((folder / f"{rank}.json").read_text()) for rank in range(2)]
