"""Standard streams that end no run: their reader may go away, their encoding may lack letters, they may be closed."""

import errno
import io
import os
import sys
from typing import Any

#: A reader that has gone away, or a terminal that was closed: nobody waits for what could not be written.
_GONE = (errno.EPIPE, errno.EIO)


class _Sturdy(io.FileIO):
    """A standard stream's file. What cannot be written is left out, and so is everything after it.

    Attributes:
        error: why something was left out that somebody may miss; None if nothing was.
    """

    error: OSError | None = None

    def write(self, data: Any) -> int:  # type: ignore[override]
        try:
            return super().write(data)
        except OSError as error:
            if error.errno not in _GONE:
                self.error = error
            # Libraries, and processes that this one starts, write to it without asking this class.
            _point_to_nowhere(self.fileno())
            # As if all were written: with less, the buffer above would try again.
            return memoryview(data).nbytes


def _point_to_nowhere(number: int) -> None:
    """Let a file descriptor read and write nothing, for this process and those that it starts."""
    nowhere = os.open(os.devnull, os.O_RDWR)
    # os.open gives the lowest free number, which may be the closed stream's own.
    if nowhere != number:
        os.dup2(nowhere, number)
        os.close(nowhere)
    os.set_inheritable(number, True)


def make_sturdy() -> None:
    """Prepare this process's standard streams, once; streams that a test or a notebook has put there stay.

    `2>&1 | tee log` loses its reader to the same Ctrl-C that asks a run to stop. A closed stream would give its number
    to the next file that is opened, such as a database, and what a library writes to the stream would go there.
    """
    for number, name, mode in ((0, "stdin", "r"), (1, "stdout", "w"), (2, "stderr", "w")):
        stream = getattr(sys, name)
        if stream is None:
            try:
                os.fstat(number)
            except OSError:
                _point_to_nowhere(number)
            setattr(sys, name, os.fdopen(number, mode, encoding="utf-8", errors="backslashreplace", closefd=False))
        elif mode == "w" and stream is getattr(sys, f"__{name}__") and not isinstance(_raw(stream), _Sturdy):
            # What the old stream still holds comes before what the new one writes.
            stream.flush()
            # closefd=False: the descriptor stays open without this object, as others write to it by its number.
            file = io.BufferedWriter(_Sturdy(number, "w", closefd=False))
            # A letter that the terminal's encoding lacks is written as its number.
            # Line by line, into a file too: the log of a study is read while it runs, and a trial's line belongs
            # between those of the bar.
            sturdy = io.TextIOWrapper(file, stream.encoding, "backslashreplace", line_buffering=True)
            setattr(sys, name, sturdy)
            setattr(sys, f"__{name}__", sturdy)


def lost_output() -> OSError | None:
    """Why something that was printed to standard output is missing; None if all is there, or nobody reads it."""
    raw = _raw(sys.stdout)
    if not isinstance(raw, _Sturdy):
        return None
    sys.stdout.flush()
    return raw.error


def _raw(stream: Any) -> Any:
    """The file below a text stream's buffer; None where there is none."""
    return getattr(getattr(stream, "buffer", None), "raw", None)
