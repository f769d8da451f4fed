"""Contact sheets: many pictures as one."""

import numpy as np
from numpy.typing import NDArray


def contact_sheet(images: NDArray[np.uint8], columns: int, zoom: int = 3) -> NDArray[np.uint8]:
    """Images (N, H, W, 3) as one picture, row by row, each pixel `zoom` times enlarged."""
    n, h, w, _ = images.shape
    # Rounded up; what is left of the last row stays white.
    rows = -(-n // columns)
    sheet = np.full((rows * columns, h, w, 3), 255, np.uint8)
    sheet[:n] = images
    sheet = sheet.reshape(rows, columns, h, w, 3).swapaxes(1, 2).reshape(rows * h, columns * w, 3)
    return sheet.repeat(zoom, 0).repeat(zoom, 1)
