"""What a worker process does with its study, trial after trial, and the supervision of a pool of workers."""

import contextlib
import multiprocessing
import os
import platform
import zlib
from collections import Counter
from collections.abc import Callable, Mapping
from contextlib import ExitStack
from multiprocessing.connection import Connection
from typing import TYPE_CHECKING, Any

import optuna
from optuna import Study
from optuna.trial import TrialState
from tqdm import tqdm

from workbench.common.errors import Failure
from workbench.common.progress import Progress
from workbench.studies import training_bar
from workbench.studies.pool import Assignment, Event, WorkerPool, error_of
from workbench.studies.recovery import recover
from workbench.studies.storage import PATIENCE, locked, open_storage
from workbench.studies.trials import counts, line_of
from workbench.tracking import delivery

if TYPE_CHECKING:
    # Not at run time: they import diffusers, which the command that only supervises does without.
    from workbench.studies.attempt import Attempt
    from workbench.training.preparation import Preparations

#: Environment variables in which the tasks of a cluster's job, or commands on one machine's GPUs, differ.
TASK_VARIABLES = ("SLURM_ARRAY_TASK_ID", "SLURM_PROCID", "JOB_COMPLETION_INDEX", "CUDA_VISIBLE_DEVICES")
PREPARING = "preparing"  #: what a worker does before its trial's first step


def remaining(study: Study, trials: int, *, running: bool) -> int:
    """How many trials a study still lacks.

    Args:
        trials: that it is to have in all.
        running: do not count those that a worker runs now, perhaps of another command.
    """
    done = [counts(t) or (running and t.state == TrialState.RUNNING) for t in study.get_trials(deepcopy=False)]
    return max(0, trials - sum(done))


def run_trials(
    assignment: Assignment,
    events: Connection,
    stop_requested: Callable[[], bool],
    prepare: "Preparations | None" = None,
) -> None:
    """Run trials until none is left that nobody runs, or until a stop is requested.

    Args:
        prepare: with what is prepared already; None = nothing is.
    Raises:
        KeyboardInterrupt: a stop was requested while a trial ran; it has a snapshot and is back in the queue.
        UserError, Failure: something that is wrong with more than one trial.
    """
    from workbench.studies.attempt import Attempt
    from workbench.training.preparation import Preparations

    parent = multiprocessing.parent_process()

    def stopping() -> bool:
        # A command that is killed cannot stop its workers, so they look whether it is still there.
        return stop_requested() or (parent is not None and not parent.is_alive())

    def send(kind: str, value: Any) -> None:
        with contextlib.suppress(OSError):  # the parent is gone; `stopping` notices
            events.send((kind, value))

    def on_step(step: int, metrics: Mapping[str, float]) -> None:
        send("step", step)
        if told := training_bar.shown(metrics):
            send("measured", told)

    experiment, url = assignment.experiment, assignment.url
    prepare = prepare or Preparations()  # for all trials of this process, which mostly share what they need
    prepare(experiment.config)  # before a trial is taken, since it may take long
    study = optuna.load_study(study_name=assignment.study.name, storage=open_storage(url))
    # The number of trials differs from one start of the study to the next; 1000 leaves room for a pool's indices.
    offset = assignment.index + 1000 * len(study.get_trials(deepcopy=False)) + _task_number()
    study.sampler, study.pruner = experiment.sampler(offset), experiment.pruner()
    try:
        # Only with the tracking store at hand is a trial taken, since its run is created at once.
        while not stopping() and (client := delivery.wait_until_reachable(stopping)):
            with ExitStack() as lock:
                # Until the trial has this process's name, no other worker may look: it would find a running trial
                # that belongs to nobody, and queue it again.
                lock.enter_context(locked(url, PATIENCE))
                recover(study)
                if not remaining(study, experiment.trials, running=True):
                    return
                attempt = Attempt(
                    study,
                    experiment,
                    client,
                    assignment.study,
                    assignment.parent,
                    prepare=prepare,
                    on_claimed=lock.close,
                    on_step=on_step,
                    on_evaluated=lambda share: send("evaluated", share),
                    stopping=stopping,
                )
                _run_one(study, attempt, lock)
            send("trial", None)
    finally:
        with locked(url, PATIENCE):
            recover(study)  # the trial that this worker has left, if any, goes back to the queue at once


def _run_one(study: Study, attempt: "Attempt", lock: ExitStack) -> None:
    """Take the next trial of a study and run an attempt at it.

    Args:
        lock: of the study's database, which the attempt releases once it has claimed its trial.
    Raises:
        Exception: whatever ended the attempt, unless its numbers were not finite or another worker took its trial.
    """
    try:
        # Numbers that are not finite concern this trial alone: it has failed, the worker takes the next.
        study.optimize(attempt, n_trials=1, catch=(FloatingPointError,))
    except Exception as error:
        if not attempt.was_taken(error):
            raise
    finally:
        # Held until here only if the attempt ended before it had claimed its trial.
        lock.close()
        attempt.finish()


def _task_number() -> int:
    """A number that differs between commands of one job, which would otherwise sample alike; 0 outside of a job."""
    task = [f"{name}={os.environ[name]}" for name in TASK_VARIABLES if name in os.environ]
    # A checksum, since Python's `hash` of a text is another in every process.
    return zlib.crc32(" ".join([platform.node(), *task]).encode()) if task else 0


def supervise(pool: WorkerPool, assignment: Assignment, study: Study, workers: int) -> None:
    """Let workers work on a study and show their progress until they are done; a worker that dies is replaced.

    Args:
        workers: how many of the pool's, or more.

    Raises:
        UserError, Failure: an error of a worker that is not about one trial, or worker after worker died.
    """
    _Supervisor(pool, study).run(assignment, workers)


class _Supervisor:
    """Reacts to the events of a pool of workers.

    Attributes:
        ended: trials that came to their end meanwhile; `seen` has the numbers of all that have ended.
        steps: the last step of each worker's trial.
        phases: what each worker does now; one that has said nothing yet prepares.
        measured: the latest numbers of each worker's trial, of those that the bar shows.
    """

    def __init__(self, pool: WorkerPool, study: Study):
        experiment = pool.experiment
        self.pool, self.study, self.trials = pool, study, experiment.trials
        self.trial_steps = experiment.config.train.steps
        self.seen = {t.number for t in study.get_trials(deepcopy=False) if t.state.is_finished()}
        self.steps: dict[Connection, int] = {}
        self.errors: list[Exception] = []
        self.ended = 0
        total = remaining(study, self.trials, running=False) * self.trial_steps
        self.phases: dict[Connection, str] = {}
        self.measured: dict[Connection, dict[str, float]] = {}
        self.best = training_bar.best_so_far(study)
        self.bar = Progress(total=total, desc=study.study_name, unit="step", smoothing=0.05)

    def run(self, assignment: Assignment, workers: int) -> None:
        """Give workers the study, and react to what they report until none is left."""
        try:
            self.pool.assign(assignment, workers)
            while self.pool.workers:
                for event in self.pool.events():
                    self.handle(event)
                self.bar.n = min(self.bar.total, self.ended * self.trial_steps + sum(self.steps.values()))
                self.bar.update(0)
                training_bar.show(self.bar, *self.measured.values(), best=self.best)
                if self.pool.workers:
                    self.bar.phase(self.phase())
        except KeyboardInterrupt:
            tqdm.write("Stopping: each trial takes a snapshot and goes back to the queue (again: at once) ...")
            self.pool.stop()
            raise
        finally:
            # After an error, or a second Ctrl-C, workers are left. Their trials are found as lost and queued again.
            self.pool.kill()
            self.bar.close()
        for error in self.errors:
            raise error

    def phase(self) -> str:
        """What the workers do now: each kind of work, with how many are at it where they are not all at the same."""
        counts = Counter(self.phases.get(worker, PREPARING) for worker in self.pool.workers)
        if len(counts) == 1:
            return next(iter(counts))
        return ", ".join(f"{count} {what}" for what, count in sorted(counts.items()))

    def handle(self, event: Event) -> None:
        """Note what a worker reports; the trial that it ended is shown, a worker that died is replaced."""
        if event.kind == "step":
            self.steps[event.worker], self.pool.deaths = event.value, 0
            # After the last step the final samples are drawn, which takes a good part of a short trial.
            last = event.value >= self.trial_steps
            self.phases[event.worker] = "evaluating" if last else "training"
        elif event.kind == "measured":
            self.measured[event.worker] = self.measured.get(event.worker, {}) | event.value
        elif event.kind == "evaluated":
            self.phases[event.worker] = f"evaluating {100 * event.value:.0f} %"
        elif event.kind in ("UserError", "Failure"):
            self.errors.append(error_of(event))
        else:
            # A trial has ended, or its worker has: the steps of this attempt are no longer under way.
            self.steps.pop(event.worker, None)
            self.phases.pop(event.worker, None)
            self.measured.pop(event.worker, None)
            self.show_ended()
            if event.kind == "exited" and event.value:
                self.replace_worker(event.value)

    def show_ended(self) -> None:
        """Print a line for each trial that has ended since the last call."""
        # Other commands' trials too, since they count for the study like this command's.
        trials = self.study.get_trials(deepcopy=False)
        new = [trial for trial in trials if trial.state.is_finished() and trial.number not in self.seen]
        for trial in new:
            self.seen.add(trial.number)
            self.ended += counts(trial)
            tqdm.write(line_of(trial))
        if new:  # once for all of them, since Optuna copies every trial to tell
            self.best = training_bar.best_so_far(self.study)

    def replace_worker(self, exit_code: int) -> None:
        """Start another worker for one that died, if trials are left and not too many have died in a row."""
        if remaining(self.study, self.trials, running=False):
            try:
                self.pool.replace_dead(exit_code)
            except Failure as error:
                self.errors.append(error)
