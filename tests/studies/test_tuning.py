import pickle

import polars as pl
import pytest

from workbench.common.errors import UserError
from workbench.studies.experiment import Experiment
from workbench.studies.tuning import accepted, candidates, read, search
from workbench.training.config import merge
from workbench.training.experiment_file import parse_override

SETTINGS = {
    "sweep.objective": "eval/reward",
    "train.lr": 3e-5,
    "sweep.trials": 0,
    "sweep.seeds": [0, 1],
    "sweep.arms": {
        "dpo": {"reference.policy": "frozen"},
        "sft": {"objective.loss": "sft", "train.lr": 1e-4},
        "longer": {"like": "dpo", "reference.policy": "update", "reference.interval": 16},
        "hot": {"like": "dpo", "times": {"train.lr": 5}},
    },
    "sweep.tuning": {
        "factors": {"train.lr": [0.5, 1.0], "objective.beta": [1.0, 2.0]},
        "settings": {"seed": 100, "data.prompts": "validation"},
    },
}


EXPERIMENT = Experiment.resolve(SETTINGS)


def ended(rewards: dict[str, float], state: str = "complete") -> pl.DataFrame:
    return pl.DataFrame({"arm": list(rewards), "state": state, "eval/reward": list(rewards.values())})


def best_values(experiment: Experiment, runs: pl.DataFrame) -> dict[str, dict[str, float]]:
    return read(experiment, candidates(experiment), runs).best


def test_every_arm_of_its_own_tries_every_combination_of_its_own_values():
    tried = candidates(EXPERIMENT)
    assert [c.values for c in tried.values() if c.arm == "dpo"] == [
        {"train.lr": 1.5e-5, "objective.beta": 300.0},
        {"train.lr": 1.5e-5, "objective.beta": 600.0},
        {"train.lr": 3e-5, "objective.beta": 300.0},
        {"train.lr": 3e-5, "objective.beta": 600.0},
    ]
    assert [c.values for c in tried.values() if c.arm == "sft"] == [{"train.lr": 5e-5}, {"train.lr": 1e-4}]
    assert {c.arm for c in tried.values()} == {"dpo", "sft"}


def test_the_search_is_a_study_on_prompts_and_a_seed_of_its_own():
    study = search(EXPERIMENT, candidates(EXPERIMENT))
    assert len(study.arms) == 6 == study.trials
    assert study.config.data.prompts == "validation"
    assert {arm.config.seed for arm in study.arms} == {100}


def test_the_best_complete_run_decides():
    rewards = dict.fromkeys(candidates(EXPERIMENT), -3.0) | {"dpo lr=1.5e-05 beta=600": -1.0, "sft lr=0.0001": -2.0}
    assert best_values(EXPERIMENT, ended(rewards)) == {
        "dpo": {"train.lr": 1.5e-5, "objective.beta": 600.0},
        "sft": {"train.lr": 1e-4},
    }


def test_a_star_tries_one_setting_at_a_time_around_the_arms_own_values():
    star = EXPERIMENT.changed({"sweep.tuning": SETTINGS["sweep.tuning"] | {"design": "star"}})
    tried = candidates(star)
    assert [c.values for c in tried.values() if c.arm == "dpo"] == [
        {"train.lr": 3e-5, "objective.beta": 300.0},
        {"train.lr": 1.5e-5, "objective.beta": 300.0},
        {"train.lr": 3e-5, "objective.beta": 600.0},
    ]
    assert [c.values for c in tried.values() if c.arm == "sft"] == [{"train.lr": 1e-4}, {"train.lr": 5e-5}]


def test_the_search_goes_on_beyond_the_edge_and_ends_inside():
    factors = {"train.lr": [0.5, 1.0, 2.0], "objective.beta": [1.0]}
    experiment = EXPERIMENT.changed({"sweep.tuning": {"factors": factors}})
    tried = dict(candidates(experiment))
    rewards = dict.fromkeys(tried, -3.0) | {"dpo lr=6e-05 beta=300": -1.0, "sft lr=0.0001": -2.0}
    findings = read(experiment, tried, ended(rewards))
    assert findings.on_edge == {"dpo": ["train.lr"], "sft": []}
    assert [(c.arm, c.values) for c in findings.further.values()] == [
        ("dpo", {"train.lr": pytest.approx(1.2e-4), "objective.beta": 300.0})
    ]
    tried |= findings.further
    worse = read(experiment, tried, ended(rewards | {"dpo lr=0.00012 beta=300": -2.0}))
    assert worse.on_edge["dpo"] == [] and worse.further == {} and worse.best["dpo"]["train.lr"] == 6e-5
    better = read(experiment, tried, ended(rewards | {"dpo lr=0.00012 beta=300": -0.5}))
    assert [c.values["train.lr"] for c in better.further.values()] == [pytest.approx(2.4e-4)]
    assert better.count("dpo") == 4 and better.count("sft") == 3


def test_the_search_goes_on_below_the_smallest_value_too():
    experiment = EXPERIMENT.changed({"sweep.tuning": {"factors": {"train.lr": [0.25, 1.0]}}})
    findings = read(experiment, candidates(experiment), ended({"dpo lr=7.5e-06": -1.0, "dpo lr=3e-05": -2.0}))
    assert [c.values["train.lr"] for c in findings.further.values()] == [pytest.approx(7.5e-6 / 4)]


def test_the_search_ends_where_a_setting_accepts_no_more():
    tuning = {"arms": ["ema"], "factors": {"reference.rate": [0.5, 1.0], "train.lr": [0.5, 1.0]}}
    arms = {"ema": {"reference.policy": "ema", "reference.rate": 1.0}}
    experiment = EXPERIMENT.changed({"sweep.arms": arms, "sweep.tuning": tuning})
    tried = candidates(experiment)
    best = next(label for label, c in tried.items() if c.values == {"reference.rate": 1.0, "train.lr": 3e-5})
    findings = read(experiment, tried, ended({best: -1.0}))
    assert len(findings.further) == 2  # a rate of 2 is none
    assert [c.values for c in accepted(experiment, findings.further).values()] == [
        {"reference.rate": 1.0, "train.lr": pytest.approx(6e-5)}
    ]
    assert findings.on_edge["ema"] == ["reference.rate", "train.lr"]


def test_a_round_in_which_every_run_failed_finds_nothing():
    failed = pl.DataFrame({"arm": list(candidates(EXPERIMENT)), "state": "failed"})
    assert read(EXPERIMENT, candidates(EXPERIMENT), failed).best == {}


def test_the_lowest_decides_where_the_study_minimises():
    rewards = dict.fromkeys(candidates(EXPERIMENT), -3.0) | {"dpo lr=3e-05 beta=300": -5.0}
    best = best_values(EXPERIMENT.changed({"sweep.direction": "minimize"}), ended(rewards))
    assert best["dpo"] == {"train.lr": 3e-5, "objective.beta": 300.0}


def test_an_arm_without_a_complete_run_keeps_its_own_values():
    rewards = {name: -1.0 for name, c in candidates(EXPERIMENT).items() if c.arm == "dpo"}
    best = best_values(EXPERIMENT, ended(rewards))
    assert set(best) == {"dpo"}
    assert Experiment.resolve(SETTINGS, best).sweep.arms["sft"] == {"objective.loss": "sft", "train.lr": 1e-4}


def test_an_arm_changed_on_the_command_line_is_tuned_like_the_others():
    name, value = parse_override('sweep.arms.dpo={"reference.policy" = "update"}')
    changed = merge(SETTINGS, {name: value})
    experiment = Experiment.resolve(changed)
    assert len(candidates(experiment)) == len(search(experiment, candidates(experiment)).arms) == 6
    final = Experiment.resolve(changed, {"dpo": {"train.lr": 1.0}}).sweep.arms
    assert final["dpo"] == {"reference.policy": "update", "train.lr": 1.0}
    assert SETTINGS["sweep.arms"]["dpo"] == {"reference.policy": "frozen"}


def test_arms_take_what_was_found_for_them_or_for_their_model():
    tuned = {"dpo": {"train.lr": 1.5e-5, "objective.beta": 600.0}, "sft": {"train.lr": 5e-5}}
    study = Experiment.resolve(SETTINGS, tuned)
    arms = study.sweep.arms
    assert arms["longer"] == {"reference.policy": "update", "reference.interval": 16, **tuned["dpo"]}
    assert arms["hot"] == {"train.lr": 7.5e-5, "objective.beta": 600.0}
    assert arms["sft"] == {"objective.loss": "sft", "train.lr": 5e-5}
    assert len(study.arms) == 8
    assert "sweep.tuning" not in study.settings


def test_without_a_search_arms_keep_their_own_values():
    assert EXPERIMENT.sweep.arms["hot"] == {"train.lr": 1.5e-4}


@pytest.mark.parametrize(
    ("arm", "message"),
    [
        ({"like": "nobody"}, "sweep.arms.x.like = 'nobody': expected an arm that is tuned itself: dpo, sft"),
        ({"like": "hot"}, "sweep.arms.x.like = 'hot'"),
        ({"times": {"objective.gamma": 2}}, "sweep.arms.x.times.objective.gamma"),
        ({"times": {"objective.loss": 2}}, "both must be numbers"),
    ],
)
def test_mistakes_in_arms_are_named(arm, message):
    with pytest.raises(UserError, match=message.replace(".", r"\.")):
        Experiment.resolve(SETTINGS | {"sweep.arms": SETTINGS["sweep.arms"] | {"x": arm}})


def test_only_the_named_arms_are_tuned():
    tuning = SETTINGS["sweep.tuning"] | {"arms": ["sft"]}
    assert {c.arm for c in candidates(EXPERIMENT.changed({"sweep.tuning": tuning})).values()} == {"sft"}
    with pytest.raises(UserError, match=r"sweep\.tuning\.arms = 'hot': expected an arm without `like`"):
        candidates(EXPERIMENT.changed({"sweep.tuning": tuning | {"arms": ["hot"]}}))


def test_an_unknown_factor_is_named():
    with pytest.raises(UserError, match=r"sweep\.tuning\.factors\.train\.rl"):
        candidates(Experiment.resolve(SETTINGS | {"sweep.tuning": {"factors": {"train.rl": [1.0]}}}))


def test_arms_are_tuned_within_the_constraints():
    runs = pl.DataFrame({
        "arm": ["dpo lr=1.5e-05 beta=300", "dpo lr=3e-05 beta=300", "sft lr=0.0001"], "state": "complete",
        "eval/reward": [-3.0, -1.0, -2.0], "divergence/policy": [0.01, 0.03, 0.03],
    })  # fmt: skip
    best = best_values(EXPERIMENT.changed({"sweep.constraints": {"divergence/policy": 0.02}}), runs)
    assert best == {"dpo": {"train.lr": 1.5e-5, "objective.beta": 300.0}}


def test_arms_are_not_tuned_by_several_objectives():
    several = {"sweep.objective": ["eval/reward", "divergence/policy"], "sweep.direction": ["maximize", "minimize"]}
    with pytest.raises(UserError, match=r"sweep\.tuning: arms are tuned by one objective; sweep\.objective has 2"):
        candidates(Experiment.resolve(SETTINGS | several))
    untuned = {k: v for k, v in (SETTINGS | several).items() if k != "sweep.tuning"}
    assert candidates(Experiment.resolve(untuned)) == {}


def test_an_experiment_reaches_another_process_as_it_is():
    tuned = Experiment.resolve(SETTINGS, {"dpo": {"train.lr": 1.5e-5}})
    there = pickle.loads(pickle.dumps(tuned))
    assert (there.settings, there.config, there.tuned) == (tuned.settings, tuned.config, tuned.tuned)
    assert [arm.config for arm in there.arms] == [arm.config for arm in tuned.arms]


def test_how_long_a_trial_may_run_is_no_part_of_what_the_study_is():
    freer = EXPERIMENT.changed({"train.max_hours": 2.0, "train.checkpoint_every": 8, "snapshots.interval": 4})
    assert freer.definition() == EXPERIMENT.definition()
    assert EXPERIMENT.changed({"train.steps": 2}).definition() != EXPERIMENT.definition()
