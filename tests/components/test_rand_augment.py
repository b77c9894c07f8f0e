"""RandAugment is timm's: its choices in distribution, its pictures on photos."""

import random
from collections import Counter, defaultdict

import numpy as np
import pytest
import torch
from PIL import Image
from pydantic import ValidationError
from scipy.stats import chi2_contingency, chisquare, ks_2samp
from sklearn.datasets import load_sample_image
from timm.data.auto_augment import NAME_TO_OP, rand_augment_transform

from support.draws import make_ids
from trainer.base.streams import uniforms
from trainer.components.pixels.channels import channel_notes
from trainer.components.pixels.geometry import INTERPOLATIONS
from trainer.components.pixels.operations import OPERATIONS
from trainer.components.rand_augment import RandAugment
from trainer.components.trivial_augment import TrivialAugment

FILL = (124, 116, 104)
IMAGE_PX = 100
NUM_DRAWS = 6000
TIMM_NAMES = {
    "AutoContrast": "autocontrast",
    "Equalize": "equalize",
    "Invert": "invert",
    "Rotate": "rotate",
    "Posterize": "posterize",
    "Solarize": "solarize",
    "SolarizeAdd": "solarize_add",
    "Color": "color",
    "Contrast": "contrast",
    "Brightness": "brightness",
    "Sharpness": "sharpness",
    "ShearX": "shear_x",
    "ShearY": "shear_y",
    "TranslateXRel": "translate_x",
    "TranslateYRel": "translate_y",
}
NAMES = {ours: theirs for theirs, ours in TIMM_NAMES.items()}


def make(**changes):
    """rand-m7-mstd0.5-inc1, and what is changed."""
    fields = {
        "num_ops": 2,
        "op_share": 0.5,
        "magnitude": 7,
        "magnitude_std": 0.5,
        "increasing": True,
    }
    return RandAugment(**(fields | {"interpolation": "random"} | changes))


def timms_choices(text):
    """What timm does: for each draw the names of the operations, and all arguments by name."""
    transform = rand_augment_transform(text, {"translate_const": 45, "img_mean": FILL})
    rounds, arguments = [], defaultdict(list)

    def recording(name):
        def record(image, *values, **_):
            rounds[-1].append(name)
            arguments[name] += values
            return image

        return record

    for op in transform.ops:
        op.aug_fn = recording(TIMM_NAMES[op.name.removesuffix("Increasing")])
    random.seed(0)
    np.random.seed(0)
    for _ in range(NUM_DRAWS):
        rounds.append([])
        transform(None)
    return rounds, arguments


def our_choices(augment):
    """The same of ours."""
    drawn = augment.draw(5, make_ids(NUM_DRAWS), IMAGE_PX)
    names = np.array(OPERATIONS)[drawn["operation"]]
    arguments = {name: drawn["argument"][names == name] for name in NAMES}
    for name in ("translate_x", "translate_y"):
        arguments[name] = arguments[name] / IMAGE_PX
    return [[name for name in row if name != "identity"] for row in names], arguments


@pytest.mark.parametrize(
    ("text", "changes"),
    [
        ("rand-m7-mstd0.5-inc1", {}),
        ("rand-m9-mstd0.5-inc1", {"magnitude": 9}),
        ("rand-m9-mstd1.0", {"magnitude": 9, "magnitude_std": 1.0, "increasing": False}),
        (
            "rand-m4-n3-p0.8-inc1",
            {"magnitude": 4, "num_ops": 3, "op_share": 0.8, "magnitude_std": None},
        ),
    ],
)
def test_choices_are_distributed_as_timms(text, changes):
    (theirs, their_arguments), (ours, our_arguments) = (
        timms_choices(text),
        our_choices(make(**changes)),
    )
    for what in (
        len,
        lambda row: row[0] if row else "",
        lambda row: row[-1] if len(row) > 1 else "",
    ):
        counts = [Counter(map(what, rows)) for rows in (theirs, ours)]
        table = [[count[key] for key in counts[0] | counts[1]] for count in counts]
        assert chi2_contingency(table).pvalue > 1e-3
    for name, values in their_arguments.items():
        if values:
            assert_alike(np.round(values, 9), np.round(our_arguments[name], 9))


def assert_alike(first, second):
    """Two samples may come from one distribution: the same few values about equally often, or alike
    as wholes.
    """
    values = np.union1d(first, second)
    counts = np.array([[np.sum(sample == value) for value in values] for sample in (first, second)])
    frequent = counts[:, counts.sum(0) > 10]
    if len(values) > 20:
        assert ks_2samp(first, second).pvalue > 1e-3
    elif frequent.shape[1] > 1:
        assert chi2_contingency(frequent).pvalue > 1e-3
    else:
        assert frequent.all(), values


def test_all_fifteen_are_equally_frequent():
    rounds, _ = our_choices(make(op_share=1.0))
    counts = Counter(name for row in rounds for name in row)
    assert counts.keys() == NAMES.keys()
    assert chisquare(list(counts.values())).pvalue > 1e-3


@pytest.mark.parametrize(
    ("interpolation", "share"), [("bilinear", 0.0), ("bicubic", 1.0), ("random", 0.5)]
)
def test_interpolation_is_drawn_for_each_operation(interpolation, share):
    drawn = make(interpolation=interpolation).draw(0, make_ids(NUM_DRAWS), IMAGE_PX)[
        "interpolation"
    ]
    is_bicubic = drawn == INTERPOLATIONS.index("bicubic")
    assert (is_bicubic | (drawn == INTERPOLATIONS.index("bilinear"))).all()
    assert abs(is_bicubic.mean() - share) <= 0.02 * (share == 0.5)
    if share == 0.5:
        assert abs((is_bicubic[:, 0] & is_bicubic[:, 1]).mean() - 0.25) < 0.02


def test_a_draw_depends_on_its_own_address_alone():
    ids, augment = make_ids(40), make()
    drawn, some = augment.draw(3, ids, IMAGE_PX), [9, 2, 31]
    again = augment.draw(3, ids[some], IMAGE_PX)
    assert all(np.array_equal(drawn[key][some], again[key]) for key in drawn)


def pieces(num_images):
    """Square pieces of two photos, IMAGE_PX a side."""
    photos = [load_sample_image(name) for name in ("china.jpg", "flower.jpg")]
    place = np.random.default_rng(1)
    starts = place.integers(0, 300, (num_images, 2))
    return [
        photos[n % 2][top : top + IMAGE_PX, left : left + IMAGE_PX]
        for n, (top, left) in enumerate(starts)
    ]


def timm_picture(pixels, operations, arguments, filters):
    """One photo after its operations, done by timm's own functions on a PIL image, in their order."""
    image = Image.fromarray(pixels)
    for place, argument, resample in zip(operations, arguments, filters, strict=True):
        name = OPERATIONS[place]
        if name == "identity":
            continue
        whole = name in ("posterize", "solarize", "solarize_add")
        value = (
            int(argument)
            if whole
            else argument / IMAGE_PX
            if name.startswith("translate")
            else argument
        )
        values = () if name in ("autocontrast", "equalize", "invert") else (value,)
        kinds = {"fillcolor": FILL, "resample": Image.Resampling[INTERPOLATIONS[resample].upper()]}
        image = NAME_TO_OP[NAMES[name]](image, *values, **kinds)
    return np.asarray(image)


@pytest.mark.parametrize(
    "changes", [{"op_share": 1.0}, {"num_ops": 3, "magnitude": 9}, {"increasing": False}]
)
def test_pictures_equal_timms(changes):
    pixels, augment = pieces(60), make(**changes)
    drawn = augment.draw(2, make_ids(60), IMAGE_PX)
    images = torch.from_numpy(np.stack(pixels)).permute(0, 3, 1, 2).contiguous()
    ours = augment.apply(
        images, {key: torch.from_numpy(value) for key, value in drawn.items()}, FILL
    )
    expected = np.stack([timm_picture(*row) for row in zip(pixels, *drawn.values(), strict=True)])
    differences = np.abs(ours.permute(0, 2, 3, 1).numpy().astype(int) - expected).mean((1, 2, 3))
    # Two operations in a row: a table drawn from pixels that differ by one level may differ a
    # little more.
    assert differences.max() < 1 and differences.mean() < 0.02


@pytest.mark.parametrize(
    "wrong", [{"magnitude": 11}, {"op_share": 1.5}, {"num_ops": 0}, {"interpolation": "nearest"}]
)
def test_absurd_pages_are_refused(wrong):
    with pytest.raises(ValidationError):
        make(**wrong)


@pytest.mark.parametrize("increasing", [True, False])
def test_three_channels_draw_what_they_always_drew(increasing):
    """The stream behind stored rows: five uniform numbers an operation; which = floor(15 u) in
    timm's order.
    """
    augment, ids = make(increasing=increasing, magnitude_std=None), make_ids(500)
    drawn, draws = augment.draw(7, ids, IMAGE_PX), uniforms(7, "rand_augment", ids, 10)
    for op in range(2):
        which, whether, _, side, filtering = draws[:, 5 * op : 5 * op + 5].T
        names = [
            list(NAMES)[place] if is_on else "identity"
            for place, is_on in zip((which * 15).astype(int), whether < 0.5, strict=False)
        ]
        assert [OPERATIONS[place] for place in drawn["operation"][:, op]] == names
        turned = np.array(names) == "rotate"
        assert np.array_equal(
            drawn["argument"][turned, op], np.where(side < 0.5, 21.0, -21.0)[turned]
        )
        assert np.array_equal(
            drawn["interpolation"][:, op] == INTERPOLATIONS.index("bicubic"), filtering < 0.5
        )


@pytest.mark.parametrize("num_channels", [1, 2, 4])
def test_color_is_not_drawn_for_other_channels_and_the_rest_is_equally_frequent(num_channels):
    augment = make(op_share=1.0)
    drawn = augment.draw(5, make_ids(NUM_DRAWS), IMAGE_PX, num_channels)
    names, counts = np.unique(np.array(OPERATIONS)[drawn["operation"]], return_counts=True)
    assert set(names) == NAMES.keys() - {"color"} and chisquare(counts).pvalue > 1e-3
    contrast = drawn["argument"][drawn["operation"] == OPERATIONS.index("contrast")]
    in_three = augment.draw(5, make_ids(NUM_DRAWS), IMAGE_PX)
    three = in_three["argument"][in_three["operation"] == OPERATIONS.index("contrast")]
    assert ks_2samp(contrast, three).pvalue > 1e-3
    assert augment.left_out(num_channels) == ("color",) and augment.left_out(3) == ()


def test_a_run_says_what_it_leaves_out():
    augment = (make(), TrivialAugment(num_bins=31, interpolation="nearest"))
    assert channel_notes(augment, 3) == ()
    assert channel_notes(augment, 1) == (
        "note: rand_augment leaves out color for 1-channel images",
        "note: trivial_augment leaves out color for 1-channel images",
    )


def grey_pictures(augment, pixels, drawn):
    """What timm makes of the pieces in PIL's "L"."""
    pictures = []
    for piece, *choices in zip(pixels, *drawn.values(), strict=True):
        image = Image.fromarray(piece)
        for name, argument, resample in zip(*choices, strict=True):
            name = OPERATIONS[name]
            if name != "identity":
                whole = name in ("posterize", "solarize", "solarize_add")
                moved = argument / IMAGE_PX if name.startswith("translate") else argument
                values = (
                    ()
                    if name in ("autocontrast", "equalize", "invert")
                    else (int(argument) if whole else moved,)
                )
                kinds = {
                    "fillcolor": (FILL[0],),
                    "resample": Image.Resampling[INTERPOLATIONS[resample].upper()],
                }
                image = NAME_TO_OP[NAMES[name]](image, *values, **kinds)
        pictures.append(np.asarray(image))
    return np.stack(pictures)


@pytest.mark.parametrize("changes", [{"op_share": 1.0}, {"increasing": False, "op_share": 1.0}])
def test_grey_pictures_equal_timms(changes):
    pixels, augment = (
        [np.asarray(Image.fromarray(piece).convert("L")) for piece in pieces(60)],
        make(**changes),
    )
    drawn = augment.draw(2, make_ids(60), IMAGE_PX, 1)
    ours = augment.apply(torch.from_numpy(np.stack(pixels))[:, None], tensors(drawn), FILL[:1])
    differences = np.abs(
        ours[:, 0].numpy().astype(int) - grey_pictures(augment, pixels, drawn)
    ).mean((1, 2))
    assert differences.max() < 1 and differences.mean() < 0.02


def tensors(drawn):
    return {key: torch.from_numpy(value) for key, value in drawn.items()}


def test_other_channels_are_changed_each_for_itself_but_for_contrasts_mean():
    generator, augment = torch.Generator().manual_seed(0), make(op_share=1.0)
    images = torch.randint(0, 256, (200, 4, 20, 20), dtype=torch.uint8, generator=generator)
    fill = (1, 60, 120, 200)
    drawn = augment.draw(4, make_ids(200), 20, 4)
    together = augment.apply(images, tensors(drawn), fill)
    alone = [augment.apply(images[:, c : c + 1], tensors(drawn), fill[c : c + 1]) for c in range(4)]
    is_contrast = (drawn["operation"] == OPERATIONS.index("contrast")).any(1)
    assert 5 < is_contrast.sum() < 100 and torch.equal(
        together[~is_contrast], torch.cat(alone, 1)[~is_contrast]
    )


def test_contrast_of_other_channels_is_about_the_mean_of_all_values():
    images = torch.tensor([10, 20, 30, 101], dtype=torch.uint8).view(1, 4, 1, 1).expand(1, 4, 3, 3)
    drawn = {
        "operation": [[OPERATIONS.index("contrast")]],
        "argument": [[0.5]],
        "interpolation": [[1]],
    }
    drawn = {
        key: torch.tensor(value, dtype=torch.float64 if key == "argument" else torch.int64)
        for key, value in drawn.items()
    }
    # the mean of 10, 20, 30 and 101 is 40.25, rounded 40; half way to it, truncated
    assert make().apply(images, drawn, (0, 0, 0, 0))[0, :, 0, 0].tolist() == [25, 30, 35, 70]
