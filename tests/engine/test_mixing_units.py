"""The images that share one mix are the recipe's, whatever the micro-batches are."""

import itertools

import numpy as np
import pytest
import timm
import torch
from torch import nn

from support.pieced import relative, steps
from support.plans import small_plan
from support.ranked import on_ranks
from trainer.base.errors import OverrideError, PlanError
from trainer.base.settings import make_settings
from trainer.components.mixing import one_hot_targets
from trainer.data.dataset import open_data
from trainer.data.order import step_ids
from trainer.data.transforms import inputs_of
from trainer.distributed.communicator import Ranks, alone
from trainer.engine.micro_batches import split
from trainer.engine.precise_norm import make_norms_precise, statistics_note
from trainer.tasks import task_of

SETTINGS = make_settings("cpu", workers="0")
# without draws on the device and norms over images: what is left is rounding
SMOOTH = (
    "drop_path=null lr.peak=5e-4 'model={stem: {name: patchify, patch_px: 4}, activation: {name:"
    " silu}, norm: {name: group_norm, groups: 4, eps: 1e-5}}'"
)


@pytest.fixture(scope="module")
def opened():
    return open_data(small_plan().profile, None)


def plan_of_48(norm_images, extra="mix.images=12 batch.drop_last=false"):
    return small_plan(overrides=f"batch.images=48 batch.norm_images={norm_images} {extra}")


def prepared(opened, plan, step):
    """Mixed images and targets of a step, by the draw of each sample."""
    found = {}
    stream = opened.train_stream(plan, SETTINGS, step)
    for batch in itertools.islice(stream, plan.micro_batches(step)):
        assert batch.step == step
        both = zip(*task_of(plan, SETTINGS).prepare(batch), strict=True)
        found |= zip(map(tuple, batch.ids.tolist()), both, strict=True)
    return found


def by_the_formula(opened, plan, step, mix_images):
    """The same in float64, image by image: unit u of U is every U-th image of the step."""
    mix, (num, batch_images) = plan.recipe.mix, (plan.profile.num_train, plan.recipe.batch.images)
    one_each = small_plan(overrides="batch.images=48 batch.norm_images=48 batch.drop_last=false")
    (batch,) = itertools.islice(opened.train_stream(one_each, SETTINGS, step), 1)
    images = inputs_of(one_each, SETTINGS, batch).double().numpy()
    targets = one_hot_targets(batch.labels, 10, plan.recipe.smoothing).double().numpy()
    ids = step_ids(0, step, num, plan.recipe.repeats, batch_images, plan.steps_per_epoch)
    num_units, found = batch_images // mix_images, {}
    for unit in range(num_units):
        rows = list(range(unit, len(ids), num_units))
        drawn = mix.draw(0, step, unit, images.shape[-1])
        for row, other in zip(rows, reversed(rows), strict=True):
            own = np.full(images.shape[-2:], drawn.share)
            if drawn.box:
                top, left, bottom, right = drawn.box
                own = np.ones(images.shape[-2:])
                own[top:bottom, left:right] = 0
            found[tuple(ids[row].tolist())] = (
                own * images[row] + (1 - own) * images[other],
                drawn.share * targets[row] + (1 - drawn.share) * targets[other],
            )
    return found


@pytest.mark.parametrize("step", [0, 3, 29])  # the last of an epoch has 45 images
def test_what_is_mixed_is_the_formula_over_the_units_bit_for_bit_the_same_for_any_micro_batch(
    opened, step
):
    first = prepared(opened, plan_of_48(12), step)
    expected = by_the_formula(opened, plan_of_48(12), step, 12)
    assert first.keys() == expected.keys() and len(first) == (45 if step == 29 else 48)
    for draw, both in first.items():
        for found, wanted in zip(both, expected[draw], strict=True):
            np.testing.assert_allclose(found.numpy(), wanted, rtol=1e-5, atol=2e-6)
    for norm_images in (1, 2, 3, 4, 6, 8, 16, 24, 48):
        again = prepared(opened, plan_of_48(norm_images), step)
        assert again.keys() == first.keys()
        for draw, both in again.items():
            assert all(map(torch.equal, both, first[draw])), (norm_images, draw)


def test_absent_the_unit_is_the_micro_batch(opened):
    absent, stated = (plan_of_48(norm, extra) for norm, extra in ((8, ""), (24, "mix.images=8")))
    for one, other in ((absent, stated), (absent, plan_of_48(8, "mix.images=8"))):
        first, again = prepared(opened, one, 1), prepared(opened, other, 1)
        assert all(torch.equal(first[draw][0], again[draw][0]) for draw in first)
    assert absent.recipe.digest != stated.recipe.digest
    other = prepared(opened, plan_of_48(24, ""), 1)
    first = prepared(opened, absent, 1)
    assert not all(torch.equal(first[draw][1], other[draw][1]) for draw in first)


def test_what_is_learned_is_the_same_to_rounding_and_plan_says_memory_only(tmp_path):
    whole, *others = (
        steps(
            alone(), str(tmp_path / str(number)), "A2", "test_resnet",
            f"{SMOOTH} batch.images=32 batch.norm_images={number} mix.images=16", 4,
        )
        for number in (32, 16, 8, 1)
    )  # fmt: skip
    for found in others:
        assert found["losses"] == pytest.approx(whole["losses"], rel=1e-6)
        assert relative(found["weights"], whole["weights"]) < 5e-6
        note = statistics_note(found["state"].model, found["state"].plan)
        assert "memory only" in note and "part of the science" not in note


def test_memory_that_runs_out_changes_no_mix(tmp_path):
    overrides = f"{SMOOTH} batch.images=32 batch.norm_images=8 mix.images=16"
    whole = steps(alone(), str(tmp_path / "a"), "A2", "test_resnet", overrides, 3)
    found = steps(
        alone(), str(tmp_path / "b"), "A2", "test_resnet", overrides, 3, "oom@2", micro_batch="auto"
    )
    assert found["changes"] == ["micro_batch 8 -> 4 images after step 1: out of memory"]
    assert found["losses"] == pytest.approx(whole["losses"], rel=1e-6)
    assert relative(found["weights"], whole["weights"]) < 1e-6


@pytest.mark.parametrize(
    ("model", "overrides", "expected"),
    [
        ("test_convnext", "mix.images=8 drop_path=null", "memory only"),
        ("test_convnext", "mix=null drop_path=null", "memory only"),
        ("test_convnext", "drop_path=null", "part of the science, unless mix.images"),
        ("test_convnext", "mix.images=8 drop_path=0.1", "another draw"),
        ("test_resnet", "mix.images=8 drop_path=null", "part of the science"),
    ],
)
def test_memory_only_is_said_where_nothing_depends_on_the_micro_batch(model, overrides, expected):
    plan = small_plan(model=model, overrides=overrides)
    options = {"drop_path_rate": plan.recipe.drop_path} if plan.recipe.drop_path else {}
    note = statistics_note(timm.create_model(model, num_classes=10, **options), plan)
    assert expected in note and ("memory only" in note) == (expected == "memory only")


def samples_of(opened, plan, step):
    """The labels that go through the model together."""
    for batch in itertools.islice(opened.train_stream(plan, SETTINGS, step), 48):
        if batch.step == step:
            ids = batch.ids[:, 1:].float()
            number = plan.norm_samples(step)
            yield from (some.int().tolist() for some, _ in split(ids, batch.labels, number))


@pytest.mark.parametrize("norm_images", [4, 8, 24])
def test_norms_sample_the_same_images_whatever_is_mixed(opened, norm_images):
    absent = list(samples_of(opened, plan_of_48(norm_images, ""), 2))
    for mix_images in (2, 6, 12, 48):
        plan = plan_of_48(norm_images, f"mix.images={mix_images}")
        assert sorted(samples_of(opened, plan, 2)) == sorted(absent)
        assert {len(sample) for sample in absent} == {norm_images}


def test_precise_statistics_are_over_norm_samples(opened):
    plan = plan_of_48(8, "mix.images=24 precise_norm.images=40")
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4))
    make_norms_precise(plan, SETTINGS, [model], opened.train_stream(plan, SETTINGS, 0))
    images = torch.cat(
        [
            task_of(plan, SETTINGS).prepare(batch)[0][place::3]
            for batch in itertools.islice(opened.train_stream(plan, SETTINGS, 0), 2)
            for place in range(3)
        ]
    )[:40]
    with torch.no_grad():
        found = model[0](images).view(5, 8, 4, -1).double()
    variances = found.transpose(1, 2).flatten(2).var(2).mean(0)
    torch.testing.assert_close(model[1].running_var.double(), variances, rtol=1e-5, atol=1e-7)


@pytest.mark.drill
def test_two_ranks_mix_as_one_does(tmp_path):
    overrides = f"{SMOOTH} batch.images=32 batch.norm_images=4 mix.images=8"
    whole = steps(alone(), str(tmp_path / "a"), "A2", "test_resnet", overrides, 3)
    found = on_ranks(steps, 2, str(tmp_path / "b"), "A2", "test_resnet", overrides, 3)
    for rank in found:
        assert relative(rank["weights"], whole["weights"]) < 1e-6


@pytest.mark.parametrize("each", ["image", "pair"])
def test_a_draw_for_each_image_or_pair_is_the_same_for_any_micro_batch(opened, each):
    of_each = f"mix.images=12 batch.drop_last=false mix.each={each}"
    first, *others = (prepared(opened, plan_of_48(number, of_each), 29) for number in (12, 4, 48))
    for again in others:
        assert again.keys() == first.keys()
        assert all(all(map(torch.equal, again[draw], first[draw])) for draw in first)


@pytest.mark.parametrize(
    "partner",
    [
        "reversed",
        "rolled",
        "reversed mix.each=image",
        "rolled mix.each=image",
        "reversed mix.each=pair",
    ],
)
@pytest.mark.parametrize(("mix_images", "num_ranks"), [(48, 3), (24, 8), (12, 8), (16, 6)])
@pytest.mark.parametrize("step", [3, 29])  # the last of an epoch has 45 images
def test_ranks_that_share_a_unit_mix_as_one_does_bit_for_bit(
    opened, partner, mix_images, num_ranks, step
):
    plan = plan_of_48(4, f"mix.images={mix_images} mix.partner={partner} batch.drop_last=false")
    whole, found = prepared(opened, plan, step), {}
    for rank in range(num_ranks):
        ranks = Ranks(rank, num_ranks)
        number = len(plan.assignment(rank, num_ranks).micro_batches(48, plan.num_micro_batches))
        for batch in itertools.islice(opened.train_stream(plan, SETTINGS, step, ranks), number):
            images, targets = task_of(plan, SETTINGS).prepare(batch)
            ids = batch.ids
            if batch.num_parts > 1:
                part = plan.part_rows(step, batch.micro_batch, batch.part, batch.num_parts)
                ids = torch.cat([ids[rows] for rows in part.own])
            assert len(ids) == len(images)
            found |= zip(map(tuple, ids.tolist()), zip(images, targets, strict=True), strict=True)
    assert found.keys() == whole.keys()
    for draw, both in found.items():
        assert all(map(torch.equal, both, whole[draw])), draw


@pytest.mark.parametrize(
    ("overrides", "path", "remedy"),
    [
        ("batch.images=32 mix.images=12", ("mix", "images"), "8"),
        ("batch.images=7 batch.norm_images=7 mix.images=3", ("mix", "images"), "mix.images=null"),
        ("mix.images=1", ("mix", "images"), "2"),
    ],
)
def test_units_that_do_not_make_up_a_step_are_refused(overrides, path, remedy):
    with pytest.raises(OverrideError) as caught:
        small_plan(overrides=overrides)
    assert "mix.images" in str(caught.value) and remedy in str(caught.value)


def test_a_last_step_with_too_few_images_for_its_units_is_refused_where_they_share_a_micro_batch():
    # 1437 = 47 x 30 + 27
    extra = "batch.images=30 batch.drop_last=false mix.images=2"
    with pytest.raises(PlanError) as caught:
        small_plan(overrides=f"batch.norm_images=30 {extra}")
    assert caught.value.path == ("mix", "images") and "drop_last" in str(caught.value)
    assert small_plan(overrides=f"batch.norm_images=2 {extra}").num_micro_batches == 15
