"""`python -m workbench.scale`: what a study of very many trials costs beside the training itself."""

import json
import os
import subprocess
import sys
import time
from pathlib import Path
from statistics import median
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Any

import click

from workbench.common.command_line import command, default_workers, one_process
from workbench.common.paths import PACKAGE, shipped

if TYPE_CHECKING:
    from optuna.trial import FrozenTrial

EXPERIMENT = shipped("experiments/scale.toml")
SCORE = "validation/margin"  # what the report shows, as nothing is drawn
WINDOW = 20  # trials whose starts are compared, from the 5th on and at the end


@click.option("--trials", type=click.IntRange(50), default=500, show_default=True, help="Of the large study.")
@click.option("--alone", type=click.IntRange(10), default=50, show_default=True, help="Trials of one worker alone.")
@click.option("--workers", type=click.IntRange(1), help="Of the large study. Default: the CPU's cores, at most 8.")
@click.option("--out", type=click.Path(path_type=Path), default=Path("reports/scale"), show_default=True)
def main(trials: int, alone: int, workers: int | None, out: Path) -> None:
    """Run many short trials by many workers, some by one, and say what they cost; writes OUT/scale.md and scale.json.

    Every trial is a real training of the small model of four steps, with snapshots, tracking and diagnostics
    (experiments/scale.toml). Databases are sqlite in a temporary folder, or what $WORKBENCH_STORAGE and
    $MLFLOW_TRACKING_URI name. 500 trials take some 15 minutes on two cores.
    """
    one_process()
    from workbench.common.markdown import markdown_table

    workers = workers or default_workers("auto")
    with TemporaryDirectory() as folder:
        place = Path(folder)
        few = _run(place, "one-worker", alone, 1)
        many = _run(place, "many", trials, workers)
        measured: dict[str, Any] = {"trials": trials, "workers": workers, "cores": len(os.sched_getaffinity(0))}
        measured |= _compared(few, many, workers) | _sizes(place, trials)
        _write(out, measured)
        begin = time.monotonic()
        _call(place, "workbench.report", "--study", "many", "--notebook", "divergence", "-p", f"score={SCORE}")
        measured["report_seconds"] = time.monotonic() - begin
    _write(out, measured)
    table = markdown_table(("measured", "value"), [(k.replace("_", " "), _plain(v)) for k, v in measured.items()])
    (out / "scale.md").write_text(table + "\n")
    click.echo(table)


def _write(out: Path, measured: dict[str, Any]) -> None:
    out.mkdir(parents=True, exist_ok=True)
    (out / "scale.json").write_text(json.dumps(measured, indent=2) + "\n")


def _call(place: Path, *arguments: str) -> None:
    environment = os.environ | {"PYTHONPATH": str(PACKAGE.parent)}
    subprocess.run([sys.executable, "-m", *arguments], cwd=place, env=environment, check=True)


def _run(place: Path, study: str, trials: int, workers: int) -> "list[FrozenTrial]":
    """The trials of a study that was run here, in the order in which they began."""
    import optuna

    asked = ("--study", study, "--trials", str(trials), "--workers", str(workers))
    _call(place, "workbench.sweep", str(EXPERIMENT), *asked)
    url = os.environ.get("WORKBENCH_STORAGE") or f"sqlite:///{place / 'optuna.db'}"
    found = optuna.load_study(study_name=study, storage=url).get_trials()
    ended = (trial for trial in found if trial.datetime_start and trial.datetime_complete)
    return sorted(ended, key=lambda trial: str(trial.datetime_start))


def _compared(few: "list[FrozenTrial]", many: "list[FrozenTrial]", workers: int) -> dict[str, Any]:
    """Trials a minute once all workers are there, and the time between two trials of a worker, early and late."""
    between = _between(many)
    early, late = between[5 : 5 + WINDOW], between[-WINDOW:]
    rates = [_rate(few, 1), _rate(many, workers)]
    return {
        "trials_a_minute_of_one_worker": rates[0],
        "trials_a_minute": rates[1],
        "speedup": rates[1] / rates[0],
        "seconds_between_trials_from_the_5th": median(early),
        "seconds_between_trials_at_the_end": median(late),
        "seconds_a_trial_from_the_5th": median(_durations(many)[5 : 5 + WINDOW]),
        "seconds_a_trial_at_the_end": median(_durations(many)[-WINDOW:]),
    }


def _rate(trials: "list[FrozenTrial]", workers: int) -> float:
    """Trials a minute from when the first worker's first trial has ended; processes start before that."""
    ends = sorted(trial.datetime_complete for trial in trials if trial.datetime_complete)
    steady = ends[workers:-workers]
    return 60 * (len(steady) - 1) / (steady[-1] - steady[0]).total_seconds()


def _between(trials: "list[FrozenTrial]") -> list[float]:
    """Seconds from the end of a worker's trial to the beginning of its next, in the order of beginnings."""
    ended: dict[str, Any] = {}
    found = []
    for trial in trials:
        worker = trial.user_attrs["process"]
        if worker in ended:
            found.append((trial.datetime_start - ended[worker]).total_seconds())
        ended[worker] = trial.datetime_complete
    return found


def _durations(trials: "list[FrozenTrial]") -> list[float]:
    return [trial.duration.total_seconds() for trial in trials if trial.duration]


def _sizes(place: Path, trials: int) -> dict[str, Any]:
    """Kilobytes a trial, of what lies on this machine."""
    found = {}
    for name in ("optuna.db", "mlflow.db", "mlruns"):
        paths = [place / name, *(place / name).rglob("*")]
        size = sum(path.stat().st_size for path in paths if path.is_file())
        if size:
            found[f"{name}_kilobytes_a_trial"] = size / 1e3 / trials
    return found


def _plain(value: Any) -> str:
    return f"{value:.3g}" if isinstance(value, float) else str(value)


main = command(main)

if __name__ == "__main__":
    main()
