"""A run kept in a folder of its own."""

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
