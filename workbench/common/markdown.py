"""Markdown, as MLflow's notes, reports and the terminal show it."""

from collections.abc import Iterable, Sequence
from typing import Any


def markdown_table(head: Sequence[str], rows: Iterable[Sequence[Any]]) -> str:
    """A table; nothing where a value is None. What would end a cell or a row is escaped, so no text can break it."""
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join(f"| {' | '.join(_cell(value) for value in row)} |" for row in lines)


def _cell(value: Any) -> str:
    return "" if value is None else str(value).replace("|", "\\|").replace("\n", "<br>")


def two_digits(value: float) -> str:
    """A number with two significant digits; from 10 on, all digits before the point."""
    return f"{value:,.0f}" if value >= 10 else f"{value:.2g}"


def three_digits(value: Any) -> str:
    """A number with three significant digits if it is not whole, else all of it without a ".0"; other values whole.

    Text is no number, whatever it reads like: "2024.10" may be what somebody calls a version.
    """
    if not isinstance(value, float):
        return str(value)
    return f"{value:.3g}" if value % 1 else str(value).removesuffix(".0")
