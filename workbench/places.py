"""Where the workbench keeps what must survive a process, and who may touch it: state folder and locks."""

import hashlib
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from filelock import FileLock


def state(*parts: str) -> Path:
    """A place under $WORKBENCH_STATE, or under .workbench in the working folder.

    Snapshots of unfinished runs lie there, and what a tracking store that is away has not taken yet. Workers on several
    machines that are to take up each other's trials have to share it.
    """
    return Path(os.environ.get("WORKBENCH_STATE", ".workbench")).resolve().joinpath(*parts)


@contextmanager
def exclusive(url: str) -> Iterator[None]:
    """Hold a lock that all processes on a database share; a process that dies lets go of it.

    PostgreSQL's advisory lock, across machines; for sqlite, whose users are all on one machine, a lock file beside it.
    Nothing has to be in the database yet. Not reentrant.

    Args:
        url: of the database, as SQLAlchemy reads it; of any other kind of place, the lock is this machine's state folder's.
    """
    if url.startswith("postgresql"):
        from sqlalchemy import create_engine, text
        from sqlalchemy.pool import NullPool

        engine = create_engine(url, poolclass=NullPool, isolation_level="AUTOCOMMIT")
        with engine.connect() as connection:  # the lock goes with the connection
            connection.execute(text("SELECT pg_advisory_lock(:key)"), {"key": _KEY})
            yield
        return
    if url.startswith("sqlite:///"):
        path = Path(url.removeprefix("sqlite:///") + ".lock")
    else:
        path = state("locks", hashlib.sha256(url.encode()).hexdigest()[:16])
    path.parent.mkdir(parents=True, exist_ok=True)
    with FileLock(path):
        yield


_KEY = int.from_bytes(hashlib.sha256(b"diffusion-dpo-workbench").digest()[:7], "big")
