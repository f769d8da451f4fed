"""The room that runs Optuna: a study, its workers, its resumption; `space` reads what it searches.

A trial is the experiment's settings with an arm's or the sampler's on top. The parent process makes both
schemas, the study and its MLflow run before any worker starts, hands out exactly the trials that are missing,
and shows progress; workers are processes on one Optuna storage.
"""

import json
import multiprocessing
import os
import queue
import signal
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import optuna
from optuna import Study, Trial, TrialPruned, pruners
from optuna.storages import RDBStorage, RetryHeartbeatStaleTrialCallback
from optuna.trial import FrozenTrial, TrialState
from tqdm import tqdm

from workbench import tracking
from workbench.config import Config, Sweep, resolve
from workbench.errors import Failure, UserError
from workbench.space import arms_of, read_sampler, read_space, settings_of

optuna.logging.set_verbosity(optuna.logging.ERROR)
SHOWN = ("eval/reward", "eval/win_rate_low", "eval/win_rate_high", "divergence/policy", "divergence/reference")


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
        return RDBStorage(
            url,
            engine_kwargs=engine,
            heartbeat_interval=15,
            grace_period=60,
            heartbeat_stale_trial_callback=RetryHeartbeatStaleTrialCallback(max_retry=3),
        )
    except Exception as error:  # whatever the database's driver raises
        place = url.split("@")[-1]  # without user and password
        raise Failure(f"study storage {place} cannot be opened ({str(error).splitlines()[0]})") from None


# --- the study -----------------------------------------------------------------------------------------------


def open_study(config: Config, base: Mapping[str, Any], name: str, url: str) -> Study:
    """The study, made with its queue of arms where it is missing; interrupted trials are queued again.

    Raises:
        UserError: a study of that name exists with another space, other arms or other settings.
    """
    read_sampler(config)
    if config.sweep.objective.startswith("eval/") and not config.evaluation.seeds:
        raise UserError(f"sweep.objective = {config.sweep.objective!r}: needs evaluation.seeds above 0")
    queued = arms_of(config, base)
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
        trials = study.get_trials(deepcopy=False)
        again = {t.user_attrs.get("retry_of") for t in trials}
        for trial in trials:
            if trial.user_attrs.get("interrupted") and trial.number not in again:
                kept = {k: v for k, v in trial.user_attrs.items() if k in ("arm", "name", "overrides")}
                study.enqueue_trial(trial.params, user_attrs=kept | {"retry_of": trial.number})
        optuna.storages.fail_stale_trials(study)
        return study
    study = optuna.create_study(study_name=name, storage=storage, direction=config.sweep.direction)
    study.set_user_attr("definition", definition)
    for point, attributes in queued:
        study.enqueue_trial(point, user_attrs=attributes)
    return study


def counts(trial: FrozenTrial) -> bool:
    """Whether a trial is one of those asked for: it came to an end of its own."""
    ended = trial.state in (TrialState.COMPLETE, TrialState.PRUNED)
    return ended or (trial.state == TrialState.FAIL and "failed" in trial.user_attrs)


@dataclass(frozen=True)
class Worker:
    """What a worker process is told: the experiment's dotted settings (its sweep included), and where to work."""

    settings: dict[str, Any]
    study: str
    url: str
    parent: str
    index: int


def work(told: Worker, tokens: Any, events: Any) -> None:
    """Run trials, one a token, until none is left. The body of a worker process."""
    from workbench.cli import quiet, silence_transformers

    signal.signal(signal.SIGTERM, lambda *_: signal.raise_signal(signal.SIGINT))
    quiet()
    silence_transformers()
    config = resolve(told.settings)
    study = optuna.load_study(
        study_name=told.study,
        storage=open_storage(told.url),
        sampler=read_sampler(config, told.index),
        pruner=pruners.ThresholdPruner(upper=config.sweep.prune.above),
    )
    try:
        while tokens.acquire(block=False):
            study.optimize(
                lambda trial: run_trial(told, config.sweep, trial, events),
                n_trials=1,
                catch=(FloatingPointError, UserError),  # these end the trial, not the sweep
            )
            events.put(("trial", 1))
    except KeyboardInterrupt:
        pass
    except Failure as error:
        events.put(("error", str(error)))


def run_trial(told: Worker, sweep: Sweep, trial: Trial, events: Any) -> float:
    """One trial, tracked as a child run of the study's; its state in MLflow follows its state in Optuna."""
    from workbench.run import datasets, describe, execute, prepare, provenance

    client = tracking.connect()
    if "run_id" in trial.user_attrs:  # this is the retry of a worker's that died: its run is over
        client.set_tag(trial.user_attrs["run_id"], "workbench.state", "interrupted")
        client.set_terminated(trial.user_attrs["run_id"], "KILLED")
    config = resolve(settings_of(trial, told.settings, read_space(sweep)))
    arm = trial.user_attrs.get("arm", "")
    tags = provenance() | {
        "workbench.kind": "trial",
        "workbench.study": told.study,
        "workbench.trial": str(trial.number),
        "workbench.arm": arm or "sampled",
        "mlflow.note.content": describe(config, arm),
    }
    name = trial.user_attrs.get("name", f"trial-{trial.number}")
    tracker = tracking.Tracker(
        client, name, params=config.flat(), tags=tags, datasets=datasets(prepare(config)), parent=told.parent
    )
    trial.set_user_attr("run_id", tracker.run_id)

    def on_step(step: int, news: Mapping[str, float]) -> None:
        events.put(("step", step))
        if sweep.prune.metric in news:
            trial.report(news[sweep.prune.metric], step)
            if trial.should_prune():
                reason = (
                    f"{sweep.prune.metric} = {news[sweep.prune.metric]:.4g} above {sweep.prune.above} at step {step}"
                )
                trial.set_user_attr("reason", reason)
                raise TrialPruned(reason)

    try:
        final = execute(config, tracker, on_step=on_step)
        if sweep.objective not in final:
            raise UserError(f"sweep.objective = {sweep.objective!r}: runs do not log it (they log {', '.join(final)})")
    except TrialPruned as stop:
        tracker.close("pruned", str(stop))
        raise
    except KeyboardInterrupt:
        trial.set_user_attr("interrupted", True)
        tracker.close("interrupted")
        raise
    except BaseException as error:
        trial.set_user_attr("failed", str(error)[:1000])
        tracker.close("failed", str(error))
        raise
    for metric in SHOWN:
        if metric in final:
            trial.set_user_attr(metric, final[metric])
    tracker.close("complete")
    return final[sweep.objective]


def run_study(settings: dict[str, Any], name: str, workers: int) -> Study:
    """Open or resume a study and run what is missing of it, in worker processes, with a progress bar.

    Args:
        settings: the experiment's dotted settings, its sweep included.
    Returns:
        The study, with its MLflow run ended.
    Raises:
        KeyboardInterrupt: stopped by the user; finished trials are kept and the rest can be resumed.
        Failure: a worker could not go on.
    """
    from workbench.run import prepare

    config, url = resolve(settings), storage_url()
    client = tracking.connect()
    study = open_study(config, settings, name, url)
    parent = tracking.open_study(client, name, f"Study **{name}**, running.")
    missing = max(0, config.sweep.trials - sum(map(counts, study.get_trials(deepcopy=False))))
    state, problem = "complete", ""
    started = time.monotonic()
    try:
        if missing:
            tqdm.write(
                "Preparing: encoding the pairs, drawing the pretrained model's samples (kept for later runs) ..."
            )
            prepare(config)
            problem = _supervise(settings, config, study, parent, url, min(workers, missing), missing)
    except KeyboardInterrupt:
        state = "interrupted"
        raise
    finally:
        if problem:
            state = "failed"
        tracking.finish_study(client, parent, summary_metrics(study), summary(study, config), state)
    if problem:
        raise Failure(problem)
    tqdm.write(
        f"\n{summary(study, config)}\n\n{missing} trials in {time.monotonic() - started:.0f} s, {workers} workers."
    )
    return study


def _supervise(
    settings: dict[str, Any], config: Config, study: Study, parent: str, url: str, workers: int, missing: int
) -> str:
    """Start the workers and show what they do, until they are done; returns what went wrong, or nothing."""
    context = multiprocessing.get_context("spawn")
    tokens, events = context.Semaphore(missing), context.Queue()
    processes = [
        context.Process(target=work, args=(Worker(settings, study.study_name, url, parent, i), tokens, events))
        for i in range(workers)
    ]
    before = {t.number for t in study.get_trials(deepcopy=False) if t.state.is_finished()}
    problem, done = "", 0
    bar = tqdm(total=missing * config.train.steps, desc="sweep", unit="step", smoothing=0.05)
    try:
        for process in processes:
            process.start()
        while any(p.is_alive() for p in processes) or not events.empty():
            try:
                kind, value = events.get(timeout=0.5)
            except queue.Empty:
                continue
            if kind == "step":
                bar.update(1)
            elif kind == "error":
                problem = value
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
    crashed = [p.exitcode for p in processes if p.exitcode]
    if crashed and not problem:
        problem = f"a worker died (exit code {crashed[0]}); run the same command again to go on"
    return problem


# --- what a study came to ------------------------------------------------------------------------------------


def _label(trial: FrozenTrial) -> str:
    return trial.user_attrs.get("name") or " ".join(f"{k.split('.')[-1]}={_short(v)}" for k, v in trial.params.items())


def _short(value: Any) -> str:
    return f"{value:.3g}" if isinstance(value, float) else str(value)


def _state(trial: FrozenTrial) -> str:
    return "interrupted" if trial.user_attrs.get("interrupted") else trial.state.name.lower()


def line_of(trial: FrozenTrial) -> str:
    """One line for a finished trial."""
    value = "" if trial.value is None or trial.state != TrialState.COMPLETE else f"{trial.value:.4f}"
    seconds = trial.duration.total_seconds() if trial.duration else 0.0
    why = trial.user_attrs.get("failed") or trial.user_attrs.get("reason") or ""
    return (
        f"trial {trial.number:3d}  {_state(trial):11s} {value:>8s}  {seconds:5.0f} s  {_label(trial)}  {why}".rstrip()
    )


def summary(study: Study, config: Config) -> str:
    """The closing table, in Markdown: best first."""
    sign = -1 if config.sweep.direction == "maximize" else 1
    trials = [t for t in study.get_trials(deepcopy=False) if t.state.is_finished()]
    trials.sort(key=lambda t: (t.state != TrialState.COMPLETE, sign * (t.value or 0.0)))
    head = [config.sweep.objective, "95 % interval", "eval/reward", "divergence/policy", "divergence/reference"]
    lines = ["| trial | " + " | ".join([*head, "state", "settings"]) + " |", "| --- " * (len(head) + 3) + "|"]
    for t in trials:
        a = t.user_attrs
        span = f"{a['eval/win_rate_low']:.3f} to {a['eval/win_rate_high']:.3f}" if "eval/win_rate_low" in a else ""
        value = f"{t.value:.4f}" if t.state == TrialState.COMPLETE else ""
        rest = [f"{a[k]:.4f}" if k in a else "" for k in ("eval/reward", "divergence/policy", "divergence/reference")]
        lines.append("| " + " | ".join([str(t.number), value, span, *rest, _state(t), _label(t)]) + " |")
    if config.sweep.objective != "eval/win_rate":
        lines.append("\nThe interval is eval/win_rate's.")
    return "\n".join(lines)


def summary_metrics(study: Study) -> dict[str, float]:
    """Counts by state, and the best value where there is one."""
    trials = study.get_trials(deepcopy=False)
    states = [_state(t) for t in trials if t.state.is_finished()]
    metrics = {f"study/{state}": float(states.count(state)) for state in set(states)}
    complete = [t for t in trials if t.state == TrialState.COMPLETE]
    return metrics | ({"study/best_value": study.best_value} if complete else {})
