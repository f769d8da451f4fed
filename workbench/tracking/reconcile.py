"""Runs that a dead process left open, or that disagree with their trials: detected and corrected.

Optuna decides how a trial ended, MLflow follows. An attempt ends its trial in Optuna before it ends its run in MLflow
(`studies.attempt`), so after a kill between the two it is always the run that is out of date.

A run is changed only if it certainly belongs to the trial: it has the study's token, and the trial names the run, or
the process that wrote it. The number of the trial alone says nothing, since every study has a trial 0.
"""

import tempfile
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

from mlflow import MlflowClient
from mlflow.entities import Run, RunTag

from workbench.common.files import in_place
from workbench.common.paths import state_place
from workbench.common.processes import is_gone
from workbench.tracking import tags
from workbench.tracking.delivery import end_run
from workbench.tracking.run_settings import settings_of
from workbench.tracking.store import STATUS, experiment
from workbench.tracking.study_runs import StudyId, children, find_study, is_deleted, namesakes, open_study
from workbench.tracking.tracker import HISTORY, history


class TrialStatus(NamedTuple):
    """A trial as Optuna has it.

    Attributes:
        state: what the run's tag `tags.STATE` has to say; "running" or "waiting" while the trial has not ended.
        run_id: of the run that tracks it; None if its worker has not stored it, or has not created one.
        process: that runs or ran it.
    """

    state: str
    run_id: str | None = None
    process: str | None = None

    def has(self, run: Run) -> bool:
        """Whether a run tracks this trial.

        A worker that dies after it created the run, but before it stored the run's id, has left its process in both.
        """
        if self.run_id is not None:
            return run.info.run_id == self.run_id
        return self.process is not None and run.data.tags.get(tags.PROCESS) == self.process


Trials = Mapping[int, TrialStatus]  # by number


def trial_of(run: Run, trials: Trials) -> TrialStatus | None:
    """The trial that a run tracks; None if it tracks no trial of these."""
    number = run.data.tags.get(tags.TRIAL, "")
    trial = trials.get(int(number)) if number.isdecimal() else None
    return trial if trial is not None and trial.has(run) else None


def reconcile_runs(client: MlflowClient, parent: str, trials: Trials, *, dry_run: bool = False) -> list[str]:
    """End the runs of trials that have ended, in the state that their trials have.

    Args:
        parent: id of the study's parent run.
        dry_run: change nothing.
    Returns:
        A line for each run that was, or would be, changed.
    """
    changes = []
    for run in children(client, client.get_run(parent)):
        trial, number = trial_of(run, trials), run.data.tags.get(tags.TRIAL)
        if trial is None or trial.state in ("running", "waiting"):  # not ours to end, or its worker will end it
            continue
        state = trial.state
        # Tag and status are set by two requests (`end_run`), so a kill in between may leave only one of them right.
        before = (run.info.status, run.data.tags.get(tags.STATE))
        right = [(STATUS.get(state, "KILLED"), state)]
        if state == "pruned":  # earlier versions ended such runs so; they stay as they are
            right.append(("KILLED", state))
        if before not in right:
            changes.append(f"run of trial {number}: is {before[0]} ({before[1] or 'no state'}), its trial {state}")
            if not dry_run:
                end_run(client, run.info.run_id, {tags.STATE: state})
    return changes


def close_dead_runs(client: MlflowClient, *, dry_run: bool = False) -> list[str]:
    """End runs that belong to no trial and whose processes are known to have ended.

    Runs of trials are left to `reconcile_runs`, which knows how their trials ended. Runs of another state folder are
    left to whoever has it: their outboxes there may say how they ended.

    Args:
        dry_run: change nothing.
    Returns:
        A line for each run that was, or would be, ended.
    """
    query = f"attributes.status = 'RUNNING' AND tags.`{tags.KIND}` != 'study' AND tags.`{tags.KIND}` != 'trial'"
    changes = []
    for run in client.search_runs([experiment(client).experiment_id], query):
        process = run.data.tags.get(tags.PROCESS)
        if run.data.tags.get(tags.STATE_FOLDER, state_place()) != state_place():
            continue
        if process and is_gone(process):
            changes.append(f"run {run.info.run_name}: is RUNNING, its process is gone")
            if not dry_run:
                end_run(client, run.info.run_id, {tags.STATE: "interrupted"})
    return changes


def complete_runs(client: MlflowClient, study: StudyId) -> dict[str, dict[str, str]]:
    """The settings of the complete runs of a study without trials, by run name.

    Runs that a dead process of this machine left open are ended as interrupted.
    """
    parent = find_study(client, study)
    if parent is None:
        return {}
    runs = children(client, parent)
    for run in runs:
        if run.info.status == "RUNNING" and is_gone(run.data.tags.get(tags.PROCESS, "")):
            end_run(client, run.info.run_id, {tags.STATE: "interrupted"})
    return {str(run.info.run_name): settings_of(run) for run in runs if run.data.tags.get(tags.STATE) == "complete"}


def adopt(client: MlflowClient, study: StudyId, trials: Trials, *, dry_run: bool = False) -> Run | None:
    """Give the runs that a study made before there were tokens its token, once. Hold the study's lock.

    Runs that the study's trials name are its own. So is their parent run, unless it has another study's trials among
    its children; then the study gets a parent run for itself, and its runs move there.

    Args:
        dry_run: change nothing.
    Returns:
        The study's parent run, which may have been its own before; None if it has none in this store.
    """
    found = find_study(client, study)
    old = [run for run in namesakes(client, study) if not is_deleted(run) and _may_be_of(run, study)]
    for parent in old:
        runs = children(client, parent)
        of_trials = [run for run in runs if tags.TRIAL in run.data.tags]
        own = [run for run in of_trials if trial_of(run, trials) is not None]
        # Checks, or a study whose first trial has not begun: only the name says whose they are, so it must be alone.
        by_name = found is None and len(old) == 1 and not of_trials and not any(t.run_id for t in trials.values())
        if not own and not by_name:
            continue
        if dry_run:
            return found or parent
        target = found
        if found is None and len(own) == len(of_trials):
            # No other study has trials under this parent, so the runs without a trial under it are the study's too.
            target, own = parent, runs
        if target is None:
            target = client.get_run(open_study(client, study, parent.data.tags.get(tags.NOTE, "")))
        # The parent comes last: after a kill in between it has no token yet, and this is done again.
        for run in own:
            moved = {tags.TOKEN: study.token, tags.PARENT: target.info.run_id}
            client.log_batch(run.info.run_id, tags=[RunTag(key, value) for key, value in moved.items()])
        owned = {tags.TOKEN: study.token, tags.STORAGE: study.storage}
        client.log_batch(target.info.run_id, tags=[RunTag(key, value) for key, value in owned.items()])
        found = client.get_run(target.info.run_id)
    return found


def _may_be_of(parent: Run, study: StudyId) -> bool:
    """Whether a parent run is from before there were tokens, or a group of single runs of this study database."""
    return tags.TOKEN not in parent.data.tags and parent.data.tags.get(tags.STORAGE, study.storage) == study.storage


def is_extra(run: Run, trials: Trials) -> bool:
    """Whether a run says that it tracks a trial of the study, but is over and no trial's run.

    Such runs are left where the study database was replaced by an older copy. They would be counted twice.
    """
    process = run.data.tags.get(tags.PROCESS, "")
    over = run.info.status != "RUNNING" or bool(is_gone(process))
    return tags.TRIAL in run.data.tags and trial_of(run, trials) is None and over


def without_history(client: MlflowClient, runs: Sequence[Run]) -> Iterator[tuple[str, Run]]:
    """Runs of trials, with the trial's number, that ended and have metrics but lack `history.parquet`."""
    for run in runs:
        ended = run.data.tags.get(tags.STATE) in ("complete", "pruned") and run.data.metrics
        number = run.data.tags.get(tags.TRIAL)
        if number and ended and HISTORY not in {file.path for file in client.list_artifacts(run.info.run_id)}:
            yield number, run


def restore_history(client: MlflowClient, run: Run) -> None:
    """Write a run's `history.parquet` again, from the metrics that the store has."""
    rows: dict[int, dict[str, float]] = {}
    for name in run.data.metrics:
        for point in client.get_metric_history(run.info.run_id, name):
            rows.setdefault(point.step, {})[name] = point.value
    with tempfile.TemporaryDirectory() as folder:
        with in_place(Path(folder) / HISTORY) as path:
            history(rows).write_parquet(path)
        client.log_artifact(run.info.run_id, f"{folder}/{HISTORY}")
