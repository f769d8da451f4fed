"""Whole commands, as a user runs them, on a tiny random model."""

import contextlib
import os
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

from tests.support.helpers import ROOT, as_toml, overrides, pair_rows, workbench
from workbench import tracking

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


def test_sweep_train_and_report_from_nothing(experiment, workplace):
    done = workbench("workbench.sweep", str(experiment), "--study", "s", "--workers", "2", cwd=workplace)
    assert done.returncode == 0, done.stderr
    assert "| 0 |" in done.stdout + done.stderr and "python -m workbench.report --study s" in done.stdout
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
        for metric in (
            "train/loss", "train/lr", "train/grad_norm", "rewards/margins", "rewards/accuracies", "divergence/policy",
            "divergence/reference", "kl/policy", "kl/reference", "reference/updates", "reference/frozen",
            "eval/reward", "eval/win_rate", "timestep_accuracy/t000-099", "timestep_reward/t900-999",
            "timestep_margin/t500-599", "timestep_loss/t000-099", "timestep_divergence/t900-999",
        ):  # fmt: skip
            assert metric in run.data.metrics, metric
        assert run.data.params["reference.policy"] in ("frozen", "update", "threshold")
        assert "version.torch" in run.data.tags
        assert {d.dataset.name for d in run.inputs.dataset_inputs} == {"train", "validation"}

    again = workbench("workbench.sweep", str(experiment), "--study", "s", cwd=workplace)
    assert again.returncode == 0 and len(trials(workplace, "s")) == 4  # nothing is repeated
    more = workbench("workbench.sweep", str(experiment), "--study", "s", "--trials", "5", cwd=workplace)
    assert more.returncode == 0 and len(trials(workplace, "s")) == 5

    other = workbench("workbench.sweep", str(experiment), "--study", "s", "--set", "train.lr=0.5", cwd=workplace)
    assert other.returncode == 2 and "train.lr = 0.001, now it is 0.5" in other.stderr
    assert len(trials(workplace, "s")) == 5

    report = workbench("workbench.report", cwd=workplace)
    assert report.returncode == 0, report.stderr
    for name in ("divergence", "divergence-score", "imbalance"):
        assert (workplace / "reports" / "s" / f"{name}.png").stat().st_size > 10_000
        assert (workplace / "reports" / "s" / f"{name}.svg").exists()
    assert "methods: skipped (arm 'kto'" in report.stdout
    page = (workplace / "reports" / "s" / "report.html").read_text()
    assert "https://cdn" not in page  # the page needs no network
    names = {
        a.path
        for a in mlflow.MlflowClient(f"sqlite:///{workplace / 'mlflow.db'}").list_artifacts(
            parent.info.run_id, "figures"
        )
    }
    assert "figures/divergence.png" in names

    plain = subprocess.run(
        [sys.executable, "-m", "papermill", str(ROOT / "notebooks/divergence.ipynb"), "out.ipynb", "-p", "study", "s"],
        cwd=workplace, env=os.environ | {"PYTHONPATH": str(ROOT)}, capture_output=True, text=True,
    )  # fmt: skip
    assert plain.returncode == 0, plain.stderr

    typo = workbench("workbench.report", "-p", "smooting=3", cwd=workplace)
    assert typo.returncode == 2 and "no notebook has it" in typo.stderr
    unknown = workbench("workbench.report", "--study", "t", cwd=workplace)
    assert unknown.returncode == 2 and "there are: s" in unknown.stderr


def test_train_saves_a_model_that_plain_diffusers_loads(tiny, workplace):
    done = workbench("workbench.train", "--output", "trained", *overrides(tiny), cwd=workplace)
    assert done.returncode == 0, done.stderr
    assert "eval/win_rate" in done.stdout
    pipe = StableDiffusionPipeline.from_pretrained(workplace / "trained")
    assert pipe("a fox on a blue background, noto style", num_inference_steps=1).images[0].size == (32, 32)
    (run,) = runs(workplace, "run")
    assert run.info.status == "FINISHED"
    full = workbench("workbench.train", "--output", "trained", *overrides(tiny), cwd=workplace)
    assert full.returncode == 2 and "not an empty folder" in full.stderr


def test_a_run_can_join_a_study(tiny, workplace):
    done = workbench("workbench.train", "--study", "mine", "--name", "one", *overrides(tiny), cwd=workplace)
    assert done.returncode == 0, done.stderr
    (parent,) = runs(workplace, "study")
    (run,) = runs(workplace, "run")
    assert run.data.tags["mlflow.parentRunId"] == parent.info.run_id


def wait_for_a_running_trial(workplace, seconds=120):
    """Look into the database from outside, read-only, so as not to take part in making its schema."""
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline:
        time.sleep(0.2)
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
    wait_for_a_running_trial(workplace)
    return process


def resume(experiment, workplace):
    return workbench("workbench.sweep", str(experiment), "--study", "s", "--set", "train.steps=40", cwd=workplace)


def check_that_nothing_is_lost(workplace):
    found = trials(workplace, "s")
    complete = [t for t in found if t.state.name == "COMPLETE"]
    assert len(complete) == 4 and not any(t.state.name in ("RUNNING", "WAITING") for t in found)
    assert sorted(t.user_attrs["arm"] for t in complete if "arm" in t.user_attrs) == ["frozen", "update"]
    statuses = [run.info.status for run in runs(workplace, "trial")]
    assert statuses.count("FINISHED") == 4 and set(statuses) <= {"FINISHED", "KILLED"}
    (parent,) = runs(workplace, "study")
    assert parent.info.status == "FINISHED"
    assert len(tracking_runs(workplace)) == 4  # half-run attempts stay out of the figures


def tracking_runs(workplace):
    return tracking.load_runs("s")


@pytest.mark.parametrize("stop", ["ctrl-c", "sigterm"])
def test_a_stopped_sweep_ends_cleanly_and_the_same_command_goes_on(experiment, workplace, stop):
    process = start_sweep(experiment, workplace, workers=2, background=stop == "sigterm")
    if stop == "ctrl-c":  # a terminal signals the whole group
        os.killpg(process.pid, signal.SIGINT)
    else:
        process.send_signal(signal.SIGTERM)
    output, _ = process.communicate(timeout=90)
    assert process.returncode == 130 and "the same command again" in output, output
    assert "Traceback" not in output
    statuses = [run.info.status for run in runs(workplace, "trial")]
    assert "KILLED" in statuses and set(statuses) <= {"KILLED", "FINISHED"}, statuses
    (parent,) = runs(workplace, "study")
    assert parent.info.status == "KILLED"
    done = resume(experiment, workplace)
    assert done.returncode == 0, done.stderr
    check_that_nothing_is_lost(workplace)


def test_a_sweep_killed_outright_goes_on_too(experiment, workplace):
    process = start_sweep(experiment, workplace, workers=2)
    os.killpg(process.pid, signal.SIGKILL)
    process.wait()
    done = resume(experiment, workplace)
    assert done.returncode == 0, done.stderr
    check_that_nothing_is_lost(workplace)


def test_a_first_mistake_does_not_use_up_the_studys_name(experiment, workplace):
    for setting, message in (
        ("model.path=nowhere", "model.path = 'nowhere'"),
        ("sweep.objective=eval/typo", "sweep.objective = 'eval/typo': runs log no such metric"),
        ("train.batch_size=5000", "train.batch_size = 5000"),
    ):
        wrong = workbench("workbench.sweep", str(experiment), "--study", "s", "--set", setting, cwd=workplace)
        assert wrong.returncode == 2 and message in wrong.stderr and "Traceback" not in wrong.stderr, wrong.stderr
    assert (
        "s" not in optuna.get_all_study_names(f"sqlite:///{workplace / 'optuna.db'}")
        if (workplace / "optuna.db").exists()
        else True
    )
    right = workbench("workbench.sweep", str(experiment), "--study", "s", "--set", "sweep.trials=1", cwd=workplace)
    assert right.returncode == 0, right.stderr


def test_a_run_that_explodes_fails_with_its_step_and_the_sweep_goes_on(experiment, workplace):
    text = experiment.read_text().replace("update = {", 'explodes = { "train.lr" = 1e30 }\nupdate = {')
    experiment.write_text(text)
    done = workbench("workbench.sweep", str(experiment), "--study", "s", "--workers", "1", cwd=workplace)
    assert done.returncode == 0, done.stderr
    states = {t.user_attrs.get("arm", "sampled"): t for t in trials(workplace, "s")}
    assert states["explodes"].state.name == "FAIL" and "step 2: not finite" in states["explodes"].user_attrs["failed"]
    assert states["update"].state.name == "COMPLETE"
    failed = [r for r in runs(workplace, "trial") if r.info.status == "FAILED"]
    assert len(failed) == 1 and "step 2" in failed[0].data.tags["workbench.reason"]


def test_a_collapsed_trial_is_pruned_and_its_run_says_so(experiment, workplace, monkeypatch):
    settings = ("--set", "sweep.prune.above=-1.0", "--set", "sweep.trials=1")
    done = workbench("workbench.sweep", str(experiment), "--study", "s", *settings, cwd=workplace)
    assert done.returncode == 0, done.stderr
    assert trials(workplace, "s")[0].state.name == "PRUNED"
    (run,) = runs(workplace, "trial")
    assert run.info.status == "KILLED" and run.data.tags["workbench.state"] == "pruned"
    monkeypatch.chdir(workplace)
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
        done = workbench("workbench.train", *overrides(settings), *arguments, cwd=workplace)
        assert done.returncode == code, (arguments, done.stderr)
        assert message in done.stderr and "Traceback" not in done.stderr, done.stderr
    assert not runs(workplace, "run")


def test_an_unreachable_tracking_server_is_a_failure(tiny, workplace):
    done = workbench("workbench.train", *overrides(tiny), cwd=workplace, MLFLOW_TRACKING_URI="http://127.0.0.1:9")
    assert done.returncode == 1 and "cannot be reached" in done.stderr and "Traceback" not in done.stderr


@pytest.mark.parametrize("module", ["sweep", "claims", "train", "encode", "evaluate", "report", "prefer", "pretrain"])
def test_help_teaches(module, workplace):
    done = workbench(f"workbench.{module}", "--help", cwd=workplace)
    assert done.returncode == 0 and "Usage:" in done.stdout and len(done.stdout) > 400
