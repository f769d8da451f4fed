"""How long commands take that a person waits for: `--help`, and how a large study stands."""

import resource
from collections.abc import Iterator
from functools import partial

from workbench.benchmarks.figure import Figure, Options, figure
from workbench.benchmarks.sandbox import EXPERIMENTS, databases, run_command, sandbox, temporary_folder
from workbench.benchmarks.timing import in_turn
from workbench.studies.experiment import Experiment
from workbench.studies.synthetic import finished_study
from workbench.training.experiment_file import read


def start(options: Options, runs: int = 10, trials: int = 500) -> Iterator[Figure]:
    """Seconds of `python -m workbench.sweep --help`, and of `study status` of many trials, each in a fresh process.

    Args:
        runs: of each, at least.
        trials: finished ones of the study.
    """
    work = partial(run_command, "workbench.sweep", "--help", quiet=True)
    took = in_turn(work, repeats=max(runs, options.repeats), warm=1)[0]
    yield figure("start", "python -m workbench.sweep --help", took, 0.5, unit="s", note="files in the system's cache")
    with temporary_folder(options.folder) as folder, sandbox(folder):
        stores = databases(folder)
        finished_study(
            Experiment.resolve(read(EXPERIMENTS / "default.toml")), "many", stores["WORKBENCH_STORAGE"], trials
        )
        spent = [_processor_seconds("workbench.study", "status", "many", environment=stores) for _ in range(runs + 1)]
    # The first one fills the system's cache of files.
    name = f"python -m workbench.study status, {trials} trials"
    yield figure("start", name, spent[1:], 3.0, unit="s", note="of one core, whatever else runs")


def _processor_seconds(*arguments: str, environment: dict[str, str]) -> float:
    """Seconds of a processor that a command takes, its own and the system's for it."""
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    run_command(*arguments, environment=environment, quiet=True)
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    return after.ru_utime - before.ru_utime + after.ru_stime - before.ru_stime
