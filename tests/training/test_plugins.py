"""Functions of the user's own: chosen like the workbench's, run only where they were named, and pinned by a digest."""

import os
import pickle

import pytest
import torch

from tests.support.helpers import as_toml
from tests.support.runs import run
from workbench.common.errors import UserError
from workbench.studies.experiment import Experiment
from workbench.training import plugins
from workbench.training.config import resolve
from workbench.training.experiment_file import load, parse_override, read
from workbench.training.snapshots import require_same

MINE = '''
from typing import Annotated
import torch
from annotated_types import Gt
from workbench.method.objectives import dpo as theirs

def late(abar, *, power: Annotated[float, Gt(0)] = 2.0):
    """Rises late."""
    return torch.linspace(0, 1, len(abar), dtype=abar.dtype) ** power

def same(errors, lam, *, beta: float = 300.0):
    return theirs(errors, lam, beta=beta)

def bare(abar, *, power):
    return abar

def untyped(abar, *, power=2):
    return abar
'''

STUDY = """
[sweep]
trials = 2
[sweep.arms]
late = { "reward_scale.shape" = "mine.py:late", "reward_scale.power" = 4.0 }
[sweep.space]
"reward_scale.shape" = { type = "CategoricalDistribution", choices = ["constant", "mine.py:late"] }
"reward_scale.power" = { type = "FloatDistribution", low = 1.0, high = 5.0 }
"""


@pytest.fixture
def mine(tmp_path, no_plugins):
    """The folder of mine.py."""
    (tmp_path / "mine.py").write_text(MINE)
    return tmp_path


def experiment(folder, **flat):
    (folder / "own.toml").write_text(as_toml(flat))
    return folder / "own.toml"


def test_a_shape_of_a_file_beside_the_experiment_has_its_arguments_as_settings(mine):
    path = experiment(mine, **{"reward_scale.shape": "mine.py:late", "reward_scale.power": 3.0})
    function, arguments = load(path).chosen("reward_scale")
    assert arguments == {"power": 3.0} and float(function(torch.zeros(3), **arguments)[1]) == 0.125
    assert (
        load(path).flat()["reward_scale.shape"].startswith("mine.py:late@") and load(path).flat()["reward_scale.rise"]
    )
    with pytest.raises(UserError, match=r"^reward_scale\.power = -1: .*greater than 0"):
        load(path, {"reward_scale.power": -1})
    # Another choice drops its arguments, as between the workbench's own.
    assert "reward_scale.power" not in load(path, {"reward_scale.shape": "constant"}).flat()


def test_a_loss_of_the_users_own_trains_as_the_same_one_of_the_workbench(mine, tiny, monkeypatch):
    monkeypatch.chdir(mine)
    name, value = parse_override("objective.loss=mine.py:same")
    assert name == "objective.loss"
    steps = {"train.steps": 2, "objective.beta": 500.0}
    assert run(tiny | steps | {name: value}) == run(tiny | steps | {name: "dpo"})


def test_arms_and_dimensions_choose_them_and_workers_find_them(mine):
    path = mine / "own.toml"
    path.write_text(STUDY)
    study = Experiment.resolve(read(path))
    (arm,) = study.arms
    assert arm.point.keys() == {"reward_scale.shape", "reward_scale.power"}
    assert pickle.loads(pickle.dumps(study)).definition() == study.definition()


def test_a_moved_folder_is_the_same_and_a_changed_file_another(mine):
    path = experiment(mine, **{"reward_scale.shape": "mine.py:late"})
    before = load(path).flat()
    moved = mine / "elsewhere"
    moved.mkdir()
    for name in ("own.toml", "mine.py"):
        (mine / name).rename(moved / name)
    require_same(before, load(moved / "own.toml").flat(), "run")
    (moved / "mine.py").write_text(MINE.replace("2.0", "2.5"))
    with pytest.raises(UserError, match=r"reward_scale\.\w+ = .*the snapshot of run was made with"):
        require_same(before, load(moved / "own.toml").flat(), "run")
    with pytest.raises(UserError, match=r"reward_scale\.shape = 'mine\.py:late@\w+': .*mine\.py has changed since"):
        plugins.pinned(before["reward_scale.shape"], moved, "reward_scale.shape")


def test_a_file_changed_within_a_second_is_run_as_it_is_now(mine, monkeypatch):
    monkeypatch.setattr("sys.dont_write_bytecode", False)
    for power, first in (("2.0", 0.25), ("4.0", 0.0625)):
        (mine / "mine.py").write_text(MINE.replace("= 2.0", f"= {power}"))
        os.utime(mine / "mine.py", (1e9, 1e9))
        config = load(experiment(mine, **{"reward_scale.shape": "mine.py:late"}))
        assert plugins.load(config.reward_scale.shape, "reward_scale.shape")(torch.ones(3))[1] == first


def test_what_a_database_names_is_not_run_unless_the_user_names_it_too(mine, monkeypatch):
    choice = plugins.pinned("mine.py:late", mine, "reward_scale.shape")
    monkeypatch.setenv(plugins.VARIABLE, "")
    (mine / "mine.py").write_text(MINE + "\nraise AssertionError('it was run')\n")
    with pytest.raises(
        UserError, match=r"code of yours is run only where you name it; .*WORKBENCH_CODE to the path of m"
    ):
        resolve({"reward_scale.shape": choice})
    monkeypatch.setenv(plugins.VARIABLE, str(mine / "mine.py"))  # another content than the study's
    with pytest.raises(UserError, match=r"the path of mine\.py, unchanged"):
        resolve({"reward_scale.shape": choice})
    (mine / "mine.py").write_text(MINE)
    assert resolve({"reward_scale.shape": choice}).flat()["reward_scale.power"] == 2.0


def test_a_function_of_a_module_that_python_finds(mine, monkeypatch):
    monkeypatch.syspath_prepend(mine)
    (mine / "mine.py").rename(mine / "mylosses.py")
    _, value = parse_override("reward_scale.shape=mylosses:late")
    assert resolve({"reward_scale.shape": value}).flat()["reward_scale.power"] == 2.0
    assert os.environ[plugins.VARIABLE] == "mylosses"


@pytest.mark.parametrize(
    ("choice", "words"),
    [
        ("other.py:late", r"no such file \(.*other\.py\)"),
        ("other:late", r"no such module \(other\)"),
        ("mine.py:early", "no function 'early' in mine.py"),
        ("mine.py:bare", "its argument power needs a type and a default"),
        ("mine.py:untyped", "its argument power needs a type and a default"),
    ],
)
def test_what_is_wrong_is_one_line(mine, choice, words):
    with pytest.raises(UserError, match=rf"^reward_scale\.shape = '{choice}(@\w+)?': {words}$"):
        load(experiment(mine, **{"reward_scale.shape": choice}))


@pytest.mark.parametrize(
    ("code", "words"),
    [
        (
            "import torch\nimport no_such_package\n",
            r"mine\.py, line 2: ModuleNotFoundError: No module named 'no_such_pac",
        ),
        ("def f():\n    return missing\n\nf()\n", r"mine\.py, line 2: NameError: name 'missing' is not defined"),
        ("def late(:\n", r"mine\.py: invalid syntax .*line 1"),
    ],
)
def test_a_file_that_fails_as_it_is_run_is_one_line_with_its_place(mine, code, words):
    (mine / "mine.py").write_text(code)
    with pytest.raises(UserError, match=words) as error:
        load(experiment(mine, **{"reward_scale.shape": "mine.py:late"}))
    assert "\n" not in str(error.value)
