"""What must hold after whatever has happened: checks of what Optuna, MLflow and the disk hold of a study.

The checks are pure; `held` collects what they look at.
"""

import re
import signal
import tempfile
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence, Set
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple

import optuna
import polars as pl
from optuna.trial import FrozenTrial, TrialState

from tests.faults.material import Result, digests
from workbench import tracking
from workbench.studies.trials import counts, state_of
from workbench.tracking import study_runs
from workbench.tracking.store import STATUS
from workbench.tracking.study_runs import children

#: Metrics that are compared value by value: one of every step, of some steps, of the last.
COMPARED = ("train/loss", "divergence/policy", "eval/win_rate")
FILES = {"history.parquet", "samples.json", "samples.png", "pretrained.png", "model", "images"}
KINDS = ("lost", "doubled", "mismatched", "left over", "wrong bits", "traceback", "wrong end")
BROKEN = re.compile(r"Traceback \(most recent|Fatal Python error|Segmentation fault|Exception ignored in", re.MULTILINE)


class Found(NamedTuple):
    """Something that must not be."""

    kind: str
    text: str


@dataclass
class Run:
    """A trial's run as MLflow has it.

    Attributes:
        number: its trial's.
        metrics: by name, every (step, value) that was logged.
        files: names of its artifacts; the rest is looked at in complete runs alone.
    """

    run_id: str
    number: int
    status: str
    state: str
    metrics: dict[str, list[tuple[int, float]]] = field(default_factory=dict)
    files: Set[str] = frozenset()
    history: pl.DataFrame | None = None
    weights: Mapping[str, str] = field(default_factory=dict)


@dataclass
class Held:
    """What Optuna, MLflow and the disk hold of a study that has come to its end."""

    trials: Sequence[FrozenTrial]
    runs: Sequence[Run]
    parent: str
    files: Sequence[Path] = ()


class Ended(NamedTuple):
    """How a command ended: its exit code, the signals that it was sent, what it and its workers said."""

    name: str
    code: int
    sent: Set[int]
    said: str


def violations(held: Held, asked: int, arms: Sequence[str], expected: Mapping[int, Result], steps: int) -> list[Found]:
    """All that does not hold.

    Args:
        asked: trials of the study.
        arms: the names of those that it declares.
        expected: what trials come to when nobody disturbs them, by number; those that are not in it are not compared.
        steps: of a trial.
    """
    runs = {run.number: run for run in held.runs}
    return [
        *_counted(held.trials, asked, arms),
        *_chains(held.trials),
        *_alike(held.trials, held.runs, held.parent),
        *(found for trial in held.trials for found in _told(trial, runs.get(trial.number), steps)),
        *(found for trial in held.trials for found in _bits(trial, runs.get(trial.number), expected)),
        *(Found("left over", str(path)) for path in held.files),
    ]


def _counted(trials: Sequence[FrozenTrial], asked: int, arms: Sequence[str]) -> Iterator[Found]:
    """As many as were asked for, each arm once; nothing here gives a trial reason to fail."""
    complete = [trial for trial in trials if trial.state == TrialState.COMPLETE]
    if len(complete) < asked:
        yield Found("lost", f"{asked} trials were asked for, {len(complete)} are complete")
    if sum(map(counts, trials)) > asked:
        yield Found("doubled", f"{asked} trials were asked for, {sum(map(counts, trials))} count")
    times = Counter(trial.user_attrs.get("arm") for trial in trials if counts(trial))
    for arm in arms:
        if times[arm] != 1:
            yield Found("doubled" if times[arm] else "lost", f"arm {arm} is there {times[arm]} times")
    for trial in trials:
        if not trial.state.is_finished():
            yield Found("lost", f"trial {trial.number} is {trial.state.name}")


def _chains(trials: Sequence[FrozenTrial]) -> Iterator[Found]:
    """Whatever did not come to an end of its own was tried again, once; what did was not."""
    times = Counter(trial.user_attrs["retry_of"] for trial in trials if "retry_of" in trial.user_attrs)
    for trial in trials:
        if not counts(trial) and not times[trial.number]:
            yield Found("lost", f"trial {trial.number} was not tried again")
        if times[trial.number] > (0 if counts(trial) else 1):
            yield Found(
                "doubled", f"trial {trial.number} ({state_of(trial)}) was tried again {times[trial.number]} times"
            )


def _alike(trials: Sequence[FrozenTrial], runs: Sequence[Run], parent: str) -> Iterator[Found]:
    """Optuna and MLflow say the same."""
    if parent != "FINISHED":
        yield Found("mismatched", f"the study's run is {parent}")
    states = {trial.number: state_of(trial) for trial in trials}
    for number, times in Counter(run.number for run in runs).items():
        if times > 1:
            yield Found("doubled", f"trial {number} has {times} runs")
    for run in runs:
        state = states.get(run.number, "not there")
        if (run.status, run.state) != (STATUS.get(state, "KILLED"), state):
            yield Found("mismatched", f"trial {run.number} is {state}, its run {run.status} and {run.state!r}")
    ids = {run.run_id: run.number for run in runs}
    for trial in trials:
        told = trial.user_attrs.get("run_id")
        if told is not None and ids.get(told) != trial.number:
            yield Found("lost", f"trial {trial.number} has no run {told}")
        if told is None and trial.state == TrialState.COMPLETE:
            yield Found("lost", f"trial {trial.number} is complete without a run")


def _told(trial: FrozenTrial, run: Run | None, steps: int) -> Iterator[Found]:
    """Nothing was told twice; of a trial that is complete all is there, and its history says the same."""
    if run is None:
        return
    for name, values in run.metrics.items():
        if len({step for step, _ in values}) < len(values):
            yield Found("doubled", f"{name} of trial {trial.number} was logged twice at a step")
    if trial.state != TrialState.COMPLETE:
        return
    if FILES - run.files:
        yield Found("lost", f"trial {trial.number} lacks {', '.join(sorted(FILES - run.files))}")
    if run.history is None:
        return
    if run.history["step"].to_list() not in ([*range(steps + 1)], [*range(1, steps + 1)]):
        yield Found("lost", f"the history of trial {trial.number} has not each step once")
    for name, values in run.metrics.items():
        rows = run.history.select("step", name).drop_nulls().rows() if name in run.history.columns else []
        if sorted(values) != rows:
            yield Found("mismatched", f"{name} of trial {trial.number}: MLflow and the history differ")


def _bits(trial: FrozenTrial, run: Run | None, expected: Mapping[int, Result]) -> Iterator[Found]:
    """A trial came to what it comes to undisturbed."""
    if run is None or trial.number not in expected or trial.state != TrialState.COMPLETE:
        return
    result, which = expected[trial.number], f"trial {trial.number}, {trial.user_attrs.get('arm', 'sampled')}"
    if run.history is None or not run.history.equals(result.history):
        yield Found("wrong bits", f"history of {which}")
    if dict(run.weights) != result.weights:
        yield Found("wrong bits", f"weights of {which}")


def improper(ended: Ended) -> list[Found]:
    """What a command may not do: print a traceback, or end otherwise than it was made to.

    One that was killed is forgiven what its workers say, since Python's own start of a process may be cut short.
    """
    found, last = [], ended.said.strip().splitlines()[-1:]
    if BROKEN.search(ended.said) and signal.SIGKILL not in ended.sent:
        found.append(Found("traceback", ended.name))
    asked = ended.sent & {signal.SIGINT, signal.SIGTERM, signal.SIGHUP}
    # -SIGINT, which shells show as 130 too: where the interrupt fell into source that a library runs by `exec` (named
    # tuples, data classes), `python -m` ends so even if the interrupt was caught and the command asked for 130.
    told = bool(asked) and "Interrupted." in ended.said
    proper = {
        0: True,
        1: "Error: " in ended.said,
        130: bool(asked),
        -signal.SIGINT: told or signal.SIGINT in ended.sent,
    }
    if not proper.get(ended.code, -ended.code in ended.sent):
        found.append(Found("wrong end", f"{ended.name}: exit code {ended.code}, {' '.join(last)}"))
    return found


def held(url: str, study: str, state: Path, cache: Path) -> Held:
    """Look into the stores; MLflow's is the one that this process tracks to."""
    client = tracking.connect()
    trials = optuna.load_study(study_name=study, storage=url).get_trials()
    complete = {trial.number for trial in trials if trial.state == TrialState.COMPLETE}
    parent, runs = study_runs.require_study(client, study), []
    for run in children(client, parent):
        info, tags = run.info, run.data.tags
        found = Run(info.run_id, int(tags["workbench.trial"]), info.status, tags.get("workbench.state", ""))
        for name in COMPARED:
            found.metrics[name] = [(m.step, m.value) for m in client.get_metric_history(info.run_id, name)]
        if found.number in complete:
            found.files = {file.path for file in client.list_artifacts(info.run_id)}
            with tempfile.TemporaryDirectory() as folder:
                if "history.parquet" in found.files:
                    found.history = pl.read_parquet(client.download_artifacts(info.run_id, "history.parquet", folder))
                if "model" in found.files:
                    found.weights = digests(Path(client.download_artifacts(info.run_id, "model", folder)))
        runs.append(found)
    files = [path for path in state.rglob("*") if path.is_file() and path.name != "lock" and path.suffix != ".lock"]
    partials = [*cache.rglob("*.partial"), *(path for path in state.rglob("*.partial") if path.is_dir())]
    return Held(trials, runs, parent.info.status, [*files, *partials])
