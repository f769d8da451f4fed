"""Runs whose process is gone, or that say something else than their trials: found and put right."""

import tempfile
from collections.abc import Iterator, Mapping
from pathlib import Path

from mlflow import MlflowClient
from mlflow.entities import Run

from workbench.common.processes import is_gone
from workbench.tracking.delivery import end_run
from workbench.tracking.store import STATUS, children, experiment, find_study
from workbench.tracking.tracker import HISTORY, history


def finished(client: MlflowClient, study: str) -> dict[str, dict[str, str]]:
    """The complete runs of a study: name -> parameters. Runs that a dead process left behind are ended.

    Only for studies with one writer, where a running run can only be a dead process's.
    """
    parent = find_study(client, study)
    if parent is None:
        return {}
    runs = children(client, parent)
    for run in runs:
        if run.info.status == "RUNNING":
            end_run(client, run.info.run_id, {"workbench.state": "interrupted"})
    complete = (run for run in runs if run.data.tags.get("workbench.state") == "complete")
    return {str(run.info.run_name): run.data.params for run in complete}


def agree(client: MlflowClient, parent: str, states: Mapping[int, str], *, look_only: bool = False) -> list[str]:
    """Let the runs of trials that have ended end as their trials did.

    Args:
        parent: id of the study's run.
        states: how each trial stands; a run whose trial is not there belongs to nobody.
        look_only: change nothing.
    Returns:
        What was, or is to be, done; a line each.
    """
    done = []
    for run in children(client, client.get_run(parent)):
        number = run.data.tags.get("workbench.trial")
        state = states.get(int(number), "interrupted") if number else "running"
        if state in ("running", "waiting"):
            continue
        was = (run.info.status, run.data.tags.get("workbench.state"))
        if was != (STATUS.get(state, "KILLED"), state):
            done.append(f"run of trial {number}: is {was[0]} ({was[1] or 'no state'}), its trial {state}")
            if not look_only:
                end_run(client, run.info.run_id, {"workbench.state": state})
    return done


def bury_dead(client: MlflowClient, *, look_only: bool = False) -> list[str]:
    """End runs that are no trials and whose processes are known to be gone.

    Returns:
        What was, or is to be, done; a line each.
    """
    query = "attributes.status = 'RUNNING' AND tags.`workbench.kind` != 'study' AND tags.`workbench.kind` != 'trial'"
    done = []
    for run in client.search_runs([experiment(client).experiment_id], query):
        process = run.data.tags.get("workbench.process")
        if process and is_gone(process):
            done.append(f"run {run.info.run_name}: is RUNNING, its process is gone")
            if not look_only:
                end_run(client, run.info.run_id, {"workbench.state": "interrupted"})
    return done


def runs_of_trials(client: MlflowClient, parent: str) -> dict[int, list[Run]]:
    """The runs of a study by their trials' numbers."""
    found: dict[int, list[Run]] = {}
    for run in children(client, client.get_run(parent)):
        if "workbench.trial" in run.data.tags:
            found.setdefault(int(run.data.tags["workbench.trial"]), []).append(run)
    return found


def without_history(client: MlflowClient, runs: Mapping[int, list[Run]]) -> Iterator[tuple[int, Run]]:
    """Trials that came to an end, and have metrics, but no `history.parquet` for the notebooks to read."""
    for number, each in runs.items():
        for run in each:
            ended = run.data.tags.get("workbench.state") in ("complete", "pruned") and run.data.metrics
            if ended and HISTORY not in {file.path for file in client.list_artifacts(run.info.run_id)}:
                yield number, run


def restore_history(client: MlflowClient, run: Run) -> None:
    """Write a run's `history.parquet` from the metrics that the store has."""
    rows: dict[int, dict[str, float]] = {}
    for name in run.data.metrics:
        for point in client.get_metric_history(run.info.run_id, name):
            rows.setdefault(point.step, {})[name] = point.value
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / HISTORY
        history(rows).write_parquet(path)
        client.log_artifact(run.info.run_id, str(path))
