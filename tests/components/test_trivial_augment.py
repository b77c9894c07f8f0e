"""TrivialAugment is torchvision's TrivialAugmentWide on PIL images."""

import numpy as np
import pytest
import torch
from PIL import Image
from scipy.stats import chisquare
from sklearn.datasets import load_sample_image
from torchvision.transforms import InterpolationMode
from torchvision.transforms import functional as images_of_torchvision
from torchvision.transforms.autoaugment import TrivialAugmentWide, _apply_op

from support.draws import make_ids
from trainer.base.streams import uniforms
from trainer.components.pixels.operations import OPERATIONS
from trainer.components.trivial_augment import TrivialAugment

IMAGE_PX = 64
SPACE = TrivialAugmentWide()._augmentation_space(31)
NAMES = {name: name.lower() for name in SPACE} | {
    "ShearX": "shear_x",
    "ShearY": "shear_y",
    "TranslateX": "translate_x",
    "TranslateY": "translate_y",
}


def our_argument(name, magnitude):
    """torchvision's magnitude in our operation's unit."""
    if name in ("Brightness", "Color", "Contrast", "Sharpness"):
        return 1 + magnitude
    return -int(magnitude) if name.startswith("Translate") else magnitude


def all_choices():
    """Every choice torchvision can make: (name, magnitude)."""
    for name, (magnitudes, is_signed) in SPACE.items():
        for magnitude in magnitudes.reshape(-1).tolist():
            yield from ((name, sign * magnitude) for sign in ((1, -1) if is_signed else (1,)))


def test_operations_and_strengths_are_as_frequent_as_torchvisions():
    drawn = TrivialAugment(num_bins=31, interpolation="nearest").draw(0, make_ids(40_000), IMAGE_PX)
    assert chisquare(np.bincount(drawn["operation"])[np.unique(drawn["operation"])]).pvalue > 1e-3
    for name, (magnitudes, is_signed) in SPACE.items():
        arguments = drawn["argument"][drawn["operation"] == OPERATIONS.index(NAMES[name])].round(6)
        signs = (1, -1) if is_signed else (1,)
        expected = [
            our_argument(name, s * m) for s in signs for m in magnitudes.reshape(-1).tolist()
        ]
        values, weights = np.unique(
            np.round(np.array(expected, float), 6) + 0.0, return_counts=True
        )
        found, counts = np.unique(arguments + 0.0, return_counts=True)
        assert np.array_equal(found, values)
        if len(values) > 1:
            assert chisquare(counts, weights / weights.sum() * counts.sum()).pvalue > 1e-3


@pytest.mark.parametrize("interpolation", ["nearest", "bilinear", "bicubic"])
def test_pictures_equal_torchvisions(interpolation):
    photos = [load_sample_image(name) for name in ("china.jpg", "flower.jpg")]
    choices = list(all_choices())
    pixels = np.stack(
        [photos[n % 2][n % 300 :, n % 200 :][:IMAGE_PX, :IMAGE_PX] for n in range(len(choices))]
    )
    mode = InterpolationMode[interpolation.upper()]
    pairs = zip(pixels, choices, strict=True)
    expected = np.stack(
        [np.asarray(_apply_op(Image.fromarray(one), *choice, mode, None)) for one, choice in pairs]
    )
    drawn = {
        "operation": torch.tensor([OPERATIONS.index(NAMES[name]) for name, _ in choices]),
        "argument": torch.tensor(
            [float(our_argument(*choice)) for choice in choices], dtype=torch.float64
        ),
    }
    images = torch.from_numpy(pixels).permute(0, 3, 1, 2).contiguous()
    ours = TrivialAugment(num_bins=31, interpolation=interpolation).apply(
        images, drawn, (124, 116, 104)
    )
    differences = np.abs(ours.permute(0, 2, 3, 1).numpy().astype(int) - expected)
    assert differences.max() <= (0 if interpolation == "nearest" else 1)
    assert differences.mean() < 0.01


@pytest.mark.parametrize("side", ["x", "y"])
def test_a_centered_shear_is_torchvisions_before_0_12(side):
    """Its strength was an angle in radians, about the middle of the image (pull request 5285)."""
    augment = TrivialAugment(num_bins=31, interpolation="bilinear", centered_shear=True)
    ids = make_ids(3000)
    drawn = augment.draw(0, ids, IMAGE_PX)
    plain = TrivialAugment(num_bins=31, interpolation="bilinear").draw(0, ids, IMAGE_PX)
    rows = np.flatnonzero(plain["operation"] == OPERATIONS.index(f"shear_{side}"))
    others = np.delete(np.arange(len(ids)), rows)
    kept = [one for one in others if not OPERATIONS[plain["operation"][one]].startswith("shear")]
    assert all(np.array_equal(drawn[key][kept], plain[key][kept]) for key in drawn)
    angles = np.rad2deg(plain["argument"][rows])
    assert len(rows) > 100 and 50 < np.abs(angles).max() < 57
    photo = load_sample_image("china.jpg")[:IMAGE_PX, : IMAGE_PX + 10]
    expected = [
        np.asarray(
            images_of_torchvision.affine(
                Image.fromarray(photo), 0.0, [0, 0], 1.0,
                [angle, 0.0] if side == "x" else [0.0, angle], InterpolationMode.BILINEAR,
            )
        )
        for angle in angles
    ]  # fmt: skip
    pixels = torch.from_numpy(photo.copy()).permute(2, 0, 1).expand(len(rows), -1, -1, -1)
    parameters = {key: torch.from_numpy(values[rows]) for key, values in drawn.items()}
    ours = augment.apply(pixels.contiguous(), parameters, (0, 0, 0)).permute(0, 2, 3, 1).numpy()
    assert np.abs(ours.astype(int) - np.stack(expected)).max() <= 1


def test_a_draw_depends_on_its_own_address_alone():
    augment, ids = TrivialAugment(num_bins=31, interpolation="nearest"), make_ids(40)
    drawn, some = augment.draw(3, ids, IMAGE_PX), [9, 2, 31]
    again = augment.draw(3, ids[some], IMAGE_PX)
    assert all(np.array_equal(drawn[key][some], again[key]) for key in drawn)


def test_three_channels_draw_what_they_always_drew():
    """The stream behind stored rows: three uniform numbers an image; which = floor(14 u) in
    torchvision's order.
    """
    ids = make_ids(500)
    drawn = TrivialAugment(num_bins=31, interpolation="nearest").draw(7, ids, IMAGE_PX)
    which, strength, side = uniforms(7, "trivial_augment", ids, 3).T
    names = [NAMES[list(SPACE)[place]] for place in (which * 14).astype(int)]
    assert [OPERATIONS[place] for place in drawn["operation"]] == names
    turned = np.array(names) == "rotate"
    degrees = np.linspace(0, 135, 31)[(strength * 31).astype(int)] * np.where(side < 0.5, -1, 1)
    assert np.allclose(drawn["argument"][turned], degrees[turned], rtol=1e-6)


@pytest.mark.parametrize("num_channels", [1, 4])
def test_color_is_not_drawn_for_other_channels_and_the_rest_is_equally_frequent(num_channels):
    augment = TrivialAugment(num_bins=31, interpolation="nearest")
    drawn = augment.draw(0, make_ids(40_000), IMAGE_PX, num_channels)
    names, counts = np.unique(np.array(OPERATIONS)[drawn["operation"]], return_counts=True)
    assert set(names) == set(NAMES.values()) - {"color"} and chisquare(counts).pvalue > 1e-3
    # a signed operation keeps its sign, an unsigned one gets none
    for name, is_signed in (
        ("rotate", True),
        ("sharpness", True),
        ("solarize", False),
        ("posterize", False),
    ):
        arguments = drawn["argument"][drawn["operation"] == OPERATIONS.index(name)] - (
            name == "sharpness"
        )
        assert (arguments < 0).any() == is_signed and (arguments > 0).any()
    images = torch.full((40, num_channels, 20, 20), 100, dtype=torch.uint8)
    drawn = {key: torch.from_numpy(values[:40]) for key, values in drawn.items()}
    assert augment.apply(images, drawn, (0,) * num_channels).shape == images.shape
