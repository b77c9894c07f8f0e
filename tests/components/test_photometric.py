"""Jitter, grey, solarized and blurred images against torchvision and PIL, with the same numbers."""

import numpy as np
import pytest
import torch
from PIL import Image, ImageFilter, ImageOps
from pydantic import ValidationError
from scipy.stats import binomtest, chisquare, ks_2samp, kstest
from sklearn.datasets import load_sample_image
from torchvision.transforms import ColorJitter as TorchvisionsJitter
from torchvision.transforms import functional as torchvisions

from support.draws import make_ids
from support.plans import small_plan
from trainer.base.errors import UserError
from trainer.components.photometric import (
    ColorJitter,
    GaussianBlur,
    Grayscale,
    HueJitter,
    Solarize,
    ThreeAugment,
)
from trainer.components.pixels.hue import hue_turned
from trainer.components.pixels.operations import OPERATIONS

PX = 64
FILL = (124, 116, 104)
ADJUST = {
    "brightness": torchvisions.adjust_brightness,
    "contrast": torchvisions.adjust_contrast,
    "color": torchvisions.adjust_saturation,
}


@pytest.fixture(scope="module")
def images():
    """Parts of two photos, [40, 3, PX, PX] uint8."""
    photos = [load_sample_image(name) for name in ("china.jpg", "flower.jpg")]
    parts = [photos[n % 2][5 * n :, 9 * n :][:PX, :PX] for n in range(40)]
    return torch.from_numpy(np.stack(parts)).permute(0, 3, 1, 2).contiguous()


def pictures(images):
    return [Image.fromarray(one.permute(1, 2, 0).numpy()) for one in images]


def stacked(pictures):
    return torch.from_numpy(np.stack([np.asarray(one) for one in pictures])).permute(0, 3, 1, 2)


def tensors(drawn):
    return {name: torch.from_numpy(values) for name, values in drawn.items()}


def applied(part, images, seed=0):
    drawn = part.draw(seed, make_ids(len(images)), images.shape[-1], images.shape[1])
    return drawn, part.apply(images, tensors(drawn), FILL[: images.shape[1]])


def test_jittered_pictures_equal_torchvisions(images):
    part = ColorJitter(brightness=0.4, contrast=0.3, saturation=1.5)
    drawn, found = applied(part, images)
    expected = []
    for picture, places, factors in zip(
        pictures(images), drawn["operation"], drawn["argument"], strict=True
    ):
        for place, factor in zip(places, factors, strict=True):
            picture = ADJUST[OPERATIONS[place]](picture, factor)
        expected.append(picture)
    assert torch.equal(found, stacked(expected))


@pytest.mark.parametrize("share", [None, 0.6])
def test_factors_and_orders_are_distributed_as_torchvisions(share):
    part = ColorJitter(brightness=0.4, contrast=0.3, saturation=1.5, share=share)
    num = 6000
    drawn = part.draw(0, make_ids(num), PX)
    is_done = drawn["operation"].any(1)
    is_all = share is None and is_done.all()
    assert is_all or binomtest(int(is_done.sum()), num, share).pvalue > 1e-3
    operation, argument = drawn["operation"][is_done], drawn["argument"][is_done]
    theirs = TorchvisionsJitter(0.4, 0.3, 1.5)
    bounds_of = theirs.brightness, theirs.contrast, theirs.saturation
    for name, bounds in zip(ADJUST, bounds_of, strict=True):
        factors = argument[operation == OPERATIONS.index(name)]
        assert len(factors) == len(operation)
        assert kstest(factors, "uniform", (bounds[0], bounds[1] - bounds[0])).pvalue > 1e-3
    counts = np.unique(operation, axis=0, return_counts=True)[1]
    assert len(counts) == 6 and chisquare(counts).pvalue > 1e-3


@pytest.mark.parametrize("share", [None, 0.5])
def test_turned_hues_equal_torchvisions(images, share):
    drawn, found = applied(HueJitter(most=0.5, share=share), images, seed=2)
    expected = []
    for picture, shift in zip(pictures(images), drawn["shift"].tolist(), strict=True):
        factor = (shift - 256 * (shift > 127)) / 255  # whole steps: any of torchvision's factors
        expected.append(picture if shift < 0 else torchvisions.adjust_hue(picture, factor))
    assert torch.equal(found, stacked(expected))
    assert (drawn["shift"] < 0).any() == (share is not None)


def test_every_colours_hue_is_turned_as_pil_turns_it():
    levels = np.arange(0, 256, 5, dtype=np.uint8)  # 52: a cube of 140,608 colours
    cube = np.stack(np.meshgrid(levels, levels, levels), -1).reshape(52, -1, 3)
    for shift in (0, 1, 77, 250):
        picture = torchvisions.adjust_hue(
            Image.fromarray(cube), (shift - 256 * (shift > 127)) / 255
        )
        found = hue_turned(torch.from_numpy(cube).permute(2, 0, 1)[None], torch.tensor([shift]))[0]
        assert torch.equal(found.permute(1, 2, 0), torch.from_numpy(np.array(picture)))


def test_angles_are_distributed_as_torchvisions():
    shift = HueJitter(most=0.2).draw(0, make_ids(20_000), PX)["shift"]
    turned = np.where(shift > 127, shift - 256, shift)
    theirs = np.trunc(255 * np.random.default_rng(0).uniform(-0.2, 0.2, 20_000))
    assert ks_2samp(turned, theirs).pvalue > 1e-3 and abs(turned).max() <= 51


def test_grey_pictures_equal_torchvisions(images):
    drawn, found = applied(Grayscale(share=0.5), images)
    chosen = drawn["operation"][:, 0] > 0
    grey = [torchvisions.to_grayscale(one, 3) for one in pictures(images[chosen])]
    assert torch.equal(found[chosen], stacked(grey)) and 0 < chosen.sum() < len(images)
    assert torch.equal(found[~chosen], images[~chosen])


def test_solarized_pictures_equal_torchvisions(images):
    drawn, found = applied(Solarize(share=0.5, threshold=100), images)
    chosen = drawn["operation"][:, 0] > 0
    solarized = [torchvisions.solarize(one, 100) for one in pictures(images[chosen])]
    assert torch.equal(found[chosen], stacked(solarized)) and 0 < chosen.sum() < len(images)
    assert torch.equal(found[~chosen], images[~chosen])


def test_blurred_pictures_equal_pils(images):
    drawn, found = applied(GaussianBlur(share=0.7, radius_px=(0.1, 2.0)), images)
    expected = [
        one.filter(ImageFilter.GaussianBlur(radius))
        for one, radius in zip(pictures(images), drawn["radius"].tolist(), strict=True)
    ]
    assert torch.equal(found, stacked(expected))
    radius = drawn["radius"][drawn["radius"] > 0]
    assert 0 < len(radius) < len(images) and 0.1 <= radius.min() < radius.max() <= 2


def test_a_kernels_blur_equals_torchvisions_within_a_level(images):
    drawn, found = applied(GaussianBlur(share=1.0, radius_px=(0.1, 2.0), kernel_px=23), images)
    radii = drawn["radius"].tolist()
    blurred = [torchvisions.gaussian_blur(one, 23, s) for one, s in zip(images, radii, strict=True)]
    apart = (found.int() - torch.stack(blurred).int()).abs()
    assert apart.max() <= 1 and apart.float().mean() < 1e-3


def test_the_three_are_as_frequent_and_equal_deit_iiis(images):
    part = ThreeAugment(threshold=128, radius_px=(0.1, 2.0))
    drawn, found = applied(part, images)
    for row, picture in enumerate(pictures(images)):
        expected = {
            "color": lambda one=picture: one.convert("L").convert("RGB"),
            "solarize": lambda one=picture: ImageOps.solarize(one),
            "identity": lambda one=picture: one.filter(
                ImageFilter.GaussianBlur(float(drawn["radius"][row]))
            ),
        }[OPERATIONS[drawn["operation"][row, 0]]]()
        assert np.array_equal(found[row].permute(1, 2, 0), np.asarray(expected))
    many = part.draw(0, make_ids(6000), PX)
    counts = np.unique(many["operation"], return_counts=True)[1]
    assert len(counts) == 3 and chisquare(counts).pvalue > 1e-3
    radius = many["radius"][many["operation"][:, 0] == 0]
    assert kstest(radius, "uniform", (0.1, 1.9)).pvalue > 1e-3


def test_images_of_other_channels_go_without_colour(images):
    for num_channels in (1, 2):
        others = images[:, :num_channels].contiguous()
        _, jittered = applied(ColorJitter(brightness=0.4, saturation=0.4), others)
        _, grey = applied(Grayscale(share=1.0), others)
        _, of_three = applied(ThreeAugment(threshold=128, radius_px=(0.1, 2.0)), others)
        _, turned = applied(HueJitter(most=0.5), others)
        assert torch.equal(turned, others)
        assert torch.equal(grey, others) and jittered.shape == of_three.shape == others.shape
        assert not torch.equal(jittered, others) and not torch.equal(of_three, others)
    assert Grayscale(share=1.0).left_out(1) == ("color",)


def test_a_kernel_larger_than_the_images_is_refused_before_the_first_step():
    part = GaussianBlur(share=1.0, radius_px=(0.1, 2.0), kernel_px=65)
    with pytest.raises(UserError, match="kernel_px 65 is too large"):
        part.check(small_plan())


@pytest.mark.parametrize(
    ("kind", "fields"),
    [
        (ColorJitter, {}),
        (ColorJitter, {"brightness": 0.0}),
        (ColorJitter, {"brightness": 0.4, "share": 0.0}),
        (Grayscale, {"share": 1.5}),
        (HueJitter, {"most": 0.6}),
        (Solarize, {"share": 0.5, "threshold": 257}),
        (GaussianBlur, {"share": 0.5, "radius_px": (2.0, 0.1)}),
        (GaussianBlur, {"share": 0.5, "radius_px": (0.1, 2.0), "kernel_px": 22}),
    ],
)
def test_absurd_fields_are_refused(kind, fields):
    with pytest.raises(ValidationError):
        kind(**fields)
