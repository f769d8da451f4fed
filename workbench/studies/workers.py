"""The processes of a study: workers that take trials until none is left, and the command that watches over them."""

import contextlib
import multiprocessing
import os
import platform
import signal
import sys
import threading
import zlib
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass, replace
from multiprocessing.connection import Connection, wait
from typing import Any

import optuna
from optuna import Study
from optuna.trial import TrialState
from tqdm import tqdm

from workbench.common.command_line import print_uncaught, quiet, silence_transformers
from workbench.common.errors import Failure, UserError
from workbench.common.signals import stop_on_signals
from workbench.studies.recovery import mend
from workbench.studies.space import read_pruner, read_sampler
from workbench.studies.storage import PATIENCE, locked, open_storage
from workbench.studies.trials import counts, line_of
from workbench.tracking import delivery
from workbench.training.config import resolve

#: What tells the commands of a cluster's job, or one machine's GPUs, apart.
PLACES = ("SLURM_ARRAY_TASK_ID", "SLURM_PROCID", "JOB_COMPLETION_INDEX", "CUDA_VISIBLE_DEVICES")
#: Workers that may die one after the other, none of them having got anywhere, before the command gives up.
FALLEN = 5


@dataclass(frozen=True)
class Worker:
    """What a worker process is told: the experiment's dotted settings (its sweep included), and where to work."""

    settings: dict[str, Any]
    study: str
    url: str
    parent: str
    index: int
    asked: int


def missing(study: Study, asked: int, *, running: bool) -> int:
    """Trials that are still to come.

    Args:
        running: leave out those that somebody runs now, perhaps another command on the same study.
    """
    trials = study.get_trials(deepcopy=False)
    return max(0, asked - sum(counts(t) or (running and t.state == TrialState.RUNNING) for t in trials))


def work(told: Worker, line: Connection) -> None:
    """Run trials until none is left that nobody runs. The body of a worker process.

    Only the parent hears Ctrl-C; it ends its workers by SIGTERM, which takes effect between two batches, where a
    snapshot can be taken and no database is in the middle of a write.
    """
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        with stop_on_signals("SIGTERM") as asked:
            _work(told, line, asked)
    except KeyboardInterrupt:
        pass
    except (UserError, Failure) as error:
        with contextlib.suppress(OSError):
            line.send((type(error).__name__, str(error)))
    except Exception as error:
        print_uncaught(error)
        sys.exit(1)
    finally:
        signal.signal(signal.SIGTERM, signal.SIG_IGN)


def _work(told: Worker, line: Connection, asked: Callable[[], bool]) -> None:
    from workbench.studies.attempt import Attempt
    from workbench.training.run import prepare

    tqdm.set_lock(threading.RLock())  # the usual one is all processes', and outlives a kill
    quiet()
    silence_transformers()
    parent = multiprocessing.parent_process()

    def stopping() -> bool:
        return asked() or (parent is not None and not parent.is_alive())  # nobody is left to report to

    def say(kind: str, value: Any) -> None:
        with contextlib.suppress(OSError):
            line.send((kind, value))

    config = resolve(told.settings)
    prepare(config)  # before a trial is taken, since it may take long
    study = optuna.load_study(study_name=told.study, storage=open_storage(told.url))
    study.pruner = read_pruner(config)
    study.sampler = read_sampler(config, told.index + 1000 * len(study.get_trials(deepcopy=False)) + _place())
    try:
        while not stopping() and (client := delivery.wait_until_reachable(stopping)):
            with ExitStack() as lock:
                lock.enter_context(locked(told.url, PATIENCE))
                mend(study)
                if not missing(study, told.asked, running=True):
                    return
                attempt = Attempt(
                    study,
                    told.settings,
                    client,
                    told.parent,
                    taken=lock.close,
                    on_step=lambda step: say("step", step),
                    stopping=stopping,
                )
                try:
                    study.optimize(attempt, n_trials=1, catch=(FloatingPointError,))
                except Exception as error:
                    if not attempt.lost(error):
                        raise
                finally:
                    lock.close()
                    attempt.settle()
            say("trial", None)
    finally:
        with locked(told.url, PATIENCE):
            mend(study)  # what this worker leaves undone is for whoever comes next


def _place() -> int:
    """A number for where this command runs, which several on one study do; 0 where nothing says so."""
    told = [f"{name}={os.environ[name]}" for name in PLACES if name in os.environ]
    return zlib.crc32(" ".join([platform.node(), *told]).encode()) if told else 0


class Crew:
    """The workers of one command, and what they have to say.

    A line of its own to each, since a worker that is killed while it holds what all share would hold it for ever.
    """

    def __init__(self, told: Worker):
        self.told = told
        self.hired = 0
        self.members: dict[Connection, Any] = {}
        self._context = multiprocessing.get_context("spawn")

    def hire(self) -> None:
        """Start one more."""
        reader, writer = self._context.Pipe(duplex=False)
        process = self._context.Process(target=work, args=(replace(self.told, index=self.hired), writer))
        heard = signal.signal(signal.SIGINT, signal.SIG_IGN)  # which the worker inherits
        process.start()
        signal.signal(signal.SIGINT, heard)
        writer.close()
        self.hired += 1
        self.members[reader] = process

    def news(self) -> list[tuple[Connection, str, Any]]:
        """What was said since, with "gone" and the exit code for a worker that has ended."""
        found = []
        for line in wait([*self.members], timeout=0.5):
            assert isinstance(line, Connection)
            try:
                found.append((line, *line.recv()))
            except (EOFError, OSError):
                process = self.members.pop(line)
                process.join()
                found.append((line, "gone", process.exitcode))
        return found

    def stop(self) -> None:
        """Ask all to stop and wait until they have; a KeyboardInterrupt meanwhile ends the waiting."""
        for process in self.members.values():
            process.terminate()
        for process in self.members.values():
            process.join()

    def kill(self) -> None:
        """End what is left, whatever it does."""
        for process in self.members.values():
            process.kill()
            process.join()


def supervise(told: Worker, study: Study, workers: int) -> None:
    """Start the workers and show what they do, until they are done; one that dies is replaced.

    Raises:
        UserError, Failure: what a worker met that is not one trial's affair, or worker after worker died.
    """
    crew, steps = Crew(told), resolve(told.settings).train.steps
    before = {t.number for t in study.get_trials(deepcopy=False) if t.state.is_finished()}
    to_come = missing(study, told.asked, running=False)
    at: dict[Connection, int] = {}
    problems: list[tuple[str, str]] = []
    ended, fallen = 0, 0
    bar = tqdm(total=to_come * steps, desc=study.study_name, unit="step", smoothing=0.05)
    try:
        for _ in range(workers):
            crew.hire()
        while crew.members:
            for line, kind, value in crew.news():
                if kind == "step":
                    at[line], fallen = value, 0
                elif kind in ("trial", "gone"):
                    at.pop(line, None)
                    for trial in study.get_trials(deepcopy=False):
                        if trial.state.is_finished() and trial.number not in before:
                            before.add(trial.number)
                            ended += counts(trial)
                            tqdm.write(line_of(trial))
                if kind == "gone" and value:
                    fallen += 1
                    if fallen > FALLEN:
                        problems.append(("Failure", f"worker after worker died (exit code {value})"))
                    elif missing(study, told.asked, running=False):
                        tqdm.write(f"A worker died (exit code {value}); another takes its place.")
                        crew.hire()
                elif kind in ("UserError", "Failure"):
                    problems.append((kind, value))
                bar.n = min(bar.total, ended * steps + sum(at.values()))
                bar.update(0)
    except KeyboardInterrupt:
        tqdm.write("Stopping: each trial takes a snapshot and goes back to the queue (again: at once) ...")
        crew.stop()
        raise
    finally:
        crew.kill()
        bar.close()
    for kind, text in problems:
        raise UserError(text) if kind == "UserError" else Failure(text)
