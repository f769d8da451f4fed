"""Workers that are started before their study is there: who prepares, what its end means, and that none is left."""

import os
import signal
import subprocess
import sys
import time
from contextlib import suppress

import psutil
import pytest

from tests.support.helpers import ROOT
from workbench.common.errors import UserError
from workbench.studies.experiment import Experiment
from workbench.studies.pool import CHECKED, PREPARED, WorkerPool


@pytest.fixture
def declared(tiny, workplace):
    """Settings of a study of two arms."""
    arms = {"frozen": {"reference.policy": "frozen"}, "update": {"reference.policy": "update"}}
    more = {"sweep.trials": 0, "sweep.objective": "validation/accuracy", "sweep.arms": arms}
    return tiny | {"evaluation.seeds": 0, "evaluation.grid": 0} | more


@pytest.fixture
def started(declared, workplace, forked_workers):
    with WorkerPool(Experiment.resolve(declared), 2) as pool:
        yield pool


def test_one_of_two_prepares_and_another_takes_its_place_when_it_dies(started, capsys):
    first, waiting = started.workers.values()
    first.kill()
    started.wait_until(PREPARED)
    assert "another takes its place" in capsys.readouterr().out
    assert waiting.is_alive() and len(started.workers) == 2 and started.started == 3
    began = time.monotonic()
    started.stop()
    assert time.monotonic() - began < 10 and not any(process.is_alive() for process in started.workers.values())


def test_what_the_worker_finds_wrong_is_raised_here(declared, workplace, forked_workers):
    wrong = Experiment.resolve(declared | {"sweep.objective": "validation/nothing"})
    with WorkerPool(wrong, 1) as pool:
        with pytest.raises(UserError, match="runs log no such metric"):
            pool.wait_until(CHECKED)
        (left,) = pool.workers.values()
    assert not left.is_alive()


def test_workers_beyond_the_trials_are_not_started(declared, workplace, forked_workers):
    experiment = Experiment.resolve(declared)
    with WorkerPool(experiment, 50) as pool:
        assert pool.started == experiment.trials < 50


ALONE = """
import sys, time
from workbench.studies.experiment import Experiment
from workbench.studies.pool import WorkerPool
if __name__ == "__main__":
    pool = WorkerPool(Experiment.resolve({}), 2)
    print(*(process.pid for process in pool.workers.values()), flush=True)
    time.sleep(600)
"""


@pytest.mark.slow
def test_workers_of_a_command_that_was_killed_end(workplace, tmp_path):
    script = tmp_path / "alone.py"
    script.write_text(ALONE)
    command = subprocess.Popen(
        [sys.executable, script], cwd=workplace, env=os.environ | {"PYTHONPATH": str(ROOT)},
        stdout=subprocess.PIPE, text=True,
    )  # fmt: skip
    workers = [psutil.Process(int(pid)) for pid in command.stdout.readline().split()]
    time.sleep(3)
    command.send_signal(signal.SIGKILL)
    command.wait()
    command.stdout.close()
    with suppress(psutil.NoSuchProcess):
        assert not psutil.wait_procs(workers, timeout=120)[1]
