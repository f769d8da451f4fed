"""Small mistakes, and commands that only look: one line that helps, and nothing is made."""

from pathlib import Path

import pytest

from tests.support.commands import invoke
from workbench.common.errors import UserError
from workbench.common.reading import near
from workbench.data.rows import read_prompts
from workbench.studies.experiment import Experiment
from workbench.training.config import dotted
from workbench.training.experiment_file import read


def test_a_missing_file_is_named_with_the_one_that_may_be_meant(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "prompts.txt").write_text("a fox")
    (tmp_path / "mine.toml").write_text("")
    with pytest.raises(UserError, match=r"'promts.txt': no such file; did you mean prompts.txt\?"):
        read_prompts("promts.txt")
    with pytest.raises(UserError, match=r"mien.toml: no such file; did you mean .*mine.toml\?"):
        read(tmp_path / "mien.toml")
    with pytest.raises(UserError, match=r"no such file; did you mean experiments/default.toml\?"):
        read(Path("experiments/defualt.toml"))
    assert near("something else entirely") == "" and near("no/folder/x.txt") == ""
    with pytest.raises(UserError, match=r"no such file$"):
        read(tmp_path / "zzz.toml")


@pytest.mark.parametrize(
    "asked", [("study", "status"), ("study", "export", "s"), ("report",), ("report", "--study", "s")]
)
def test_looking_where_there_is_no_study_says_where_it_looked_and_makes_nothing(tmp_path, monkeypatch, asked):
    monkeypatch.chdir(tmp_path)
    for name in ("MLFLOW_TRACKING_URI", "WORKBENCH_STORAGE"):
        monkeypatch.delenv(name, raising=False)
    done = invoke(*asked)
    place = tmp_path / ("mlflow.db" if asked[0] == "report" else "optuna.db")
    told = done.stdout + done.stderr
    assert f"o study yet: there is no {place}" in told and "run python -m workbench.sweep" in told
    assert done.returncode == (0 if asked == ("study", "status") else 2)
    assert [*tmp_path.iterdir()] == []


@pytest.mark.parametrize(
    ("asked", "says"),
    [
        (("sweep", "--set", "data.train=nowhere"), "data.train = 'nowhere': no such parquet file"),
        (("sweep", "--set", "data.prompts=nowhere.txt"), "nowhere.txt"),
        (("sweep", "--set", "model.path=nowhere"), "model.path = 'nowhere': not a checkpoint folder"),
        (("claims", "nowhere.toml"), "experiment nowhere.toml: no such file"),
        (("evaluate", "--model", "a=nowhere"), "--model a=nowhere: model.path = 'nowhere'"),
        (("push", "runs:/0", "me/mine"), "no study yet"),
    ],
)
def test_a_mistake_in_a_first_command_makes_nothing(tmp_path, monkeypatch, asked, says):
    monkeypatch.chdir(tmp_path)
    for name in ("MLFLOW_TRACKING_URI", "WORKBENCH_STORAGE", "WORKBENCH_STATE"):
        monkeypatch.delenv(name, raising=False)
    done = invoke(*asked)
    assert done.returncode == 2 and says in done.stderr
    assert [*tmp_path.iterdir()] == []


@pytest.mark.parametrize("place", ["", "train"])
def test_an_encoding_that_was_cut_short_is_called_so_before_a_study_is_made(place, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for name in ("MLFLOW_TRACKING_URI", "WORKBENCH_STORAGE", "WORKBENCH_STATE"):
        monkeypatch.delenv(name, raising=False)
    (tmp_path / "begun" / place).mkdir(parents=True)
    (tmp_path / "begun" / place / "pairs-00000.safetensors").touch()
    done = invoke("sweep", "--set", "data.train=begun")
    assert done.returncode == 2 and "data.train = 'begun': its encoding was not finished" in done.stderr
    assert [path.name for path in tmp_path.iterdir()] == ["begun"]


SPACE = """
[sweep.space]
reference.interval = [4, 8]
"reference.rate" = { type = "FloatDistribution", low = 0.25, high = 1.0 }
timesteps.density = ["uniform", "discounted"]
[sweep.space.timesteps.gamma]
type = "FloatDistribution"
low = 0.8
high = 0.98
"""


def test_a_space_may_have_plain_lists_and_keys_without_quotes(tmp_path):
    (tmp_path / "x.toml").write_text(SPACE)
    found = Experiment.resolve(read(tmp_path / "x.toml"))
    choices = {"type": "CategoricalDistribution", "choices": ["uniform", "discounted"]}
    quoted = {
        "reference.interval": {"type": "CategoricalDistribution", "choices": [4, 8]},
        "reference.rate": {"type": "FloatDistribution", "low": 0.25, "high": 1.0},
        "timesteps.density": choices,
        "timesteps.gamma": {"type": "FloatDistribution", "low": 0.8, "high": 0.98},
    }
    # The same study, whichever way it is written.
    assert found.definition() == Experiment.resolve({"sweep.space": quoted}).definition()


@pytest.mark.parametrize(
    ("space", "message"),
    [
        ({"reference": {"intervall": [4, 8]}}, "sweep.space.reference.intervall: no setting of that name"),
        ({"train.lr": {"low": 1e-5, "high": 1e-4}}, "sweep.space.train.lr.type = None: expected one of"),
        ({"reference": {"interval": [4]}, "reference.interval": [8]}, "reference.interval is there twice"),
        ({"train.lr": [[1, 2]]}, "choices: expected a list of texts"),
        ({"train.lr": 3}, "valid dictionary"),
    ],
)
def test_a_space_that_cannot_be_is_named(space, message):
    with pytest.raises(UserError) as error:
        Experiment.resolve(dotted({"sweep": {"space": space}}))
    assert message in str(error.value)
