"""Verdicts of several studies of the claims side by side: other seeds, longer runs, another model."""

import json
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from pydantic import BaseModel, FiniteFloat, TypeAdapter, ValidationError

from workbench.analysis.claims.table import interval, number, verdict_text
from workbench.common.errors import UserError, one_line
from workbench.common.markdown import markdown_table

FILE, REGIME = "claims.json", "regime.json"
Row = Mapping[str, Any]  # of `verdicts.judge`


class _Effect(BaseModel):
    """What the comparison reads of an effect; the other keys may be anything."""

    statement: str
    mean: FiniteFloat
    low: FiniteFloat
    high: FiniteFloat
    seeds: int
    decides: bool


class _Claim(BaseModel):
    """What the comparison reads of a claim."""

    number: int
    title: str
    verdict: str
    reason: str
    effects: list[_Effect]
    steps: list[int] = []  # which earlier versions did not write


class _Measure(BaseModel):
    """What the comparison reads of a measure of the regime."""

    statement: str
    inside: bool


CLAIMS, MEASURES = TypeAdapter(list[_Claim]), TypeAdapter(list[_Measure])


def side_by_side(folders: Sequence[Path]) -> str:
    """A Markdown table, a column a study: its seeds, steps and regime, each claim's verdict and its deciding effects.

    Args:
        folders: what `python -m workbench.claims` wrote, OUT/STUDY each; the column has the folder's name.
    Raises:
        UserError: a folder has no table of claims, or two have one name.
    """
    names = [folder.resolve().name for folder in folders]
    if len({*names}) < len(names):
        raise UserError(f"--compare: two folders are called {max(names, key=names.count)}; their columns are named so")
    studies = [{row["number"]: row for row in _read(folder / FILE, CLAIMS, "a table of claims")} for folder in folders]
    body: list[Sequence[str]] = [
        ("", "seeds", *(_seeds(study.values()) for study in studies)),
        ("", "training steps", *(_steps(study.values()) for study in studies)),
        ("", "regime", *map(_regime, folders)),
    ]
    for claim in sorted(set().union(*studies)):
        rows = [study.get(claim) for study in studies]
        title = next(row["title"] for row in rows if row)
        body.append((str(claim), f"**{title}**", *(_verdict(row) if row else "" for row in rows)))
        effects = [{e["statement"]: e for e in row["effects"] if e["decides"]} if row else {} for row in rows]
        # In the order of the rule; a study that lacks a claim's arms has none of its effects.
        for statement in dict.fromkeys(name for of_one in effects for name in of_one):
            cells = (_cell(of_one[statement]) if statement in of_one else "" for of_one in effects)
            body.append(("", statement, *cells))
    return markdown_table(("#", "claim, and its effects", *names), body)


def _read(path: Path, kind: TypeAdapter[Any], what: str) -> list[Row]:
    """The rows of a file of JSON.

    Raises:
        UserError: it is not there, or is of another kind; names the first key that is wrong.
    """
    if not path.is_file():
        raise UserError(f"--compare {path.parent}: no {path.name} in it; expected a folder that workbench.claims wrote")
    try:
        text = path.read_text(encoding="utf-8")
        rows: list[Row] = json.loads(text)
        kind.validate_json(text, strict=True)
    except ValidationError as error:
        first = error.errors()[0]
        key = ".".join(map(str, first["loc"]))
        raise UserError(f"--compare {path}: not {what} ({key + ': ' if key else ''}{first['msg']})") from None
    except (OSError, ValueError) as error:
        raise UserError(f"--compare {path}: cannot be read ({one_line(error)})") from None
    return rows


def _seeds(rows: Iterable[Row]) -> str:
    """How many training seeds a study has: as many as the effect that rests on most."""
    return str(max((effect["seeds"] for row in rows for effect in row["effects"]), default=0))


def _steps(rows: Iterable[Row]) -> str:
    """How many steps a study's runs have; several numbers where they differ."""
    found = sorted({steps for row in rows for steps in row.get("steps", [])})
    return ", ".join(map(str, found)) or "not stored"


def _regime(folder: Path) -> str:
    """Whether a study, in whose folder this looks, is in the paper's regime; if not, which measures are outside."""
    # Earlier versions did not write the file; where the runs tell nothing of the regime it is empty.
    path = folder / REGIME
    measures = _read(path, MEASURES, "the measures of a regime") if path.is_file() else []
    outside = [one["statement"] for one in measures if not one["inside"]]
    if outside:
        return f"another than the paper's: {'; '.join(outside)}"
    return "the paper's" if measures else "not measured"


def _verdict(row: Row) -> str:
    return f"**{verdict_text(row)}**" + (f": {row['reason']}" if row["reason"] else "")


def _cell(effect: Mapping[str, Any]) -> str:
    return f"{number(effect['mean'])} ({interval(effect)})"
