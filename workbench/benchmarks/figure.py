"""One line of the benchmark's table."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray


@dataclass(frozen=True)
class Options:
    """How to measure.

    Attributes:
        repeats: measurements of each ratio.
        device: of the models.
        folder: for what is made on the way, kept from one call of the command to the next.
        sweeps: measurements of what takes minutes: whole sweeps and runs.
        peers: public scripts to compare with, by name in `peers.PEERS`.
    """

    repeats: int
    device: torch.device
    folder: Path
    sweeps: int = 5
    peers: Mapping[str, Path] = field(default_factory=dict)


@dataclass(frozen=True)
class Figure:
    """A measured quantity against its goal.

    Attributes:
        group: of the table.
        median, low, high: of the measurements: 50th, 10th and 90th percentile.
        goal: what the median should at most be, or at least where `at_least`; None = there is none, and `met` is None.
        unit: "x" for a ratio, "%" for a share, "s", "steps", ...
        note: what a reader has to know, in a few words.
    """

    group: str
    name: str
    median: float
    low: float
    high: float
    goal: float | None
    met: bool | None
    unit: str = "x"
    at_least: bool = False
    note: str = ""

    def as_dict(self) -> dict[str, Any]:
        """The figure as bench.json holds it."""
        return asdict(self)


Group = Callable[[Options], Iterator[Figure]]


def figure(
    group: str,
    name: str,
    values: Sequence[float] | NDArray[np.float64],
    goal: float | None,
    *,
    unit: str = "x",
    at_least: bool = False,
    note: str = "",
) -> Figure:
    """The median and spread of measurements, as a figure."""
    low, median, high = (float(v) for v in np.percentile(np.asarray(values, float), [10, 50, 90]))
    met = None if goal is None else bool(median >= goal if at_least else median <= goal)
    return Figure(group, name, median, low, high, goal, met, unit, at_least, note)


def control(group: str, name: str, values: Sequence[float] | NDArray[np.float64]) -> Figure:
    """The ratio of a work to itself: what the machine's own noise makes of 1; met within 2 %."""
    ratio = figure(group, name, values, 1.02)
    # A control misses on both sides of 1; `figure` judges one.
    return replace(ratio, met=abs(ratio.median - 1) <= 0.02)
