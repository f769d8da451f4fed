"""Files for people, in folders that are theirs: what the workbench did not write is never overwritten.

Each such folder has a list of the files that the workbench has written there, one name a line, in `.workbench-files`.
Whoever wants a page or a figure written anew gets it; a file of the same name that is not on the list stays.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from workbench.common.errors import UserError
from workbench.common.files import in_place, noted

WRITTEN = ".workbench-files"


def require_own(folder: Path, *names: str) -> None:
    """Make sure that files may be written: none of them is there, or the workbench has written it.

    Better asked before the work than after it.

    Raises:
        UserError: somebody else's file is there.
    """
    written = _written(folder)
    if not written and (folder / WRITTEN).exists() and not (folder / WRITTEN).is_file():
        raise UserError(f"{folder / WRITTEN}: is no file, so the workbench cannot note there what it writes; move it")
    for name in names:
        path = folder / name
        # exists() follows links: a link to nothing is somebody's too.
        if name not in written and (path.exists() or path.is_symlink()):
            raise UserError(
                f"{path}: is there, and not among the files that the workbench wrote ({WRITTEN}); move it, or choose "
                "another folder"
            )


@contextmanager
def output_file(path: Path) -> Iterator[Path]:
    """As `files.in_place`, for a file in a folder where people may have files of their own.

    Raises:
        UserError: somebody else's file has this name.
    """
    require_own(path.parent, path.name)
    with in_place(path) as partial:
        yield partial
        # Before the file has its name: a kill in between leaves a name without a file, and never a file that the
        # workbench would not know again.
        if path.name not in _written(path.parent):
            with (path.parent / WRITTEN).open("a", encoding="utf-8") as stream:  # in one piece: others append too
                stream.write(f"{path.name}\n")


def written_in(folder: Path) -> list[Path]:
    """The files in a folder that the workbench has written, by name."""
    return sorted(path for name in _written(folder) if (path := folder / name).is_file())


def _written(folder: Path) -> set[str]:
    return set((noted(folder / WRITTEN) or "").splitlines())
