"""Intervals of means over few training seeds, and what so few seeds could have seen.

A bootstrap percentile interval of five values is too narrow: it covers the true mean about 83 times of 100 rather than
95. Student's t accounts for how little five values say of their own spread. Two say next to nothing: their interval
would be 25 standard errors wide, so there is none below three.
"""

import numpy as np
from numpy.typing import ArrayLike
from scipy.stats import t as student

CONFIDENCE, POWER = 0.95, 0.8
ENOUGH = 3  # seeds for an interval, and for a verdict


def seed_interval(values: ArrayLike, confidence: float = CONFIDENCE) -> tuple[float, float]:
    """Student's t interval of the mean; the mean twice for fewer than three values, or where all are equal.

    Args:
        values: one a training seed, shape (S,).
        confidence: two-sided.
    """
    values = np.asarray(values, dtype=float)
    mean, error = float(values.mean()), _standard_error(values)
    if error == 0:
        return mean, mean
    beyond = float(student.ppf((1 + confidence) / 2, len(values) - 1)) * error
    return mean - beyond, mean + beyond


def detectable(values: ArrayLike) -> float | None:
    """The smallest true mean that as many seeds of this spread would tell from 0 in 8 of 10 such studies.

    (t(.975) + t(.8)) standard errors, the usual approximation of the two-sided test's power.

    Args:
        values: one a training seed, shape (S,).
    Returns:
        None where there are fewer than three seeds, or no spread.
    """
    values = np.asarray(values, dtype=float)
    error = _standard_error(values)
    if error == 0:
        return None
    quantiles = student.ppf([(1 + CONFIDENCE) / 2, POWER], len(values) - 1)
    return float(quantiles.sum() * error)


def _standard_error(values: np.ndarray) -> float:
    """Standard error of the mean; 0 for fewer than three values, or where all are the same up to rounding."""
    if len(values) < ENOUGH or np.ptp(values) <= 1e-12 * np.abs(values).max():
        return 0.0
    return float(values.std(ddof=1) / np.sqrt(len(values)))


def cell(mean: float, low: float, high: float, digits: int = 3) -> str:
    """A mean and its interval in words; the mean alone where there is no interval."""
    interval = "" if low == high else f" ({low:.{digits}f} to {high:.{digits}f})"
    return f"{mean:.{digits}f}{interval}"
