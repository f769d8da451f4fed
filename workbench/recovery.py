"""What becomes of trials whose worker is gone: found, failed, and queued again to go on from their snapshots.

Every attempt at a trial is a trial of its own in Optuna, and a run of its own in MLflow, with `retry_of` naming the one
before it: a worker that was only taken for dead cannot write into its successor's. All of this is done under the
study's lock (`places.exclusive`), so that one process at a time looks and acts.
"""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import optuna
from optuna import Study
from optuna.trial import FrozenTrial, TrialState

from workbench.places import is_gone, state
from workbench.trials import counts, deaths

#: What a next attempt has of a trial's attributes.
KEPT = ("arm", "name", "overrides")


def died(trial: FrozenTrial) -> bool:
    """Whether a trial counts as running though its process is known to be gone.

    One that nobody has signed was taken by a process that died before it let go of the study's lock.
    """
    signed = trial.user_attrs.get("process")
    return trial.state == TrialState.RUNNING and (signed is None or bool(is_gone(signed)))


def mend(study: Study) -> list[str]:
    """Fail the trials of workers that are gone, and queue again what ended through no fault of its own.

    Hold the study's lock. Called again after being killed anywhere in between, it does the rest.

    Returns:
        What was done, a line each.
    """
    done = []
    for trial in study.get_trials(deepcopy=False):
        if died(trial):
            study.tell(trial.number, state=TrialState.FAIL)
            done.append(f"trial {trial.number}: its worker is gone")
    before = {t.number for t in study.get_trials(deepcopy=False) if t.state == TrialState.RUNNING}
    optuna.storages.fail_stale_trials(study)
    trials = study.get_trials(deepcopy=False)
    stale = (t for t in trials if t.number in before and t.state == TrialState.FAIL)
    done += [f"trial {trial.number}: no sign of life from its worker" for trial in stale]
    taken_up = {t.user_attrs["retry_of"] for t in trials if "retry_of" in t.user_attrs}
    for trial in trials:
        if trial.state == TrialState.FAIL and not counts(trial) and trial.number not in taken_up:
            _requeue(study, trial)
            done.append(f"trial {trial.number}: queued again")
    return done


def _requeue(study: Study, trial: FrozenTrial) -> None:
    kept: dict[str, Any] = {key: value for key, value in trial.user_attrs.items() if key in KEPT}
    study.enqueue_trial(
        {**trial.system_attrs.get("fixed_params", {}), **trial.params},
        user_attrs=kept | {"retry_of": trial.number, "deaths": deaths(trial)},
    )


def chain(study: Study, number: int) -> Iterator[int]:
    """The attempts at a trial, from the given one back to the first."""
    attributes = {t.number: t.user_attrs for t in study.get_trials(deepcopy=False)}
    found: int | None = number
    while found is not None:
        yield found
        found = attributes[found].get("retry_of")


def snapshots_of(study: Study, number: int) -> Path:
    """The folder of a trial's snapshots; two studies of one name share none."""
    return state("studies", f"{study.study_name}-{study.user_attrs.get('token', '')}", f"{number:05d}")
