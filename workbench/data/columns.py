"""What the columns of preference pairs are called, and rows in one form whatever their columns are called.

Pairs come in two styles: with labels, as Pick-a-Pic has them (two images and which of them is preferred), and chosen
(a column of the preferred images and one of the others), as most later data sets have them. Both are read as rows of
COLUMNS, in which the chosen image of the second style comes first.
"""

import logging
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cache
from typing import Any, NamedTuple

from workbench.common.cache import digest
from workbench.common.errors import UserError
from workbench.data.parquet import require_columns

log = logging.getLogger(__name__)
COLUMNS = ("caption", "jpg_0", "jpg_1", "label_0", "label_1")


class Names(NamedTuple):
    """What the columns are called in the data: as `data.columns` says."""

    caption: str = "caption"
    chosen: str = "chosen"
    rejected: str = "rejected"
    jpg_0: str = "jpg_0"
    jpg_1: str = "jpg_1"
    label_0: str = "label_0"
    label_1: str = "label_1"

    def keyed(self, key: str) -> str:
        """The digest of some data as they are read under these names: the same, where nothing is renamed.

        The names are those of the columns that are read, as `Layout.names`: others decide nothing.
        """
        return key if self == NAMES else digest(key, tuple(self))

    def within(self, there: Collection[str], key: str) -> "Names":
        """The names in data that have some columns: each as it is given, else the usual one where that is there.

        So one set of names does for training and validation pairs that come from different places. A given name that is
        not there gets a warning, since it may be a mistake.

        Args:
            key: what the data are.
        """
        kept: dict[str, str] = {}
        for column in self.renamed:
            given, usual = getattr(self, column), getattr(NAMES, column)
            if given not in there:
                instead = f"; {usual!r} is read" if usual in there else ""
                _warn_once(f"{key}: no column {given!r} (data.columns.{column}){instead}")
                kept |= {column: usual} if usual in there else {}
        return self._replace(**kept)

    @property
    def renamed(self) -> set[str]:
        """The columns that are not called as usual."""
        return {column for column, name in self._asdict().items() if name != getattr(NAMES, column)}


NAMES = Names()


@cache
def _warn_once(line: str) -> None:
    """Warn, once in a process: of a data set's every file the same would be said."""
    log.warning("%s", line)


@dataclass(frozen=True)
class Layout:
    """How the rows of some data are read as rows of COLUMNS.

    Attributes:
        columns: of COLUMNS -> what it is called in the data.
        fixed: of COLUMNS that the data lack -> its value in every row.
    """

    columns: Mapping[str, str] = field(default_factory=lambda: {column: column for column in COLUMNS})
    fixed: Mapping[str, Any] = field(default_factory=dict)

    @property
    def names(self) -> Names:
        """What the columns that are read are called; the usual names of those that are not."""
        if self.fixed:  # the style without labels
            return Names(self.columns["caption"], chosen=self.columns["jpg_0"], rejected=self.columns["jpg_1"])
        return Names(**self.columns)

    @property
    def images(self) -> tuple[str, str]:
        """What the columns of the two images are called in the data."""
        return self.columns["jpg_0"], self.columns["jpg_1"]

    def row(self, row: Mapping[str, Any]) -> dict[str, Any]:
        """A row of the data, or a part of one, in COLUMNS; other columns keep their names."""
        known = {name: column for column, name in self.columns.items()}
        return {known.get(name, name): value for name, value in row.items()} | dict(self.fixed)


PLAIN = Layout()


def layout_of(there: Sequence[str], names: Names, key: str) -> Layout:
    """The layout of data that have some columns: the style whose columns are all there.

    Where both are, it is the one with labels, unless only the other's columns have been given names.

    Args:
        there: the names of the columns that the data have.
        key: what the data are, with which errors begin.
    Raises:
        UserError: neither style's columns are all there, or one is there twice.
    """
    labelled = Layout({column: getattr(names, column) for column in COLUMNS})
    chosen = Layout(
        {"caption": names.caption, "jpg_0": names.chosen, "jpg_1": names.rejected}, {"label_0": 1, "label_1": 0}
    )
    by_choice = bool(names.renamed & {"chosen", "rejected"}) and not names.renamed & {*COLUMNS[1:]}
    styles = (chosen, labelled) if by_choice else (labelled, chosen)
    whole = [style for style in styles if {*style.columns.values()} <= {*there}]
    # Else the style of which most is there, so that the error names what is missing and not all that the other has.
    nearest = whole[0] if whole else max(styles, key=lambda style: len({*style.columns.values()} & {*there}))
    wanted = list(nearest.columns.values())
    if len({*wanted}) < len(wanted):
        raise UserError(f"data.columns: two columns are called {max(wanted, key=wanted.count)!r}")
    usual = "Pick-a-Pic's: " if names == NAMES and nearest is labelled else ""
    require_columns(there, wanted, key, f" (expected {usual}{', '.join(wanted)}; data.columns gives other names)")
    return nearest


def score_columns(scores: str) -> list[str]:
    """The columns that hold the scores of a row's two images; none where none are read."""
    return [f"{scores}_0", f"{scores}_1"] if scores else []


def wanted_columns(there: list[str], key: str, scores: str, names: Names) -> tuple[Layout, list[str]]:
    """The layout of data with some columns, and the columns to read."""
    missing = [column for column in score_columns(scores) if there.count(column) != 1]
    if missing:
        raise UserError(f"data.scores = {scores!r}: {key} has no column {', '.join(missing)} (or has it twice)")
    layout = layout_of(there, names.within(there, key), key)
    # Where the columns say which image is chosen, every row has a label.
    optional = [column for column in ("has_label",) if column in there and not layout.fixed]
    require_columns(there, optional, key)
    return layout, [*layout.columns.values(), *optional, *score_columns(scores)]


def require_images(texts: Sequence[str], key: str) -> None:
    """Refuse columns of texts in place of images, such as paths."""
    if texts:
        raise UserError(
            f"{key}: {texts[0]} holds text and no images; a list of pictures' paths is a .csv, .jsonl or .json file"
        )
