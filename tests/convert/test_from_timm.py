"""Recipes of timm's train.py. The references are timm's own schedulers and transforms."""

import hashlib

import pytest
import safetensors.torch
import torch
from timm.scheduler.scheduler_factory import create_scheduler_v2

from trainer.convert.make import make_recipe
from trainer.convert.parts import rand_augment_fields
from trainer.convert.timm_flags import FLAGS
from trainer.recipe import tree
from trainer.recipe.explain import diff_rows
from trainer.recipe.schema import load_recipe
from trainer.recipe.shipped import find_recipe

A2 = (
    "./distributed_train.sh 4 /data/imagenet --model resnet50 -b 512 --lr 5e-3 --opt lamb"
    " --weight-decay .02 --sched cosine --epochs 300 --warmup-epochs 5 --cooldown-epochs 0"
    " --bce-loss --bce-target-thresh 0.2 --smoothing 0 --aug-repeats 3 --aa rand-m7-mstd0.5-inc1"
    " --mixup .1 --cutmix 1.0 --drop-path .05 --crop-pct .95 --amp --channels-last -j 8"
)
# Every flag of timm's train.py at aa4b5850, without its dashes.
TODAY = """
    config data data-dir dataset train-split val-split train-num-samples val-num-samples
    dataset-download class-map input-img-mode input-key target-key dataset-trust-remote-code model
    pretrained pretrained-path initial-checkpoint resume no-resume-opt num-classes gp img-size
    in-chans input-size crop-pct mean std interpolation batch-size validation-batch-size
    channels-last fuser grad-accum-steps grad-checkpointing fast-norm model-kwargs head-init-scale
    head-init-bias torchcompile-mode torchscript torchcompile device amp amp-dtype model-dtype
    no-ddp-bb synchronize-step local_rank device-modules opt opt-eps opt-betas momentum weight-decay
    clip-grad clip-mode layer-decay layer-decay-min-scale layer-decay-no-opt-scale opt-kwargs sched
    sched-on-updates lr lr-base lr-base-size lr-base-scale lr-noise lr-noise-pct lr-noise-std
    lr-cycle-mul lr-cycle-decay lr-cycle-limit lr-k-decay warmup-lr min-lr epochs epoch-repeats
    start-epoch decay-milestones decay-epochs warmup-epochs cooldown-epochs patience-epochs
    decay-rate no-aug scale ratio hflip vflip color-jitter color-jitter-prob grayscale-prob
    gaussian-blur-prob aug-repeats aug-splits jsd-loss bce-loss bce-sum bce-target-thresh
    bce-pos-weight reprob remode recount resplit mixup cutmix cutmix-minmax mixup-prob
    mixup-switch-prob mixup-mode mixup-off-epoch smoothing train-interpolation drop drop-connect
    drop-path drop-block bn-momentum bn-eps sync-bn dist-bn split-bn model-ema model-ema-force-cpu
    model-ema-decay model-ema-warmup seed worker-seeding log-interval val-interval recovery-interval
    checkpoint-hist workers save-images pin-mem no-prefetcher output experiment eval-metric tta
    use-multi-epochs-loader log-wandb wandb-project wandb-tags wandb-resume-id train-img-sizes
    train-batch-sizes train-size-probs train-size-schedule train-size-schedule-spread
    train-size-random-mix train-batches-per-epoch variable-batch-loss-scale naflex-loader
    naflex-train-seq-lens naflex-max-seq-len naflex-patch-sizes naflex-patch-size-probs
    naflex-loss-scale naflex-patchify-channels-first kd-model-name kd-distill-type kd-loss-type
    distill-loss-weight task-loss-weight kd-temperature kd-student-feature-dim
    kd-teacher-feature-dim kd-token-distill-type warmup-prefix train-crop-mode aa
"""
# Beside these flags the one that is tried has an effect; a key is of the flags named.
BESIDE = {
    "lr_base lr_base_size lr_base_scale": "--lr-base-scale linear",
    "decay_rate decay_epochs": "--sched step",
    "decay_milestones": "--sched multistep",
    "bce_sum bce_target_thresh": "--bce-loss --mixup 0.1",
    "remode": "--reprob 0.25",
    "mixup_switch_prob": "--mixup 0.2 --cutmix 1",
    "model_ema_decay model_ema_force_cpu": "--model-ema",
    "clip_mode": "--clip-grad 1",
    "aug_splits": "--jsd-loss --aug-splits 2",
    "jsd_loss": "--aug-splits 3",
    "dist_bn sync_bn": "",
    "split_bn": "--jsd-loss --aug-splits 3",
    "color_jitter color_jitter_prob": "--aa=",
    "opt_eps opt_betas": "--opt adamw",
    "patience_epochs": "--sched plateau",
    "lr_noise_pct lr_noise_std": "--lr-noise 0.4 0.9",
    "lr_cycle_mul lr_cycle_decay": "--lr-cycle-limit 2",
    "mixup_prob mixup_mode mixup_off_epoch": "--mixup 0.2",
    "pretrained_path": "--pretrained",
    "resplit": "--reprob 0.3 --aug-splits 3 --jsd-loss",
    "kd_distill_type kd_temperature distill_loss_weight task_loss_weight kd_loss_type": (
        "--kd-model-name resnet18"
    ),
    "kd_student_feature_dim kd_teacher_feature_dim": "--kd-model-name resnet18",
    "kd_token_distill_type": "--kd-model-name resnet18 --kd-distill-type token",
}
VALUES = {
    "opt": "adamw", "sched": "poly", "lr_base_scale": "sqrt", "clip_mode": "agc", "remode": "const",
    "train_interpolation": "bilinear", "interpolation": "bilinear", "model": "resnet18",
    "input_size": "3 192 192", "aa": "rand-m3", "opt_betas": "0.8 0.9", "scale": "0.3 0.9",
    "ratio": "0.8 1.2", "crop_pct": "0.9", "aug_splits": "4", "epochs": "90", "img_size": "160",
    "decay_milestones": "20 40", "decay_epochs": "20", "aug_repeats": "2", "dist_bn": "broadcast",
    "lr_noise": "0.4 0.9", "mixup_mode": "elem", "lr_k_decay": "2", "lr_cycle_mul": "1.5",
    "kd_distill_type": "feature", "kd_token_distill_type": "hard",
    "opt_kwargs": "nesterov=False", "opt_eps": "0.5", "lr": "0.001",
}  # fmt: skip
BASE = "--model resnet50 --aa rand-m9 --warmup-epochs 4"


def made(text, **named):
    return make_recipe("timm", text, **named)


def differences(name, recipe, model):
    """What `rsb diff` shows between a shipped recipe and another, by path."""
    shipped = load_recipe(find_recipe(name)).for_model(model)
    return {row.path: (row.a, row.b) for row in diff_rows(shipped, recipe)}


def test_the_command_of_a2_makes_a2():
    found = made(A2, version="0.5")
    assert not found.lost and differences("A2", found.recipe, "resnet50") == {}
    assumed = found.recipe.assumed
    assert "--warmup-lr" in assumed["lr.warmup_from"] and "timm 0.5" in assumed["lr.warmup_from"]
    assert "batch.images" not in assumed  # four GPUs stand in the command


def test_todays_defaults_change_two_rates_of_a2():
    found = differences("A2", made(A2).recipe, "resnet50")
    assert found.keys() == {"lr.warmup_from", "lr.schedule.end"}


def test_cooldown_was_a_default_and_lengthens_the_run():
    found = made(A2.replace(" --cooldown-epochs 0", ""), version="0.5")
    assert not found.lost and differences("A2", found.recipe, "resnet50") == {
        "epochs": (300, 310),
        "lr.cooldown_epochs": (None, 10),
    }
    assert "--cooldown-epochs" in found.recipe.assumed["lr.cooldown_epochs"]


@pytest.mark.parametrize("flag", FLAGS, ids=lambda flag: flag.key)
def test_no_flag_vanishes(flag):
    """Each flag changes the recipe, or is named with what became of it."""
    beside = " ".join(text for keys, text in BESIDE.items() if flag.key in keys.split())
    value = VALUES.get(flag.key)
    if value is None:
        kind = flag.kind[0] if isinstance(flag.kind, list) else flag.kind
        value = {str: "other", int: "3", float: "0.25", "pairs": "a=1"}.get(kind, "")
    label = flag.label if flag.label.startswith("-") else ""
    before, after = (
        made(f"{BASE} {beside} {more}", gpus=2) for more in ("", f"{label} {value}".strip())
    )
    named = [*after.idle, *after.data, *after.ignored]
    named += [row[0] for row in (*after.lost, *after.settings)]
    is_named = any(row.split()[0] in (flag.label, flag.key) for row in named)
    is_changed = (after.recipe.digest, after.lost) != (before.recipe.digest, before.lost)
    if flag.fate == "unsayable":
        with_master = f"{BASE} --{flag.master.replace('_', '-')} {MASTERS.get(flag.master, '')}"
        after = made(f"{with_master} {label} {value}") if flag.master else after
        assert any(row.split()[0] == flag.label for row, _ in after.lost)
    elif flag.fate == "recipe":
        assert is_changed
    else:
        assert is_named and not is_changed


MASTERS = {
    "layer_decay": "0.7", "train_img_sizes": "160 224",
    "kd_model_name": "resnet152",
}  # fmt: skip


def test_all_flags_of_today_are_known():
    assert {key.replace("_", "-") for key in TODAY.split()} <= {
        name.lstrip("-").replace("_", "-") for flag in FLAGS for name in flag.names
    }


@pytest.mark.parametrize(
    "flags",
    [
        "--sched cosine --min-lr 1e-5",
        "--sched cosine --warmup-prefix --epochs 25",
        "--sched cosine --sched-on-updates",
        "--sched step --decay-epochs 2.4 --decay-rate .97",
        "--sched step --decay-epochs 7 --warmup-prefix",
        "--sched multistep --decay-milestones 12 20",
        "--sched multistep --decay-milestones 12 20 --warmup-prefix",
        "--sched poly --decay-rate 0.9 --min-lr 1e-4",
        "--sched poly --decay-rate 0.9 --min-lr 1e-4 --cooldown-epochs 4 --lr-k-decay 1.5",
        "--sched cosine --min-lr 1e-4 --cooldown-epochs 4 --lr-k-decay 0.7 --sched-on-updates",
        "--sched cosine --min-lr 1e-4 --cooldown-epochs 4 --warmup-prefix",
        "--sched tanh --min-lr 1e-4 --cooldown-epochs 4 --warmup-prefix",
        "--sched step --decay-epochs 2.4 --decay-rate .97 --sched-on-updates",
    ],
)
def test_rates_are_timms(flags):
    recipe = made(f"--aa rand-m9 --lr 0.4 --epochs 30 --warmup-epochs 5 {flags}").recipe
    words = flags.split()
    value = lambda name, other: words[words.index(name) + 1] if name in words else other  # noqa: E731
    per_step, steps = "--sched-on-updates" in words, 6
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=0.4)
    scheduler, epochs = create_scheduler_v2(
        optimizer,
        sched=words[1],
        num_epochs=int(value("--epochs", 30)),
        decay_epochs=float(value("--decay-epochs", 90)),
        decay_milestones=[12, 20],
        decay_rate=float(value("--decay-rate", 0.1)),
        min_lr=float(value("--min-lr", 0)),
        warmup_lr=1e-5,
        warmup_epochs=5,
        warmup_prefix="--warmup-prefix" in words,
        cooldown_epochs=int(value("--cooldown-epochs", 0)),
        k_decay=float(value("--lr-k-decay", 1)),
        step_on_epochs=not per_step,
        updates_per_epoch=steps,
    )
    assert recipe.epochs == epochs
    for step in range(epochs * steps):
        expected = scheduler._get_lr(step if per_step else step // steps)[0]
        assert recipe.lr.at(step, steps, epochs) == pytest.approx(expected, rel=1e-9)


def test_batch_is_of_all_gpus_and_norms_see_one():
    found = made("--aa rand-m9 -b 64 --mixup 0.2 --grad-accum-steps 2", gpus=4).recipe
    assert (found.batch.images, found.batch.norm_images, found.mix.images) == (512, 64, None)
    found = made("--aa rand-m9 -b 64 --mixup 0.2 --sync-bn", gpus=4).recipe
    assert (found.batch.images, found.batch.norm_images, found.mix.images) == (256, 256, 64)


def test_without_a_launcher_one_gpu_is_assumed():
    assert "gpus=" in made("--aa rand-m9").recipe.assumed["batch.images"]


@pytest.mark.parametrize(
    ("flags", "peak", "scaling"),
    [
        ("--opt sgd --lr-base 0.1", 0.1 * 4, "linear"),
        ("--opt adamw --lr-base 1e-3", 1e-3 * 4**0.5, "sqrt"),
        ("--opt sgd --lr-base 0.1 --lr-base-size 512 --lr-base-scale sqrt", 0.1 * 2**0.5, "sqrt"),
        ("--opt sgd --lr 0.3 --lr-base 0.1", 0.3, None),
    ],
)
def test_base_rates_are_scaled(flags, peak, scaling):
    lr = made(f"--aa rand-m9 -b 256 {flags}", gpus=4).recipe.lr
    assert lr.peak == pytest.approx(peak) and lr.scaling == scaling


@pytest.mark.parametrize(
    ("flags", "expected"),
    [
        ("--opt sgd", {"name": "sgd", "momentum": 0.9, "nesterov": True}),
        ("--opt momentum --momentum 0.8", {"name": "sgd", "momentum": 0.8, "nesterov": False}),
        ("--opt adamw --opt-betas 0.9 0.95", {"name": "adamw", "betas": (0.9, 0.95)}),
        ("--opt lamb", {"name": "lamb", "clip_global_norm": 1.0}),
        ("--opt lamb --clip-grad 0.5", {"clip_global_norm": 0.5}),
        ("--opt lamb --clip-grad 3", {"clip_global_norm": 1.0}),
        ("--opt lamb --clip-grad 3 --opt-kwargs max_grad_norm=5", {"clip_global_norm": 3.0}),
        ("--opt rmsproptf --opt-eps .001", {"name": "rmsprop_tf", "eps": 0.001, "alpha": 0.9}),
        ("--opt lion", {"name": "timm", "optimizer": "lion", "fields": {"betas": (0.9, 0.99)}}),
        ("--clip-grad 0.02 --clip-mode agc", {"clip_adaptive": 0.02, "clip_global_norm": None}),
        ("--clip-grad 0.02 --clip-mode value", {"clip_value": 0.02, "clip_global_norm": None}),
    ],
)
def test_optimizers_are_timms(flags, expected):
    optimizer = made(f"--aa rand-m9 {flags}").recipe.optimizer
    assert {key: getattr(optimizer, key) for key in expected} == expected
    assert optimizer.no_decay == ("vectors", "biases", "no_weight_decay")


@pytest.mark.parametrize(
    ("text", "fields", "left_out"),
    [
        ("rand-m9-mstd0.5-inc1", (2, 0.5, 9, 0.5, True), []),
        ("rand-m9-mstd0.5-inc0", (2, 0.5, 9, 0.5, True), []),  # timm: any value switches it on
        ("rand-n3-p0.2", (3, 0.2, 10, None, False), []),
        ("rand-m3-mstd101", (2, 0.5, 3, None, False), ["mstd101"]),
        ("rand-m9-tweights", (2, 0.5, 9, None, False), ["tweights"]),
        ("rand-m9-w0", (2, 0.5, 9, None, False), ["w0"]),
        ("rand-m9-mmax20", (2, 0.5, 9, None, False), ["mmax20"]),
    ],
)
def test_rand_augment_strings(text, fields, left_out):
    found, lost = rand_augment_fields(text)
    keys = ("num_ops", "op_share", "magnitude", "magnitude_std", "increasing")
    given = tuple(found.get(key, False if key == "increasing" else None) for key in keys)
    assert given == fields and [piece for piece, _ in lost] == left_out


def test_colour_jitter_is_on_by_default_and_off_beside_aa():
    found = made("--model resnet50")
    jitter = next(part for part in found.recipe.augment if part.name == "color_jitter")
    assert not found.lost and jitter.brightness == jitter.contrast == jitter.saturation == 0.4
    assert made("--aa rand-m9 --color-jitter 0.2").idle == ("--color-jitter 0.2",)


CROP = ("random_resized_crop", {})
FLIP = ("flip", {})
JITTER = ("color_jitter", {"brightness": 0.3, "contrast": 0.3, "saturation": 0.3})


@pytest.mark.parametrize(
    ("flags", "expected"),
    [
        ("--color-jitter 0.3", (CROP, FLIP, JITTER)),
        (
            "--color-jitter 0.3 --color-jitter-prob 0.8 --grayscale-prob 0.2",
            (CROP, FLIP, ("color_jitter", {"share": 0.8}), ("grayscale", {"share": 0.2})),
        ),
        (
            "--aa 3a --color-jitter 0.3",
            (CROP, FLIP, ("three_augment", {"threshold": 128, "radius_px": (0.1, 2.0)}), JITTER),
        ),
        (
            "--aa rand-m9 --vflip 0.3 --hflip 0.2 --gaussian-blur-prob 0.1",
            (
                CROP,
                ("flip", {"share": 0.2}),
                ("vertical_flip", {"share": 0.3}),
                ("rand_augment", {"magnitude": 9}),
                ("gaussian_blur", {"share": 0.1, "kernel_px": 23}),
            ),
        ),
        (
            "--aa original-mstd0.5 --train-interpolation bicubic",
            (CROP, FLIP, ("auto_augment", {"policy": "original", "magnitude_std": 0.5})),
        ),
        (
            "--aa augmix-m5-w4-d2",
            (CROP, FLIP, ("aug_mix", {"magnitude": 5, "width": 4, "depth": 2, "alpha": 1.0})),
        ),
        ("--aa v0r", (CROP, FLIP, ("auto_augment", {"policy": "v0r", "magnitude_std": None}))),
        ("--no-aug --aa rand-m9 --reprob 0.2", (("resize", {"part": "center"}),)),
    ],
)
def test_augmentations_are_those_of_timms_transform_in_its_order(flags, expected):
    augment = made(f"--model resnet50 {flags}").recipe.augment
    assert [part.name for part in augment] == [name for name, _ in expected]
    for part, (_, fields) in zip(augment, expected, strict=True):
        assert {key: getattr(part, key) for key in fields} == fields


def test_noise_is_over_the_epochs_that_timm_counts():
    text = "--aa rand-m9 --epochs 80 --warmup-epochs 20 --warmup-prefix --lr-noise 0.5 0.8"
    noise = made(text).recipe.lr.noise
    assert (noise.from_share, noise.to_share, noise.std, noise.limit) == (0.4, 0.64, 1.0, 0.67)
    noise = made("--aa rand-m9 --lr-noise 0.5 --lr-noise-pct 0.3").recipe.lr.noise
    assert (noise.from_share, noise.to_share, noise.limit) == (0.5, 1.0, 0.3)


def test_a_plateau_is_said():
    text = "--aa rand-m9 --sched plateau --patience-epochs 4 --decay-rate 0.2 --min-lr 1e-6"
    found = made(text)
    schedule = found.recipe.lr.schedule
    assert not found.lost and schedule.name == "plateau"
    assert (schedule.factor, schedule.patience_epochs, schedule.end) == (0.2, 4, 1e-6)


def test_cycles_of_a_cosine_are_as_long_as_timms_together():
    text = "--aa rand-m9 --epochs 30 --warmup-epochs 4 --min-lr 1e-5 --lr-cycle-limit 3"
    for more in ("", "--lr-cycle-mul 2 --lr-cycle-decay 0.3 --warmup-prefix", "--lr-cycle-decay 1"):
        recipe = made(f"{text} {more}").recipe
        timms, epochs = create_scheduler_v2(
            torch.optim.SGD([torch.zeros(1)], recipe.lr.peak), "cosine", 30, warmup_epochs=4,
            warmup_lr=recipe.lr.warmup_from, min_lr=1e-5, cycle_limit=3,
            cycle_mul=2.0 if "mul" in more else 1.0, warmup_prefix="prefix" in more,
            cycle_decay={"": 0.5, "1": 1.0}.get(more.rpartition(" ")[2], 0.3),
        )  # fmt: skip
        assert recipe.epochs == epochs
        for epoch in range(epochs):
            timms.step(epoch)
            rate = timms.optimizer.param_groups[0]["lr"]
            assert recipe.lr.at(epoch, 1, epochs) == pytest.approx(rate, rel=1e-6)


def test_mixing_for_some_images_until_an_epoch():
    text = "--aa rand-m9 --mixup 0.2 --mixup-prob 0.6 --mixup-mode pair --mixup-off-epoch 250"
    mix = made(text).recipe.mix
    assert (mix.mixed_share, mix.each, mix.until_epochs) == (0.6, "pair", 250)
    assert made("--aa rand-m9 --mixup 0.2 --mixup-prob 0").recipe.mix is None


def test_a_threshold_erases_the_smoothing():
    found = made("--aa rand-m9 --bce-loss --bce-target-thresh 0.2 --smoothing 0.1 --mixup 0.1")
    assert found.recipe.smoothing is None and found.idle == ("--smoothing 0.1",)
    assert made("--aa rand-m9 --bce-loss").recipe.smoothing == 0.1


def test_switch_probability_at_its_ends_leaves_one():
    for share, name in (("0", "mixup"), ("1", "cutmix")):
        text = f"--aa rand-m9 --mixup 0.2 --cutmix 0.7 --mixup-switch-prob {share}"
        assert made(text).recipe.mix.name == name


def test_defaults_of_a_version():
    found = made("--aa rand-m9 --lr 0.1", version="0.4.12").recipe
    assert found.batch.images == 32 and found.lr.schedule.name == "step" and found.epochs == 200
    assert made("--aa rand-m9", version="0.6.13").recipe.lr.peak == 0.05
    assert made("--aa rand-m9", version="1.0.3").recipe.digest == made("--aa rand-m9").recipe.digest


def test_rates_by_layer_are_the_recipes(tmp_path):
    assert made(f"{BASE} --layer-decay 0.75").recipe.optimizer.layer_decay == 0.75
    found = made(f"{BASE} --layer-decay 0.75 --layer-decay-min-scale 0.1")
    assert any(row.startswith("--layer-decay-min-scale") for row, _ in found.lost)


@pytest.mark.parametrize("flag", ["--initial-checkpoint", "--pretrained --pretrained-path"])
def test_a_file_of_weights_is_the_recipes_with_its_digest(tmp_path, flag):
    path = tmp_path / "a.safetensors"
    safetensors.torch.save_file({"fc.weight": torch.zeros(2, 3)}, path)
    found = made(f"{BASE} {flag} {path}")
    start = found.recipe.model.pretrained
    assert (start.file, start.sha256) == (
        str(path),
        hashlib.sha256(path.read_bytes()).hexdigest(),
    )
    assert not any("checkpoint" in row or "pretrained" in row for row, _ in found.lost)


def test_weights_of_timms_are_pointed_to():
    found = made("--model resnet18.a1_in1k --pretrained")
    assert any(flag == "--pretrained" and "weights=timm:" in how for flag, how in found.settings)


@pytest.mark.parametrize(
    ("flags", "fields", "is_whole"),
    [
        ("", {"name": "soft", "temperature": 4.0, "sum_classes": True, "share": 0.5}, False),
        ("--task-loss-weight 0.25", {"name": "soft", "share": 0.75}, True),
        ("--distill-loss-weight 3", {"name": "soft", "share": 0.75}, False),
        (
            "--kd-distill-type token --kd-token-distill-type hard --task-loss-weight 0.5",
            {"name": "hard", "share": 0.5},
            True,
        ),
    ],
)
def test_timms_distillation_is_a_recipes(flags, fields, is_whole):
    """timm weighs its two losses freely, a recipe's add up to one."""
    found = made(f"{BASE} --kd-model-name regnety_160.deit_in1k {flags}")
    distill = tree.plain(found.recipe.distill)
    assert fields.items() <= distill.items()
    assert distill["teacher"] == "regnety_160"
    assert distill["weights"] == "timm:regnety_160.deit_in1k"
    assert (not found.lost) is is_whole


def test_distillation_of_features_cannot_be_said():
    found = made(f"{BASE} --kd-model-name resnet18 --kd-distill-type feature")
    assert found.recipe.distill is None
    assert [flag.split()[0] for flag, _ in found.lost] == ["--kd-distill-type"]
