"""A sheet of samples side by side: rows prompts, columns models, the same noise along a row."""

import textwrap
from collections.abc import Mapping, Sequence
from pathlib import Path

import matplotlib.pyplot as plt
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from numpy.typing import NDArray

from workbench.analysis import fonts
from workbench.common.files import in_place

CELL, CAPTION = 1.6, 2.3  # inches


def sheet(images: Mapping[str, Sequence[NDArray[np.uint8]]], prompts: Sequence[str]) -> Figure:
    """Samples of several models for the same prompts.

    Args:
        images: model -> one image a prompt, each (H, W, 3).
        prompts: one a row.
    """
    fonts.use()
    size = (CAPTION + CELL * len(images), CELL * len(prompts) + 0.4)
    figure, cells = plt.subplots(len(prompts), len(images), figsize=size, squeeze=False)
    for column, (model, samples) in enumerate(images.items()):
        cells[0, column].set_title(textwrap.shorten(model, 24, placeholder="..."), fontsize="small", pad=4)
        for row, image in enumerate(samples):
            _show(cells[row, column], image)
    for row, prompt in enumerate(prompts):
        words = textwrap.fill(textwrap.shorten(prompt, 230, placeholder=" ..."), 30)
        cells[row, 0].annotate(
            words, (-0.06, 0.5), xycoords="axes fraction", ha="right", va="center", fontsize="x-small"
        )
    figure.subplots_adjust(CAPTION / size[0], 0, 1, 1 - 0.35 / size[1], wspace=0.04, hspace=0.04)
    return figure


def before_after(
    images: Mapping[str, Sequence[NDArray[np.uint8]]], prompts: Sequence[str], gains: Sequence[float] = ()
) -> Figure:
    """Samples of a model before and after training: rows models, columns prompts, the same noise along a column.

    Args:
        images: model -> one image a prompt, each (H, W, 3); the pretrained model's first.
        prompts: one a column.
        gains: below the last row, how much better each image scores than the one above it; none = nothing is written.
    """
    fonts.use()
    size = (0.9 + 1.1 * len(prompts), 0.75 + 1.1 * len(images))
    figure, cells = plt.subplots(len(images), len(prompts), figsize=size, squeeze=False)
    for row, (model, samples) in enumerate(images.items()):
        for axes, image in zip(cells[row], samples, strict=True):
            _show(axes, image)
        cells[row, 0].set_ylabel(model, rotation=0, ha="right", va="center", fontsize="small")
    for axes, prompt in zip(cells[0], prompts, strict=True):
        words = textwrap.fill(textwrap.shorten(prompt, 60, placeholder=" ..."), 17)
        axes.set_title(words, fontsize=6.5, pad=3)
    for axes, gain in zip(cells[-1], gains, strict=False):
        axes.set_xlabel(f"{gain:+.2f}", fontsize="x-small", labelpad=3)
    figure.subplots_adjust(0.9 / size[0], 0.22 / size[1], 1, 1 - 0.5 / size[1], wspace=0.05, hspace=0.05)
    return figure


def _show(axes: Axes, image: NDArray[np.uint8]) -> None:
    """One image, (H, W, 3), without axes; the pixels of a small one are seen as they are."""
    axes.imshow(image, interpolation="nearest" if len(image) < 128 else "antialiased")
    axes.set(xticks=[], yticks=[])
    axes.spines[:].set_visible(False)


def save(figure: Figure, path: Path) -> None:
    """Write a sheet as PNG; the same sheet gives the same file."""
    with in_place(path) as partial, fonts.lacking_named():
        figure.savefig(partial, format="png", dpi=150, metadata={"Software": None})
    plt.close(figure)
