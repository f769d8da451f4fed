"""Tensors that cost time to compute, kept on disk under a digest of what they were computed from."""

import hashlib
import logging
import os
from collections.abc import Callable
from pathlib import Path

from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

log = logging.getLogger(__name__)


def folder() -> Path:
    """$WORKBENCH_CACHE, or .cache/workbench in the working folder."""
    return Path(os.environ.get("WORKBENCH_CACHE", ".cache/workbench")).resolve()


def digest(*recipe: object) -> str:
    """SHA-256 over the text of everything that decides a result."""
    return hashlib.sha256("\n".join(str(part) for part in recipe).encode()).hexdigest()


def cached(kind: str, key: str, compute: Callable[[], dict[str, Tensor]]) -> dict[str, Tensor]:
    """What `compute` returns, from disk where it was computed before; written atomically, recomputed if damaged.

    Args:
        kind: first part of the file's name.
        key: digest of everything the result depends on.
    """
    path = folder() / f"{kind}-{key[:32]}.safetensors"
    if path.is_file():
        try:
            return load_file(path)
        except (SafetensorError, OSError):
            log.warning("%s is damaged: computing it again", path)
    tensors = compute()
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_suffix(f".{os.getpid()}")
    save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, partial)
    os.replace(partial, path)
    return tensors
