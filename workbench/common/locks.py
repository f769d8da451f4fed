"""Locks shared by all processes that use a database or a folder."""

import hashlib
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from urllib.parse import unquote

from filelock import FileLock, ReadWriteLock, Timeout

from workbench.common.files import create_as_umask_says
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
        engine = _lock_engine(url)
        retry_connections(engine, patience)
        with engine.connect() as connection:  # the lock belongs to the connection and ends with it
            connection.exec_driver_sql(f"SELECT pg_advisory_lock({_advisory_key(purpose)})")
            yield
        return
    with FileLock(_lock_file(url, purpose)):
        yield


@contextmanager
def try_use(url: str, purpose: str, *, alone: bool) -> Iterator[bool]:
    """Hold a lock of a database that many processes may share, or one may have alone; does not wait.

    A process that dies releases it.

    Args:
        url, purpose: as `exclusive`, whose locks these are not.
        alone: share it with nobody.
    Yields:
        Whether it was taken: others share it, or one has it alone, where it was not.
    """
    if url.startswith("postgresql"):
        function = "pg_try_advisory_lock" if alone else "pg_try_advisory_lock_shared"
        connection = _lock_engine(url).connect()
        try:
            yield bool(connection.exec_driver_sql(f"SELECT {function}({_advisory_key(purpose)})").scalar())
        finally:
            # Instead of closing it, which fails where the server has gone away in the hours between.
            connection.invalidate()
        return
    file = _lock_file(url, purpose)
    create_as_umask_says(file)
    # No singleton: those of one process would share their hold.
    lock = ReadWriteLock(file, blocking=False, is_singleton=False)
    with _tried(lock.acquire_write if alone else lock.acquire_read, lock.close) as taken:
        yield taken


def remove_lock(url: str, purpose: str) -> None:
    """Remove what a lock has left of itself. Nobody may be about to take it."""
    if not url.startswith("postgresql"):
        _lock_file(url, purpose).unlink(missing_ok=True)


def _lock_file(url: str, purpose: str) -> Path:
    """The file of a lock on a database without locks of its own; its folder is created."""
    if url.startswith("sqlite:///"):
        database = unquote(url.removeprefix("sqlite:///").partition("?")[0])
        path = Path(".".join(filter(None, (database, purpose, "lock"))))
    else:
        path = state_path("locks", hashlib.sha256(f"{url} {purpose}".encode()).hexdigest()[:16])
    path.parent.mkdir(parents=True, exist_ok=True)
    return path


def _lock_engine(url: str) -> Any:
    """Connections of which each may hold a lock of PostgreSQL."""
    from sqlalchemy import create_engine
    from sqlalchemy.pool import NullPool

    # NullPool: a pool would keep the connection open, and with it the lock. AUTOCOMMIT: no transaction stays open while
    # the lock is held.
    return create_engine(url, poolclass=NullPool, isolation_level="AUTOCOMMIT")


@contextmanager
def try_lock(path: Path) -> Iterator[bool]:
    """Lock a folder for this process; yields False where another process holds it. Death releases the lock."""
    path.parent.mkdir(parents=True, exist_ok=True)
    lock = FileLock(lock_beside(path), blocking=False)
    with _tried(lock.acquire, lock.release) as taken:
        yield taken


def lock_beside(path: Path) -> Path:
    """The file by which `try_lock` locks a folder; it stays when the lock is released."""
    path = path.resolve()  # "." has no name, and a folder may be called in several ways
    return path.with_name(f"{path.name}.lock")


@contextmanager
def _tried(acquire: Callable[[], object], release: Callable[[], object]) -> Iterator[bool]:
    """Hold a lock that does not wait; yields False where it was not taken, and then nothing is released."""
    try:
        acquire()
    except Timeout:
        yield False
        return
    try:
        yield True
    finally:
        release()


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
