"""The small model's ground-truth reward, and the judge that is independent of it.

reward = max(log p(concept), -6) - 3 * damage - 4 * colour error - 6 * border noise, where

- p is the scorer's probability that the image shows the prompt's concept;
- damage, 0..1, is the critic's estimate of how far the drawing is from clean artwork (small, off-centre
  or aslant; wobbled outlines, lost detail, blotches, grain);
- the colour error, 0..1, is the mean absolute difference between the median colour of the image's outer ring
  and the named background;
- the border noise, 0..1, is that ring's standard deviation.

A perfect drawing scores near 0; the unit is nats.
"""

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from workbench.models.small.prompts import COLOURS, CONCEPTS, parse

FLOOR = -6.0


class ImageModel:
    """A small network on images, from a transformers folder.

    Args:
        path: folder with config.json and model.safetensors.
    """

    def __init__(self, path: Path, device: torch.device | str = "cpu"):
        from transformers import AutoModelForImageClassification

        self.device = torch.device(device)
        self.model = AutoModelForImageClassification.from_pretrained(
            path, torch_dtype=torch.float32, use_safetensors=True, local_files_only=True, trust_remote_code=False
        )
        self.model.to(self.device).eval().requires_grad_(False)

    @torch.no_grad()
    def __call__(self, images: NDArray[np.uint8], batch_size: int = 128) -> Tensor:
        """The network's outputs, (N, outputs), for images (N, H, W, 3)."""
        pixels = torch.from_numpy(images).permute(0, 3, 1, 2).float() / 127.5 - 1
        return torch.cat([self.model(chunk.to(self.device)).logits.cpu() for chunk in pixels.split(batch_size)])


class Reward:
    """The ground-truth reward; the module's docstring has the formula.

    Args:
        folder: holds the folders `scorer` and `critic`.
    """

    def __init__(self, folder: Path, device: torch.device | str = "cpu"):
        self.scorer = ImageModel(folder / "scorer", device)
        self.critic = ImageModel(folder / "critic", device)

    def __call__(self, images: NDArray[np.uint8], captions: Sequence[str]) -> NDArray[np.float64]:
        """Reward of each image for its caption, (N,), in nats."""
        likelihood = concept_likelihood(self.scorer, images, captions)
        damage = self.critic(images)[:, 0].double().clamp(0, 1).numpy()
        noise = ring(images).std(axis=1).mean(1)
        return np.maximum(likelihood, FLOOR) - 3 * damage - 4 * colour_error(images, captions) - 6 * noise


def concept_likelihood(model: ImageModel, images: NDArray[np.uint8], captions: Sequence[str]) -> NDArray[np.float64]:
    """Log-probability that a classifier gives each caption's concept, (N,), in nats."""
    return model(images).double().log_softmax(1)[torch.arange(len(images)), concepts(captions)].numpy()


def names_concept(judge: ImageModel, images: NDArray[np.uint8], captions: Sequence[str]) -> NDArray[np.bool_]:
    """Whether the judge's likeliest class of each image is its caption's concept, (N,)."""
    return (judge(images).argmax(1) == concepts(captions)).numpy()


def concepts(captions: Sequence[str]) -> Tensor:
    """Index into CONCEPTS of what each caption names, (N,)."""
    names = list(CONCEPTS)
    return torch.tensor([names.index(parse(c).concept) for c in captions])


def ring(images: NDArray[np.uint8]) -> NDArray[np.float64]:
    """The outermost pixels of each image, (N, P, 3), in 0..1."""
    x = images.astype(np.float64) / 255
    return np.concatenate([x[:, 0], x[:, -1], x[:, 1:-1, 0], x[:, 1:-1, -1]], axis=1)


def colour_error(images: NDArray[np.uint8], captions: Sequence[str]) -> NDArray[np.float64]:
    """Mean absolute difference of each image's border colour from the named background, (N,), in 0..1."""
    wanted = np.array([COLOURS[parse(c).colour] for c in captions]) / 255
    return np.abs(np.median(ring(images), axis=1) - wanted).mean(1)


def nearest_colour(images: NDArray[np.uint8]) -> list[str]:
    """Name of the palette's colour nearest to each image's border."""
    found = np.median(ring(images), axis=1)[:, None]
    distance = np.abs(found - np.array(list(COLOURS.values()))[None] / 255).sum(2)
    return [list(COLOURS)[i] for i in distance.argmin(1)]
