"""Crops are torchvision's and timm's: the random ones in distribution, the central one exactly."""

import math

import numpy as np
import pytest
import torch
from PIL import Image
from scipy.stats import binomtest, chi2_contingency, ks_2samp
from sklearn.datasets import load_sample_image
from timm.data.transforms_factory import transforms_imagenet_eval
from torchvision.transforms import CenterCrop, Compose, RandomCrop
from torchvision.transforms import InterpolationMode as Mode
from torchvision.transforms import RandomResizedCrop as Reference
from torchvision.transforms import Resize as TorchvisionsResize

from support.draws import make_ids
from trainer.base.streams import uniforms
from trainer.components.crops import (
    Flip,
    InceptionCrop,
    RandomResizedCrop,
    Resize,
    evaluation_geometry,
    evaluation_size,
)
from trainer.data.decode import RESAMPLING, train_square

AREA, ASPECT = (0.08, 1.0), (3 / 4, 4 / 3)
NUM_DRAWS = 3000


def drawn_boxes(height, width, interpolation="random", num_images=NUM_DRAWS):
    """Our boxes for many images of one size."""
    crop = RandomResizedCrop(area=AREA, aspect=ASPECT, interpolation=interpolation)
    return crop.draw(
        1, make_ids(num_images), np.full(num_images, height), np.full(num_images, width)
    )


def reference_boxes(height, width):
    """As many boxes of torchvision."""
    torch.manual_seed(0)
    image = torch.empty(3, height, width)
    return np.array(
        [Reference.get_params(image, list(AREA), list(ASPECT)) for _ in range(NUM_DRAWS)]
    )


@pytest.mark.parametrize(("height", "width"), [(375, 500), (32, 32), (40, 130), (500, 90)])
def test_boxes_are_distributed_as_torchvisions(height, width):
    ours, reference = drawn_boxes(height, width)[0], reference_boxes(height, width)
    for column in range(4):
        assert ks_2samp(ours[:, column], reference[:, column]).pvalue > 1e-3
    for measure in (lambda box: box[:, 2] * box[:, 3], lambda box: box[:, 2] / box[:, 3]):
        assert ks_2samp(measure(ours), measure(reference)).pvalue > 1e-3


def test_sides_of_small_images_are_as_frequent_as_torchvisions():
    both = [
        boxes[:, 2] * 9 + boxes[:, 3] for boxes in (drawn_boxes(8, 8)[0], reference_boxes(8, 8))
    ]
    counts = np.stack([np.bincount(sides, minlength=81) for sides in both])
    assert chi2_contingency(counts[:, counts.sum(0) > 10]).pvalue > 1e-3


@pytest.mark.parametrize(("height", "width"), [(20, 1000), (1000, 20), (1, 1), (1, 3)])
def test_boxes_lie_inside_and_the_central_one_is_torchvisions(height, width):
    boxes = drawn_boxes(height, width, num_images=200)[0]
    assert (boxes[:, :2] >= 0).all() and (boxes[:, 2:] >= 1).all()
    assert (boxes[:, 0] + boxes[:, 2] <= height).all() and (
        boxes[:, 1] + boxes[:, 3] <= width
    ).all()
    impossible = RandomResizedCrop(area=(1.0, 1.0), aspect=ASPECT, interpolation="bilinear")
    central = impossible.draw(0, make_ids(1), np.array([height]), np.array([width]))[0][0]
    assert tuple(central) == Reference.get_params(
        torch.empty(3, height, width), [1.0, 1.0], list(ASPECT)
    )


def test_a_draw_depends_on_its_own_address_alone():
    crop = RandomResizedCrop(area=AREA, aspect=ASPECT, interpolation="random")
    ids, heights, widths = make_ids(50), np.arange(50) + 30, np.arange(50)[::-1] + 40
    boxes, bicubic = crop.draw(3, ids, heights, widths)
    some = [7, 3, 40]
    again = crop.draw(3, ids[some], heights[some], widths[some])
    assert np.array_equal(boxes[some], again[0]) and np.array_equal(bicubic[some], again[1])
    assert not np.array_equal(boxes, crop.draw(3, make_ids(50, epoch=1), heights, widths)[0])
    assert not np.array_equal(boxes, crop.draw(4, ids, heights, widths)[0])


@pytest.mark.parametrize(
    ("interpolation", "share"), [("bilinear", 0.0), ("bicubic", 1.0), ("random", 0.5)]
)
def test_interpolation_is_drawn(interpolation, share):
    bicubic = drawn_boxes(32, 32, interpolation)[1]
    assert bicubic.dtype == bool
    assert abs(bicubic.mean() - share) <= 0.03 * (share == 0.5)


def test_half_of_the_images_are_flipped():
    flipped = Flip().draw(0, make_ids(10_000))
    assert flipped.dtype == bool and abs(flipped.mean() - 0.5) < 0.02


@pytest.mark.parametrize(
    ("test_px", "share", "resized_px"),
    [(224, 0.95, 235), (224, 0.875, 256), (224, 0.9655, 232), (32, 1.0, 32)],
)
def test_evaluation_size_is_floored(test_px, share, resized_px):
    assert evaluation_size(test_px, share) == resized_px


@pytest.mark.parametrize("share", [0.95, 0.875, 1.0])
def test_evaluation_equals_timms(share):
    photo, random = load_sample_image("china.jpg"), np.random.default_rng(0)
    transform = transforms_imagenet_eval(
        96, crop_pct=share, interpolation="bicubic", use_prefetcher=True
    )
    for _ in range(10):
        height, width = (int(side) for side in random.integers(30, 420, 2))
        image = Image.fromarray(photo[:height, :width])
        (resized_h, resized_w), (top, left, kept_h, kept_w) = evaluation_geometry(
            height, width, 96, share
        )
        resized = image.resize((resized_w, resized_h), Image.Resampling.BICUBIC)
        kept = resized.crop((left, top, left + kept_w, top + kept_h))
        assert np.array_equal(np.asarray(kept).transpose(2, 0, 1), transform(image).numpy())


INCEPTION_AREA, INCEPTION_ASPECT = (0.05, 1.0), (0.75, 1.33)


def inception_boxes(height, width, ids, interpolation="bilinear_no_antialias"):
    crop = InceptionCrop(area=INCEPTION_AREA, aspect=INCEPTION_ASPECT, interpolation=interpolation)
    return crop.draw(1, ids, np.full(len(ids), height), np.full(len(ids), width))[0]


def tensorflows_box(height, width, draws):
    """The rule of sample_distorted_bounding_box for one image, from its description: aspect even
    between its bounds; height even between that of the least area and the most that area and both
    sides allow; width by rounding; one row more or less where rounding left the area's bounds; a
    corner short of the room; the whole image after a hundred failures.
    """
    least, most = (share * height * width for share in INCEPTION_AREA)
    low, high = INCEPTION_ASPECT
    for attempt in range(100):
        tilt, growth = draws[2 * attempt : 2 * attempt + 2]
        aspect = low + (high - low) * tilt
        lowest, highest = (round(math.sqrt(area / aspect)) for area in (least, most))
        if round(highest * aspect) > width:
            highest = int((width + 0.5 - 1e-7) / aspect)
            highest -= round(highest * aspect) > width
        highest = min(highest, height)
        lowest = min(lowest, highest)
        rows = lowest + int(growth * (highest - lowest + 1))
        if round(rows * aspect) * rows < least:
            rows += 1
        if round(rows * aspect) * rows > most:
            rows -= 1
        columns = round(rows * aspect)
        if least <= rows * columns <= most and 0 < rows <= height and 0 < columns <= width:
            top = int(draws[-2] * (height - rows)) if rows < height else 0
            left = int(draws[-1] * (width - columns)) if columns < width else 0
            return top, left, rows, columns
    return 0, 0, height, width


@pytest.mark.parametrize(
    ("height", "width"), [(375, 500), (500, 375), (32, 32), (8, 8), (20, 1000), (1, 1), (3, 200)]
)
def test_the_inception_crop_is_tensorflows_rule(height, width):
    ids = make_ids(300)
    ours = inception_boxes(height, width, ids)
    draws = uniforms(1, "inception_crop", ids, 202)
    expected = [tensorflows_box(height, width, row) for row in draws.tolist()]
    assert ours.tolist() == [list(box) for box in expected]


def test_the_inception_crop_shows_less_of_an_image_than_an_even_area_does():
    boxes = inception_boxes(375, 500, make_ids(20_000))
    other = RandomResizedCrop(
        area=INCEPTION_AREA, aspect=INCEPTION_ASPECT, interpolation="bilinear"
    )
    even = other.draw(1, make_ids(20_000), np.full(20_000, 375), np.full(20_000, 500))[0]
    means = [(box[:, 2] * box[:, 3]).mean() / (375 * 500) for box in (boxes, even)]
    assert means == pytest.approx([0.344, 0.414], abs=0.005)


def resized(photo, part, px, interpolation="bicubic"):
    """A photo as the loader makes it, and the box."""
    crop = Resize(part=part, interpolation=interpolation)
    boxes, is_bicubic = crop.draw(0, make_ids(1), np.array([photo.height]), np.array([photo.width]))
    assert is_bicubic.tolist() == [interpolation == "bicubic"]
    square = train_square(photo, boxes[0].tolist(), RESAMPLING[interpolation], px)
    return square.transpose(1, 2, 0), boxes[0].tolist()


@pytest.mark.parametrize(
    ("interpolation", "mode"), [("bicubic", Mode.BICUBIC), ("bilinear", Mode.BILINEAR)]
)
def test_resized_images_equal_torchvisions(interpolation, mode):
    photo = Image.fromarray(load_sample_image("china.jpg"))  # 427 x 640
    found, _ = resized(photo, "whole", 96, interpolation)
    expected = TorchvisionsResize((96, 96), mode)(photo)
    assert np.array_equal(found, np.asarray(expected))
    square = photo.crop((10, 20, 410, 420))
    found, _ = resized(square, "center", 96, interpolation)
    whole = Compose([TorchvisionsResize(96, mode), CenterCrop(96)])
    assert np.array_equal(found, np.asarray(whole(square)))
    # of another shape the source cuts at a pixel of what it has resized
    found, box = resized(photo, "center", 96, interpolation)
    expected = np.asarray(whole(photo)).astype(int)
    assert box == [0, 106, 427, 427]
    assert np.abs(found.astype(int) - expected).mean() < 6


def test_small_images_of_the_training_size_stay_as_they_are():
    photo = Image.fromarray(load_sample_image("china.jpg")).crop((0, 0, 32, 32))
    for part in ("whole", "center", "random"):
        assert np.array_equal(resized(photo, part, 32)[0], np.asarray(photo))


@pytest.mark.parametrize(("height", "width"), [(32, 41), (41, 32)])
def test_random_squares_are_as_frequent_as_torchvisions(height, width):
    sides = np.full(4000, height), np.full(4000, width)
    boxes = Resize(part="random", interpolation="bilinear").draw(0, make_ids(4000), *sides)[0]
    assert (boxes[:, 2:] == 32).all() and not boxes[:, int(height < width) ^ 1].any()
    torch.manual_seed(0)
    image = torch.zeros(3, height, width)
    theirs = [RandomCrop.get_params(image, (32, 32))[:2] for _ in range(4000)]
    moved = int(height < width)
    both = [np.bincount(one, minlength=10) for one in (boxes[:, moved], np.array(theirs)[:, moved])]
    assert chi2_contingency(np.stack(both)).pvalue > 1e-3


@pytest.mark.parametrize("share", [0.2, 1.0])
def test_another_share_is_flipped(share):
    found = Flip(share=share).draw(0, make_ids(3000))
    assert binomtest(int(found.sum()), 3000, share).pvalue > 1e-3
    half = Flip().draw(0, make_ids(3000))
    assert half[found].all() if share < 0.5 else found[half].all()


@pytest.mark.parametrize("share", [None, 0.3])
def test_an_alternating_flip_shows_both_sides_in_two_epochs(share):
    """The draw is that of epoch 0, whatever the epoch; every other epoch has the other side."""
    flip, ids = Flip(share=share, alternating=True), make_ids(3000)
    shown = []
    for epoch in range(4):
        ids[:, 0] = epoch
        shown.append(flip.draw(0, ids))
        assert np.array_equal(flip.draw(0, ids[::-1]), shown[-1][::-1])  # by its address alone
    ids[:, 0] = 0
    first = uniforms(0, "flip", ids, 1)[:, 0] < (share or 0.5)
    assert [np.array_equal(each, first) for each in shown] == [True, False, True, False]
    assert all(np.array_equal(each, ~first) for each in shown[1::2])
    assert np.array_equal(first, Flip(share=share).draw(0, ids))
