"""The numbers beside a bar of trainings."""

import io
import multiprocessing
from types import SimpleNamespace

import optuna
import pytest

from workbench.common.progress import Progress
from workbench.studies import training_bar, workers
from workbench.training import samples
from workbench.training.samples import Sampling
from workbench.training.tables import Evaluation


def beside(monkeypatch, *runs, best=None):
    monkeypatch.setattr("sys.stderr", io.StringIO())
    with Progress(total=1, desc="study") as bar:
        training_bar.show(bar, *map(training_bar.shown, runs), best=best)
        return bar.postfix


def test_the_bar_has_the_best_so_far_and_the_means_of_the_runs_under_way(monkeypatch):
    first = {"train/loss": 0.5, "rewards/accuracies": 1.0, "train/grad_norm": 3.0}
    second = {"train/loss": 0.7, "rewards/accuracies": 0.5, "divergence/policy": 0.0123}
    told = beside(monkeypatch, first, second, best=0.8125)
    assert told == "best=0.812, loss=0.6, accuracy=0.75, divergence=0.0123"
    assert beside(monkeypatch, first) == "loss=0.5, accuracy=1"
    assert not beside(monkeypatch)


def test_the_bar_of_one_training_keeps_what_is_not_measured_at_every_step(monkeypatch):
    monkeypatch.setattr("sys.stderr", io.StringIO())
    with Progress(total=2, desc="trial 3", unit="step") as bar:
        on_step, on_evaluated = training_bar.following(bar, 2)
        on_step(1, {"train/loss": 0.5, "divergence/policy": 0.25})
        assert (bar.n, bar.desc, bar.postfix) == (1, "trial 3: training: ", "loss=0.5, divergence=0.25")
        on_step(2, {"train/loss": 0.4})
        assert (bar.n, bar.desc, bar.postfix) == (2, "trial 3: evaluating: ", "loss=0.4, divergence=0.25")
        on_evaluated(0.5)
        assert bar.desc == "trial 3: evaluating 50 %: "


@pytest.mark.parametrize("parent", [None, "the command"])
def test_a_worker_draws_no_bar_over_that_of_its_command(parent, monkeypatch):
    monkeypatch.setattr("sys.stderr", told := io.StringIO())
    monkeypatch.setattr(multiprocessing, "parent_process", lambda: parent)
    drawing = Sampling(None, Evaluation(seeds=1), ["a fox", "a cat"])
    with monkeypatch.context() as patch:
        patch.setattr(Sampling, "draw_plan", lambda sampling, denoiser, on_share: on_share(1.0))
        samples._with_bar(drawing, None)
    assert ("draw the pretrained model's samples" in told.getvalue()) == (parent is None)


@pytest.mark.filterwarnings("ignore")
def test_the_best_so_far_is_that_of_a_study_of_one_objective():
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    study = optuna.create_study(direction="maximize")
    assert training_bar.best_so_far(study) is None
    study.optimize(lambda trial: trial.number, n_trials=3)
    assert training_bar.best_so_far(study) == 2
    assert training_bar.best_so_far(optuna.create_study(directions=["maximize", "minimize"])) is None


@pytest.mark.filterwarnings("ignore")
def test_the_best_is_asked_for_once_however_many_trials_have_ended(monkeypatch):
    """Optuna copies every trial to tell."""
    monkeypatch.setattr("sys.stderr", io.StringIO())
    study = optuna.create_study(direction="maximize")
    experiment = SimpleNamespace(trials=8, config=SimpleNamespace(train=SimpleNamespace(steps=1)))
    pool = SimpleNamespace(experiment=experiment)
    supervisor = workers._Supervisor(pool, study)
    asked = []
    best = training_bar.best_so_far
    monkeypatch.setattr(training_bar, "best_so_far", lambda study: asked.append(1) or best(study))
    for ended in (3, 3, 5):
        study.optimize(lambda trial: trial.number, n_trials=ended - len(study.trials))
        supervisor.show_ended()
        assert (supervisor.ended, supervisor.best) == (ended, ended - 1)
    supervisor.bar.close()
    assert len(asked) == 2
