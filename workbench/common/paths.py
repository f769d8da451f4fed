"""Where the workbench keeps what must survive a process."""

import os
from pathlib import Path


def state(*parts: str) -> Path:
    """A place under $WORKBENCH_STATE, or under .workbench in the working folder.

    Snapshots of unfinished runs lie there, and what a tracking store that is away has not taken yet. Workers on several
    machines that are to take up each other's trials have to share it.
    """
    return Path(os.environ.get("WORKBENCH_STATE", ".workbench")).resolve().joinpath(*parts)
