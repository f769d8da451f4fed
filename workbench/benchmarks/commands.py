"""The workbench's own commands, run in a folder of their own with databases of their own."""

import os
import subprocess
import sys
from collections.abc import Iterator
from contextlib import chdir, contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory

from workbench.common import cache
from workbench.common.paths import PACKAGE, shipped

EXPERIMENTS = shipped("experiments")


def places(folder: Path) -> dict[str, str]:
    """Environment in which studies, tracking and snapshots lie in a folder, and encoded data where they always do."""
    return {
        "WORKBENCH_STORAGE": f"sqlite:///{folder / 'optuna.db'}",
        "MLFLOW_TRACKING_URI": f"sqlite:///{folder / 'mlflow.db'}",
        "WORKBENCH_STATE": str(folder / "state"),
        "WORKBENCH_CACHE": str(cache.folder()),
    }


@contextmanager
def folder(place: Path) -> Iterator[str]:
    """A folder that is there for a while."""
    place.mkdir(parents=True, exist_ok=True)
    with TemporaryDirectory(dir=place.resolve()) as name:
        yield name


@contextmanager
def workplace(place: Path, **environment: str) -> Iterator[None]:
    """Work in a folder that holds what is kept on disk; environment and working folder are as before afterwards."""
    before = dict(os.environ)
    own = {"WORKBENCH_STATE": str(place / "state"), "WORKBENCH_CACHE": str(place / "cache")}
    try:
        os.environ.update(own | environment)
        with chdir(place):
            yield
    finally:
        os.environ.clear()
        os.environ.update(before)


def call(folder: Path, *arguments: str, quiet: bool = False) -> None:
    """Run `python -m ARGUMENTS` there.

    Args:
        quiet: do not show what it prints, but for progress and errors.
    """
    folder.mkdir(parents=True, exist_ok=True)
    environment = os.environ | places(folder) | {"PYTHONPATH": str(PACKAGE.parent)}
    out = subprocess.DEVNULL if quiet else None
    subprocess.run([sys.executable, "-m", *arguments], cwd=folder, env=environment, stdout=out, check=True)


def sweep(folder: Path, study: str, file: str, workers: int, *settings: str) -> None:
    """Run a study of an experiment file, or go on with it."""
    options = [part for setting in settings for part in ("--set", setting)]
    asked = ("--study", study, "--workers", str(workers), *options)
    call(folder, "workbench.sweep", str(EXPERIMENTS / file), *asked, quiet=True)
