"""Trained weights that runs have kept, as their artifact folder `model`."""

import time
from collections.abc import Mapping
from pathlib import Path

import mlflow
from mlflow import MlflowClient
from mlflow.entities import Metric
from mlflow.exceptions import MlflowException

from workbench.common.errors import Failure, UserError
from workbench.common.paths import cache_folder
from workbench.tracking import tags
from workbench.tracking.run_settings import settings_of
from workbench.tracking.store import restore_command
from workbench.tracking.study_runs import children, is_deleted, require_study

MODEL, CHECKPOINTS = "model", "checkpoints"


def kept_model(client: MlflowClient, source: str) -> tuple[dict[str, str], Path]:
    """A run's settings and the folder of its trained weights, fetched into the cache where the store is remote.

    Args:
        source: the run's id, or ID@STEP for the checkpoint of a step.
    Raises:
        UserError: there is no such run, it was deleted, or it kept no weights, or none of that step.
        Failure: the store does not hand them out.
    """
    run_id, at, step = source.partition("@")
    # Checkpoint folders have leading zeros (`checkpoints/000100`), people write 100.
    step = step.lstrip("0")
    try:
        run = client.get_run(run_id)
    except MlflowException:
        raise UserError(f"runs:/{run_id}: no such run in this tracking store") from None
    if is_deleted(run):  # what is measured of it could not be noted there
        raise UserError(f"runs:/{run_id}: the run was deleted; restore it: {restore_command('runs', run_id)}")
    if at:
        kept = {_step(item.path): item.path for item in client.list_artifacts(run_id, CHECKPOINTS)}
        if step not in kept:
            there = ", ".join(sorted(kept, key=int)) or "none; train.checkpoint_every keeps some"
            raise UserError(f"runs:/{source}: run {run.info.run_name!r} kept no weights of that step (steps: {there})")
        part = kept[step]
    elif client.list_artifacts(run_id, MODEL):
        part = MODEL
    else:
        raise UserError(f"runs:/{run_id}: run {run.info.run_name!r} kept no weights (no artifact {MODEL}/)")
    uri = f"{run.info.artifact_uri}/{part}"
    # A local store hands out its own files.
    place = None if uri.startswith("file:") else str(cache_folder() / "runs" / run_id)
    try:
        if place:
            Path(place).mkdir(parents=True, exist_ok=True)
        return settings_of(run), Path(mlflow.artifacts.download_artifacts(uri, dst_path=place))
    except (MlflowException, OSError) as error:
        raise Failure(f"runs:/{run_id}: its weights cannot be fetched ({str(error).splitlines()[0]})") from None


def _step(path: str) -> str:
    """The step of a checkpoint, as a user writes it, from its artifact's path."""
    return path.rpartition("/")[2].lstrip("0")


def add_scores(client: MlflowClient, run_id: str, scores: Mapping[str, float]) -> None:
    """Give an ended run metrics that were measured afterwards, so that figures of its study can show them."""
    now = int(time.time() * 1000)
    client.log_batch(run_id, metrics=[Metric(name, value, now, 0) for name, value in scores.items()])


def kept_models(client: MlflowClient, study: str) -> dict[str, str]:
    """The complete runs of a study that kept their weights: name -> run id.

    The name is the arm's; where an arm has several such runs, each has its training seed after it.

    Raises:
        UserError: no such study, or none of its runs kept weights.
    """
    runs = [
        run
        for run in children(client, require_study(client, study))
        if run.data.tags.get(tags.STATE) == "complete" and client.list_artifacts(run.info.run_id, MODEL)
    ]
    if not runs:
        raise UserError(f"study {study!r}: none of its complete runs kept its weights")
    seeds = [settings_of(run).get("seed", "") for run in runs]
    arms = [run.data.tags.get(tags.ARM) or str(run.info.run_name) for run in runs]
    names = [arm if arms.count(arm) == 1 else f"{arm}-{seed}" for arm, seed in zip(arms, seeds, strict=True)]
    ids = [run.info.run_id for run in runs]
    return {
        name if names.count(name) == 1 else f"{name}-{run_id[:6]}": run_id
        for name, run_id in zip(names, ids, strict=True)
    }
