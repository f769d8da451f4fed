"""Trials of a study: which count, which are tried again, and what they came to."""

import platform
from typing import Any

import psutil
from optuna import Study
from optuna.trial import FrozenTrial, TrialState

from workbench.config import Config
from workbench.markdown import markdown_table


def counts(trial: FrozenTrial) -> bool:
    """Whether a trial is one of those asked for: it came to an end of its own."""
    ended = trial.state in (TrialState.COMPLETE, TrialState.PRUNED)
    return ended or (trial.state == TrialState.FAIL and "failed" in trial.user_attrs)


def requeue(study: Study, trial: FrozenTrial) -> None:
    """Queue a trial again that ended through no fault of its settings, once."""
    if any(t.user_attrs.get("retry_of") == trial.number for t in study.get_trials(deepcopy=False)):
        return
    kept = {key: value for key, value in trial.user_attrs.items() if key in ("arm", "name", "overrides")}
    study.enqueue_trial(
        {**trial.system_attrs.get("fixed_params", {}), **trial.params}, user_attrs=kept | {"retry_of": trial.number}
    )


def died(trial: FrozenTrial) -> bool:
    """Whether a trial that counts as running belonged to a process of this machine that is gone."""
    host, _, pid = str(trial.user_attrs.get("process", "")).rpartition(":")
    return trial.state == TrialState.RUNNING and host == platform.node() and not psutil.pid_exists(int(pid))


def _label(trial: FrozenTrial) -> str:
    return trial.user_attrs.get("name") or " ".join(f"{k.split('.')[-1]}={_short(v)}" for k, v in trial.params.items())


def _short(value: Any) -> str:
    return f"{value:.3g}" if isinstance(value, float) else str(value)


def _state(trial: FrozenTrial) -> str:
    return "interrupted" if trial.state == TrialState.FAIL and not counts(trial) else trial.state.name.lower()


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
    rows = []
    for t in trials:
        a = t.user_attrs
        span = f"{a['eval/win_rate_low']:.3f} to {a['eval/win_rate_high']:.3f}" if "eval/win_rate_low" in a else ""
        value = f"{t.value:.4f}" if t.state == TrialState.COMPLETE else ""
        rest = [f"{a[k]:.4f}" if k in a else "" for k in ("eval/reward", "divergence/policy", "divergence/reference")]
        rows.append((t.number, value, span, *rest, _state(t), _label(t)))
    table = markdown_table(("trial", *head, "state", "settings"), rows)
    return table if config.sweep.objective == "eval/win_rate" else f"{table}\n\nThe interval is eval/win_rate's."


def summary_metrics(study: Study) -> dict[str, float]:
    """Counts by state, and the best value where there is one."""
    trials = study.get_trials(deepcopy=False)
    states = [_state(t) for t in trials if t.state.is_finished()]
    metrics = {f"study/{state}": float(states.count(state)) for state in set(states)}
    complete = [t for t in trials if t.state == TrialState.COMPLETE]
    return metrics | ({"study/best_value": study.best_value} if complete else {})
