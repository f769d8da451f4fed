from pathlib import Path

import pytest

from workbench.common.errors import UserError
from workbench.common.paths import shipped
from workbench.studies.experiment import Experiment
from workbench.studies.space import read_space
from workbench.training.config import completed, merge, resolve
from workbench.training.experiment_file import load, parse_override, read

EXPERIMENTS = sorted((Path(__file__).parents[2] / "experiments").glob("*.toml"))


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"reference.intervall": 3}, "reference.intervall: unknown setting (did you mean reference.interval?)"),
        ({"reference.interval": 0}, "reference.interval = 0: input should be greater than 0"),
        (
            {"timesteps.density": "discounted", "timesteps.gamma": 1.5},
            "timesteps.gamma = 1.5: input should be less than or",
        ),
        ({"reference.delta": -0.1}, "reference.delta = -0.1: input should be greater than or equal to 0"),
        ({"reference.delta": float("nan")}, "reference.delta"),
        ({"reference.policy": "thaw"}, "reference.policy = 'thaw': expected one of frozen, update, threshold"),
        ({"reference.policy": "frozen", "reference.delta": 0.1}, "not a setting of this policy"),
        ({"reference.on_exceed": "stop"}, "reference.on_exceed = 'stop'"),
        ({"train.lr": "fast"}, "train.lr = 'fast'"),
        ({"train.steps": 2.5}, "train.steps = 2.5"),
        ({"train": 3}, "train = 3"),
        ({"objective.beta": 0}, "objective.beta = 0"),
        ({"nonsense": 1}, "nonsense: unknown setting"),
        ({"reward_scale.shape": "power", "reward_scale.exponent": -1}, "reward_scale.exponent = -1"),
    ],
)
def test_a_bad_setting_is_one_line_with_key_value_and_what_is_accepted(settings, message):
    with pytest.raises(UserError) as error:
        resolve(settings)
    assert message in str(error.value) and "\n" not in str(error.value)


def test_functions_hold_the_defaults_and_they_are_resolved():
    flat = resolve({"timesteps.density": "discounted"}).flat()
    assert flat["timesteps.gamma"] == 0.9 and flat["timesteps.grid"] == 50
    assert flat["objective.beta"] == 300.0


def test_choosing_another_function_drops_only_the_arguments_it_does_not_take():
    base = {"reference.policy": "threshold", "reference.delta": 0.1, "reference.interval": 4, "seed": 3}
    assert merge(base, {"reference.policy": "update"}) == {
        "reference.policy": "update",
        "reference.interval": 4,
        "seed": 3,
    }


def test_a_tilde_in_a_path_is_the_home_folder(monkeypatch):
    monkeypatch.setenv("HOME", "/home/ada")
    config = resolve({"data.train": "~/pairs:validation", "data.prompts": "~/p.txt", "model.path": "embedded"})
    assert config.data.train == "/home/ada/pairs:validation" and config.data.prompts == "/home/ada/p.txt"
    assert config.model.path == "embedded"


def test_an_override_is_read_as_toml_or_else_as_text():
    assert parse_override("reference.interval=16") == ("reference.interval", 16)
    assert parse_override("train.betas=[0.9, 0.95]") == ("train.betas", [0.9, 0.95])
    assert parse_override("reference.policy=update") == ("reference.policy", "update")
    with pytest.raises(UserError, match="expected KEY=VALUE"):
        parse_override("reference.interval")


def test_overrides_win_over_the_file(tmp_path):
    file = tmp_path / "e.toml"
    file.write_text('seed = 3\n[reference]\npolicy = "update"\ninterval = 4\n')
    config = load(file, {"reference.interval": 32})
    assert config.flat()["reference.interval"] == 32 and config.seed == 3


def test_paths_in_a_file_are_relative_to_it(tmp_path):
    (tmp_path / "pairs.parquet").touch()
    (tmp_path / "e.toml").write_text('[data]\ntrain = "pairs.parquet"\n')
    assert read(tmp_path / "e.toml")["data.train"] == str(tmp_path / "pairs.parquet")


@pytest.mark.parametrize("text", ["[reference", "seed = ", "\x00"])
def test_a_file_that_is_not_toml_is_one_line(tmp_path, text):
    (tmp_path / "e.toml").write_text(text)
    with pytest.raises(UserError, match="not valid TOML"):
        load(tmp_path / "e.toml")


def test_a_missing_file_is_named(tmp_path):
    with pytest.raises(UserError, match=r"nowhere\.toml: no such file"):
        load(tmp_path / "nowhere.toml")


@pytest.mark.parametrize("path", EXPERIMENTS, ids=lambda p: p.stem)
def test_every_experiment_file_is_valid_with_its_space_arms_and_sampler(path):
    experiment = Experiment.resolve(read(path))
    assert experiment.space or experiment.arms


@pytest.mark.parametrize(
    ("space", "message"),
    [
        ({"reference.intervall": {"type": "IntDistribution", "low": 1, "high": 2}}, "no setting of that name"),
        ({"reference.interval": {"type": "Int", "low": 1, "high": 2}}, "expected one of CategoricalDistribution"),
        ({"reference.interval": {"type": "IntDistribution", "low": 5, "high": 2}}, "sweep.space.reference.interval"),
        ({"reference.interval": {"type": "IntDistribution", "lo": 5}}, "sweep.space.reference.interval"),
    ],
)
def test_a_bad_space_is_named(space, message):
    with pytest.raises(UserError, match=message.replace(".", r"\.")):
        read_space(resolve({"sweep.space": space}))


@pytest.mark.parametrize(
    ("space", "message"),
    [
        ({"reference.interval": {"type": "IntDistribution", "low": 0, "high": 4}}, "reference.interval = 0"),
        ({"reward_scale.shape": {"type": "FloatDistribution", "low": 0, "high": 4}}, "sweep.space.reward_scale.shape"),
        ({"reference.policy": {"type": "CategoricalDistribution", "choices": ["thaw"]}}, "reference.policy = 'thaw'"),
        (
            {"timesteps.gamma": {"type": "FloatDistribution", "low": 0.5, "high": 0.9}},
            "timesteps.density = uniform does not",
        ),
        (
            {
                "timesteps.gamma": {"type": "FloatDistribution", "low": 0.5, "high": 0.9},
                "timesteps.density": {"type": "CategoricalDistribution", "choices": ["uniform", "discounted"]},
            },
            "put timesteps.density with more choices above it",
        ),
    ],
)
def test_a_space_that_runs_could_not_take_is_refused_before_any_runs(space, message):
    with pytest.raises(UserError) as error:
        read_space(resolve({"sweep.space": space}))
    assert message in str(error.value)


def test_a_dimension_may_hang_on_a_choice_above_it():
    space = {
        "timesteps.density": {"type": "CategoricalDistribution", "choices": ["uniform", "discounted"]},
        "timesteps.gamma": {"type": "FloatDistribution", "low": 0.5, "high": 0.9},
    }
    assert len(read_space(resolve({"sweep.space": space}))) == 2


def test_arms_take_their_own_seed_or_the_sweeps_seeds_not_both():
    arms = {"one": {"seed": 7}}
    (arm,) = Experiment.resolve({"sweep.arms": arms}).arms
    assert arm.overrides["seed"] == 7 == arm.config.seed
    with pytest.raises(UserError, match=r"sweep\.arms\.one: seed"):
        Experiment.resolve({"sweep.arms": arms, "sweep.seeds": (0, 1)})
    assert len(Experiment.resolve({"sweep.arms": {"one": {}}, "sweep.seeds": (0, 1)}).arms) == 2


def test_a_resumed_session_does_not_draw_the_same_points_again():
    import optuna

    experiment = Experiment.resolve({"sweep.sampler": "RandomSampler"})
    samplers = [experiment.sampler(offset) for offset in (0, 1, 1003)]
    draws = [optuna.create_study(sampler=sampler).ask().suggest_float("x", 0, 1) for sampler in samplers]
    assert len(set(draws)) == 3


def test_a_bad_arm_is_named():
    with pytest.raises(UserError, match=r"sweep\.arms\.odd: reference\.interval = 0"):
        Experiment.resolve({"sweep.arms": {"odd": {"reference.interval": 0}}})


def test_an_unknown_sampler_is_named():
    with pytest.raises(UserError, match=r"sweep\.sampler = 'Magic'"):
        Experiment.resolve({"sweep.sampler": "Magic"})


def test_settings_stored_before_one_was_added_get_its_default():
    now = resolve({"objective.beta": 7.0}).flat()
    before = {name: value for name, value in now.items() if not name.startswith("objective.")}
    before |= {"objective.loss": "dpo", "objective.beta": 7.0, "sweep.seeds": [1]}
    assert completed(before) == now | {"sweep.seeds": [1]}
    assert completed(before | {"train.gone": 1}) == before | {"train.gone": 1}


def test_a_file_extends_the_workbenchs_own_from_any_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "mine.toml").write_text('extends = "experiments/default.toml"\ntrain.steps = 9\n')
    flat = load(tmp_path / "mine.toml").flat()
    assert flat["train.steps"] == 9 and flat["train.lr"] == load(shipped("experiments/default.toml")).train.lr
    (tmp_path / "experiments").mkdir()
    (tmp_path / "experiments" / "default.toml").write_text("train.lr = 0.5\n")  # the user's own comes first
    assert load(tmp_path / "mine.toml").train.lr == 0.5


def test_a_file_extends_another_from_its_own_folder(tmp_path):
    (tmp_path / "base.toml").write_text("seed = 3\n[train]\nsteps = 7\nlr = 0.5\n[sweep]\ntrials = 2\nseeds = [1]\n")
    (tmp_path / "more").mkdir()
    longer = tmp_path / "more" / "longer.toml"
    longer.write_text('extends = "../base.toml"\n[train]\nsteps = 9\n[sweep]\nseeds = [1, 2]\n')
    assert read(longer) == {
        "seed": 3, "train.steps": 9, "train.lr": 0.5, "sweep.trials": 2, "sweep.seeds": [1, 2],
    }  # fmt: skip


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ('extends = "x.toml"', "extends itself"),
        ("extends = 3", "extends = 3: expected the name of another"),
        ('extends = "gone.toml"', "gone.toml: no such file"),
    ],
)
def test_what_cannot_be_extended_is_named(text, message, tmp_path):
    (tmp_path / "x.toml").write_text(text)
    with pytest.raises(UserError, match=message):
        read(tmp_path / "x.toml")
