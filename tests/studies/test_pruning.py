"""Trials that do not keep up are stopped; arms, and what they are compared with, are not."""

import math

import optuna
import pytest
from sqlalchemy.exc import OperationalError

from tests.support.runs import run
from tests.support.studies import Events, made, steps_of
from workbench import tracking
from workbench.studies import storage, trials, workers
from workbench.studies.attempt import Attempt
from workbench.studies.experiment import Experiment

pytestmark = pytest.mark.filterwarnings("ignore")


@pytest.fixture
def declared(tiny, workplace):
    """Two arms and three sampled trials; every sampled one is worse than its fellows, as this pruner sees it."""
    quick = {"train.steps": 8, "snapshots.interval": 2, "evaluation.grid": 2}
    space = {"train.lr": {"type": "FloatDistribution", "low": 1e-4, "high": 1e-3}}
    arms = {"frozen": {"reference.policy": "frozen"}, "update": {"reference.policy": "update"}}
    # kept is what gains more than 100 nats: nothing does
    pruner = {"sweep.pruner": "ThresholdPruner", "sweep.pruner_options": {"lower": 100.0, "n_warmup_steps": 3}}
    return tiny | quick | pruner | {"sweep.trials": 5, "sweep.space": space, "sweep.arms": arms}


def test_sampled_trials_are_stopped_and_arms_run_to_their_end(declared):
    study, client, assignment = made(declared)
    workers.run_trials(assignment, Events(), lambda: False)
    found = study.get_trials()
    assert [trials.state_of(t) for t in found] == ["complete"] * 2 + ["pruned"] * 3
    assert [t.user_attrs["progress"]["step"] for t in found] == [8, 8, 4, 4, 4]
    for trial in found:
        drawn = client.get_metric_history(trial.user_attrs["run_id"], "samples/reward_gain")
        assert {p.step: p.value for p in drawn if p.step < 8} == {
            step: value for step, value in trial.intermediate_values.items() if step < 8
        }
        assert len(steps_of(client, trial)) == trial.user_attrs["progress"]["step"]
    reasons = {t.user_attrs["reason"].partition(" = ")[0] for t in found[2:]}
    assert reasons == {"samples/reward_gain"} and "does not keep up" in found[2].user_attrs["reason"]
    # What the objective has come to so far is kept, though the pruner goes by another metric; Optuna knows its name.
    for trial in found[2:]:
        drawn = client.get_metric_history(trial.user_attrs["run_id"], "samples/win_rate")
        assert trial.user_attrs["samples/win_rate"] == drawn[-1].value and "divergence/policy" in trial.user_attrs
        # Optuna's own pages list it beside the objective of complete trials.
        assert trial.values == [drawn[-1].value]
    assert study.metric_names == ["eval/win_rate"]
    runs = tracking.load_runs("s")
    assert sorted(runs["state"]) == ["complete"] * 2 + ["pruned"] * 3


def test_a_value_that_optuna_cannot_be_given_hurts_nobody(declared, monkeypatch):
    def away(*_):
        raise OperationalError("UPDATE", {}, Exception("gone"))

    monkeypatch.setattr(storage, "set_pruned_value", away)
    study, client, assignment = made(declared | {"sweep.trials": 3})
    workers.run_trials(assignment, Events(), lambda: False)
    assert [trials.state_of(t) for t in study.get_trials()] == ["complete"] * 2 + ["pruned"]
    assert client.get_run(study.get_trials()[2].user_attrs["run_id"]).data.tags["workbench.state"] == "pruned"


def test_a_trial_that_goes_on_has_told_the_pruner_what_it_told_before(declared):
    settings = declared | {"sweep.trials": 3, "sweep.pruner_options": {"lower": -100.0}}
    study, _, assignment = made(settings)
    asked = iter(range(1000))
    with pytest.raises(KeyboardInterrupt):
        workers.run_trials(assignment, Events(), lambda: next(asked) > 7)  # in the first trial
    first = study.get_trials()[0]
    assert first.user_attrs["handed_back"] and 2 in first.intermediate_values
    workers.run_trials(assignment, Events(), lambda: False)
    (again,) = (t for t in study.get_trials() if t.user_attrs.get("retry_of") == 0)
    assert sorted(again.intermediate_values) == [2, 4, 6]  # at the end there is nothing left to stop
    assert first.intermediate_values.items() <= again.intermediate_values.items()


@pytest.fixture
def simple(declared):
    """One trial of four steps, with a pass after every second and nothing drawn: quick to train."""
    quick = {"train.steps": 4, "diagnostics.interval": 2, "evaluation.grid": 0, "evaluation.seeds": 0}
    objective = {"sweep.objective": "validation/margin", "sweep.arms": {}, "sweep.trials": 1}
    return declared | quick | objective


def test_the_pruner_and_the_bound_hear_a_step_s_own_metrics_at_the_passes_alone(simple):
    """On a GPU a few steps at once are read: whether a trial is stopped would hang on the device."""
    settings = simple | {"sweep.pruner_metric": "train/loss", "sweep.pruner_options": {"lower": -100.0}}
    study, _, assignment = made(settings)
    events = Events()
    workers.run_trials(assignment, events, lambda: False)
    (trial,) = study.get_trials()
    assert sorted(trial.intermediate_values) == [2, 4]
    assert sum("loss" in value for kind, value in events.sent if kind == "measured") == 4  # the bar hears of each
    study, _, assignment = made(settings | {"sweep.prune.metric": "train/loss", "sweep.prune.above": -1.0}, "t")
    workers.run_trials(assignment, Events(), lambda: False)
    assert [t.user_attrs["progress"]["step"] for t in study.get_trials()] == [2]


def test_a_trial_that_resumes_keeps_what_it_had_measured(simple, monkeypatch):
    """It is stopped before its next pass, and says all the same what its objective had come to."""
    study, _, assignment = made(simple | {"sweep.pruner": "NopPruner", "snapshots.interval": 1})
    asked = iter(range(1000))
    with pytest.raises(KeyboardInterrupt):
        workers.run_trials(assignment, Events(), lambda: next(asked) > 2)
    assert study.get_trials()[0].user_attrs["snapshot"] == 2
    monkeypatch.setattr(Attempt, "_collapsed", lambda self, step, metrics: "so" if metrics else "")
    workers.run_trials(assignment, Events(), lambda: False)
    trial = study.get_trials()[1]
    assert trial.user_attrs["progress"]["step"] == 3 and math.isfinite(trial.user_attrs["validation/margin"])
    assert trial.values == [trial.user_attrs["validation/margin"]]


def test_the_reward_while_it_trains_ends_as_the_evaluation_has_it(tiny, workplace):
    notes: list = []

    class Notes:
        def log(self, step, metrics):
            notes.append((step, dict(metrics)))

        def image(self, *_): ...
        def picture(self, *_): ...
        def table(self, file, columns):
            if file == "samples.json":
                notes.append(("samples", columns))

    final = run(tiny | {"evaluation.seeds": 2, "evaluation.grid": 4}, Notes())
    (samples,) = (what for step, what in notes if step == "samples")
    gain = [ours - theirs for ours, theirs in zip(samples["reward"], samples["pretrained_reward"], strict=True)]
    assert final["samples/reward_gain"] == pytest.approx(sum(gain[:4]) / 4)  # the first seed of every prompt
    curve = {step: metrics["samples/reward"] for step, metrics in notes if "samples/reward" in metrics}
    assert sorted(curve) == [2, 4] and curve[4] == pytest.approx(sum(samples["reward"][:4]) / 4)


def test_the_default_sweep_prunes_by_what_its_runs_log():
    from workbench.sweep import DEFAULT
    from workbench.training.experiment_file import read
    from workbench.training.measurements import metric_names

    default = Experiment.resolve(read(DEFAULT))
    assert not isinstance(default.pruner(), optuna.pruners.NopPruner)
    assert {metric for _, metric in default.sweep.metrics} <= metric_names(default.config)
