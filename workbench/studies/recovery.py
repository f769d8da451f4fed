"""Trials whose worker is gone: detected, failed, and queued again, so that a new attempt resumes from their snapshots.

Every attempt at a trial is a trial of its own in Optuna and a run of its own in MLflow; `retry_of` names the attempt
before it. So a worker that was taken for dead, but only stood still, cannot write into its successor's run. Callers
hold the study's lock (`storage.locked`), so that one process at a time looks and acts.
"""

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import optuna
from optuna import Study
from optuna.trial import FrozenTrial, TrialState

from workbench.common.paths import state_path
from workbench.common.processes import is_gone
from workbench.studies.records import StudyRecord, TrialRecord, trial_attributes
from workbench.studies.trials import counts, crashes
from workbench.training.snapshots import remove_snapshots, snapshot_files


def lost_worker(trial: FrozenTrial) -> bool:
    """Whether a trial is RUNNING though its process is known to have ended.

    A worker writes its process into a trial before it releases the study's lock. So a running trial without a process,
    seen under the lock, was taken by a worker that died in between.
    """
    process = TrialRecord.of(trial).process
    return trial.state == TrialState.RUNNING and (process is None or bool(is_gone(process)))


def to_recover(study: Study) -> list[str]:
    """What `recover` would do, a line for each trial."""
    trials = study.get_trials(deepcopy=False)
    lost = {t.number for t in trials if lost_worker(t)}
    # Optuna's public call finds stale trials only in order to fail them.
    stale_ids = set(study._storage._get_stale_trial_ids(study._study_id))  # type: ignore[attr-defined]
    stale = {t.number for t in trials if t._trial_id in stale_ids} - lost
    return [
        *(f"trial {number}: its worker is gone" for number in sorted(lost)),
        *(f"trial {number}: no heartbeat from its worker" for number in sorted(stale)),
        *(f"trial {t.number}: was interrupted and is not in the queue" for t in _interrupted(trials)),
    ]


def recover(study: Study) -> None:
    """Fail the trials of workers that are gone, and queue every interrupted trial again.

    Hold the study's lock. Where a kill cuts this short, the next call does the rest: each trial is failed before it is
    queued again, and is queued only if no other trial is a retry of it.
    """
    for trial in study.get_trials(deepcopy=False):
        if lost_worker(trial):
            study.tell(trial.number, state=TrialState.FAIL)
    # Workers on other machines are judged by their heartbeat alone, workers here by their process first: a process
    # that is gone need not be waited for.
    optuna.storages.fail_stale_trials(study)
    for trial in _interrupted(study.get_trials(deepcopy=False)):
        _requeue(study, trial)


def _open(trials: Sequence[FrozenTrial]) -> list[FrozenTrial]:
    """The last attempt at every trial that does not count yet."""
    retried = {TrialRecord.of(t).retry_of for t in trials}
    ended = [counts(t) or TrialRecord.of(t).forgotten for t in trials]
    return [t for t, over in zip(trials, ended, strict=True) if not over and t.number not in retried]


def _interrupted(trials: Sequence[FrozenTrial]) -> list[FrozenTrial]:
    """Failed attempts that have to be tried again and are not queued."""
    return [trial for trial in _open(trials) if trial.state == TrialState.FAIL]


def _requeue(study: Study, trial: FrozenTrial) -> None:
    queue_again(study, trial, retry_of=trial.number, crashes=crashes(trial))


def queue_again(study: Study, trial: FrozenTrial, **attributes: Any) -> None:
    """Queue a trial with the settings of another.

    Args:
        attributes: further fields of its `TrialRecord`.
    """
    record = TrialRecord.of(trial)
    kept = {"arm": record.arm, "name": record.name, "overrides": record.overrides}
    kept = {name: value for name, value in kept.items() if value is not None}
    # Parameters that the trial had are fixed, so that the sampler does not choose others for the retry.
    study.enqueue_trial(
        {**trial.system_attrs.get("fixed_params", {}), **trial.params},
        user_attrs=trial_attributes(**kept, **attributes),
    )


def attempts(trials: Sequence[FrozenTrial], number: int) -> Iterator[int]:
    """Numbers of the attempts at a trial, from the given one back to the first.

    Args:
        trials: all trials of the study, by number.
    """
    attempt: int | None = number
    while attempt is not None:
        yield attempt
        attempt = TrialRecord.of(trials[attempt]).retry_of


def snapshot_folder(study: Study, number: int) -> Path:
    """The folder of a trial's snapshots. The study's token is in its path, so studies of one name share no folder."""
    return state_path("studies", f"{study.study_name}-{StudyRecord.of(study).token}", f"{number:05d}")


def best_folder(name: str, token: str, number: int) -> Path:
    """The folder of the snapshots with which `study best` trains a trial of a study again."""
    # Not in the trial's folder, where `unused_snapshots` takes those of an ended trial for unused.
    return state_path("best", f"{name}-{token}-{number}")


def best_folders(name: str, token: str) -> list[Path]:
    """The folders that `best_folder` names for a study's trials, as far as they are there."""
    beside = best_folder(name, token, 0).parent.glob("*")
    return [path for path in beside if path.name.rpartition("-")[0] == f"{name}-{token}" and path.is_dir()]


def unused_snapshots(study: Study) -> list[Path]:
    """Folders of snapshots from which no attempt will resume."""
    trials = study.get_trials(deepcopy=False)
    # An open trial needs the snapshots of all its attempts, since the newest of them may be damaged.
    used = {attempt for last in _open(trials) for attempt in attempts(trials, last.number)}
    # A folder with a number beyond these trials may be of one that has begun since they were read.
    every = (path for path in snapshot_folder(study, 0).parent.glob("*") if path.name.isdigit())
    unused = (path for path in every if int(path.name) in range(len(trials)) and int(path.name) not in used)
    return sorted(path for path in unused if snapshot_files(path) or not any(path.iterdir()))


def remove_unused_snapshots(study: Study) -> None:
    """Remove the snapshots from which no attempt will resume, and their folders."""
    for path in unused_snapshots(study):
        remove_snapshots(path)
