"""How costs grow: with the batch, the resolution, the trials of a study, and the diagnostics' buckets and pairs."""

import multiprocessing
import time
import warnings
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from workbench.benchmarks import diagnostics
from workbench.benchmarks.figure import Options
from workbench.benchmarks.sandbox import EXPERIMENTS, sandbox, temporary_folder
from workbench.benchmarks.step import loop, open_model
from workbench.benchmarks.timing import in_turn
from workbench.models import SHAPES, random_backend
from workbench.studies.experiment import Experiment
from workbench.studies.synthetic import LongStudy
from workbench.training.experiment_file import read

BATCHES, LATENTS, TRIALS = (1, 2, 4, 8, 16, 32), (8, 16, 32, 64), (5, 50, 200, 500)
BUCKETS, PAIRS = (5, 10, 20, 50), (50, 100, 200)
AT_ONCE = 4  # pairs of a step where the resolution grows
WORKERS, LASTING = (1, 2, 3, 4), 8.0  # seconds that they train side by side
DEFAULT = EXPERIMENTS / "default.toml"


@dataclass(frozen=True)
class Series:
    """A cost at several sizes of what it grows with.

    Attributes:
        unit: of the cost.
        x_name: what grows, with its unit.
        median, low, high: of the measurements at each x: 50th, 10th and 90th percentile.
    """

    name: str
    unit: str
    x_name: str
    x: tuple[float, ...]
    median: tuple[float, ...]
    low: tuple[float, ...]
    high: tuple[float, ...]

    def as_dict(self) -> dict[str, Any]:
        """The series as growth.json holds it."""
        return asdict(self)

    @classmethod
    def from_dict(cls, kept: dict[str, Any]) -> "Series":
        """The series that `as_dict` described, also after it was JSON."""
        values: dict[str, Any] = {k: tuple(v) if isinstance(v, list) else v for k, v in kept.items()}
        return cls(**values)


def series(name: str, unit: str, x_name: str, x: Sequence[float], values: NDArray[np.float64]) -> Series:
    """The median and spread of measurements, shape (len(x), repeats), as a series."""
    low, median, high = (tuple(row.tolist()) for row in np.percentile(np.asarray(values, float), [10, 50, 90], axis=1))
    return Series(name, unit, x_name, tuple(x), median, low, high)


def growth(options: Options) -> list[Series]:
    """Measure every series."""
    few = max(3, options.repeats // 5)
    return [
        batches(options.device, BATCHES, options.repeats),
        resolutions(options.device, LATENTS, max(3, options.repeats // 2)),
        trials(options.folder, TRIALS, options.repeats),
        *passes(options, BUCKETS, PAIRS, few),
        workers(options.device, WORKERS, few),
    ]


def batches(device: torch.device, sizes: Sequence[int], repeats: int, model: str = "embedded") -> Series:
    """Milliseconds a pair of a training step, by pairs a step.

    Args:
        model: "embedded", or the name of a shape.
    """

    runs = [loop(*open_model(model, device), pairs=size) for size in sizes]
    took = in_turn(*(run.step for run in runs), repeats=repeats, device=device, name="batch")
    name = f"training step, {'small model' if model == 'embedded' else model}"
    return series(name, "ms a pair", "pairs a step", sizes, 1e3 * took / np.array(sizes)[:, None])


def resolutions(device: torch.device, edges: Sequence[int], repeats: int) -> Series:
    """Milliseconds a pair of a training step of the smallest shape, by the edge of its latents."""

    shapes = [replace(SHAPES["tiny"], denoiser={**SHAPES["tiny"].denoiser, "sample_size": edge}) for edge in edges]
    runs = [loop(random_backend(shape, device), shape, pairs=AT_ONCE) for shape in shapes]
    took = in_turn(*(run.step for run in runs), repeats=repeats, device=device, name="resolution")
    name = f"training step, untrained UNet, {AT_ONCE} pairs"
    return series(name, "ms a pair", "edge of the latents", edges, 1e3 * took / AT_ONCE)


def trials(parent: Path, counts: Sequence[int], repeats: int) -> Series:
    """Milliseconds until a worker of the default study has its next trial, by finished trials; in sqlite.

    What is timed: the lock of the database, the search for dead workers, the sampler's choice of all settings.
    """
    experiment = Experiment.resolve(read(DEFAULT))
    with temporary_folder(parent) as folder, warnings.catch_warnings():
        warnings.simplefilter("ignore")  # Optuna: the trials have no heartbeat
        studies = [LongStudy(experiment, f"sqlite:///{folder}/{count}.db", count) for count in counts]
        took = in_turn(*(study.next_trial for study in studies), repeats=repeats, warm=1, name="trials")
    return series("next trial of a study", "ms", "finished trials", counts, 1e3 * took)


def passes(
    options: Options, buckets: Sequence[int], pairs: Sequence[int], repeats: int, model: str = "embedded"
) -> list[Series]:
    """Seconds of a full pass of the diagnostics, by buckets (all pairs) and by pairs (10 buckets)."""

    backend, shape = open_model(model, options.device)
    with temporary_folder(options.folder) as folder, sandbox(folder):

        def work(count: int, edges: int = 10) -> Callable:
            return diagnostics.passes(backend, shape, count, edges)[0]

        measure = partial(in_turn, repeats=repeats, device=options.device, warm=0, name="diagnostics")
        by_buckets = measure(*(work(max(pairs), edges) for edges in buckets))
        by_pairs = measure(*(work(count) for count in pairs))
    return [
        series(f"diagnostics, {max(pairs)} pairs", "s a full pass", "buckets", buckets, by_buckets),
        series("diagnostics, 10 buckets", "s a full pass", "pairs", pairs, by_pairs),
    ]


def workers(device: torch.device, counts: Sequence[int], repeats: int, model: str = "embedded") -> Series:
    """Training steps a second of processes that train side by side, each on its own, all together."""
    # Spawned: a forked process can neither use CUDA nor the threads that torch has started.
    context, rates = multiprocessing.get_context("spawn"), []
    for count in counts:
        ready, pipes = context.Barrier(count), [context.Pipe(duplex=False) for _ in range(count)]
        processes = [context.Process(target=_train, args=(model, device, ready, repeats, pipe)) for _, pipe in pipes]
        for process in processes:
            process.start()
        # Before join: a process ends only when what it sent has been read.
        rates.append(np.sum([reader.recv() for reader, _ in pipes], axis=0))
        for process in processes:
            process.join()
    return series("training, 8 pairs a step", "steps a second, all workers", "workers", counts, np.array(rates))


def _train(model: str, device: torch.device, ready: Any, repeats: int, pipe: Any) -> None:
    """Send how many steps a second this process takes, each time beginning together with the others."""
    # One thread each, or the processes would compete for the cores that they are to share.
    torch.set_num_threads(1)
    run, rates = loop(*open_model(model, device), pairs=8), []
    run.step()
    for _ in range(repeats):
        # The barrier: each measurement is of processes that all train, and not of one whose neighbours still load.
        ready.wait()
        begin, steps = time.perf_counter(), 0
        while time.perf_counter() - begin < LASTING:
            run.step()
            steps += 1
        rates.append(steps / (time.perf_counter() - begin))
    pipe.send(rates)


def draw(shown: Sequence[Series], path: Path) -> None:
    """One figure, a panel a series: medians, and bars from the 10th to the 90th percentile."""
    from matplotlib.figure import Figure
    from matplotlib.ticker import FixedLocator, FuncFormatter, LogLocator, NullLocator, ScalarFormatter

    columns = min(3, len(shown))
    rows = -(-len(shown) // columns)
    figure = Figure(figsize=(3.6 * columns, 2.9 * rows), layout="constrained")
    for place, one in enumerate(shown, 1):
        axes: Any = figure.add_subplot(rows, columns, place)
        low, median, high = (np.array(values) for values in (one.low, one.median, one.high))
        bars = np.maximum(0, [median - low, high - median])
        axes.errorbar(one.x, median, bars, fmt="o-", markersize=4, linewidth=1, capsize=2)
        if max(one.x) >= 8 * min(one.x):
            axes.set_xscale("log")
        axes.xaxis.set_major_locator(FixedLocator(one.x))
        axes.xaxis.set_minor_locator(NullLocator())
        axes.xaxis.set_major_formatter(ScalarFormatter())
        if max(high) >= 5 * min(low) > 0:
            axes.set_yscale("log")
            axes.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
            axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
            axes.yaxis.set_minor_locator(NullLocator())
        else:
            axes.set_ylim(0, 1.15 * max(high))
        axes.set(title=one.name, xlabel=one.x_name, ylabel=one.unit)
        axes.title.set_size("medium")
        axes.grid(alpha=0.3, which="both", linewidth=0.5)
    figure.savefig(path, dpi=150, format="png")
