"""Which settings of a run the UI shows, and that all of them come back."""

import json
from pathlib import Path

from tests.support.studies import Events, made
from workbench import tracking
from workbench.studies import workers
from workbench.tracking import tags
from workbench.tracking.run_settings import FILE, settings_of
from workbench.tracking.study_runs import open_group
from workbench.training.config import distinguishing, resolve


def tracked(settings, params, **about):
    client = tracking.connect()
    parent = open_group(client, "s", "").info.run_id
    tracker = tracking.Tracker(
        client, "a", params=params, settings=settings, tags={tags.ARM: "a"} | about, parent=parent
    )
    tracker.close("complete")
    return client, client.get_run(tracker.run_id)


def test_parameters_are_choices_the_seed_and_what_is_no_default():
    told = distinguishing(resolve({"timesteps.density": "discounted", "train.lr": 1e-4}).flat(), "reference.delta")
    assert told == {
        "seed": 0,
        "train.lr": 1e-4,
        "objective.loss": "dpo",
        "timesteps.density": "discounted",
        "reward_scale.shape": "constant",
        "reference.policy": "threshold",
        "reference.delta": 0.005,
    }


def test_all_settings_come_back_where_few_are_parameters(workplace, tmp_path):
    settings = resolve({"train.lr": 1e-4}).flat()
    client, run = tracked(settings, distinguishing(settings))
    assert len(run.data.params) == 6 < len(settings)
    assert settings_of(run) == {name: str(value) for name, value in settings.items()}
    (row,) = tracking.load_runs("s").to_dicts()
    assert row["train.batch_size"] == "8" and row["train.lr"] == "0.0001" and row["diagnostics.probe"] == "256"
    kept = json.loads(Path(client.download_artifacts(run.info.run_id, FILE, str(tmp_path))).read_text())
    assert kept["train.batch_size"] == "8"


def test_a_run_of_an_earlier_version_is_read_as_it_was(workplace):
    settings = resolve({}).flat()
    _, run = tracked(None, settings)
    assert tags.SETTINGS not in run.data.tags and settings_of(run) == run.data.params
    assert tracking.load_runs("s")["train.batch_size"].to_list() == ["8"]


def test_settings_that_no_tag_can_hold_are_all_parameters(workplace):
    far = "/".join(["", *["x" * 250] * 14])
    settings = resolve({"data.train": far}).flat()
    _, run = tracked(settings, {"seed": 0})
    assert tags.SETTINGS not in run.data.tags
    assert settings_of(run)["data.train"] == settings["data.train"] and settings_of(run)["train.batch_size"] == "8"


def test_runs_of_a_study_have_what_tells_them_apart_and_the_study_has_its_own(tiny, workplace):
    arms = {"frozen": {"reference.policy": "frozen"}, "slow": {"train.lr": 3e-6}}
    study, client, assignment = made(tiny | {"sweep.arms": arms, "sweep.trials": 2, "train.lr": 1e-3})
    workers.run_trials(assignment, Events(), lambda: False)
    first, second = (client.get_run(trial.user_attrs["run_id"]) for trial in study.get_trials())
    assert first.data.params["train.lr"] == "0.001" and second.data.params["train.lr"] == "3e-06"  # the default, too
    assert second.data.params["reference.policy"] == "threshold" and "model.dtype" not in second.data.params
    assert settings_of(first)["model.dtype"] == "float32"
    parent = client.get_run(assignment.parent)
    assert parent.data.params["sweep.objective"] == "eval/win_rate" and parent.data.params["train.lr"] == "0.001"
    files = {file.path for file in client.list_artifacts(second.info.run_id)}
    assert {"samples.png", "pretrained.png", "pretrained-and-trained.png", FILE} <= files
