"""The worker processes of a command: each imports at once, one of them prepares, all wait for a study to work on.

Imports take most of the time until a study's first step. So workers are started before their study is there: while
they import, the command opens its databases, and it does without diffusers itself. This module imports little for the
same reason.
"""

import contextlib
import multiprocessing
import os
import signal
import sys
import threading
from collections.abc import Iterator
from dataclasses import dataclass, replace
from multiprocessing.connection import Connection, wait
from types import FrameType, TracebackType
from typing import TYPE_CHECKING, Any, NamedTuple

from tqdm import tqdm

from workbench.common.command_line import print_uncaught, quiet, silence_transformers
from workbench.common.errors import Failure, UserError, memory_explained
from workbench.common.paths import places_explained
from workbench.common.signals import held, stop_on_signals
from workbench.common.streams import make_sturdy
from workbench.studies.experiment import Experiment

if TYPE_CHECKING:
    # Not at run time: they import MLflow, which can wait until a worker has prepared.
    from workbench.tracking.study_runs import StudyId
    from workbench.training.preparation import Preparations

#: What the worker that prepares reports on its way: no mistake was found in the settings, and all is prepared.
CHECKED, PREPARED = "checked", "prepared"
MOST_DEATHS = 5  #: workers that may die one after the other, without a step in between, before the command gives up
AGAIN = 5.0  #: seconds after which a worker that prepares, and does not end, is told to stop once more
#: Signals that a terminal sends to the command and its workers alike, and that the command alone reacts to.
_PARENTS = [getattr(signal, name) for name in ("SIGINT", "SIGHUP") if hasattr(signal, name)]


@dataclass(frozen=True)
class Assignment:
    """What a worker process works on.

    Attributes:
        study: which study, in the storage at `url`.
        parent: id of the study's MLflow run.
        index: of the worker in its pool.
    """

    experiment: Experiment
    study: "StudyId"
    url: str
    parent: str
    index: int = 0


class Event(NamedTuple):
    """What a worker reports.

    Attributes:
        kind: CHECKED or PREPARED, of the worker that prepares; "step" with the step; "measured" with what a bar shows
            of its metrics; "evaluated" with the share of the final samples that is drawn, 0 to 1; "trial" when one has
            ended; "UserError" or "Failure" with its text; "exited" with the exit code.
    """

    worker: Connection
    kind: str
    value: Any


def error_of(event: Event) -> UserError | Failure:
    """The error that a worker has reported."""
    return (UserError if event.kind == "UserError" else Failure)(event.value)


def work(experiment: Experiment, index: int, prepares: bool, command: Connection) -> None:
    """The body of a worker process: run trials of the study that it is given, until none is left that nobody runs.

    Only the parent reacts to Ctrl-C and to a closed terminal. It stops its workers by SIGTERM, which takes effect
    between two batches, where a snapshot can be taken and no database is in the middle of a write. A worker that has
    no study yet ends at once.

    Args:
        index: of the worker in its pool.
        prepares: check and prepare before there is a study.
        command: to which events go, and from which the assignment comes.
    """
    make_sturdy()
    for number in _PARENTS:
        signal.signal(number, signal.SIG_IGN)
    try:
        prepare = _begin(experiment, prepares, command)
        if (assignment := _assignment(command)) is None:
            return
        from workbench.studies.workers import run_trials

        with stop_on_signals("SIGTERM") as stop_requested:
            run_trials(replace(assignment, index=index), command, stop_requested, prepare)
    except KeyboardInterrupt:
        pass  # the exit code is 0, so that a worker that was told to stop is not replaced
    except (UserError, Failure) as error:
        # Sent instead of raised: another worker would meet the same, so none shall take this one's place.
        _report(command, type(error).__name__, str(error))
    except Exception as error:
        print_uncaught(error)
        sys.exit(1)
    finally:
        # A SIGTERM that comes while the process ends would give it the exit code of a crash, and the command would
        # start another worker.
        signal.signal(signal.SIGTERM, signal.SIG_IGN)


def _begin(experiment: Experiment, prepares: bool, command: Connection) -> "Preparations":
    """Import what a run needs, and prepare where this worker does; returns what it keeps for all of its runs."""
    tqdm.set_lock(threading.RLock())  # tqdm's own lock is shared by processes; one that is killed would never free it
    quiet()
    silence_transformers()
    from workbench.studies import preparing
    from workbench.training.preparation import Preparations

    preparations = Preparations()  # for all trials of this process, which mostly share what they need
    if prepares:
        with _ended_cleanly(), memory_explained(), places_explained():
            preparing.check(experiment, sources=True)
            _report(command, CHECKED)
            preparing.prepare(experiment, preparations)
            _report(command, PREPARED)
    # What imports MLflow comes last: by now the command opens its databases, and nobody waits for this worker.
    from workbench import tracking
    from workbench.studies import attempt, workers  # noqa: F401

    tracking.import_stores()
    return preparations


def _report(command: Connection, kind: str, value: Any = None) -> None:
    with contextlib.suppress(OSError):  # the command is gone
        command.send((kind, value))


def _assignment(command: Connection) -> Assignment | None:
    """What the worker is to do; None where the command is gone, or has no work for it."""
    try:
        return command.recv()
    except (EOFError, OSError):
        return None


def _interrupt(number: int, frame: FrameType | None) -> None:
    raise KeyboardInterrupt


@contextlib.contextmanager
def _ended_cleanly(seconds: float = 1.0) -> Iterator[None]:
    """Inside, SIGTERM and the parent's end raise KeyboardInterrupt, so that no half-written file is left.

    Nobody else would stop an encoding of hours whose command was killed.

    Args:
        seconds: between two looks whether the parent is there.
    """
    parent, done = multiprocessing.parent_process(), threading.Event()

    def watch() -> None:
        pause = seconds
        while not done.wait(pause):
            if parent is not None and not parent.is_alive():
                os.kill(os.getpid(), signal.SIGTERM)
                pause = AGAIN  # Python loses an exception that is raised while it removes an object

    watching = threading.Thread(target=watch, name="parent", daemon=True)
    before = signal.signal(signal.SIGTERM, _interrupt)
    watching.start()
    try:
        yield
    finally:
        done.set()
        watching.join()  # before the signal has its old meaning again, which is to end at once
        signal.signal(signal.SIGTERM, before)


class WorkerPool:
    """The worker processes of one command, and the events that they report; the end of its context ends them.

    The first worker prepares while the command has no study yet; `assign` gives all of them one.

    Each worker has a pipe of its own. One shared queue has a lock, and a worker that is killed while it holds the lock
    would hold it for ever.

    Args:
        workers: how many to start, at most one a trial.
    """

    def __init__(self, experiment: Experiment, workers: int):
        self.experiment = experiment
        self.assignment: Assignment | None = None
        self.started = self.deaths = 0
        self.workers: dict[Connection, Any] = {}
        self._dismissed: list[Any] = []
        self._preparing: Connection | None = None
        self._reached: set[str] = set()
        # A forked worker could not use a GPU that this process has used, and inherits locks that its threads hold.
        self._context = multiprocessing.get_context("spawn")
        try:
            for _ in range(min(workers, experiment.trials)):
                self.start()
        except BaseException:  # such as Ctrl-C, before there is a context whose end would do it
            self.kill()
            raise

    def __enter__(self) -> "WorkerPool":
        return self

    def __exit__(self, kind: type | None, error: BaseException | None, trace: TracebackType | None) -> None:
        try:
            self.stop()
        finally:
            self.kill()

    def start(self) -> None:
        """Start one more worker; where nobody has prepared yet, or is about to, it does."""
        prepares = self._preparing is None
        here, there = self._context.Pipe()
        process = self._context.Process(target=work, args=(self.experiment, self.started, prepares, there))
        # The worker inherits that they are ignored, so that they reach the parent alone even while it starts. No signal
        # may come between its start and the line by which it is known here: nobody would end it.
        with held("SIGTERM"):
            handlers = {number: signal.signal(number, signal.SIG_IGN) for number in _PARENTS}
            try:
                process.start()
                self.workers[here] = process
            finally:
                for number, handler in handlers.items():
                    signal.signal(number, handler)
        # The worker has a copy. As long as one is open here, reading does not end when the worker dies.
        there.close()
        self.started += 1
        if prepares:
            self._preparing = here
        if self.assignment is not None:
            self._assign(here)

    def wait_until(self, reached: str) -> None:
        """Wait until the worker that prepares has reported CHECKED or PREPARED; one that is killed is replaced.

        Raises:
            UserError, Failure: it has found something wrong or has failed, or worker after worker was killed.
        """
        while reached not in self._reached:
            assert self.workers, "no worker prepares"
            for event in self.events():
                if event.kind in (CHECKED, PREPARED):
                    self._reached.add(event.kind)
                elif event.kind in ("UserError", "Failure"):
                    raise error_of(event)
                elif event.kind == "exited" and event.worker is self._preparing:
                    if event.value > 0:  # another one would meet the same
                        raise Failure("preparing failed, for the reason above")
                    if event.value == 0:
                        raise Failure("the worker that prepared was told to stop; the same command goes on")
                    self._preparing = None
                    self.replace_dead(event.value)

    def replace_dead(self, exit_code: int) -> None:
        """Start another worker for one that died.

        Raises:
            Failure: too many have died in a row.
        """
        self.deaths += 1
        if self.deaths > MOST_DEATHS:
            raise Failure(f"worker after worker died (exit code {exit_code})")
        tqdm.write(f"A worker died (exit code {exit_code}); another takes its place.")
        self.start()

    def assign(self, assignment: Assignment, workers: int) -> None:
        """Let as many workers work on a study as are wanted now; more of them are started, or those that wait end."""
        self.assignment = assignment
        # The one that has prepared first, since it has everything at hand.
        waiting = sorted(self.workers, key=lambda worker: worker is not self._preparing)
        for worker in waiting[:workers]:
            self._assign(worker)
        for worker in waiting[workers:]:
            process = self.workers.pop(worker)
            worker.close()
            process.terminate()  # it may still import, beside those that work
            self._dismissed.append(process)
        for _ in range(workers - len(waiting)):
            self.start()

    def _assign(self, worker: Connection) -> None:
        with contextlib.suppress(OSError):  # it has died, which `events` reports
            worker.send(self.assignment)

    def events(self) -> list[Event]:
        """What the workers have reported since the last call; waits for half a second at most."""
        events = []
        for worker in wait([*self.workers], timeout=0.5):
            assert isinstance(worker, Connection)
            try:
                events.append(Event(worker, *worker.recv()))
            except (EOFError, OSError):
                process = self.workers.pop(worker)
                process.join()
                events.append(Event(worker, "exited", process.exitcode))
        return events

    def stop(self) -> None:
        """Request all workers to stop, and wait for them; a KeyboardInterrupt meanwhile ends the waiting."""
        if self.assignment is None:
            # Whatever keeps one from hearing the signal, it finds that there is no work for it.
            for worker in self.workers:
                worker.close()
        # All are told before the first is waited for, so that they take their snapshots at the same time.
        for process in self.workers.values():
            process.terminate()
        for process in self.workers.values():
            if self.assignment is None:
                self._join_preparing(process)
            process.join()

    def _join_preparing(self, process: Any) -> None:
        """Wait for a worker that has no study, and repeat the signal where it does not end; say so at first."""
        process.join(AGAIN / 2)
        if process.exitcode is None:
            tqdm.write("Stopping: a worker ends what it prepares (again: at once) ...")
        while process.exitcode is None:
            # What the first raised may be lost, in a callback of Python's. To one that has a study a second means more.
            process.terminate()
            process.join(AGAIN)

    def kill(self) -> None:
        """Kill the workers that are left."""
        for process in (*self.workers.values(), *self._dismissed):
            process.kill()
            process.join()
