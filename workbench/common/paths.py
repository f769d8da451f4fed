"""Where files lie: those that come with the workbench, and those that must survive a process."""

import os
import platform
from pathlib import Path

PACKAGE = Path(__file__).parent.parent


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


def state_path(*parts: str) -> Path:
    """A path under $WORKBENCH_STATE, by default .workbench in the working folder.

    Snapshots of unfinished runs lie there, and outboxes with what a tracking store has not accepted yet. Workers on
    several machines that continue each other's trials have to share it.
    """
    return Path(os.environ.get("WORKBENCH_STATE", ".workbench")).resolve().joinpath(*parts)


def state_place() -> str:
    """Which state folder this process has, as a text that can be compared: HOST:PATH."""
    return f"{platform.node()}:{state_path()}"


def storage_url() -> str:
    """Address of the study database: $WORKBENCH_STORAGE, or optuna.db in the working folder."""
    return os.environ.get("WORKBENCH_STORAGE") or f"sqlite:///{Path('optuna.db').resolve()}"


def storage_place(url: str | None = None) -> str:
    """Which study database an address means, as a text that can be shown and compared: HOST:PATH, or HOST:PORT/NAME.

    Two addresses of one database, with another user or driver, give the same text.
    """
    from sqlalchemy import make_url

    address = make_url(storage_url() if url is None else url)
    if address.drivername.startswith("sqlite"):
        return f"{platform.node()}:{Path(address.database or ':memory:').resolve()}"
    return f"{address.host}:{address.port or 5432}/{address.database}"
