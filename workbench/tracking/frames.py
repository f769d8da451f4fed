"""Runs, read back as data frames."""

import json
import logging
import tempfile
from collections.abc import Mapping
from pathlib import Path

import mlflow
import numpy as np
import polars as pl
from mlflow.exceptions import MlflowException
from PIL import Image

from workbench.common.errors import UserError
from workbench.tracking import tags
from workbench.tracking.artifacts import local_path
from workbench.tracking.run_settings import settings_of
from workbench.tracking.store import connect_to_read, restore_command
from workbench.tracking.study_runs import children, deleted_children, require_study
from workbench.tracking.tracker import HISTORY

log = logging.getLogger(__name__)
SAMPLES = "samples.json"  #: artifact with the scores of the images that a run draws at its end
SHEET, PRETRAINED_SHEET = "samples.png", "pretrained.png"  #: artifacts with these images, and the pretrained model's


def load_runs(study: str, runs: str = "") -> pl.DataFrame:
    """The ended trials of a study, a row a run.

    Columns: run_id, name, arm, state, trial (its number, null for single runs), reason (why it was pruned), every
    setting as text, the last value of every metric. Complete and pruned trials: interrupted attempts were run again,
    failed ones have no end to compare.

    Args:
        study: a name, or NAME@TOKEN where several studies have the name.
        runs: only those whose arm or name is in this comma-separated list; empty = all.
    Raises:
        UserError: no such study, or none of its runs is named so.
    """
    client = connect_to_read()
    parent = require_study(client, study)
    if deleted := deleted_children(client, parent):
        command = restore_command("runs", deleted[0].info.run_id)
        log.warning("study %r: %d deleted runs are left out; to restore one: %s", study, len(deleted), command)
    rows = []
    for run in children(client, parent):
        state = run.data.tags.get(tags.STATE)
        if state not in ("complete", "pruned"):
            continue
        about = {
            "run_id": run.info.run_id,
            "name": run.info.run_name,
            "arm": run.data.tags.get(tags.ARM, ""),
            "state": state,
            "trial": int(run.data.tags[tags.TRIAL]) if tags.TRIAL in run.data.tags else None,
            "reason": run.data.tags.get(tags.REASON, ""),
            "artifacts": run.info.artifact_uri,
        }
        rows.append(about | settings_of(run) | run.data.metrics)
    # All rows decide the type of a column: by default polars looks at the first hundred, which may lack a metric.
    frame = pl.DataFrame(rows, infer_schema_length=None) if rows else pl.DataFrame()
    if frame.is_empty():
        raise UserError(f"study {study!r} has no ended runs yet")
    return choose_runs(frame, runs, study) if runs else frame


def choose_runs(frame: pl.DataFrame, runs: str, study: str) -> pl.DataFrame:
    """The rows of `load_runs` whose arm or name is in a comma-separated list.

    Raises:
        UserError: a name is not in the study.
    """
    wanted = [name.strip() for name in runs.split(",")]
    chosen = frame.filter(pl.col("arm").is_in(wanted) | pl.col("name").is_in(wanted))
    unknown = set(wanted) - set(chosen["arm"]) - set(chosen["name"])
    if unknown:
        raise UserError(f"runs {', '.join(sorted(unknown))}: not in study {study!r}")
    return chosen


def load_lost(study: str) -> dict[str, list[str]]:
    """Training seeds of which an arm has no complete run, but one that failed or was pruned, by arm.

    Interrupted attempts say nothing, since they are run again.
    """
    client = connect_to_read()
    seeds: dict[str, dict[str, set[str]]] = {}
    for run in children(client, require_study(client, study)):
        states = seeds.setdefault(run.data.tags.get(tags.ARM, ""), {})
        states.setdefault(run.data.tags.get(tags.STATE, ""), set()).add(settings_of(run).get("seed", ""))
    none: set[str] = set()
    return {
        arm: sorted((states.get("failed", none) | states.get("pruned", none)) - states.get("complete", none))
        for arm, states in seeds.items()
    }


def load_history(runs: pl.DataFrame) -> pl.DataFrame:
    """Step histories of runs, one frame: the columns of `runs` that tell them apart, then step and metrics.

    Runs without a history (still running, or dead before their first step) are left out.
    """
    with tempfile.TemporaryDirectory() as folder:
        frames = []
        for row in runs.select("run_id", "name", "arm", "artifacts").to_dicts():
            path = _artifact(row, HISTORY, folder)
            if path is None:
                continue
            about = [pl.lit(row[key]).alias(key) for key in ("run_id", "name", "arm")]
            frames.append(pl.read_parquet(path).with_columns(about))
    if not frames:
        raise UserError("no run of the study has a history yet")
    # Runs log different metrics, by their method: a column that a run lacks is null in its rows.
    return pl.concat(frames, how="diagonal")


def load_samples(runs: pl.DataFrame) -> pl.DataFrame:
    """Scores of the images that runs drew at their end, a row an image.

    Returns:
        Columns run_id, name, arm, caption, image_seed, reward, pretrained_reward and, where they were tracked,
        judge and pretrained_judge. Runs without samples are left out.
    Raises:
        UserError: no run has samples.
    """
    with tempfile.TemporaryDirectory() as folder:
        frames = []
        for row in runs.select("run_id", "name", "arm", "artifacts").to_dicts():
            path = _artifact(row, SAMPLES, folder)
            if path is None:
                continue
            content = json.loads(path.read_text("utf-8"))
            about = [pl.lit(row[key]).alias(key) for key in ("run_id", "name", "arm")]
            table = pl.DataFrame(content["data"], schema=content["columns"], orient="row", infer_schema_length=None)
            # A column of whole numbers or nulls would have another type than in the next run: `concat` refuses that.
            scores = pl.exclude("caption", "seed").cast(pl.Float64)
            frames.append(table.select(*about, "caption", pl.col("seed").alias("image_seed"), scores))
    if not frames:
        raise UserError("no run of the study has samples; they need evaluation.seeds of 1 or more")
    return pl.concat(frames, how="diagonal")


def load_sheets(runs: pl.DataFrame, pretrained: bool = False) -> dict[str, np.ndarray]:
    """The images that runs drew at their end, by run_id: a row an image seed, a column a prompt, (H, W, 3) uint8.

    Seeds and prompts come in the order of `load_samples`. Runs without samples are left out.

    Args:
        pretrained: load the images that the pretrained model drew for the same prompts and seeds.
    """
    sheets = {}
    with tempfile.TemporaryDirectory() as folder:
        for row in runs.select("run_id", "artifacts").to_dicts():
            path = _artifact(row, PRETRAINED_SHEET if pretrained else SHEET, folder)
            if path is not None:
                sheets[row["run_id"]] = np.asarray(Image.open(path).convert("RGB"))
    return sheets


def _artifact(run: Mapping[str, str], file: str, folder: str) -> Path | None:
    """The path of a run's artifact on this machine, downloaded into a folder if need be; None if the run lacks it."""
    here = local_path(run["artifacts"])
    if here is not None and (here / file).exists():
        return here / file
    try:
        return Path(mlflow.artifacts.download_artifacts(
            run_id=run["run_id"], artifact_path=file, dst_path=f"{folder}/{run['run_id']}"
        ))  # fmt: skip
    except (MlflowException, OSError):
        return None
