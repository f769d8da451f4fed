"""The model families by name. To add one, write its class and name it here; docs/architecture.md lists the rest."""

from workbench.models.backend import Backend
from workbench.models.families.flux import Flux1, Flux2Klein
from workbench.models.families.qwen_image import QwenImage
from workbench.models.families.sana import Sana
from workbench.models.families.stable_diffusion import StableDiffusion, StableDiffusion3, StableDiffusionXL
from workbench.models.families.z_image import ZImage

__all__ = ["FAMILIES"]

FAMILIES: dict[str, type[Backend]] = {
    "sd": StableDiffusion,
    "sdxl": StableDiffusionXL,
    "sd3": StableDiffusion3,
    "flux1": Flux1,
    "flux2-klein": Flux2Klein,
    "qwen-image": QwenImage,
    "z-image": ZImage,
    "sana": Sana,
}
