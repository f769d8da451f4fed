"""What the model families have in common: a checkpoint's frozen parts and the denoisers loaded from it.

A backend owns what is never trained (autoencoder, text encoders, forward process) and hands out denoisers as plain
modules; policy and reference are such modules, and the training loop changes them. Everything that a pipeline of
diffusers can do is left to that pipeline, so that results cannot drift from it; a family (`families`) adds how its
denoiser is called and how its latents and embeddings are shaped.
"""

import inspect
import warnings
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import cached_property
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import torch
from torch import Generator, Tensor, nn

from workbench.common.errors import UserError, one_line, shown
from workbench.common.validation import EDGE
from workbench.method.noise import ForwardProcess, diffusion
from workbench.models import checks
from workbench.models.checkpoints import Checkpoint, digest_of
from workbench.models.layers import prepare, store_half
from workbench.models.lora import Adapter, save_adapter
from workbench.models.safe_loading import explained, load_network, require_finite

#: What a denoiser is given beside x_t and t: text embeddings and the like, by name, each of shape (B, ...).
Condition = Mapping[str, Tensor]

#: The file that `save_lora_weights` of diffusers writes and `load_lora_weights` reads.
LORA_FILE = "pytorch_lora_weights.safetensors"


class Backend(ABC):
    """One checkpoint, ready to encode images and captions, to denoise, to sample and to save.

    Attributes:
        checkpoint: the folder that everything is read from.
        device, dtype, resolution: see below.
        process: forward process and training target at each t; tensors of shape (T,) on the CPU.
        sampler: class name of the diffusers scheduler that draws samples.

    Args:
        checkpoint: the folder, opened by `checkpoints.fetch`.
        device: where everything runs.
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
    #: Ends of the names of the layers that LoRA adapts by default, as diffusers' training scripts choose them.
    LORA_TARGETS: ClassVar[tuple[str, ...]] = ("to_q", "to_k", "to_v", "to_out.0")
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
        # The parts come first: everything below reads their configs.
        self._require_parts()
        self._corrected = self._corrections()
        self.scheduler = checks.load_scheduler(checkpoint, getattr(diffusers, self.SCHEDULER), self._corrected)
        self.sampler = self.SCHEDULER
        checks.require_sizes(checkpoint, self.DENOISER, self._vae_channels, self.PACKING)
        self._shapes_tried: set[tuple] = set()  # those that `require_fit` found to be taken
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
    def _predict(self, denoiser: nn.Module, x_t: Tensor, time: Tensor, condition: Condition) -> Tensor:
        """Call the denoiser as its pipeline does.

        Args:
            x_t: noised latents, (B, C, H, W).
            time: `process.time` at each sample's t, (B,).
        Returns:
            What `process.target` is compared with, (B, C, H, W).
        """

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

    def _sampler_options(self, captions: list[str], guidance: float) -> dict[str, Any]:
        """Arguments of the pipeline's call that differ between families, for these captions."""
        return {"guidance_scale": guidance}

    def _from_pipeline(self, latents: Tensor) -> Tensor:
        """Latents (B, C, H, W) from what the pipeline returns as `output_type="latent"`: by default the same."""
        return latents

    def pair_condition(self, height: int, width: int, top: int, left: int) -> dict[str, Tensor]:
        """What a denoiser is given of a pair beside its caption: nothing, except for SDXL.

        Args:
            height, width: of the original image, pixels.
            top, left: corner of the crop after resizing, pixels.
        Returns:
            Tensors by name, without a batch dimension.
        """
        return {}

    # Denoisers

    def denoiser(
        self, half: bool = False, device: torch.device | str | None = None, trained: Path | None = None
    ) -> nn.Module:
        """Load a new copy of the pretrained denoiser, frozen and in eval mode.

        Args:
            half: store the weights of linear and convolution layers in `dtype`, as autocast would cast them anyway:
                half the memory, the same outputs to the bit. For models that are not trained. See `store_half`.
            device: default: the backend's.
            trained: a folder that `save` wrote, whose denoiser is loaded in the pretrained one's place.
        Raises:
            UserError: the folder has no denoiser, or one of other layers.
        """
        module = self._load_denoiser(trained or self.folder, str(trained or self.checkpoint.name))
        if trained:
            ours, theirs = (
                {name: p.shape for name, p in one.named_parameters()} for one in (module, self._placeholder)
            )
            if ours != theirs:
                raise UserError(f"{trained}: its {self.DENOISER} has other layers than {self.checkpoint.name}'s")
        return (store_half(module, self.dtype) if half else module).to(device or self.device)

    def load_trained(self, folder: Path) -> nn.Module:
        """Load a denoiser that `save` wrote, frozen and in eval mode.

        Args:
            folder: holds the denoiser's folder, or LoRA weights for this backend's pretrained denoiser.
        Raises:
            UserError: the folder holds neither, or weights that do not fit.
        """
        if (folder / self.DENOISER).is_dir():
            return self._load_denoiser(folder, str(folder)).to(self.device)
        weights = folder / LORA_FILE
        if not weights.is_file():
            raise UserError(f"{folder}: holds neither {self.DENOISER}/ nor {LORA_FILE}")
        module: Any = self.denoiser()
        with explained(f"{weights}: on {self.checkpoint.source}"):
            module.load_lora_adapter(
                str(folder), prefix=self.DENOISER, weight_name=weights.name, use_safetensors=True, local_files_only=True
            )
        if not getattr(module, "peft_config", None):  # diffusers only warns where no name in the file matches
            raise UserError(f"{weights}: holds no LoRA weights for this family's {self.DENOISER}")
        require_finite(module, str(weights))
        return module.eval().requires_grad_(False)

    def _load_denoiser(self, folder: Path, name: str) -> nn.Module:
        """Load the denoiser below a folder in float32, frozen and in eval mode; `name` is the folder in messages."""
        return prepare(self._read_denoiser(folder, name)).eval().requires_grad_(False)

    def _read_denoiser(self, folder: Path, name: str) -> nn.Module:
        import diffusers

        variant = {"variant": self.checkpoint.variant} if self.checkpoint.variant else {}
        kind, part = getattr(diffusers, self.DENOISER_CLASS), self.DENOISER
        return load_network(kind, folder / part, f"{name}: {part}", torch_dtype=torch.float32, **variant)

    def denoise(self, denoiser: nn.Module, x_t: Tensor, t: Tensor, condition: Condition) -> Tensor:
        """Predict noise or velocity, whichever `process.target` is, in the precision `dtype`.

        Args:
            x_t: noised latents, (B, C, H, W).
            t: places on the timestep axis, int64, (B,).
            condition: see Condition.
        Returns:
            Prediction, (B, C, H, W).
        """
        with self._precision():
            return self._predict(denoiser, x_t, self._time[t], condition)

    def require_fit(self, latents: Tensor, condition: Condition) -> None:
        """Check that the denoiser takes latents and embeddings of these shapes.

        The denoiser runs on the meta device, which computes shapes and nothing else; each combination is tried once.

        Raises:
            UserError: it does not take them.
        """
        shapes = (latents.shape, *sorted((name, x.shape) for name, x in condition.items()))
        if shapes in self._shapes_tried:
            return
        on_meta = {name: x.to("meta", torch.float32) for name, x in condition.items()}
        time = torch.zeros(len(latents), device="meta")
        try:
            # Without autocast, which the meta device does not have.
            self._predict(self._placeholder, latents.to("meta", torch.float32), time, on_meta)
        except (RuntimeError, ValueError, TypeError) as error:
            parts = f"its {self.DENOISER} does not take what its autoencoder and text encoders make"
            raise UserError(f"{self.checkpoint.name}: {parts} ({one_line(error)})") from None
        self._shapes_tried.add(shapes)

    @cached_property
    def _parts_fit(self) -> bool:
        """True, once `require_fit` has passed for this backend's own latents and embeddings."""
        condition = {name: x[None] for name, x in self.pair_condition(self.resolution, self.resolution, 0, 0).items()}
        self.require_fit(torch.empty(1, *self.latent_shape, device="meta"), condition | self.encode_text([""]))
        return True

    @cached_property
    def _time(self) -> Tensor:
        return self.process.time.to(self.device)

    def _precision(self) -> torch.autocast:
        return torch.autocast(self.device.type, self.dtype, enabled=self.dtype != torch.float32)

    # The frozen parts, which lie in the family's pipeline

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

    @contextmanager
    def _pipeline_with(self, denoiser: nn.Module) -> Iterator[Any]:
        """The pipeline with a denoiser in it, taken out at the end so that its memory can be freed."""
        pipe = self.pipeline
        with Adapter.active(denoiser) as module:
            pipe.register_modules(**{self.DENOISER: module})
            try:
                yield pipe
            finally:
                pipe.register_modules(**{self.DENOISER: self._placeholder})

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
        return self._embed(list(captions))

    def require_steps(self, steps: int) -> None:
        """Raise UserError where a sampler is to take more steps than the model has timesteps."""
        if steps > self.timesteps:
            raise UserError(f"{steps} steps of the sampler: {self.checkpoint.name} has {self.timesteps} timesteps")

    @torch.no_grad()
    def sample(
        self,
        denoiser: nn.Module,
        captions: Sequence[str],
        seeds: Sequence[int],
        *,
        steps: int,
        guidance: float,
        batch_size: int,
        drawn: Callable[[int], object] = lambda count: None,
    ) -> np.ndarray:
        """Sample one image a caption through diffusers' own pipeline.

        Args:
            seeds: one an image; each image has its own generator, so it does not depend on its batch.
            steps: of the sampler.
            guidance: scale of the guidance, the pipeline's `guidance_scale`.
            batch_size: images at once.
            drawn: called after each batch with how many images it has drawn.
        Returns:
            (N, H, W, 3), uint8.
        Raises:
            UserError: more steps than the model has timesteps, or parts that do not fit together.
        """
        self.require_steps(steps)
        assert self._parts_fit  # raises where they do not
        self._loaded_pipeline()
        images = []
        with self._pipeline_with(denoiser) as pipe:
            for start in range(0, len(captions), batch_size):
                chunk = slice(start, start + batch_size)
                texts = list(captions[chunk])
                options = self._sampler_options(texts, guidance)
                with self._precision():
                    # Latents only: under autocast the autoencoder would decode in half precision, and overflow.
                    latents = pipe(
                        prompt=texts,
                        height=self.resolution,
                        width=self.resolution,
                        num_inference_steps=steps,
                        # On the CPU: diffusers then draws noise there, and a seed gives the same on every device.
                        generator=[Generator().manual_seed(seed) for seed in seeds[chunk]],
                        output_type="latent",
                        **options,
                    ).images
                images.append(self.decode_images(self._from_pipeline(latents)))
                drawn(len(texts))
        return np.concatenate(images)

    # Files

    def save(self, denoiser: nn.Module, folder: Path, whole: bool = True) -> None:
        """Write a trained denoiser so that plain diffusers loads it.

        Adapters are written as LoRA weights, whatever `whole` says.

        Args:
            whole: write a complete checkpoint, with copies of this one's other parts; else the denoiser's folder alone.
        """
        if isinstance(denoiser, Adapter):
            save_adapter(denoiser, folder, self.PIPELINE, self.DENOISER)
            return
        if whole:
            self.checkpoint.copy_parts(folder, without=self.DENOISER)
        denoiser.save_pretrained(folder / self.DENOISER, variant=self.checkpoint.variant or None)  # type: ignore[operator]

    def digest(self, *parts: str) -> str:
        """Digest of the files of some parts and of how they are used: precision, variant and resolution."""
        places = {part: self.checkpoint.place(part) for part in parts}
        # By the component's name, not by where it lies: a digest is the same on every machine.
        found = ((part, f) for part, place in places.items() for f in place.rglob("*") if f.is_file())
        files = [f for _, f in sorted(found, key=lambda each: (each[0], each[1].relative_to(places[each[0]]).parts))]
        # Part of the digest, so that samples which were drawn without the correction are not taken from the cache.
        corrected = "".join(f"-{k}={v}" for k, v in self._corrected.items()) if "scheduler" in parts else ""
        return f"{self.dtype}-{self.checkpoint.variant}-{self.resolution}-{digest_of(files)}{corrected}"
