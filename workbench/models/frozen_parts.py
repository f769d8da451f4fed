"""What of a checkpoint is never trained: autoencoder, text encoders, forward process.

They are loaded as diffusers' own pipeline of the family, so that what images and captions become cannot drift from it.
"""

import inspect
import warnings
from abc import ABC, abstractmethod
from collections.abc import Sequence
from functools import cached_property
from typing import Any, ClassVar

import numpy as np
import torch
from torch import Tensor, nn

from workbench.common.errors import UserError, shown
from workbench.common.validation import EDGE
from workbench.method.noise import ForwardProcess, diffusion
from workbench.models import checks
from workbench.models.checkpoints import Checkpoint, digest_of
from workbench.models.safe_loading import explained


class FrozenParts(ABC):
    """The frozen parts of one checkpoint, which encode images and captions and decode latents.

    Attributes:
        checkpoint: the folder that everything is read from.
        device, dtype, resolution: see below.
        process: forward process and training target at each t; tensors of shape (T,) on the CPU.
        sampler: class name of the diffusers scheduler that draws samples.

    Args:
        checkpoint: the folder, opened by `checkpoints.fetch`.
        device: where everything runs. On a CUDA device cuDNN's attention is switched off, for the whole process.
        dtype: precision of forward passes, by autocast; trained weights, errors and the autoencoder stay float32.
        resolution: edge of the square images in pixels; 0 = the model's own.
    Raises:
        UserError: a part is missing or invalid, the parts do not fit together, or the model predicts something that
            the family does not.
    """

    #: Class of the diffusers pipeline that the checkpoint names.
    PIPELINE: ClassVar[str]
    #: The denoiser's folder in the checkpoint, its class, and the class of the scheduler that draws samples.
    DENOISER: ClassVar[str] = "unet"
    DENOISER_CLASS: ClassVar[str] = "UNet2DConditionModel"
    SCHEDULER: ClassVar[str] = "DDIMScheduler"
    #: Edge, in latents, of the images that the model was trained on, where its denoiser's config does not say.
    SAMPLE_SIZE: ClassVar[int | None] = None
    #: Edge of the patch of latents that the pipeline packs into one input of the denoiser.
    PACKING: ClassVar[int] = 1
    #: Text encoders and tokenizers: with the autoencoder, the parts that decide what images and captions become.
    ENCODERS: ClassVar[tuple[str, ...]]

    def __init__(
        self, checkpoint: Checkpoint, device: torch.device, dtype: torch.dtype = torch.float32, resolution: int = 0
    ):
        import diffusers

        self.checkpoint, self.device, self.dtype = checkpoint, device, dtype
        self.folder = checkpoint.folder
        if device.type == "cuda":
            # On Hopper GPUs torch 2.11 to 2.13 prefer cuDNN's attention, whose backward pass returns NaN for some masks
            # (pytorch issue 196678; trl issue 7181 is a DPO training that it broke).
            torch.backends.cuda.enable_cudnn_sdp(False)
        # The parts come first: everything below reads their configs.
        self._require_parts()
        self._corrected = self._corrections()
        self.scheduler = checks.load_scheduler(checkpoint, getattr(diffusers, self.SCHEDULER), self._corrected)
        self.sampler = self.SCHEDULER
        checks.require_sizes(checkpoint, self.DENOISER, self._vae_channels, self.PACKING)
        # The resolution before the process: flow-matching families shift their timestep axis by the image's size.
        self.resolution = self._checked(resolution) if resolution else self._own_resolution()
        self.process = self._process()
        checks.require_noise(checkpoint, self.process.abar)

    @property
    def timesteps(self) -> int:
        """T, the number of training timesteps."""
        return len(self.process)

    @property
    def latent_shape(self) -> tuple[int, int, int]:
        """Channels, height and width of one image's latents."""
        edge = self.resolution // self._pixels_per_latent
        return self._vae_channels, edge, edge

    @property
    def parts(self) -> tuple[str, ...]:
        """Names of all parts that decide what is sampled."""
        return (*self.ENCODERS, "vae", "scheduler", self.DENOISER)

    # What differs between families

    def _require_parts(self) -> None:
        self.checkpoint.require(self.DENOISER, "vae", *self.ENCODERS, "scheduler")

    def _corrections(self) -> dict[str, Any]:
        """Settings of the scheduler in which the checkpoint's config is not followed; by default none."""
        return {}

    def _process(self) -> ForwardProcess:
        """Forward process and target on the axis t = 0..T-1, noise growing with t; by default that of diffusion."""
        kind = self.scheduler.config.prediction_type
        try:
            return diffusion(self.scheduler.alphas_cumprod.float(), kind)
        # TypeError: a config may give a list here, which cannot be looked up.
        except (KeyError, TypeError):
            raise UserError(
                f"{self.checkpoint.name}: the model predicts {shown(kind)}; expected 'epsilon' or 'v_prediction'"
            ) from None

    @abstractmethod
    def _embed(self, captions: list[str]) -> dict[str, Tensor]:
        """Text embeddings by name, each (N, ...), from the pipeline's own `encode_prompt`."""

    def _encode(self, vae: Any, images: Tensor) -> Tensor:
        """Latents as the denoiser expects them, of images (N, 3, H, W) in -1..1: the posterior's mean, normalized."""
        # SD1.x's and SDXL's autoencoders have no shift: their configs say None.
        return (vae.encode(images).latent_dist.mean - (vae.config.shift_factor or 0.0)) * vae.config.scaling_factor

    def _decode(self, vae: Any, latents: Tensor) -> Tensor:
        """Images (N, 3, H, W) in about -1..1, of latents as `_encode` makes them."""
        raw = latents / vae.config.scaling_factor + (vae.config.shift_factor or 0.0)
        return vae.decode(raw, return_dict=False)[0]

    # The pipeline

    @cached_property
    def pipeline(self) -> Any:
        """The family's diffusers pipeline, loaded on first use, with a placeholder in the denoiser's place.

        Training needs none of it once the pairs are encoded, so a run on encoded pairs never loads it.
        """
        import diffusers

        kind, checkpoint = getattr(diffusers, self.PIPELINE), self.checkpoint
        known = inspect.signature(kind.__init__).parameters
        # Other entries are plain arguments of the pipeline, such as SDXL's force_zeros_for_empty_prompt.
        given: dict[str, Any] = {k: v for k, v in checkpoint.index.items() if k in known and not isinstance(v, list)}
        # No safety checker: it would black out images of random weights, and the comparison needs every image.
        given |= {name: None for name in checkpoint.parts if name in known} | {"requires_safety_checker": False}
        # Every part is None until here, so that optional ones which are not needed stay so.
        parts = {name: self._load_part(name) for name in ("vae", *self.ENCODERS) if checkpoint.parts[name][0]}
        checks.require_tokens(checkpoint, parts)
        given |= {self.DENOISER: self._placeholder, "scheduler": self.scheduler, **parts}
        with explained(checkpoint.name), warnings.catch_warnings():
            warnings.simplefilter("ignore")  # pipelines warn of a missing safety checker and of old configs
            pipe = kind(**{name: value for name, value in given.items() if name in known})
        pipe.set_progress_bar_config(disable=True)
        for part in self._frozen(pipe):
            part.eval().requires_grad_(False)
        return pipe

    def _load_part(self, name: str) -> Any:
        """Load a tokenizer, a text encoder in `dtype`, or the autoencoder in float32, as it overflows in half."""
        if name.startswith("tokenizer"):
            with explained(f"{self.checkpoint.name}: {name}"):
                return self.checkpoint.kind(name).from_pretrained(self.folder / name, local_files_only=True)
        return self.checkpoint.load(name, torch_dtype=torch.float32 if name == "vae" else self.dtype)

    @cached_property
    def _placeholder(self) -> nn.Module:
        """A denoiser on the meta device: no weights, but the config that pipelines ask their denoiser for."""
        import diffusers

        kind = getattr(diffusers, self.DENOISER_CLASS)
        with torch.device("meta"):
            return kind.from_config(kind.load_config(self.folder, subfolder=self.DENOISER))

    def _frozen(self, pipe: Any) -> list[nn.Module]:
        """Autoencoder and text encoders of a pipeline."""
        return [m for name, m in pipe.components.items() if isinstance(m, nn.Module) and name != self.DENOISER]

    def _loaded_pipeline(self) -> Any:
        """The pipeline with its frozen parts on the device."""
        for part in self._frozen(self.pipeline):
            part.to(self.device)
        return self.pipeline

    def offload(self) -> None:
        """Move autoencoder and text encoders from a GPU to the CPU; they come back when they are next needed."""
        if self.device.type != "cuda":
            return
        if "pipeline" in self.__dict__:  # the attribute itself would load it
            for part in self._frozen(self.pipeline):
                part.to("cpu")
        torch.cuda.empty_cache()

    # Images and captions

    @cached_property
    def _vae_channels(self) -> int:
        """Channels of the autoencoder's latents."""
        return self.checkpoint.number("vae", "latent_channels", 4, 1, 1024)

    @cached_property
    def _pixels_per_latent(self) -> int:
        """Pixels along an edge that become one latent of the autoencoder."""
        return 2 ** checks.halvings(self.checkpoint, "vae")

    @cached_property
    def _patch(self) -> int:
        """Edge, in latents of the autoencoder, of the patch that the denoiser treats as one."""
        return self.PACKING * self.checkpoint.number(self.DENOISER, "patch_size", 1, 1, 64)

    def _own_resolution(self) -> int:
        """Edge in pixels of the images that the model was trained on."""
        pixels = self._pixels_per_latent
        return self.checkpoint.number(self.DENOISER, "sample_size", self.SAMPLE_SIZE, 1, EDGE // pixels) * pixels

    def _checked(self, resolution: int) -> int:
        """The resolution itself.

        Raises:
            UserError: the model cannot halve it as often as it has to; names the nearest edges that it can.
        """
        if resolution > EDGE:
            raise UserError(f"model.resolution = {resolution}: expected at most {EDGE}")
        # A transformer lists no blocks and halves nothing. 8: the pipelines of SD1.x and SDXL refuse other edges.
        halvings = checks.halvings(self.checkpoint, self.DENOISER)
        step = max(8, self._pixels_per_latent * self._patch * 2**halvings)
        if resolution % step:
            near = sorted({max(step, resolution // step * step), -(-resolution // step) * step})
            raise UserError(
                f"model.resolution = {resolution}: this model's edges are multiples of {step}; try "
                + " or ".join(map(str, near))
            )
        return resolution

    @property
    def images_at_once(self) -> int:
        """Images in one call of the autoencoder: 8 at 512 pixels, 2 at 1024; even, as pairs come in twos."""
        return 2 * max(1, min(64, 2**20 // self.resolution**2))

    @torch.no_grad()
    def encode_images(self, pixels: np.ndarray) -> Tensor:
        """Latents of images: means of the autoencoder's posterior, shifted and scaled as the denoiser expects them.

        Args:
            pixels: (N, H, W, 3), uint8.
        Returns:
            (N, C, h, w), float32, on the device.
        """
        vae, latents = self._loaded_pipeline().vae, []
        for chunk in torch.from_numpy(pixels).split(self.images_at_once):
            batch = chunk.to(self.device).permute(0, 3, 1, 2).float() / 127.5 - 1
            latents.append(self._encode(vae, batch))
        return torch.cat(latents)

    @torch.no_grad()
    def decode_images(self, latents: Tensor) -> np.ndarray:
        """Images of latents as `encode_images` makes them, decoded in float32.

        Args:
            latents: (N, C, h, w).
        Returns:
            (N, H, W, 3), uint8.
        """
        pipe = self._loaded_pipeline()
        images = [
            pipe.image_processor.postprocess(self._decode(pipe.vae, chunk), output_type="np")
            for chunk in latents.float().split(self.images_at_once)
        ]
        return (np.concatenate(images) * 255).round().astype(np.uint8)

    @torch.no_grad()
    def encode_text(self, captions: Sequence[str]) -> dict[str, Tensor]:
        """Text embeddings by name, each (N, ...), as the family's pipeline makes and pads them."""
        self._loaded_pipeline()
        # Some configs are first found wrong here: a text encoder loads without the number of its last token, say.
        with explained(f"{self.checkpoint.name}: its text encoders", "do not take a caption"):
            return self._embed(list(captions))

    # Files

    def digest(self, *parts: str) -> str:
        """Digest of the files of some parts and of how they are used: precision, variant and resolution."""
        places = {part: self.checkpoint.place(part) for part in parts}
        # By the component's name, not by where it lies: a digest is the same on every machine.
        found = ((part, f) for part, place in places.items() for f in place.rglob("*") if f.is_file())
        files = [f for _, f in sorted(found, key=lambda each: (each[0], each[1].relative_to(places[each[0]]).parts))]
        # Part of the digest, so that samples which were drawn without the correction are not taken from the cache.
        corrected = "".join(f"-{k}={v}" for k, v in self._corrected.items()) if "scheduler" in parts else ""
        # How a denoiser computes in half precision has changed: its norms were float32 on a GPU.
        computed = "-norms" if self.DENOISER in parts and self.dtype != torch.float32 else ""
        return f"{self.dtype}{computed}-{self.checkpoint.variant}-{self.resolution}-{digest_of(files)}{corrected}"
