"""Where the workbench keeps what must survive a process, who may touch it, and what of a place's name may be shown."""

import hashlib
import os
import platform
import re
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from urllib.parse import unquote

import psutil
from filelock import FileLock, Timeout


def state(*parts: str) -> Path:
    """A place under $WORKBENCH_STATE, or under .workbench in the working folder.

    Snapshots of unfinished runs lie there, and what a tracking store that is away has not taken yet. Workers on several
    machines that are to take up each other's trials have to share it.
    """
    return Path(os.environ.get("WORKBENCH_STATE", ".workbench")).resolve().joinpath(*parts)


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


def this_process() -> str:
    """Machine, process and when it began: what nobody else ever is."""
    try:
        namespace = str(os.stat("/proc/self/ns/pid").st_ino)  # containers of one name count their processes anew
    except OSError:
        namespace = ""
    return f"{platform.node()}/{namespace}|{os.getpid()}|{psutil.Process().create_time():.2f}"


def is_gone(process: str) -> bool | None:
    """Whether a process, as `this_process` calls it, has ended; None where this machine cannot know."""
    place, _, rest = process.partition("|")
    pid, _, began = rest.partition("|")
    if place != this_process().partition("|")[0]:
        return None
    try:
        found = psutil.Process(int(pid))
        return f"{found.create_time():.2f}" != began or found.status() == psutil.STATUS_ZOMBIE
    except psutil.Error:
        return True


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


_URLS = ("MLFLOW_TRACKING_URI", "WORKBENCH_STORAGE")
_SECRETS = ("MLFLOW_TRACKING_PASSWORD", "MLFLOW_TRACKING_TOKEN", "PGPASSWORD", "HF_TOKEN", "AWS_SECRET_ACCESS_KEY")
_USER = re.compile(r"(?<=://)[^\s/'\"<>]*@")
_NAMED = re.compile(
    r"((?:password|passwd|pwd|\btoken|secret|api_?key)=|\b(?:Basic|Bearer) (?=[\w+/=.-]{12}))[^\s&'\",;)]+",
    re.IGNORECASE,
)


def hide_passwords(text: str) -> str:
    """A text as it may be shown or kept: a URL, or a message that speaks of one, without what logs somebody in.

    What is hidden: user and password of URLs, values of password=, token= and the like, and the secrets of this
    process's environment wherever they stand.
    """
    for secret in _secrets():
        text = text.replace(secret, "***")
    return _NAMED.sub(r"\1***", _USER.sub("***@", text))


def _secrets() -> set[str]:
    """Those of the environment; too short ones, and those that are also the user's name, would hide plain words."""
    found = {os.environ.get(name, "") for name in _SECRETS}
    for url in (os.environ.get(name, "") for name in _URLS):
        user, _, password = url.partition("://")[2].rpartition("@")[0].partition(":")
        found |= {password} - {user}
        found |= {value for _, value in re.findall(r"[?&](password|sslpassword|token)=([^&]+)", url)}
    return {secret for each in found for secret in (each, unquote(each)) if len(secret) > 3}
