"""Fill shards: draw the images that are not there yet and give them their scores, the work that takes time.

`evaluate` and `prefer` plan and store their shards in ways of their own (`run`, `drawing`), and fill them in this one:
every model and every scorer is loaded once, and a shard is written as soon as it is filled, so that a kill loses one.
"""

from collections.abc import Callable, Iterable, Mapping, Sequence
from itertools import groupby
from operator import attrgetter
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray

from workbench.common.progress import Progress
from workbench.evaluation import model_sources, sample_store
from workbench.evaluation.model_sources import ModelSource
from workbench.evaluation.scorers import Located
from workbench.evaluation.scoring import scored

Scores = Mapping[str, NDArray[np.float64]]  # name -> (N,)


class Undrawn(NamedTuple):
    """A shard without its images.

    Attributes:
        model: name of the model that draws them.
        captions, seeds: of each image; a seed is its noise's.
        steps, guidance: of the sampler.
        write: stores the images (N, H, W, 3).
    """

    model: str
    captions: Sequence[str]
    seeds: Sequence[int]
    steps: int
    guidance: float
    write: Callable[[NDArray[np.uint8]], None]


class Unscored(NamedTuple):
    """A shard with its images, without a scorer's scores.

    Attributes:
        model: name of the model that drew them.
        captions: of each image.
    """

    path: Path
    model: str
    captions: Sequence[str]


def draw(
    shards: Iterable[Undrawn],
    sources: Mapping[str, ModelSource],
    *,
    device: torch.device,
    sampling: Mapping[str, Any],
    batch_size: int,
) -> None:
    """Draw shards' images, model by model.

    Args:
        sources: the models, by name.
        sampling: settings dtype and resolution.
        batch_size: images at once.
    """
    of_model = attrgetter("model")
    # Sorted, as groupby needs it, so that each model is loaded once.
    missing = sorted(shards, key=of_model)
    with Progress(total=_images(missing), desc="draw", unit="image", disable=not missing) as bar:
        for name, its in groupby(missing, key=of_model):
            bar.phase(name)
            backend, denoiser = model_sources.open_model(sources[name], device, sampling)
            for shard in its:
                images = backend.sample(
                    denoiser,
                    shard.captions,
                    shard.seeds,
                    steps=shard.steps,
                    guidance=shard.guidance,
                    batch_size=batch_size,
                )
                shard.write(images)
                bar.update(len(images))
            del backend, denoiser  # two models at once may be more than the device holds


def score(
    located: Located,
    shards: Iterable[Unscored],
    *,
    device: torch.device,
    batch_size: int,
    columns: Callable[[Scores], Scores],
) -> None:
    """Give shards a scorer's scores; it is loaded only where one lacks them.

    The scores are those of the images as they are stored: compression changes pixels, and a label must be true of what
    training sees.

    Args:
        columns: what is stored of the scores that `scored` returns, by column.
    Raises:
        Failure: as `scored` does.
    """
    missing = list(shards)
    if not missing:
        return
    scorer = located.load(device, batch_size)
    with Progress(total=_images(missing), desc=f"score {located.name}", unit="image") as bar:
        for shard in missing:
            images = sample_store.read_images(shard.path)
            found = scored(located.name, scorer, images, shard.captions, shard.model)
            sample_store.add_scores(shard.path, columns(found))
            bar.update(len(shard.captions))


def _images(shards: Sequence[Undrawn] | Sequence[Unscored]) -> int:
    return sum(len(shard.captions) for shard in shards)
