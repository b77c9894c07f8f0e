"""Recipes of torchvision's and ConvNeXt's scripts: their published commands make our recipes."""

import pytest

from trainer.convert import from_convnext, from_torchvision
from trainer.convert.make import make_recipe
from trainer.recipe.explain import diff_rows
from trainer.recipe.schema import load_recipe
from trainer.recipe.shipped import find_recipe

V2 = (
    "torchrun --nproc_per_node=8 train.py --model resnet50 --batch-size 128 --lr 0.5"
    " --lr-scheduler cosineannealinglr --lr-warmup-epochs 5 --lr-warmup-method linear"
    " --auto-augment ta_wide --epochs 600 --random-erase 0.1 --weight-decay 0.00002"
    " --norm-weight-decay 0.0 --label-smoothing 0.1 --mixup-alpha 0.2 --cutmix-alpha 1.0"
    " --train-crop-size 176 --model-ema --val-resize-size 232 --ra-sampler --ra-reps 4"
)
TINY = """
python run_with_submitit.py --nodes 4 --ngpus 8 \\
--model convnext_tiny --drop_path 0.1 \\
--batch_size 128 --lr 4e-3 --update_freq 1 \\
--model_ema true --model_ema_eval true \\
--data_path /path/to/imagenet-1k \\
--job_dir /path/to/save_results
"""
TINY_ONE_MACHINE = """
python -m torch.distributed.launch --nproc_per_node=8 main.py \\
--model convnext_tiny --drop_path 0.1 \\
--batch_size 128 --lr 4e-3 --update_freq 4 \\
--model_ema true --model_ema_eval true \\
--data_path /path/to/imagenet-1k
--output_dir /path/to/save_results
"""


def differences(shipped, recipe, model):
    first = load_recipe(find_recipe(shipped)).for_model(model)
    return {row.path: (row.a, row.b) for row in diff_rows(first, recipe)}


@pytest.mark.parametrize("command", [TINY, TINY_ONE_MACHINE])
def test_the_commands_of_convnext_tiny_make_convnext(command):
    found = make_recipe("convnext", command)
    assert not found.lost and differences("convnext", found.recipe, "convnext_tiny") == {}


FINE_TUNING = (
    "python run_with_submitit.py --nodes {nodes} --ngpus 8 --model {model} --drop_path {drop_path}"
    " --input_size 224 --batch_size {images} --lr 5e-5 --update_freq 1 --warmup_epochs 0"
    " --epochs 30 --weight_decay 1e-8 --layer_decay 0.8 --head_init_scale 0.001 --cutmix 0"
    " --mixup 0 --finetune /path/to/checkpoint.pth --data_path /path/to/imagenet-1k"
)


@pytest.mark.parametrize(
    ("model", "drop_path", "nodes", "images", "more"),
    [
        ("convnext_base", 0.2, 2, 32, ""),
        ("convnext_large", 0.3, 2, 32, ""),
        ("convnext_xlarge", 0.4, 4, 16, " --model_ema true --model_ema_eval true"),
    ],
)
def test_the_fine_tuning_commands_of_convnext_make_finetune_adamw(
    model, drop_path, nodes, images, more
):
    command = FINE_TUNING.format(model=model, drop_path=drop_path, nodes=nodes, images=images)
    found = make_recipe("convnext", command + more)
    assert not found.lost and differences("finetune-adamw", found.recipe, model) == {}


def test_the_command_of_torchvisions_second_weights():
    found = make_recipe("torchvision", V2)
    assert not found.lost
    # the rule for other batches is our assumption; the shears are those of the weights' day
    expected = {"lr.scaling", "augment.trivial_augment.centered_shear"}
    assert differences("torchvision-v2", found.recipe, "resnet50").keys() == expected
    assert "centered_shear" in " ".join(found.recipe.assumed)


def test_the_command_of_torchvisions_first_weights():
    found = make_recipe("torchvision", "torchrun --nproc_per_node=8 train.py --model resnet50")
    assert not found.lost
    assert differences("torchvision-v1", found.recipe, "resnet50").keys() == {"lr.scaling"}


@pytest.mark.parametrize(
    ("name", "found"),
    [("vit_b_16", "torchvision:vit_b_16"), ("resnet50", "resnet50"), ("my_net", "my_net")],
)
def test_a_model_that_timm_lacks_is_torchvisions(name, found):
    made = make_recipe("torchvision", f"--model {name}")
    assert made.model == found and made.has_model == (name != "my_net")


def test_steps_of_torchvision_are_counted_after_the_warm_up():
    text = "--lr-warmup-epochs 5 --lr-warmup-method linear --epochs 90"
    schedule = make_recipe("torchvision", text).recipe.lr.schedule
    assert schedule.at_epochs == (35, 65)


def test_torchvisions_warm_up_stays_low_by_default():
    found = make_recipe("torchvision", "--lr-warmup-epochs 3")
    assert not found.lost and "--lr-warmup-method" in found.recipe.assumed["lr.warmup_holds"]
    rates = [found.recipe.lr.at(epoch, 1, 90) for epoch in range(4)]
    assert rates == pytest.approx([0.001, 0.001, 0.001, 0.1])


@pytest.mark.parametrize(
    ("program", "flags", "named"),
    [
        ("torchvision", "--auto-augment augmix", "--auto-augment"),
        ("torchvision", "--norm-weight-decay 0.3", "--norm-weight-decay"),
        ("torchvision", "--weights IMAGENET1K_V2", "--weights"),
        ("torchvision", "--transformer-embedding-decay 0", "--transformer-embedding-decay"),
        ("convnext", "--weight_decay_end 1e-8", "--weight_decay_end"),
        ("convnext", "--input_size 384", "--input_size"),
    ],
)
def test_what_cannot_be_said_is_named(program, flags, named):
    assert [row.split()[0] for row, _ in make_recipe(program, flags).lost] == [named]


@pytest.mark.parametrize("side", [(224, 232), (224, 256), (224, 224), (384, 384), (176, 211)])
def test_the_resize_of_a_test_image_is_kept(side):
    test_px, resized_px = side
    text = f"--val-crop-size {test_px} --val-resize-size {resized_px}"
    image = make_recipe("torchvision", text).recipe.image
    assert int(image.test_px / image.test_crop_share) == resized_px


# Values that have an effect, and the flags beside which they have one.
VALUES = {
    "model": "resnet50", "opt": "adamw", "lr_scheduler": "exponentiallr", "aa": "rand-m3",
    "lr_warmup_method": "linear", "interpolation": "bicubic", "auto_augment": "ta_wide",
    "remode": "const", "train_interpolation": "bilinear", "opt_betas": "0.8 0.9",
    "val_resize_size": "300", "val_crop_size": "160", "train_crop_size": "160", "epochs": "60",
    "input_size": "192", "lr": "0.5", "min_lr": "1e-4", "lr_min": "1e-3", "resplit": "true",
    "mixup_mode": "elem",
}  # fmt: skip
BESIDE = {
    "torchvision": {
        "lr_warmup_method lr_warmup_decay": "--lr-warmup-epochs 5",
        "lr_min": "--lr-scheduler cosineannealinglr",
        "model_ema_steps model_ema_decay": "--model-ema",
        "ra_reps": "--ra-sampler",
        "ra_magnitude": "--auto-augment ra",
    },
    "convnext": {
        "opt": "--opt=lion",
        "momentum": "--opt momentum",
        "model_ema_decay": "--model_ema true",
        "model_ema_eval": "--model_ema true",
        "color_jitter": "--aa=",
        "crop_pct": "",
    },
}
OTHERS = [("torchvision", flag) for flag in from_torchvision.FLAGS]
OTHERS += [("convnext", flag) for flag in from_convnext.FLAGS]
JOB = ("nodes", "ngpus")  # of run_with_submitit.py alone


@pytest.mark.parametrize(
    ("flags", "name", "fields"),
    [
        ("ra --ra-magnitude 7", "rand_augment", {"magnitude": 7, "num_ops": 2, "num_bins": 31}),
        ("cifar10", "auto_augment", {"policy": "cifar10", "interpolation": "bilinear"}),
    ],
)
def test_torchvisions_own_policies(flags, name, fields):
    part = make_recipe("torchvision", f"--auto-augment {flags}").recipe.augment[-1]
    assert part.name == f"torchvision_{name}"
    assert {key: getattr(part, key) for key in fields} == fields


def test_small_images_of_convnext_are_padded_and_cut():
    augment = make_recipe("convnext", "--input_size 32 --aa rand-m9 --reprob 0").recipe.augment
    assert [part.name for part in augment] == ["resize", "flip", "pad_crop", "rand_augment"]
    assert (augment[2].pad_px, augment[2].padding) == (4, "black")


@pytest.mark.parametrize(("program", "flag"), OTHERS, ids=lambda item: getattr(item, "key", item))
def test_no_flag_vanishes(program, flag):
    beside = " ".join(text for keys, text in BESIDE[program].items() if flag.key in keys.split())
    value = VALUES.get(flag.key)
    if value is None:
        kind = flag.kind[0] if isinstance(flag.kind, list) else flag.kind
        value = {str: "other", int: "4", float: "0.3", "yes_no": "true"}.get(kind, "")
    script = "run_with_submitit.py --device cuda" if flag.key in JOB else "--device cuda"
    gpus = None if flag.key in JOB else 2
    before, after = (
        make_recipe(program, f"{script} {beside} {more}", gpus)
        for more in ("", f"{flag.label} {value}")
    )
    told = [row[0] for row in (*after.lost, *after.settings)]
    told += [*after.idle, *after.data, *after.ignored]
    is_changed = (after.recipe.digest, after.lost) != (before.recipe.digest, before.lost)
    if flag.fate == "recipe":
        assert is_changed
    else:
        assert any(row.split()[0] == flag.label for row in told)
        assert (after.recipe.digest == before.recipe.digest) or flag.key == "model"
