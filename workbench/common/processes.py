"""The name of a process that nobody else ever has, and whether it has ended."""

import os
import platform

import psutil


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
