"""Scores of images, checked before anybody keeps them."""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Protocol, runtime_checkable

import numpy as np
import torch
from numpy.typing import NDArray

from workbench.common.errors import Failure
from workbench.evaluation.reward_models import Images, Scorer

TOTAL = ""  #: the name of a scorer's score beside those of its parts


@runtime_checkable
class Summed(Scorer, Protocol):
    """A scorer whose score is the sum of parts, which are worth keeping too."""

    def parts(self, images: Images, captions: Sequence[str], /) -> Mapping[str, NDArray[np.float64]]:
        """The parts by name, each (N,)."""


def scored(
    name: str, scorer: Scorer, images: Sequence[NDArray[np.uint8]], captions: Sequence[str], model: str
) -> dict[str, NDArray[np.float64]]:
    """Score images and check the scores: what is written down with a score counts as scored for ever.

    Args:
        name: of the scorer, for messages.
        images: (H, W, 3) each, of one size.
        model: that drew them, for messages.
    Returns:
        The score under TOTAL and, where the scorer is a sum of parts, each of these by name; (N,) each.
    Raises:
        Failure: not one score an image, or one that is not a finite number; names the model and the prompt.
    """
    pixels = np.stack(images)
    parts = dict(scorer.parts(pixels, captions)) if isinstance(scorer, Summed) else {}
    total = np.sum(list(parts.values()), axis=0) if parts else np.asarray(scorer(pixels, captions))
    for values in (total, *parts.values()):
        if values.shape != (len(captions),):
            found = f"{values.size} scores" if values.ndim == 1 else f"scores of the shape {values.shape}"
            raise Failure(f"--scorer {name}: {found} for {len(captions)} images of {model}; expected one an image")
        if not np.isfinite(values).all():
            prompt = captions[int(np.flatnonzero(~np.isfinite(values))[0])]
            raise Failure(f"--scorer {name}: not a finite score for {model}'s image of {prompt!r}")
    return {TOTAL: total} | parts


@contextmanager
def memory_of_samples(batch_size: int) -> Iterator[None]:
    """What torch says when the device has no memory left for drawing or scoring becomes one line.

    Raises:
        Failure: in its place; names the options that help.
    """
    try:
        yield
    except torch.OutOfMemoryError:
        lower = f"lower --batch-size (now {batch_size}) or --resolution, or draw with --dtype float16"
        raise Failure(f"out of memory: {lower}; what is done is kept, and the same command goes on") from None
