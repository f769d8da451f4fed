"""Whole commands, as a user runs them, on a tiny random model."""

import contextlib
import os
import re
import runpy
import signal
import sqlite3
import subprocess
import sys
import time

import mlflow
import optuna
import polars as pl
import pytest
from diffusers import StableDiffusionPipeline

from tests.support.commands import CutOffError, cut_off, invoke
from tests.support.helpers import ROOT, as_toml, overrides, pair_rows, workbench
from workbench import tracking
from workbench.__main__ import SECTIONS
from workbench.training.snapshots import Snapshots

SPACE = """
[sweep.arms]
frozen = { "reference.policy" = "frozen" }
update = { "reference.policy" = "update" }

[sweep.space]
"reference.interval" = { type = "CategoricalDistribution", choices = [1, 2] }
"timesteps.density" = { type = "CategoricalDistribution", choices = ["uniform", "discounted"] }
"timesteps.gamma" = { type = "FloatDistribution", low = 0.8, high = 0.98 }
"""


@pytest.fixture
def experiment(tiny, workplace):
    """An experiment file of the tiny run, with a small study."""
    path = workplace / "tiny.toml"
    path.write_text(f"{as_toml(tiny)}\n[sweep]\ntrials = 4\n{SPACE}")
    return path


def trials(workplace, study):
    return optuna.load_study(study_name=study, storage=f"sqlite:///{workplace / 'optuna.db'}").get_trials()


def runs(workplace, kind):
    client = mlflow.MlflowClient(f"sqlite:///{workplace / 'mlflow.db'}")
    experiment = client.get_experiment_by_name("diffusion-dpo")
    return experiment and client.search_runs([experiment.experiment_id], f"tags.`workbench.kind` = '{kind}'")


METRICS = (
    "train/loss", "train/lr", "train/grad_norm", "rewards/margins", "rewards/accuracies", "divergence/policy",
    "divergence/reference", "kl/policy", "kl/reference", "reference/updates", "reference/frozen",
    "eval/reward", "eval/win_rate", "timestep_accuracy/t000-099", "timestep_reward/t900-999",
    "timestep_margin/t500-599", "timestep_loss/t000-099", "timestep_divergence/t900-999",
)  # fmt: skip


def check_study(workplace):
    """Four trials that are complete, tracked as runs below the study's."""
    found = trials(workplace, "s")
    assert [t.state.name for t in found] == ["COMPLETE"] * 4
    assert [t.user_attrs.get("arm") for t in found] == ["frozen", "update", None, None]
    assert found[1].params == {"reference.interval": 2, "timesteps.density": "uniform"}
    (parent,) = runs(workplace, "study")
    assert parent.info.status == "FINISHED" and parent.data.metrics["study/complete"] == 4
    children = runs(workplace, "trial")
    assert len(children) == 4
    for run in children:
        assert run.info.status == "FINISHED" and run.data.tags["mlflow.parentRunId"] == parent.info.run_id
        assert set(METRICS) <= set(run.data.metrics)
        assert run.data.params["reference.policy"] in ("frozen", "update", "threshold")
        assert "version.torch" in run.data.tags
        assert {d.dataset.name for d in run.inputs.dataset_inputs} == {"train", "validation"}


def check_report(workplace, *figures):
    """Figures as files, on a page that needs no network, and attached to the study's run."""
    for name in figures:
        assert (workplace / "reports" / "s" / f"{name}.png").stat().st_size > 10_000
        assert (workplace / "reports" / "s" / f"{name}.svg").exists()
    assert "https://cdn" not in (workplace / "reports" / "s" / "report.html").read_text()
    (parent,) = runs(workplace, "study")
    client = mlflow.MlflowClient(f"sqlite:///{workplace / 'mlflow.db'}")
    attached = {artifact.path for artifact in client.list_artifacts(parent.info.run_id, "figures")}
    assert {f"figures/{name}.png" for name in figures} <= attached


def test_sweep_and_report(experiment, workplace):
    done = invoke("sweep", experiment, "--study", "s", "--workers", 2)
    assert done.returncode == 0, done.stderr
    assert "| 0 |" in done.stdout and "python -m workbench.report --study s" in done.stdout
    check_study(workplace)

    again = invoke("sweep", experiment, "--study", "s")
    assert again.returncode == 0 and len(trials(workplace, "s")) == 4  # nothing is repeated
    more = invoke("sweep", experiment, "--study", "s", "--trials", 5)
    assert more.returncode == 0 and len(trials(workplace, "s")) == 5

    other = invoke("sweep", experiment, "--study", "s", "--set", "train.lr=0.5")
    assert other.returncode == 2 and "train.lr = 0.001, now it is 0.5" in other.stderr
    assert len(trials(workplace, "s")) == 5

    report = invoke("report", "--notebook", "divergence")
    assert report.returncode == 0, report.stderr
    check_report(workplace, "divergence")
    best = invoke("study", "best", "s", "--output", "best")
    assert best.returncode == 0, best.stderr
    (before, now), number = re.search(r"(-?[\d.]+), now (-?[\d.]+)", best.stdout).groups(), len(trials(workplace, "s"))
    assert before == now and 'DiffusionPipeline.from_pretrained("best")' in best.stdout
    assert StableDiffusionPipeline.from_pretrained(workplace / "best").unet.dtype.is_floating_point
    assert len(trials(workplace, "s")) == number  # it is no trial of the study's
    with pytest.MonkeyPatch.context() as patch:  # a kill when the model is in its folder
        patch.setattr(Snapshots, "discard", cut_off)
        with pytest.raises(CutOffError):
            invoke("study", "best", "s", "--output", "late")
    late = invoke("study", "best", "s", "--output", "late")
    assert late.returncode == 0 and "late has the model of trial" in late.stdout, late.stderr
    assert "accuracy=" in best.stderr and "step" not in late.stderr  # nothing is trained, so there is no bar
    assert not list((workplace / ".workbench/best").glob("*/*"))
    full = invoke("study", "best", "s", "--output", "best")
    absent = invoke("study", "best", "s", "--output", "x", "--trial", 99)
    assert full.returncode == 2 and "not an empty folder" in full.stderr
    assert absent.returncode == 2 and "--trial 99: no complete trial of study 's'; complete are: 0, 1" in absent.stderr
    typo = invoke("report", "-p", "smooting=3")
    assert typo.returncode == 2 and "no notebook has it" in typo.stderr
    unknown = invoke("report", "--study", "t")
    assert unknown.returncode == 2 and "there are: s" in unknown.stderr


@pytest.mark.slow
def test_sweep_and_report_from_nothing_in_processes_of_their_own(experiment, workplace):
    (workplace / "mlflow.db").unlink()
    done = workbench("workbench.sweep", str(experiment), "--study", "s", "--workers", "2", cwd=workplace)
    assert done.returncode == 0, done.stderr
    assert "| 0 |" in done.stdout + done.stderr and "python -m workbench.report --study s" in done.stdout
    check_study(workplace)
    report = workbench("workbench.report", cwd=workplace)
    assert report.returncode == 0, report.stderr
    assert re.findall(r"(\w+): skipped", report.stdout) == ["rounds", "intervals", "timesteps", "alternatives"]
    check_report(workplace, "methods", "divergence", "divergence-score", "imbalance")
    plain = subprocess.run(
        [sys.executable, "-m", "papermill", str(ROOT / "notebooks/divergence.ipynb"), "out.ipynb", "-p", "study", "s"],
        cwd=workplace, env=os.environ | {"PYTHONPATH": str(ROOT)}, capture_output=True, text=True,
    )  # fmt: skip
    assert plain.returncode == 0, plain.stderr


def test_train_saves_a_model_that_plain_diffusers_loads(tiny, workplace):
    done = invoke("train", "--output", "trained", *overrides(tiny))
    assert done.returncode == 0, done.stderr
    assert "eval/win_rate" in done.stdout
    pipe = StableDiffusionPipeline.from_pretrained(workplace / "trained")
    assert pipe("a fox on a blue background, noto style", num_inference_steps=1).images[0].size == (32, 32)
    (run,) = runs(workplace, "run")
    assert run.info.status == "FINISHED"
    full = invoke("train", "--output", "trained", *overrides(tiny))
    assert full.returncode == 2 and "not an empty folder" in full.stderr


def test_a_run_can_join_a_study(tiny, workplace):
    done = invoke("train", "--study", "mine", "--name", "one", *overrides(tiny))
    assert done.returncode == 0, done.stderr
    (parent,) = runs(workplace, "study")
    (run,) = runs(workplace, "run")
    assert run.data.tags["mlflow.parentRunId"] == parent.info.run_id


def wait_for_a_running_trial(process, workplace, seconds=600):
    """Look into the database from outside, read-only, so as not to take part in making its schema."""
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline:
        time.sleep(0.2)
        assert process.poll() is None, process.communicate()[0]
        with contextlib.suppress(sqlite3.Error):
            database = sqlite3.connect(f"file:{workplace / 'optuna.db'}?mode=ro", uri=True)
            if database.execute("SELECT 1 FROM trial_user_attributes WHERE key = 'run_id'").fetchone():
                return
    raise AssertionError("no trial started")


def start_sweep(experiment, workplace, workers, background=False):
    """A sweep in a process group of its own, as a terminal starts it, with trials long enough to be stopped.

    Args:
        background: as a script starts it with `&`: deaf to SIGINT.
    """
    arguments = ["-m", "workbench.sweep", str(experiment), "--study", "s", "--workers", str(workers)]
    process = subprocess.Popen(
        [sys.executable, *arguments, "--set", "train.steps=40"],
        cwd=workplace,
        env=os.environ | {"PYTHONPATH": str(ROOT)},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
        preexec_fn=(lambda: signal.signal(signal.SIGINT, signal.SIG_IGN)) if background else None,
    )
    wait_for_a_running_trial(process, workplace)
    return process


def resume(experiment):
    return invoke("sweep", experiment, "--study", "s", "--set", "train.steps=40")


def check_that_nothing_is_lost(workplace):
    found = trials(workplace, "s")
    complete = [t for t in found if t.state.name == "COMPLETE"]
    assert len(complete) == 4 and not any(t.state.name in ("RUNNING", "WAITING") for t in found)
    assert sorted(t.user_attrs["arm"] for t in complete if "arm" in t.user_attrs) == ["frozen", "update"]
    statuses = [run.info.status for run in runs(workplace, "trial")]
    assert statuses.count("FINISHED") == 4 and set(statuses) <= {"FINISHED", "KILLED"}
    (parent,) = runs(workplace, "study")
    assert parent.info.status == "FINISHED"
    assert len(tracking.load_runs("s")) == 4  # half-run attempts stay out of the figures


@pytest.mark.parametrize(
    "stop", [pytest.param("ctrl-c", marks=pytest.mark.slow), pytest.param("sigterm", marks=pytest.mark.slow)]
)
def test_a_stopped_sweep_ends_cleanly_and_the_same_command_goes_on(experiment, workplace, stop):
    process = start_sweep(experiment, workplace, workers=2 if stop == "sigterm" else 1, background=stop == "sigterm")
    if stop == "ctrl-c":  # a terminal signals the whole group
        os.killpg(process.pid, signal.SIGINT)
    else:
        process.send_signal(signal.SIGTERM)
    output, _ = process.communicate(timeout=300)
    assert process.returncode == 130 and "the same command again" in output, output
    assert "Traceback" not in output
    statuses = [run.info.status for run in runs(workplace, "trial")]
    assert "KILLED" in statuses and set(statuses) <= {"KILLED", "FINISHED"}, statuses
    (parent,) = runs(workplace, "study")
    assert parent.info.status == "KILLED"
    done = resume(experiment)
    assert done.returncode == 0, done.stderr
    check_that_nothing_is_lost(workplace)


@pytest.mark.slow  # in every run: workers killed at every moment of a trial, in test_survival.py
def test_a_sweep_killed_outright_goes_on_too(experiment, workplace):
    process = start_sweep(experiment, workplace, workers=2)
    os.killpg(process.pid, signal.SIGKILL)
    process.wait()
    done = resume(experiment)
    assert done.returncode == 0, done.stderr
    check_that_nothing_is_lost(workplace)


def test_a_first_mistake_does_not_use_up_the_studys_name(experiment, workplace):
    for setting, message in (
        ("model.path=nowhere", "model.path = 'nowhere'"),
        ("sweep.objective=eval/typo", "sweep.objective = 'eval/typo': runs log no such metric"),
        ("train.batch_size=5000", "train.batch_size = 5000"),
    ):
        wrong = invoke("sweep", experiment, "--study", "s", "--set", setting)
        assert wrong.returncode == 2 and message in wrong.stderr, wrong.stderr
    database = workplace / "optuna.db"
    assert not database.exists() or "s" not in optuna.get_all_study_names(f"sqlite:///{database}")
    right = invoke("sweep", experiment, "--study", "s", "--set", "sweep.trials=1")
    assert right.returncode == 0, right.stderr


def test_a_study_is_created_where_its_data_are_not_and_run_where_they_are(experiment, workplace):
    """As on the login node of a cluster."""
    away = ("--set", "data.train=nowhere.parquet", "--set", "data.prompts=nowhere.txt", "--study", "s")
    refused = invoke("sweep", experiment, *away)
    assert refused.returncode == 2 and "nowhere.txt" in refused.stderr and not (workplace / "optuna.db").exists()
    assert invoke("sweep", experiment, *away, "--init").returncode == 0
    again = invoke("sweep", experiment, *away)
    assert again.returncode == 2 and "nowhere.txt" in again.stderr


def test_a_command_ends_well_where_others_are_at_work_on_every_trial(experiment, workplace, monkeypatch):
    assert invoke("sweep", experiment, "--init").returncode == 0
    monkeypatch.setattr("workbench.studies.lifecycle.run_study", lambda *_: None)  # which then finds nothing to do
    ended = invoke("sweep", experiment)
    assert ended.returncode == 0 and "Make the figures" in ended.stdout, ended.stderr


def test_a_run_that_explodes_fails_with_its_step_and_the_sweep_goes_on(experiment, workplace):
    text = experiment.read_text().replace("update = {", 'explodes = { "train.lr" = 1e30 }\nupdate = {')
    experiment.write_text(text)
    done = invoke("sweep", experiment, "--study", "s", "--workers", 1, "--trials", 3)
    assert done.returncode == 0, done.stderr
    states = {t.user_attrs.get("arm", "sampled"): t for t in trials(workplace, "s")}
    assert states["explodes"].state.name == "FAIL" and "step 2: not finite" in states["explodes"].user_attrs["failed"]
    assert states["update"].state.name == "COMPLETE"
    failed = [r for r in runs(workplace, "trial") if r.info.status == "FAILED"]
    assert len(failed) == 1 and "step 2" in failed[0].data.tags["workbench.reason"]


def test_a_collapsed_trial_is_pruned_and_its_run_says_so(experiment, workplace):
    settings = ("--set", "sweep.prune.above=-1.0", "--set", "sweep.trials=1")
    done = invoke("sweep", experiment, "--study", "s", *settings)
    assert done.returncode == 0, done.stderr
    assert trials(workplace, "s")[0].state.name == "PRUNED"
    (run,) = runs(workplace, "trial")
    assert run.info.status == "FINISHED" and run.data.tags["workbench.state"] == "pruned"
    assert tracking.load_history(tracking.load_runs("s"))["step"].to_list() == [1, 2]


def bad(tmp_path):
    """Arguments that are a user's mistake, and what the one line must name."""
    pl.DataFrame([{k: v for k, v in r.items() if k != "jpg_1"} for r in pair_rows(4)]).write_parquet(
        tmp_path / "c.parquet"
    )
    pl.DataFrame([row | {"jpg_0": b"not an image"} for row in pair_rows(8)]).write_parquet(tmp_path / "d.parquet")
    return [
        (("--set", "reference.intervall=3"), 2, "did you mean reference.interval?"),
        (("--set", "reference.interval=0"), 2, "reference.interval = 0"),
        (("--set", "timesteps.density=discounted", "--set", "timesteps.gamma=1.5"), 2, "timesteps.gamma = 1.5"),
        (("--set", "reference.delta=-1"), 2, "reference.delta = -1"),
        (("nowhere.toml",), 2, "nowhere.toml: no such file"),
        (("--set", "model.path=nowhere"), 2, "model.path = 'nowhere'"),
        (("--set", "data.train=c.parquet"), 2, "no column jpg_1"),
        (
            ("--set", "data.train=d.parquet"),
            2,
            "no usable row (8 rows: 0 used, 0 ties, 0 unlabelled, 0 invalid, 8 undecodable)",
        ),
        (("--set", "timesteps.density=discounted", "--set", "timesteps.grid=5000"), 2, "timesteps.grid = 5000"),
        (("--study", "../evil"), 2, "--study '../evil'"),
    ]


def test_mistakes_are_one_clear_line_and_nothing_is_left_behind(tiny, workplace):
    for arguments, code, message in bad(workplace):
        settings = {k: v for k, v in tiny.items() if not any(k in a for a in arguments)}
        done = invoke("train", *overrides(settings), *arguments)
        assert done.returncode == code, (arguments, done.stderr)
        assert message in done.stderr, done.stderr
    assert not runs(workplace, "run")


def test_an_unreachable_tracking_server_is_a_failure(tiny, workplace):
    done = invoke("train", *overrides(tiny), MLFLOW_TRACKING_URI="http://127.0.0.1:9")
    assert done.returncode == 1 and "cannot be reached" in done.stderr


@pytest.mark.filterwarnings("ignore:.*found in sys.modules")
@pytest.mark.parametrize("module", [name for names in SECTIONS.values() for name in names])
def test_help_teaches(module, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", [module, "--help"])
    with pytest.raises(SystemExit) as ended:  # as `python -m` does it, in a process that has its imports
        runpy.run_module(f"workbench.{module}", run_name="__main__")
    shown = capsys.readouterr().out
    assert ended.value.code == 0 and shown.startswith("Usage: ") and len(shown) > 400


IMPORTED_FIRST = """
import sys
from importlib import import_module
for name in sys.argv[1:]:
    for loaded in [one for one in sys.modules if one.partition(".")[0] == "workbench"]:
        del sys.modules[loaded]
    import_module(f"workbench.{name}").main
    print(name)
"""


def test_every_command_can_be_the_first_that_is_imported():
    """A process that has others imported hides modules that import one another."""
    names = ["__main__", *(name for names in SECTIONS.values() for name in names)]
    done = subprocess.run(
        [sys.executable, "-c", IMPORTED_FIRST, *names],
        env=os.environ | {"PYTHONPATH": str(ROOT)}, capture_output=True, text=True, timeout=600,
    )  # fmt: skip
    assert done.stdout.split() == names and done.stderr == "", done.stderr
