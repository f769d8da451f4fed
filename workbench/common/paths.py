"""Where files lie: those that come with the workbench, and those that must survive a process."""

import os
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
