"""Files that are written whole or not at all, whatever ends the process."""

import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import IO
from uuid import uuid4


@contextmanager
def partial_file(path: Path) -> Iterator[Path]:
    """A name beside a path, to write a file or a folder to and then move it; removed at the end if it is still there.

    No two processes get the same name, on any machine. A process that is killed leaves it behind, as *.partial.
    """
    partial = path.with_name(f"{path.name}.{uuid4().hex}.partial")
    try:
        yield partial
    finally:
        if partial.is_dir():
            shutil.rmtree(partial, ignore_errors=True)
        else:
            with suppress(OSError):
                partial.unlink(missing_ok=True)


@contextmanager
def in_place(path: Path) -> Iterator[Path]:
    """Where to write a file or a folder, which at the end takes its place at once; a folder there must be empty."""
    with partial_file(path) as partial:
        yield partial
        os.replace(partial, path)


def sync(stream: IO[bytes]) -> None:
    """Wait until what was written to a file would survive a loss of power."""
    stream.flush()
    os.fsync(stream.fileno())


def sync_folder(folder: Path) -> None:
    """Wait until a new name in a folder would survive a loss of power."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
