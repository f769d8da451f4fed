"""Deleting and renaming studies and forgetting trials, in Optuna, in MLflow and among the snapshots together.

Each change may be cut short by a kill, and is then done again from its beginning: Optuna, by which a study is found,
always comes last. Only what has the study's token is touched, and nothing while a command works on the study.
"""

import json
import re
import shutil
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import NamedTuple

import optuna
from optuna import Study
from optuna.trial import FrozenTrial, TrialState
from sqlalchemy import text

from workbench import tracking
from workbench.common.errors import UserError
from workbench.common.locks import lock_beside, remove_lock
from workbench.common.paths import state_path
from workbench.common.processes import place_of
from workbench.studies import lifecycle, ownership, recovery, storage, tuning
from workbench.studies.records import TrialRecord
from workbench.studies.storage import (
    find_study,
    locked,
    open_storage,
    own_studies,
    require_study,
    require_writable,
    unused,
)
from workbench.tracking import delivery, reconcile, study_runs
from workbench.tracking.study_runs import StudyId


class Contents(NamedTuple):
    """What a study consists of.

    Attributes:
        trials: attempts at trials in Optuna.
        runs: in MLflow, the study's own included.
        snapshots: trials that have some.
    """

    trials: int
    runs: int
    snapshots: int


def contents(client: tracking.Client, name: str, url: str) -> Contents:
    """What deleting a study would remove.

    Raises:
        UserError: there is no such study, a command works on it, or its runs belong to another database.
    """
    with _idle(client, name, url) as (study, own):
        runs = study_runs.all_runs(client, own)
        folders = [*recovery.snapshot_folder(study, 0).parent.glob("*"), *recovery.best_folders(name, own.token)]
        return Contents(len(study.get_trials(deepcopy=False)), len(runs), len(folders))


def delete(client: tracking.Client, name: str, url: str) -> None:
    """Delete a study: its trials and snapshots for good, its runs into MLflow's trash.

    Raises:
        UserError: as `contents`.
    """
    with _idle(client, name, url) as (study, own):
        for run in study_runs.all_runs(client, own):
            client.delete_run(run.info.run_id)
        for folder in (recovery.snapshot_folder(study, 0).parent, *recovery.best_folders(name, own.token)):
            shutil.rmtree(folder, ignore_errors=True)
            lock_beside(folder).unlink(missing_ok=True)
        # Last: a repetition after a kill finds the study by its name here.
        optuna.delete_study(study_name=name, storage=study._storage)
        remove_lock(url, own.token)


def rename(client: tracking.Client, name: str, new: str, url: str) -> list[str]:
    """Give a study another name, and with it the studies of its checks and of its arms' tuning.

    Returns:
        The studies of this database that have a new name.
    Raises:
        UserError: there is no such study, a command works on it, or the new name is taken or kept for its own checks.
        Failure: its run is in MLflow's trash.
    """
    if re.fullmatch(re.escape(name) + tuning.HELPERS, new):
        raise UserError(f"study {new!r}: is kept for the search and the checks of {name!r}; choose another name")
    with locked(url):
        database = open_storage(url)
        there, ours = optuna.get_all_study_names(database), own_studies(database)
    # Somebody else's NAME-tuning stays what it is.
    beside = [old for old in ours if re.fullmatch(re.escape(name) + tuning.ROUNDS, old)]
    names = {old: new + old.removeprefix(name) for old in (name, *beside)}
    # All are checked before the first is changed.
    for old, changed in names.items():
        with _idle(client, old, url) as (study, own):
            study_runs.find_study(client, own)  # in the trash it could not get another name
            _require_free(client, own, changed, there)
    for old, changed in reversed(names.items()):  # the study itself comes last, so that a repetition finds it
        with _idle(client, old, url) as (study, own):
            study_runs.rename_study(client, own, changed)
            snapshots = recovery.snapshot_folder(study, 0).parent
            if snapshots.is_dir():
                snapshots.rename(state_path("studies", f"{changed}-{own.token}"))
            for folder in recovery.best_folders(old, own.token):
                folder.rename(folder.with_name(changed + folder.name.removeprefix(old)))
            storage.rename(open_storage(url), old, changed)
    return [*names.values()]


def _require_free(client: tracking.Client, own: StudyId, name: str, there: Sequence[str]) -> None:
    """Refuse a name that a study of this database, or of the tracking store, has already.

    Raises:
        UserError: it is taken.
    """
    others = [run for run in study_runs.parents(client, name) if not study_runs.is_of(run, own)]
    if name in there or others:
        where = "this study database" if name in there else "the tracking store"
        raise UserError(f"study {name!r}: {where} has one already; choose another name")


def forget(client: tracking.Client, name: str, number: int, url: str) -> list[int]:
    """Let a trial no longer count: it loses its result, its run goes into MLflow's trash, its snapshots are removed.

    Every attempt at the trial goes with it, and every trial whose result was copied from it. Its number stays, since
    Optuna counts its trials. An arm is queued again; what the sampler chose may be chosen again.

    Returns:
        The numbers of all that are forgotten.
    Raises:
        UserError: as `contents`, or there is no such trial, or it has not ended.
    """
    with _idle(client, name, url) as (study, own):
        trials = study.get_trials(deepcopy=False)
        if number not in range(len(trials)):
            raise UserError(f"study {name!r}: no trial {number}; it has {len(trials)}, counted from 0")
        chosen = [trials[each] for each in _belonging(trials, number)]
        waiting = [trial.number for trial in chosen if not trial.state.is_finished()]
        if waiting:
            raise UserError(f"study {name!r}: trial {number} has not ended, trial {waiting[0]} waits to go on with it")
        ids = {TrialRecord.of(trial).run_id for trial in chosen}
        for run in study_runs.all_runs(client, own):
            if run.info.run_id in ids:
                client.delete_run(run.info.run_id)
        for trial in chosen:
            shutil.rmtree(recovery.snapshot_folder(study, trial.number), ignore_errors=True)
        _mark_forgotten(url, chosen)
        _queue_arm(study, trials[number], chosen)
        return sorted(trial.number for trial in chosen)


def _belonging(trials: Sequence[FrozenTrial], number: int) -> set[int]:
    """Numbers of all attempts at the trial of which one has this number, and of trials that copied its result."""
    # Attempts lead back to the first one, which all attempts at a trial share.
    first = [*recovery.attempts(trials, number)][-1]
    same = {t.number for t in trials if [*recovery.attempts(trials, t.number)][-1] == first}
    return same | {t.number for t in trials if TrialRecord.of(t).copied_from in same}


def _mark_forgotten(url: str, trials: Sequence[FrozenTrial]) -> None:
    """Take the results from trials that have ended, which Optuna's interface refuses to change."""
    with open_storage(url).engine.begin() as connection:
        for trial in trials:
            # Done by a call that was cut short: the database refuses a second attribute of this name.
            if TrialRecord.of(trial).forgotten:
                continue
            which = {"id": trial._trial_id}
            connection.execute(text("UPDATE trials SET state = 'FAIL' WHERE trial_id = :id"), which)
            connection.execute(text("DELETE FROM trial_values WHERE trial_id = :id"), which)
            insert = "INSERT INTO trial_user_attributes (trial_id, key, value_json) VALUES (:id, 'forgotten', :value)"
            connection.execute(text(insert), which | {"value": json.dumps(True)})


def _queue_arm(study: Study, trial: FrozenTrial, forgotten: Sequence[FrozenTrial]) -> None:
    """Queue a trial's arm again, unless it is there already: a repetition of `forget` may have queued it.

    Args:
        forgotten: all that is forgotten with the trial. Those that copied its result are no arms.
    """
    record, numbers = TrialRecord.of(trial), {each.number for each in forgotten}
    others = [TrialRecord.of(t) for t in study.get_trials(deepcopy=False) if t.number not in numbers]
    # The name too: arms may have the same settings, and each is run.
    there = [(other.arm, other.overrides) for other in others if not other.forgotten]
    if record.overrides is not None and (record.arm, record.overrides) not in there:
        recovery.queue_again(study, trial)


@contextmanager
def _idle(client: tracking.Client, name: str, url: str) -> Iterator[tuple[Study, StudyId]]:
    """A study of this database on which nobody works; the database's lock is held meanwhile.

    Raises:
        UserError: there is no such study, a command works on it, or its runs belong to another database.
    """
    require_study(name, url)
    require_writable(url)
    with ExitStack() as until_end:
        until_end.enter_context(locked(url))
        until_end.enter_context(delivery.require_reachable())
        study = find_study(name, open_storage(url))
        assert study is not None
        lifecycle.ensure_token(study)
        # First: the trial of a worker that died would count as running, and nothing could be changed.
        recovery.recover(study)
        running = [t for t in study.get_trials(deepcopy=False) if t.state == TrialState.RUNNING]
        if running:
            host, pid = place_of(TrialRecord.of(running[0]).process or "")
            raise UserError(
                f"study {name!r}: process {pid or '?'} on {host} runs trial {running[0].number}; stop it first"
            )
        own = ownership.study_id(study, url)
        # Asked second, since a running trial says more: which process it is. This one prepares, or is between trials.
        if not until_end.enter_context(unused(url, own.token)):
            raise UserError(f"study {name!r}: another command works on it; stop it first, or wait for its end")
        if not study_runs.own_parents(client, own, deleted=True):
            reconcile.adopt(client, own, ownership.statuses(study))  # of a study made before there were tokens
        # Those in the trash too: a deletion that was cut short has put them there already.
        for parent in study_runs.own_parents(client, own, deleted=True):
            ownership.require_original(parent, own)
        yield study, own
