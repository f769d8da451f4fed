"""Commands run in this process, which has imported everything already.

A process of its own spends 4 to 8 seconds of CPU on imports before it does anything. What a signal, an exit or a crash
does to a command is seen in a process of its own alone: `tests.support.helpers.workbench`.
"""

import importlib
import json
import os
import signal
import subprocess
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import pytest
from click.testing import CliRunner

from tests.support.helpers import ROOT


class CutOffError(BaseException):
    """Ends a command where a kill would; nothing of the workbench catches it."""


def cut_off(*_: Any, **__: Any) -> None:
    """To be put in the place of the function before which a command is to be killed."""
    raise CutOffError


@contextmanager
def signal_handlers_kept() -> Iterator[None]:
    """Put back the signal handlers that commands install."""
    before = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def invoke(command: str, *arguments: Any, **environment: str) -> subprocess.CompletedProcess:
    """Run `python -m workbench.COMMAND ARGUMENTS` in this process and working folder.

    Args:
        environment: variables that the command sees beside this process's.
    Raises:
        Exception: what a user would see as a traceback.
    """
    main = importlib.import_module(f"workbench.{command}").main
    with pytest.MonkeyPatch.context() as patch, signal_handlers_kept():
        for name, value in environment.items():
            patch.setenv(name, value)
        done = CliRunner().invoke(main, [str(argument) for argument in arguments])
    if done.exception is not None and not isinstance(done.exception, SystemExit):
        raise done.exception
    return subprocess.CompletedProcess([command, *arguments], done.exit_code, done.stdout, done.stderr)


def in_one_process(*commands: Sequence[str], **environment: str) -> list[subprocess.CompletedProcess]:
    """Run commands, each a name and its arguments, one after the other in one new process.

    For variables that libraries read when they are imported.
    """
    done = subprocess.run(
        [sys.executable, "-m", "tests.support.commands", json.dumps(commands)],
        env=os.environ | {"PYTHONPATH": str(ROOT)} | environment, capture_output=True, text=True, timeout=600,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    results = json.loads(done.stdout.splitlines()[-1])
    return [subprocess.CompletedProcess(command, *result) for command, result in zip(commands, results, strict=True)]


if __name__ == "__main__":
    ended = [invoke(*asked) for asked in json.loads(sys.argv[1])]
    print(json.dumps([(done.returncode, done.stdout, done.stderr) for done in ended]))
