"""The benchmark's groups by name; nothing that is slow to import, since `--help` lists them.

To add one: a function of `figure.Options` that yields figures as they are measured, and an entry here.
"""

from collections.abc import Sequence

#: In the order of measuring: name -> (module of this package, function).
GROUPS = {
    "limits": ("limits", "limits"),
    "step": ("step", "steps"),
    "reference": ("step", "machinery"),
    "diagnostics": ("diagnostics", "diagnostics"),
    "encode": ("encoding", "encode"),
    "start": ("start", "start"),
    "parts": ("parts", "parts"),
    "memory": ("memory", "peak"),
    "report": ("report", "report"),
    "tracking": ("tracking", "tracking"),
    "quality": ("quality", "quality"),
    "workers": ("workers", "workers"),
    "pruning": ("pruning", "pruning"),
}
SLOW = ("quality", "workers", "pruning")
GROWTH = "growth"


def chosen_groups(only: Sequence[str], quick: bool) -> list[str]:
    """The groups to measure, in order.

    Args:
        only: names; empty = all.
        quick: leave out the slow ones of all.
    """
    return [name for name in GROUPS if (name in only if only else not (quick and name in SLOW))]
