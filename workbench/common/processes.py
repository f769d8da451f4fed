"""A name for a process that no other process ever has, and whether that process has ended."""

import os
import platform

import psutil


def this_process() -> str:
    """Machine, process id and start time of this process, as one text: `HOST/NAMESPACE|PID|SECONDS`."""
    try:
        # Containers of one host name count their processes from 1 each, but have process namespaces of their own.
        namespace = str(os.stat("/proc/self/ns/pid").st_ino)
    except OSError:
        namespace = ""
    return f"{platform.node()}/{namespace}|{os.getpid()}|{psutil.Process().create_time():.2f}"


def place_of(process: str) -> tuple[str, str]:
    """The machine and the process id in a name that `this_process` gave; empty where they are not in it."""
    place, _, rest = process.partition("|")
    return place.partition("/")[0], rest.partition("|")[0]


def is_gone(process: str) -> bool | None:
    """Whether a process, named by `this_process`, has ended; None if it ran where this machine cannot see it."""
    place, _, rest = process.partition("|")
    pid, _, started = rest.partition("|")
    # Process ids mean something only where they were given: the same host, the same namespace.
    if place != this_process().partition("|")[0]:
        return None
    try:
        there = psutil.Process(int(pid))
        # Another start time means that the id was given to a new process.
        return f"{there.create_time():.2f}" != started or there.status() == psutil.STATUS_ZOMBIE
    except psutil.Error:
        return True


def cores() -> int:
    """The cores that this process may use: in a container or a job often fewer than the machine has."""
    # macOS does not say which those are.
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
