"""Whole studies with several objectives or a budget, on a tiny random model."""

import mlflow
import optuna
import pytest

from tests.support.commands import invoke
from tests.support.helpers import as_toml

SWEEP = """
[sweep]
trials = 3
objective = ["eval/reward", "divergence/policy"]
direction = ["maximize", "minimize"]
constraints = { "divergence/policy" = 1000.0 }

[sweep.arms]
frozen = { "reference.policy" = "frozen" }

[sweep.space]
"train.lr" = { type = "FloatDistribution", low = 1e-4, high = 1e-2, log = true }
"""


@pytest.fixture
def experiment(tiny, workplace):
    path = workplace / "tiny.toml"
    path.write_text(as_toml(tiny) + SWEEP)
    return path


def sweep(experiment, *settings):
    options = [part for setting in settings for part in ("--set", setting)]
    return invoke("sweep", experiment, "--study", "s", "--workers", 1, *options)


def trials(workplace):
    return optuna.load_study(study_name="s", storage=f"sqlite:///{workplace / 'optuna.db'}").get_trials()


def parent(workplace):
    client = mlflow.MlflowClient(f"sqlite:///{workplace / 'mlflow.db'}")
    found = client.get_experiment_by_name("diffusion-dpo")
    (run,) = client.search_runs([found.experiment_id], "tags.`workbench.kind` = 'study'")
    return run


@pytest.mark.slow
def test_a_study_of_two_objectives_has_a_front_goes_on_and_is_drawn(experiment, workplace):
    done = sweep(experiment)
    assert done.returncode == 0, done.stderr
    assert "| trial | eval/reward | divergence/policy |" in done.stdout and ", on the front |" in done.stdout
    found = trials(workplace)
    assert [t.state.name for t in found] == ["COMPLETE"] * 3
    for trial in found:
        assert trial.constraints == {"divergence/policy": pytest.approx(trial.values[1] - 1000)}
        assert trial.values == [trial.user_attrs["eval/reward"], trial.user_attrs["divergence/policy"]]
    metrics = parent(workplace).data.metrics
    assert metrics["study/feasible"] == 3 and metrics["study/front"] >= 1 and "study/best_value" not in metrics

    more = sweep(experiment, "sweep.trials=4")
    assert more.returncode == 0 and len(trials(workplace)) == 4, more.stderr
    other = sweep(experiment, "sweep.constraints.divergence/policy=0.5")
    assert other.returncode == 2 and "was made with sweep.constraints = " in other.stderr
    alone = sweep(experiment, "sweep.objective=eval/reward")
    assert alone.returncode == 2 and "1 objective needs as many directions" in alone.stderr

    report = invoke("report", "--notebook", "search")
    assert report.returncode == 0, report.stdout + report.stderr
    folder = workplace / "reports" / "s"
    assert (folder / "search.png").stat().st_size > 10_000 and "divergence/policy" in (
        folder / "search-best.md"
    ).read_text()
    assert "importance needs 8 complete trials" in (folder / "report.html").read_text()


@pytest.mark.slow
def test_a_budget_that_none_keeps_to_leaves_no_best_trial(experiment, workplace):
    one = ('sweep.objective="eval/reward"', 'sweep.direction="maximize"', "sweep.constraints.divergence/policy=-1000.0")
    done = sweep(experiment, *one)
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("complete, beyond a constraint |") == 3
    metrics = parent(workplace).data.metrics
    assert metrics["study/feasible"] == 0 and "study/best_value" not in metrics
    report = invoke("report", "--notebook", "search")
    assert report.returncode == 0, report.stdout + report.stderr
    page = (workplace / "reports" / "s" / "report.html").read_text()
    assert "no trial of the study is within divergence/policy &lt;= -1000" in page


@pytest.mark.slow
def test_a_trial_that_collapses_is_stopped_with_several_objectives_too(experiment, workplace):
    done = sweep(experiment, "sweep.prune.above=-1000.0", "sweep.trials=2")
    assert done.returncode == 0, done.stderr
    found = trials(workplace)
    assert [t.state.name for t in found] == ["PRUNED"] * 2
    assert all(t.constraints["divergence/policy"] < 0 for t in found)


@pytest.mark.parametrize(
    ("setting", "message"),
    [
        ('sweep.objective=["eval/reward", "eval/typo"]', "sweep.objective = 'eval/typo': runs log no such metric"),
        ("sweep.constraints.divergence/polisy=0.1", "sweep.constraints = 'divergence/polisy': runs log no such metric"),
        ('sweep.tuning.factors={"train.lr" = [1.0, 3.0]}', "sweep.tuning: arms are tuned by one objective"),
    ],
)
def test_a_metric_that_no_run_logs_is_named_before_anything_runs(experiment, workplace, setting, message):
    wrong = sweep(experiment, setting)
    assert wrong.returncode == 2 and message in wrong.stderr, wrong.stderr
