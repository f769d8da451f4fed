"""Contact sheets: many pictures as one."""

import numpy as np
from numpy.typing import NDArray


def beside(before: NDArray[np.uint8], after: NDArray[np.uint8], columns: int = 12, most: int = 72) -> NDArray[np.uint8]:
    """Two models' images for the same prompts as one picture, in pairs: one model's on the left, the other's right.

    Args:
        before, after: (N, H, W, 3) each.
        columns: of images, an even number.
        most: pairs that are shown, evenly spread over all.
    """
    count = len(after)
    places = evenly_spread(count, most)
    pairs = np.stack([before[places], after[places]], axis=1)  # (pairs, 2, H, W, 3)
    return contact_sheet(pairs.reshape(-1, *after.shape[1:]), columns, zoom=1)


def evenly_spread(count: int, wanted: int) -> list[int]:
    """At most `wanted` of the places 0..count-1, evenly spread: nobody chose them."""
    # unique: where more are wanted than there are, places repeat.
    return np.unique(np.linspace(0, count - 1, wanted).round().astype(int)).tolist() if wanted else []


def contact_sheet(images: NDArray[np.uint8], columns: int, zoom: int = 3) -> NDArray[np.uint8]:
    """Images (N, H, W, 3) as one picture, row by row, each pixel `zoom` times enlarged."""
    n, h, w, _ = images.shape
    # Rounded up; what is left of the last row stays white.
    rows = -(-n // columns)
    sheet = np.full((rows * columns, h, w, 3), 255, np.uint8)
    sheet[:n] = images
    sheet = sheet.reshape(rows, columns, h, w, 3).swapaxes(1, 2).reshape(rows * h, columns * w, 3)
    return sheet.repeat(zoom, 0).repeat(zoom, 1)
