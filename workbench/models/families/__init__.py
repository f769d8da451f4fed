"""The model families by name. To add one, write its class and name it here; docs/real-models.md says what it needs."""

from workbench.models.backend import Backend
from workbench.models.families.flux import Flux1
from workbench.models.families.stable_diffusion import StableDiffusion, StableDiffusion3, StableDiffusionXL

__all__ = ["FAMILIES"]

FAMILIES: dict[str, type[Backend]] = {
    "sd": StableDiffusion,
    "sdxl": StableDiffusionXL,
    "sd3": StableDiffusion3,
    "flux1": Flux1,
}
