"""How the small model's parts are trained and written: the stages behind `python -m workbench.pretrain`."""

import copy
import math
import os
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Generator, Tensor, nn

from workbench.models.small import artwork, faults, recipe, reward
from workbench.models.small.artwork import Artwork
from workbench.models.small.muon import optimizers
from workbench.models.small.prompts import COLOURS, STYLES, parse
from workbench.models.small.recipe import Loss
from workbench.models.small.reward import concept_log_probs


def fit(
    name: str,
    module: nn.Module,
    loss: Loss,
    work: Path,
    *,
    steps: int,
    lr: float,
    muon: float = 0.0,
    ema_decay: float = 0.999,
    save_every: float = 60.0,
    keep: tuple[float, ...] = (),
) -> None:
    """Minimise `loss` over `module`'s weights with AdamW (and Muon) and a cosine decay, resumably.

    Each step's draws come from a generator seeded with the step, so a resumed run draws what an uninterrupted one
    would have. On return the module holds the averaged weights.

    Args:
        loss: draws a batch from a generator on the module's device and returns the scalar loss.
        lr, muon: learning rates, see `muon.optimizers`.
        work: folder of the checkpoint `NAME.pt`, written atomically every `save_every` seconds.
        ema_decay: largest decay of the weights' running average.
        keep: shares of the training after which the averaged weights are kept, in half precision, as
            `NAME-PERCENT.pt`.
    Raises:
        FloatingPointError: the loss is not finite.
    """
    from tqdm import tqdm

    device = next(module.parameters()).device
    fast: list[Tensor] = list(module.parameters())
    steppers = optimizers(module, lr, muon)
    # Read before a checkpoint is loaded, which holds the rates of the step that it was taken at.
    full = [o.param_groups[0]["lr"] for o in steppers]
    average = copy.deepcopy(module)
    slow: list[Tensor] = list(average.parameters())
    path, step = work / f"{name}.pt", 0
    if path.exists():
        state = torch.load(path, weights_only=True, map_location=device)
        module.load_state_dict(state["module"])
        average.load_state_dict(state["average"])
        for stepper, kept in zip(steppers, state["optimizers"], strict=True):
            stepper.load_state_dict(kept)
        step = state["step"]

    def save() -> None:
        state = {"step": step, "optimizers": [o.state_dict() for o in steppers]}
        write(state | {"module": module.state_dict(), "average": average.state_dict()}, path)

    module.train()
    saved, warmup, recent = time.monotonic(), min(300, steps // 10 + 1), []
    marks = {round(share * steps): work / f"{name}-{round(100 * share)}.pt" for share in keep}
    bar = tqdm(desc=name, initial=step, total=steps, mininterval=5, maxinterval=20)
    while step < steps:
        # A linear warm-up, and a cosine that ends at a hundredth of the rate.
        now = min(1.0, (step + 1) / warmup) * (0.01 + 0.99 * 0.5 * (1 + math.cos(math.pi * step / steps)))
        for stepper, most in zip(steppers, full, strict=True):
            stepper.param_groups[0]["lr"] = most * now
        value = loss(Generator(device).manual_seed(step))
        for p in fast:
            p.grad = None
        value.backward()
        nn.utils.clip_grad_norm_(fast, 1.0)
        for stepper in steppers:
            stepper.step()
        step += 1
        with torch.no_grad():
            # The decay grows from small values, so that the average forgets the random weights of the start.
            torch._foreach_lerp_(slow, fast, 1 - min(ema_decay, step / (step + 9)))
        recent.append(value.detach())
        # Only every hundredth step: to read the loss waits for the GPU.
        if len(recent) == 100:
            mean = torch.stack(recent).mean().item()
            # NaN alone differs from itself.
            if mean != mean:
                raise FloatingPointError(f"{name}: loss is not finite near step {step}")
            bar.set_postfix(loss=f"{mean:.4f}")
            recent.clear()
        bar.update()
        if step in marks:
            # Before the checkpoint below: a kill in between repeats the step and writes this file again.
            write(half_of(average), marks[step])
        if time.monotonic() - saved > save_every:
            save()
            saved = time.monotonic()
    bar.close()
    save()
    # The checkpoint just saved is of the last step, so a finished stage that is called again comes straight here.
    module.load_state_dict(average.state_dict())
    module.eval().requires_grad_(False)


def write(state: Any, target: Path) -> None:
    """Save atomically: a killed process leaves the old file or the new one."""
    torch.save(state, target.with_suffix(".tmp"))
    os.replace(target.with_suffix(".tmp"), target)


def half_of(module: nn.Module) -> dict[str, Tensor]:
    """A module's state in half precision; counts stay whole numbers."""
    return {k: v.half() if v.is_floating_point() else v for k, v in module.state_dict().items()}


# --- the checkpoint folders ----------------------------------------------------------------------------------


def save_model(out: Path, vae, model: nn.ModuleDict, tokenizer, scaling_factor: float) -> None:
    """Write a diffusers checkpoint folder in half precision that loads in float32.

    Args:
        model: the modules `unet` and `text_encoder`.
        scaling_factor: the latents', see `StableDiffusionPipeline`.
    """
    from diffusers import StableDiffusionPipeline

    from workbench.models.checkpoints import declare_float32

    vae.register_to_config(scaling_factor=scaling_factor)
    # Copies of the networks: `half` changes in place, and the caller goes on with them in float32.
    pipeline: Any = StableDiffusionPipeline(
        vae=copy.deepcopy(vae),
        text_encoder=copy.deepcopy(model["text_encoder"]),
        tokenizer=tokenizer,
        unet=copy.deepcopy(model["unet"]),
        scheduler=recipe.new_scheduler(),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )
    for part in (pipeline.vae, pipeline.text_encoder, pipeline.unet):
        part.half()
    pipeline.save_pretrained(out, safe_serialization=True)
    declare_float32(out / "text_encoder" / "config.json")


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
        "reward": float(np.sum(list(parts.values()), axis=0).mean()),
    }
    return found | {name: float(values.mean()) for name, values in parts.items()}, images


# --- how good the parts are ----------------------------------------------------------------------------------


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
        drawing = torch.arange(start, start + 384, device=device) % (len(recipe.labels()) - 1)
        ground = artwork.palette().to(device)[recipe.pick(384, len(COLOURS), g)]
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
        found, wanted = model(shown.images).logits, recipe.pose_code(shown.pose)
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
