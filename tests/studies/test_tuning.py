import polars as pl
import pytest

from workbench.common.errors import UserError
from workbench.studies.space import arms_of
from workbench.studies.tuning import candidates, found, search, settle
from workbench.training.config import merge, parse_override, resolve

SETTINGS = {
    "sweep.objective": "eval/reward",
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


def ended(rewards: dict[str, float], state: str = "complete") -> pl.DataFrame:
    return pl.DataFrame({"arm": list(rewards), "state": state, "eval/reward": list(rewards.values())})


def test_every_arm_of_its_own_tries_every_combination_of_its_own_values():
    tried = candidates(SETTINGS)
    assert [c.values for c in tried.values() if c.arm == "dpo"] == [
        {"train.lr": 1.5e-5, "objective.beta": 300.0},
        {"train.lr": 1.5e-5, "objective.beta": 600.0},
        {"train.lr": 3e-5, "objective.beta": 300.0},
        {"train.lr": 3e-5, "objective.beta": 600.0},
    ]
    assert [c.values for c in tried.values() if c.arm == "sft"] == [{"train.lr": 5e-5}, {"train.lr": 1e-4}]
    assert {c.arm for c in tried.values()} == {"dpo", "sft"}


def test_the_search_is_a_study_on_prompts_and_a_seed_of_its_own():
    study = search(SETTINGS)
    queued = arms_of(resolve(study), study)
    assert len(queued) == 6
    assert study["data.prompts"] == "validation"
    assert {attributes["overrides"]["seed"] for _, attributes in queued} == {100}


def test_the_best_complete_run_decides():
    rewards = dict.fromkeys(candidates(SETTINGS), -3.0) | {"dpo lr=1.5e-05 beta=600": -1.0, "sft lr=0.0001": -2.0}
    assert found(SETTINGS, ended(rewards)) == {
        "dpo": {"train.lr": 1.5e-5, "objective.beta": 600.0},
        "sft": {"train.lr": 1e-4},
    }


def test_the_lowest_decides_where_the_study_minimises():
    rewards = dict.fromkeys(candidates(SETTINGS), -3.0) | {"dpo lr=3e-05 beta=300": -5.0}
    best = found(SETTINGS | {"sweep.direction": "minimize"}, ended(rewards))
    assert best["dpo"] == {"train.lr": 3e-5, "objective.beta": 300.0}


def test_an_arm_without_a_complete_run_keeps_its_own_values():
    rewards = {name: -1.0 for name, c in candidates(SETTINGS).items() if c.arm == "dpo"}
    best = found(SETTINGS, ended(rewards))
    assert set(best) == {"dpo"}
    assert settle(SETTINGS, best)["sweep.arms"]["sft"] == {"objective.loss": "sft", "train.lr": 1e-4}


def test_an_arm_changed_on_the_command_line_is_tuned_like_the_others():
    name, value = parse_override('sweep.arms.dpo={"reference.policy" = "update"}')
    changed = merge(SETTINGS, {name: value})
    assert len(candidates(changed)) == len(search(changed)["sweep.arms"]) == 6
    settled = resolve(settle(changed, {"dpo": {"train.lr": 1.0}})).sweep.arms
    assert settled["dpo"] == {"reference.policy": "update", "train.lr": 1.0}
    assert SETTINGS["sweep.arms"]["dpo"] == {"reference.policy": "frozen"}


def test_arms_take_what_was_found_for_them_or_for_their_model():
    tuned = {"dpo": {"train.lr": 1.5e-5, "objective.beta": 600.0}, "sft": {"train.lr": 5e-5}}
    study = settle(SETTINGS, tuned)
    arms = study["sweep.arms"]
    assert arms["longer"] == {"reference.policy": "update", "reference.interval": 16, **tuned["dpo"]}
    assert arms["hot"] == {"train.lr": 7.5e-5, "objective.beta": 600.0}
    assert arms["sft"] == {"objective.loss": "sft", "train.lr": 5e-5}
    assert len(arms_of(resolve(study), study)) == 8
    assert "sweep.tuning" not in study


def test_without_a_search_arms_keep_their_own_values():
    assert settle(SETTINGS, {})["sweep.arms"]["hot"] == {"train.lr": 1.5e-4}


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
        settle(SETTINGS | {"sweep.arms": SETTINGS["sweep.arms"] | {"x": arm}}, {})


def test_an_unknown_factor_is_named():
    with pytest.raises(UserError, match=r"sweep\.tuning\.factors\.train\.rl"):
        candidates(SETTINGS | {"sweep.tuning": {"factors": {"train.rl": [1.0]}}})


def test_arms_are_tuned_within_the_constraints():
    runs = pl.DataFrame({
        "arm": ["dpo lr=1.5e-05 beta=300", "dpo lr=3e-05 beta=300", "sft lr=0.0001"], "state": "complete",
        "eval/reward": [-3.0, -1.0, -2.0], "divergence/policy": [0.01, 0.03, 0.03],
    })  # fmt: skip
    best = found(SETTINGS | {"sweep.constraints": {"divergence/policy": 0.02}}, runs)
    assert best == {"dpo": {"train.lr": 1.5e-5, "objective.beta": 300.0}}


def test_arms_are_not_tuned_by_several_objectives():
    several = {"sweep.objective": ["eval/reward", "divergence/policy"], "sweep.direction": ["maximize", "minimize"]}
    with pytest.raises(UserError, match=r"sweep\.tuning: arms are tuned by one objective; sweep\.objective has 2"):
        candidates(SETTINGS | several)
    assert candidates({k: v for k, v in (SETTINGS | several).items() if k != "sweep.tuning"}) == {}
