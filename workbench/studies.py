"""The room that runs Optuna: a study, its workers, its resumption; `space` reads what it searches.

A trial is the experiment's settings with an arm's or the sampler's on top. The parent process makes both
schemas, the study and its MLflow run before any worker starts, hands out exactly the trials that are missing,
and shows progress; workers are processes on one Optuna storage.
"""

import difflib
import json
import math
import multiprocessing
import os
import platform
import queue
import signal
import threading
import time
import zlib
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import optuna
from optuna import Study, Trial, TrialPruned, pruners
from optuna.storages import RDBStorage
from optuna.trial import TrialState
from sqlalchemy import Engine, event
from tqdm import tqdm

from workbench import tracking, tuning
from workbench.config import Config, resolve
from workbench.errors import Failure, UserError
from workbench.space import arms_of, read_sampler, read_space, settings_of
from workbench.trials import counts, died, line_of, requeue, summary, summary_metrics

optuna.logging.set_verbosity(optuna.logging.ERROR)
SHOWN = ("eval/reward", "eval/win_rate_low", "eval/win_rate_high", "divergence/policy", "divergence/reference")


_stopping = threading.Event()  # set in a worker that was asked to stop


def storage_url() -> str:
    """$WORKBENCH_STORAGE, or optuna.db in the working folder."""
    return os.environ.get("WORKBENCH_STORAGE") or f"sqlite:///{Path('optuna.db').resolve()}"


def open_storage(url: str) -> RDBStorage:
    """The study database; the trial of a worker that dies is queued again.

    Raises:
        Failure: the database cannot be opened.
    """
    engine = {"connect_args": {"timeout": 60}} if url.startswith("sqlite") else {"pool_pre_ping": True}
    try:
        storage = RDBStorage(
            url, engine_kwargs=engine, heartbeat_interval=15, grace_period=60, heartbeat_stale_trial_callback=requeue
        )
        if url.startswith("sqlite"):
            _one_writer(storage.engine)
        return storage
    except Exception as error:  # whatever the database's driver raises
        place = url.split("@")[-1]  # without user and password
        raise Failure(f"study storage {place} cannot be opened ({str(error).splitlines()[0]})") from None


def _one_writer(engine: Engine) -> None:
    """Begin every sqlite transaction with the write lock, or two workers can read that a trial waits and both take it.

    The recipe of SQLAlchemy's manual for sqlite; other databases lock the row.
    """
    engine.dispose()  # connections made before the listeners

    @event.listens_for(engine, "connect")
    def _leave_begin_to_us(connection: Any, record: Any) -> None:
        connection.isolation_level = None

    @event.listens_for(engine, "begin")
    def _begin(connection: Any) -> None:
        connection.exec_driver_sql("BEGIN IMMEDIATE")


def open_study(config: Config, queued: list[tuple[dict, dict]], name: str, url: str) -> Study:
    """The study, made with its queue of arms (`arms_of`) where it is missing; interrupted trials are queued again.

    Raises:
        UserError: a study of that name exists with another space, other arms or other settings.
    """
    definition = config.flat() | {
        f"sweep.{key}": getattr(config.sweep, key) for key in ("space", "arms", "seeds", "objective", "direction")
    }
    definition = json.loads(json.dumps(definition))
    storage = open_storage(url)
    if name in optuna.get_all_study_names(storage):
        study = optuna.load_study(study_name=name, storage=storage)
        stored = study.user_attrs.get("definition", {})
        differing = sorted(k for k in stored.keys() | definition.keys() if stored.get(k) != definition.get(k))
        if differing:
            key = differing[0]
            raise UserError(
                f"study {name!r} was made with {key} = {stored.get(key)!r}, now it is {definition.get(key)!r} "
                f"({len(differing)} settings differ); choose another --study name or restore the settings"
            )
        for trial in study.get_trials(deepcopy=False):
            if died(trial):
                study.tell(trial.number, state=TrialState.FAIL)
        optuna.storages.fail_stale_trials(study)
        for trial in study.get_trials(deepcopy=False):
            if trial.state == TrialState.FAIL and not counts(trial):
                requeue(study, trial)
        return study
    study = optuna.create_study(study_name=name, storage=storage, direction=config.sweep.direction)
    study.set_user_attr("definition", definition)
    for point, attributes in queued:
        study.enqueue_trial(point, user_attrs=attributes)
    return study


#: What tells the commands of a cluster's job, or one machine's GPUs, apart.
PLACES = ("SLURM_ARRAY_TASK_ID", "SLURM_PROCID", "JOB_COMPLETION_INDEX", "CUDA_VISIBLE_DEVICES")


@dataclass(frozen=True)
class Worker:
    """What a worker process is told: the experiment's dotted settings (its sweep included), and where to work."""

    settings: dict[str, Any]
    study: str
    url: str
    parent: str
    index: int
    asked: int


def work(told: Worker, tokens: Any, events: Any) -> None:
    """Run trials, one a token, until none is left. The body of a worker process.

    Only the parent hears Ctrl-C; it ends its workers by SIGTERM, which takes effect between two steps, where no
    database is in the middle of a write.
    """
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        signal.signal(signal.SIGTERM, lambda *_: _stopping.set())
        _work(told, tokens, events)
    except KeyboardInterrupt:
        pass
    except (UserError, Failure) as error:
        events.put((type(error).__name__, str(error)))
    finally:
        signal.signal(signal.SIGTERM, signal.SIG_IGN)


def _work(told: Worker, tokens: Any, events: Any) -> None:
    from workbench.cli import quiet, silence_transformers

    quiet()
    silence_transformers()
    config = resolve(told.settings)
    study = optuna.load_study(study_name=told.study, storage=open_storage(told.url))
    offset = told.index + 1000 * len(study.get_trials(deepcopy=False)) + _place()
    study.sampler, study.pruner = read_sampler(config, offset), pruners.ThresholdPruner(upper=config.sweep.prune.above)
    while not _stopping.is_set() and tokens.acquire(block=False) and _missing(study, told.asked, running=True):
        study.optimize(lambda t: run_trial(told, config, t, events), n_trials=1, catch=(FloatingPointError,))
        events.put(("trial", ""))


def _place() -> int:
    """A number for where this command runs, which several on one study do; 0 where nothing says so."""
    told = [f"{name}={os.environ[name]}" for name in PLACES if name in os.environ]
    return zlib.crc32(" ".join([platform.node(), *told]).encode()) if told else 0


def _missing(study: Study, asked: int, *, running: bool) -> int:
    """Trials that are still to come.

    Args:
        running: leave out those that somebody runs now, perhaps another command on the same study.
    """
    trials = study.get_trials(deepcopy=False)
    return max(0, asked - sum(counts(t) or (running and t.state == TrialState.RUNNING) for t in trials))


def run_trial(told: Worker, study_config: Config, trial: Trial, events: Any) -> float:
    """One trial, tracked as a child run of the study's; its state in MLflow follows its state in Optuna.

    A trial whose numbers are not finite has failed and counts; one that ends otherwise (stopped, a store out of
    reach, out of memory) is queued again when the study is resumed.
    """
    from workbench.run import datasets, describe, execute, prepare, provenance

    sweep, tracker, state, reason = study_config.sweep, None, "interrupted", ""
    parent_process = multiprocessing.parent_process()

    def on_step(step: int, news: Mapping[str, float]) -> None:
        events.put(("step", ""))
        if _stopping.is_set() or (parent_process is not None and not parent_process.is_alive()):
            raise KeyboardInterrupt  # asked to stop, or nobody is left to hand out trials
        if sweep.prune.metric in news:
            trial.report(news[sweep.prune.metric], step)
            if trial.should_prune():
                found = news[sweep.prune.metric]
                raise TrialPruned(f"{sweep.prune.metric} = {found:.4g} above {sweep.prune.above} at step {step}")

    try:
        trial.set_user_attr("process", f"{platform.node()}:{os.getpid()}")
        client = tracking.connect()
        if "retry_of" in trial.user_attrs:
            tracking.bury_trial(client, told.parent, trial.user_attrs["retry_of"])
        config = resolve(settings_of(trial, told.settings, read_space(study_config)))
        arm = trial.user_attrs.get("arm", "")
        tags = provenance() | {
            "workbench.kind": "trial",
            "workbench.study": told.study,
            "workbench.trial": str(trial.number),
            "workbench.arm": arm or "sampled",
            "mlflow.note.content": describe(config, arm),
        }
        name, inputs = trial.user_attrs.get("name", f"trial-{trial.number}"), datasets(prepare(config))
        tracker = tracking.Tracker(client, name, params=config.flat(), tags=tags, datasets=inputs, parent=told.parent)
        trial.set_user_attr("run_id", tracker.run_id)
        final = execute(config, tracker, on_step=on_step)
        value = final[sweep.objective]
        if not math.isfinite(value):
            raise FloatingPointError(f"{sweep.objective} = {value} at the end: not finite")
        for metric in SHOWN:
            if metric in final:
                trial.set_user_attr(metric, final[metric])
        state = "complete"
        return value
    except TrialPruned as stop:
        state, reason = "pruned", str(stop)
        trial.set_user_attr("reason", reason)
        raise
    except FloatingPointError as error:
        state, reason = "failed", str(error)
        trial.set_user_attr("failed", reason)
        raise
    except Exception as error:
        state, reason = "failed", str(error)
        raise
    finally:
        if tracker is not None:
            tracker.close(state, reason)


def run_study(settings: dict[str, Any], name: str, workers: int) -> Study:
    """Run a study or what is missing of it: first the search that tunes its arms, where it declares one.

    Several commands may run the same study once it is there: each takes trials that nobody runs.

    Args:
        workers: processes; 0 = only make the study and its runs, for other commands to work on.
        settings: the experiment's dotted settings, its sweep included.
    Returns:
        The study, with its MLflow run ended.
    Raises:
        KeyboardInterrupt: stopped by the user; finished trials are kept and the rest can be resumed.
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
    client = tracking.connect()
    done = _finished(config, queued, name, url, asked)
    if done is not None and tracking.is_complete(client, name):
        tqdm.write(f"Study {name}: all {asked} trials are there.")
        return done

    from workbench.run import check, metric_names, prepare

    if workers:
        tqdm.write("Preparing: encoding pairs, drawing the pretrained model's samples (kept for later runs) ...")
        prepare(config)
        check(config)
    logged = metric_names(config)
    for key, metric in (("objective", config.sweep.objective), ("prune.metric", config.sweep.prune.metric)):
        if metric not in logged:
            close = difflib.get_close_matches(metric, logged, 3) or ["eval/win_rate", "eval/reward"]
            raise UserError(f"sweep.{key} = {metric!r}: runs log no such metric (try {', '.join(close)})")
    study = open_study(config, queued, name, url)
    parent = tracking.open_study(client, name, f"Study **{name}**, running.")
    missing = _missing(study, asked, running=False)
    state = "failed"
    try:
        if missing and workers:
            _supervise(settings, config, study, parent, url, min(workers, missing), missing, asked)
        state = "complete" if workers and not _missing(study, asked, running=False) else "interrupted"
    except KeyboardInterrupt:
        state = "interrupted"
        raise
    finally:
        tracking.finish_study(client, parent, summary_metrics(study), summary(study, config), state)
    if not workers:
        tqdm.write(f"Study {name}: {missing} trials are waiting.")
        return study
    tqdm.write(f"\n{summary(study, config)}\n\n{missing} trials in {time.monotonic() - started:.0f} s.")
    if all(t.state == TrialState.FAIL for t in study.get_trials(deepcopy=False)):
        raise Failure(f"every trial of study {name!r} failed; the lines above say why")
    return study


def _finished(config: Config, queued: list[tuple[dict, dict]], name: str, url: str, asked: int) -> Study | None:
    """The study, if it exists and nothing of it is missing."""
    storage = open_storage(url)
    if name not in optuna.get_all_study_names(storage):
        return None
    study = optuna.load_study(study_name=name, storage=storage)
    if sum(map(counts, study.get_trials(deepcopy=False))) < asked:
        return None
    return open_study(config, queued, name, url)


def _supervise(
    settings: dict[str, Any],
    config: Config,
    study: Study,
    parent: str,
    url: str,
    workers: int,
    missing: int,
    asked: int,
) -> None:
    """Start the workers and show what they do, until they are done.

    Raises:
        UserError, Failure: what a worker met that is not one trial's affair.
    """
    context = multiprocessing.get_context("spawn")
    tokens, events = context.Semaphore(missing), context.Queue()
    processes = [
        context.Process(target=work, args=(Worker(settings, study.study_name, url, parent, i, asked), tokens, events))
        for i in range(workers)
    ]
    before = {t.number for t in study.get_trials(deepcopy=False) if t.state.is_finished()}
    problems: list[tuple[str, str]] = []
    done = 0
    bar = tqdm(total=missing * config.train.steps, desc=study.study_name, unit="step", smoothing=0.05)
    try:
        heard = signal.signal(signal.SIGINT, signal.SIG_IGN)  # which the workers inherit
        for process in processes:
            process.start()
        signal.signal(signal.SIGINT, heard)
        while any(p.is_alive() for p in processes) or not events.empty():
            try:
                kind, value = events.get(timeout=0.5)
            except queue.Empty:
                continue
            if kind == "step":
                bar.update(1)
            elif kind != "trial":
                problems.append((kind, value))
            else:
                done += 1
                bar.n = max(bar.n, done * config.train.steps)  # pruned trials take fewer steps
                for trial in study.get_trials(deepcopy=False):
                    if trial.state.is_finished() and trial.number not in before:
                        before.add(trial.number)
                        tqdm.write(line_of(trial))
    except KeyboardInterrupt:
        tqdm.write("Stopping: ending the running trials cleanly ...")
        for process in processes:
            if process.is_alive():
                process.terminate()
        raise
    finally:
        for process in processes:
            if process.pid is not None:
                process.join(60)
        bar.close()
    for kind, text in problems:
        raise UserError(text) if kind == "UserError" else Failure(text)
    crashed = [p.exitcode for p in processes if p.exitcode]
    if crashed:
        raise Failure(f"a worker died (exit code {crashed[0]}); run the same command again to go on")
