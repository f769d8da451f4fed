"""The study database: Optuna's own, on sqlite for one machine or PostgreSQL for many."""

import glob
import json
import re
import shlex
import sqlite3
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, closing, contextmanager, suppress
from pathlib import Path
from typing import Any

import optuna
from optuna import Study
from optuna.exceptions import ExperimentalWarning
from optuna.storages import RDBStorage
from optuna.trial import FrozenTrial
from sqlalchemy import Engine, event, make_url, text
from sqlalchemy.exc import SQLAlchemyError

from workbench.common import files
from workbench.common.errors import Failure, UserError, one_line
from workbench.common.locks import exclusive, retry_connections, try_use
from workbench.common.paths import storage_place
from workbench.common.secrets import hide_passwords
from workbench.common.validation import whole_number
from workbench.studies.records import StudyRecord
from workbench.training.sections import Direction

optuna.logging.set_verbosity(optuna.logging.ERROR)
PATIENCE = 600.0  #: seconds to wait for a database that was reachable before


def grace() -> int:
    """Seconds without a heartbeat after which a worker is taken for dead: $WORKBENCH_GRACE, or 60.

    Raises:
        UserError: the variable has no such number.
    """
    return whole_number("WORKBENCH_GRACE", 60, least=1)


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
            # ImportError: the driver of PostgreSQL is not installed.
            raise _unreachable(url, error) from None
        yield


@contextmanager
def in_use(url: str, token: str) -> Iterator[None]:
    """Say, for as long as a command works on a study, that somebody does. Hold `locked(url)` at its beginning.

    A command works on a study also while it prepares, and between two trials, when no trial is running.
    """
    # Nobody has it alone: whoever wants that holds `locked(url)` too.
    with try_use(url, token, alone=False):
        yield


@contextmanager
def unused(url: str, token: str) -> Iterator[bool]:
    """Whether no command works on a study; none begins meanwhile. Hold `locked(url)`."""
    with try_use(url, token, alone=True) as taken:
        yield taken


def _unreachable(url: str, error: Exception) -> Failure:
    place, reason = hide_passwords(url), hide_passwords(one_line(error))
    return Failure(f"study storage {place} cannot be opened ({reason}); WORKBENCH_STORAGE takes another")


def open_storage(url: str) -> RDBStorage:
    """The study database, its schema created if it is missing; running trials have a heartbeat.

    Hold `locked(url)` if this may be the first to open it, since two processes that create the schema at once fail.
    Once open, a database that goes away is waited for.

    Raises:
        Failure: the database cannot be opened.
    """
    sqlite = url.startswith("sqlite")
    _create_file(url)
    # sqlite lets a writer wait this many seconds for another one, where the driver's default is 5. Other databases: a
    # connection that the server has closed meanwhile is replaced before it is used.
    options: dict[str, Any] = {"connect_args": {"timeout": 60}} if sqlite else {"pool_pre_ping": True}
    patience = grace()
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", ExperimentalWarning)  # that heartbeats are experimental
            # Four heartbeats a grace, so that a late one costs nobody a trial.
            storage = RDBStorage(
                url, engine_kwargs=options, heartbeat_interval=max(1, patience // 4), grace_period=patience
            )
    except Exception as error:  # whatever the database's driver raises
        raise _unreachable(url, error) from None
    if sqlite:
        _one_writer(storage.engine)
    else:
        retry_connections(storage.engine, PATIENCE)
    return storage


def require_writable(url: str) -> None:
    """Make sure that a study database can be changed, before anything relies on it.

    Raises:
        Failure: it is an sqlite file that this user may not write, or one of its locks is.
    """
    if url.startswith("sqlite") and (file := make_url(url).database):
        # The locks too, which lie beside it: whoever made the database alone writable may not take them.
        remedy = f"let this user: chmod g+rw {shlex.quote(file)}*, or name another with WORKBENCH_STORAGE"
        database = Path(file)
        for path in [database, *sorted(database.parent.glob(f"{glob.escape(database.name)}.*lock"))]:
            files.require_writable(path, "study storage", remedy)


def _create_file(url: str) -> None:
    """Make the file of an sqlite database that is not there."""
    file = make_url(url).database if url.startswith("sqlite") else None
    if file and file != ":memory:":
        with suppress(OSError):  # said by whoever opens it
            files.create_as_umask_says(Path(file))


def missing(url: str) -> str | None:
    """The line for the person where a study database is a file that is not there; None else.

    To be asked before it is opened only to be read: opening an sqlite database creates it.
    """
    file = make_url(url).database if url.startswith("sqlite") else None
    if not file or file == ":memory:" or Path(file).exists():
        return None
    return f"no study yet: there is no {file} (WORKBENCH_STORAGE says where studies lie); run python -m workbench.sweep"


def find_study(name: str, storage: RDBStorage) -> Study | None:
    """The study of that name, or None.

    Raises:
        UserError: a study of that name was not made by the workbench, so nothing may be done to it.
    """
    if name not in optuna.get_all_study_names(storage):
        return None
    study = optuna.load_study(study_name=name, storage=storage)
    if not StudyRecord.of(study).is_ours:
        raise UserError(
            f"study {name!r} of {storage_place(str(storage.url))} was not made by the workbench and is left as it is; "
            "choose another --study name, or another database with WORKBENCH_STORAGE"
        )
    return study


def own_studies(storage: RDBStorage) -> dict[str, StudyRecord]:
    """The studies that the workbench made, by name."""
    summaries = optuna.get_all_study_summaries(storage, include_best_trial=False)
    records = {summary.study_name: StudyRecord.from_attributes(summary.user_attrs) for summary in summaries}
    return {name: record for name, record in records.items() if record.is_ours and not is_draft(name)}


def names(url: str) -> list[str]:
    """Names of all studies in a storage that the workbench made; none where it is a file that is not there."""
    if missing(url):  # asked first, since locking and opening would make files
        return []
    with locked(url):
        return list(own_studies(open_storage(url)))


def require_study(name: str, url: str) -> Study:
    """The study of that name.

    Raises:
        UserError: there is none, or the workbench did not make it; the message names those there are.
    """
    if none := missing(url):
        raise UserError(f"study {name!r}: {none}")
    with locked(url):
        study = find_study(name, open_storage(url))
    if study is None:
        raise UserError(f"study {name!r}: not found; there are: {', '.join(names(url)) or 'none yet'}")
    return study


def create_whole(
    name: str, storage: RDBStorage, token: str, directions: Sequence[Direction], fill: Callable[[Study], None]
) -> Study:
    """Create a study that never exists by half: under a draft's name, filled, then renamed.

    Hold the storage's lock. A draft that a kill has left is removed when the study is created the next time.

    Args:
        fill: stores attributes and queues trials.
    """
    for leftover in optuna.get_all_study_names(storage):
        if is_draft(leftover) and leftover.startswith(f"{name}."):
            optuna.delete_study(study_name=leftover, storage=storage)
    draft = f"{name}.{token}.draft"
    fill(optuna.create_study(study_name=draft, storage=storage, directions=directions))
    rename(storage, draft, name)
    # Loaded anew, since the object that was filled keeps the draft's name.
    return optuna.load_study(study_name=name, storage=storage)


def rename(storage: RDBStorage, old: str, new: str) -> None:
    """Give a study another name in the database; Optuna has no call for that."""
    with storage.engine.begin() as connection:
        query = text("UPDATE studies SET study_name = :new WHERE study_name = :old")
        connection.execute(query, {"old": old, "new": new})


def set_pruned_value(study: Study, trial: FrozenTrial, value: float | None) -> None:
    """Give a pruned trial of a study of one objective its value; None = what that would be is not known.

    Optuna gives it the last value that the pruner saw, which may be of another metric and of another size, and lists it
    beside the objective of complete trials. It changes no trial that has ended, so this does it in the database.

    Args:
        value: a finite number, or None.
    """
    engine: Engine = getattr(study._storage, "_backend", study._storage).engine  # type: ignore[union-attr]
    row = {"id": trial._trial_id, "value": value}
    with engine.begin() as connection:
        # Removed first: Optuna has no row where the pruner saw no number, and says in another column of it whether the
        # value is infinite.
        connection.execute(text("DELETE FROM trial_values WHERE trial_id = :id"), row)
        if value is not None:
            # The type is written out, since PostgreSQL takes no parameter of text for its enumeration.
            new = "INSERT INTO trial_values (trial_id, objective, value, value_type) VALUES (:id, 0, :value, 'FINITE')"
            connection.execute(text(new), row)


def has_study(path: Path, token: str) -> bool:
    """Whether an sqlite database, which is not changed, has the study with this token."""
    query = "SELECT 1 FROM study_user_attributes WHERE key = 'token' AND value_json = ?"
    try:
        # Read only: sqlite would otherwise create a database that is not there.
        with closing(sqlite3.connect(f"{path.as_uri()}?mode=ro", uri=True, timeout=10)) as connection:
            return connection.execute(query, (json.dumps(token),)).fetchone() is not None
    except sqlite3.Error:  # it is not there, or no study database
        return False


def is_draft(name: str) -> bool:
    """Whether a study was still being created when its process died."""
    return re.fullmatch(r".+\.[0-9a-f]{12}\.draft", name) is not None


def _one_writer(engine: Engine) -> None:
    """Let every sqlite transaction begin with the write lock.

    Otherwise two workers can read that a trial waits, and both take it. Other databases lock the row. This is the
    recipe of SQLAlchemy's manual for sqlite.
    """
    engine.dispose()  # connections made before there were listeners

    @event.listens_for(engine, "connect")
    def _disable_implicit_begin(connection: Any, record: Any) -> None:
        # Otherwise the driver begins transactions by itself, and without the write lock.
        connection.isolation_level = None

    @event.listens_for(engine, "begin")
    def _begin(connection: Any) -> None:
        connection.exec_driver_sql("BEGIN IMMEDIATE")
