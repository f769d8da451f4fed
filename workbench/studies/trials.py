"""Trials of a study: which count, in which state they are, and what they measured."""

import math
from typing import TYPE_CHECKING

from optuna import Study
from optuna.trial import FrozenTrial, TrialState

from workbench.common.markdown import markdown_table, three_digits
from workbench.studies.records import TrialRecord
from workbench.training.sections import Sweep

if TYPE_CHECKING:
    # Not at run time: it imports torch, and `study status` shall be there at once.
    from workbench.training.config import Config

#: Metrics that the closing table shows beside objectives and constrained metrics.
SHOWN = ("eval/reward", "divergence/policy", "divergence/reference")
INTERVAL = ("eval/win_rate_low", "eval/win_rate_high")  #: ends of the win rate's interval
BEYOND = "beyond a constraint"
#: Attempts in a row that may end with their worker, without a snapshot in between, before the trial counts as failed.
MOST_CRASHES = 5

STATES = {
    TrialState.COMPLETE: "complete",
    TrialState.PRUNED: "pruned",
    TrialState.FAIL: "failed",
    TrialState.RUNNING: "running",
    TrialState.WAITING: "waiting",
}


def crashes(trial: FrozenTrial) -> int:
    """How many attempts in a row, this failed one included, ended without a snapshot or an orderly stop."""
    record = TrialRecord.of(trial)
    # A snapshot is progress, and an orderly stop is not the trial's fault: both begin the count anew.
    return 0 if record.snapshot is not None or record.interrupted else record.crashes + 1


def counts(trial: FrozenTrial) -> bool:
    """Whether a trial is one of those that the study is to have: it ended, and is not tried again."""
    if trial.state in (TrialState.COMPLETE, TrialState.PRUNED):
        return True
    record = TrialRecord.of(trial)
    if trial.state != TrialState.FAIL or record.forgotten:
        return False
    return bool(record.failed) or crashes(trial) >= MOST_CRASHES


def state_of(trial: FrozenTrial) -> str:
    """A trial's state, in the words that runs have: a failed trial that is tried again is "interrupted"."""
    if TrialRecord.of(trial).forgotten:
        return "forgotten"
    return "interrupted" if trial.state == TrialState.FAIL and not counts(trial) else STATES[trial.state]


def label_of(trial: FrozenTrial) -> str:
    """What a trial is called in tables: its arm, or the values that the sampler chose."""
    chosen = " ".join(f"{name.split('.')[-1]}={three_digits(value)}" for name, value in trial.params.items())
    return TrialRecord.of(trial).name or chosen


def feasible(trial: FrozenTrial) -> bool:
    """Whether a trial is complete and within every constraint of its study."""
    return trial.state == TrialState.COMPLETE and all(excess <= 0 for excess in trial.constraints.values())


def measured(trial: FrozenTrial, sweep: Sweep) -> dict[str, float]:
    """Final metrics of a trial: those shown, those constrained and, if it is complete, the objectives."""
    # Of a constrained metric that is not among those shown, only the excess over its bound is stored.
    values = {metric: excess + sweep.constraints[metric] for metric, excess in trial.constraints.items()}
    values |= TrialRecord.of(trial).metrics
    if trial.state == TrialState.COMPLETE:
        values |= dict(zip(sweep.objectives, trial.values, strict=True))
    return {metric: value for metric, value in values.items() if math.isfinite(value)}


def line_of(trial: FrozenTrial) -> str:
    """One line about a finished trial."""
    values = " ".join(f"{value:.4f}" for value in trial.values) if trial.state == TrialState.COMPLETE else ""
    seconds = trial.duration.total_seconds() if trial.duration else 0.0
    record = TrialRecord.of(trial)
    why = record.failed or record.pruned
    if record.copied_from is not None:
        why = f"as trial {record.copied_from}, which has these settings"
    if trial.state == TrialState.COMPLETE and not feasible(trial):
        why = BEYOND
    head = f"trial {trial.number:3d}  {state_of(trial):11s} {values:>8s}  {seconds:5.0f} s"
    return f"{head}  {label_of(trial)}  {why}".rstrip()


def summary(study: Study, config: "Config") -> str:
    """The closing table, in Markdown: the best trial or the front first, trials beyond a constraint after the rest."""
    sweep, front = config.sweep, {trial.number for trial in study.best_trials}
    first, direction = next(iter(sweep.objectives.items()))
    shown = [*dict.fromkeys([*sweep.objectives, *sweep.constraints, *SHOWN])]
    intervals = "eval/win_rate" in sweep.objectives
    rows = []
    for trial in study.get_trials(deepcopy=False):
        if not trial.state.is_finished() or TrialRecord.of(trial).forgotten:
            continue
        complete, values = trial.state == TrialState.COMPLETE, measured(trial, sweep)
        cells = [f"{values[metric]:.4f}" if metric in values else "" for metric in shown]
        if intervals:
            low, high = (TrialRecord.of(trial).metrics.get(name) for name in INTERVAL)
            cells.insert(len(sweep.objectives), "" if low is None else f"{low:.3f} to {high:.3f}")
        mark = f", {BEYOND}" if complete and not feasible(trial) else ""
        if len(sweep.objectives) > 1 and trial.number in front:
            mark = ", on the front"
        value = values.get(first, 0.0) * (-1 if direction == "maximize" else 1)
        # False sorts before True: complete trials, within the constraints, on the front come first; then by value.
        rank = (not complete, not feasible(trial), trial.number not in front, value)
        rows.append((rank, (trial.number, *cells, state_of(trial) + mark, label_of(trial))))
    rows.sort(key=lambda row: row[0])
    if intervals:
        shown.insert(len(sweep.objectives), "95 % interval")
    return markdown_table(("trial", *shown, "state", "settings"), [row for _, row in rows])


def summary_metrics(study: Study) -> dict[str, float]:
    """Metrics of the study's run: trials by state and within constraints, the best value or the size of the front."""
    trials, best = study.get_trials(deepcopy=False), study.best_trials
    states = [state_of(t) for t in trials if t.state.is_finished() and not TrialRecord.of(t).forgotten]
    metrics = {f"study/{state}": float(states.count(state)) for state in set(states)}
    if any(t.constraints for t in trials):
        metrics["study/feasible"] = float(sum(map(feasible, trials)))
    if len(study.directions) > 1:
        metrics["study/front"] = float(len(best))
    elif best:
        metrics["study/best_value"] = best[0].values[0]
    return metrics
