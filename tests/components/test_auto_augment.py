"""Learned policies and RandAugment against timm's and torchvision's own classes: their operations on
photos, for every choice that can be drawn.
"""

import random

import numpy as np
import pytest
import torch
from PIL import Image
from pydantic import ValidationError
from scipy import stats
from scipy.stats import binomtest, chisquare, ks_2samp
from sklearn.datasets import load_sample_image
from timm.data.auto_augment import AugmentOp, AugMixAugment, augmix_ops, auto_augment_policy
from torchvision.transforms import InterpolationMode
from torchvision.transforms import autoaugment as torchvisions

from support.draws import make_ids
from trainer.components.aug_mix import AugMix
from trainer.components.auto_augment import AutoAugment
from trainer.components.pixels.operations import OPERATIONS
from trainer.components.torchvision_augment import TorchvisionAutoAugment, TorchvisionRandAugment

PX, NUM = 64, 12_000
FILL = (124, 116, 104)
SPECIAL = {"AutoContrast": "autocontrast", "SolarizeAdd": "solarize_add"}


def our_name(name):
    name = name.removesuffix("Rel").removesuffix("Increasing").removesuffix("Original")
    snake = "".join(f"_{letter.lower()}" if letter.isupper() else letter for letter in name)
    return SPECIAL.get(name, snake.lstrip("_"))


@pytest.fixture(scope="module")
def photos():
    both = [load_sample_image(name) for name in ("china.jpg", "flower.jpg")]
    return np.stack([both[n % 2][5 * n :, 7 * n :][:PX, :PX] for n in range(50)])


def applied(part, photos, drawn):
    images = torch.from_numpy(photos).permute(0, 3, 1, 2).contiguous()
    drawn = {key: torch.from_numpy(values) for key, values in drawn.items()}
    return part.apply(images, drawn, FILL).permute(0, 2, 3, 1).numpy()


def assert_rounds_equal(part, photos, drawn, theirs):
    """Each round on what the rounds before have made of the photos in the source. theirs: (name,
    argument) to a function of pictures.
    """
    for number in range(drawn["operation"].shape[1]):
        one = {key: values[:, number : number + 1] for key, values in drawn.items()}
        ours, expected = applied(part, photos, one), []
        for photo, (place,), (argument,) in zip(
            photos, one["operation"], one["argument"], strict=True
        ):
            change = theirs(OPERATIONS[place], argument)
            expected.append(np.asarray(change(Image.fromarray(photo))))
        photos = np.stack(expected)
        apart = np.abs(ours.astype(int) - photos)
        assert apart.max() <= 1 and apart.mean() < 0.02


@pytest.mark.parametrize("policy", ["original", "originalr", "v0", "v0r"])
def test_pictures_of_every_pair_equal_timms(policy, photos):
    part = AutoAugment(policy=policy, interpolation="bicubic")
    drawn = part.draw(0, make_ids(len(photos)), PX)
    hparams = {"translate_const": 45, "img_mean": FILL, "interpolation": Image.Resampling.BICUBIC}
    assert_rounds_equal(
        part, photos, drawn, lambda name, argument: timms_operation(name, argument, hparams)
    )


def timms_operation(name, argument, hparams):
    """timm's function of one of our names, with our argument in its unit."""
    if name == "identity":
        return lambda picture: picture
    if name == "posterize" and argument == 0:  # which newer PILs refuse
        return lambda picture: picture.point(lambda value: 0)
    theirs = {
        "translate_x": "TranslateXRel",
        "translate_y": "TranslateYRel",
        "autocontrast": "AutoContrast",
    }
    op = AugmentOp(theirs.get(name, name.title().replace("_", "")), hparams=hparams)
    if name.startswith("translate"):
        argument = argument / PX
    values = (int(argument),) if name in ("posterize", "solarize", "solarize_add") else (argument,)
    values = () if op.level_fn is None else values
    return lambda picture: op.aug_fn(picture, *values, **op.kwargs)


@pytest.mark.parametrize("policy", ["original", "originalr", "v0", "v0r"])
@pytest.mark.parametrize("std", [None, 0.5])
def test_what_is_drawn_is_distributed_as_timms(policy, std):
    hparams = {"magnitude_std": std or 0, "translate_const": 45}
    pairs = auto_augment_policy(policy, hparams=hparams)
    found = AutoAugment(policy=policy, magnitude_std=std, interpolation="random")
    drawn = found.draw(0, make_ids(NUM), PX)
    random.seed(0)
    theirs = {}
    for _ in range(NUM):
        for place, op in enumerate(random.choice(pairs)):
            if op.prob < 1.0 and random.random() > op.prob:
                continue
            level = random.gauss(op.magnitude, std) if std else op.magnitude
            level = max(0.0, min(level, 10))
            values = op.level_fn(level, op.hparams) if op.level_fn else (level / 10,)
            theirs.setdefault((place, our_name(op.name)), []).append(values[0])
    for (place, name), values in theirs.items():
        ours = drawn["argument"][drawn["operation"][:, place] == OPERATIONS.index(name), place]
        ours = ours / PX if name.startswith("translate") else ours
        assert binomtest(len(ours), NUM, len(values) / NUM).pvalue > 1e-4
        if name not in ("autocontrast", "equalize", "invert"):
            assert ks_2samp(ours.round(9), np.round(values, 9)).pvalue > 1e-4
    names = {(place, OPERATIONS[one]) for place in (0, 1) for one in drawn["operation"][:, place]}
    assert {one for one in names if one[1] != "identity"} == theirs.keys()


def magnitude_of(name, argument):
    """Our argument in torchvision's unit."""
    if name in ("brightness", "color", "contrast", "sharpness"):
        return argument - 1
    return -argument if name.startswith("translate") else argument


TORCHVISIONS = {our_name(name): name for name in torchvisions.AutoAugment()._augmentation_space(
    10, (PX, PX)
)}  # fmt: skip


@pytest.mark.parametrize("interpolation", ["nearest", "bilinear"])
@pytest.mark.parametrize("policy", ["imagenet", "cifar10", "svhn", None])
def test_pictures_equal_torchvisions(policy, interpolation, photos):
    if policy is None:
        fields = {"num_ops": 2, "magnitude": 9, "num_bins": 31}
        part = TorchvisionRandAugment(**fields, interpolation=interpolation)
    else:
        part = TorchvisionAutoAugment(policy=policy, interpolation=interpolation)
    drawn = part.draw(0, make_ids(len(photos)), PX)
    mode = InterpolationMode[interpolation.upper()]

    def theirs(name, argument):
        if name not in TORCHVISIONS:
            return lambda picture: picture
        strength = magnitude_of(name, argument)
        return lambda picture: torchvisions._apply_op(
            picture, TORCHVISIONS[name], strength, mode, None
        )

    assert_rounds_equal(part, photos, drawn, theirs)


@pytest.mark.parametrize("policy", ["imagenet", "cifar10", "svhn"])
def test_pairs_are_as_frequent_as_torchvisions(policy):
    other = torchvisions.AutoAugment(torchvisions.AutoAugmentPolicy(policy))
    space = other._augmentation_space(10, (PX, PX))
    chances = {}
    for pair in other.policies:
        for place, (name, share, level) in enumerate(pair):
            magnitudes, is_signed = space[name]
            strength = float(magnitudes[level]) if level is not None else 0.0
            for sign in (1, -1) if is_signed else (1,):
                key = place, our_name(name), int(sign * strength * 1e4)
                chances.setdefault(key, 0.0)
                chances[key] += share / len(other.policies) / (2 if is_signed else 1)
    part = TorchvisionAutoAugment(policy=policy, interpolation="nearest")
    drawn = part.draw(0, make_ids(NUM), PX)
    for place in (0, 1):
        found = {}
        for one, argument in zip(
            drawn["operation"][:, place], drawn["argument"][:, place], strict=True
        ):
            strength = magnitude_of(OPERATIONS[one], argument)
            found.setdefault(OPERATIONS[one], []).append(strength)
        for name, strengths in found.items():
            share = sum(p for (at, its, _), p in chances.items() if (at, its) == (place, name))
            if name != "identity":
                assert binomtest(len(strengths), NUM, share).pvalue > 1e-4
        names = {name for (at, name, _), p in chances.items() if at == place and p > 0}
        assert found.keys() - {"identity"} == names


def test_torchvisions_fourteen_are_equally_frequent_at_one_strength():
    part = TorchvisionRandAugment(num_ops=3, magnitude=9, num_bins=31, interpolation="nearest")
    drawn = part.draw(0, make_ids(NUM), PX)
    space = torchvisions.RandAugment()._augmentation_space(31, (PX, PX))
    places, counts = np.unique(drawn["operation"], return_counts=True)
    assert len(places) == len(space) == 14 and chisquare(counts).pvalue > 1e-3
    for name, (magnitudes, is_signed) in space.items():
        chosen = drawn["operation"] == OPERATIONS.index(our_name(name))
        found = magnitude_of(our_name(name), drawn["argument"][chosen])
        strength = float(magnitudes[9]) if magnitudes.ndim else 0.0
        strength = int(strength) if name.startswith("Translate") else strength
        assert np.allclose(np.abs(found), strength, atol=1e-6)
        if is_signed:
            assert binomtest(int((found < 0).sum()), len(found), 0.5).pvalue > 1e-3


def test_a_magnitude_beyond_the_bins_is_refused():
    with pytest.raises(ValidationError, match="30 at most"):
        TorchvisionRandAugment(num_ops=2, magnitude=31, num_bins=31, interpolation="nearest")


@pytest.mark.parametrize("num_channels", [1, 4])
def test_other_channels_go_without_colour(num_channels):
    parts = (
        AutoAugment(policy="v0", interpolation="bilinear"),
        TorchvisionAutoAugment(policy="cifar10", interpolation="nearest"),
        TorchvisionRandAugment(num_ops=2, magnitude=9, num_bins=31, interpolation="nearest"),
    )
    for part in parts:
        drawn = part.draw(0, make_ids(2000), PX, num_channels)
        assert OPERATIONS.index("color") not in drawn["operation"]
        assert part.left_out(num_channels) == ("color",)
        images = torch.full((9, num_channels, PX, PX), 100, dtype=torch.uint8)
        few = {key: torch.from_numpy(values[:9]) for key, values in drawn.items()}
        assert part.apply(images, few, (0,) * num_channels).shape == images.shape


@pytest.mark.parametrize("depth", [None, 1])
def test_mixed_chains_equal_timms_class(monkeypatch, depth, photos):
    """timm's own mixing of its own operations, with our numbers."""
    part = AugMix(width=3, depth=depth, magnitude=6.0, alpha=1.0, interpolation="bilinear")
    drawn = part.draw(0, make_ids(len(photos)), PX)
    hparams = {"img_mean": FILL, "interpolation": Image.Resampling.BILINEAR}
    expected = []
    for row, photo in enumerate(photos):
        chains = iter(
            [
                timms_operation(OPERATIONS[place], argument, hparams)
                for place, argument in zip(*chain, strict=True)
            ]
            for chain in zip(drawn["operation"][row], drawn["argument"][row], strict=True)
        )
        with monkeypatch.context() as patch:
            patch.setattr(np.random, "choice", lambda *given, chains=chains, **more: next(chains))
            mixing = AugMixAugment([], depth=1)
            mixed = mixing._apply_basic(
                Image.fromarray(photo), drawn["weight"][row], float(drawn["share"][row])
            )
        expected.append(np.asarray(mixed))
    ours = applied(part, photos, drawn)
    apart = np.abs(ours.astype(int) - np.stack(expected))
    # a level apart in a move, and then in a chain's equalize, now and then
    assert np.quantile(apart, 0.99) <= 1 and apart.mean() < 0.1
    exact = ~np.isin(drawn["operation"], [OPERATIONS.index(name) for name in MOVES]).any((1, 2))
    assert exact.any() and apart[exact].max() == 0


MOVES = ("rotate", "shear_x", "shear_y", "translate_x", "translate_y")


def test_chains_are_distributed_as_timms():
    part = AugMix(width=3, magnitude=3.0, alpha=0.7, interpolation="random")
    drawn = part.draw(0, make_ids(4000), PX)
    places = [OPERATIONS.index(our_name(op.name)) for op in augmix_ops(3)]
    found, counts = np.unique(drawn["operation"][..., 0], return_counts=True)
    assert sorted(places) == found.tolist() and chisquare(counts).pvalue > 1e-3
    lengths = np.bincount((drawn["operation"] > 0).sum(2).ravel(), minlength=4)
    assert lengths[0] == 0 and chisquare(lengths[1:]).pvalue > 1e-3
    assert stats.kstest(drawn["weight"][:, 0], stats.beta(0.7, 1.4).cdf).pvalue > 1e-3
    assert np.allclose(drawn["weight"].sum(1), 1, atol=1e-6)
    assert stats.kstest(drawn["share"], stats.beta(0.7, 0.7).cdf).pvalue > 1e-3
    random.seed(0)
    for name in ("Rotate", "TranslateXRel", "ColorIncreasing", "SolarizeIncreasing"):
        op = AugmentOp(name, magnitude=3, hparams={"translate_pct": 0.3})
        theirs = [op.level_fn(random.uniform(0, 3), op.hparams)[0] for _ in range(4000)]
        ours = drawn["argument"][drawn["operation"] == OPERATIONS.index(our_name(name))]
        ours = ours / PX if name.startswith("Translate") else ours
        assert ks_2samp(ours, theirs).pvalue > 1e-3
