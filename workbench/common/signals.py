"""Stopping on signals at a moment when nothing is half done."""

import signal
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType

PATIENCE = 15.0  #: seconds until a stop is forced; schedulers kill a process some 30 seconds after their signal


@contextmanager
def held(*names: str) -> Iterator[None]:
    """Inside, the first of these signals waits until the end, so that it does not cut something short; a second acts.

    For work of moments that leaves something behind where it is not done, such as handing trials back. Signals that are
    ignored, or that Python does not handle, stay as they are; only in the main thread.
    """
    waiting: list[int] = []
    numbers = [getattr(signal, name) for name in names if hasattr(signal, name)]
    before = {number: signal.getsignal(number) for number in numbers}
    handlers = {number: handler for number, handler in before.items() if callable(handler)}

    def handle(number: int, frame: FrameType | None) -> None:
        waiting.append(number)
        if len(waiting) > 1:
            handlers[number](number, frame)

    for number in handlers:
        signal.signal(number, handle)
    try:
        yield
    finally:
        for number, handler in handlers.items():
            signal.signal(number, handler)
    # A second one has acted at once, for both.
    if len(waiting) == 1:
        # After the handlers are back, so that it acts as if it had come now.
        signal.raise_signal(waiting[0])


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
    # nohup, for one, ignores SIGHUP, and what it starts must go on when the terminal closes.
    handled = {number for number in numbers if before[number] != signal.SIG_IGN}
    for number in handled:
        signal.signal(number, handle)
    try:
        yield lambda: bool(received)
    finally:
        # Before the handlers are put back: SIGALRM's default ends the process.
        signal.setitimer(signal.ITIMER_REAL, 0)
        for number in handled:
            signal.signal(number, before[number])
