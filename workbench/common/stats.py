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
    from scipy.stats import bootstrap

    values = np.asarray(values, dtype=float)
    if len(values) < 2 or np.ptp(values) == 0:
        return float(values.mean()), float(values.mean())
    result = bootstrap(
        (values,), np.mean, confidence_level=confidence, n_resamples=resamples, method="percentile", rng=0
    )
    return float(result.confidence_interval.low), float(result.confidence_interval.high)
