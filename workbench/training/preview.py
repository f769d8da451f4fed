"""The sample grid: images of a few test prompts, drawn while a model trains and cut from all images at its end."""

from collections.abc import Mapping

import numpy as np
from numpy.typing import NDArray
from torch import nn

from workbench.common.contact_sheet import contact_sheet
from workbench.training.samples import Samples, Sampling, progress

COLUMNS = 8


class Preview:
    """Draws the sample grid and scores it; all points of a run have the same prompts and noise.

    Attributes:
        rows: which test prompts it shows: evenly spread, at most `evaluation.grid`, each with the first seed.
    """

    def __init__(self, sampling: Sampling):
        self.sampling = sampling
        count, size = len(sampling.captions), sampling.settings.grid
        self.rows = list(range(0, count, max(1, count // size)))[:size] if size else []

    def draw(self, policy: nn.Module) -> tuple[NDArray[np.uint8], Mapping[str, float]]:
        """The policy's grid as a picture, and `samples/*` where images are scored."""
        sampling = self.sampling
        captions = [sampling.captions[i] for i in self.rows]
        # Seed 0 is the plan's first: the grid can be cut from the final images, and compared with the baseline's.
        images = sampling.draw(policy, captions, [0] * len(captions))
        # Training goes on and needs the memory that autoencoder and text encoders have taken for drawing.
        sampling.backend.offload()
        metrics: Mapping[str, float] = {}
        if sampling.scorer is not None:
            metrics = self._progress(sampling.scorer(images, self.rows))
        return contact_sheet(images, COLUMNS), metrics

    def cut(self, images: NDArray[np.uint8]) -> NDArray[np.uint8]:
        """The grid as a picture, out of the images of the whole plan, which begins with one of each prompt."""
        return contact_sheet(images[self.rows], COLUMNS)

    def progress(self, ours: Samples) -> Mapping[str, float]:
        """`samples/*`, out of the samples of the whole plan."""
        return self._progress(ours.part(self.rows))

    def _progress(self, ours: Samples) -> Mapping[str, float]:
        assert self.sampling.baseline is not None
        return progress(ours, self.sampling.baseline.part(self.rows))
