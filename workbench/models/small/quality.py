"""How good the small model and the networks of its reward are: samples judged, errors on held-out drawings."""

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Generator, Tensor, nn

from workbench.models.small import artwork, faults, reward
from workbench.models.small.artwork import Artwork
from workbench.models.small.image_models import labels, pose_code
from workbench.models.small.prompts import COLOURS, STYLES, parse
from workbench.models.small.reward import concept_log_probs


def draw(
    model: Path, captions: Sequence[str], *, steps: int, guidance: float, device: torch.device
) -> NDArray[np.uint8]:
    """An image of each caption, (N, H, W, 3), by the checkpoint folder; image i has seed i."""
    from workbench.models import load

    backend = load(str(model), device)
    return backend.sample(
        backend.denoiser(), captions, range(len(captions)), steps=steps, guidance=guidance, batch_size=64
    )


def verdict(
    folder: Path, captions: Sequence[str], *, steps: int, guidance: float, device: torch.device
) -> tuple[dict[str, float], NDArray[np.uint8]]:
    """Draw an image of each caption and measure what the judge, the scorer and the critic make of them.

    Args:
        folder: holds `model`, `scorer`, `critic` and `judge`.
        captions: of the grammar.
    Returns:
        The shares "judge", "judge, style" and "background" of images that show the caption's concept, style and
        background, the mean "reward" and each of its parts; and the images, (N, H, W, 3).
    """
    images = draw(folder / "model", captions, steps=steps, guidance=guidance, device=device)
    seen = reward.ImageModel(folder / "judge", device)(images)
    parts = reward.Reward(folder, device).parts(images, captions)
    colours = [a == parse(c).colour for a, c in zip(reward.nearest_colour(images), captions, strict=True)]
    found = {
        "judge": float(reward.names_concept(seen, captions).mean()),
        "judge, style": float(reward.names_style(seen, captions).mean()),
        "background": float(np.mean(colours)),
        "reward": float(reward.total(parts).mean()),
    }
    return found | {name: float(values.mean()) for name, values in parts.items()}, images


def calibration_error(confidence: Tensor, right: Tensor, bins: int = 15) -> float:
    """Expected calibration error: mean over samples of |confidence - accuracy| of their bin (Guo et al. 2017).

    Args:
        confidence: of the likeliest class, (N,), in 0..1.
        right: whether it is the right one, (N,), bool.
    """
    # A bin's sum of (confidence - right) is the difference of its means, weighted by its count already.
    place = (confidence * bins).long().clamp(max=bins - 1)
    total = torch.zeros(bins, dtype=torch.float64)
    total.index_add_(0, place.cpu(), (confidence.double() - right.double()).cpu())
    return (total.abs().sum() / len(confidence)).item()


def held_out_pictures(
    art: Artwork, device: torch.device, count: int, seed: int
) -> Iterator[tuple[faults.Pictures, Tensor]]:
    """Pictures of the denoiser's kind in poses that no classifier was trained on, every drawing equally often.

    Yields:
        (Pictures, which drawings they show, (384,)).
    """
    g = Generator(device).manual_seed(seed)
    # 384 = 2 x 192 drawings: 64 concepts in three styles.
    for start in range(0, count, 384):
        drawing = torch.arange(start, start + 384, device=device) % (len(labels()) - 1)
        ground = artwork.palette().to(device)[faults.pick(384, len(COLOURS), g)]
        yield faults.named(art, drawing, ground, g, part="held out"), drawing


@torch.no_grad()
def calibrate(model, art: Artwork, device: torch.device, count: int = 7680) -> float:
    """Divide a classifier's logits by the temperature that fits held-out pictures best (Guo et al. 2017).

    Returns:
        The temperature.
    """
    logits, wanted = [], []
    # Another seed than the reports', so that the calibration error is measured on other pictures than it was fitted to.
    for shown, drawing in held_out_pictures(art, device, count, 2 * 10**9):
        logits.append(model(shown.images).logits)
        wanted.append(drawing // len(STYLES))
    every, right = torch.cat(logits), torch.cat(wanted)
    losses = {}
    for hundredths in range(30, 251, 5):
        log_probs = concept_log_probs(every * (100 / hundredths))
        losses[hundredths / 100] = -log_probs[torch.arange(len(right), device=device), right].mean().item()
    best = min(losses, key=losses.__getitem__)
    # To divide the last layer divides the logits: whoever loads the network needs no temperature.
    last = [m for m in model.classifier.modules() if isinstance(m, nn.Linear)][-1]
    last.weight.div_(best)
    last.bias.div_(best)
    return best


@torch.no_grad()
def classifier_report(model, art: Artwork, device: torch.device, count: int = 7680) -> dict[str, Any]:
    """Accuracy and calibration on held-out pictures, whole and by fault."""
    right, styled, confidence, flawed = [], [], [], []
    for shown, drawing in held_out_pictures(art, device, count, 10**9):
        logits = model(shown.images).logits
        log_probs = concept_log_probs(logits)
        confidence.append(log_probs.exp().amax(1))
        right.append(log_probs.argmax(1) == drawing // len(STYLES))
        styled.append(logits.argmax(1) == drawing)
        flawed.append(shown.faults)
    sure, good, fault = torch.cat(confidence), torch.cat(right), torch.cat(flawed)
    whole = ~fault.any(1)
    share = lambda x: round(x.double().mean().item(), 4)  # noqa: E731
    return {
        "accuracy": share(good),
        "accuracy, no fault": share(good[whole]),
        "accuracy, faults": share(good[~whole]),
        "accuracy with style": share(torch.cat(styled)),
        "by fault": {name: share(good[fault[:, i]]) for i, name in enumerate(faults.FAULTS)},
        "ece": calibration_error(sure, good),
        "ece, no fault": calibration_error(sure[whole], good[whole]),
        "ece, faults": calibration_error(sure[~whole], good[~whole]),
    }


@torch.no_grad()
def critic_report(model, art: Artwork, device: torch.device, count: int = 7680) -> dict[str, float]:
    """Mean absolute errors of the critic's poses, in pixels and degrees, on held-out pictures; and without faults."""
    errors, flawed = [], []
    for shown, _ in held_out_pictures(art, device, count, 10**9):
        found, wanted = model(shown.images).logits, pose_code(shown.pose)
        edge = artwork.EDGE * (found[:, 0].exp2() - wanted[:, 0].exp2())
        # Back from the units of `pose_code` to degrees and pixels.
        rest = (found - wanted)[:, 1:] * torch.tensor([30, 16, 16], device=device)
        errors.append(torch.cat([edge[:, None], rest], 1))
        flawed.append(shown.faults.any(1))
    every, flaw = torch.cat(errors).abs(), torch.cat(flawed)
    edge, angle, dx, dy = every.mean(0).tolist()
    names = ("edge", "angle", "dx", "dy")
    clean = {k + ", no fault": v for k, v in zip(names, every[~flaw].mean(0).tolist(), strict=True)}
    return {"edge": edge, "angle": angle, "dx": dx, "dy": dy} | clean


def held_out_images(art: Artwork) -> Tensor:
    """Images (N, 3, SIZE, SIZE) in -1..1 of the drawings on which nothing was trained, on the named colours in turn."""
    palette = artwork.palette().to(art.held_out.rgba.device)
    ground = palette[torch.arange(len(art.held_out.rgba)) % len(palette)]
    return artwork.over(art.held_out.rgba, ground[:, :, None, None]) * 2 - 1
