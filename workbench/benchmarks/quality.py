"""How soon a method is as good as another at its end. Runs that an earlier call has finished are not run again."""

from collections.abc import Iterator

import polars as pl

from workbench import tracking
from workbench.benchmarks import sandbox
from workbench.benchmarks.figure import Figure, Options, figure

#: Share of its steps that a run counts which does not get there in all of them.
NEVER = 2.0


def quality(options: Options) -> Iterator[Figure]:
    """Steps until the true reward is what frozen Diffusion-DPO ends with (experiments/quality.toml).

    The control is when frozen Diffusion-DPO itself gets there first: a curve of few images is not smooth.
    """
    folder = options.folder / f"quality-{sandbox.experiment_digest('quality.toml')}"
    sandbox.sweep(folder, "quality", "quality.toml", 2, f"sweep.seeds={list(range(options.sweeps))}")
    with sandbox.sandbox(folder, **sandbox.databases(folder)):
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


def time_to(curve: pl.DataFrame, reward: float) -> float:
    """The share of a run's steps after which its reward is at least that much for the first time.

    Args:
        curve: of one run, sorted: step, samples/reward.
    """
    reached = curve.filter(pl.col("samples/reward") >= reward)["step"]
    return reached[0] / curve["step"][-1] if len(reached) else NEVER
