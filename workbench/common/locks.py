"""Locks that all processes on a database or a folder share."""

import hashlib
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout

from workbench.common.paths import state


@contextmanager
def exclusive(url: str, what: str = "", patience: float = 0.0) -> Iterator[None]:
    """Hold a lock that all processes on a database share; a process that dies lets go of it.

    PostgreSQL's advisory lock, across machines; for sqlite, whose users are all on one machine, a lock file beside it.
    Nothing has to be in the database yet. Not reentrant.

    Args:
        url: of the database, as SQLAlchemy reads it; for any other kind of place, the lock is in the state folder.
        what: is done meanwhile; locks of other purposes are other locks.
        patience: seconds for which a database that is away is waited for.
    """
    if url.startswith("postgresql"):
        from sqlalchemy import create_engine, text
        from sqlalchemy.pool import NullPool

        engine = create_engine(url, poolclass=NullPool, isolation_level="AUTOCOMMIT")
        wait_for(engine, patience)
        with engine.connect() as connection:  # the lock goes with the connection
            connection.execute(text("SELECT pg_advisory_lock(:key)"), {"key": _key(what)})
            yield
        return
    if url.startswith("sqlite:///"):
        path = Path(".".join(filter(None, (url.removeprefix("sqlite:///"), what, "lock"))))
    else:
        path = state("locks", hashlib.sha256(f"{url} {what}".encode()).hexdigest()[:16])
    path.parent.mkdir(parents=True, exist_ok=True)
    with FileLock(path):
        yield


@contextmanager
def claimed(path: Path) -> Iterator[bool]:
    """Hold a folder for this process alone; what is returned says whether it could be had. Freed at its death."""
    path.parent.mkdir(parents=True, exist_ok=True)
    lock = FileLock(path.with_name(f"{path.name}.lock"))
    try:
        lock.acquire(blocking=False)
    except Timeout:
        yield False
        return
    try:
        yield True
    finally:
        lock.release()


def wait_for(engine: Any, patience: float) -> None:
    """Let an SQLAlchemy engine's new connections wait, so many seconds, for a database that is away."""
    from sqlalchemy import event

    @event.listens_for(engine, "do_connect")
    def _connect(dialect: Any, record: Any, arguments: Any, options: Any) -> Any:
        begin, pause = time.monotonic(), 0.2
        while True:
            try:
                return dialect.connect(*arguments, **options)
            except dialect.dbapi.OperationalError:
                if time.monotonic() - begin > patience:
                    raise
            time.sleep(pause)
            pause = min(5.0, 2 * pause)


def _key(what: str) -> int:
    """A number for PostgreSQL that no other program is likely to lock."""
    return int.from_bytes(hashlib.sha256(f"diffusion-dpo-workbench{what}".encode()).digest()[:7], "big")
