"""What the model families have in common: the denoisers of a checkpoint beside its frozen parts.

A backend owns what is never trained (`frozen_parts`) and hands out denoisers as plain modules; policy and reference are
such modules, and the training loop changes them. Everything that a pipeline of diffusers can do is left to that
pipeline, so that results cannot drift from it; a family (`families`) adds how its denoiser is called and how its
latents and embeddings are shaped.
"""

from abc import abstractmethod
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import cached_property
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import torch
from torch import Generator, Tensor, nn

from workbench.common.errors import UserError, one_line
from workbench.models.frozen_parts import FrozenParts
from workbench.models.layers import prepare, store_half
from workbench.models.lora import LORA_FILE, Adapter, save_adapter
from workbench.models.safe_loading import explained, load_network, require_finite

#: What a denoiser is given beside x_t and t: text embeddings and the like, by name, each of shape (B, ...).
Condition = Mapping[str, Tensor]
#: Denoisers, by family and config, with shapes of latents and embeddings that `Backend.require_fit` found to be taken.
#: An evaluation's models, and a study's, differ in their weights alone, and trying one takes a quarter of a second.
SHAPES_TAKEN: set[tuple] = set()


class Backend(FrozenParts):
    """One checkpoint, ready to encode images and captions, to denoise, to sample and to save.

    Its frozen parts, and what it is made from, are those of `FrozenParts`.
    """

    #: Ends of the names of the layers that LoRA adapts by default, as diffusers' training scripts choose them.
    LORA_TARGETS: ClassVar[tuple[str, ...]] = ("to_q", "to_k", "to_v", "to_out.0")

    # What differs between families

    @abstractmethod
    def _predict(self, denoiser: nn.Module, x_t: Tensor, time: Tensor, condition: Condition) -> Tensor:
        """Call the denoiser as its pipeline does.

        Args:
            x_t: noised latents, (B, C, H, W).
            time: `process.time` at each sample's t, (B,).
        Returns:
            What `process.target` is compared with, (B, C, H, W).
        """

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

    def compile(self, denoiser: Any) -> None:
        """Let torch compile a denoiser, in place, at its first call.

        Of a transformer the blocks, where diffusers names them: they are alike, so that one is compiled for all, in
        seconds and not minutes. A U-Net has few blocks alike, and is compiled as a whole.
        """
        if self.DENOISER == "transformer" and getattr(denoiser, "_repeated_blocks", None):
            denoiser.compile_repeated_blocks()
        else:
            denoiser.compile()

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

        The denoiser runs on the meta device, which computes shapes and nothing else; each combination is tried once in
        a process, since whether it is taken depends on the family and the denoiser's config alone.

        Raises:
            UserError: it does not take them.
        """
        shapes = (latents.shape, *sorted((name, x.shape) for name, x in condition.items()))
        on_meta = {name: x.to("meta", torch.float32) for name, x in condition.items()}
        time = torch.zeros(len(latents), device="meta")
        try:
            # Within the try: a config may say what no denoiser can be made from.
            tried = (type(self), self._placeholder.to_json_string(), *shapes)  # type: ignore[operator]
            if tried in SHAPES_TAKEN:
                return
            # Without autocast, which the meta device does not have.
            self._predict(self._placeholder, latents.to("meta", torch.float32), time, on_meta)
        except (RuntimeError, ValueError, TypeError) as error:
            parts = f"its {self.DENOISER} does not take what its autoencoder and text encoders make"
            raise UserError(f"{self.checkpoint.name}: {parts} ({one_line(error)})") from None
        SHAPES_TAKEN.add(tried)

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

    # Samples

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
