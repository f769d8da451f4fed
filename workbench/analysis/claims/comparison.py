"""Verdicts of several studies of the claims side by side: other seeds, longer runs, another model."""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from workbench.analysis.claims.table import called, interval, number
from workbench.common.errors import UserError, one_line
from workbench.common.markdown import markdown_table

FILE = "claims.json"
Row = Mapping[str, Any]  # of `rules.judge`


def side_by_side(folders: Sequence[Path]) -> str:
    """A Markdown table with a column a study: each claim's verdicts, and below them its deciding effects.

    Args:
        folders: what `python -m workbench.claims` wrote, OUT/STUDY each; the column has the folder's name.
    Raises:
        UserError: a folder has no table of claims, or two have one name.
    """
    names = [folder.resolve().name for folder in folders]
    if len({*names}) < len(names):
        raise UserError(f"--compare: two folders are called {max(names, key=names.count)}; their columns are named so")
    studies = [{row["number"]: row for row in _read(folder)} for folder in folders]
    body: list[Sequence[str]] = []
    for claim in sorted(set().union(*studies)):
        rows = [study.get(claim) for study in studies]
        title = next(row["title"] for row in rows if row)
        body.append((str(claim), f"**{title}**", *(f"**{called(row)}**" if row else "" for row in rows)))
        effects = [{e["statement"]: e for e in row["effects"] if e["decides"]} if row else {} for row in rows]
        # In the order of the rule; a study that lacks a claim's arms has none of its effects.
        for statement in dict.fromkeys(name for of_one in effects for name in of_one):
            cells = (_cell(of_one[statement]) if statement in of_one else "" for of_one in effects)
            body.append(("", statement, *cells))
    return markdown_table(("#", "claim, and its effects", *names), body)


def _read(folder: Path) -> list[Row]:
    path = folder / FILE
    if not path.is_file():
        raise UserError(f"--compare {folder}: no {FILE} in it; expected a folder that workbench.claims wrote")
    try:
        rows = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise UserError(f"--compare {path}: cannot be read ({one_line(error)})") from None
    wanted = {"number", "title", "verdict", "reason", "effects"}
    if not isinstance(rows, list) or not all(isinstance(row, dict) and wanted <= row.keys() for row in rows):
        raise UserError(f"--compare {path}: not a table of claims")
    return rows


def _cell(effect: Mapping[str, Any]) -> str:
    return f"{number(effect['mean'])} ({interval(effect)})"
