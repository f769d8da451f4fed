"""Who hears of a run, and a listener that can tell it all again."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch


class Listener(Protocol):
    """Who hears of a run: `tracking.Tracker`, or a test's list."""

    def log(self, step: int, metrics: Mapping[str, float]) -> None:
        """Metrics of a step."""

    def image(self, key: str, step: int, pixels: np.ndarray) -> None:
        """A picture, (H, W, 3) uint8."""

    def picture(self, file: str, pixels: np.ndarray) -> None:
        """A picture under a file's name, to the pixel."""

    def table(self, file: str, columns: Mapping[str, Any]) -> None:
        """A table by columns."""

    def artifact(self, path: Path, folder: str | None = None) -> None:
        """A file or a folder, which the run keeps under a folder's name."""


class Silence:
    """The listener of the processes that do not speak for the run."""

    def log(self, step: int, metrics: Mapping[str, float]) -> None:
        """Nothing."""

    def image(self, key: str, step: int, pixels: np.ndarray) -> None:
        """Nothing."""

    def picture(self, file: str, pixels: np.ndarray) -> None:
        """Nothing."""

    def table(self, file: str, columns: Mapping[str, Any]) -> None:
        """Nothing."""

    def artifact(self, path: Path, folder: str | None = None) -> None:
        """Nothing."""


class Told:
    """What a listener has been told step by step, so that one who comes later can be told it too.

    Attributes:
        last: the last value of every metric.
        events: ("log", step, metrics) and ("image", key, step, pixels as a tensor), in order; plain enough for a
            snapshot.
    """

    def __init__(self, listener: Listener):
        self.listener = listener
        self.last: dict[str, float] = {}
        self.events: list[tuple] = []

    def log(self, step: int, metrics: Mapping[str, float]) -> None:
        """Metrics of a step."""
        self.listener.log(step, metrics)
        self.last.update(metrics)
        self.events.append(("log", step, dict(metrics)))

    def image(self, key: str, step: int, pixels: np.ndarray) -> None:
        """A picture, (H, W, 3) uint8."""
        self.listener.image(key, step, pixels)
        self.events.append(("image", key, step, torch.from_numpy(pixels)))

    def again(self, events: list[tuple]) -> None:
        """Tell what was told by an earlier part of the run."""
        for kind, *what in events:
            if kind == "log":
                self.log(*what)
            else:
                key, step, pixels = what
                self.image(key, step, pixels.numpy())
