"""Files that a user gives, read: regular ones alone, and texts as any editor writes them."""

import difflib
import os
import stat
from collections.abc import Iterable
from pathlib import Path

from workbench.common.errors import UserError

#: What may lie in a file's place, by the first bits of its mode.
OTHERS = {
    stat.S_IFDIR: "a folder",
    stat.S_IFIFO: "a named pipe",
    stat.S_IFSOCK: "a socket",
    stat.S_IFCHR: "a device",
    stat.S_IFBLK: "a device",
}


def near(missing: Path | str, also: Iterable[str] = ()) -> str:
    """The end of a line about a file that is not there: the one that may be meant; empty where none is like it.

    Args:
        also: more names that could be meant, beside those in the folder where the file should be.
    """
    path = Path(missing)
    try:
        there = {str(path.parent / each.name): each.name for each in path.parent.iterdir() if each.name != path.name}
    except (OSError, ValueError):  # no such folder, or no name that a folder could have
        there = {}
    close = difflib.get_close_matches(path.name, there.values(), 1, 0.75)
    found = [place for place, name in there.items() if name in close]
    found += difflib.get_close_matches(str(path), list(also), 1, 0.75)
    return f"; did you mean {found[0]}?" if found else ""


def require_regular(path: Path, what: str) -> None:
    """Check that a path is a file that can be read, before anything opens it.

    Opening a named pipe waits for somebody who writes into it, and a device may have no end.

    Args:
        what: what the file is, with which the line begins.
    Raises:
        UserError: it is missing, no regular file, or not readable.
    """
    try:
        kind = stat.S_IFMT(path.stat().st_mode)
    except OSError as error:
        raise UserError(f"{what}: {path.name} cannot be read ({error.strerror})") from None
    if kind != stat.S_IFREG:
        raise UserError(f"{what}: {path.name} is {OTHERS.get(kind, 'something else')}, not a file")
    if not os.access(path, os.R_OK):
        raise UserError(f"{what}: {path.name} is not readable (Permission denied)")


def read_text(path: Path, what: str) -> str:
    r"""The text of a file in UTF-8, with or without the mark at its beginning that some editors write.

    Returns:
        Its text, in which every line ends with "\n", whatever ends them in the file.
    Raises:
        UserError: it is no regular file, not readable, or in another encoding.
    """
    require_regular(path, what)
    try:
        return path.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError:
        raise UserError(f"{what}: not a text file in UTF-8") from None
    except OSError as error:
        raise UserError(f"{what}: cannot be read ({error.strerror})") from None


def read_lines(path: Path, what: str) -> list[str]:
    r"""The lines of a file, as `read_text` reads it.

    Only line ends part them. `str.splitlines` would also cut a prompt in two at the separators that are pasted from
    web pages and documents: U+2028, form feeds and others.
    """
    return read_text(path, what).split("\n")
