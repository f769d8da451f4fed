"""Runs that a dead process left open, or that disagree with their trials: detected and corrected.

Optuna decides how a trial ended, MLflow follows. An attempt ends its trial in Optuna before it ends its run in MLflow
(`studies.attempt`), so after a kill between the two it is always the run that is out of date.
"""

import tempfile
from collections.abc import Iterator, Mapping
from pathlib import Path

from mlflow import MlflowClient
from mlflow.entities import Run

from workbench.common.processes import is_gone
from workbench.tracking import tags
from workbench.tracking.delivery import end_run
from workbench.tracking.store import STATUS, experiment
from workbench.tracking.study_runs import children, find_study
from workbench.tracking.tracker import HISTORY, history


def reconcile_runs(client: MlflowClient, parent: str, states: Mapping[int, str], *, dry_run: bool = False) -> list[str]:
    """End the runs of trials that have ended, in the state that their trials have.

    Args:
        parent: id of the study's parent run.
        states: state of each trial by its number. A run whose trial is not there counts as interrupted.
        dry_run: change nothing.
    Returns:
        A line for each run that was, or would be, changed.
    """
    changes = []
    for run in children(client, client.get_run(parent)):
        number = run.data.tags.get(tags.TRIAL)
        state = states.get(int(number), "interrupted") if number else "running"
        if state in ("running", "waiting"):  # its own worker will end it
            continue
        before = (run.info.status, run.data.tags.get(tags.STATE))
        if before != (STATUS.get(state, "KILLED"), state):
            changes.append(f"run of trial {number}: is {before[0]} ({before[1] or 'no state'}), its trial {state}")
            if not dry_run:
                end_run(client, run.info.run_id, {tags.STATE: state})
    return changes


def close_dead_runs(client: MlflowClient, *, dry_run: bool = False) -> list[str]:
    """End runs that belong to no trial and whose processes are known to have ended.

    Runs of trials are left to `reconcile_runs`, which knows how their trials ended.

    Args:
        dry_run: change nothing.
    Returns:
        A line for each run that was, or would be, ended.
    """
    query = f"attributes.status = 'RUNNING' AND tags.`{tags.KIND}` != 'study' AND tags.`{tags.KIND}` != 'trial'"
    changes = []
    for run in client.search_runs([experiment(client).experiment_id], query):
        process = run.data.tags.get(tags.PROCESS)
        if process and is_gone(process):
            changes.append(f"run {run.info.run_name}: is RUNNING, its process is gone")
            if not dry_run:
                end_run(client, run.info.run_id, {tags.STATE: "interrupted"})
    return changes


def complete_runs(client: MlflowClient, study: str) -> dict[str, dict[str, str]]:
    """The parameters of the complete runs of a study that has a single writer, by run name.

    With one writer, a run that is still RUNNING was left by a dead process; it is ended as interrupted.
    """
    parent = find_study(client, study)
    if parent is None:
        return {}
    runs = children(client, parent)
    for run in runs:
        if run.info.status == "RUNNING":
            end_run(client, run.info.run_id, {tags.STATE: "interrupted"})
    return {str(run.info.run_name): run.data.params for run in runs if run.data.tags.get(tags.STATE) == "complete"}


def runs_of_trials(client: MlflowClient, parent: str) -> dict[int, list[Run]]:
    """The runs of a study by the numbers of their trials."""
    runs: dict[int, list[Run]] = {}
    for run in children(client, client.get_run(parent)):
        if tags.TRIAL in run.data.tags:
            runs.setdefault(int(run.data.tags[tags.TRIAL]), []).append(run)
    return runs


def without_history(client: MlflowClient, runs: Mapping[int, list[Run]]) -> Iterator[tuple[int, Run]]:
    """Runs, with their trials' numbers, that ended and have metrics but lack `history.parquet`."""
    for number, attempts in runs.items():
        for run in attempts:
            ended = run.data.tags.get(tags.STATE) in ("complete", "pruned") and run.data.metrics
            if ended and HISTORY not in {file.path for file in client.list_artifacts(run.info.run_id)}:
                yield number, run


def restore_history(client: MlflowClient, run: Run) -> None:
    """Write a run's `history.parquet` again, from the metrics that the store has."""
    rows: dict[int, dict[str, float]] = {}
    for name in run.data.metrics:
        for point in client.get_metric_history(run.info.run_id, name):
            rows.setdefault(point.step, {})[name] = point.value
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / HISTORY
        history(rows).write_parquet(path)
        client.log_artifact(run.info.run_id, str(path))
