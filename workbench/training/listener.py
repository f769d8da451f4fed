"""What a run reports to, and a recorder of what it has reported, from which a resumed run reports all of it again."""

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch


class Listener(Protocol):
    """What a run reports to: `tracking.Tracker`, `RunFolder`, or a test's list."""

    def log(self, step: int, metrics: Mapping[str, float]) -> None:
        """Metrics of a step; a step may have several calls, each metric one."""

    def image(self, key: str, step: int, pixels: np.ndarray) -> None:
        """A picture of a step, (H, W, 3) uint8."""

    def picture(self, file: str, pixels: np.ndarray) -> None:
        """A picture under a file's name, kept to the pixel."""

    def table(self, file: str, columns: Mapping[str, Any]) -> None:
        """A table by columns."""

    def artifact(self, path: Path, folder: str | None = None) -> None:
        """A file or a folder, which the run keeps under a folder's name."""

    def remove(self, folder: str) -> None:
        """Remove what `artifact` kept under a folder's name; nothing where there is none."""


class NullListener:
    """The listener of processes that do not report, since the main one does."""

    def log(self, step: int, metrics: Mapping[str, float]) -> None:
        """Ignored."""

    def image(self, key: str, step: int, pixels: np.ndarray) -> None:
        """Ignored."""

    def picture(self, file: str, pixels: np.ndarray) -> None:
        """Ignored."""

    def table(self, file: str, columns: Mapping[str, Any]) -> None:
        """Ignored."""

    def artifact(self, path: Path, folder: str | None = None) -> None:
        """Ignored."""

    def remove(self, folder: str) -> None:
        """Ignored."""


class Recorder:
    """Passes a run's metrics and step images on, and remembers them for snapshots.

    A run that resumes is tracked as a new run, which must have the history from its first step on. So a snapshot holds
    what was reported up to it, and `replay` reports that to the new run's listener.

    Attributes:
        last: the last value of every metric.
        events: ("log", step, metrics) and ("image", key, step, pixels as a tensor), in order; plain values, as
            snapshots need them.
    """

    def __init__(self, listener: Listener):
        self.listener = listener
        self.last: dict[str, float] = {}
        self.events: list[tuple] = []

    def log(self, step: int, metrics: Mapping[str, float]) -> None:
        """Metrics of a step."""
        self.listener.log(step, metrics)
        self.last.update(metrics)
        # A copy, as the caller may go on to change its own.
        self.events.append(("log", step, dict(metrics)))

    def image(self, key: str, step: int, pixels: np.ndarray) -> None:
        """A picture of a step, (H, W, 3) uint8."""
        self.listener.image(key, step, pixels)
        # A tensor: snapshots are read with weights_only, which refuses numpy arrays.
        self.events.append(("image", key, step, torch.from_numpy(pixels)))

    def replay(self, events: Iterable[tuple]) -> None:
        """Report the events of an earlier part of the run again."""
        for kind, *values in events:
            if kind == "log":
                self.log(*values)
            else:
                key, step, pixels = values
                self.image(key, step, pixels.numpy())
