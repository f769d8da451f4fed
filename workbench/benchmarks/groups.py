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
    "peers": ("peers", "peers"),
    "quality": ("quality", "quality"),
    "workers": ("workers", "workers"),
    "pruning": ("pruning", "pruning"),
}
SLOW = ("parts", "quality", "workers", "pruning")
GROWTH, PEERS = "growth", "peers"


def chosen_groups(only: Sequence[str], quick: bool, peers: bool = False) -> list[str]:
    """The groups to measure, in order.

    Args:
        only: names; empty = all.
        quick: leave out the slow ones of all.
        peers: whether there are public scripts to compare with; without any their group is left out of all.
    """
    left_out = {*(SLOW if quick else ()), *(() if peers else (PEERS,))}
    return [name for name in GROUPS if (name in only if only else name not in left_out)]
