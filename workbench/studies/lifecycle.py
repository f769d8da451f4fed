"""A study from its creation to its end.

A trial is the experiment's settings with an arm's or the sampler's on top. Whatever is read and acted upon (does the
study exist, which trial is next, whose worker is gone) happens under one lock of the study's database. So any number of
commands may start at once, also on an empty database.
"""

import difflib
import json
import time
from collections.abc import Mapping
from typing import Any

import optuna
from optuna import Study
from optuna.trial import TrialState
from tqdm import tqdm

from workbench import tracking
from workbench.common.cache import digest
from workbench.common.errors import Failure, UserError
from workbench.studies import tuning
from workbench.studies.experiment import Experiment
from workbench.studies.records import StudyRecord, trial_attributes, write_study
from workbench.studies.recovery import recover, remove_unused_snapshots
from workbench.studies.storage import PATIENCE, find_study, locked, open_storage, storage_url
from workbench.studies.trials import states_of, summary, summary_metrics
from workbench.studies.workers import Assignment, remaining, supervise
from workbench.tracking import delivery, reconcile, study_runs


def names(url: str) -> list[str]:
    """Names of all studies in a storage."""
    with locked(url):
        return optuna.get_all_study_names(open_storage(url))


def require_study(name: str, url: str) -> Study:
    """The study of that name.

    Raises:
        UserError: there is none; the message names those there are.
    """
    with locked(url):
        study = find_study(name, open_storage(url))
    if study is None:
        raise UserError(f"study {name!r}: not found; there are: {', '.join(names(url)) or 'none yet'}")
    return study


def open_study(experiment: Experiment, name: str, url: str) -> Study:
    """The study of that name, ready for workers: created with its arms in the queue, or recovered from what was killed.

    Hold the storage's lock.

    Raises:
        UserError: a study of that name has another space, other arms or other settings.
    """
    storage, definition = open_storage(url), experiment.definition()
    study = find_study(name, storage)
    if study is not None and StudyRecord.of(study).definition is None:
        optuna.delete_study(study_name=name, storage=storage)
        study = None
    if study is None:
        directions = [*experiment.sweep.objectives.values()]
        study = optuna.create_study(study_name=name, storage=storage, directions=directions)
        write_study(study, token=digest(name, time.time_ns())[:12], **_resumable(experiment))
        for arm in experiment.arms:
            attributes = trial_attributes(arm=arm.name, name=arm.label, overrides=dict(arm.overrides))
            study.enqueue_trial(dict(arm.point), user_attrs=attributes)
        # Last: a study without a definition was cut short while it was created.
        write_study(study, definition=definition)
        return study
    _require_same(name, StudyRecord.of(study).definition or {}, definition)
    write_study(study, **_resumable(experiment))
    recover(study)
    return study


def _resumable(experiment: Experiment) -> dict[str, Any]:
    """Fields of the study's record from which it is resumed without its experiment file."""
    return {"trials": experiment.trials, "settings": json.loads(json.dumps(experiment.settings))}


def _require_same(name: str, stored: Mapping[str, Any], now: Mapping[str, Any]) -> None:
    differing = sorted(key for key in stored.keys() | now.keys() if stored.get(key) != now.get(key))
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


def run_study(experiment: Experiment, name: str, workers: int) -> Study:
    """Run a study, or what it still lacks; before it the search that tunes its arms, if it declares one.

    Several commands may run the same study, and start it at the same moment: each takes trials that nobody runs.

    Args:
        workers: processes; 0 = only create the study and its runs, for other commands to work on.
    Returns:
        The study, with its MLflow run ended.
    Raises:
        KeyboardInterrupt: stopped by the user; finished trials are kept, interrupted ones resume from snapshots.
        Failure: a worker could not go on.
    """
    if tuning.candidates(experiment):
        if not workers:
            raise UserError("sweep.tuning: one command has to tune the arms before others can share the study")
        _run_study(tuning.search(experiment), f"{name}-tuning", workers)
        experiment = Experiment.resolve(experiment.declared, tuned_values(experiment, name))
    return _run_study(experiment, name, workers)


def tuned_values(experiment: Experiment, name: str) -> dict[str, dict[str, float]]:
    """The values that the search of a study, itself a study called NAME-tuning, found for each arm."""
    return tuning.best_values(experiment, tracking.load_runs(f"{name}-tuning"))


def _run_study(experiment: Experiment, name: str, workers: int) -> Study:
    url, started = storage_url(), time.monotonic()
    if not experiment.trials:
        raise UserError("sweep.trials = 0: the study declares no arms; give a number of trials")
    client = tracking.connect()
    complete = _complete_study(experiment, name, url, client)
    if complete is not None:
        tqdm.write(f"Study {name}: all {experiment.trials} trials are there.")
        return complete
    _check(experiment, prepared=workers > 0)
    with locked(url), delivery.require_reachable():
        study = open_study(experiment, name, url)
        parent = study_runs.open_study(client, name, f"Study **{name}**, running.")
    with delivery.require_reachable():
        delivery.deliver(client)
        reconcile.reconcile_runs(client, parent, states_of(study))
    to_run = remaining(study, experiment.trials, running=False)
    failed = True
    try:
        if to_run and workers:
            supervise(Assignment(experiment, name, url, parent), study, min(workers, to_run))
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
    if all(trial.state == TrialState.FAIL for trial in study.get_trials(deepcopy=False)):
        raise Failure(f"every trial of study {name!r} failed; the lines above say why")
    return study


def _complete_study(experiment: Experiment, name: str, url: str, client: tracking.Client) -> Study | None:
    """The study, if Optuna and MLflow say that it has all its trials; then nothing has to be prepared.

    Raises:
        UserError: it was made with other settings.
    """
    with locked(url), delivery.require_reachable():
        study = find_study(name, open_storage(url))
        if study is None or remaining(study, experiment.trials, running=False):
            return None
        if not study_runs.is_complete(client, name):
            return None
        return open_study(experiment, name, url)


def _check(experiment: Experiment, prepared: bool) -> None:
    """Find mistakes before a study is created.

    Args:
        prepared: encode and check the data too.
    """
    from workbench.training.measurements import metric_names
    from workbench.training.preparation import prepare
    from workbench.training.run import check

    config = experiment.config
    if prepared:
        tqdm.write("Preparing: encoding pairs, drawing the pretrained model's samples (kept for later runs) ...")
        check(config, prepare(config))
    logged = metric_names(config)
    for key, metric in experiment.sweep.metrics:
        if metric not in logged:
            close = difflib.get_close_matches(metric, logged, 3) or ["eval/win_rate", "eval/reward"]
            raise UserError(f"sweep.{key} = {metric!r}: runs log no such metric (try {', '.join(close)})")


def finish_study(
    study: Study, client: tracking.Client, parent: str, experiment: Experiment, failed: bool = False
) -> None:
    """Write onto the study's run how it stands, and end the run unless another command still works on the study.

    While the tracking store is away, that is left to `python -m workbench.study doctor`.
    """
    with locked(storage_url(), PATIENCE):
        recover(study)
        remove_unused_snapshots(study)
    if not delivery.wait_until_reachable(seconds=60):
        return
    try:
        with delivery.require_reachable():
            delivery.deliver(client)
        # Under the lock, since two commands may come to their end at once: the later one sees that none is left.
        with locked(storage_url(), PATIENCE), delivery.require_reachable():
            states = states_of(study)
            reconcile.reconcile_runs(client, parent, states)
            if not remaining(study, experiment.trials, running=False):
                state = "complete"
            elif "running" in states.values():
                state = "running"
            else:
                state = "failed" if failed else "interrupted"
            table = summary(study, experiment.config)
            study_runs.finish_study(client, parent, summary_metrics(study), table, state)
    except Failure as error:
        tqdm.write(f"Study {study.study_name}: {error}; `python -m workbench.study doctor` does the rest.")
