"""The folder of a trained model, whatever is in its way and whenever its run is killed."""

import json
import os
from pathlib import Path

import pytest

from workbench.common.errors import Failure, UserError
from workbench.common.files import in_place
from workbench.training.config import resolve
from workbench.training.model_folder import ModelFolder


@pytest.fixture
def start(tmp_path):
    """What a run makes whenever it is started."""
    return lambda name="out", known=True, **more: ModelFolder(
        tmp_path / name, tmp_path / "state", resolve({"train.lr": 1e-3, **more}), known=known
    )


def train(model, data=("pairs",), weights="trained"):
    """What a run does until its model is saved."""
    model.require_free("--output")
    model.clear()
    model.require_data(data)
    with in_place(model.beside) as partial:
        partial.mkdir()
        (partial / "weights").write_text(weights)


def names(folder):
    return sorted(path.name for path in folder.iterdir() if path.name != "state")


def test_a_folder_that_no_model_could_be_moved_to_is_found_before_the_training(start, tmp_path, somebody_else):
    (tmp_path / "around" / "out").mkdir(parents=True)
    (tmp_path / "around" / "out").chmod(0o777)
    (tmp_path / "around").chmod(0o755)
    somebody_else()
    with pytest.raises(UserError, match=r"/around/out: .* \S+/around cannot be written \(Permission denied\)"):
        start("around/out").require_free("--output")


def test_a_place_where_something_is_mounted_is_no_models(start, tmp_path, monkeypatch):
    monkeypatch.setattr(os.path, "ismount", lambda path: path == tmp_path / "out")
    with pytest.raises(UserError, match=r"out: a file system is mounted there, .* as \S*/out/model$"):
        start().require_free("--output")
    start("out/model").require_free("--output")


@pytest.mark.parametrize("name", ["x" * 255, "ä" * 127])
def test_a_name_may_be_as_long_as_names_are(name, start, tmp_path):
    model = start(name)
    train(model)
    model.place()
    assert names(tmp_path) == [name] and start(name).has_model


def test_a_kill_while_the_model_is_saved_leaves_nothing_for_ever(start, tmp_path):
    killed = start()
    unfinished = killed.beside.with_name(f"{killed.beside.name}.{'0' * 32}.partial")
    unfinished.mkdir()
    unfinished.with_name(f"{unfinished.name}.{'1' * 32}.partial").touch()
    killed.beside.mkdir()
    (tmp_path / "film.mkv.partial").touch()
    again = start()
    again.require_free("--output")
    again.clear()
    assert names(tmp_path) == ["film.mkv.partial", "out"]


def test_a_model_that_could_not_be_moved_is_named_and_moved_by_the_next_start(start, tmp_path):
    stuck = start()
    train(stuck)
    (tmp_path / "out" / "notes").touch()
    with pytest.raises(Failure, match=rf"out: .* cannot be put there .*not empty\); it lies whole in {stuck.beside}"):
        stuck.place()
    (tmp_path / "out" / "notes").unlink()
    with pytest.raises(UserError, match=rf"has trained a model, which lies in {stuck.beside}; go on with --resume"):
        start(known=False).require_free("--output")  # it begins anew, and would remove it
    (tmp_path / "out" / "notes").touch()
    with pytest.raises(UserError, match=rf"not an empty folder; .* lies in {stuck.beside}"):
        start().require_free("--output")
    (tmp_path / "out" / "notes").unlink()
    again = start()
    train(again, weights="of the second training")
    assert again.has_model
    again.place()
    assert (tmp_path / "out" / "weights").read_text() == "trained" and names(tmp_path) == ["out"]


def test_a_model_of_other_settings_that_could_not_be_moved_is_not_removed(start, tmp_path):
    stuck = start()
    train(stuck)
    (tmp_path / "out" / "notes").touch()
    with pytest.raises(Failure):
        stuck.place()
    (tmp_path / "out" / "notes").unlink()
    with pytest.raises(UserError, match=rf"trained a model, with other settings, .* {stuck.beside}; move it away$"):
        train(start(**{"train.lr": 2e-3}))
    assert (stuck.beside / "weights").read_text() == "trained"


def test_another_runs_model_in_the_folder_is_not_taken_for_the_runs_own(start, tmp_path):
    first = start()
    train(first)
    first.place()
    assert start().has_model
    (tmp_path / "out").rename(tmp_path / "elsewhere")
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "weights").write_text("another's")
    assert not start().has_model
    with pytest.raises(UserError, match="not an empty folder"):
        start().require_free("--output")


def test_a_folder_that_cannot_be_replaced_is_found_before_the_training(start, tmp_path, monkeypatch):
    (tmp_path / "out").mkdir()
    monkeypatch.chdir(tmp_path / "out")
    with pytest.raises(UserError, match="out: the working folder, which no other can replace"):
        start().require_free("--output")
    monkeypatch.chdir(tmp_path)

    def busy(*_):
        raise OSError(16, "Device or resource busy")

    with monkeypatch.context() as patch:
        patch.setattr(os, "replace", busy)
        with pytest.raises(UserError, match=r"no folder can be moved to its place \(Device or resource busy\)"):
            start().require_free("--output")
    assert names(tmp_path) == ["out"]


def test_a_folder_keeps_the_mode_that_it_was_made_with(start, tmp_path):
    (tmp_path / "out").mkdir()
    (tmp_path / "out").chmod(0o2770)
    model = start()
    train(model)
    model.place()
    assert (tmp_path / "out").stat().st_mode & 0o7777 == 0o2770


def test_a_model_is_moved_though_that_cannot_be_noted(start, tmp_path, caplog):
    model = start()
    train(model)
    (tmp_path / "state").touch()
    model.place()
    assert (tmp_path / "out" / "weights").is_file() and "state/model.json: cannot be written" in caplog.text


def test_a_model_of_other_data_is_not_taken_for_the_runs(start):
    model = start()
    train(model)
    model.place()
    start().require_data(["pairs"])
    with pytest.raises(UserError, match="out: the model in it was made with other data or weights"):
        start().require_data(["other pairs"])


def test_a_later_version_with_another_setting_knows_the_model(start, tmp_path):
    model = start()
    train(model)
    model.place()
    note = tmp_path / "state" / "model.json"
    content = json.loads(note.read_text())
    del content["settings"]["train.ema"]  # as if that version had not had it
    note.write_text(json.dumps(content))
    assert start().has_model and not start(**{"train.ema": 0.99}).has_model


def test_the_root_of_all_folders_is_one_line(tmp_path):
    with pytest.raises(UserError, match="--output /: not an empty folder"):
        ModelFolder(Path("/"), tmp_path, resolve({})).require_free("--output")
