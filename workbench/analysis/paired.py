"""One arm against another: run by run with the same training seed, image by image with the same prompt and image seed.

Intervals are over training seeds, as in `tables`.
"""

import warnings
from typing import Any

import numpy as np
import polars as pl
from scipy.stats import DegenerateDataWarning, bootstrap

from workbench.analysis.intervals import ENOUGH
from workbench.analysis.tables import bucket_columns, names, of_arms, over_seeds, with_prompt_sets
from workbench.common.errors import UserError
from workbench.common.stats import wins


def won(runs: pl.DataFrame, samples: pl.DataFrame, ours: str, other: str, score: str = "reward") -> pl.DataFrame:
    """Each training seed's share of images on which one arm scores higher: same prompt and image seed, ties half.

    Args:
        ours: the arm whose wins are counted.
        other: another arm, or "pretrained" for the pretrained model.
        score: column of `samples`; the pretrained model's is `pretrained_` and the same.
    Returns:
        Columns seed, prompts (a style, or "all"), value; shares in 0..1.
    Raises:
        UserError: an arm is missing, or shares no training seed with ours.
    """
    both = _paired(runs, samples, ours, other, score)
    each = both.with_columns(won=wins(both[score].to_numpy(), both["theirs"].to_numpy()))
    return with_prompt_sets(each).group_by("seed", "prompts").agg(value=pl.col("won").mean()).sort("seed", "prompts")


def gained(runs: pl.DataFrame, samples: pl.DataFrame, ours: str, other: str, score: str = "reward") -> pl.Series:
    """How much higher one arm scores than another, for each training seed both have: mean over all images, by pairs.

    Args and Raises:
        As `won`.
    """
    both = _paired(runs, samples, ours, other, score)
    return both.group_by("seed").agg(gain=(pl.col(score) - pl.col("theirs")).mean()).sort("seed")["gain"]


def _paired(runs: pl.DataFrame, samples: pl.DataFrame, ours: str, other: str, score: str) -> pl.DataFrame:
    """Ours' samples, with the other's score of the same training seed, prompt and image seed as column theirs."""
    pair = ["seed", "caption", "image_seed"]
    seeded = samples.join(runs.select("run_id", "seed"), on="run_id")
    mine = seeded.join(of_arms(runs, ours).select("run_id"), on="run_id")
    if other == "pretrained":
        both = mine.with_columns(theirs=f"pretrained_{score}")
    else:
        theirs = seeded.join(of_arms(runs, other).select("run_id"), on="run_id").rename({score: "theirs"})
        both = mine.join(theirs.select(*pair, "theirs"), on=pair)
    if both.is_empty():
        raise UserError(f"arm {other!r}: no image of the same training seed, prompt and image seed as {ours!r}")
    return both


def win_rates(
    runs: pl.DataFrame, samples: pl.DataFrame, ours: str, against: str, score: str = "reward"
) -> pl.DataFrame:
    """`won` against several others (comma-separated), over training seeds.

    Returns:
        Columns against, prompts, mean, low, high, seeds; shares in 0..1.
    """
    tables = [
        over_seeds(won(runs, samples, ours, other, score), "prompts").with_columns(against=pl.lit(other))
        for other in names(against)
    ]
    return pl.concat(tables).select("against", "prompts", "mean", "low", "high", "seeds")


def relative_divergence(runs: pl.DataFrame, arms: str, base: str) -> pl.DataFrame:
    """The policy's divergence by timestep bucket as a share of another arm's (paper's Fig. 5).

    A ratio of means over the training seeds that both arms have, with a bootstrap interval that draws seeds, the
    two arms' together. No ratio where the other arm's mean is not positive, no interval where that can happen to
    a draw.

    Args:
        arms: comma-separated.
        base: the arm that is 1.
    Returns:
        Columns arm, bucket, mean, low, high, seeds; least noise first.
    """
    columns = bucket_columns(runs, "divergence")
    if not columns:
        raise UserError("metric timestep_divergence: no run of the study logged it")
    rows: list[dict[str, Any]] = []
    for arm in names(arms):
        both = of_arms(runs, arm).join(of_arms(runs, base), on="seed", suffix=" of base").sort("seed")
        if both.is_empty():
            raise UserError(f"arm {arm!r}: no finished run with a training seed of arm {base!r}")
        for bucket, column in columns.items():
            values = both.select(column, f"{column} of base").drop_nulls().to_numpy()
            rows.append({"arm": arm, "bucket": bucket} | _ratio(*values.T) | {"seeds": len(values)})
    schema = {"arm": pl.String, "bucket": pl.String, "mean": pl.Float64, "low": pl.Float64, "high": pl.Float64}
    return pl.DataFrame(rows, schema=schema | {"seeds": pl.Int64})


def _ratio(ours: np.ndarray, base: np.ndarray) -> dict[str, float | None]:
    """mean(ours) / mean(base), arrays of shape (seeds,), with a paired 95 % bootstrap percentile interval.

    The interval is the ratio itself, twice, where there are fewer than three seeds.
    """
    if len(base) == 0 or base.mean() <= 0:
        return {"mean": None, "low": None, "high": None}
    mean = float(ours.mean() / base.mean())
    if len(base) < ENOUGH:  # a bootstrap of two seeds would give the two seeds themselves
        return {"mean": mean, "low": mean, "high": mean}

    def ratio(a: np.ndarray, b: np.ndarray, axis: int) -> np.ndarray:
        above, below = a.mean(axis), b.mean(axis)
        return above / np.where(below > 0, below, np.nan)  # a share of nothing, or of less, is no share

    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DegenerateDataWarning)  # of draws without a ratio: there is no interval then
        interval = bootstrap(
            (ours, base), ratio, paired=True, vectorized=True, n_resamples=2000, method="percentile", rng=0
        ).confidence_interval
    low, high = (float(end) if np.isfinite(end) else None for end in interval)
    return {"mean": mean, "low": low, "high": high}
