"""A study: made, run, gone on with and brought to its end; `space` reads what it searches.

A trial is the experiment's settings with an arm's or the sampler's on top. Whatever is looked at and acted upon (is the
study there, which trial is next, whose worker is gone) happens under one lock of the study's database, so any number of
commands may start at once, on an empty database too.
"""

import difflib
import json
import time
from typing import Any

import optuna
from optuna import Study
from optuna.trial import TrialState
from tqdm import tqdm

from workbench import tracking
from workbench.common.cache import digest
from workbench.common.errors import Failure, UserError
from workbench.studies import tuning
from workbench.studies.recovery import clear, mend
from workbench.studies.space import arms_of, read_pruner, read_sampler
from workbench.studies.storage import PATIENCE, find_study, locked, open_storage, storage_url
from workbench.studies.trials import state_of, summary, summary_metrics
from workbench.studies.workers import Worker, missing, supervise
from workbench.tracking import delivery, reconcile, study_runs
from workbench.training.config import Config, resolve

Queue = list[tuple[dict[str, Any], dict[str, Any]]]


def names(url: str) -> list[str]:
    """All studies of a storage."""
    with locked(url):
        return optuna.get_all_study_names(open_storage(url))


def require_study(name: str, url: str) -> Study:
    """The study of that name.

    Raises:
        UserError: there is none; names those there are.
    """
    with locked(url):
        study = find_study(name, open_storage(url))
    if study is None:
        raise UserError(f"study {name!r}: not found; there are: {', '.join(names(url)) or 'none yet'}")
    return study


def open_study(config: Config, settings: dict[str, Any], queued: Queue, name: str, url: str) -> Study:
    """The study, made with its queue of arms (`arms_of`) where it is missing; interrupted trials are queued again.

    Hold the storage's lock.

    Raises:
        UserError: a study of that name exists with another space, other arms or other settings.
    """
    storage, defined = open_storage(url), _definition(config)
    study = find_study(name, storage)
    if study is not None and "definition" not in study.user_attrs:
        optuna.delete_study(study_name=name, storage=storage)
        study = None
    if study is None:
        study = optuna.create_study(study_name=name, storage=storage, directions=[*config.sweep.objectives.values()])
        study.set_user_attr("token", digest(name, time.time_ns())[:12])
        _note(study, config, settings, queued)
        for point, attributes in queued:
            study.enqueue_trial(point, user_attrs=attributes)
        study.set_user_attr("definition", defined)  # last: a study without it was cut short while it was made
        return study
    stored = study.user_attrs["definition"]
    differing = sorted(k for k in stored.keys() | defined.keys() if stored.get(k) != defined.get(k))
    if differing:
        key = differing[0]
        raise UserError(
            f"study {name!r} was made with {key} = {stored.get(key)!r}, now it is {defined.get(key)!r} "
            f"({len(differing)} settings differ); choose another --study name or restore the settings"
        )
    _note(study, config, settings, queued)
    mend(study)
    return study


def _note(study: Study, config: Config, settings: dict[str, Any], queued: Queue) -> None:
    """Keep with the study what it takes to go on with it, without its file."""
    study.set_user_attr("asked", config.sweep.trials or len(queued))
    study.set_user_attr("settings", json.loads(json.dumps(settings)))


def _definition(config: Config) -> dict[str, Any]:
    """What makes a study what it is; how many trials, how they are stopped and how snapshots are taken may change."""
    sweep = config.sweep.model_dump(include={"space", "arms", "seeds", "objective", "direction", "constraints"})
    if not sweep["constraints"]:
        del sweep["constraints"]  # studies of before there were any go on
    settings = {key: value for key, value in config.flat().items() if not key.startswith("snapshots.")}
    return json.loads(json.dumps(settings | {f"sweep.{key}": value for key, value in sweep.items()}))


def run_study(settings: dict[str, Any], name: str, workers: int) -> Study:
    """Run a study or what is missing of it: first the search that tunes its arms, where it declares one.

    Several commands may run the same study, and start it at the same moment: each takes trials that nobody runs.

    Args:
        workers: processes; 0 = only make the study and its runs, for other commands to work on.
        settings: the experiment's dotted settings, its sweep included.
    Returns:
        The study, with its MLflow run ended.
    Raises:
        KeyboardInterrupt: stopped by the user; finished trials are kept and the rest goes on from its snapshots.
        Failure: a worker could not go on.
    """
    tuned: tuning.Found = {}
    tuning.settle(settings, tuned)  # find mistakes in the arms before anything runs
    if tuning.candidates(settings):
        if not workers:
            raise UserError("sweep.tuning: one command has to tune the arms before others can share the study")
        _run_study(tuning.search(settings), f"{name}-tuning", workers)
        tuned = tuned_values(settings, name)
    return _run_study(tuning.settle(settings, tuned), name, workers)


def tuned_values(settings: dict[str, Any], name: str) -> dict[str, dict[str, float]]:
    """What each arm of a study found by its small search, itself a study called NAME-tuning."""
    return tuning.found(settings, tracking.load_runs(f"{name}-tuning"))


def _run_study(settings: dict[str, Any], name: str, workers: int) -> Study:
    config, url, started = resolve(settings), storage_url(), time.monotonic()
    queued = arms_of(config, settings)  # which reads the space too
    asked = config.sweep.trials or len(queued)
    if not asked:
        raise UserError("sweep.trials = 0: the study declares no arms; give a number of trials")
    read_sampler(config)
    read_pruner(config)
    client = tracking.connect()
    with locked(url), delivery.require_reachable():
        done = find_study(name, open_storage(url))
        if done is not None and not missing(done, asked, running=False) and study_runs.is_complete(client, name):
            open_study(config, settings, queued, name, url)  # is it the same study?
            tqdm.write(f"Study {name}: all {asked} trials are there.")
            return done
    _check(config, prepared=workers > 0)
    with locked(url), delivery.require_reachable():
        study = open_study(config, settings, queued, name, url)
        parent = study_runs.open_study(client, name, f"Study **{name}**, running.")
    with delivery.require_reachable():
        delivery.deliver(client)
        reconcile.reconcile_runs(client, parent, states_of(study))
    to_come = missing(study, asked, running=False)
    failed = True
    try:
        if to_come and workers:
            told = Worker(settings, name, url, parent, 0, asked)
            supervise(told, study, min(workers, to_come))
        failed = False
    except KeyboardInterrupt:
        failed = False
        raise
    finally:
        conclude(study, client, parent, config, asked, failed)
    if not workers:
        tqdm.write(f"Study {name}: {to_come} trials are waiting.")
        return study
    left = missing(study, asked, running=False)
    tqdm.write(f"\n{summary(study, config)}\n\n{to_come - left} trials in {time.monotonic() - started:.0f} s.")
    if all(t.state == TrialState.FAIL for t in study.get_trials(deepcopy=False)):
        raise Failure(f"every trial of study {name!r} failed; the lines above say why")
    return study


def _check(config: Config, prepared: bool) -> None:
    """What can be found wrong before a study is made.

    Args:
        prepared: data are encoded and looked at too.
    """
    from workbench.training.run import check, metric_names, prepare

    if prepared:
        tqdm.write("Preparing: encoding pairs, drawing the pretrained model's samples (kept for later runs) ...")
        prepare(config)
        check(config)
    logged = metric_names(config)
    for key, metric in config.sweep.metrics:
        if metric not in logged:
            close = difflib.get_close_matches(metric, logged, 3) or ["eval/win_rate", "eval/reward"]
            raise UserError(f"sweep.{key} = {metric!r}: runs log no such metric (try {', '.join(close)})")


def states_of(study: Study) -> dict[int, str]:
    """How each trial stands, in the words of runs."""
    return {trial.number: state_of(trial) for trial in study.get_trials(deepcopy=False)}


def conclude(
    study: Study, client: tracking.Client, parent: str, config: Config, asked: int, failed: bool = False
) -> None:
    """Write onto the study's run how it stands, and end it unless somebody else still works on it.

    Where the tracking store is away, that is left for `python -m workbench.study doctor`.
    """
    with locked(storage_url(), PATIENCE):
        mend(study)
        clear(study)
    if not delivery.wait_until_reachable(seconds=60):
        return
    try:
        with delivery.require_reachable():
            delivery.deliver(client)
        # Under the lock, since two commands may come to their end at once.
        with locked(storage_url(), PATIENCE), delivery.require_reachable():
            states = states_of(study)
            reconcile.reconcile_runs(client, parent, states)
            if not missing(study, asked, running=False):
                state = "complete"
            elif "running" in states.values():
                state = "running"
            else:
                state = "failed" if failed else "interrupted"
            study_runs.finish_study(client, parent, summary_metrics(study), summary(study, config), state)
    except Failure as error:
        tqdm.write(f"Study {study.study_name}: {error}; `python -m workbench.study doctor` does the rest.")
