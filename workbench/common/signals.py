"""Stopping on signals at a moment when nothing is half done."""

import signal
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType

PATIENCE = 15.0  #: seconds until a stop is forced; schedulers kill a process some 30 seconds after their signal


@contextmanager
def stop_on_signals(*names: str, patience: float = PATIENCE) -> Iterator[Callable[[], bool]]:
    """Inside, these signals only request a stop; yields a function that says whether one was requested.

    A second signal, or `patience` seconds without an end, raises KeyboardInterrupt wherever the process is.

    Args:
        names: of signals; those that this system lacks, and those that are ignored, stay as they are.
    """
    received: list[int] = []

    def handle(number: int, frame: FrameType | None) -> None:
        received.append(number)
        if len(received) > 1 or number == signal.SIGALRM:
            raise KeyboardInterrupt
        signal.setitimer(signal.ITIMER_REAL, patience)

    numbers = [getattr(signal, name) for name in (*names, "SIGALRM") if hasattr(signal, name)]
    before = {number: signal.getsignal(number) for number in numbers}
    handled = {number for number in numbers if before[number] != signal.SIG_IGN}
    for number in handled:
        signal.signal(number, handle)
    try:
        yield lambda: bool(received)
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        for number in handled:
            signal.signal(number, before[number])
