"""How long commands take that a person waits for: `--help`, how a large study stands, a study's first step."""

import os
import resource
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping
from contextlib import suppress
from functools import partial
from pathlib import Path

from workbench.benchmarks.figure import Figure, Options, figure
from workbench.benchmarks.sandbox import EXPERIMENTS, databases, of_checkout, run_command, sandbox, temporary_folder
from workbench.benchmarks.timing import in_turn
from workbench.common.errors import Failure
from workbench.studies.experiment import Experiment
from workbench.studies.synthetic import finished_study
from workbench.training.experiment_file import read

PATIENCE = 1800.0  # seconds for a first step; encoding for it takes minutes on a busy machine
SWEEP = ("workbench.sweep",)


def start(options: Options, runs: int = 10, trials: int = 500) -> Iterator[Figure]:
    """Seconds of `python -m workbench.sweep --help`, of `study status` of many trials, and of a study's first step.

    Args:
        runs: of the first two, at least, each in a fresh process.
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
    yield from first_steps(options)


def first_steps(options: Options, command: tuple[str, ...] = SWEEP) -> Iterator[Figure]:
    """Seconds from the start of `python -m workbench.sweep` to the first training step of any of its trials.

    Once with an empty cache, in which pairs are encoded and the pretrained model's samples drawn, and then with what
    the first has left there; databases are new each time.

    Args:
        command: arguments of Python's -m.
    """
    device = () if options.device == "auto" else ("--set", f"model.device={options.device}")
    command = (*command, *device)
    with temporary_folder(options.folder) as folder:
        cache = {"WORKBENCH_CACHE": str(folder / "cache")}
        places = [folder / f"study-{number}" for number in range(1 + max(3, options.repeats // 3))]
        cold, *warm = (first_step(place, command, databases(place) | cache) for place in places)
    name, note = "python -m workbench.sweep, to its first training step", "the default study, a worker a core"
    yield figure("start", f"{name}, nothing cached", [cold], None, unit="s", note=note)
    yield figure("start", f"{name}, pairs and samples cached", warm, 15.0, unit="s", note=note)


def first_step(folder: Path, command: tuple[str, ...], environment: Mapping[str, str]) -> float:
    """Seconds until a study that begins now has taken a training step; it is then killed.

    Args:
        folder: to run in, which is made.
        command: arguments of Python's -m.
        environment: on top of this process's; its state folder is where the step is looked for.
    Raises:
        Failure: the command ended or too much time passed before.
    """
    folder.mkdir()
    began = time.perf_counter()
    with (folder / "log").open("wb") as log:
        # A session of its own, so that workers are killed too.
        process = subprocess.Popen(
            [sys.executable, "-m", *command],
            cwd=folder, env=os.environ | environment | of_checkout(), stdout=log, stderr=log, start_new_session=True,
        )  # fmt: skip
    try:
        while not _has_stepped(Path(environment["WORKBENCH_STATE"])):
            if process.poll() is not None or time.perf_counter() - began > PATIENCE:
                said = (folder / "log").read_text("utf-8", "replace").strip().splitlines()
                raise Failure(f"start: no training step of {' '.join(command)}: {said[-1] if said else 'no output'}")
            time.sleep(0.02)
        return time.perf_counter() - began
    finally:
        _kill(process)


def _kill(process: subprocess.Popen) -> None:
    """Kill a process and those that it started; returns when they are gone, so that their folder can be removed."""
    with suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()
        deadline = time.monotonic() + 5
        while time.monotonic() < deadline:  # they are nobody's children now, so nobody can wait for them
            os.killpg(process.pid, 0)
            time.sleep(0.02)


def _has_stepped(state: Path) -> bool:
    """Whether the journal of any run has the metrics of a step, which a run writes as soon as it has taken it."""
    return any(b'"kind":"metrics"' in path.read_bytes() for path in state.glob("outbox/*/journal.jsonl"))


def _processor_seconds(*arguments: str, environment: dict[str, str]) -> float:
    """Seconds of a processor that a command takes, its own and the system's for it."""
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    run_command(*arguments, environment=environment, quiet=True)
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    return after.ru_utime - before.ru_utime + after.ru_stime - before.ru_stime
