"""A recipe of ConvNeXt's main.py.

Sources: facebookresearch/ConvNeXt main.py, datasets.py, optim_factory.py, utils.py and
run_with_submitit.py at 048efcea.
"""

from __future__ import annotations

from trainer.convert.draft import Draft
from trainer.convert.flags import SWITCH, YES_NO, Args, flags
from trainer.convert.parts import (
    put_clipping,
    put_colours,
    put_crop,
    put_erasing,
    put_mix,
    put_optimizer,
    spare_vectors,
)

_WARPED_FROM_PX, _PADDED_TO_PX = 384, 32  # how datasets.py treats large and small images

FLAGS = (
    *flags(
        "recipe",
        ("--batch_size", int, 64),
        ("--epochs", int, 300),
        ("--update_freq", int, 1),
        ("--model", str, "convnext_tiny"),
        ("--drop_path", float, 0.0),
        ("--input_size", int, 224),
        ("--layer_scale_init_value", float, 1e-6),
        ("--model_ema", YES_NO, False),
        ("--model_ema_decay", float, 0.9999),
        ("--model_ema_eval", YES_NO, False),
        ("--opt", str, "adamw"),
        ("--opt_eps", float, 1e-8),
        ("--opt_betas", [float], None),
        ("--clip_grad", float, None),
        ("--momentum", float, 0.9),
        ("--weight_decay", float, 0.05),
        ("--layer_decay", float, 1.0),
        ("--lr", float, 4e-3),
        ("--min_lr", float, 1e-6),
        ("--warmup_epochs", int, 20),
        ("--warmup_steps", int, -1),
        ("--color_jitter", float, 0.4),
        ("--aa", str, "rand-m9-mstd0.5-inc1"),
        ("--smoothing", float, 0.1),
        ("--train_interpolation", str, "bicubic"),
        ("--crop_pct", float, None),
        ("--reprob", float, 0.25),
        ("--remode", str, "pixel"),
        ("--mixup", float, 0.8),
        ("--cutmix", float, 1.0),
        ("--mixup_prob", float, 1.0),
        ("--mixup_switch_prob", float, 0.5),
        ("--mixup_mode", str, "batch"),
        ("--head_init_scale", float, 1.0),
        ("--finetune", str, ""),
        ("--nodes", int, 2),
        ("--ngpus", int, 8),
    ),
    *flags(
        "setting",
        ("--use_amp", YES_NO, False, "precision=fp16"),
        ("--device", str, "cuda", "device="),
        ("--seed", int, 0, "seed="),
        ("--num_workers", int, 10, "workers="),
        ("--data_path", str, "", "data="),
        ("--output_dir", str, "", "runs="),
        ("--job_dir", str, "", "runs="),
    ),
    *flags(
        "data",
        ("--eval_data_path", str, None),
        ("--nb_classes", int, 1000),
        ("--imagenet_default_mean_and_std", YES_NO, True),
        ("--data_set", str, "IMNET"),
    ),
    *flags(
        "nothing",
        ("--model_ema_force_cpu", YES_NO, False),
        ("--resplit", YES_NO, False),
        ("--model_key", str, "model|module"),
        ("--model_prefix", str, ""),
        ("--log_dir", str, None),
        ("--resume", str, ""),
        ("--auto_resume", YES_NO, True),
        ("--save_ckpt", YES_NO, True),
        ("--save_ckpt_freq", int, 1),
        ("--save_ckpt_num", int, 3),
        ("--start_epoch", int, 0),
        ("--eval", YES_NO, False),
        ("--dist_eval", YES_NO, True),
        ("--disable_eval", YES_NO, False),
        ("--pin_mem", YES_NO, True),
        ("--world_size", int, 1),
        ("--local_rank", int, -1),
        ("--dist_on_itp", YES_NO, False),
        ("--dist_url", str, "env://"),
        ("--enable_wandb", YES_NO, False),
        ("--project", str, "convnext"),
        ("--wandb_ckpt", YES_NO, False),
        ("--timeout", int, 72),
        ("--job_name", str, "convnext"),
        ("--partition", str, "learnlab"),
        ("--use_volta32", SWITCH, True),
        ("--comment", str, ""),
    ),
    *flags(
        "unsayable",
        ("--weight_decay_end", float, None, "a decay that changes in the course of the run"),
        ("--recount", int, 1, "several erased boxes an image"),
        ("--cutmix_minmax", [float], None, "boxes with bounds of their own"),
    ),
)


def gpus_of_job(script: str, args: Args) -> int | None:
    """The GPUs that run_with_submitit.py asks for; None for another script."""
    return args["nodes"] * args["ngpus"] if script == "run_with_submitit.py" else None


def convert(draft: Draft, gpus: int) -> None:
    """Fill in all of a recipe but what it says of itself."""
    args = draft.args
    images = args["batch_size"]
    draft.put("batch.images", images * gpus * args["update_freq"], "batch_size")
    draft.put("batch.norm_images", images, "batch_size")
    draft.assume("batch.drop_last", True, "the script's training loader drops the last batch")
    _put_rate(draft)
    put_optimizer(draft, args["opt"])
    spare_vectors(draft)
    if args["layer_decay"] != 1:
        draft.put("optimizer.layer_decay", args["layer_decay"], "layer_decay")
        why = "the script's layers are three blocks, of the models that it takes for this"
        draft.assume("optimizer.layer_decay_blocks", 3, why)
    put_clipping(draft, "norm")
    draft.put("loss.name", "ce")
    if args["smoothing"] > 0:
        draft.put("smoothing", args["smoothing"], "smoothing")
    put_mix(draft)
    if "mix" in draft.values:  # said even where it is norm_images: that is memory only here
        draft.put("mix.images", images, "batch_size")
    _put_images(draft)
    if args["drop_path"]:
        draft.put("drop_path", args["drop_path"])
    if args["model_ema"]:
        draft.put("average.name", "ema")
        draft.put("average.decay", args["model_ema_decay"], "model_ema_decay")
        draft.put("average.every_steps", 1)
        draft.put("average.is_scored", args["model_ema_eval"], "model_ema_eval")
    if args["model"].startswith("convnext_isotropic"):
        draft.lose("model", "an isotropic body: see the recipe convnext-isotropic")
    if args["layer_scale_init_value"] > 0:
        draft.put("model.layer_scale", args["layer_scale_init_value"], "layer_scale_init_value")
    draft.put("model.head_init_scale", args["head_init_scale"], "head_init_scale")
    if args["finetune"]:  # a run names the weights: weights=
        draft.put("model.pretrained.head", "kept")


def _put_rate(draft: Draft) -> None:
    args = draft.args
    draft.put("epochs", args["epochs"], "epochs")
    draft.put("lr.peak", args["lr"], "lr")
    if args["warmup_epochs"] > 0:
        if args["warmup_steps"] > 0:
            draft.put("lr.warmup_steps", args["warmup_steps"])
        else:
            draft.put("lr.warmup_epochs", args["warmup_epochs"], "warmup_epochs")
        draft.assume("lr.warmup_from", 0.0, "the script's cosine_scheduler")
        why = "the script's numpy.linspace ends at the peak"
        draft.assume("lr.warmup_ends_at_peak", True, why)
    draft.assume("lr.updated", "per_step", "the script sets the rate at every step")
    draft.put("lr.schedule.name", "cosine")
    draft.put("lr.schedule.end", args["min_lr"], "min_lr")
    why = "the script's cosine spans what the warm-up leaves"
    draft.assume("lr.schedule.period", "after_warmup", why)


def _put_images(draft: Draft) -> None:
    args = draft.args
    side = args["input_size"]
    draft.put("image.train_px", side, "input_size")
    draft.put("image.test_px", side, "input_size")
    if side >= _WARPED_FROM_PX:
        draft.put("image.test_crop_share", 1.0)
        draft.lost.append((args.written("input_size"), "test images squeezed into a square"))
    elif args["crop_pct"] is not None:
        draft.put("image.test_crop_share", args["crop_pct"])
    else:
        draft.put("image.test_crop_share", 0.875, "crop_pct")
    draft.assume("image.test_interpolation", "bicubic", "the script's evaluation resizes so")
    interpolation = args["train_interpolation"]
    if side <= _PADDED_TO_PX:
        draft.put("augment.resize", {"part": "random", "interpolation": "bicubic"})
    else:
        interpolation = put_crop(draft, interpolation, "train_interpolation")
        crop = "augment.random_resized_crop"
        draft.assume(f"{crop}.area", (0.08, 1.0), "timm's default")
        draft.assume(f"{crop}.aspect", (3 / 4, 4 / 3), "timm's default")
    draft.put("augment.flip", {})
    if side <= _PADDED_TO_PX:
        why = "the script pads small images by 4 px and cuts at random, and resizes none"
        draft.assume("augment.pad_crop", {"pad_px": 4, "padding": "black"}, why)
    put_colours(draft, interpolation)
    put_erasing(draft)
