"""Small statistics: win rates and their intervals."""

import numpy as np
from numpy.typing import ArrayLike


def wins(ours: ArrayLike, theirs: ArrayLike) -> np.ndarray:
    """1 where ours scores higher, 0 where theirs does, 0.5 for a tie; scores paired by prompt and seed."""
    difference = np.asarray(ours, dtype=float) - np.asarray(theirs, dtype=float)
    return (np.sign(difference) + 1) / 2


def mean_interval(values: ArrayLike, confidence: float = 0.95, resamples: int = 2000) -> tuple[float, float]:
    """Bootstrap percentile interval of the mean, seeded; the value itself twice where there is only one.

    Args:
        values: independent observations, shape (N,).
    """
    values = np.asarray(values, dtype=float)
    if len(values) < 2 or np.ptp(values) == 0:
        return float(values.mean()), float(values.mean())
    # scipy.stats.bootstrap's own arithmetic, to the last digit: a machine that trains need not have scipy
    drawn = np.random.default_rng(0).integers(0, len(values), (resamples, len(values)))
    means, beyond = np.sort(values[drawn].mean(axis=1)), (1 - confidence) / 2
    return _quantile(means, beyond), _quantile(means, 1 - beyond)


def _quantile(ordered: np.ndarray, share: float) -> float:
    """Linear interpolation between the order statistics on both sides (Hyndman and Fan's type 7), 0 < share < 1."""
    place = share * len(ordered) + (1 - share)  # counted from 1
    below, part = int(place) - 1, place % 1
    return float((1 - part) * ordered[below] + part * ordered[below + 1])
