"""What a user can get wrong, and a place to try it: the commands run in this process, watched for what they leave."""

import contextlib
import faulthandler
import hashlib
import importlib
import re
import shutil
import signal
import sqlite3
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

from click.testing import CliRunner

from tests.support.helpers import overrides


class Place(NamedTuple):
    """Where a case is tried: a working folder, and what is right.

    Attributes:
        folder: empty at first; commands run in it.
        settings: of a run that takes a second.
        encoded: its pairs, encoded.
    """

    folder: Path
    settings: dict[str, Any]
    encoded: Path

    @property
    def model(self) -> Path:
        """A checkpoint of the case's own, to be damaged."""
        own = self.folder / "model"
        if not own.exists():
            shutil.copytree(self.settings["model.path"], own)
        return own

    @property
    def store(self) -> Path:
        """Encoded pairs of the case's own, to be damaged."""
        own = self.folder / "store"
        if not own.exists():
            shutil.copytree(self.encoded, own)
        return own

    def given(self, **changed: str) -> list[str]:
        """The right settings as options, but for those of these sections and keys: `data_train="x"`."""
        return overrides(self.settings | {key.replace("_", ".", 1): value for key, value in changed.items()})


class Bad(NamedTuple):
    """A mistake.

    Attributes:
        name: as the tests call it.
        make: makes it in a place; returns the command that meets it, and its arguments.
        says: what the one line must name.
        code: the command's: 2 where the user is wrong, 1 where something did not work.
    """

    name: str
    make: Callable[[Place], list[str]]
    says: tuple[str, ...]
    code: int = 2


class Ended(NamedTuple):
    """How a command ended."""

    code: int
    output: str
    errors: list[str]


class TooLong(BaseException):
    """A command that hangs; no handler of failures takes it for one."""


@contextlib.contextmanager
def limit(seconds: int) -> Iterator[None]:
    """End what hangs: in Python by an exception, in compiled code with the whole session."""

    def ring(*_: Any) -> None:
        raise TooLong(f"not done after {seconds} s")

    heard = {number: signal.getsignal(number) for number in (signal.SIGALRM, signal.SIGTERM, signal.SIGHUP)}
    signal.signal(signal.SIGALRM, ring)
    signal.alarm(seconds)
    faulthandler.dump_traceback_later(3 * seconds, exit=True)
    try:
        yield
    finally:
        signal.alarm(0)
        faulthandler.cancel_dump_traceback_later()
        for number, handler in heard.items():
            signal.signal(number, handler)


def run(command: str, *arguments: str, seconds: int = 60) -> Ended:
    """A command as `python -m workbench.COMMAND` runs it; what would be a traceback is raised."""
    main = importlib.import_module(f"workbench.{command}").main
    with limit(seconds):
        done = CliRunner().invoke(main, arguments)
    if done.exception is not None and not isinstance(done.exception, SystemExit):
        raise done.exception
    lines = re.split(r"[\r\n]+", done.output)  # progress bars return to the line's beginning
    return Ended(done.exit_code, done.output, [line for line in lines if line.startswith("Error")])


def files(folder: Path) -> dict[str, str]:
    """Every file below a folder with its content's digest; links as such."""
    found = {}
    for path in sorted(folder.rglob("*")):
        name = str(path.relative_to(folder))
        if path.is_symlink():
            found[name] = f"-> {path.readlink()}"
        elif path.is_file():
            found[name] = hashlib.sha256(path.read_bytes()).hexdigest()
    return found


def tracked(database: Path) -> int:
    """How many runs a tracking store holds."""
    return sqlite3.connect(f"file:{database}?mode=ro", uri=True).execute("SELECT count(*) FROM runs").fetchone()[0]
