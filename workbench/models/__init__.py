"""Diffusion model families behind one small interface: SD1.x and SD2.x, SDXL, SD3.

A backend owns what is frozen (autoencoder, text encoders, forward process) and makes denoisers; policy and reference
are plain modules that it hands out and the trainer moves. A family is one class in `families`; everything else is
diffusers' own pipeline of that family.
"""

import torch

from workbench.common.errors import UserError
from workbench.models.backend import Backend, Condition, store_half
from workbench.models.checkpoints import ASSETS, family_of, fetch
from workbench.models.families import FAMILIES

__all__ = ["ASSETS", "FAMILIES", "Backend", "Condition", "load", "store_half"]


def load(
    source: str,
    device: torch.device,
    dtype: torch.dtype = torch.float32,
    *,
    family: str = "auto",
    revision: str = "",
    variant: str = "",
    resolution: int = 0,
) -> Backend:
    """The backend of a checkpoint.

    Args:
        source: a diffusers folder, a hub id, or "embedded" for the small model that comes with the workbench.
        family: a name in FAMILIES, or "auto": as the checkpoint says.
        revision: branch, tag or commit of a hub id.
        variant: which of the checkpoint's weight files, such as "fp16".
    Raises:
        UserError: it is not there, not a diffusers checkpoint, or of another family.
    """
    checkpoint = fetch(source, revision, variant)
    found = family_of(checkpoint, {kind.PIPELINE: name for name, kind in FAMILIES.items()})
    if family not in ("auto", found):
        raise UserError(f"model.family = {family!r}: {source} is a {found!r} checkpoint ({checkpoint.pipeline})")
    return FAMILIES[found](checkpoint, device, dtype, resolution)
