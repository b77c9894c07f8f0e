"""The loop of timm's parts: the recipe's numbers arrive in them, and one step of it takes what a
run's step takes.
"""

from dataclasses import replace

import pytest
import timm.loss
import timm.optim
import torch
from timm.data import auto_augment
from timm.data.loader import PrefetchLoader

from trainer.base.settings import make_settings
from trainer.runs.job import Job, plan_of
from trainer.tools.bench import image_folder, photos
from trainer.tools.bench_timm import (
    _EPOCH_IMAGES,
    TimmLoop,
    _endless,
    reason_against,
    timm_loader,
)

SMALL = "image.train_px=32 image.test_px=32"
BATCH = "batch.images=8 batch.norm_images=4"


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    root = tmp_path_factory.mktemp("set")
    return image_folder(root / "data", photos(root / "photos", 4), 16, 4, num_classes=4)


def loop_of(folder, recipe, overrides="", model="test_resnet", **changed):
    plan = plan_of(
        Job(recipe, model, str(folder), None, 0, f"{SMALL} {BATCH} mix.images=4 {overrides}")
    )
    return TimmLoop(plan, replace(make_settings("cpu", workers="0"), **changed), folder)


def test_a_step_takes_the_micro_batches_of_a_runs_step_and_moves_the_weights_once(folder):
    loop, taken = loop_of(folder, "A2"), []
    before = [weight.clone() for weight in loop.model.parameters()]

    def watched(stream):
        for images, labels in stream:
            taken.append((tuple(images.shape), labels.shape))
            yield images, labels

    loop.stream = watched(loop.stream)
    loop.step()
    assert taken == [((4, 3, 32, 32), (4,))] * 2
    assert all(group["step"] == 1 for group in loop.optimizer.param_groups)
    assert any(not torch.equal(*pair) for pair in zip(before, loop.model.parameters(), strict=True))
    assert all(weight.grad is None for weight in loop.model.parameters())


@pytest.mark.parametrize(
    ("recipe", "model"), [("A2", "test_resnet"), ("convnext", "test_convnext")]
)
def test_a_step_as_on_a_gpu(folder, recipe, model):
    """Images normalized and erased by its prefetcher, channels_last, bf16."""
    loop, seen = loop_of(folder, recipe, model=model, precision="bf16", channels_last=True), []
    loop.stream = _endless(timm_loader(loop.plan, loop.settings, folder, has_prefetcher=True))
    loop.model.register_forward_hook(
        lambda _, given, out: seen.append(
            (given[0].is_contiguous(memory_format=torch.channels_last), given[0].dtype, out.dtype)
        )
    )
    loop.step()
    assert seen == [(True, torch.float32, torch.bfloat16)] * 2
    loader = loop.stream.gi_frame.f_locals["loader"]
    assert isinstance(loader, PrefetchLoader) and (loader.random_erasing is not None) == (
        recipe == "convnext"
    )


def test_the_numbers_of_a_resnets_page_arrive_in_timms_parts(folder):
    loop = loop_of(folder, "A2")
    decaying = max(loop.optimizer.param_groups, key=lambda group: group["weight_decay"])
    assert isinstance(loop.optimizer, timm.optim.Lamb) and loop.average is None
    assert [decaying[key] for key in ("lr", "weight_decay", "eps", "max_grad_norm")] == [
        5e-3,
        0.02,
        1e-6,
        1.0,
    ]
    assert isinstance(loop.loss, timm.loss.BinaryCrossEntropy) and loop.loss.target_threshold == 0.2
    assert (
        loop.mixup.mixup_alpha,
        loop.mixup.cutmix_alpha,
        loop.mixup.num_classes,
        loop.mixup.label_smoothing,
    ) == (0.1, 1.0, 4, 0.0)
    loader = loop.stream.gi_frame.f_locals["loader"]
    drawn = next(
        part
        for part in loader.dataset.transform.transforms
        if isinstance(part, auto_augment.RandAugment)
    )
    assert (drawn.num_layers, drawn.ops[0].magnitude, drawn.ops[0].prob) == (2, 7, 0.5)
    assert len(loader.dataset) >= _EPOCH_IMAGES and loader.batch_size == 4


def test_a_convnexts_page_brings_soft_cross_entropy_erasing_and_the_average(folder):
    loop = loop_of(folder, "convnext", "average.decay=0.5", "test_convnext")
    kept = [weight.clone() for weight in loop.average.module.parameters()]
    loop.step()
    assert isinstance(loop.optimizer, torch.optim.AdamW) and isinstance(
        loop.loss, timm.loss.SoftTargetCrossEntropy
    )
    assert loop.mixup.label_smoothing == 0.1 and loop.average.decay == 0.5
    assert any(
        not torch.equal(*pair) for pair in zip(kept, loop.average.module.parameters(), strict=True)
    )
    names = [
        type(part).__name__
        for part in loop.stream.gi_frame.f_locals["loader"].dataset.transform.transforms
    ]
    assert names[-1] == "RandomErasing"


@pytest.mark.parametrize(
    ("recipe", "overrides", "reason"),
    [
        ("A2", BATCH, ""),
        ("convnext", f"{BATCH} mix.images=4", ""),
        ("convnext", f"{BATCH} mix.images=8", "mix.images"),
        ("A2", f"{BATCH} mix=null", "mix off"),
        ("A2", "batch.images=9 batch.norm_images=3", "odd size"),
        ("torchvision-v1", BATCH, "optimizer sgd"),
        ("torchvision-v2", BATCH, "augment trivial_augment"),
    ],
)
def test_what_it_has_no_part_for_is_said(folder, recipe, overrides, reason):
    plan = plan_of(Job(recipe, "test_resnet", str(folder), None, 0, f"{SMALL} {overrides}"))
    assert reason in reason_against(plan, folder) and bool(reason) == bool(
        reason_against(plan, folder)
    )
    assert "folders of colour images" in reason_against(plan, None)
    assert "folders of colour images" in reason_against(plan, folder / "train")
    grey = replace(plan, profile=plan.profile.model_copy(update={"channels": 1}))
    assert "folders of colour images" in reason_against(grey, folder)
