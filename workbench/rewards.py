"""The small model's ground-truth reward, and the judge that is independent of it.

reward = max(log p(concept), -6) - 4 * colour error - 6 * border noise, where p is the scorer's probability that
the image shows the prompt's concept, the colour error is the mean absolute difference (0..1) between the median
colour of the image's outer ring and the named background, and the border noise is that ring's standard
deviation (0..1). A perfect drawing scores near 0; the unit is nats.
"""

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from workbench.prompts import COLOURS, CONCEPTS, parse

FLOOR = -6.0


class Classifier:
    """A classifier of the named concepts and "something else", from a transformers folder.

    Args:
        path: folder with config.json and model.safetensors.
    """

    def __init__(self, path: Path, device: torch.device | str = "cpu"):
        from transformers import AutoModelForImageClassification

        self.device = torch.device(device)
        self.model = AutoModelForImageClassification.from_pretrained(path, torch_dtype=torch.float32)
        self.model.to(self.device).eval().requires_grad_(False)

    @torch.no_grad()
    def log_probabilities(self, images: NDArray[np.uint8], batch_size: int = 128) -> Tensor:
        """Log-probabilities of every class, (N, classes), for images (N, H, W, 3)."""
        pixels = torch.from_numpy(images).permute(0, 3, 1, 2).float() / 127.5 - 1
        parts = [self.model(chunk.to(self.device)).logits.log_softmax(1).cpu() for chunk in pixels.split(batch_size)]
        return torch.cat(parts)

    def names_concept(self, images: NDArray[np.uint8], captions: Sequence[str]) -> NDArray[np.bool_]:
        """Whether the likeliest class of each image is its caption's concept, (N,)."""
        return (self.log_probabilities(images).argmax(1) == concepts(captions)).numpy()


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


def reward(scorer: Classifier, images: NDArray[np.uint8], captions: Sequence[str]) -> NDArray[np.float64]:
    """Ground-truth reward of each image for its caption, (N,), in nats; the module's docstring has the formula."""
    likelihood = scorer.log_probabilities(images)[torch.arange(len(images)), concepts(captions)].numpy()
    noise = ring(images).std(axis=1).mean(1)
    return np.maximum(likelihood.astype(np.float64), FLOOR) - 4 * colour_error(images, captions) - 6 * noise
