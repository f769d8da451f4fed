"""A run kept in a folder of its own."""

import json

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
    (folder / f"history.parquet.{left}").touch()
    (folder / "film.mkv.partial").touch()
    RunFolder(folder, {"name": "r"})
    assert sorted(p.name for p in folder.rglob("*") if not p.is_dir()) == ["film.mkv.partial", "run.json"]
    assert json.loads((folder / "run.json").read_text())["state"] == "running"
