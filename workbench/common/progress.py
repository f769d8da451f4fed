"""Progress bars that say what is going on; in a log file, a line every ten seconds.

A carriage return, by which a bar draws over itself, makes one endless line of a log.
"""

import multiprocessing
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any

from tqdm import tqdm

_WORKER_DRAWS = ContextVar("_WORKER_DRAWS", default=False)


@contextmanager
def drawn_by_worker() -> Iterator[None]:
    """Inside, bars are drawn in a worker process too: the command that started it has none of its own yet."""
    before = _WORKER_DRAWS.set(True)
    try:
        yield
    finally:
        _WORKER_DRAWS.reset(before)


class Progress(tqdm):
    """A tqdm bar with a phase in its name.

    A worker process draws none: the command that started it draws its own on the same terminal. Until it does,
    `drawn_by_worker`.

    Args:
        desc: what goes on as a whole, such as a study's name; the phase follows it.
        options: as tqdm takes them.
    """

    def __init__(self, *, desc: str, **options: Any):
        self.name, self._shown, self._is_log = desc, 0.0, not sys.stderr.isatty()
        if self._is_log:
            options = {"file": _Lines(), "ncols": 120} | options
        is_worker = multiprocessing.parent_process() is not None and not _WORKER_DRAWS.get()
        super().__init__(desc=desc, **options | {"disable": is_worker or options.get("disable", False)})

    def phase(self, text: str) -> None:
        """Say what goes on now; also to be called while nothing can be counted, so that the clock moves."""
        if self.disable:  # tqdm has set up nothing then
            return
        wanted = f"{self.name}: {text}"
        changed = self.desc.removesuffix(": ") != wanted  # tqdm keeps a colon at its end
        self.set_description(wanted, refresh=False)
        # On a terminal a new phase is shown at once. In a log it can wait: a line each would be many.
        if (changed and not self._is_log) or time.monotonic() - self._shown >= self.mininterval:
            self.refresh()

    def display(self, *args: Any, **options: Any) -> None:
        """Draw the bar, as tqdm does, and note when."""
        self._shown = time.monotonic()
        super().display(*args, **options)


class _Lines:
    """Standard error for bars that are no terminal's: what would draw over the last line becomes a line of its own."""

    encoding = "utf-8"

    def write(self, text: str) -> None:
        """Write what is to be seen of a bar; blanks that would wipe it out are nothing to be seen."""
        seen = text.strip("\r\n ")
        if seen and sys.stderr is not None:
            sys.stderr.write(f"{seen}\n")

    def flush(self) -> None:
        """Write out what is waiting."""
        if sys.stderr is not None:
            sys.stderr.flush()
