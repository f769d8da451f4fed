"""Trials of a study: which count, which are tried again, and what they came to."""

import math
from typing import Any

from optuna import Study
from optuna.trial import FrozenTrial, TrialState

from workbench.common.markdown import markdown_table
from workbench.training.config import Config
from workbench.training.sections import Sweep

#: Metrics that the closing table shows beside the objectives and what is constrained.
SHOWN = ("eval/reward", "divergence/policy", "divergence/reference")
SPAN = ("eval/win_rate_low", "eval/win_rate_high")  #: of the win rate's interval
BEYOND = "beyond a constraint"


#: So often a trial may take its worker with it, without a snapshot in between, before it counts as failed.
DEATHS = 5


def deaths(trial: FrozenTrial) -> int:
    """How often in a row attempts at a trial were cut short before they took a snapshot; it has ended so itself."""
    a = trial.user_attrs
    return 0 if "snapshot" in a or "handed_back" in a else int(a.get("deaths", 0)) + 1


def counts(trial: FrozenTrial) -> bool:
    """Whether a trial is one of those asked for: it came to an end of its own."""
    ended = trial.state in (TrialState.COMPLETE, TrialState.PRUNED)
    return ended or (trial.state == TrialState.FAIL and ("failed" in trial.user_attrs or deaths(trial) >= DEATHS))


def state_of(trial: FrozenTrial) -> str:
    """How a trial ended, in the words of runs: complete, pruned, failed, interrupted; otherwise Optuna's."""
    return "interrupted" if trial.state == TrialState.FAIL and not counts(trial) else ENDS[trial.state]


ENDS = {
    TrialState.COMPLETE: "complete",
    TrialState.PRUNED: "pruned",
    TrialState.FAIL: "failed",
    TrialState.RUNNING: "running",
    TrialState.WAITING: "waiting",
}


def label_of(trial: FrozenTrial) -> str:
    """What a trial is called: its arm, or what was sampled."""
    return trial.user_attrs.get("name") or " ".join(f"{k.split('.')[-1]}={_short(v)}" for k, v in trial.params.items())


def _short(value: Any) -> str:
    return f"{value:.3g}" if isinstance(value, float) else str(value)


def feasible(trial: FrozenTrial) -> bool:
    """Whether a trial came to its end within every constraint of its study."""
    return trial.state == TrialState.COMPLETE and all(excess <= 0 for excess in trial.constraints.values())


def measured(trial: FrozenTrial, sweep: Sweep) -> dict[str, float]:
    """What Optuna was told of a trial by metric: what is shown, what is constrained and, at its end, the objectives."""
    found = {metric: excess + sweep.constraints[metric] for metric, excess in trial.constraints.items()}
    found |= {key: value for key, value in trial.user_attrs.items() if "/" in key and isinstance(value, float)}
    if trial.state == TrialState.COMPLETE:
        found |= dict(zip(sweep.objectives, trial.values, strict=True))
    return {metric: value for metric, value in found.items() if math.isfinite(value)}


def line_of(trial: FrozenTrial) -> str:
    """One line for a finished trial."""
    values = " ".join(f"{value:.4f}" for value in trial.values) if trial.state == TrialState.COMPLETE else ""
    seconds = trial.duration.total_seconds() if trial.duration else 0.0
    why = trial.user_attrs.get("failed") or trial.user_attrs.get("reason") or ""
    if trial.state == TrialState.COMPLETE and not feasible(trial):
        why = BEYOND
    head = f"trial {trial.number:3d}  {state_of(trial):11s} {values:>8s}  {seconds:5.0f} s"
    return f"{head}  {label_of(trial)}  {why}".rstrip()


def summary(study: Study, config: Config) -> str:
    """The closing table, in Markdown: the best or the front first, what is beyond a constraint after the rest."""
    sweep, front = config.sweep, {trial.number for trial in study.best_trials}
    first, direction = next(iter(sweep.objectives.items()))
    shown = [*dict.fromkeys([*sweep.objectives, *sweep.constraints, *SHOWN])]
    spans = "eval/win_rate" in sweep.objectives
    rows = []
    for trial in study.get_trials(deepcopy=False):
        if not trial.state.is_finished():
            continue
        ended, found, a = trial.state == TrialState.COMPLETE, measured(trial, sweep), trial.user_attrs
        cells = [f"{found[metric]:.4f}" if metric in found else "" for metric in shown]
        if spans:
            low, high = map(a.get, SPAN)
            cells.insert(len(sweep.objectives), "" if low is None else f"{low:.3f} to {high:.3f}")
        mark = f", {BEYOND}" if ended and not feasible(trial) else ""
        if len(sweep.objectives) > 1 and trial.number in front:
            mark = ", on the front"
        value = found.get(first, 0.0) * (-1 if direction == "maximize" else 1)
        rank = (not ended, not feasible(trial), trial.number not in front, value)
        rows.append((rank, (trial.number, *cells, state_of(trial) + mark, label_of(trial))))
    rows.sort(key=lambda row: row[0])
    if spans:
        shown.insert(len(sweep.objectives), "95 % interval")
    return markdown_table(("trial", *shown, "state", "settings"), [row for _, row in rows])


def summary_metrics(study: Study) -> dict[str, float]:
    """Counts by state; the best value where there is one, the size of the front, how many are within constraints."""
    trials, best = study.get_trials(deepcopy=False), study.best_trials
    states = [state_of(t) for t in trials if t.state.is_finished()]
    metrics = {f"study/{state}": float(states.count(state)) for state in set(states)}
    if any(t.constraints for t in trials):
        metrics["study/feasible"] = float(sum(map(feasible, trials)))
    if len(study.directions) > 1:
        metrics["study/front"] = float(len(best))
    elif best:
        metrics["study/best_value"] = best[0].values[0]
    return metrics
