"""The GPU kernels as Triton interprets them on a CPU; test_kernels.py runs this in a process of its
own, as Triton asks for that while it is imported.
"""

import numpy as np
import pytest
import torch

from support.draws import make_ids
from trainer.base.streams import device_normals
from trainer.components.augmentation import InKernel
from trainer.components.erasing import RandomErasing
from trainer.components.lighting import Lighting
from trainer.components.mixing import Mix, Mixup, MixupOrCutMix, UnitMixes
from trainer.components.pixels import fused
from trainer.components.pixels.matrices import MATRICES
from trainer.components.pixels.operations import OPERATIONS, operate
from trainer.components.rand_augment import RandAugment
from trainer.components.trivial_augment import TrivialAugment

FILL = (124, 116, 104, 90)
MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
ARGUMENTS = {
    "posterize": [0, 3, 8],
    "solarize": [0, 100, 256],
    "solarize_add": [0, 55, 110],
    "rotate": [-30, 12.3, 90, 135],
    **{key: [-0.3, 0.1234, 0.99] for key in ("shear_x", "shear_y")},
    **{key: [-0.99, 0.3] for key in ("centered_shear_x", "centered_shear_y")},
    **{key: [-31.7, 4, 90.5] for key in ("translate_x", "translate_y")},
    **{key: [0.1, 0.77, 1.9] for key in ("brightness", "color", "contrast", "sharpness")},
}


def both(images, operation, argument, interpolation):
    """Operations [B, R] by kernels, and by tensor operations."""
    columns = operation, argument, interpolation
    fill = FILL[: images.shape[1]]
    found = fused.operate_in_turn(images, *map(np.asarray, columns), OPERATIONS, fill)
    for each in zip(*(np.asarray(column).T for column in columns), strict=True):
        images = operate(
            images, *(torch.from_numpy(np.ascontiguousarray(part)) for part in each), fill
        )
    return found, images


FILTERS = [(0,), (1,), (2,), (1, 2)]


@pytest.mark.parametrize(
    ("name", "filters"),
    [
        (name, each)
        for name in OPERATIONS
        for each in (FILTERS if name in MATRICES else FILTERS[:1])
    ],
)
def test_each_operation_gives_the_same_bytes(name, filters, batch):
    arguments = ARGUMENTS.get(name, [0.0])
    images = batch[: 2 * len(arguments)]
    argument = np.resize(np.array(arguments, np.float64), len(images))[:, None]
    place = np.full(argument.shape, OPERATIONS.index(name))
    filter_ = np.repeat(np.resize(filters, 2), len(arguments))[:, None]
    found, expected = both(images, place, argument, filter_)
    assert torch.equal(found, expected)


@pytest.mark.parametrize("num_channels", [1, 4])
def test_other_numbers_of_channels(num_channels, batch):
    images = torch.cat([batch, batch.flip(0)[:, :1]], 1)[:, -num_channels:]
    place = np.arange(len(images)) % len(OPERATIONS)
    place[place == OPERATIONS.index("color")] = OPERATIONS.index("contrast")
    argument, filters = np.linspace(0.5, 2, len(images)), 1 + place % 2
    found, expected = both(images, place[:, None], np.floor(argument)[:, None], filters[:, None])
    assert torch.equal(found, expected)


@pytest.mark.parametrize("level", [0, 200])
def test_an_image_of_one_level(level):
    images = torch.full((3, 3, 9, 11), level, dtype=torch.uint8)
    place = np.array(
        [[OPERATIONS.index(name)] for name in ("contrast", "autocontrast", "equalize")]
    )
    found, expected = both(images, place, np.full((3, 1), 0.5), np.ones((3, 1), np.int64))
    assert torch.equal(found, expected)


def test_rounds_follow_one_another(batch):
    drawn = RandAugment(
        num_ops=3,
        op_share=0.8,
        magnitude=7.0,
        magnitude_std=1.0,
        increasing=True,
        interpolation="random",
    ).draw(0, make_ids(len(batch)), batch.shape[-1])
    found, expected = both(batch, drawn["operation"], drawn["argument"], drawn["interpolation"])
    assert torch.equal(found, expected)


def test_wide_operations(batch):
    part = TrivialAugment(num_bins=31, interpolation="nearest", centered_shear=True)
    drawn = part.draw(0, make_ids(len(batch)), batch.shape[-1])
    columns = (drawn[name][:, None] for name in ("operation", "argument"))
    found, expected = both(batch, *columns, np.zeros((len(batch), 1), np.int64))
    assert torch.equal(found, expected)


@pytest.fixture
def few(batch):
    return batch[:5]


def levels():
    return (torch.tensor(values) * 255 for values in (MEAN, STD))


def normalized(images):
    """In float64."""
    mean, std = (np.array(values)[:, None, None] for values in (MEAN, STD))
    return (images.numpy() / 255.0 - mean) / std


def made(images, *given, dtype=torch.float32, form=torch.channels_last, **named):
    return fused.model_inputs(images, *levels(), dtype, form, *given, **named)


@pytest.mark.parametrize("form", [torch.channels_last, torch.contiguous_format])
def test_images_are_normalized_in_the_order_asked_for(form, few):
    found = made(few, form=form)
    assert found.is_contiguous(memory_format=form)
    np.testing.assert_allclose(found.numpy(), normalized(few), atol=1e-6, rtol=0)


def test_half_precision_is_the_rounded_number(few):
    assert torch.equal(made(few, dtype=torch.float16), made(few).half())
    # the interpreter cuts the last bits off, a GPU rounds
    torch.testing.assert_close(
        made(few, dtype=torch.bfloat16).float(), made(few), rtol=2.0**-7, atol=0
    )


@pytest.mark.parametrize("fill", ["noise", "mean"])
def test_boxes_are_erased(fill, few):
    part = RandomErasing(share=0.7, area=(0.05, 0.3), aspect=(0.5, 2.0), fill=fill)
    drawn = part.draw(0, make_ids(len(few)), 50)
    expected = normalized(few)
    for row, (top, left, height, width) in enumerate(drawn["box"]):
        values = np.zeros((3, height, width))
        if fill == "noise":
            places = torch.arange(values.size)
            key = torch.from_numpy(drawn["noise_key"][row : row + 1])
            values[:] = device_normals(key, places * 0, places).view(values.shape).numpy()
        expected[row, :, top : top + height, left : left + width] = values
    found = made(
        few, part.in_kernel({name: torch.from_numpy(each) for name, each in drawn.items()})
    )
    np.testing.assert_allclose(
        found.numpy(), expected, atol=1e-5 if fill == "noise" else 1e-6, rtol=0
    )


def test_colours_are_added(few):
    drawn = Lighting(std=0.1).draw(0, make_ids(len(few)), 50)
    found = made(few, InKernel(colour=drawn["color"]))
    expected = normalized(few) + drawn["color"][:, :, None, None]
    np.testing.assert_allclose(found.numpy(), expected, atol=1e-6, rtol=0)


def test_images_with_a_mix_each_are_mixed_as_by_tensors(batch):
    mixing = MixupOrCutMix(
        mixup_alpha=0.5, cutmix_alpha=1.0, cutmix_share=0.5, partner="reversed", each="image"
    )
    px, number = batch.shape[-1], 9
    units = mixing.drawn(0, 0, {0: slice(0, number)}, px, np.arange(number))
    assert len({mix.box is None for mix in units[0][1].each}) == 2
    mixes, images = UnitMixes(mixing, units, number), batch[:number]
    by_tensors = mixes.of_images(torch.from_numpy(normalized(images)))
    np.testing.assert_allclose(
        made(images, mixes=mixes).numpy(), by_tensors.numpy(), atol=1e-6, rtol=0
    )


@pytest.mark.parametrize("partner", ["reversed", "rolled"])
@pytest.mark.parametrize("own", [None, (slice(2, 5), slice(9, 10))])
def test_units_are_mixed(partner, own, batch):
    units = [
        (slice(0, 7), Mix(0.3, None)),
        (slice(7, 12), Mix(0.8, (5, 10, 30, 60))),
        (slice(12, 13), Mix(0.5, None)),
    ]
    images, expected = batch[:13], normalized(batch[:13])
    for places, mix in units:
        unit = expected[places].copy()
        others = unit[::-1] if partner == "reversed" else np.roll(unit, 1, 0)
        if mix.box is None:
            expected[places] = mix.share * unit + (1 - mix.share) * others
        else:
            expected[places, :, 5:30, 10:60] = others[:, :, 5:30, 10:60]
    mixes = UnitMixes(Mixup(alpha=0.2, partner=partner), units, len(images), own)
    kept = expected if own is None else np.concatenate([expected[each] for each in own])
    np.testing.assert_allclose(made(images, mixes=mixes).numpy(), kept, atol=1e-6, rtol=0)
    by_tensors = mixes.of_images(torch.from_numpy(normalized(images)))
    np.testing.assert_allclose(by_tensors.numpy(), kept, atol=1e-12, rtol=0)


def test_what_is_erased_is_mixed(few):
    box, key = np.array([[3, 4, 20, 30], [0, 0, 0, 0]]), np.array([1, 2**32 - 1])
    mixes = UnitMixes(Mixup(alpha=0.2, partner="reversed"), [(slice(0, 2), Mix(0.25, None))], 2)
    erased = InKernel(box=box, noise_key=key)
    plain = made(few[:2], erased)
    expected = 0.25 * plain + 0.75 * plain.flip(0)
    torch.testing.assert_close(made(few[:2], erased, mixes), expected, atol=1e-6, rtol=0)
