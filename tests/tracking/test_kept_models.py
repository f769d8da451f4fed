from pathlib import Path

import pytest

from workbench import tracking
from workbench.common.errors import UserError
from workbench.tracking.kept_models import kept_model


@pytest.fixture
def run_id(workplace):
    """A run with checkpoints of steps 250 and 500, of which a third was removed."""
    tracker = tracking.Tracker(tracking.connect(), "r", params={"model.path": "m"}, tags={})
    weights = Path("weights")
    weights.mkdir()
    for step in (0, 250, 500):
        (weights / "unet").write_text(str(step), encoding="utf-8")
        tracker.artifact(weights, f"checkpoints/{step:06d}")
    tracker.remove("checkpoints/000000")
    tracker.remove("checkpoints/000000")
    tracker.close("complete")
    return tracker.run_id


def test_a_step_of_a_run_is_found_by_its_number(run_id):
    for step in ("250", "500", "000500"):
        params, folder = kept_model(tracking.connect(), f"{run_id}@{step}")
        assert (folder / "unet").read_text(encoding="utf-8") == str(int(step)) and params == {"model.path": "m"}


def test_a_step_that_was_not_kept_or_was_removed_is_one_line_that_names_the_others(run_id):
    for step in ("0", "300", "x"):
        with pytest.raises(UserError, match=rf"runs:/{run_id}@{step}: run 'r' kept no .* \(steps: 250, 500\)"):
            kept_model(tracking.connect(), f"{run_id}@{step}")
    with pytest.raises(UserError, match="no artifact model/"):
        kept_model(tracking.connect(), run_id)


def test_a_run_without_checkpoints_names_the_setting(workplace):
    tracker = tracking.Tracker(tracking.connect(), "r", params={}, tags={})
    tracker.close("complete")
    with pytest.raises(UserError, match=r"train\.checkpoint_every"):
        kept_model(tracking.connect(), f"{tracker.run_id}@250")


def test_a_deleted_run_is_named_with_what_brings_it_back(run_id):
    client = tracking.connect()
    client.delete_run(run_id)
    with pytest.raises(UserError, match=f"was deleted; restore it: .* mlflow runs restore --run-id {run_id}"):
        kept_model(client, f"{run_id}@250")
