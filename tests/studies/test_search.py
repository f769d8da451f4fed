"""Several objectives, constraints, and what a search found, on invented trials."""

import math

import optuna
import polars as pl
import pytest

from tests.support.searched import BOTH, REWARD, SPACE, grown, study, trial
from workbench.analysis import search_figures
from workbench.common.errors import UserError, said
from workbench.studies import results, search
from workbench.studies.experiment import Experiment
from workbench.studies.search import best_table
from workbench.studies.space import constrain, outcome
from workbench.studies.trials import feasible, label_of, line_of, summary, summary_metrics
from workbench.training.config import resolve

BOUND = {"sweep.constraints": {"divergence/policy": 0.02}}


def best(made):
    return results.read(made).trials.filter("best")["number"].to_list()


# --- what an experiment declares -----------------------------------------------------------------------------


def test_objectives_go_with_their_directions_and_a_list_of_one_is_one():
    assert resolve(BOTH).sweep.objectives == {"eval/reward": "maximize", "divergence/policy": "minimize"}
    listed = resolve({"sweep.objective": ["eval/reward"], "sweep.direction": ["minimize"]}).sweep
    assert (listed.objective, listed.objectives) == ("eval/reward", {"eval/reward": "minimize"})


def test_every_metric_that_a_study_needs_is_named_with_its_key():
    assert resolve(BOTH | BOUND | {"sweep.prune": {"metric": "kl/policy"}}).sweep.metrics == [
        ("objective", "eval/reward"), ("objective", "divergence/policy"), ("constraints", "divergence/policy"),
        ("prune.metric", "kl/policy"),
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (BOTH | {"sweep.direction": "maximize"}, "sweep.direction = 'maximize': 2 objectives need as many directions"),
        ({"sweep.direction": ["maximize", "minimize"]}, "1 objective needs as many directions"),
        ({"sweep.direction": "up"}, "sweep.direction = 'up': expected maximize or minimize"),
        (BOTH | {"sweep.objective": ["eval/reward"] * 2}, "a metric is there twice"),
        ({"sweep.objective": []}, "sweep.objective = []: expected a text or a list of texts"),
        ({"sweep.objective": 3}, "sweep.objective = 3: expected a text or a list of texts"),
        ({"sweep.constraints": {"divergence/policy": "low"}}, "sweep.constraints.divergence/policy = 'low'"),
        ({"sweep.constraints": {"divergence/policy": math.inf}}, "sweep.constraints.divergence/policy = inf"),
    ],
)
def test_a_bad_objective_direction_or_constraint_is_one_line(settings, message):
    with pytest.raises(UserError) as error:
        resolve(settings)
    assert message in str(error.value) and "\n" not in str(error.value)


# --- what Optuna is told -------------------------------------------------------------------------------------


class Told:
    """A trial that keeps its constraints."""

    def __init__(self):
        self.constraints = {}

    def set_constraint(self, key, value):
        self.constraints[key] = value


def test_a_trial_comes_to_one_number_or_to_one_an_objective():
    final = {"eval/reward": -2.0, "divergence/policy": 0.03, "train/loss": math.nan}
    assert outcome(Told(), resolve(REWARD).sweep, final) == -2.0
    assert outcome(Told(), resolve(BOTH).sweep, final) == (-2.0, 0.03)


def test_a_constraint_is_what_was_measured_minus_its_bound():
    told = Told()
    outcome(told, resolve(REWARD | BOUND).sweep, {"eval/reward": -2.0, "divergence/policy": 0.015})
    assert told.constraints == {"divergence/policy": pytest.approx(-0.005)}


@pytest.mark.parametrize("metric", ["eval/reward", "divergence/policy"])
def test_an_end_that_is_not_finite_is_a_failure_and_is_named(metric):
    final = {"eval/reward": -2.0, "divergence/policy": 0.01, metric: math.nan}
    with pytest.raises(FloatingPointError, match=f"{metric} = nan at the end"):
        outcome(Told(), resolve(REWARD | BOUND).sweep, final)


@pytest.mark.parametrize(("news", "excess"), [({"divergence/policy": 0.32}, 0.3), ({}, math.inf)])
def test_a_stopped_trial_is_beyond_what_it_did_not_live_to_measure(news, excess):
    told = Told()
    constrain(told, resolve(REWARD | BOUND).sweep, news)
    assert told.constraints == {"divergence/policy": pytest.approx(excess)}


@pytest.mark.parametrize("sampler", ["TPESampler", "NSGAIISampler"])
@pytest.mark.parametrize("wanted", [REWARD, BOTH], ids=["one", "two"])
@pytest.mark.filterwarnings("ignore::optuna.exceptions.ExperimentalWarning")
def test_samplers_take_constraints_and_objectives_with_failed_and_stopped_trials_and_go_on(sampler, wanted, tmp_path):
    space = {"sweep.space": {"train.lr": {"type": "FloatDistribution", "low": 0.0001, "high": 1.0}}}
    experiment = Experiment.resolve(wanted | BOUND | space | {"sweep.sampler": sampler})
    config = experiment.config
    made = optuna.create_study(
        study_name="s", storage=f"sqlite:///{tmp_path / 's.db'}", directions=[*config.sweep.objectives.values()]
    )

    def run(t):
        lr = t.suggest_float("train.lr", 0.0001, 1.0)
        if t.number % 5 == 1:
            raise FloatingPointError
        if t.number % 5 == 2:
            constrain(t, config.sweep, {})
            raise optuna.TrialPruned
        return outcome(t, config.sweep, {"eval/reward": lr, "divergence/policy": lr / 10})

    for session in range(2):
        made = optuna.load_study(study_name="s", storage=f"sqlite:///{tmp_path / 's.db'}")
        made.sampler = experiment.sampler(1000 * session)
        made.optimize(run, n_trials=15, catch=(FloatingPointError,))
    found = made.best_trials
    assert len(made.trials) == 30 and found and all(feasible(t) and t.values[0] <= 0.2 for t in found)


def test_a_sampler_for_one_objective_is_refused_for_several():
    with pytest.raises(UserError, match=r"sweep\.sampler = 'CmaEsSampler': .*multi-objective"):
        Experiment.resolve(BOTH | {"sweep.sampler": "CmaEsSampler", "sweep.space": SPACE})


# --- the best trial, the front -------------------------------------------------------------------------------


def test_the_front_is_what_no_other_trial_beats():
    made = study(BOTH, [
        trial(1.0, 0.1), trial(2.0, 0.2), trial(3.0, 0.3), trial(1.0, 0.2), trial(2.0, 0.3),
        trial(state="FAIL", failed="not finite"), trial(state="PRUNED"),
    ])  # fmt: skip
    assert best(made) == [0, 1, 2]


def test_trials_that_tie_are_on_the_front_together():
    assert best(study(BOTH, [trial(1.0, 0.1), trial(1.0, 0.1), trial(1.0, 0.2)])) == [0, 1]
    assert best(study(REWARD, [trial(1.0), trial(2.0), trial(2.0)])) == [1, 2]


def test_one_objective_has_the_best_within_the_constraints():
    made = study(REWARD | BOUND, [trial(1.0, beyond=-0.01), trial(3.0, beyond=0.01), trial(2.0, beyond=0.0)])
    assert best(made) == [2]
    assert summary_metrics(made) == {"study/complete": 3, "study/feasible": 2, "study/best_value": 2.0}


def test_a_front_leaves_out_what_is_beyond_a_constraint():
    made = study(BOTH | BOUND, [trial(1.0, 0.01, beyond=-0.01), trial(3.0, 0.03, beyond=0.01)])
    assert best(made) == [0]
    assert summary_metrics(made) == {"study/complete": 2, "study/feasible": 1, "study/front": 1}


def test_where_every_trial_is_beyond_a_constraint_none_is_best():
    made = study(REWARD | BOUND, [trial(1.0, beyond=0.01), trial(3.0, beyond=0.02), trial(state="PRUNED", beyond=1.0)])
    assert best(made) == []
    assert summary_metrics(made) == {"study/complete": 2, "study/pruned": 1, "study/feasible": 0}
    with pytest.raises(UserError, match=r"no trial of the study is within divergence/policy <= 0\.02"):
        best_table(results.read(made))
    search_figures.trade_off(results.read(grown(REWARD | BOUND, 3, lambda *_: 0.0)))


def test_a_study_in_which_nothing_ended_says_so():
    made = study(BOTH, [trial(state="FAIL", failed="not finite"), trial(state="PRUNED")])
    assert summary_metrics(made) == {"study/failed": 1, "study/pruned": 1, "study/front": 0}
    with pytest.raises(UserError, match="no trial of the study has come to its end"):
        search_figures.trade_off(results.read(made))


def cells(text):
    return [[cell.strip() for cell in line.strip("| ").split("|")] for line in text.splitlines()]


def test_the_closing_table_has_the_front_first_and_marks_what_is_beyond():
    made = study(BOTH | BOUND, [
        trial(state="PRUNED", beyond=0.3), trial(5.0, 0.05, beyond=0.03), trial(1.0, 0.02, beyond=0.0),
        trial(2.0, 0.02, beyond=0.0, arm="ours"), trial(1.5, 0.01, beyond=-0.01),
    ])  # fmt: skip
    head, _, *rows = cells(summary(made, resolve(BOTH | BOUND)))
    assert head == ["trial", "eval/reward", "divergence/policy", "divergence/reference", "state", "settings"]
    assert [row[0] for row in rows] == ["3", "4", "2", "1", "0"]
    assert [row[-2] for row in rows] == [
        "complete, on the front", "complete, on the front", "complete", "complete, beyond a constraint", "pruned",
    ]  # fmt: skip
    assert rows[0][1:3] == ["2.0000", "0.0200"] and rows[4][1:3] == ["", "0.3200"]


def test_one_objective_has_its_interval_and_the_best_first():
    rate = {"sweep.objective": "eval/win_rate", "sweep.direction": "maximize"}
    interval = {"eval/win_rate_low": 0.4, "eval/win_rate_high": 0.7, "eval/reward": -2.0}
    made = study(rate, [trial(0.5, **interval), trial(0.6, **interval)])
    head, _, first, second = cells(summary(made, resolve(rate)))
    assert head[:4] == ["trial", "eval/win_rate", "95 % interval", "eval/reward"]
    assert first[:4] == ["1", "0.6000", "0.400 to 0.700", "-2.0000"] and second[0] == "0"


def test_a_trials_line_has_all_its_values_and_says_what_is_beyond():
    line = line_of(study(BOTH | BOUND, [trial(5.0, 0.05, beyond=0.03, arm="ours")]).trials[0])
    assert "5.0000 0.0500" in line and line.endswith("ours  beyond a constraint")


def test_a_label_shortens_numbers_and_leaves_names_whole():
    chosen = {"train.lr": 3.456789e-06, "train.batch": 16, "data.version": "2024.10", "a.b": "1_000.5", "a.c": "1e400"}
    choices = {name: optuna.distributions.CategoricalDistribution([value]) for name, value in chosen.items()}
    made = optuna.trial.create_trial(value=0.0, params=chosen, distributions=choices)
    assert label_of(made) == "lr=3.46e-06 batch=16 version=2024.10 b=1_000.5 c=1e400"


# --- as data -------------------------------------------------------------------------------------------------


def test_trials_are_rows_with_what_was_measured_and_chosen():
    made = study(REWARD | BOUND, [
        trial(2.0, beyond=-0.01, arm="ours", overrides={"reward_scale.shape": "cosine"}),
        trial(1.0, beyond=0.01, density="discounted", gamma=0.9, **{"eval/judge": -0.1}),
        trial(state="FAIL"),
    ])  # fmt: skip
    search = results.read(made)
    ours, sampled = search.trials.to_dicts()  # an interrupted one is tried again
    about = ("arm", "inside", "feasible", "timesteps.gamma")
    assert [ours[key] for key in about] == ["ours", False, True, None]
    assert [sampled[key] for key in about] == [None, True, False, 0.9]
    assert sampled["divergence/policy"] == pytest.approx(0.03) and sampled["timesteps.density"] == "discounted"
    assert sampled["eval/judge"] == -0.1 and search.watched == ["eval/reward", "divergence/policy"]
    assert best_table(search).rows() == [("0 (ours)", "2", "0.01", "3e-05", "uniform")]


def test_the_pretrained_model_is_what_runs_gained_over():
    runs = pl.DataFrame({"eval/reward": [-2.0, -1.0], "eval/reward_gain": [0.5, 1.5], "eval/odd_gain": [1.0, 1.0]})
    assert search.pretrained(runs) == {
        "eval/reward": -2.5, "divergence/policy": 0.0, "kl/policy": 0.0, "eval/win_rate": 0.5,
    }  # fmt: skip


def test_a_study_from_before_there_were_constraints_can_be_read():
    search = results.read(study(REWARD, [trial(1.0)]))
    assert search.constraints == {} and search.objectives == {"eval/reward": "maximize"}


def test_only_what_searched_is_opened_and_nothing_is_made(workplace, monkeypatch):
    with pytest.raises(UserError, match=r"study 's': not in .*optuna\.db; WORKBENCH_STORAGE"):
        results.open_search("s")
    assert not (workplace / "optuna.db").exists()
    url = f"sqlite:///{workplace / 'optuna.db'}"
    study(REWARD, [], storage=url, name="s")
    study(REWARD | {"sweep.space": {}}, [], storage=url, name="arms")
    assert results.open_search("s").study_name == "s"
    with pytest.raises(UserError, match="study 'arms' searches nothing"):
        results.open_search("arms")
    optuna.create_study(study_name="cut short", storage=url)
    for missing, why in (("other", "': not in"), ("cut short", "' of .* was not made by the workbench")):
        with pytest.raises(UserError, match=f"study '{missing}{why}"):
            results.open_search(missing)


# --- importance ----------------------------------------------------------------------------------------------


def test_importance_finds_the_setting_that_decides():
    made = grown(BOTH, 24, lambda lr, gamma, rng: math.log(lr) + rng.normal(0, 0.1))
    found = results.importance(made).with_columns(explained=pl.col("share") * pl.col("predicted"))
    reward = {row["setting"]: row for row in found.filter(metric="eval/reward").to_dicts()}
    assert reward["train.lr"]["explained"] > 0.6 and reward["timesteps.density"]["explained"] < 0.1
    assert reward["train.lr"]["trials"] == 24
    gammas = sum("timesteps.gamma" in t.params for t in made.trials)
    assert 8 <= gammas < 24 and reward["timesteps.gamma"]["trials"] == gammas  # judged where it takes part


def test_importance_of_noise_is_none():
    made = grown(REWARD, 24, lambda lr, gamma, rng: rng.normal())
    assert results.importance(made)["predicted"].max() < 0.1
    assert results.importance(made).filter(trials=24)["share"].sum() == pytest.approx(1)


def test_importance_says_what_it_lacks():
    with pytest.raises(UserError, match="needs 8 complete trials of the space; the study has 7"):
        outside = trial(1.0, arm="odd", overrides={"objective.beta": 1.0})
        results.importance(study(REWARD, [*(trial(float(i)) for i in range(7)), outside, trial(state="PRUNED")]))
    with pytest.raises(UserError, match="no metric differs"):
        results.importance(study(REWARD, [trial(1.0)] * 8))
    with pytest.raises(UserError, match=r"no sweep\.space"):
        results.importance(study(REWARD | {"sweep.space": {}}, [trial(1.0)] * 8))


def test_what_cannot_be_shown_is_said(capsys):
    with said():
        raise UserError("too few trials")
    assert capsys.readouterr().out == "Not shown: too few trials\n"


# --- the pruner ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"sweep.pruner": "Nobody"}, "sweep.pruner = 'Nobody': no such class in optuna.pruners"),
        ({"sweep.pruner": "PercentilePruner"}, "sweep.pruner_options = {}"),
        ({"sweep.pruner": "MedianPruner", "sweep.pruner_options": {"n": 1}}, "sweep.pruner_options = {'n': 1}"),
        (BOTH | {"sweep.pruner": "MedianPruner"}, "sweep.pruner = 'MedianPruner': Optuna prunes for one objective"),
    ],
)
def test_a_pruner_that_cannot_be_is_one_line(settings, message):
    with pytest.raises(UserError) as error:
        Experiment.resolve(settings)
    assert message in str(error.value)


def test_what_a_pruner_sees_is_among_what_a_study_needs_only_where_there_is_one():
    assert ("pruner_metric", "samples/reward_gain") in resolve({"sweep.pruner": "MedianPruner"}).sweep.metrics
    assert "pruner_metric" not in dict(resolve({}).sweep.metrics)


def test_soft_labels_can_be_searched_where_the_scores_are_named():
    space = {"objective.label": {"type": "CategoricalDistribution", "choices": ["hard", "soft"]}}
    settings = {"sweep.space": space, "sweep.trials": 1}
    assert Experiment.resolve(settings | {"data.scores": "reward"}).space[0].name == "objective.label"
    with pytest.raises(UserError, match=r"data\.scores"):
        Experiment.resolve(settings)
