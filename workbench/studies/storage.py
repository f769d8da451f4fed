"""The study database: Optuna's own, on sqlite for one machine or PostgreSQL for many."""

import os
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import optuna
from optuna.storages import RDBStorage
from sqlalchemy import Engine, event
from sqlalchemy.exc import SQLAlchemyError

from workbench.common.errors import Failure, one_line
from workbench.common.locks import exclusive, retry_connections
from workbench.common.secrets import hide_passwords

optuna.logging.set_verbosity(optuna.logging.ERROR)
PATIENCE = 600.0  #: seconds to wait for a database that was reachable before


def storage_url() -> str:
    """$WORKBENCH_STORAGE, or optuna.db in the working folder."""
    return os.environ.get("WORKBENCH_STORAGE") or f"sqlite:///{Path('optuna.db').resolve()}"


def grace() -> int:
    """Seconds without a heartbeat after which a worker is taken for dead: $WORKBENCH_GRACE, or 60."""
    return int(os.environ.get("WORKBENCH_GRACE", "60"))


@contextmanager
def locked(url: str, patience: float = 0.0) -> Iterator[None]:
    """Hold the lock of a study database: whoever changes something because of what it read holds it.

    Raises:
        Failure: the database cannot be reached.
    """
    with ExitStack() as stack:
        try:
            stack.enter_context(exclusive(url, patience=patience))
        except (SQLAlchemyError, ImportError, OSError) as error:
            raise _unreachable(url, error) from None
        yield


def _unreachable(url: str, error: Exception) -> Failure:
    return Failure(f"study storage {hide_passwords(url)} cannot be opened ({hide_passwords(one_line(error))})")


def open_storage(url: str) -> RDBStorage:
    """The study database, its schema created if it is missing; running trials have a heartbeat.

    Hold `locked(url)` if this may be the first to open it, since two processes that create the schema at once fail.
    Once open, a database that goes away is waited for.

    Raises:
        Failure: the database cannot be opened.
    """
    sqlite = url.startswith("sqlite")
    options: dict[str, Any] = {"connect_args": {"timeout": 60}} if sqlite else {"pool_pre_ping": True}
    try:
        storage = RDBStorage(url, engine_kwargs=options, heartbeat_interval=max(1, grace() // 4), grace_period=grace())
    except Exception as error:  # whatever the database's driver raises
        raise _unreachable(url, error) from None
    if sqlite:
        _one_writer(storage.engine)
    else:
        retry_connections(storage.engine, PATIENCE)
    return storage


def find_study(name: str, storage: RDBStorage) -> optuna.Study | None:
    """The study of that name, or None."""
    return optuna.load_study(study_name=name, storage=storage) if name in optuna.get_all_study_names(storage) else None


def _one_writer(engine: Engine) -> None:
    """Let every sqlite transaction begin with the write lock.

    Otherwise two workers can read that a trial waits, and both take it. Other databases lock the row. This is the
    recipe of SQLAlchemy's manual for sqlite.
    """
    engine.dispose()  # connections made before there were listeners

    @event.listens_for(engine, "connect")
    def _disable_implicit_begin(connection: Any, record: Any) -> None:
        connection.isolation_level = None

    @event.listens_for(engine, "begin")
    def _begin(connection: Any) -> None:
        connection.exec_driver_sql("BEGIN IMMEDIATE")
