"""Commands run in this process, which has imported everything already, and worker processes that are forked from one.

A process of its own spends 4 to 8 seconds of CPU on imports before it does anything. What a signal, an exit or a crash
does to a command is seen in a process of its own alone: `tests.support.helpers.workbench`.
"""

import importlib
import json
import multiprocessing
import os
import signal
import subprocess
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from multiprocessing.context import ForkServerContext, ForkServerProcess
from typing import Any

import pytest
from click.testing import CliRunner

from tests.support.helpers import ROOT


@contextmanager
def signal_handlers_kept() -> Iterator[None]:
    """Put back the signal handlers that commands install."""
    before = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def invoke(command: str, *arguments: Any, **environment: str) -> subprocess.CompletedProcess:
    """Run `python -m workbench.COMMAND ARGUMENTS` in this process and working folder.

    Args:
        environment: variables that the command sees beside this process's.
    Raises:
        Exception: what a user would see as a traceback.
    """
    main = importlib.import_module(f"workbench.{command}").main
    with pytest.MonkeyPatch.context() as patch, signal_handlers_kept():
        for name, value in environment.items():
            patch.setenv(name, value)
        done = CliRunner().invoke(main, [str(argument) for argument in arguments])
    if done.exception is not None and not isinstance(done.exception, SystemExit):
        raise done.exception
    return subprocess.CompletedProcess([command, *arguments], done.exit_code, done.stdout, done.stderr)


def in_one_process(*commands: Sequence[str], **environment: str) -> list[subprocess.CompletedProcess]:
    """Run commands, each a name and its arguments, one after the other in one new process.

    For variables that libraries read when they are imported.
    """
    done = subprocess.run(
        [sys.executable, "-m", "tests.support.commands", json.dumps(commands)],
        env=os.environ | {"PYTHONPATH": str(ROOT)} | environment, capture_output=True, text=True, timeout=600,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    results = json.loads(done.stdout.splitlines()[-1])
    return [subprocess.CompletedProcess(command, *result) for command, result in zip(commands, results, strict=True)]


def _run_in(environment: dict[str, str], target: Any, arguments: tuple) -> None:
    """The body of a worker process, with its parent's environment instead of the fork server's."""
    os.environ.clear()
    os.environ.update(environment)
    target(*arguments)


class _Process(ForkServerProcess):
    def __init__(self, *, target: Any, args: tuple):
        super().__init__(target=_run_in, args=(dict(os.environ), target, args))


class _Context(ForkServerContext):
    """In place of multiprocessing's "spawn": as clean a process, without its imports."""

    Process = _Process


#: What a worker imports, now or later; the names that cost the most are lazy ones of large packages.
WORKER_IMPORTS = [
    "tests.support.commands",
    "alembic.command",
    "datasets",
    "diffusers.pipelines.stable_diffusion.pipeline_stable_diffusion",
    "mlflow.store.tracking.sqlalchemy_store",
    "optuna.storages._rdb.models",
    "peft",
    "scipy.stats",
    "transformers.models.clip.modeling_clip",
    "transformers.models.vit.modeling_vit",
    "workbench.studies.attempt",
    "workbench.studies.workers",
]


@pytest.fixture
def forked_workers(monkeypatch: pytest.MonkeyPatch) -> None:
    """The workers of studies in this process are forked from a server that has imported what they need."""
    context, usual = _Context(), multiprocessing.get_context
    context.set_forkserver_preload(WORKER_IMPORTS)
    monkeypatch.setattr(
        multiprocessing, "get_context", lambda method=None: context if method == "spawn" else usual(method)
    )


if __name__ == "__main__":
    ended = [invoke(*asked) for asked in json.loads(sys.argv[1])]
    print(json.dumps([(done.returncode, done.stdout, done.stderr) for done in ended]))
