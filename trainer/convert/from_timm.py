"""A recipe of timm's train.py.

Sources: timm's train.py, scheduler_factory.py, transforms_factory.py, optim factory and
data/config.py at aa4b5850 (August 2026).
"""

from __future__ import annotations

import os
import re
from pathlib import Path
from typing import Any

from timm.models import get_pretrained_cfg, is_model

import trainer.models.zoo  # noqa: F401  registers its models with timm
from trainer.convert.draft import Draft, tidy
from trainer.convert.parts import (
    multi_step_schedule,
    put_clipping,
    put_colours,
    put_crop,
    put_erasing,
    put_mix,
    put_optimizer,
    scaled_peak,
    spare_vectors,
    step_schedule,
)
from trainer.models.weights import read_weights

_JSD_WEIGHT = 12.0  # default of timm's JsdCrossEntropy, which no flag changes
_SQRT_WORDS = ("ada", "lamb")  # in --opt: these optimizers scale the base rate by the square root


def convert(draft: Draft, gpus: int) -> None:
    """Fill in all of a recipe but what it says of itself."""
    args = draft.args
    _put_batch(draft, gpus)
    _put_rate(draft)
    put_optimizer(draft, args["opt"], _pairs(args["opt_kwargs"]))
    spare_vectors(draft, "no_weight_decay")
    if args["layer_decay"] not in (None, 1.0):
        draft.put("optimizer.layer_decay", args["layer_decay"], "layer_decay")
    put_clipping(draft, args["clip_mode"] if args["clip_grad"] is not None else "")
    _put_loss(draft)
    put_mix(draft)
    if "mix" in draft.values and draft.values["batch"]["norm_images"] != args["batch_size"]:
        draft.put("mix.images", args["batch_size"])
    _put_images(draft)
    _put_repeats(draft)
    _put_model(draft)
    _put_weights(draft)
    _put_teacher(draft)
    if args["model_ema"]:
        draft.put("average.name", "ema")
        draft.put("average.decay", args["model_ema_decay"], "model_ema_decay")
        why = "timm updates at every step; its newer versions copy the weights at the first two"
        draft.assume("average.every_steps", 1, why)
        if not args["model_ema_force_cpu"]:  # else it is not evaluated
            draft.put("average.is_scored", True)


def _put_batch(draft: Draft, gpus: int) -> None:
    args = draft.args
    images, accumulated = args["batch_size"], args["grad_accum_steps"] or 1
    draft.put("batch.images", images * gpus * accumulated, "batch_size")
    together = gpus if args["sync_bn"] else 1
    draft.put("batch.norm_images", images * together, "batch_size")
    draft.assume("batch.drop_last", True, "timm's training loader drops an epoch's last batch")
    if (
        gpus > 1
        and not args["sync_bn"]
        and args.is_given("dist_bn")
        and args["dist_bn"] != "reduce"
    ):
        draft.lose("dist_bn", "running statistics of one GPU; here they are of all")


def _put_rate(draft: Draft) -> None:
    args = draft.args
    peak = args["lr"]
    if peak:
        draft.put("lr.peak", peak, "lr")
    else:
        rule = args["lr_base_scale"]
        if not rule:
            is_adaptive = any(word in args["opt"].lower() for word in _SQRT_WORDS)
            rule = "sqrt" if is_adaptive else "linear"
            draft.assumed["lr.scaling"] = f"{draft.args.program}'s rule for this optimizer"
        ratio = draft.values["batch"]["images"] / args["lr_base_size"]
        draft.put("lr.peak", scaled_peak(args["lr_base"], ratio, rule), "lr_base")
        draft.values["lr"]["scaling"] = "sqrt" if rule == "sqrt" else "linear"
    peak = draft.values["lr"]["peak"]
    draft.put("epochs", args["epochs"], "epochs")
    is_constant = args["sched"] in ("", "none", None)
    warmup = 0 if is_constant else args["warmup_epochs"]
    if warmup:
        draft.put("lr.warmup_epochs", warmup, "warmup_epochs")
        draft.put("lr.warmup_from", min(args["warmup_lr"], peak), "warmup_lr")
        if args["warmup_lr"] > peak:
            draft.lose("warmup_lr", f"a warm-up from above the peak {peak:g}")
    draft.put(
        "lr.updated", "per_step" if args["sched_on_updates"] else "per_epoch", "sched_on_updates"
    )
    after = warmup if args["warmup_prefix"] else 0
    draft.values["epochs"] += after  # timm trains that much longer
    for key, value in _schedule(draft, peak, after).items():
        draft.put(f"lr.schedule.{key}", value)
    _note_schedule(draft)
    if not is_constant:
        _put_noise(draft)
    if args["sched"] in ("tanh", "poly") and (args["lr_cycle_limit"] or 1) > 1:
        draft.lose("lr_cycle_limit", "several cycles of another curve than a cosine")
    if draft.values["lr"]["schedule"].get("period") and args["cooldown_epochs"]:
        draft.put("lr.cooldown_epochs", args["cooldown_epochs"], "cooldown_epochs")
        draft.values["epochs"] += args["cooldown_epochs"]


def _put_noise(draft: Draft) -> None:
    """timm's shares are of --epochs, those here of all epochs before a cooldown."""
    args = draft.args
    if not args["lr_noise"]:
        return
    ratio = args["epochs"] / draft.values["epochs"]
    shares = [tidy(min(share * ratio, 1.0)) for share in args["lr_noise"]]
    draft.put("lr.noise.from_share", shares[0])
    draft.put("lr.noise.to_share", shares[1] if len(shares) > 1 else 1.0)
    draft.put("lr.noise.std", args["lr_noise_std"], "lr_noise_std")
    draft.put("lr.noise.limit", args["lr_noise_pct"], "lr_noise_pct")


def _schedule(draft: Draft, peak: float, after: int) -> dict[str, Any]:
    """The schedule as plain data. after: the epochs before it begins."""
    args = draft.args
    kind, epochs = args["sched"], draft.values["epochs"]
    falling = {
        "end": lambda: min(args["min_lr"], peak),
        "period": lambda: "after_warmup" if after else "run",
    }
    if kind in ("", "none", None):
        return {"name": "constant"}
    if kind == "step":
        if args["sched_on_updates"] and after and args["decay_epochs"] % 1:
            draft.lose("decay_epochs", "a step in the middle of an epoch")
        return step_schedule(args["decay_epochs"], args["decay_rate"], epochs, after)
    if kind == "multistep":
        # timm looks one update ahead, so that a milestone of 30 acts from epoch 29 on
        ahead = 0 if args["sched_on_updates"] else 1
        places = [after + epoch - ahead for epoch in args["decay_milestones"]]
        return multi_step_schedule(places, args["decay_rate"], epochs)
    made = {key: value() for key, value in falling.items()}
    if kind == "tanh":
        return {"name": "tanh", "lower": -7.0, "upper": 3.0, **made}
    if args["lr_k_decay"] != 1:
        made["k_decay"] = args["lr_k_decay"]
    if kind == "poly":
        return {"name": "polynomial", "power": args["decay_rate"], **made}
    if kind == "cosine" and (args["lr_cycle_limit"] or 1) > 1:
        return _cycles(draft, epochs, after, made)
    if kind == "plateau":
        if args["lr_noise"]:
            draft.lose("lr_noise", "timm's noise stays in the rate that a plateau reduces")
        fields = {"factor": args["decay_rate"], "patience_epochs": args["patience_epochs"]}
        return {"name": kind, **fields, "threshold": 1e-4, "end": made["end"]}
    if kind != "cosine":
        draft.lose("sched", "the recipe has a cosine in its place")
    return {"name": "cosine", **made}


def _cycles(draft: Draft, epochs: int, after: int, made: dict[str, Any]) -> dict[str, Any]:
    """Cosines one after another, of which --epochs are the first; the run is as long as all."""
    args = draft.args
    first, growth, number = epochs - after, args["lr_cycle_mul"], args["lr_cycle_limit"]
    total = int(sum(first * growth**cycle for cycle in range(number)))  # timm rounds down
    draft.values["epochs"] = total + after
    if growth < 1:
        draft.lose("lr_cycle_mul", "cycles that shrink; in the recipe all have one length")
    if args["lr_cycle_decay"] > 1:
        draft.lose("lr_cycle_decay", "cycles that start higher each time; the recipe's do not")
    return {
        "name": "cosine_cycles",
        "cycle_epochs": first,
        **({"growth": growth} if growth > 1 else {}),
        **({"decay": args["lr_cycle_decay"]} if args["lr_cycle_decay"] < 1 else {}),
        **made,
    }


def _note_schedule(draft: Draft) -> None:
    args, schedule = draft.args, draft.values["lr"]["schedule"]
    draws = {"end": "min_lr", "power": "decay_rate", "factor": "decay_rate",
             "every_epochs": "decay_epochs", "at_epochs": "decay_milestones",
             "period": "warmup_prefix", "name": "sched", "k_decay": "lr_k_decay",
             "growth": "lr_cycle_mul", "decay": "lr_cycle_decay",
             "patience_epochs": "patience_epochs"}  # fmt: skip
    for key in draws.keys() & schedule:
        if not args.is_given(draws[key]) and draws[key] not in ("decay_milestones",):
            draft.put(f"lr.schedule.{key}", schedule[key], draws[key])
    if args["sched"] in ("cosine", "tanh", "poly"):
        peak = draft.values["lr"]["peak"]
        if args["min_lr"] > peak:
            draft.lose("min_lr", f"an end above the peak {peak:g}")


def _put_loss(draft: Draft) -> None:
    args = draft.args
    threshold = None
    if args["jsd_loss"]:
        draft.put("loss", {"name": "jensen_shannon", "weight": _JSD_WEIGHT, "loss": {"name": "ce"}})
        draft.assumed["loss.weight"] = "default of timm's JsdCrossEntropy"
        draft.put("augment_splits", args["aug_splits"])
    elif args["bce_loss"]:
        draft.put("loss.name", "bce")
        threshold = args["bce_target_thresh"]
        if threshold is not None:
            draft.put("loss.threshold", threshold)
        if args["bce_sum"]:
            draft.put("loss.sum_classes", True)
    else:
        draft.put("loss.name", "ce")
    if args["aug_splits"] and not args["jsd_loss"]:
        draft.lose("aug_splits", "splits without a loss that compares them")
    # a threshold erases the smoothing
    if threshold is None and args["smoothing"]:
        draft.put("smoothing", args["smoothing"], "smoothing")


def _put_images(draft: Draft) -> None:
    args = draft.args
    config = get_pretrained_cfg(args["model"]) if is_model(args["model"]) else None
    own = f"setting of {args['model']} in timm" if config else f"{args.program}'s for any model"
    side = _side(draft, config)
    draft.put("image", {"train_px": side, "test_px": side})
    if args["input_size"] is None and args["img_size"] is None:
        draft.assumed |= {"image.train_px": own, "image.test_px": own}
    share = args["crop_pct"] or (config.crop_pct if config else 0.875)
    draft.put("image.test_crop_share", min(share, 1.0))
    if share > 1:
        draft.lose("crop_pct", "a test image with a margin; the recipe says 1.0")
    if not args["crop_pct"]:
        draft.assumed["image.test_crop_share"] = own
    if config is not None and config.crop_mode in ("squash", "border"):
        draft.put("image.test_crop_mode", config.crop_mode)
        draft.assumed["image.test_crop_mode"] = own
    found = args["interpolation"] or (config.interpolation if config else "bicubic")
    kept = found if found in ("bilinear", "bicubic") else "bicubic"
    draft.put("image.test_interpolation", kept)
    if not args["interpolation"]:
        draft.assumed["image.test_interpolation"] = own
    if kept != found:
        draft.lost.append((f"test interpolation {found}", f"the recipe says {kept}"))
    trained = args["train_interpolation"] or found
    if args["no_aug"]:
        kept = trained if trained == "bicubic" else "bilinear"
        draft.put("augment.resize", {"part": "center", "interpolation": kept})
        return
    interpolation = put_crop(draft, trained, "train_interpolation")
    draft.put("augment.random_resized_crop.area", args["scale"], "scale")
    draft.put("augment.random_resized_crop.aspect", args["ratio"], "ratio")
    if args["hflip"]:
        draft.put("augment.flip", {} if args["hflip"] == 0.5 else {"share": args["hflip"]})
    if args["vflip"]:
        draft.put("augment.vertical_flip.share", args["vflip"])
    put_colours(draft, interpolation)
    if args["grayscale_prob"]:
        draft.put("augment.grayscale.share", args["grayscale_prob"])
    if args["gaussian_blur_prob"]:
        draft.put("augment.gaussian_blur.share", args["gaussian_blur_prob"])
        why = "timm's GaussianBlur: 23 px, and torchvision's bounds of the deviation"
        draft.assume("augment.gaussian_blur.radius_px", (0.1, 2.0), why)
        draft.assume("augment.gaussian_blur.kernel_px", 23, why)
    put_erasing(draft)
    if args["jsd_loss"] and args["reprob"] and not args["resplit"]:
        draft.lose("reprob", "erasing in the plain split too; here it stays plain")


def _side(draft: Draft, config: Any) -> int:
    args = draft.args
    size = args["input_size"]
    if size is None:
        return args["img_size"] or (config.input_size[-1] if config else 224)
    if size[-1] != size[-2 if len(size) > 1 else -1]:
        draft.lose("input_size", f"images that are not square; the recipe says {size[-1]}")
    return size[-1]


def _put_repeats(draft: Draft) -> None:
    repeats = draft.args["aug_repeats"]
    if repeats >= 2 and repeats == int(repeats):
        draft.put("repeats", int(repeats))
    elif repeats and repeats != 1:
        draft.lose("aug_repeats", "repeats that are no whole number")


def _put_model(draft: Draft) -> None:
    args = draft.args
    share = args["drop_path"] if args["drop_path"] is not None else args["drop_connect"]
    if share:
        draft.put("drop_path", share)
    for path, key in (
        ("model.dropout", "drop"),
        ("model.head_init_scale", "head_init_scale"),
        ("model.start.head_bias", "head_init_bias"),
    ):
        if args[key]:
            draft.put(path, args[key])
    norm = {"momentum": args["bn_momentum"], "eps": args["bn_eps"]}
    splits = draft.values.get("augment_splits")
    if args["split_bn"] and not splits:
        draft.lose("split_bn", "a BatchNorm for each part of a batch that has no augment_splits")
    if args["split_bn"] and splits:
        draft.put("model.norm", {"name": "split_batch_norm", "splits": splits}, "split_bn")
    elif any(value is not None for value in norm.values()):
        draft.put("model.norm", {"name": "batch_norm", "affine": True})
    if "norm" in draft.values.get("model", {}):
        for key, default in (("momentum", 0.1), ("eps", 1e-5)):
            draft.put(f"model.norm.{key}", default if norm[key] is None else norm[key])
            if norm[key] is None:
                draft.assumed[f"model.norm.{key}"] = "default of torch's BatchNorm2d"


def _put_weights(draft: Draft) -> None:
    """The file to start from, with its digest. Raises WeightsError where it holds no weights."""
    args = draft.args
    key, path = "initial_checkpoint", args["initial_checkpoint"]
    if not path and args["pretrained"]:  # without which timm does not look at this one
        key, path = "pretrained_path", args["pretrained_path"]
    if not path:
        return
    if not os.path.isfile(path):
        draft.lose(key, "weights to start from, not found here: train with weights=<their file>")
        return
    draft.put("model.pretrained.file", path, key)
    draft.put("model.pretrained.sha256", read_weights(Path(path)).sha256)


def _put_teacher(draft: Draft) -> None:
    """Distillation of answers; its two weights as shares of their sum."""
    args = draft.args
    name, kind = args["kd_model_name"], args["kd_distill_type"]
    if not name:
        return
    if kind == "feature":
        draft.lose("kd_distill_type", "features of the teacher; a recipe learns from its answers")
        return
    is_hard = kind == "token" and args["kd_token_distill_type"] == "hard"
    draft.put("distill.name", "hard" if is_hard else "soft")
    if not is_hard:
        draft.put("distill.temperature", args["kd_temperature"], "kd_temperature")
        draft.put("distill.sum_classes", True)
    taught, labelled = args["distill_loss_weight"], args["task_loss_weight"]
    if taught is None:
        taught = 1.0 if labelled is None else 1 - labelled
    labelled = 1.0 if labelled is None else labelled
    if taught <= 0 or labelled < 0:
        draft.lose("kd_model_name", "a teacher whose loss has no weight")
        del draft.values["distill"]
        return
    whole = taught + labelled
    share = ("distill.share", tidy(taught / whole), "distill_loss_weight", "task_loss_weight")
    draft.put(*share)
    if abs(whole - 1) > 1e-9:
        why = f"timm's loss is {whole:g} times the recipe's, whose two parts add up to one"
        draft.lost.append((args.written("kd_model_name"), why))
    bare = name.partition(".")[0]
    draft.put("distill.teacher", bare)
    config = get_pretrained_cfg(name) if is_model(bare) else None
    if config is not None and config.tag:
        draft.put("distill.weights", f"timm:{bare}.{config.tag}")
        if name == bare:
            draft.assumed["distill.weights"] = "timm's preferred weights of this model"


def _pairs(given: Any) -> dict[str, Any]:
    """--opt-kwargs: `weight_decouple=True eps=1e-3` as values."""
    if not isinstance(given, list):
        return dict(given or {})
    pairs = (word.partition("=")[::2] for word in given)
    return {key: _value(text) for key, text in pairs}


def _value(text: str) -> Any:
    if text in ("True", "False"):
        return text == "True"
    if re.fullmatch(r"[-+]?\d+", text):
        return int(text)
    try:
        return float(text)
    except ValueError:
        return text
