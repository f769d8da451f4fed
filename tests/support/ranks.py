"""A run on several processes, and what each of them saw."""

import json
import os
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

from tests.support import forked, runs
from tests.support.commands import invoke
from tests.support.postgres import free_port
from workbench.common import distributed
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
