"""A run kept in a folder of its own."""

import json
from pathlib import Path

import pytest

from workbench.common.errors import Failure
from workbench.training.run_folder import RunFolder


def test_a_checkpoint_that_is_kept_again_replaces_the_one_before(tmp_path):
    run, weights = RunFolder(tmp_path / "run", {"name": "r"}), tmp_path / "weights"
    for name in ("old", "new"):  # the second time, as a resumed run does
        weights.mkdir()
        (weights / name).write_text(name)
        run.artifact(weights, "checkpoints/000002")
        run.artifact(weights / name, "note")
        (weights / name).unlink()
        weights.rmdir()
    kept = tmp_path / "run" / "artifacts"
    assert [path.name for path in (kept / "checkpoints" / "000002").iterdir()] == ["new"]
    assert (kept / "note").read_text() == "new" and not list(tmp_path.rglob("*.partial"))
    (kept / "file").touch()
    weights.mkdir()
    with pytest.raises(Failure, match="cannot be written"):
        run.artifact(weights, "file/below")


def test_what_a_killed_process_has_left_is_removed_when_the_run_goes_on_and_nothing_else(tmp_path):
    folder, left = tmp_path / "run", f"{'0' * 32}.partial"
    RunFolder(folder, {"name": "r"}).log(1, {"a": 1.0})
    saved = folder / f"model.{left}"
    for unfinished in (saved, folder / f"{saved.name}.{'1' * 32}.partial", folder / "artifacts" / f"model.{left}"):
        (unfinished / "unet").mkdir(parents=True)
        (unfinished / f"weights.{left}").touch()
    (folder / "samples").mkdir()
    for file in ("history.parquet", "run.json", "samples.json", "samples.png", "samples/000004.png"):
        (folder / f"{file}.{left}").touch()
    (folder / f"run.json.{left}.{'1' * 32}.partial").touch()
    (folder / "film.mkv.partial").touch()
    RunFolder(folder, {"name": "r"})
    assert sorted(p.name for p in folder.rglob("*") if not p.is_dir()) == ["film.mkv.partial", "run.json"]
    assert json.loads((folder / "run.json").read_text())["state"] == "running"


def test_what_others_keep_below_a_runs_folder_under_such_names_is_left_alone(tmp_path):
    folder, left = tmp_path / "run", f"{'0' * 32}.partial"
    # The trained model of another run that saves it into this folder, and what such a run writes into a folder there.
    others = [folder / f"{name}.{left}" for name in ("final", "model.v2", "other/model", "other/run.json")]
    for other in others:
        other.mkdir(parents=True)
    RunFolder(folder, {"name": "r"})
    assert all(other.is_dir() for other in others)


def test_a_left_file_that_cannot_be_removed_is_one_line(tmp_path, monkeypatch):
    left = tmp_path / f"run.json.{'0' * 32}.partial"
    left.touch()

    def refuse(*_, **__):
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(Path, "unlink", refuse)
    with pytest.raises(Failure) as failed:
        RunFolder(tmp_path, {"name": "r"})
    assert str(failed.value) == f"{left}: cannot be removed (Permission denied)"
