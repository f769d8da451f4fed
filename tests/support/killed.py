"""Processes that are killed at a chosen moment: a worker of its first trial, and a run."""

import os
import signal

from tests.support import forked
from tests.support.ended import Ended
from tests.support.runs import run
from workbench import tracking
from workbench.studies import attempt, workers
from workbench.training.snapshots import Snapshots

MOMENTS = ("taken", "claimed", "step", "finished", "stored", "ended")


def _die(*_, **__):
    os.kill(os.getpid(), signal.SIGKILL)


def _die_after(owner, name):
    """Make a method the last thing that this process does."""
    method = getattr(owner, name)
    setattr(owner, name, lambda self, *arguments: (method(self, *arguments), _die()))


class _Events:
    def __init__(self, moment):
        self.moment = moment

    def send(self, event):
        if event == ("step", 5) and self.moment == "step":
            _die()


def _work(assignment, moment):
    """The body of the worker process."""
    if moment == "taken":
        attempt.Attempt._claim = _die
    elif moment == "claimed":
        attempt.Attempt._track = _die
    elif moment == "finished":
        _die_after(tracking.Tracker, "finish")
    elif moment == "stored":
        attempt.Attempt.finish = _die
    elif moment == "ended":
        _die_after(tracking.Tracker, "end")
    workers.run_trials(assignment, _Events(moment), lambda: False)


def killed(assignment, moment):
    """Let a worker process run trials until it kills itself, the first time that it reaches one of `MOMENTS`."""
    process = forked.start(_work, assignment, moment)
    process.join()
    assert process.exitcode == -signal.SIGKILL


def _run(settings, snapshots, step):
    """The body of a process that runs up to a step."""
    run(settings, Ended(), snapshots=snapshots, on_step=lambda now, metrics: _die() if now == step else None)


def killed_run(settings, snapshots: Snapshots, step: int):
    """Let a process run settings until it kills itself after a step."""
    process = forked.start(_run, settings, snapshots, step)
    process.join()
    assert process.exitcode == -signal.SIGKILL
