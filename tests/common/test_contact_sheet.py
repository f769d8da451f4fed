import numpy as np

from workbench.common.contact_sheet import beside


def test_pairs_stand_side_by_side_and_rows_are_filled_left_to_right():
    before = np.arange(7, dtype=np.uint8).reshape(7, 1, 1, 1).repeat(3, axis=3)
    sheet = beside(before, before + 100, columns=4)
    assert sheet.shape == (4, 4, 3)
    assert sheet[..., 0].tolist() == [[0, 100, 1, 101], [2, 102, 3, 103], [4, 104, 5, 105], [6, 106, 255, 255]]


def test_of_many_pairs_some_are_shown_from_the_first_to_the_last():
    before = np.arange(100, dtype=np.uint8).reshape(100, 1, 1, 1).repeat(3, axis=3)
    shown = beside(before, before, columns=2, most=5)[:, 0, 0]
    assert shown.tolist() == [0, 25, 50, 74, 99]
