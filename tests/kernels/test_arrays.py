"""Arrays in huge pages."""

from __future__ import annotations

import numpy as np
import pytest

from flashmoe.kernels.arrays import zeros_f32

HUGE_PAGE = 2 << 20


@pytest.mark.parametrize("shape", [(3, 5), (0, 4), (32, 128, 128), (5, 128, 1031)])
def test_they_are_zero_and_can_be_written(shape: tuple[int, ...]) -> None:
    array = zeros_f32(shape)
    assert array.shape == shape
    assert array.dtype == np.float32
    assert array.flags.c_contiguous
    assert not array.any()
    array += 1
    assert array.all()


@pytest.mark.parametrize("shape", [(32, 128, 128), (5, 128, 1031)])
def test_what_fills_a_huge_page_begins_with_one(shape: tuple[int, ...]) -> None:
    assert zeros_f32(shape).ctypes.data % HUGE_PAGE == 0


def test_two_share_nothing() -> None:
    first, second = zeros_f32((512, 1024)), zeros_f32((512, 1024))
    first.fill(1)
    assert not second.any()
