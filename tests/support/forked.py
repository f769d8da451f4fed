"""Processes that are forked from a server which has imported everything: clean, and there at once.

A process that starts from nothing spends 4 to 8 seconds of CPU on imports. The server itself trains nothing and has no
threads, so that what is forked from it is as it would be after its imports. It begins with the first test of a session
that needs it.
"""

import gc
import multiprocessing
import os
from collections.abc import Callable
from multiprocessing.context import ForkServerContext, ForkServerProcess
from typing import Any

import pytest

#: What a run or a worker imports, now or later; the names that cost the most are lazy ones of large packages.
IMPORTS = [
    "tests.support.commands",
    "tests.support.forked",
    "tests.support.unsynced",
    "accelerate",
    "alembic.command",
    "datasets",
    "diffusers.pipelines.stable_diffusion.pipeline_stable_diffusion",
    "mlflow.store.tracking.sqlalchemy_store",
    "optuna.storages._rdb.models",
    "peft",
    "scipy.stats",
    "transformers.models.clip.modeling_clip",
    "transformers.models.convnext.modeling_convnext",
    "transformers.models.vit.modeling_vit",
    "workbench.studies.attempt",
    "workbench.studies.workers",
]


def _run_in(environment: dict[str, str], target: Callable, arguments: tuple) -> None:
    """The body of a forked process: with this environment instead of the server's."""
    gc.freeze()  # what the server has imported is never garbage
    os.environ.clear()
    os.environ.update(environment)
    target(*arguments)


class _Process(ForkServerProcess):
    def __init__(self, *, target: Callable, args: tuple, environment: dict[str, str] | None = None):
        super().__init__(target=_run_in, args=(dict(os.environ) | (environment or {}), target, args))


class _Context(ForkServerContext):
    Process = _Process


_context = _Context()
_context.set_forkserver_preload(IMPORTS)


def start(target: Callable, *arguments: Any, **environment: str) -> multiprocessing.Process:
    """Call a module's function in a new process that starts in this one's working folder.

    Args:
        environment: variables that it has beside this process's.
    """
    process = _context.Process(target=target, args=arguments, environment=environment)
    process.start()
    return process


@pytest.fixture(autouse=True)
def forked_workers(monkeypatch: pytest.MonkeyPatch) -> None:
    """The workers of studies that this process runs are forked, where they would be spawned."""
    usual = multiprocessing.get_context

    def get_context(method: str | None = None) -> Any:
        return _context if method == "spawn" else usual(method)

    monkeypatch.setattr(multiprocessing, "get_context", get_context)
