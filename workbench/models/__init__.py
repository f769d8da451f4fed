"""Diffusion models: checkpoints of several families behind one interface, LoRA, random-weight shapes, the small model.

`load` opens a checkpoint as a `Backend`. A family is one class in `families`; all else is diffusers' own pipeline of
that family. Weights that come from elsewhere are read through `safe_loading`.
"""

import torch

from workbench.common.errors import UserError
from workbench.models.backend import Backend, Condition
from workbench.models.checkpoints import ASSETS, HUB_ID, digest_of, family_of, fetch
from workbench.models.families import FAMILIES
from workbench.models.lora import adapt
from workbench.models.random_weights import SHAPES, Shape, random_backend

__all__ = [
    "ASSETS", "FAMILIES", "HUB_ID", "SHAPES", "Backend", "Condition", "Shape", "adapt", "digest_of", "fetch", "load",
    "random_backend",
]  # fmt: skip


def load(
    source: str,
    device: torch.device,
    dtype: torch.dtype = torch.float32,
    *,
    family: str = "auto",
    revision: str = "",
    variant: str = "",
    vae: str = "",
    resolution: int = 0,
) -> Backend:
    """Open a checkpoint as the backend of its family.

    Args:
        source: a diffusers folder, a hub id, or "embedded" for the small model that comes with the workbench.
        device: where everything runs.
        dtype: precision of forward passes; trained weights, errors and the autoencoder stay float32.
        resolution: edge of the square images in pixels; 0 = the model's own.
        family: a name in FAMILIES that the checkpoint must be of, or "auto" for any.
        revision: branch, tag or commit of a hub id.
        variant: which of the checkpoint's weight files to read, such as "fp16".
        vae: folder or hub id of an autoencoder that takes the place of the checkpoint's own; "" = none.
    Raises:
        UserError: the checkpoint is not there, not in diffusers' layout, or of another family.
        Failure: the hub does not answer.
    """
    checkpoint = fetch(source, revision, variant, vae)
    actual = family_of(checkpoint, {kind.PIPELINE: name for name, kind in FAMILIES.items()})
    if family not in ("auto", actual):
        raise UserError(f"model.family = {family!r}: {source} is a {actual!r} checkpoint ({checkpoint.pipeline})")
    return FAMILIES[actual](checkpoint, device, dtype, resolution)
