"""Intervals of means over few seeds."""

import numpy as np
import pytest
from scipy.stats import ttest_1samp

from workbench.analysis.intervals import detectable, seed_interval


def test_an_interval_is_students():
    values = [0.1, 0.4, 0.2, 0.5, 0.25]
    expected = ttest_1samp(values, 0).confidence_interval(0.95)
    assert seed_interval(values) == pytest.approx(expected)


@pytest.mark.parametrize("values", [[0.3], [0.2, 0.4], [0.3, 0.3, 0.3], [0.1 + 0.2, 0.3, 0.3]])
def test_there_is_no_interval_of_too_few_or_equal_values(values):
    mean = pytest.approx(0.3)
    assert seed_interval(values) == (mean, mean) and detectable(values) is None


def test_what_can_be_detected_is_seen_in_eight_of_ten_studies():
    rng, seen = np.random.default_rng(0), 0
    values = rng.normal(0, 1, 10)
    effect = detectable((values - values.mean()) / values.std(ddof=1))
    for _ in range(1000):
        low, _high = seed_interval(rng.normal(effect, 1, 10))
        seen += low > 0
    assert seen / 1000 == pytest.approx(0.8, abs=0.04)
