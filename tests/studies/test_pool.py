"""Workers that are started before their study is there: who prepares, what its end means, and that none is left."""

import json
import os
import signal
import subprocess
import sys
import time
from contextlib import suppress

import optuna
import psutil
import pytest

from tests.support.commands import invoke
from tests.support.helpers import ROOT
from workbench.common.errors import Failure, UserError
from workbench.common.paths import storage_url
from workbench.studies.experiment import Experiment
from workbench.studies.pool import CHECKED, PREPARED, Assignment, Event, WorkerPool
from workbench.tracking.study_runs import StudyId


@pytest.fixture
def declared(tiny, workplace):
    """Settings of a study of two arms."""
    arms = {"frozen": {"reference.policy": "frozen"}, "update": {"reference.policy": "update"}}
    more = {"sweep.trials": 0, "sweep.objective": "validation/accuracy", "sweep.arms": arms}
    return tiny | {"evaluation.seeds": 0, "evaluation.grid": 0} | more


@pytest.fixture
def started(declared, workplace):
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


def test_what_the_worker_finds_wrong_is_raised_here(declared, workplace):
    wrong = Experiment.resolve(declared | {"sweep.objective": "validation/nothing"})
    with WorkerPool(wrong, 1) as pool:
        with pytest.raises(UserError, match="runs log no such metric"):
            pool.wait_until(CHECKED)
        (left,) = pool.workers.values()
    assert not left.is_alive()


@pytest.mark.parametrize(("code", "message"), [(1, "for the reason above"), (0, "was told to stop")])
def test_a_worker_that_ends_by_itself_before_all_is_prepared_is_not_replaced(started, monkeypatch, code, message):
    """1: by an exception, which it has printed and another worker would meet again. 0: by a signal to end cleanly."""
    first, _ = started.workers
    monkeypatch.setattr(started, "events", lambda: [Event(first, "exited", code)])
    with pytest.raises(Failure, match=message):
        started.wait_until(PREPARED)
    assert started.started == 2


def test_workers_that_are_not_needed_end_and_the_one_that_has_prepared_stays(started, capsys):
    killed, waiting = started.workers.values()
    killed.kill()
    started.wait_until(PREPARED)
    *_, prepared = started.workers.values()
    unused = StudyId("none", "none", "none")
    started.assign(Assignment(started.experiment, unused, "sqlite:///none.db", "none"), 1)
    assert [*started.workers.values()] == [prepared]
    waiting.join(10)
    assert waiting.exitcode is not None


def test_arms_that_are_tuned_first_and_no_word_of_optunas_log(declared, workplace, capfd):
    settings = declared | {"sweep.tuning.factors": {"train.lr": [1.0]}, "sweep.tuning.arms": ["update"]}
    done = invoke("sweep", _file(workplace, settings), "--study", "t", "--workers", 1)
    assert done.returncode == 0, done.stderr
    studies = {study.study_name: study.n_trials for study in optuna.get_all_study_summaries(storage_url())}
    assert studies == {"t": 2, "t-tuning": 1}
    assert "[I " not in capfd.readouterr().err + done.stderr


def _file(folder, settings):
    """An experiment file of dotted settings."""
    path = folder / "study.toml"
    path.write_text("\n".join(f"{name} = {_toml(value)}" for name, value in settings.items()))
    return path


def _toml(value):
    if isinstance(value, dict):
        return "{" + ", ".join(f"{json.dumps(key)} = {_toml(one)}" for key, one in value.items()) + "}"
    return json.dumps(value)


def test_workers_beyond_the_trials_are_not_started(declared, workplace):
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
