"""How long some functions take inside of a larger piece of work."""

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import wraps
from threading import Lock
from typing import Any


@contextmanager
def stopwatch(owner: Any, *names: str) -> Iterator[dict[str, float]]:
    """Add up the seconds spent in functions of an object or a module, by name, while the context lasts.

    The functions are wrapped and put back, so callers have to look them up on the owner. Calls in several threads add
    up each by itself: the sum may be more than the time that has passed.
    """
    spent, before = dict.fromkeys(names, 0.0), {name: getattr(owner, name) for name in names}
    # A method found on the class is deleted from the object again: set back, it would hide the class's for ever.
    own = {name: name in vars(owner) for name in names}
    lock = Lock()

    def timed(name: str) -> Callable:
        @wraps(before[name])
        def call(*arguments: Any, **options: Any) -> Any:
            begin = time.perf_counter()
            try:
                return before[name](*arguments, **options)
            finally:
                took = time.perf_counter() - begin
                with lock:  # += reads and writes: of two threads at once, one's seconds would be lost
                    spent[name] += took

        return call

    for name in names:
        setattr(owner, name, timed(name))
    try:
        yield spent
    finally:
        for name in names:
            if own[name]:
                setattr(owner, name, before[name])
            else:  # it was a method of the owner's class, which the wrapper hid
                delattr(owner, name)
