"""Whole sweeps and runs: how workers share a sweep, what pruning saves, how soon a method is as good as another.

Sweeps that were finished by an earlier call are not run again, but for those that are timed.
"""

import shutil
from collections.abc import Iterator
from functools import partial
from pathlib import Path

import optuna
import polars as pl
from optuna.trial import FrozenTrial, TrialState

from workbench import tracking
from workbench.benchmarks import commands
from workbench.benchmarks.figure import Figure, Options, figure
from workbench.benchmarks.timing import seconds
from workbench.common.cache import digest
from workbench.studies.trials import counts

WHOLE = "sweep.pruner=NopPruner"
TRIALS = "sweep.trials=4"


def workers(options: Options) -> Iterator[Figure]:
    """The arms of the default sweep by one worker and by two: whole commands, start and end included."""
    ratios, alone = [], []
    for _ in range(max(1, options.sweeps // 2)):
        took = []
        for number in (1, 2):
            folder = options.place / "workers"
            shutil.rmtree(folder, ignore_errors=True)
            run = partial(commands.sweep, folder, f"{number}-workers", "default.toml", number, TRIALS)
            took.append(seconds(run))
        ratios.append(took[0] / took[1])
        alone.append(took[0])
    yield figure("workers", "default sweep, its four arms: throughput of 2 workers over 1", ratios, 1.85, at_least=True)
    yield figure("workers", "default sweep, its four arms, by 1 worker", alone, None, unit="s")


def pruning(options: Options) -> Iterator[Figure]:
    """The default sweep as it is and with nothing pruned, the same seeds: steps taken, best value found."""
    folder = options.place / f"pruning-{_state_of('default.toml')}"
    saved, better = [], []
    for seed in range(options.sweeps):
        steps, best = [], []
        for name, more in (("whole", [WHOLE]), ("pruned", [])):
            study = f"{name}-{seed}"
            commands.sweep(folder, study, "default.toml", 2, f"seed={seed}", f"sweep.seed={seed}", *more)
            trials = [t for t in _study(folder, study).get_trials() if counts(t)]
            steps.append(sum(map(steps_of, trials)))
            best.append(max(t.value for t in trials if t.state == TrialState.COMPLETE and t.value is not None))
        saved.append(100 * (1 - steps[1] / steps[0]))
        better.append(best[1] - best[0])
    note = "seeds 0 to " + str(options.sweeps - 1)
    yield figure("pruning", "pruning: steps saved of the default sweep", saved, 35, unit="%", at_least=True, note=note)
    yield figure(
        "pruning", "pruning: best win rate, with it minus without", better, 0, unit="", at_least=True, note=note
    )


def quality(options: Options) -> Iterator[Figure]:
    """Steps, and seconds, until the true reward is what frozen Diffusion-DPO ends with (experiments/quality.toml).

    The control asks when frozen Diffusion-DPO itself is there first: a curve of few images is not smooth.
    """
    folder = options.place / f"quality-{_state_of('quality.toml')}"
    commands.sweep(folder, "quality", "quality.toml", 2, f"sweep.seeds={list(range(options.sweeps))}")
    with commands.workplace(folder, **commands.places(folder)):
        runs = tracking.load_runs("quality")
        curves = tracking.load_history(runs).join(runs.select("run_id", pl.col("seed").alias("of_seed")), on="run_id")
    curves = curves.select("arm", "of_seed", "step", "samples/reward").drop_nulls().sort("step")
    at_the_end = dict(curves.filter(arm="frozen").group_by("of_seed").agg(pl.col("samples/reward").last()).iter_rows())
    for arm, name, goal in (
        ("threshold", "time to quality: updates with threshold / frozen, steps", 0.5),
        ("ours", "time to quality: the whole method / frozen, steps", None),
        ("frozen", "control: frozen to its own final reward, steps", None),
    ):
        shares = [time_to(curves.filter(arm=arm, of_seed=seed), at_the_end[seed]) for seed in sorted(at_the_end)]
        never = sum(share > 1 for share in shares)
        note = f"{never} of {len(shares)} seeds never got there and count as {NEVER}" if never else ""
        yield figure("quality", name, shares, goal, note=note)


#: What a run counts that does not get there in all its steps.
NEVER = 2.0


def time_to(curve: pl.DataFrame, reward: float) -> float:
    """The share of a run's steps after which its reward is at least that much for the first time.

    Args:
        curve: of one run, sorted: step, samples/reward.
    """
    there = curve.filter(pl.col("samples/reward") >= reward)["step"]
    return there[0] / curve["step"][-1] if len(there) else NEVER


def steps_of(trial: FrozenTrial) -> int:
    """Optimizer steps that a finished trial took."""
    return int(trial.user_attrs["progress"]["step"])


def _study(folder: Path, name: str) -> optuna.Study:
    return optuna.load_study(study_name=name, storage=commands.places(folder)["WORKBENCH_STORAGE"])


def _state_of(file: str) -> str:
    """Short name of an experiment file's contents: another file is another study."""
    return digest((commands.EXPERIMENTS / file).read_text())[:8]
