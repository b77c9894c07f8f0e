"""A recipe of torchvision's references/classification/train.py.

Sources: pytorch/vision references/classification/train.py, presets.py, sampler.py and utils.py at
017e9b99 and later (0.21).
"""

from __future__ import annotations

from typing import Any

from trainer.base.errors import UserError
from trainer.convert.draft import Draft, tidy
from trainer.convert.flags import SWITCH, flags
from trainer.convert.parts import crop_share, put_optimizer, step_schedule

_OPTIMIZERS = {"sgd": "momentum", "sgd_nesterov": "sgd", "rmsprop": "rmsprop", "adamw": "adamw"}
_RMSPROP = {"alpha": 0.9, "eps": 0.0316}  # the script's own

FLAGS = (
    *flags(
        "recipe",
        ("--model", str, "resnet18"),
        ("-b --batch-size", int, 32),
        ("--epochs", int, 90),
        ("--opt", str, "sgd"),
        ("--lr", float, 0.1),
        ("--momentum", float, 0.9),
        ("--weight-decay --wd", float, 1e-4),
        ("--norm-weight-decay", float, None),
        ("--bias-weight-decay", float, None),
        ("--label-smoothing", float, 0.0),
        ("--mixup-alpha", float, 0.0),
        ("--cutmix-alpha", float, 0.0),
        ("--lr-scheduler", str, "steplr"),
        ("--lr-warmup-epochs", int, 0),
        ("--lr-warmup-method", str, "constant"),
        ("--lr-warmup-decay", float, 0.01),
        ("--lr-step-size", int, 30),
        ("--lr-gamma", float, 0.1),
        ("--lr-min", float, 0.0),
        ("--sync-bn", SWITCH, False),
        ("--auto-augment", str, None),
        ("--ra-magnitude", int, 9),
        ("--random-erase", float, 0.0),
        ("--model-ema", SWITCH, False),
        ("--model-ema-steps", int, 32),
        ("--model-ema-decay", float, 0.99998),
        ("--interpolation", str, "bilinear"),
        ("--val-resize-size", int, 256),
        ("--val-crop-size", int, 224),
        ("--train-crop-size", int, 224),
        ("--clip-grad-norm", float, None),
        ("--ra-sampler", SWITCH, False),
        ("--ra-reps", int, 3),
    ),
    *flags(
        "setting",
        ("--amp", SWITCH, False, "precision=fp16"),
        ("--apex", SWITCH, False, "precision=fp16"),
        ("--device", str, "cuda", "device="),
        ("-j --workers", int, 16, "workers="),
        ("--data-path", str, "", "data="),
        ("--output-dir", str, ".", "runs="),
    ),
    *flags(
        "nothing",
        ("--apex-opt-level", str, "O1"),
        ("--print-freq", int, 10),
        ("--resume", str, ""),
        ("--start-epoch", int, 0),
        ("--cache-dataset", SWITCH, False),
        ("--test-only", SWITCH, False),
        ("--world-size", int, 1),
        ("--dist-url", str, "env://"),
        ("--use-deterministic-algorithms", SWITCH, False),
        ("--backend", str, "PIL"),
        ("--use-v2", SWITCH, False),
    ),
    *flags(
        "unsayable",
        ("--pretrained", SWITCH, False, "weights to start from: train with weights="),
        ("--weights", str, None, "weights to start from: train with weights="),
        ("--transformer-embedding-decay", float, None, "a decay of its own for embeddings"),
        ("--augmix-severity", int, 3, "AugMix"),
    ),
)


def convert(draft: Draft, gpus: int) -> None:
    """Fill in all of a recipe but what it says of itself."""
    args = draft.args
    draft.put("batch.images", args["batch_size"] * gpus, "batch_size")
    together = gpus if args["sync_bn"] else 1
    draft.put("batch.norm_images", args["batch_size"] * together, "batch_size")
    if args["ra_sampler"]:
        draft.put("repeats", args["ra_reps"], "ra_reps")
        why = "the sampler of repeats cuts an epoch to whole multiples of 256 images"
        draft.assume("batch.drop_last", True, why)
    _put_rate(draft)
    _put_optimizer(draft)
    draft.put("loss.name", "ce")
    if args["label_smoothing"]:
        draft.put("smoothing", args["label_smoothing"])
    _put_mix(draft)
    if "mix" in draft.values and together > 1:
        draft.put("mix.images", args["batch_size"])
    _put_augment(draft)
    test_px, resized_px = args["val_crop_size"], args["val_resize_size"]
    draft.put("image.train_px", args["train_crop_size"], "train_crop_size")
    draft.put("image.test_px", test_px, "val_crop_size")
    share = crop_share(test_px, resized_px) if resized_px >= test_px else 1.0
    draft.put("image.test_crop_share", share, "val_resize_size", "val_crop_size")
    if resized_px < test_px:
        draft.lose("val_resize_size", f"a test image padded to {test_px}")
    if args["model_ema"]:
        _put_average(draft)
    draft.assume("model.zero_init_last", False, "as torchvision builds a ResNet")


def _put_rate(draft: Draft) -> None:
    args = draft.args
    draft.put("epochs", args["epochs"], "epochs")
    draft.put("lr.peak", args["lr"], "lr")
    warmup = args["lr_warmup_epochs"]
    if warmup:
        draft.put("lr.warmup_epochs", warmup)
        start = tidy(args["lr"] * args["lr_warmup_decay"])
        draft.put("lr.warmup_from", start, "lr_warmup_decay")
        if args["lr_warmup_method"] != "linear":
            draft.put("lr.warmup_holds", True, "lr_warmup_method")
    draft.assume("lr.updated", "per_epoch", "the script steps its schedule once per epoch")
    for key, value in _schedule(draft, warmup).items():
        draft.put(f"lr.schedule.{key}", value)
    if not args.is_given("lr_scheduler"):
        draft.put("lr.schedule.name", draft.values["lr"]["schedule"]["name"], "lr_scheduler")


def _schedule(draft: Draft, warmup: int) -> dict[str, Any]:
    args = draft.args
    kind, epochs = args["lr_scheduler"].lower(), args["epochs"]
    if kind == "steplr":
        return step_schedule(args["lr_step_size"], args["lr_gamma"], epochs, warmup)
    if kind == "exponentiallr":
        return {"name": "exponential", "factor": args["lr_gamma"], "period": "after_warmup"}
    if kind != "cosineannealinglr":
        draft.lose("lr_scheduler", "valid: steplr, cosineannealinglr, exponentiallr")
    return {"name": "cosine", "end": args["lr_min"], "period": "after_warmup"}


def _put_optimizer(draft: Draft) -> None:
    args = draft.args
    name = _OPTIMIZERS.get(args["opt"].lower())
    if name is None:
        raise UserError(
            f"{args.written('opt')}: the script has no such optimizer",
            f"valid: {', '.join(_OPTIMIZERS)}",
            place="args",
        )
    put_optimizer(draft, name, _RMSPROP if name == "rmsprop" else None)
    spared = []
    for kind, key in (("norms", "norm_weight_decay"), ("biases", "bias_weight_decay")):
        found = args[key]
        if found == 0:
            spared.append(kind)
        elif found not in (None, args["weight_decay"]):
            draft.lose(key, "a decay of its own, neither 0 nor that of the others")
    draft.put("optimizer.no_decay", tuple(spared))
    if args["clip_grad_norm"] is not None:
        draft.put("optimizer.clip_global_norm", args["clip_grad_norm"])


def _put_mix(draft: Draft) -> None:
    args = draft.args
    alpha = {"mixup": args["mixup_alpha"], "cutmix": args["cutmix_alpha"]}
    active = [kind for kind in alpha if alpha[kind] > 0]
    if len(active) == 2:
        draft.put("mix.name", "mixup_or_cutmix")
        draft.put("mix.mixup_alpha", alpha["mixup"])
        draft.put("mix.cutmix_alpha", alpha["cutmix"])
        draft.assume("mix.cutmix_share", 0.5, "the script draws one of the two evenly")
    elif active:
        draft.put("mix.name", active[0])
        draft.put("mix.alpha", alpha[active[0]])
    if active:
        draft.assume("mix.partner", "rolled", "torchvision mixes an image with the one before")


def _put_augment(draft: Draft) -> None:
    args = draft.args
    found = args["interpolation"]
    kept = found if found in ("bilinear", "bicubic") else "bilinear"
    if kept != found:
        draft.lose("interpolation", f"valid: bilinear, bicubic; the recipe says {kept}")
    draft.put("image.test_interpolation", kept, "interpolation")
    crop = "augment.random_resized_crop"
    draft.assume(f"{crop}.area", (0.08, 1.0), "default of torchvision's RandomResizedCrop")
    draft.assume(f"{crop}.aspect", (3 / 4, 4 / 3), "default of torchvision's RandomResizedCrop")
    draft.put(f"{crop}.interpolation", kept, "interpolation")
    draft.put("augment.flip", {})
    if args["auto_augment"] == "ta_wide":
        name = "augment.trivial_augment"
        draft.assume(f"{name}.num_bins", 31, "default of torchvision's TrivialAugmentWide")
        draft.put(f"{name}.interpolation", kept, "interpolation")
        why = "off: shears of torchvision since 0.12; those before leave the middle where it is"
        draft.assumed[f"{name}.centered_shear"] = why
    elif args["auto_augment"] == "ra":
        name, why = "augment.torchvision_rand_augment", "default of torchvision's RandAugment"
        draft.assume(f"{name}.num_ops", 2, why)
        draft.put(f"{name}.magnitude", args["ra_magnitude"], "ra_magnitude")
        draft.assume(f"{name}.num_bins", 31, why)
        draft.put(f"{name}.interpolation", kept, "interpolation")
    elif args["auto_augment"] in ("imagenet", "cifar10", "svhn"):
        draft.put("augment.torchvision_auto_augment.policy", args["auto_augment"])
        draft.put("augment.torchvision_auto_augment.interpolation", kept, "interpolation")
    elif args["auto_augment"]:
        valid = "ta_wide, ra, imagenet, cifar10, svhn"
        draft.lose("auto_augment", f"valid: {valid}; none is in the recipe")
    if args["random_erase"]:
        name, why = "augment.random_erasing", "default of torchvision's RandomErasing"
        draft.put(f"{name}.share", args["random_erase"])
        draft.assume(f"{name}.area", (0.02, 0.33), why)
        draft.assume(f"{name}.aspect", (0.3, 3.3), why)
        draft.assume(f"{name}.fill", "mean", f"{why}: zero after normalization")


def _put_average(draft: Draft) -> None:
    args = draft.args
    draft.put("average.name", "ema")
    draft.put("average.decay", args["model_ema_decay"], "model_ema_decay")
    draft.put("average.every_steps", args["model_ema_steps"], "model_ema_steps")
    draft.assume("average.adjusted", True, "the script adjusts the decay to the run")
    why = "the script copies the weights throughout the warm-up"
    draft.assume("average.restarts_in_warmup", True, why)
    draft.assume("average.is_scored", True, "the script scores both; torchvision's table is its")
