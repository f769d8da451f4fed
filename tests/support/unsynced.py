"""Import it, and this process no longer waits until what it writes is on the disk.

That helps against a power cut alone, and no test has one: what a killed process has written stays with the kernel. On
an ordinary disk each commit of a database takes 5 to 20 ms for it, and a study commits hundreds of times.
"""

import os
import sqlite3
from typing import Any

from sqlalchemy import event
from sqlalchemy.engine import Engine


@event.listens_for(Engine, "connect")
def _leave_it_to_the_kernel(connection: Any, _record: Any) -> None:
    if isinstance(connection, sqlite3.Connection):
        connection.execute("PRAGMA synchronous = OFF")


def _fsync(descriptor: int) -> None:
    os.fstat(descriptor)  # raises where os.fsync would: for a descriptor that is closed


os.fsync = _fsync
