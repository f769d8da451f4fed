"""What becomes of trials whose worker is gone: found, failed, and queued again to go on from their snapshots.

Every attempt at a trial is a trial of its own in Optuna, and a run of its own in MLflow, with `retry_of` naming the one
before it: a worker that was only taken for dead cannot write into its successor's. All of this is done under the
study's lock (`locks.exclusive`), so that one process at a time looks and acts.
"""

import shutil
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import optuna
from optuna import Study
from optuna.trial import FrozenTrial, TrialState

from workbench.common.paths import state_path
from workbench.common.processes import is_gone
from workbench.studies.trials import counts, deaths

#: What a next attempt has of a trial's attributes.
KEPT = ("arm", "name", "overrides")


def died(trial: FrozenTrial) -> bool:
    """Whether a trial counts as running though its process is known to be gone.

    One that nobody has signed was taken by a process that died before it let go of the study's lock.
    """
    signed = trial.user_attrs.get("process")
    return trial.state == TrialState.RUNNING and (signed is None or bool(is_gone(signed)))


def orphans(study: Study) -> list[str]:
    """What `mend` would do; a line each."""
    trials = study.get_trials(deepcopy=False)
    gone = {t.number for t in trials if died(t)}
    stale_ids = set(study._storage._get_stale_trial_ids(study._study_id))  # type: ignore[attr-defined]
    stale = {t.number for t in trials if t._trial_id in stale_ids} - gone
    return [
        *(f"trial {number}: its worker is gone" for number in sorted(gone)),
        *(f"trial {number}: no sign of life from its worker" for number in sorted(stale)),
        *(f"trial {t.number}: was cut short and is not in the queue" for t in _open(trials) if _failed(t)),
    ]


def mend(study: Study) -> None:
    """Fail the trials of workers that are gone, and queue again what ended through no fault of its own.

    Hold the study's lock. Called again after being killed anywhere in between, it does the rest.
    """
    for trial in study.get_trials(deepcopy=False):
        if died(trial):
            study.tell(trial.number, state=TrialState.FAIL)
    optuna.storages.fail_stale_trials(study)
    for trial in filter(_failed, _open(study.get_trials(deepcopy=False))):
        _requeue(study, trial)


def _open(trials: Sequence[FrozenTrial]) -> list[FrozenTrial]:
    """The last attempts at trials that have not come to an end of their own."""
    taken_up = {t.user_attrs.get("retry_of") for t in trials}
    return [t for t in trials if not counts(t) and t.number not in taken_up]


def _failed(trial: FrozenTrial) -> bool:
    return trial.state == TrialState.FAIL


def _requeue(study: Study, trial: FrozenTrial) -> None:
    kept: dict[str, Any] = {key: value for key, value in trial.user_attrs.items() if key in KEPT}
    study.enqueue_trial(
        {**trial.system_attrs.get("fixed_params", {}), **trial.params},
        user_attrs=kept | {"retry_of": trial.number, "deaths": deaths(trial)},
    )


def chain(trials: Sequence[FrozenTrial], number: int) -> Iterator[int]:
    """The attempts at a trial, from the given one back to the first.

    Args:
        trials: all of the study, by number.
    """
    found: int | None = number
    while found is not None:
        yield found
        found = trials[found].user_attrs.get("retry_of")


def leftovers(study: Study) -> list[Path]:
    """Folders of snapshots that nobody will go on from."""
    trials = study.get_trials(deepcopy=False)
    wanted = {attempt for last in _open(trials) for attempt in chain(trials, last.number)}  # or queued again soon
    folders = (path for path in snapshots_of(study, 0).parent.glob("*") if path.name.isdigit())
    return sorted(path for path in folders if int(path.name) in range(len(trials)) and int(path.name) not in wanted)


def clear(study: Study) -> None:
    """Remove them."""
    for path in leftovers(study):
        shutil.rmtree(path, ignore_errors=True)


def snapshots_of(study: Study, number: int) -> Path:
    """The folder of a trial's snapshots; two studies of one name share none."""
    return state_path("studies", f"{study.study_name}-{study.user_attrs.get('token', '')}", f"{number:05d}")
