import numpy as np
import pytest

from workbench.common.stats import mean_interval, wins


def test_ties_count_half():
    assert wins([1, 2, 3], [2, 2, 2]).tolist() == [0, 0.5, 1]


def test_interval_covers_the_mean_about_as_often_as_it_says():
    rng = np.random.default_rng(0)
    hits = 0
    for _ in range(200):
        low, high = mean_interval(rng.normal(3, 1, 40), resamples=500)
        hits += low <= 3 <= high
    assert 0.87 <= hits / 200 <= 0.99


def test_one_observation_has_no_spread():
    assert mean_interval([2.5]) == (2.5, 2.5)
    assert mean_interval([1, 1, 1]) == pytest.approx((1, 1))
