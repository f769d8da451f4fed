"""How workers share a sweep."""

from collections.abc import Iterator
from functools import partial

from workbench.benchmarks import sandbox
from workbench.benchmarks.figure import Figure, Options, figure
from workbench.benchmarks.timing import seconds

TRIALS = "sweep.trials=4"


def workers(options: Options) -> Iterator[Figure]:
    """The arms of the default sweep by one worker and by two: whole commands, start and end included."""
    ratios, alone = [], []
    for _ in range(max(1, options.sweeps // 2)):
        took = []
        for number in (1, 2):
            with sandbox.temporary_folder(options.folder) as folder:  # a finished sweep would not run again
                run = partial(sandbox.sweep, folder, f"{number}-workers", "default.toml", number, TRIALS)
                took.append(seconds(run))
        # Both take the same trials, so the ratio of times is that of throughputs.
        ratios.append(took[0] / took[1])
        alone.append(took[0])
    yield figure("workers", "default sweep, its four arms: throughput of 2 workers over 1", ratios, 1.85, at_least=True)
    yield figure("workers", "default sweep, its four arms, by 1 worker", alone, None, unit="s")
