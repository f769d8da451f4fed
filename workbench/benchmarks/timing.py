"""How long things take, as ratios of measurements taken in turn: absolute times drift on a shared machine."""

import time
from collections.abc import Callable

import numpy as np
import torch
from numpy.typing import NDArray
from tqdm import tqdm

Work = Callable[[], object]
CPU = torch.device("cpu")


def wait(device: torch.device) -> None:
    """Block until the device has finished all work that was queued on it."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def seconds(work: Work, device: torch.device = CPU) -> float:
    """Wall-clock time of one call, the device's work included."""
    # Calls only queue work on a GPU: what was queued before must not count, and what this call queues must.
    wait(device)
    begin = time.perf_counter()
    work()
    wait(device)
    return time.perf_counter() - begin


def in_turn(
    *works: Work, repeats: int, device: torch.device = CPU, warm: int = 3, name: str = ""
) -> NDArray[np.float64]:
    """Seconds of each work, measured A, B, A, B, ..., so that what slows the machine down meets all alike.

    Args:
        warm: rounds that are not measured.
    Returns:
        Shape (works, repeats).
    """
    for _ in range(warm):
        for work in works:
            work()
    rounds = tqdm(range(repeats), desc=name, leave=False, disable=None)
    return np.array([[seconds(work, device) for work in works] for _ in rounds]).T
