"""Files that are written whole or not at all, whatever ends the process."""

import os
import re
import shutil
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import IO
from uuid import uuid4

from workbench.common.errors import Failure


@contextmanager
def partial_file(path: Path) -> Iterator[Path]:
    """A name beside a path, to write a file or a folder to and then move it; removed at the end if it is still there.

    No two processes get the same name, on any machine. A process that is killed leaves it behind, as *.partial.
    """
    # Beside it, so that both are on one file system: only there does a rename replace a file at once.
    partial = path.with_name(f"{path.name}.{uuid4().hex}.partial")
    try:
        yield partial
    finally:
        with suppress(OSError):
            remove(partial)


def remove(path: Path) -> None:
    """Remove a file, or a folder as far as that works; nothing where nothing is."""
    if path.is_dir():
        shutil.rmtree(path, ignore_errors=True)
    else:
        path.unlink(missing_ok=True)


def is_partial(path: Path) -> bool:
    """Whether a file's name is one that `partial_file` gives."""
    return re.fullmatch(r".+\.[0-9a-f]{32}\.partial", path.name) is not None


@contextmanager
def in_place(path: Path) -> Iterator[Path]:
    """Where to write a file or a folder, which at the end takes its place at once; a folder there must be empty.

    What is written may be read by whoever the umask allows it.
    """
    with partial_file(path) as partial:
        yield partial
        # Before the move: under its own name the file never has another mode.
        _follow_umask(partial)
        os.replace(partial, path)


def _follow_umask(path: Path) -> None:
    """Give a file, or the files of a folder, the mode of new files; safetensors makes them for their owner alone."""
    files = (file for file in [path, *path.rglob("*")] if file.is_file() and not file.is_symlink())
    private = [file for file in files if not file.stat().st_mode & 0o077]
    if not private:
        return
    # Seen from a new file: the umask itself can only be read by changing it, for other threads too.
    with partial_file(path) as new:
        new.touch(0o666)
        mode = new.stat().st_mode & 0o777
    for file in private:
        file.chmod(mode)


def create_as_umask_says(path: Path) -> None:
    """Make an empty file where there is none, for libraries that would make it for fewer people.

    sqlite lets nobody else write its files, filelock nobody else read its locks, whatever the umask says; colleagues
    who share a database need both. Empty files are what both begin with.
    """
    if not path.exists():
        path.touch()


def require_readable(path: Path, remedy: str) -> None:
    """Make sure that a file which is there can be opened, so that nobody takes it for a damaged one.

    Not for databases, which are not opened beside their own library: `require_writable` says why.

    Args:
        remedy: what to do where the file's mode cannot be changed.
    Raises:
        Failure: it cannot; says why.
    """
    try:
        path.open("rb").close()
    except OSError as error:
        raise Failure(f"{path}: cannot be read ({error.strerror}); let this user read it, or {remedy}") from None


def require_writable(path: Path, what: str, remedy: str) -> None:
    """Make sure that a database's file can be changed, where it is there; libraries say so late, and as a bug.

    Args:
        what: what it is, with which the line begins.
        remedy: what to do.
    Raises:
        Failure: it cannot.
    """
    # Asked, and not opened: closing any descriptor of a file drops the locks that connections of this process hold on
    # it, and another process could then write between what sqlite reads and what it writes.
    effective = os.access in os.supports_effective_ids
    if path.is_file() and not os.access(path, os.R_OK | os.W_OK, effective_ids=effective):
        raise Failure(f"{what} {path}: cannot be written (Permission denied); {remedy}")


def noted(path: Path) -> str | None:
    """What the workbench has noted in a small file; None where there is none, or something else is in its place."""
    # Asked first: whoever opens a named pipe waits for somebody who writes into it.
    if not path.is_file():
        return None
    require_readable(path, "work with another folder")
    try:
        return path.read_text(encoding="utf-8")
    except (OSError, ValueError):
        return None


def holds_something(folder: Path) -> bool:
    """Whether there is a folder that is not empty; one whose content this user may not see is taken for such."""
    try:
        return any(folder.iterdir())
    except PermissionError:
        return True
    except OSError:
        return False


def replace_folder(new: Path, path: Path) -> None:
    """Move a folder to where another may be, which is removed."""
    with partial_file(path) as old:
        with suppress(FileNotFoundError):
            # A rename cannot replace a folder that holds something: the old one makes room, and is removed at the end.
            os.rename(path, old)
        os.rename(new, path)


def sync(stream: IO[bytes]) -> None:
    """Wait until what was written to a file would survive a loss of power."""
    stream.flush()
    os.fsync(stream.fileno())


def sync_folder(folder: Path) -> None:
    """Wait until a new name in a folder would survive a loss of power."""
    # A file's name is stored in its folder, which fsync of the file does not write.
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
