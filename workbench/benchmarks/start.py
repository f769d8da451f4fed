"""How long it takes until a command says what it can do."""

from collections.abc import Iterator
from functools import partial

from workbench.benchmarks.figure import Figure, Options, figure
from workbench.benchmarks.sandbox import run_command
from workbench.benchmarks.timing import in_turn


def start(options: Options, runs: int = 10) -> Iterator[Figure]:
    """Seconds of `python -m workbench.sweep --help`, each time in a fresh process."""
    work = partial(run_command, "workbench.sweep", "--help", quiet=True)
    took = in_turn(work, repeats=max(runs, options.repeats), warm=1)[0]
    yield figure("start", "python -m workbench.sweep --help", took, 0.5, unit="s", note="files in the system's cache")
