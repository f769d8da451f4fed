"""Stopping: asked for by a signal, granted where nothing is half done."""

import signal
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType

PATIENCE = 15.0  # schedulers kill what has not ended after some 30 seconds


@contextmanager
def asked_to_stop(*names: str, patience: float = PATIENCE) -> Iterator[Callable[[], bool]]:
    """Within, these signals ask to stop, and what is returned says whether one has.

    Whoever asks a second time, or has waited for so many seconds, gets a KeyboardInterrupt wherever the process is.

    Args:
        names: of signals; those that this system does not have, and those that are ignored, stay as they are.
    """
    asked: list[int] = []

    def hear(number: int, frame: FrameType | None) -> None:
        asked.append(number)
        if len(asked) > 1 or number == signal.SIGALRM:
            raise KeyboardInterrupt
        signal.setitimer(signal.ITIMER_REAL, patience)

    numbers = [getattr(signal, name) for name in (*names, "SIGALRM") if hasattr(signal, name)]
    before = {number: signal.getsignal(number) for number in numbers}
    heard = {number for number in numbers if before[number] != signal.SIG_IGN}
    for number in heard:
        signal.signal(number, hear)
    try:
        yield lambda: bool(asked)
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        for number in heard:
            signal.signal(number, before[number])
