"""What a study of very many trials costs beside the training itself."""

import json
import os
import time
from collections.abc import Sequence
from pathlib import Path
from statistics import median
from tempfile import TemporaryDirectory
from typing import Any

from workbench.benchmarks.sandbox import EXPERIMENTS, databases, run_command
from workbench.common.markdown import markdown_table, three_digits
from workbench.common.outputs import output_file, require_own
from workbench.common.processes import cores
from workbench.studies.synthetic import TrialTimes, trial_times

EXPERIMENT = EXPERIMENTS / "scale.toml"
SCORE = "validation/margin"  # what the report shows, as nothing is drawn
WINDOW = 20  # trials whose starts are compared, from the 5th on and at the end


def measure_scale(trials: int, alone: int, workers: int, out: Path) -> str:
    """Run a study of many trials by many workers and one by one worker; write scale.md and scale.json.

    Args:
        trials: of the large study.
        alone: trials of the one worker.
        out: folder of what is written.
    Returns:
        The table, in Markdown.
    """
    measured: dict[str, Any] = {"trials": trials, "workers": workers, "cores": cores()}
    out.mkdir(parents=True, exist_ok=True)
    require_own(out, "scale.md", "scale.json")
    with TemporaryDirectory() as name:
        folder = Path(name)
        # Databases that the person names come before those of the folder, so that a server can be measured.
        environment = databases(folder) | {k: v for k, v in os.environ.items() if k in databases(folder)}
        few = _run(folder, environment, "one-worker", alone, 1)
        many = _run(folder, environment, "many", trials, workers)
        # Sizes before the report, which adds artifacts of its own to the study.
        measured |= compare(few, many, workers) | _sizes(folder, trials)
        _write(out, measured)  # before the report, which may fail after an hour of measuring
        begin = time.monotonic()
        report = ("--study", "many", "--notebook", "tradeoff", "-p", f"score={SCORE}")
        run_command("workbench.report", *report, folder=folder, environment=environment)
        measured["report_seconds"] = time.monotonic() - begin
    _write(out, measured)
    table = markdown_table(("measured", "value"), [(k.replace("_", " "), three_digits(v)) for k, v in measured.items()])
    with output_file(out / "scale.md") as path:
        path.write_text(table + "\n", encoding="utf-8")
    return table


def _write(out: Path, measured: dict[str, Any]) -> None:
    with output_file(out / "scale.json") as path:
        path.write_text(json.dumps(measured, indent=2) + "\n", encoding="utf-8")


def _run(folder: Path, environment: dict[str, str], study: str, trials: int, workers: int) -> list[TrialTimes]:
    """Run a study in a folder; its trials in the order in which they began."""
    options = ("--study", study, "--trials", str(trials), "--workers", str(workers))
    run_command("workbench.sweep", str(EXPERIMENT), *options, folder=folder, environment=environment)
    return [trial for trial in trial_times(study, environment["WORKBENCH_STORAGE"]) if trial.began and trial.ended]


def compare(few: Sequence[TrialTimes], many: Sequence[TrialTimes], workers: int) -> dict[str, float]:
    """Trials a minute once all workers are there, and the time between two trials of a worker, early and late."""
    pauses, durations = _pauses(many), [_seconds(trial.began, trial.ended) for trial in many]
    alone, together = _rate(few, 1), _rate(many, workers)
    return {
        "trials_a_minute_of_one_worker": alone,
        "trials_a_minute": together,
        "speedup": together / alone,
        "seconds_between_trials_from_the_5th": median(pauses[5 : 5 + WINDOW]),
        "seconds_between_trials_at_the_end": median(pauses[-WINDOW:]),
        "seconds_a_trial_from_the_5th": median(durations[5 : 5 + WINDOW]),
        "seconds_a_trial_at_the_end": median(durations[-WINDOW:]),
    }


def _seconds(begin: Any, end: Any) -> float:
    return (end - begin).total_seconds()


def _rate(trials: Sequence[TrialTimes], workers: int) -> float:
    """Trials a minute between the end of each worker's first trial and its last; processes start before that."""
    steady = sorted(trial.ended for trial in trials if trial.ended)[workers:-workers]
    return 60 * (len(steady) - 1) / _seconds(steady[0], steady[-1])


def _pauses(trials: Sequence[TrialTimes]) -> list[float]:
    """Seconds from the end of a worker's trial to the beginning of its next, in the order of beginnings."""
    ended: dict[str | None, Any] = {}
    pauses = []
    for trial in trials:
        if trial.process in ended:
            pauses.append(_seconds(ended[trial.process], trial.began))
        ended[trial.process] = trial.ended
    return pauses


def _sizes(folder: Path, trials: int) -> dict[str, float]:
    """Kilobytes a trial of each database and of the artifacts, as far as they lie on this machine."""
    sizes = {}
    for name in ("optuna.db", "mlflow.db", "mlruns"):
        paths = [folder / name, *(folder / name).rglob("*")]
        size = sum(path.stat().st_size for path in paths if path.is_file())
        if size:
            sizes[f"{name}_kilobytes_a_trial"] = size / 1e3 / trials
    return sizes
