"""Tensors that cost time to compute, kept on disk under a digest of what they were computed from."""

import hashlib
import logging
from collections.abc import Callable
from pathlib import Path

from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from workbench.common.distributed import agreed
from workbench.common.errors import Failure
from workbench.common.files import in_place, require_readable
from workbench.common.paths import cache_folder

log = logging.getLogger(__name__)


def digest(*recipe: object) -> str:
    """SHA-256 over the text of everything that decides a result."""
    return hashlib.sha256("\n".join(str(part) for part in recipe).encode()).hexdigest()


def cached(kind: str, key: str, compute: Callable[[], dict[str, Tensor]]) -> dict[str, Tensor]:
    """What `compute` returns, from disk where it was computed before; written atomically, recomputed if damaged.

    Args:
        kind: first part of the file's name.
        key: digest of everything the result depends on.
    Raises:
        Failure: the cache cannot be written, or this user may not read what is in it.
    """
    path = cache_folder() / f"{kind}-{key[:32]}.safetensors"
    found = _read(path)
    if agreed(found is not None):  # on several processes `compute` may need all of them
        assert found is not None
        return found
    tensors = compute()
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with in_place(path) as partial:
            # safetensors refuses tensors with gaps in memory, such as slices.
            save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, partial)
    except (OSError, SafetensorError) as error:
        raise Failure(f"{path.parent}: cannot be written ({error}); free some space or set WORKBENCH_CACHE") from None
    return tensors


def _read(path: Path) -> dict[str, Tensor] | None:
    if not path.is_file():
        return None
    require_readable(path, "set WORKBENCH_CACHE to another folder")
    try:
        return load_file(path)
    except (SafetensorError, OSError):
        log.warning("%s is damaged: computing it again", path)
        return None
