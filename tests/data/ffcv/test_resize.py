"""The compiled crop, resize and flip against Pillow's own, byte by byte."""

import numpy as np
import pytest
from PIL import Image

import support.requires_ffcv  # noqa: F401 - skips where ffcv is not built
from trainer.data.ffcv.resize import crop_and_resize, goes_down_first

PIXELS = np.random.default_rng(0).integers(0, 256, (235, 360, 3), dtype=np.uint8)


@pytest.mark.parametrize("side", [8, 32, 100, 224])
def test_squares_are_pillows_byte_by_byte(side):
    rng = np.random.default_rng(side)
    heights, widths = rng.integers(1, 236, 80), rng.integers(1, 361, 80)
    heights[::8], widths[::12] = min(side, 235), side  # passes that Pillow leaves out
    seen = set()
    for height, width in zip(heights.tolist(), widths.tolist(), strict=True):
        top, left = int(rng.integers(0, 236 - height)), int(rng.integers(0, 361 - width))
        is_bicubic, is_flipped = bool(rng.integers(2)), bool(rng.integers(2))
        is_down_first = bool(goes_down_first(np.array(height), np.array(width), side))
        out = np.empty((3, side, side), np.uint8)
        crop_and_resize(
            PIXELS, top, left, height, width, side, is_bicubic, is_down_first, is_flipped, out
        )
        resampling = Image.Resampling.BICUBIC if is_bicubic else Image.Resampling.BILINEAR
        expected = (
            Image.fromarray(PIXELS)
            .crop((left, top, left + width, top + height))
            .resize((side, side), resampling)
        )
        expected = np.asarray(expected)[:, ::-1] if is_flipped else np.asarray(expected)
        assert np.array_equal(out.transpose(1, 2, 0), expected), (
            height,
            width,
            side,
            is_bicubic,
            is_down_first,
        )
        grey = np.empty((1, side, side), np.uint8)
        crop_and_resize(
            PIXELS, top, left, height, width, side, is_bicubic, is_down_first, is_flipped, grey
        )
        assert np.array_equal(grey[0], out[0])
        seen.add((is_bicubic, is_flipped, height > side, width > side))
    assert len(seen) >= 8
