"""A run kept in a folder of its own, where there is no tracking store: metrics as parquet, pictures, tables."""

import json
import re
import shutil
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np

from workbench.common.errors import Failure
from workbench.common.files import in_place, noted, partial_file, remove, replace_folder

HISTORY, ABOUT = "history.parquet", "run.json"
#: Partial files and folders of what `RunFolder` writes, by their path in its folder: the history, the model, run.json
#: and tables, pictures, artifacts. A second random end has what is written by way of a file beside a partial one.
OWN_PARTIAL = re.compile(
    r"(history\.parquet|model|[^/]+\.(json|png)|[^/]+/\d{6,}\.png|artifacts/.+)(\.[0-9a-f]{32}\.partial)+"
)


def run_in(folder: Path) -> str | None:
    """The name of the run that a `RunFolder` keeps in a folder; None if it is no such folder."""
    try:
        return json.loads(noted(folder / ABOUT) or "null")["name"]
    except (ValueError, KeyError, TypeError):
        return None


class RunFolder:
    """A listener that writes what it hears of into a folder.

    `history.parquet` is one wide table, a row a step and a column a metric, as tracked runs have it. It is written
    anew, whole, every `seconds` and when the run is closed, so that a run that is killed leaves its metrics up to then.
    What such a run was about to write or to save is removed when its folder is opened again.

    Args:
        folder: made where it is missing.
        about: settings and versions, written as `run.json` at once.
    Raises:
        Failure: the folder cannot be written, or something that a killed run has left there cannot be removed.
    """

    def __init__(self, folder: Path, about: Mapping[str, Any], seconds: float = 60.0):
        self.folder, self.about, self.seconds = folder, dict(about), seconds
        self._rows: dict[int, dict[str, float]] = {}
        self._written = time.monotonic()
        self._clear()
        self._describe("running")

    def log(self, step: int, metrics: Mapping[str, float]) -> None:
        """Metrics of a step; several calls for one step are merged."""
        self._rows.setdefault(step, {}).update(metrics)
        if time.monotonic() - self._written > self.seconds:
            self._write_history()

    def image(self, key: str, step: int, pixels: np.ndarray) -> None:
        """A picture, (H, W, 3) uint8, as KEY/STEP.png."""
        self.picture(f"{key}/{step:06d}.png", pixels)

    def picture(self, file: str, pixels: np.ndarray) -> None:
        """A picture under a file's name, to the pixel."""
        from PIL import Image

        with self._file(file) as path:
            Image.fromarray(pixels).save(path, "PNG")

    def table(self, file: str, columns: Mapping[str, Any]) -> None:
        """A table as JSON, in pandas' "split" form."""
        rows = list(zip(*columns.values(), strict=True))
        with self._file(file) as path:
            path.write_text(json.dumps({"columns": list(columns), "data": rows}) + "\n", encoding="utf-8")

    def artifact(self, path: Path, folder: str | None = None) -> None:
        """A copy of a file or a folder, under `artifacts`, in place of the one that an earlier part of the run made."""
        name = f"artifacts/{folder or path.name}"
        if path.is_dir():
            with self._place(name) as place, partial_file(place) as partial:
                shutil.copytree(path, partial)
                replace_folder(partial, place)
        else:
            with self._file(name) as file:
                shutil.copyfile(path, file)

    def remove(self, folder: str) -> None:
        """Remove a copy that `artifact` made."""
        shutil.rmtree(self.folder / "artifacts" / folder, ignore_errors=True)

    def close(self, state: str, reason: str = "") -> bool:
        """Write the history and how the run ended; True, as nothing waits to be delivered."""
        # In this order: a folder whose state is no longer "running" has its whole history.
        self._write_history()
        self._describe(state, reason)
        return True

    def _clear(self) -> None:
        """Remove what a killed process has left of this run: whoever opens a run's folder is the only one at it.

        Also a trained model that was whole but not yet in its place: to come to the run's end again gives the same.

        Raises:
            Failure: a file cannot be removed.
        """
        # Not every partial below: another run may save its model into this folder, and keeps it beside its place whole.
        for left in [*self.folder.rglob("*.partial")]:
            if OWN_PARTIAL.fullmatch(left.relative_to(self.folder).as_posix()):
                try:
                    remove(left)
                except OSError as error:
                    raise Failure(f"{left}: cannot be removed ({error.strerror})") from None

    def _describe(self, state: str, reason: str = "") -> None:
        """Write `run.json`: the run's state, why it ended so, and what it was made with."""
        with self._file(ABOUT) as path:
            content = json.dumps({"state": state, "reason": reason} | self.about, indent=1, default=str)
            path.write_text(f"{content}\n", encoding="utf-8")

    def _write_history(self) -> None:
        import pyarrow
        import pyarrow.parquet

        names = sorted({name for row in self._rows.values() for name in row})
        steps = sorted(self._rows)
        columns: dict[str, Any] = {"step": pyarrow.array(steps, pyarrow.int64())}
        columns |= {name: pyarrow.array([self._rows[s].get(name) for s in steps], pyarrow.float64()) for name in names}
        # Written aside and moved: whoever reads meanwhile finds the table before, whole.
        with self._file(HISTORY) as path:
            pyarrow.parquet.write_table(pyarrow.table(columns), path)
        self._written = time.monotonic()

    @contextmanager
    def _file(self, name: str) -> Iterator[Path]:
        """Where to write a file, which is then moved to its name in the run's folder.

        Raises:
            Failure: it cannot be written.
        """
        with self._place(name) as path, in_place(path) as partial:
            yield partial

    @contextmanager
    def _place(self, name: str) -> Iterator[Path]:
        """The path of a file or folder in the run's folder, to be written within.

        Raises:
            Failure: it cannot be written.
        """
        path = self.folder / name
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            yield path
        except OSError as error:
            raise Failure(f"{path}: cannot be written ({error.strerror})") from None
