"""What a study of many trials costs, from when its trials began and ended."""

from datetime import datetime, timedelta

import pytest

from workbench.benchmarks.scale import compare
from workbench.studies.synthetic import TrialTimes

BEGIN = datetime(2026, 1, 1)


def trials(count, workers, seconds, pause):
    """Workers that all begin at once; each trial takes so long, and so long passes until the worker's next."""
    begins = [(i // workers) * (seconds + pause) for i in range(count)]
    at = [BEGIN + timedelta(seconds=begin) for begin in begins]
    return [
        TrialTimes(1.0, begin, begin + timedelta(seconds=seconds), f"worker-{i % workers}", 4)
        for i, begin in enumerate(at)
    ]


def test_rates_and_pauses_come_from_begins_and_ends():
    found = compare(trials(60, 1, 9, 1), trials(120, 2, 9, 1), 2)
    assert found["trials_a_minute_of_one_worker"] == pytest.approx(6)
    assert found["speedup"] == pytest.approx(2, rel=0.02)
    assert found["seconds_between_trials_from_the_5th"] == found["seconds_between_trials_at_the_end"] == 1
    assert found["seconds_a_trial_at_the_end"] == 9
