"""The small model's ground-truth reward, and the judge that is independent of it.

reward = concept + colour + place + sharpness + contrast + cleanliness; each part is at most 0, 0 is perfect:

- concept = max(log p, -6), p the scorer's probability that the image shows the prompt's concept, in any style;
- colour = -4 * mean |c - named colour|, c the median colour of the image's outer 4 pixels, in 0..1;
- place = -|log2(edge / 53)| - |offset| / 16 - |angle| / 30, the drawing's edge and offset from the middle in pixels
  and its slant in degrees, as the critic reads them (at least -4);
- sharpness = -2 * max(0, 1 - s / 0.65), s = 4 * E(1) / E(4), E(k) the sum of squared differences of pixels k apart,
  along rows and columns: 1 where all edges are steps, 1/4 where all are ramps, whatever their contrast;
- contrast = -2 * max(0, 1 - r / 0.55), r the range of all pixel values between their 2nd and 98th percentile;
- cleanliness = -12 * mean |x - c| over the outer 4 pixels: grain and clutter.

The sum's unit is nats. The style is not rewarded. The judge, a network of another kind that was trained on other
augmentations, takes no part in it.
"""

from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor

from workbench.models.small.artwork import SIZE
from workbench.models.small.prompts import COLOURS, CONCEPTS, STYLES, parse

#: Images as an array (N, H, W, 3), uint8, or as a sequence of pictures of one size.
Images = NDArray[np.uint8] | Sequence[Image.Image]
PARTS = ("concept", "colour", "place", "sharpness", "contrast", "cleanliness")


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
        """The network's outputs, (N, outputs), for images (N, H, W, 3); those of another size than SIZE are resized."""
        pixels = (
            torch.from_numpy(images).permute(0, 3, 1, 2).contiguous().float() / 127.5 - 1
        )  # the layout decides last bits
        if pixels.shape[2:] != (SIZE, SIZE):
            pixels = F.interpolate(pixels, size=(SIZE, SIZE), mode="bilinear", antialias=True)
        return torch.cat([self.model(chunk.to(self.device)).logits.cpu() for chunk in pixels.split(batch_size)])


class Reward:
    """The ground-truth reward; the module's docstring has the formula.

    Args:
        folder: holds the folders `scorer` and `critic`.
    """

    def __init__(self, folder: Path, device: torch.device | str = "cpu"):
        self.scorer = ImageModel(folder / "scorer", device)
        self.critic = ImageModel(folder / "critic", device)

    def __call__(self, images: Images, prompts: Sequence[str]) -> NDArray[np.float64]:
        """Reward of each image (H, W, 3) for its prompt, (N,), in nats."""
        return total(self.parts(images, prompts))

    def parts(self, images: Images, captions: Sequence[str]) -> dict[str, NDArray[np.float64]]:
        """The parts that the reward is the sum of, by name (PARTS), each (N,), in nats."""
        pixels = np.stack([np.asarray(image) for image in images])
        return rewards(pixels, captions, self.scorer(pixels), self.critic(pixels))


def total(parts: Mapping[str, NDArray[np.float64]]) -> NDArray[np.float64]:
    """The reward of each image, (N,), from its parts, (N,) each."""
    return np.sum(list(parts.values()), axis=0)


def rewards(
    images: NDArray[np.uint8], captions: Sequence[str], scored: Tensor, read: Tensor
) -> dict[str, NDArray[np.float64]]:
    """The reward's parts from the two networks' outputs.

    Args:
        images: (N, H, W, 3).
        scored: the scorer's logits, (N, classes).
        read: the critic's poses, see `image_models.pose_code`, (N, 4).
    """
    x = images.astype(np.float64) / 255
    frame = border(x)
    middle = np.median(frame, axis=1)
    wanted = np.array([COLOURS[parse(c).colour] for c in captions]) / 255
    pose = read.double().abs()
    place = pose[:, 0] + pose[:, 1] + (pose[:, 2:] ** 2).sum(1).sqrt()
    step, ramp = _differences(x, 1), _differences(x, 4)
    low, high = np.quantile(x.reshape(len(x), -1), (0.02, 0.98), axis=1)
    return {
        "concept": concept_likelihood(scored, captions).clip(min=-6),
        "colour": -4 * np.abs(middle - wanted).mean(1),
        "place": -place.clamp(max=4).numpy(),
        # 1e-6: an image of one colour has no edges, and gets the worst value and no division by 0.
        "sharpness": -2 * (1 - 4 * step / (ramp + 1e-6) / 0.65).clip(min=0),
        "contrast": -2 * (1 - (high - low) / 0.55).clip(min=0),
        "cleanliness": -12 * np.abs(frame - middle[:, None]).mean((1, 2)),
    }


def border(x: NDArray, width: int = 4) -> NDArray:
    """The outer pixels of images (N, H, W, 3), (N, P, 3)."""
    outer = np.ones(x.shape[1:3], dtype=bool)
    outer[width:-width, width:-width] = False
    return x[:, outer]


def _differences(x: NDArray[np.float64], apart: int) -> NDArray[np.float64]:
    """Sum of squared differences of pixels so far apart in images (N, H, W, 3), (N,)."""
    down, along = x[:, apart:] - x[:, :-apart], x[:, :, apart:] - x[:, :, :-apart]
    return (down**2).sum((1, 2, 3)) + (along**2).sum((1, 2, 3))


def concept_log_probs(logits: Tensor) -> Tensor:
    """Log-probabilities of each concept in any style, and of something else, (N, len(CONCEPTS) + 1)."""
    log_probs = logits.double().log_softmax(1)
    drawn = log_probs[:, :-1].view(len(logits), len(CONCEPTS), len(STYLES)).logsumexp(2)
    return torch.cat([drawn, log_probs[:, -1:]], 1)


def concept_likelihood(logits: Tensor, captions: Sequence[str]) -> NDArray[np.float64]:
    """Log-probability that a classifier gives each caption's concept, (N,), in nats."""
    return concept_log_probs(logits)[torch.arange(len(logits)), concepts(captions)].numpy()


def names_concept(logits: Tensor, captions: Sequence[str]) -> NDArray[np.bool_]:
    """Whether a classifier's likeliest concept of each image is its caption's, (N,)."""
    return (concept_log_probs(logits).argmax(1) == concepts(captions)).numpy()


def names_style(logits: Tensor, captions: Sequence[str]) -> NDArray[np.bool_]:
    """Whether a classifier's likeliest style of the caption's concept is its caption's, (N,)."""
    drawn = logits[:, :-1].view(len(logits), len(CONCEPTS), len(STYLES))[torch.arange(len(logits)), concepts(captions)]
    return (drawn.argmax(1) == torch.tensor([STYLES.index(parse(c).style) for c in captions])).numpy()


def concepts(captions: Sequence[str]) -> Tensor:
    """Index into CONCEPTS of what each caption names, (N,)."""
    names = list(CONCEPTS)
    return torch.tensor([names.index(parse(c).concept) for c in captions])


def nearest_colour(images: NDArray[np.uint8]) -> list[str]:
    """Name of the palette's colour nearest to each image's border."""
    found = np.median(border(images / 255), axis=1)[:, None]
    distance = np.abs(found - np.array(list(COLOURS.values()))[None] / 255).sum(2)
    return [list(COLOURS)[i] for i in distance.argmin(1)]
