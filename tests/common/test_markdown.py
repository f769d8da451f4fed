"""Markdown, and numbers in it."""

import pytest

from workbench.common.markdown import three_digits


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (0.123456, "0.123"),
        (3e-06, "3e-06"),
        (1234.5, "1.23e+03"),
        (float("nan"), "nan"),
        (16.0, "16"),
        (5000.0, "5000"),
        (1234567, "1234567"),
        (float("inf"), "inf"),
        ("16.0", "16.0"),
        ("0.00012345", "0.00012345"),
        ("2024.10", "2024.10"),
        (True, "True"),
        ("dpo", "dpo"),
        (None, "None"),
    ],
)
def test_three_digits_are_of_numbers_that_are_not_whole(value, text):
    assert three_digits(value) == text
