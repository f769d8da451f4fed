"""Locks shared by all processes that use a database or a folder."""

import hashlib
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from urllib.parse import unquote

from filelock import FileLock, Timeout

from workbench.common.paths import state_path


@contextmanager
def exclusive(url: str, purpose: str = "", patience: float = 0.0) -> Iterator[None]:
    """Hold a lock that all processes on a database share. A process that dies releases it.

    PostgreSQL has advisory locks, which hold across machines. An sqlite database, whose users are all on one machine,
    gets a lock file beside it. The database may still be empty. Not reentrant.

    Args:
        url: of the database, as SQLAlchemy reads it; for any other address the lock file is in the state folder.
        purpose: names the lock; locks of different purposes do not exclude each other.
        patience: seconds to wait for a database that is away.
    """
    if url.startswith("postgresql"):
        from sqlalchemy import create_engine, text
        from sqlalchemy.pool import NullPool

        # NullPool: a pool would keep the connection open, and with it the lock. AUTOCOMMIT: no transaction stays open
        # while the lock is held.
        engine = create_engine(url, poolclass=NullPool, isolation_level="AUTOCOMMIT")
        retry_connections(engine, patience)
        with engine.connect() as connection:  # the lock belongs to the connection and ends with it
            connection.execute(text("SELECT pg_advisory_lock(:key)"), {"key": _advisory_key(purpose)})
            yield
        return
    if url.startswith("sqlite:///"):
        database = unquote(url.removeprefix("sqlite:///").partition("?")[0])
        path = Path(".".join(filter(None, (database, purpose, "lock"))))
    else:
        path = state_path("locks", hashlib.sha256(f"{url} {purpose}".encode()).hexdigest()[:16])
    path.parent.mkdir(parents=True, exist_ok=True)
    with FileLock(path):
        yield


@contextmanager
def try_lock(path: Path) -> Iterator[bool]:
    """Lock a folder for this process; yields False where another process holds it. Death releases the lock."""
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


def retry_connections(engine: Any, patience: float) -> None:
    """Let new connections of an SQLAlchemy engine wait up to `patience` seconds for a database that is away."""
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


def _advisory_key(purpose: str) -> int:
    """A key of PostgreSQL's advisory locks that no other program is likely to use."""
    # 7 bytes: PostgreSQL's key is a signed number of 8.
    return int.from_bytes(hashlib.sha256(f"diffusion-dpo-workbench{purpose}".encode()).digest()[:7], "big")
