"""Diffusion model families behind one small interface. So far: Stable Diffusion 1.x (epsilon prediction).

A backend owns the frozen parts (autoencoder, text encoder, noise schedule) and makes denoisers; the policy and
the reference are plain modules that it hands out and that the trainer moves.
"""

import hashlib
import json
import warnings
from collections.abc import Sequence
from importlib.resources import files
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from safetensors import SafetensorError
from torch import Generator, Tensor, nn

from workbench.errors import UserError

ASSETS = Path(str(files("workbench"))) / "assets"


def pick_device(name: str) -> torch.device:
    """The torch device of a `model.device` setting.

    Raises:
        UserError: the device is unknown or not there.
    """
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        return torch.empty(0, device=name).device
    except (RuntimeError, AssertionError):
        raise UserError(f"model.device = {name!r}: no such device here; try 'auto' or 'cpu'") from None


class StableDiffusion:
    """A Stable Diffusion 1.x checkpoint folder in diffusers' layout.

    Args:
        path: the folder, or "embedded" for the small model that comes with the workbench.
        device: where everything runs.
        dtype: precision of forward passes, by autocast; weights and errors stay float32.
    Raises:
        UserError: the folder or one of its parts is missing, or the model does not predict epsilon.
    """

    PARTS = ("vae", "text_encoder", "tokenizer", "unet", "scheduler")

    def __init__(self, path: str, device: torch.device, dtype: torch.dtype = torch.float32):
        from diffusers import AutoencoderKL, DDIMScheduler
        from transformers import CLIPTextModel, CLIPTokenizer

        self.path = ASSETS / "model" if path == "embedded" else Path(path)
        self.device, self.dtype = device, dtype
        missing = [part for part in self.PARTS if not (self.path / part).is_dir()]
        if missing:
            raise UserError(
                f"model.path = {path!r}: not a Stable Diffusion checkpoint folder in diffusers' layout "
                f"(no {', '.join(missing)} in {self.path})"
            )
        try:
            self.vae = AutoencoderKL.from_pretrained(self.path, subfolder="vae", torch_dtype=torch.float32)
            self.text_encoder = CLIPTextModel.from_pretrained(
                self.path, subfolder="text_encoder", torch_dtype=torch.float32
            )
            self.tokenizer = CLIPTokenizer.from_pretrained(self.path, subfolder="tokenizer")
            self.scheduler = DDIMScheduler.from_pretrained(self.path, subfolder="scheduler")
        except (OSError, ValueError, SafetensorError) as error:
            raise UserError(f"model.path = {path!r}: cannot be loaded ({str(error).splitlines()[0]})") from None
        kind = self.scheduler.config.prediction_type
        if kind != "epsilon":
            raise UserError(f"model.path = {path!r}: the model predicts {kind!r}; so far only 'epsilon' is supported")
        for part in (self.vae, self.text_encoder):
            nn.Module.to(part, device).eval().requires_grad_(False)
        self.abar: Tensor = self.scheduler.alphas_cumprod.float()

    @property
    def timesteps(self) -> int:
        """T, the number of training timesteps."""
        return len(self.abar)

    def denoiser(self) -> nn.Module:
        """A fresh copy of the pretrained UNet, float32, frozen."""
        from diffusers import UNet2DConditionModel

        try:
            unet = UNet2DConditionModel.from_pretrained(self.path, subfolder="unet", torch_dtype=torch.float32)
        except (OSError, ValueError, SafetensorError) as error:
            raise UserError(f"model.path: the UNet cannot be loaded ({str(error).splitlines()[0]})") from None
        return unet.to(self.device).eval().requires_grad_(False)

    def denoise(self, denoiser: nn.Module, x_t: Tensor, t: Tensor, text: Tensor) -> Tensor:
        """The noise that a denoiser predicts.

        Args:
            x_t: noised latents, (B, C, H, W).
            t: timesteps, (B,).
            text: text embeddings, (B, L, D).
        """
        with torch.autocast(self.device.type, self.dtype, enabled=self.dtype != torch.float32):
            return denoiser(x_t, t, encoder_hidden_states=text, return_dict=False)[0]

    def image_size(self) -> int:
        """Native edge of the images, in pixels."""
        unet = json.loads((self.path / "unet" / "config.json").read_text())
        return unet["sample_size"] * 2 ** (len(self.vae.config.block_out_channels) - 1)

    @torch.no_grad()
    def encode_images(self, images: Sequence[Image.Image]) -> Tensor:
        """Scaled latents (posterior means) of images resized and centre-cropped to the native size, (N, C, H, W)."""
        size = self.image_size()
        pixels = torch.from_numpy(np.stack([np.asarray(_fit(image, size)) for image in images]))
        batch = pixels.to(self.device).permute(0, 3, 1, 2).float() / 127.5 - 1
        return self.vae.encode(batch).latent_dist.mean * self.vae.config.scaling_factor

    @torch.no_grad()
    def encode_text(self, captions: Sequence[str]) -> Tensor:
        """Text embeddings, (N, L, D), padded to the tokenizer's length as Stable Diffusion's pipeline does."""
        tokens = self.tokenizer(list(captions), padding="max_length", truncation=True, return_tensors="pt")
        return self.text_encoder(tokens.input_ids.to(self.device)).last_hidden_state

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
        """One image a caption through diffusers' own pipeline and DDIM, each from its own seed.

        Returns:
            (N, H, W, 3), uint8.
        """
        pipeline = self.pipeline(denoiser)
        pipeline.set_progress_bar_config(disable=True)
        images = []
        for start in range(0, len(captions), batch_size):
            chunk = slice(start, start + batch_size)
            generators = [Generator().manual_seed(seed) for seed in seeds[chunk]]
            with torch.autocast(self.device.type, self.dtype, enabled=self.dtype != torch.float32):
                result = pipeline(
                    list(captions[chunk]),
                    num_inference_steps=steps,
                    guidance_scale=guidance,
                    generator=generators,
                    output_type="np",
                )
            images.append((result.images * 255).round().astype(np.uint8))
        return np.concatenate(images)

    def pipeline(self, denoiser: nn.Module):
        """A diffusers pipeline around a denoiser; `save_pretrained` on it writes a checkpoint folder."""
        from diffusers import StableDiffusionPipeline

        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            return StableDiffusionPipeline(
                vae=self.vae,
                text_encoder=self.text_encoder,
                tokenizer=self.tokenizer,
                unet=denoiser,
                scheduler=self.scheduler,
                safety_checker=None,
                feature_extractor=None,
                requires_safety_checker=False,
            )

    def digest(self, *parts: str) -> str:
        """Of the files of the named parts of the checkpoint folder and the precision in which they are used."""
        return f"{self.dtype}-" + digest_of(
            sorted(f for part in parts for f in (self.path / part).rglob("*") if f.is_file())
        )


def digest_of(paths: Sequence[Path]) -> str:
    """SHA-256 over the names and contents of files."""
    digest = hashlib.sha256()
    for path in paths:
        digest.update(path.name.encode())
        with path.open("rb") as stream:
            digest.update(hashlib.file_digest(stream, "sha256").digest())
    return digest.hexdigest()


def _fit(image: Image.Image, size: int) -> Image.Image:
    """RGB, shorter edge resized to `size`, centre-cropped to a square."""
    image = image.convert("RGB")
    if image.size == (size, size):
        return image
    scale = size / min(image.size)
    image = image.resize((max(size, round(image.width * scale)), max(size, round(image.height * scale))))
    left, top = (image.width - size) // 2, (image.height - size) // 2
    return image.crop((left, top, left + size, top + size))
