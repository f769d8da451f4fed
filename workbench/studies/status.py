"""How a study stands: its trials by state, the best of them, who works on it, and how long it may take."""

import time
from collections.abc import Mapping
from itertools import zip_longest
from typing import Any

from optuna import Study
from optuna.trial import FrozenTrial

from workbench.common.markdown import markdown_table
from workbench.common.processes import is_gone, place_of
from workbench.studies.records import StudyRecord, TrialRecord
from workbench.studies.storage import grace
from workbench.studies.trials import INTERVAL, counts, label_of, state_of


def status_of(study: Study) -> dict[str, Any]:
    """The state of a study as plain values: its trials by state, the best, its workers, the seconds left."""
    objectives = StudyRecord.of(study).sweep.objectives
    # Not copied: nothing is changed here, and a study may have very many trials.
    trials, several = study.get_trials(deepcopy=False), len(study.directions) > 1
    states = [state_of(trial) for trial in trials]
    asked = StudyRecord.of(study).trials or len(trials)
    running = [_at_work(trial) for trial in trials if state_of(trial) == "running"]
    alive = [worker for worker in running if worker["alive"]]
    done = sum(map(counts, trials))
    seconds = [t.duration.total_seconds() for t in trials if state_of(t) == "complete" and t.duration]
    left = None
    if seconds and alive and done < asked:
        # Trials at work count by the share of their steps that is done.
        under_way = sum(worker["share"] for worker in alive)
        left = max(0.0, asked - done - under_way) * sum(seconds) / len(seconds) / len(alive)
    return {
        "study": study.study_name,
        "asked": asked,
        "done": done,
        "trials": {state: states.count(state) for state in sorted(set(states))},
        "objectives": [*objectives],
        "best": [_best(trial, objectives) for trial in study.best_trials[: None if several else 1]],
        "workers": running,
        "seconds_left": left,
    }


def _at_work(trial: FrozenTrial) -> dict[str, Any]:
    """Who runs a trial, and how far it is; `alive` is False where the process is gone or silent for too long."""
    record = TrialRecord.of(trial)
    process, progress = record.process or "", record.progress
    host, pid = place_of(process)
    # Of another machine's process nothing is known (None): there only the heartbeat tells.
    gone = is_gone(process) if process else True
    silent = progress is not None and time.time() - progress.time > max(120, 2 * grace())
    return {
        "trial": trial.number,
        "host": host,
        "pid": pid,
        "step": progress.step if progress else 0,
        "share": progress.step / progress.of if progress else 0.0,
        "seen_seconds_ago": round(time.time() - progress.time) if progress else None,
        "alive": not gone if gone is not None else not silent,
    }


def _best(trial: FrozenTrial, objectives: Mapping[str, str]) -> dict[str, Any]:
    """A trial's number, values and settings, with the interval of its win rate where that is an objective."""
    ends = [TrialRecord.of(trial).metrics.get(name) for name in INTERVAL] if "eval/win_rate" in objectives else []
    interval = None if None in ends or not ends else ends
    return {"trial": trial.number, "values": trial.values, "settings": label_of(trial), "win_rate_interval": interval}


def lost_studies(url: str, name: str | None = None) -> list[str]:
    """A line about each study whose runs are in the tracking store and whose trials are no longer in a study database.

    Args:
        url: of the study database, to which the studies belong.
        name: ask for the study of this very name only.
    Raises:
        Failure: the tracking store does not answer.
    """
    # Imported here: MLflow takes seconds, which a study that is there need not wait for.
    from workbench import tracking
    from workbench.studies.doctor import Doctor
    from workbench.tracking import delivery, store

    if store.missing():
        return []
    with delivery.require_reachable():
        # Whoever asks for a study is not helped by a line about another, be it that of its checks.
        found = [*Doctor(tracking.connect(), url, dry_run=True).lost_studies(name, with_checks=False)]
    aside = "sets the runs aside under another name, where reports find them"
    return [f"study {each.what}; `python -m workbench.study doctor` {aside}" for each in found]


def in_words(status: dict[str, Any]) -> str:
    """A study's status as text for a terminal.

    Args:
        status: of `status_of`.
    """
    counted = ", ".join(f"{count} {state}" for state, count in status["trials"].items()) or "none yet"
    alive = [worker for worker in status["workers"] if worker["alive"]]
    done = f"{status['done']} of {status['asked']} trials done"
    lines = [f"Study {status['study']}: {done} ({counted}), {_left(status)}."]
    for best in status["best"][:5]:
        named = zip_longest(status["objectives"], best["values"], fillvalue="")
        values = ", ".join(f"{name} {value:.4f}".strip() for name, value in named)
        if best["win_rate_interval"]:
            low, high = best["win_rate_interval"]
            values += f" (95 % interval over prompts: {low:.3f} to {high:.3f})"
        lines.append(f"Best: trial {best['trial']} ({best['settings']}): {values}")
    if status["workers"]:
        rows = [
            (w["trial"], w["host"], w["pid"], w["step"], w["seen_seconds_ago"], "yes" if w["alive"] else "no")
            for w in status["workers"]
        ]
        lines.append(markdown_table(("trial", "host", "process", "step", "seconds since a sign", "alive"), rows))
    if len(alive) < len(status["workers"]):
        lines.append(f"Some workers are gone: python -m workbench.study resume {status['study']}")
    return "\n".join(lines) + "\n"


def _left(status: dict[str, Any]) -> str:
    """How long a study may still take, in words, or that nobody works on it."""
    if status["done"] >= status["asked"]:
        return "complete"
    if status["seconds_left"] is None:
        alive = sum(worker["alive"] for worker in status["workers"])
        return f"{alive} workers alive, time left unknown" if alive else "nobody works on it"
    return f"about {max(1, round(status['seconds_left'] / 60))} min left"
