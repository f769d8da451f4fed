"""What the model families have in common: a checkpoint's frozen parts and the denoisers made from it."""

import inspect
import warnings
from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping, Sequence
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
from workbench.models.checkpoints import Checkpoint, digest_of, explained, load_network, require_finite
from workbench.models.lora import Adapter, save_adapter

#: Embeddings and the like that go into a denoiser beside x_t and t, by name, each of shape (B, ...).
Condition = Mapping[str, Tensor]


class Backend(ABC):
    """A checkpoint folder in diffusers' layout.

    Attributes:
        process: forward process and target, on the CPU, (T,).
        sampler: the diffusers scheduler that draws, by its class's name.

    Args:
        checkpoint: the folder and how it is read.
        device: where everything runs.
        dtype: precision of forward passes, by autocast; trained weights, errors and the autoencoder stay float32.
        resolution: edge of the images in pixels; 0 = the model's own.
    Raises:
        UserError: a part is missing, or the model predicts something that the family does not.
    """

    PIPELINE: ClassVar[str]
    DENOISER: ClassVar[str] = "unet"
    DENOISER_CLASS: ClassVar[str] = "UNet2DConditionModel"
    SCHEDULER: ClassVar[str] = "DDIMScheduler"
    #: Ends of the names of the layers that LoRA adapts, as diffusers' DPO and LoRA scripts of the family choose them.
    LORA_TARGETS: ClassVar[tuple[str, ...]] = ("to_q", "to_k", "to_v", "to_out.0")
    #: Parts that decide the encoded data.
    ENCODERS: ClassVar[tuple[str, ...]]

    def __init__(
        self, checkpoint: Checkpoint, device: torch.device, dtype: torch.dtype = torch.float32, resolution: int = 0
    ):
        import diffusers

        self.checkpoint, self.device, self.dtype = checkpoint, device, dtype
        self.folder = checkpoint.folder
        self._require_parts()
        self.scheduler = checks.load_scheduler(checkpoint, getattr(diffusers, self.SCHEDULER))
        self.sampler = self.SCHEDULER
        self.process = self._process()
        checks.require_noise(checkpoint, self.process.abar)
        checks.require_sizes(checkpoint, self.DENOISER)
        self._taken: set[tuple] = set()  # shapes that the denoiser takes, as far as they were tried
        self.resolution = self._checked(resolution) if resolution else self._own_resolution()

    @property
    def timesteps(self) -> int:
        """T, the number of training timesteps."""
        return len(self.process)

    @property
    def parts(self) -> tuple[str, ...]:
        """Everything that decides what is drawn."""
        return (*self.ENCODERS, "vae", "scheduler", self.DENOISER)

    # What a family says of itself

    def _require_parts(self) -> None:
        self.checkpoint.require(self.DENOISER, "vae", *self.ENCODERS, "scheduler")

    def _process(self) -> ForwardProcess:
        kind = self.scheduler.config.prediction_type
        try:
            return diffusion(self.scheduler.alphas_cumprod.float(), kind)
        except (KeyError, TypeError):
            raise UserError(
                f"{self.checkpoint.name}: the model predicts {shown(kind)}; expected 'epsilon' or 'v_prediction'"
            ) from None

    @abstractmethod
    def _call(self, denoiser: nn.Module, x_t: Tensor, time: Tensor, condition: Condition) -> Tensor:
        """The denoiser's prediction."""

    @abstractmethod
    def _embed(self, captions: list[str]) -> dict[str, Tensor]:
        """What the pipeline's own `encode_prompt` makes of captions, by name."""

    def pair_condition(self, height: int, width: int, top: int, left: int) -> dict[str, Tensor]:
        """What the denoiser is told of a pair beside its caption: nothing, but for SDXL.

        Args:
            height, width: of the original image, pixels.
            top, left: where the crop begins, after resizing, pixels.
        """
        return {}

    # Denoisers

    def denoiser(self, half: bool = False, device: torch.device | str | None = None) -> nn.Module:
        """A fresh copy of the pretrained denoiser, frozen.

        Args:
            device: default: the backend's.
            half: keep the weights of linear and convolution layers in the precision in which autocast uses them anyway:
                half the memory and the same numbers to the bit. Norms stay float32. For models that are not trained.
        """
        module = self._load_denoiser(self.folder, self.checkpoint.name)
        return (store_half(module, self.dtype) if half else module).to(device or self.device)

    def trained(self, folder: Path) -> nn.Module:
        """The denoiser that a run saved: the family's subfolder, or `pytorch_lora_weights.safetensors` over this model.

        Raises:
            UserError: the folder holds neither, or it does not fit.
        """
        if (folder / self.DENOISER).is_dir():
            return self._load_denoiser(folder, str(folder)).to(self.device)
        weights = folder / "pytorch_lora_weights.safetensors"
        if not weights.is_file():
            raise UserError(f"{folder}: holds neither {self.DENOISER}/ nor pytorch_lora_weights.safetensors")
        module: Any = self.denoiser()
        with explained(f"{weights}: on {self.checkpoint.source}"):
            module.load_lora_adapter(
                str(folder), prefix=self.DENOISER, weight_name=weights.name, use_safetensors=True, local_files_only=True
            )
        if not getattr(module, "peft_config", None):
            raise UserError(f"{weights}: holds no LoRA weights for this family's {self.DENOISER}")
        require_finite(module, str(weights))
        return module.eval().requires_grad_(False)

    def _load_denoiser(self, folder: Path, name: str) -> nn.Module:
        import diffusers

        variant = {"variant": self.checkpoint.variant} if self.checkpoint.variant else {}
        kind, part = getattr(diffusers, self.DENOISER_CLASS), self.DENOISER
        loaded = load_network(kind, folder / part, f"{name}: {part}", torch_dtype=torch.float32, **variant)
        for module in loaded.modules():
            if isinstance(module, nn.Linear):
                module.register_forward_pre_hook(_contiguous)
        return loaded.eval().requires_grad_(False)

    def denoise(self, denoiser: nn.Module, x_t: Tensor, t: Tensor, condition: Condition) -> Tensor:
        """What a denoiser predicts: noise or velocity, see `process.target`.

        Args:
            x_t: noised latents, (B, C, H, W).
            t: places on the timestep axis, (B,).
            condition: see Condition.
        """
        with self._precision():
            return self._call(denoiser, x_t, self._time[t], condition)

    def require_fit(self, latents: Tensor, condition: Condition) -> None:
        """Raise UserError unless the denoiser takes such latents and embeddings; tried on shapes alone, once each."""
        tried = (latents.shape, *sorted((name, x.shape) for name, x in condition.items()))
        if tried in self._taken:
            return
        shapes = {name: x.to("meta", torch.float32) for name, x in condition.items()}
        try:
            self._call(
                self._placeholder, latents.to("meta", torch.float32), torch.zeros(len(latents), device="meta"), shapes
            )
        except (RuntimeError, ValueError, TypeError) as error:
            parts = f"its {self.DENOISER} does not take what its autoencoder and text encoders make"
            raise UserError(f"{self.checkpoint.name}: {parts} ({one_line(error)})") from None
        self._taken.add(tried)

    @cached_property
    def _fits(self) -> bool:
        """Whether the parts fit together, found once."""
        size, edge = self.resolution, self.resolution // self._pixels_a_latent()
        channels = self.checkpoint.number("vae", "latent_channels", 4, 1, 1024)
        told = {name: x[None] for name, x in self.pair_condition(size, size, 0, 0).items()} | self.encode_text([""])
        self.require_fit(torch.empty(1, channels, edge, edge, device="meta"), told)
        return True

    @cached_property
    def _time(self) -> Tensor:
        return self.process.time.to(self.device)

    def _precision(self) -> torch.autocast:
        return torch.autocast(self.device.type, self.dtype, enabled=self.dtype != torch.float32)

    # Images and texts

    @cached_property
    def pipeline(self) -> Any:
        """The family's diffusers pipeline with a placeholder for the denoiser, made when it is first needed."""
        import diffusers

        kind, checkpoint = getattr(diffusers, self.PIPELINE), self.checkpoint
        known = inspect.signature(kind.__init__).parameters
        given: dict[str, Any] = {k: v for k, v in checkpoint.index.items() if k in known and not isinstance(v, list)}
        given |= {name: None for name in checkpoint.parts if name in known} | {"requires_safety_checker": False}
        parts = {name: self._part(name) for name in ("vae", *self.ENCODERS) if checkpoint.parts[name] != (None, None)}
        checks.require_tokens(checkpoint, parts)
        given |= {self.DENOISER: self._placeholder, "scheduler": self.scheduler, **parts}
        with explained(checkpoint.name), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            pipe = kind(**{name: value for name, value in given.items() if name in known})
        pipe.set_progress_bar_config(disable=True)
        for part in self._frozen(pipe):
            part.eval().requires_grad_(False)
        return pipe

    def _part(self, name: str) -> Any:
        """A frozen part."""
        if name.startswith("tokenizer"):
            with explained(f"{self.checkpoint.name}: {name}"):
                return self.checkpoint.kind(name).from_pretrained(self.folder / name, local_files_only=True)
        return self.checkpoint.load(name, torch_dtype=torch.float32 if name == "vae" else self.dtype)

    @cached_property
    def _placeholder(self) -> nn.Module:
        """A denoiser without weights, which says what the pipeline wants to know of one."""
        import diffusers

        kind = getattr(diffusers, self.DENOISER_CLASS)
        with torch.device("meta"):
            return kind.from_config(kind.load_config(self.folder, subfolder=self.DENOISER))

    @contextmanager
    def _with(self, denoiser: nn.Module) -> Iterator[Any]:
        """The pipeline with a denoiser in it, which it holds no longer than needed."""
        pipe = self.pipeline
        with Adapter.active(denoiser) as module:
            pipe.register_modules(**{self.DENOISER: module})
            try:
                yield pipe
            finally:
                pipe.register_modules(**{self.DENOISER: self._placeholder})

    def _frozen(self, pipe: Any) -> list[nn.Module]:
        return [m for name, m in pipe.components.items() if isinstance(m, nn.Module) and name != self.DENOISER]

    def _awake(self) -> Any:
        for part in self._frozen(self.pipeline):
            part.to(self.device)
        return self.pipeline

    def rest(self) -> None:
        """Move autoencoder and text encoders off the device until they are needed again."""
        if self.device.type != "cuda":
            return
        if "pipeline" in self.__dict__:
            for part in self._frozen(self.pipeline):
                part.to("cpu")
        torch.cuda.empty_cache()

    def _pixels_a_latent(self) -> int:
        return 2 ** checks.halvings(self.checkpoint, "vae")

    def _own_resolution(self) -> int:
        edge = self._pixels_a_latent()
        return self.checkpoint.number(self.DENOISER, "sample_size", None, 1, EDGE // edge) * edge

    def _checked(self, resolution: int) -> int:
        if resolution > EDGE:
            raise UserError(f"model.resolution = {resolution}: expected at most {EDGE}")
        patch = self.checkpoint.number(self.DENOISER, "patch_size", 1, 1, 64)
        step = max(8, self._pixels_a_latent() * patch * 2 ** checks.halvings(self.checkpoint, self.DENOISER))
        if resolution % step:
            near = sorted({max(step, resolution // step * step), -(-resolution // step) * step})
            raise UserError(
                f"model.resolution = {resolution}: this model's edges are multiples of {step}; try "
                + " or ".join(map(str, near))
            )
        return resolution

    @property
    def images_at_once(self) -> int:
        """Images in one call of the autoencoder: 8 at 512 pixels, 2 at 1024."""
        return 2 * max(1, min(64, 2**20 // self.resolution**2))

    @torch.no_grad()
    def encode_images(self, pixels: np.ndarray) -> Tensor:
        """Scaled latents (posterior means), (N, C, H, W), float32, of images (N, H, W, 3), uint8."""
        vae, latents = self._awake().vae, []
        for chunk in torch.from_numpy(pixels).split(self.images_at_once):
            batch = chunk.to(self.device).permute(0, 3, 1, 2).float() / 127.5 - 1
            latents.append(vae.encode(batch).latent_dist.mean - (vae.config.shift_factor or 0.0))
        return torch.cat(latents) * vae.config.scaling_factor

    @torch.no_grad()
    def decode_images(self, latents: Tensor) -> np.ndarray:
        """Images (N, H, W, 3), uint8, of scaled latents; in float32, where half precision overflows."""
        pipe = self._awake()
        vae = pipe.vae
        raw = latents.float() / vae.config.scaling_factor + (vae.config.shift_factor or 0.0)
        images = [
            pipe.image_processor.postprocess(vae.decode(chunk, return_dict=False)[0], output_type="np")
            for chunk in raw.split(self.images_at_once)
        ]
        return (np.concatenate(images) * 255).round().astype(np.uint8)

    @torch.no_grad()
    def encode_text(self, captions: Sequence[str]) -> dict[str, Tensor]:
        """Text embeddings by name, each (N, ...), as the family's pipeline makes and pads them."""
        self._awake()
        return self._embed(list(captions))

    def require_steps(self, steps: int) -> None:
        """Raise UserError where a sampler cannot take so many."""
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
    ) -> np.ndarray:
        """One image a caption through diffusers' own pipeline, each from its own seed.

        Returns:
            (N, H, W, 3), uint8.
        Raises:
            UserError: more steps than the model was trained with.
        """
        self.require_steps(steps)
        assert self._fits
        self._awake()
        images = []
        with self._with(denoiser) as pipe:
            for start in range(0, len(captions), batch_size):
                chunk = slice(start, start + batch_size)
                with self._precision():
                    latents = pipe(
                        list(captions[chunk]),
                        height=self.resolution,
                        width=self.resolution,
                        num_inference_steps=steps,
                        guidance_scale=guidance,
                        generator=[Generator().manual_seed(seed) for seed in seeds[chunk]],
                        output_type="latent",
                    ).images
                images.append(self.decode_images(latents))
        return np.concatenate(images)

    # On disk

    def save(self, denoiser: nn.Module, folder: Path, whole: bool = True) -> None:
        """Write a trained denoiser so that plain diffusers loads it.

        Args:
            whole: with copies of the checkpoint's other parts; else alone, as LoRA weights always are.
        """
        if isinstance(denoiser, Adapter):
            save_adapter(denoiser, folder, self.PIPELINE, self.DENOISER)
            return
        if whole:
            self.checkpoint.copy_parts(folder, without=self.DENOISER)
        denoiser.save_pretrained(folder / self.DENOISER, variant=self.checkpoint.variant or None)  # type: ignore[operator]

    def digest(self, *parts: str) -> str:
        """Of the files of the named parts, and how they are used: variant, precision, resolution."""
        files = sorted(f for part in parts for f in (self.folder / part).rglob("*") if f.is_file())
        return f"{self.dtype}-{self.checkpoint.variant}-{self.resolution}-{digest_of(files)}"


def _contiguous(layer: nn.Module, inputs: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    """Hook of a linear layer: its input, laid out in memory without gaps.

    For any other layout torch chooses its matrix product by whether the weight requires a gradient, so that the policy
    and a reference with the same weights may differ in the last bit; after a hard copy they must not (SDXL, SD3).
    """
    return (inputs[0].contiguous(), *inputs[1:])


def store_half(module: nn.Module, dtype: torch.dtype) -> nn.Module:
    """Linear and convolution weights in autocast's own precision, in place; everything else stays as it is."""
    for part in module.modules():
        if isinstance(part, nn.Linear | nn.Conv2d):
            part.to(dtype)
    return module
