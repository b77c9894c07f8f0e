"""Mixing against timm, torchvision, closed forms and the Beta distribution."""

import functools

import numpy as np
import pytest
import timm.data.mixup
import torch
from pydantic import TypeAdapter, ValidationError
from scipy import stats
from timm.data.mixup import Mixup as TimmMixup
from timm.data.mixup import mixup_target
from torchvision.transforms import v2

from trainer.base.streams import uniforms
from trainer.components.mixing import (
    CutMix,
    Mix,
    Mixing,
    Mixup,
    MixupOrCutMix,
    UnitMixes,
    one_hot_targets,
)

PX, CLASSES = 30, 7


def micro_batch(num_images=6, px=PX):
    generator = torch.Generator().manual_seed(1)
    return (
        torch.randn(num_images, 3, px, px, generator=generator),
        torch.arange(num_images) * 3 % CLASSES,
    )


def draws_of(step):
    """The four uniform numbers behind micro-batch 0 of a step at seed 0: which, share, row, column."""
    return uniforms(0, "mix", np.array([[step, 0]]), 4)[0]


def timms_box_of_2021(shape, share, count=None, *, row, column):
    """timm's rand_bbox as in 0.4.12 to 1.0.26, its centre given: (top, bottom, left, right)."""
    height, width = shape[-2:]
    cut_height, cut_width = int(height * np.sqrt(1 - share)), int(width * np.sqrt(1 - share))
    rows = np.clip([row - cut_height // 2, row + cut_height // 2], 0, height)
    return *rows, *np.clip([column - cut_width // 2, column + cut_width // 2], 0, width)


def test_mixup_or_cutmix_equals_timms_class(monkeypatch):
    """timm's Mixup, fed with our numbers where it asks NumPy for random ones."""
    page = MixupOrCutMix(mixup_alpha=0.2, cutmix_alpha=1.0, cutmix_share=0.5, partner="reversed")
    timms = TimmMixup(0.2, 1.0, prob=1.0, switch_prob=0.5, label_smoothing=0.1, num_classes=CLASSES)
    images, labels = micro_batch()
    kinds = set()
    for step in range(40):
        which, level, down, across = draws_of(step)
        monkeypatch.setattr(np.random, "rand", iter([0.0, which]).__next__)
        monkeypatch.setattr(
            np.random, "beta", lambda a, b, level=level: stats.beta.ppf(level, a, b)
        )
        box = functools.partial(timms_box_of_2021, row=int(down * PX), column=int(across * PX))
        monkeypatch.setattr(timm.data.mixup, "rand_bbox", box)
        expected_images, expected_targets = timms(images.clone(), labels)
        mix = page.draw(0, step, 0, PX)
        mixed, targets = page.apply(images.clone(), one_hot_targets(labels, CLASSES, 0.1), mix)
        torch.testing.assert_close(mixed, expected_images, rtol=1e-6, atol=1e-6)
        torch.testing.assert_close(targets, expected_targets, rtol=1e-6, atol=1e-6)
        kinds.add(mix.box is None)
    assert kinds == {True, False}


@pytest.mark.parametrize(("each", "mode"), [("image", "elem"), ("pair", "pair")])
@pytest.mark.parametrize("mixed_share", [None, 0.6])
def test_a_draw_for_each_image_or_pair_equals_timms_class(monkeypatch, each, mode, mixed_share):
    fields = {"mixup_alpha": 0.2, "cutmix_alpha": 1.0, "cutmix_share": 0.5, "partner": "reversed"}
    page = MixupOrCutMix(**fields, each=each, mixed_share=mixed_share)
    timms = TimmMixup(
        0.2, 1.0, prob=mixed_share or 1.0, label_smoothing=0.1, num_classes=CLASSES, mode=mode
    )
    images, labels = micro_batch()
    number = len(images) // (2 if each == "pair" else 1)
    address = np.array([[3, 2, place] for place in range(number)])
    which, level, down, across, whether = uniforms(0, "mix", address, 5).T
    numbers = iter([which, whether])
    monkeypatch.setattr(np.random, "rand", lambda size: next(numbers))
    monkeypatch.setattr(np.random, "beta", lambda a, b, size: stats.beta.ppf(level, a, b))
    shares = stats.beta.ppf(level, 1.0, 1.0)
    boxed = [n for n in range(number) if which[n] < 0.5 and whether[n] < (mixed_share or 1.0)]
    boxes = iter(
        timms_box_of_2021((3, PX, PX), shares[n], row=int(down[n] * PX), column=int(across[n] * PX))
        for n in boxed
    )
    monkeypatch.setattr(timm.data.mixup, "rand_bbox", lambda *given, **others: next(boxes))
    expected_images, expected_targets = timms(images.clone(), labels)
    places = np.arange(len(images))
    ((_, mix),) = page.drawn(0, 3, {2: slice(None)}, PX, places)
    mixed, targets = page.apply(images.clone(), one_hot_targets(labels, CLASSES, 0.1), mix)
    torch.testing.assert_close(mixed, expected_images, rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(targets, expected_targets, rtol=1e-6, atol=1e-6)
    # the same where images and partners of it are another rank's
    ((_, part),) = page.drawn(0, 3, {2: slice(None)}, PX, places[[1, 2, 3, 4]])
    assert part.each == mix.each[1:5]


def test_a_share_of_the_draws_mixes_and_they_are_those_of_before():
    fields = {"alpha": 0.4, "partner": "reversed"}
    some, all_mix = Mixup(**fields, mixed_share=0.3), Mixup(**fields)
    drawn = [(some.draw(0, step, 0, PX), all_mix.draw(0, step, 0, PX)) for step in range(2000)]
    mixed = [one == other for one, other in drawn]
    assert stats.binomtest(sum(mixed), len(drawn), 0.3).pvalue > 1e-3
    assert all(one == other or one == Mix(1.0, None) for one, other in drawn)


@pytest.mark.parametrize("each", [None, "image", "pair"])
def test_nothing_is_mixed_from_an_epoch_on(each):
    page = CutMix(alpha=1.0, partner="reversed", each=each, until_epochs=2)
    images, labels = micro_batch()
    for epoch in range(4):
        drawn = page.drawn(0, 7, {0: slice(None)}, PX, np.arange(len(images)), epoch)
        mixes, targets = UnitMixes(page, drawn, len(images)), one_hot_targets(labels, CLASSES)
        is_same = torch.equal(mixes.of_images(images.clone()), images)
        assert is_same == torch.equal(mixes.of_targets(targets.clone()), targets) == (epoch >= 2)


@pytest.mark.parametrize(("page", "other"), [(Mixup, v2.MixUp), (CutMix, v2.CutMix)])
def test_rolled_mixing_equals_torchvisions_classes(monkeypatch, page, other):
    images, labels = micro_batch()
    page, other = page(alpha=0.7, partner="rolled"), other(alpha=0.7, num_classes=CLASSES)
    for step in range(20):
        _, level, down, across = draws_of(step)
        places = [torch.tensor([int(across * PX)]), torch.tensor([int(down * PX)])]
        share = torch.tensor([stats.beta.ppf(level, 0.7, 0.7)], dtype=torch.float64)
        monkeypatch.setattr(other._dist, "sample", lambda size, share=share: share)
        with monkeypatch.context() as patch:
            patch.setattr(torch, "randint", lambda high, size, places=places: places.pop(0))
            expected_images, expected_targets = other(images, labels)
        mixed, targets = page.apply(
            images.clone(), one_hot_targets(labels, CLASSES), page.draw(0, step, 0, PX)
        )
        torch.testing.assert_close(mixed, expected_images, rtol=1e-6, atol=1e-6)
        torch.testing.assert_close(targets, expected_targets, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("alpha", [0.1, 1.0, 3.0])
def test_shares_follow_the_beta_distribution(alpha):
    page = Mixup(alpha=alpha, partner="reversed")
    shares = [page.draw(0, step, micro, PX).share for step in range(1000) for micro in range(4)]
    assert stats.kstest(shares, stats.beta(alpha, alpha).cdf).pvalue > 1e-3
    assert min(shares) >= 0 and max(shares) <= 1


@pytest.mark.parametrize("px", [1, 31, 224])
def test_a_boxs_share_is_exactly_the_area_that_stays(px):
    page = CutMix(alpha=1.0, partner="rolled")
    for step in range(300):
        mix = page.draw(3, step, 1, px)
        pasted = np.zeros((px, px))
        top, left, bottom, right = mix.box
        assert 0 <= top <= bottom <= px and 0 <= left <= right <= px
        pasted[top:bottom, left:right] = 1
        assert mix.share == 1 - pasted.sum() / px**2


def test_box_centres_are_uniform_and_sides_as_drawn():
    """Where no border cuts it, the box's half side is half the root of the area that was drawn,
    floored.
    """
    page, px, rows = CutMix(alpha=1.0, partner="rolled"), 224, []
    for step in range(2000):
        _, level, down, across = draws_of(step)
        top, left, bottom, right = page.draw(0, step, 0, px).box
        rows.append((int(down * 8), int(across * 8)))
        side = np.sqrt(1 - level) * px  # Beta(1, 1) is uniform
        if top > 0 and bottom < px:
            assert bottom - top == 2 * int(side / 2)
            assert abs((top + bottom) / 2 - down * px) <= 1
        if left > 0 and right < px:
            assert abs((left + right) / 2 - across * px) <= 1
    places = np.bincount([8 * row + column for row, column in rows], minlength=64)
    assert stats.chisquare(places).pvalue > 1e-3


def test_pixels_are_covered_as_often_as_the_rule_says():
    """How often each of 8 x 8 pixels is pasted, against a count over all centres and 20,000 levels."""
    px, num_draws = 8, 4000
    page = CutMix(alpha=1.0, partner="reversed")
    seen = np.zeros((px, px))
    for step in range(num_draws):
        top, left, bottom, right = page.draw(5, step, 0, px).box
        seen[top:bottom, left:right] += 1
    sides = (np.sqrt(1 - (np.arange(20_000) + 0.5) / 20_000) * px).astype(int)
    pixel, centre = np.arange(px)[:, None, None], np.arange(px)[:, None]
    inside = ((pixel >= centre - sides // 2) & (pixel < centre + sides // 2)).mean(
        axis=1
    )  # [px, level]
    expected = inside @ inside.T / len(sides)
    assert np.abs(seen / num_draws - expected).max() < 4.5 * np.sqrt(0.25 / num_draws)


def test_cutmix_is_chosen_as_often_as_the_page_says():
    page = MixupOrCutMix(mixup_alpha=0.2, cutmix_alpha=1.0, cutmix_share=0.3, partner="rolled")
    num_boxes = sum(page.draw(0, step, 0, PX).box is not None for step in range(3000))
    assert stats.binomtest(num_boxes, 3000, 0.3).pvalue > 1e-3


def test_a_mix_is_a_function_of_seed_step_and_micro_batch():
    page = CutMix(alpha=1.0, partner="rolled")
    addresses = [(0, 1, 2), (1, 1, 2), (0, 2, 2), (0, 1, 3), (0, 2, 1)]
    assert len({page.draw(*address, 224) for address in addresses}) == 5
    assert page.draw(0, 1, 2, 224) == page.draw(0, 1, 2, 224)


@pytest.mark.parametrize("num_images", [1, 2, 5])
@pytest.mark.parametrize("partner", ["reversed", "rolled"])
@pytest.mark.parametrize(
    "mix", [Mix(0.3, None), Mix(1 - 12 / PX**2, (2, 3, 5, 7)), Mix(1.0, (4, 4, 4, 9))]
)
def test_any_number_of_images_is_mixed_by_the_formula(num_images, partner, mix):
    images, labels = micro_batch(num_images)
    targets = one_hot_targets(labels, CLASSES)
    mixed, blended = Mixup(alpha=1.0, partner=partner).apply(images.clone(), targets.clone(), mix)
    own = torch.full((PX, PX), mix.share)
    if mix.box:
        own = torch.ones(PX, PX)
        own[mix.box[0] : mix.box[2], mix.box[1] : mix.box[3]] = 0
    for row in range(num_images):
        other = num_images - 1 - row if partner == "reversed" else row - 1
        torch.testing.assert_close(mixed[row], own * images[row] + (1 - own) * images[other])
        torch.testing.assert_close(
            blended[row], mix.share * targets[row] + (1 - mix.share) * targets[other]
        )


@pytest.mark.parametrize("smoothing", [None, 0.0, 0.1])
def test_one_hot_targets_equal_timms(smoothing):
    labels = torch.tensor([0, 6, 3, 3])
    ours = one_hot_targets(labels, CLASSES, smoothing)
    assert ours.dtype == torch.float32
    torch.testing.assert_close(
        ours, mixup_target(labels, CLASSES, lam=1.0, smoothing=smoothing or 0.0)
    )
    torch.testing.assert_close(ours.sum(1), torch.ones(4))


@pytest.mark.parametrize(
    "page",
    [
        {"name": "mixup", "alpha": 0.0, "partner": "rolled"},
        {"name": "mixup", "alpha": -0.2, "partner": "rolled"},
        {"name": "mixup", "alpha": 1e6, "partner": "rolled"},
        {"name": "mixup", "alpha": 0.2},
        {"name": "mixup", "alpha": 0.2, "partner": "rolled", "each": "pair"},
        {"name": "mixup", "alpha": 0.2, "partner": "rolled", "mixed_share": 1.0},
        {"name": "mixup", "alpha": 0.2, "partner": "rolled", "until_epochs": 0},
        {"name": "cutmix", "alpha": 1.0, "partner": "shuffled"},
        {"name": "cutmix", "mixup_alpha": 1.0, "partner": "rolled"},
        {
            "name": "mixup_or_cutmix",
            "mixup_alpha": 0.2,
            "cutmix_alpha": 1.0,
            "cutmix_share": 1.0,
            "partner": "rolled",
        },
        {
            "name": "mixup_or_cutmix",
            "mixup_alpha": 0.2,
            "cutmix_alpha": 1.0,
            "cutmix_share": 50,
            "partner": "rolled",
        },
    ],
)
def test_absurd_pages_are_refused(page):
    with pytest.raises(ValidationError):
        TypeAdapter(Mixing).validate_python(page)
