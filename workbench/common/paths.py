"""Where files lie: those that come with the workbench, and those that must survive a process."""

import os
from pathlib import Path

PACKAGE = Path(__file__).parent.parent


def shipped(name: str | Path) -> Path:
    """A file or folder of `experiments/` or `notebooks/`, which come with the workbench.

    In a checkout they lie beside the package, where people look for them; in an installation inside it, as
    `workbench/shipped/` (pyproject.toml maps them there).

    Args:
        name: relative to the checkout, such as "experiments/default.toml".
    """
    installed = PACKAGE / "shipped" / name
    return installed if installed.exists() else PACKAGE.parent / name


def state(*parts: str) -> Path:
    """A place under $WORKBENCH_STATE, or under .workbench in the working folder.

    Snapshots of unfinished runs lie there, and what a tracking store that is away has not taken yet. Workers on several
    machines that are to take up each other's trials have to share it.
    """
    return Path(os.environ.get("WORKBENCH_STATE", ".workbench")).resolve().joinpath(*parts)
