"""A study whose workers die, are stopped, or are taken for dead; and many commands that start at once."""

import json
import os
import signal
import subprocess
import sys
import time

import mlflow
import optuna
import pytest
from optuna.trial import TrialState

from tests.support.commands import invoke, signal_handlers_kept
from tests.support.helpers import ROOT, overrides, workbench
from tests.support.killed import MOMENTS, killed
from tests.support.postgres import postgres  # noqa: F401
from tests.support.studies import Events, made, steps_of
from workbench.common import paths, processes
from workbench.studies import lifecycle, ownership, recovery, trials, workers
from workbench.studies.attempt import Attempt
from workbench.studies.storage import locked, open_storage
from workbench.tracking import delivery, reconcile, store, study_runs, tags
from workbench.training.config import merge
from workbench.training.preparation import prepare

pytestmark = pytest.mark.filterwarnings("ignore")
ARMS = {"sweep.arms": {"frozen": {"reference.policy": "frozen"}, "update": {"reference.policy": "update"}}}


@pytest.fixture
def declared(tiny, workplace):
    """Settings of a study of two arms, with nothing drawn."""
    quick = {"evaluation.seeds": 0, "evaluation.grid": 0, "train.steps": 10, "snapshots.interval": 2}
    more = {"sweep.trials": 0, "sweep.objective": "validation/accuracy"}
    return tiny | quick | more | ARMS


def ended(study, client, assignment):
    """How trials and runs stand, after checking that they say the same."""
    assert reconcile.reconcile_runs(client, assignment.parent, ownership.statuses(study), dry_run=True) == []
    runs = study_runs.children(client, client.get_run(assignment.parent))
    numbers = [run.data.tags[tags.TRIAL] for run in runs]
    assert len(set(numbers)) == len(numbers)
    counted = [t for t in study.get_trials() if trials.counts(t)]
    assert sorted(t.user_attrs["arm"] for t in counted) == ["frozen", "update"]
    return [trials.state_of(t) for t in study.get_trials()]


def test_a_worker_does_what_is_asked_and_no_more(declared):
    study, client, assignment = made(declared)
    workers.run_trials(assignment, Events(), lambda: False)
    workers.run_trials(assignment, Events(), lambda: False)
    assert ended(study, client, assignment) == ["complete", "complete"]
    assert [t.user_attrs["snapshot"] for t in study.get_trials()] == [8, 8]  # none at the end, so none is claimed
    assert not recovery.unused_snapshots(study) and not any(paths.state_path("outbox").glob("*"))


def test_asked_to_stop_it_hands_the_trial_back_and_another_goes_on(declared):
    study, client, assignment = made(declared)
    asked = iter(range(1000))
    with pytest.raises(KeyboardInterrupt):
        workers.run_trials(assignment, Events(), lambda: next(asked) > 9)
    first, _, third = study.get_trials()
    assert first.state == TrialState.FAIL and first.user_attrs["handed_back"] and third.state == TrialState.WAITING
    assert third.user_attrs["retry_of"] == first.number and third.user_attrs["deaths"] == 0
    done = steps_of(client, first)[-1]
    assert 4 < done < 10
    events = Events()
    workers.run_trials(assignment, events, lambda: False)
    assert ended(study, client, assignment) == ["interrupted", "complete", "complete"]
    assert steps_of(client, study.get_trials()[2]) == list(range(1, 11))  # those before the stop too
    went_on = [value for kind, value in events.sent if kind == "step"]
    assert done in went_on and went_on.count(1) == 1  # the other arm's alone


def test_a_second_ctrl_c_waits_until_trials_are_back_in_the_queue(declared, monkeypatch):
    study, client, assignment = made(declared)
    killed(assignment, "step")
    hand_back = recovery.recover

    def recover(study):
        os.kill(os.getpid(), signal.SIGINT)
        hand_back(study)

    monkeypatch.setattr(lifecycle, "recover", recover)
    with pytest.raises(KeyboardInterrupt), signal_handlers_kept():
        signal.signal(signal.SIGINT, signal.default_int_handler)  # which a shell's background job does not have
        lifecycle.finish_study(study, client, assignment.parent, assignment.experiment)
    first, *_, last = study.get_trials()
    assert first.state == TrialState.FAIL and last.state == TrialState.WAITING
    assert last.user_attrs["retry_of"] == first.number


#: In every run: without a run yet, in the midst of one, at its end, and with the result in one of two stores.
OFTEN = ("taken", "step", "finished", "stored")


@pytest.mark.parametrize("moment", [pytest.param(m, marks=[] if m in OFTEN else [pytest.mark.slow]) for m in MOMENTS])
def test_a_worker_killed_at_any_moment_of_a_trial(declared, moment):
    study, client, assignment = made(declared)
    killed(assignment, moment)
    workers.run_trials(assignment, Events(), lambda: False)
    delivery.deliver(client)
    reconcile.reconcile_runs(client, assignment.parent, ownership.statuses(study))
    again = ["interrupted"] if moment not in ("stored", "ended") else []
    assert ended(study, client, assignment) == [*again, "complete", "complete"]
    for trial in study.get_trials():
        if trial.state == TrialState.COMPLETE:
            assert steps_of(client, trial) == list(range(1, 11))
    recovery.remove_unused_snapshots(study)
    assert not list(recovery.snapshot_folder(study, 0).parent.glob("*"))


def test_a_worker_whose_trial_was_taken_meanwhile_leaves_it_alone(declared, monkeypatch):
    """As one does that was paused for longer than the others had patience."""
    monkeypatch.setattr("workbench.studies.attempt.PROGRESS_INTERVAL", 0.0)
    study, client, assignment = made(declared)
    events, taken = Events(), []

    def send(event):
        events.sent.append(event)
        if event == ("step", 7) and not taken:
            taken.append(True)
            with locked(assignment.url):
                mine = optuna.load_study(study_name="s", storage=open_storage(assignment.url))
                mine.tell(0, state=TrialState.FAIL)
                recovery.recover(mine)

    events.send = send
    workers.run_trials(assignment, events, lambda: False)
    assert ended(study, client, assignment) == ["interrupted", "complete", "complete"]


def test_a_trial_that_takes_its_worker_with_it_is_not_tried_for_ever(declared):
    study, _, _ = made(declared | {"sweep.arms": {"frozen": {"reference.policy": "frozen"}}})
    for _ in range(trials.MOST_CRASHES):
        trial = study.ask()
        trial.set_user_attr("process", processes.this_process().replace(f"|{os.getpid()}|", "|999999|"))
        recovery.recover(study)
    last = study.get_trials()[-1]
    assert trials.counts(last) and trials.state_of(last) == "failed" and len(study.get_trials()) == trials.MOST_CRASHES


def test_going_on_is_no_progress(declared):
    """A trial that dies at the same step again and again comes to its end too."""
    study, _, assignment = made(declared | {"sweep.arms": {"frozen": {"reference.policy": "frozen"}}})
    for _ in range(3):  # of which the first took snapshots
        killed(assignment, "step")
    recovery.recover(study)
    assert [t.user_attrs.get("deaths") for t in study.get_trials()] == [None, 0, 1, 2]


def test_doctor_finds_and_mends(declared, workplace):
    study, client, assignment = made(declared)
    workers.run_trials(assignment, Events(), lambda: False)
    study.ask().set_user_attr("process", processes.this_process().replace(f"|{os.getpid()}|", "|999999|"))
    one, two = (t.user_attrs["run_id"] for t in study.get_trials()[:2])
    client.set_terminated(one, "FAILED")
    for path in (workplace / "mlruns").rglob(f"{two}/artifacts/history.parquet"):
        before = path.read_bytes()
        path.unlink()
    stray = recovery.snapshot_folder(study, 1)
    stray.mkdir(parents=True)
    orphan = client.create_run(
        store.experiment(client).experiment_id,
        tags={
            "workbench.kind": "run",
            "workbench.process": processes.this_process().replace(f"|{os.getpid()}|", "|9|"),
        },
    )
    looked = invoke("study", "doctor", "--dry-run")
    assert looked.returncode == 0 and looked.stdout.count("to mend") == 5, looked.stdout + looked.stderr
    mended = invoke("study", "doctor")
    assert mended.returncode == 0, mended.stderr
    for what in ("trial 2: its worker is gone", "run of trial 0: is FAILED", "no history", "snapshots of trial 1"):
        assert what in mended.stdout
    again = invoke("study", "doctor")
    assert again.stdout == "All is well.\n", again.stdout
    assert client.get_run(orphan.info.run_id).info.status == "KILLED"
    (path,) = (workplace / "mlruns").rglob(f"{two}/artifacts/history.parquet")
    import io

    import polars as pl

    assert pl.read_parquet(path).equals(pl.read_parquet(io.BytesIO(before)))


def crew_of(pid):
    import psutil

    children = psutil.Process(pid).children(recursive=True)
    return [child for child in children if "spawn_main" in " ".join(child.cmdline())]


@pytest.fixture
def file(declared, workplace):
    """The same as an experiment file's settings on the command line."""
    arms = '[sweep]\ntrials = 0\nobjective = "validation/accuracy"\n[sweep.arms]\n'
    arms += 'frozen = { "reference.policy" = "frozen" }\nupdate = { "reference.policy" = "update" }\n'
    (workplace / "s.toml").write_text(arms)
    return ["s.toml", *overrides({k: v for k, v in declared.items() if not k.startswith("sweep.")})]


def wait_for(what, seconds=600):
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline:
        found = what()
        if found:
            return found
        time.sleep(0.1)
    raise AssertionError("waited in vain")


@pytest.mark.slow
def test_a_command_replaces_a_worker_that_dies_and_study_goes_on_after_sigterm(file, workplace):
    long = ["--set", "train.steps=400", "--set", "train.lr=1e-5"]
    command = [sys.executable, "-m", "workbench.sweep", *file, "--workers", "1", *long]
    process = subprocess.Popen(
        command, cwd=workplace, env=os.environ | {"PYTHONPATH": str(ROOT)}, text=True,
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
    )  # fmt: skip
    snapshots = lambda: list((workplace / ".workbench").rglob("*.snapshot"))  # noqa: E731
    wait_for(snapshots)
    (worker,) = crew_of(process.pid)
    worker.kill()
    study = optuna.load_study(study_name="s", storage=f"sqlite:///{workplace / 'optuna.db'}")
    wait_for(lambda: "snapshot" in study.get_trials()[1].user_attrs)  # the next in the queue, by another worker
    process.send_signal(signal.SIGTERM)
    output, _ = process.communicate(timeout=60)  # takes 3 seconds; schedulers wait for 30
    assert process.returncode == 130, output
    assert "another takes its place" in output and "Traceback" not in output
    assert [t.state.name for t in study.get_trials()] == ["FAIL", "FAIL", "WAITING", "WAITING"]
    assert [t.user_attrs.get("retry_of") for t in study.get_trials()] == [None, None, 0, 1]

    shown = workbench("workbench.study", "status", "s", "--json", cwd=workplace)
    (standing,) = json.loads(shown.stdout)
    assert standing["done"] == 0 and standing["trials"] == {"interrupted": 2, "waiting": 2}
    done = invoke("study", "resume", "s", "--workers", 2)
    assert done.returncode == 0, done.stderr
    assert "all 2 trials are there" in invoke("study", "resume", "s").stdout
    client = mlflow.MlflowClient(f"sqlite:///{workplace / 'mlflow.db'}")
    complete = [t for t in study.get_trials() if t.state == TrialState.COMPLETE]
    assert len(complete) == 2
    for trial in complete:
        assert steps_of(client, trial) == list(range(1, 401))
    exported = invoke("study", "export", "s")
    assert exported.returncode == 0 and len(list((workplace / "reports/s/export").glob("[!.]*"))) == 5


TOGETHER = """
import json, os, sys
from pathlib import Path
from workbench.training import run
from workbench.studies import lifecycle  # all that takes time, once
from workbench.studies.experiment import Experiment
experiment = Experiment.resolve(json.loads(Path("settings.json").read_text()))
children = []
for _ in range(8):
    child = os.fork()
    if not child:
        try:
            lifecycle.run_study(experiment, "s", 0)
            os._exit(0)
        except BaseException:
            import traceback
            traceback.print_exc()
            os._exit(1)
    children.append(child)
sys.exit(sum(os.waitpid(child, 0)[1] != 0 for child in children))
"""


def eight_at_once(declared, workplace, **env):
    (workplace / "settings.json").write_text(json.dumps(declared))
    done = subprocess.run(
        [sys.executable, "-c", TOGETHER],
        cwd=workplace, env=os.environ | {"PYTHONPATH": str(ROOT)} | env, capture_output=True, text=True, timeout=900,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
    return done


def check_there_is_one(storage, store):
    assert optuna.get_all_study_names(storage) == ["s"]
    study = optuna.load_study(study_name="s", storage=storage)
    assert [t.user_attrs["arm"] for t in study.get_trials()] == ["frozen", "update"]
    client = mlflow.MlflowClient(store)
    (experiment,) = client.search_experiments(filter_string="name = 'diffusion-dpo'")
    assert len(client.search_runs([experiment.experiment_id])) == 1


@pytest.mark.slow
def test_eight_commands_start_at_once_on_an_empty_sqlite(declared, workplace):
    (workplace / "mlflow.db").unlink()
    eight_at_once(declared, workplace)
    check_there_is_one(f"sqlite:///{workplace / 'optuna.db'}", f"sqlite:///{workplace / 'mlflow.db'}")


@pytest.mark.slow
def test_eight_commands_start_at_once_on_an_empty_postgresql(declared, workplace, postgres):  # noqa: F811
    storage, store = postgres.create(), postgres.create()
    eight_at_once(declared, workplace, WORKBENCH_STORAGE=storage, MLFLOW_TRACKING_URI=store)
    check_there_is_one(storage, store)


@pytest.mark.slow
def test_a_run_goes_on_by_name(tiny, workplace):
    """`train`: Ctrl-C, then the same command with --resume."""
    options = overrides(tiny | {"train.steps": 300, "evaluation.seeds": 0, "evaluation.grid": 0})
    process = subprocess.Popen(
        [sys.executable, "-m", "workbench.train", *options, "--name", "first", "--set", "snapshots.interval=10"],
        cwd=workplace, env=os.environ | {"PYTHONPATH": str(ROOT)}, stderr=subprocess.PIPE, text=True,
    )  # fmt: skip
    wait_for(lambda: list((workplace / ".workbench").rglob("*.snapshot")))
    process.send_signal(signal.SIGINT)
    _, errors = process.communicate(timeout=300)
    assert process.returncode == 130 and "--name first --resume" in errors, errors
    refused = invoke("train", *options, "--name", "first")
    assert refused.returncode == 2 and "go on with --resume" in refused.stderr
    other = invoke("train", *options, "--name", "first", "--resume", "--set", "seed=7")
    assert other.returncode == 2 and "seed = 7: the snapshot of" in other.stderr
    done = invoke("train", *options, "--name", "first", "--resume")
    assert done.returncode == 0, done.stderr
    client = mlflow.MlflowClient(f"sqlite:///{workplace / 'mlflow.db'}")
    runs = client.search_runs(["1"], order_by=["attributes.start_time ASC"])
    assert [r.info.status for r in runs] == ["KILLED", "FAILED", "FINISHED"]
    points = client.get_metric_history(runs[2].info.run_id, "train/loss")
    assert [p.step for p in points] == list(range(1, 301))


def test_attempts_say_how_they_were_cut_short(declared):
    """A failure that is not the trial's own is not counted, and its reason is in the run."""
    study, client, assignment = made(merge(declared, {"diagnostics.interval": 10}))

    def on_step(step, metrics):
        if step == 3:
            raise RuntimeError("postgresql://me:hunter22@host/db: gone")

    attempt = Attempt(
        study,
        assignment.experiment,
        client,
        assignment.study,
        assignment.parent,
        prepare=prepare,
        on_claimed=lambda: None,
        on_step=on_step,
        stopping=lambda: False,
    )
    with pytest.raises(RuntimeError):
        study.optimize(attempt, n_trials=1)
    attempt.finish()
    run = client.get_run(study.get_trials()[0].user_attrs["run_id"])
    assert run.info.status == "KILLED" and "gone" in run.data.tags["workbench.reason"]
    assert "hunter22" not in str(run.data.tags)
