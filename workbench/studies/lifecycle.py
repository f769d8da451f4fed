"""A study from its creation to its end.

A trial is the experiment's settings with an arm's or the sampler's on top. Whatever is read and acted upon (does the
study exist, which trial is next, whose worker is gone) happens under one lock of the study's database. So any number of
commands may start at once, also on an empty database.
"""

import json
import os
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from typing import Any

import optuna
import polars as pl
from optuna import Study
from optuna.trial import TrialState
from tqdm import tqdm

from workbench import tracking
from workbench.common.cache import digest
from workbench.common.command_line import silence_transformers
from workbench.common.errors import Failure, UserError
from workbench.common.paths import require_places, storage_url
from workbench.common.signals import held
from workbench.studies import extension, tuning
from workbench.studies.experiment import Experiment
from workbench.studies.ownership import open_parent, require_no_orphans, statuses, study_id
from workbench.studies.pool import CHECKED, PREPARED, Assignment, WorkerPool
from workbench.studies.records import StudyRecord, trial_attributes, write_study
from workbench.studies.recovery import recover, remove_unused_snapshots, snapshot_folder
from workbench.studies.storage import (
    PATIENCE,
    create_whole,
    find_study,
    in_use,
    locked,
    missing,
    open_storage,
    require_study,
    require_writable,
)
from workbench.studies.trials import summary, summary_metrics
from workbench.studies.workers import remaining, supervise
from workbench.tracking import delivery, reconcile, study_runs
from workbench.tracking.artifacts import check_artifacts
from workbench.tracking.study_runs import StudyId


@contextmanager
def reading(name: str, url: str) -> Iterator[Study]:
    """The study of that name, which nobody deletes, renames or extends meanwhile.

    Raises:
        UserError: as `require_study`.
    """
    require_study(name, url)
    with ExitStack() as until_end:
        with locked(url):
            study = optuna.load_study(study_name=name, storage=open_storage(url))
            ensure_token(study)
            until_end.enter_context(in_use(url, StudyRecord.of(study).token))
        yield study


def open_study(experiment: Experiment, name: str, url: str) -> Study:
    """The study of that name, ready for workers: created with its arms in the queue, or recovered from what was killed.

    Arms, seeds and dimensions that the experiment declares more than the study has are added to it.

    Hold the storage's lock.

    Raises:
        UserError: a study of that name has another space, other arms or other settings, or is not the workbench's.
    """
    storage, definition = open_storage(url), experiment.definition()
    study = find_study(name, storage)
    if study is None:
        token = _new_token(name)

        def fill(draft: Study) -> None:
            draft.set_metric_names([*experiment.sweep.objectives])  # what Optuna's dashboard calls the values
            write_study(draft, token=token, **_resumable(experiment), definition=definition)
            for arm in experiment.arms:
                attributes = trial_attributes(arm=arm.name, name=arm.label, overrides=dict(arm.overrides))
                draft.enqueue_trial(dict(arm.point), user_attrs=attributes)

        return create_whole(name, storage, token, [*experiment.sweep.objectives.values()], fill)
    record = StudyRecord.of(study)
    _require_same(name, record.definition or {}, definition)
    ensure_token(study)
    if study.metric_names is None:  # made by an earlier version
        study.set_metric_names([*experiment.sweep.objectives])
    recover(study)
    added = [*extension.extend(study, experiment, url)]
    for what in added:
        tqdm.write(f"Study {name}: {what} added.")
    if added:  # Optuna keeps what it has once read of trials that have ended
        study = optuna.load_study(study_name=name, storage=open_storage(url))
    # A study may be started again with another number of trials, or with other settings of snapshots.
    write_study(study, **_resumable(experiment))
    return study


def _new_token(name: str) -> str:
    # Twelve hexadecimal digits: `storage.is_draft` recognises a draft by them.
    return digest(name, time.time_ns(), os.urandom(8))[:12]


def ensure_token(study: Study) -> None:
    """Give a study that was made before there were tokens one. Its snapshots, whose path has the token, follow."""
    if StudyRecord.of(study).token:
        return
    before = snapshot_folder(study, 0).parent
    write_study(study, token=_new_token(study.study_name))
    if before.is_dir():
        before.rename(snapshot_folder(study, 0).parent)


def _resumable(experiment: Experiment) -> dict[str, Any]:
    """Fields of the study's record from which it is resumed without its experiment file."""
    return {"trials": experiment.trials, "settings": json.loads(json.dumps(experiment.settings))}


def _require_same(name: str, stored: Mapping[str, Any], now: Mapping[str, Any]) -> None:
    stored = extension.comparable(stored)
    differing = sorted(key for key in stored.keys() | now.keys() if stored.get(key) != now.get(key))
    differing = [key for key in differing if not extension.is_extension(stored, now, key)]
    if differing:
        key = differing[0]
        raise UserError(
            f"study {name!r} was made with {key} = {stored.get(key)!r}, now it is {now.get(key)!r} "
            f"({len(differing)} settings differ); choose another --study name or restore the settings"
        )


def stored_experiment(study: Study) -> Experiment:
    """The experiment that a study was last started with.

    Raises:
        UserError: the study was made before settings were kept with it.
    """
    settings = StudyRecord.of(study).settings
    if settings is None:
        raise UserError(f"study {study.study_name!r}: older than `study resume`; go on with the command that made it")
    return Experiment.resolve(settings)


def run_study(experiment: Experiment, name: str, workers: int, pool: WorkerPool | None = None) -> Study:
    """Run a study, or what it still lacks; before it the search that tunes its arms, if it declares one.

    Several commands may run the same study, and start it at the same moment: each takes trials that nobody runs.

    Args:
        workers: processes; 0 = only create the study and its runs, for other commands to work on.
        pool: of this experiment, with workers that have been started already.
    Returns:
        The study, with its MLflow run ended.
    Raises:
        KeyboardInterrupt: stopped by the user; finished trials are kept, interrupted ones resume from snapshots.
        Failure: a worker could not go on.
    """
    if tuning.candidates(experiment):
        if not workers:
            raise UserError("sweep.tuning: one command has to tune the arms before others can share the study")
        findings = search_findings(
            experiment, name, lambda rest, study, first: _run_study(rest, study, workers, required=first)
        )
        experiment = Experiment.resolve(experiment.declared, findings.best)
    return _run_study(experiment, name, workers, pool=pool)


def search_findings(
    experiment: Experiment,
    name: str,
    run: Callable[[Experiment, str, bool], object] = lambda search, study, first: None,
) -> tuning.Findings:
    """What the search of a study found for each arm.

    The search is itself a study, called NAME-tuning; where it goes on beyond its edge, NAME-tuning-2 and so on.

    Args:
        run: called with each of these studies, its name and whether it is the first, before its runs are read.
    Raises:
        UserError: the first round has no ended run.
    """
    tried, findings, parts = dict(tuning.candidates(experiment)), tuning.Findings(), []
    new = tried
    for number in range(1, 2 + experiment.declared_sweep.tuning.extensions):
        if not new:
            break
        study = tuning.round_name(name, number)
        run(tuning.search(experiment, new), study, number == 1)
        try:
            # By address, since the tracking store may have another study of this name.
            parts.append(tracking.load_runs(identity(study).address))
        except UserError:
            if number == 1:
                raise
            # Beyond the edge every run may fail, which is an answer too: what was found before stands.
        findings = tuning.read(experiment, tried, pl.concat(parts, how="diagonal_relaxed"))
        new = tuning.accepted(experiment, findings.further)
        tried = tried | new
    return findings


def identity(name: str) -> StudyId:
    """What tells a study of this study database from all others, of its name too.

    Raises:
        UserError: this database has no such study.
    """
    url = storage_url()
    return study_id(require_study(name, url), url)


def _run_study(
    experiment: Experiment, name: str, workers: int, required: bool = True, pool: WorkerPool | None = None
) -> Study:
    """Run what a study lacks.

    Args:
        required: raise where every trial has failed.
        pool: as `run_study` takes it.
    """
    if not experiment.trials:
        raise UserError("sweep.trials = 0: the study declares no arms; give a number of trials")
    # First of all: workers import while the databases are opened here.
    with pool or WorkerPool(experiment, workers) as started:
        return _run_in(started, experiment, name, workers, required)


def _run_in(pool: WorkerPool, experiment: Experiment, name: str, workers: int, required: bool) -> Study:
    """Run what a study lacks in a pool of workers, which has been started but knows no study."""
    url, started = storage_url(), time.monotonic()
    first = missing(url) is not None
    if first:
        # Before anything is there: a mistake in a first command leaves no databases behind.
        _check(experiment, pool)
    require_places()
    require_writable(url)
    client = tracking.connect()
    check_artifacts(client)  # before anything is trained that could not be kept
    complete = _complete_study(experiment, name, url, client)
    if complete is not None:
        tqdm.write(f"Study {name}: all {experiment.trials} trials are there.")
        return complete
    if not first:
        _check(experiment, pool)
    if workers:
        pool.wait_until(PREPARED)
    with ExitStack() as until_end:
        study, own, parent = start(experiment, name, url, client, until_end)
        with delivery.require_reachable():
            # In this order: an outbox may say that a run ended otherwise than its trial, and Optuna has the last word.
            delivery.deliver(client)
            reconcile.reconcile_runs(client, parent, statuses(study))
        to_run = remaining(study, experiment.trials, running=False)
        failed = True
        try:
            if to_run and workers:
                supervise(pool, Assignment(experiment, own, url, parent), study, min(workers, to_run))
            failed = False
        except KeyboardInterrupt:
            failed = False
            raise
        finally:
            finish_study(study, client, parent, experiment, failed)
    if not workers:
        tqdm.write(f"Study {name}: {to_run} trials are waiting.")
        return study
    ran = to_run - remaining(study, experiment.trials, running=False)
    tqdm.write(f"\n{summary(study, experiment.config)}\n\n{ran} trials in {time.monotonic() - started:.0f} s.")
    if required and all(trial.state == TrialState.FAIL for trial in study.get_trials(deepcopy=False)):
        raise Failure(f"every trial of study {name!r} failed; the lines above say why")
    return study


def start(
    experiment: Experiment, name: str, url: str, client: tracking.Client, until_end: ExitStack
) -> tuple[Study, StudyId, str]:
    """A study with its run in MLflow, both found or both created.

    Args:
        until_end: while it is open, nobody deletes, renames or extends the study.
    Returns:
        The study, what identifies it, and the id of its run.
    Raises:
        UserError: its trials are there without its runs, or the other way round, or it was made with other settings.
    """
    with locked(url), delivery.require_reachable():
        require_no_orphans(client, name, url)
        # Optuna comes first: the token that the run gets is stored there. A kill in between leaves a study without a
        # run and without trials that have run, which gets its run the next time.
        study = open_study(experiment, name, url)
        own = study_id(study, url)
        parent = open_parent(client, study, own, experiment)
        until_end.enter_context(in_use(url, own.token))
        return study, own, parent


def _complete_study(experiment: Experiment, name: str, url: str, client: tracking.Client) -> Study | None:
    """The study, if Optuna and MLflow say that it has all its trials; then nothing has to be prepared.

    Raises:
        UserError: it was made with other settings.
    """
    with locked(url), delivery.require_reachable():
        study = find_study(name, open_storage(url))
        if study is None or remaining(study, experiment.trials, running=False):
            return None
        # The command was killed after the last trial: the caller goes on, and so completes the study's run.
        if not study_runs.is_complete(client, study_id(study, url)):
            return None
        return open_study(experiment, name, url)


def _check(experiment: Experiment, pool: WorkerPool) -> None:
    """Find mistakes before anything is made: a worker of the pool does, or without one this process.

    Raises:
        UserError, Failure: as `preparing.check`.
    """
    if pool.workers:
        tracking.import_stores()  # while the worker imports what it checks with
        pool.wait_until(CHECKED)
        tqdm.write("Preparing: encoding pairs, drawing the pretrained model's samples (kept for later runs) ...")
        return
    silence_transformers()
    from workbench.studies import preparing

    # Without prompts and pairs: the machine that only creates a study may not have them.
    preparing.check(experiment, sources=False)


def finish_study(
    study: Study, client: tracking.Client, parent: str, experiment: Experiment, failed: bool = False
) -> None:
    """Write onto the study's run how it stands, and end the run unless another command still works on the study.

    While the tracking store is away, that is left to `python -m workbench.study doctor`.
    """
    # First of all, and not cut short by a signal: trials go back to the queue even where the tracking store is away,
    # or a scheduler is about to kill this process.
    with held("SIGINT", "SIGTERM", "SIGHUP"), locked(storage_url(), PATIENCE):
        recover(study)
        remove_unused_snapshots(study)
    if not delivery.wait_until_reachable(seconds=60):
        return
    try:
        # Without the lock, which workers of other commands need: uploads may take long.
        with delivery.require_reachable():
            delivery.deliver(client)
        # Under the lock, since two commands may come to their end at once: the later one sees that none is left.
        with locked(storage_url(), PATIENCE), delivery.require_reachable():
            trials = statuses(study)
            reconcile.reconcile_runs(client, parent, trials)
            if not remaining(study, experiment.trials, running=False):
                state = "complete"
            elif any(trial.state == "running" for trial in trials.values()):
                state = "running"
            else:
                state = "failed" if failed else "interrupted"
            table = summary(study, experiment.config)
            study_runs.finish_study(client, parent, summary_metrics(study), table, state)
    except Failure as error:
        tqdm.write(f"Study {study.study_name}: {error}; `python -m workbench.study doctor` does the rest.")
