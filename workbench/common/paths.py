"""Where files lie: those that come with the workbench, and those that must survive a process."""

import os
import platform
from collections.abc import Iterator
from contextlib import contextmanager
from errno import EACCES, EDQUOT, ENOSPC, EPERM, EROFS
from pathlib import Path
from tempfile import NamedTemporaryFile
from urllib.parse import quote, unquote

from workbench.common.errors import Failure, UserError

PACKAGE = Path(__file__).parent.parent
PLAIN = " +/"  #: what SQLAlchemy leaves as it is in a database's path, beside letters, digits and _.-~
#: Errors of the system that are about a place, not about the workbench.
_ABOUT_PLACES = (EACCES, EPERM, EROFS, ENOSPC, EDQUOT)


def checkout() -> Path | None:
    """The repository's folder where the workbench runs from one; None where it is installed."""
    return None if (PACKAGE / "shipped").exists() else PACKAGE.parent


def shipped(name: str | Path) -> Path:
    """A file or folder of `experiments/` or `notebooks/`, which come with the workbench.

    In a checkout they lie beside the package, where people look for them; in an installation inside it, as
    `workbench/shipped/` (pyproject.toml maps them there).

    Args:
        name: relative to the checkout, such as "experiments/default.toml".
    """
    installed = PACKAGE / "shipped" / name
    return installed if installed.exists() else PACKAGE.parent / name


def shipped_where_missing(path: Path, name: str | Path) -> Path:
    """A file of the user's; the workbench's own of that name where the user has none and the workbench has one."""
    own = shipped(name)
    return own if own.is_file() and not path.is_file() else path


def state_path(*parts: str) -> Path:
    """A path under $WORKBENCH_STATE, by default .workbench in the working folder.

    Snapshots of unfinished runs lie there, and outboxes with what a tracking store has not accepted yet. Workers on
    several machines that continue each other's trials have to share it.
    """
    return folder_from("WORKBENCH_STATE", ".workbench").joinpath(*parts)


def state_place() -> str:
    """Which state folder this process has, as a text that can be compared: HOST:PATH."""
    return f"{platform.node()}:{state_path()}"


def cache_folder() -> Path:
    """$WORKBENCH_CACHE, or .cache/workbench in the working folder."""
    return folder_from("WORKBENCH_CACHE", ".cache/workbench")


def require_places() -> None:
    """Make sure that snapshots and encoded data can be written, before anything is trained that could not be kept.

    Raises:
        Failure: one of the folders cannot be written; names the variable that moves it.
    """
    for folder in (state_path(), cache_folder()):
        try:
            folder.mkdir(parents=True, exist_ok=True)
            # By making a file: modes do not tell of a disk that is read-only.
            with NamedTemporaryFile(dir=folder, prefix=".probe-"):
                pass
        except OSError as error:
            raise _unusable(folder, error) from None


@contextmanager
def places_explained() -> Iterator[None]:
    """What the system says of a place that cannot be written or read becomes one line, with the variable that moves it.

    Raises:
        Failure: instead of an OSError about permissions, or about a disk that is read-only or full.
    """
    try:
        yield
    except OSError as error:
        if error.errno not in _ABOUT_PLACES or not isinstance(error.filename, str | Path):
            raise
        raise _unusable(Path(error.filename), error) from None


def _unusable(path: Path, error: OSError) -> Failure:
    """A line about a path that cannot be used, with the variable that moves it elsewhere, where there is one."""
    home = Path(os.environ.get("HOME", "/"))
    movable = {
        "WORKBENCH_STATE": state_path(),
        "WORKBENCH_CACHE": cache_folder(),
        "HF_HOME": Path(os.environ.get("HF_HOME", home / ".cache/huggingface")),
        "MPLCONFIGDIR": Path(os.environ.get("MPLCONFIGDIR", home / ".config/matplotlib")),
        "HOME": home,
        "TMPDIR": Path(os.environ.get("TMPDIR", "/tmp")),
    }
    # The first that fits: HOME comes after those that may lie below it.
    variable = next((name for name, folder in movable.items() if path.absolute().is_relative_to(folder)), None)
    remedy = f"set {variable} to another folder" if variable else "work in another folder"
    return Failure(f"{path}: cannot be used ({error.strerror}); make it accessible, or {remedy}")


def storage_url() -> str:
    """Address of the study database: $WORKBENCH_STORAGE, or optuna.db in the working folder."""
    return database_url("WORKBENCH_STORAGE", "optuna.db")


def folder_from(variable: str, default: str) -> Path:
    """The folder that an environment variable names, absolute; `~` is the home folder."""
    return Path(os.environ.get(variable) or default).expanduser().resolve()


def database_url(variable: str, default: str) -> str:
    """The database that an environment variable names, or an sqlite file in the working folder.

    Args:
        default: the file's name.
    Raises:
        UserError: an address whose path would end at a question mark.
    """
    text = os.environ.get(variable)
    if not text:
        return sqlite_url(Path(default).resolve())
    scheme, slashes, rest = text.partition(":///")
    if not scheme.startswith("sqlite") or not slashes:
        return text
    path, mark, options = rest.partition("?")
    if "/" in options:  # SQLAlchemy would take what follows for options, and open a file of another name
        raise UserError(f"{variable} = {text!r}: a question mark in a path is written %3F")
    if path.startswith("~"):
        path = quote(str(Path(unquote(path)).expanduser()), safe=PLAIN)
    return f"{scheme}{slashes}{path}{mark}{options}"


def sqlite_url(path: Path) -> str:
    """The address of an sqlite file, whatever characters are in its path."""
    return f"sqlite:///{quote(str(path), safe=PLAIN)}"


def storage_place(url: str | None = None) -> str:
    """Which study database an address means, as a text that can be shown and compared: HOST:PATH, or HOST:PORT/NAME.

    Two addresses of one database, with another user or driver, give the same text.
    """
    from sqlalchemy import make_url

    address = make_url(storage_url() if url is None else url)
    if address.drivername.startswith("sqlite"):
        return f"{platform.node()}:{Path(address.database or ':memory:').resolve()}"
    return f"{address.host}:{address.port or 5432}/{address.database}"
