"""Folders with databases of their own, and the workbench's commands run in them: benchmarks touch nobody's studies."""

import os
import subprocess
import sys
from collections.abc import Iterator, Mapping
from contextlib import chdir, contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory

from workbench.common import cache
from workbench.common.paths import PACKAGE, cache_folder, shipped

EXPERIMENTS = shipped("experiments")


def databases(folder: Path) -> dict[str, str]:
    """Environment in which studies, tracking and snapshots lie in a folder; the cache stays where it is."""
    return {
        "WORKBENCH_STORAGE": f"sqlite:///{folder / 'optuna.db'}",
        "MLFLOW_TRACKING_URI": f"sqlite:///{folder / 'mlflow.db'}",
        "WORKBENCH_STATE": str(folder / "state"),
        "WORKBENCH_CACHE": str(cache_folder()),
    }


@contextmanager
def temporary_folder(parent: Path) -> Iterator[Path]:
    """A new folder below another, which is made where it is missing; removed when the context ends."""
    parent.mkdir(parents=True, exist_ok=True)
    with TemporaryDirectory(dir=parent.resolve()) as name:
        yield Path(name)


@contextmanager
def sandbox(folder: Path, **environment: str) -> Iterator[None]:
    """Work in a folder that holds snapshots and cache; environment and working folder are restored afterwards."""
    before = dict(os.environ)
    own = {"WORKBENCH_STATE": str(folder / "state"), "WORKBENCH_CACHE": str(folder / "cache")}
    try:
        os.environ.update(own | environment)
        with chdir(folder):
            yield
    finally:
        # Cleared first: the work may have set variables that were not there before.
        os.environ.clear()
        os.environ.update(before)


def of_checkout() -> dict[str, str]:
    """Environment in which Python finds the code of this checkout first, whatever folder a process runs in."""
    return {"PYTHONPATH": os.pathsep.join([str(PACKAGE.parent), *filter(None, [os.environ.get("PYTHONPATH")])])}


def run_command(
    *arguments: str, folder: Path | None = None, environment: Mapping[str, str] | None = None, quiet: bool = False
) -> None:
    """Run `python -m ARGUMENTS` in a process of its own, with the code of this checkout.

    Args:
        folder: to run in, made where it is missing; None = the working folder.
        environment: on top of this process's; None = the folder's own `databases`.
        quiet: do not show what it prints, but for progress and errors.
    Raises:
        CalledProcessError: it failed.
    """
    if environment is None:
        environment = databases(folder) if folder else {}
    if folder:
        folder.mkdir(parents=True, exist_ok=True)
    subprocess.run(
        [sys.executable, "-m", *arguments],
        cwd=folder,
        # In another folder Python would find an installed workbench or none.
        env=os.environ | environment | of_checkout(),
        stdout=subprocess.DEVNULL if quiet else None,
        check=True,
    )


def sweep(folder: Path, study: str, file: str, workers: int, *settings: str) -> None:
    """Run a study of an experiment file in a folder, or go on with it.

    Args:
        file: name in `experiments/`.
        settings: texts KEY=VALUE on top of the file's.
    """
    options = [part for setting in settings for part in ("--set", setting)]
    arguments = ("--study", study, "--workers", str(workers), *options)
    run_command("workbench.sweep", str(EXPERIMENTS / file), *arguments, folder=folder, quiet=True)


def experiment_digest(file: str) -> str:
    """Short digest of an experiment file, for a study's folder: a study of another file is another study."""
    return cache.digest((EXPERIMENTS / file).read_text("utf-8"))[:8]
