"""What timm's train.py and the scripts made after it share: the meaning of their flags."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from typing import Any

from timm.optim import get_optimizer_info, list_optimizers

from trainer.base.errors import UserError, did_you_mean
from trainer.components.timm_optimizer import numbers_of
from trainer.convert.draft import Draft, tidy

_CROPS = ("random", "bilinear", "bicubic")
_STRONGEST = 10  # timm's default upper bound of RandAugment's magnitude
_UNIFORM_STD = 100  # from this mstd on, timm draws the magnitude evenly
_ERASED = {"pixel": "noise", "const": "mean"}
_NESTEROV = {"sgd": True, "nesterov": True, "momentum": False}  # timm's names of torch's SGD
_FLAGS_OF_FIELDS = {"momentum": "momentum", "betas": "opt_betas", "eps": "opt_eps"}


def put_crop(draft: Draft, interpolation: str, *keys: str) -> str:
    """random_resized_crop without its bounds; gives the interpolation that it has."""
    found = interpolation if interpolation in _CROPS else "bicubic"
    draft.put("augment.random_resized_crop.interpolation", found, *keys)
    if found != interpolation:
        draft.lose(keys[0], f"valid: {', '.join(_CROPS)}; the recipe says {found}")
    return found


def put_colours(draft: Draft, interpolation: str) -> None:
    """What --aa names, and timm's colour jitter, which is off beside most of that."""
    args = draft.args
    text = args["aa"] or ""
    if text:
        _put_policy(draft, text, interpolation)
    most = args["color_jitter"] if not text or "3a" in text else 0
    if not most:
        return
    for key in ("brightness", "contrast", "saturation"):
        draft.put(f"augment.color_jitter.{key}", most, "color_jitter")
    if args.has("color_jitter_prob") and args["color_jitter_prob"] is not None:
        put_share(draft, "augment.color_jitter.share", "color_jitter_prob")


def put_share(draft: Draft, path: str, key: str) -> None:
    """A share that is absent where it is 1."""
    if draft.args[key] < 1:
        draft.put(path, draft.args[key], key)


def _put_policy(draft: Draft, text: str, interpolation: str) -> None:
    """The policy of --aa."""
    args = draft.args
    if text == "3a":
        draft.put("augment.three_augment.threshold", 128)
        draft.put("augment.three_augment.radius_px", (0.1, 2.0))
        return
    policy, _, rest = text.partition("-")
    if policy in ("original", "originalr", "v0", "v0r"):
        std = re.fullmatch(r"mstd(\d+(?:\.\d*)?)", rest)
        if rest and not std:
            draft.lose("aa", "valid after a policy: mstd0.5 and the like")
        draft.put("augment.auto_augment.policy", policy)
        if std and float(std[1]) > 0:
            draft.put("augment.auto_augment.magnitude_std", float(std[1]))
        why = "timm's operations follow the crop's interpolation"
        draft.assume("augment.auto_augment.interpolation", interpolation, why)
        return
    if policy == "augmix":
        _put_aug_mix(draft, rest.split("-"), interpolation)
        return
    if not text.startswith("rand"):
        draft.lose("aa", "no policy that is known; none is in the recipe")
        return
    fields, left_out = rand_augment_fields(text)
    for key, value in fields.items():
        draft.put(f"augment.rand_augment.{key}", value, "aa")
    for key, found in (("num_ops", "n"), ("op_share", "p"), ("magnitude", "m")):
        if not re.search(rf"-{found}\d", text):
            path = f"augment.rand_augment.{key}"
            draft.assumed.setdefault(path, f"default of RandAugment in {args.program}")
    path = "augment.rand_augment.interpolation"
    draft.assume(path, interpolation, "timm's operations follow the crop's interpolation")
    for piece, why in left_out:
        draft.lost.append((f"{args.label('aa')} {text}: {piece}", why))


def _put_aug_mix(draft: Draft, pieces: list[str], interpolation: str) -> None:
    """timm's `augmix-m3-w3-d2`."""
    found = {"m": 3.0, "w": 3.0, "a": 1.0, "d": -1.0}
    for piece in filter(None, pieces):
        match = re.fullmatch(r"(mstd|m|w|d|a)(-?\d+(?:\.\d*)?)", piece)
        if match:
            found[match[1]] = float(match[2])
        elif piece != "b0":
            draft.lost.append((f"{draft.args.label('aa')} {piece}", "blended chain by chain"))
    name = "augment.aug_mix"
    draft.put(f"{name}.width", int(found["w"]))
    if found["d"] > 0:
        draft.put(f"{name}.depth", int(found["d"]))
    draft.put(f"{name}.magnitude", min(found["m"], float(_STRONGEST)))
    if found.get("mstd"):
        draft.put(f"{name}.magnitude_std", found["mstd"])
    draft.put(f"{name}.alpha", found["a"])
    why = "timm's operations follow the crop's interpolation"
    draft.assume(f"{name}.interpolation", interpolation, why)


def rand_augment_fields(text: str) -> tuple[dict[str, Any], list[tuple[str, str]]]:
    """The fields of rand_augment for timm's `rand-m9-mstd0.5-inc1`, and the pieces that it cannot
    say, each with why.

    Source: timm's rand_augment_transform; there any value of `inc` switches it on, inc0 too.
    """
    found: dict[str, float] = {}
    left_out: list[tuple[str, str]] = []
    for piece in text.split("-")[1:]:
        match = re.fullmatch(r"(mstd|mmax|inc|m|n|p)(\d+(?:\.\d*)?)", piece)
        if match:
            found[match[1]] = float(match[2])
        else:
            left_out.append((piece, "another set of operations, or their weights"))
    magnitude, std = found.get("m", float(_STRONGEST)), found.get("mstd", 0.0)
    if magnitude > _STRONGEST and std:
        left_out.append((f"m{magnitude:g}", "a mean strength above the strongest"))
    if found.get("mmax", _STRONGEST) != _STRONGEST:
        left_out.append((f"mmax{found['mmax']:g}", "another bound of the strength"))
    if std > _UNIFORM_STD:
        left_out.append((f"mstd{std:g}", "a strength drawn evenly from 0 to m"))
        std = 0.0
    fields: dict[str, Any] = {
        "num_ops": int(found.get("n", 2)),
        "op_share": found.get("p", 0.5),
        "magnitude": min(magnitude, float(_STRONGEST)),
    }
    if std:
        fields["magnitude_std"] = std
    if "inc" in found:
        fields["increasing"] = True
    return fields, left_out


def put_erasing(draft: Draft) -> None:
    """random_erasing, with timm's bounds of its box."""
    args = draft.args
    if not args["reprob"]:
        return
    name = "augment.random_erasing"
    draft.put(f"{name}.share", args["reprob"], "reprob")
    why = "default of timm's RandomErasing"
    draft.assume(f"{name}.area", (0.02, 1 / 3), why)
    draft.assume(f"{name}.aspect", (0.3, 1 / 0.3), why)
    draft.put(f"{name}.fill", _ERASED.get(args["remode"], "noise"), "remode")
    if args["remode"] not in _ERASED:
        draft.lose("remode", "one random colour a box; the recipe says noise")


def put_mix(draft: Draft) -> None:
    """mixup, CutMix or both, by timm's flags."""
    args = draft.args
    alpha = {"mixup": args["mixup"], "cutmix": args["cutmix"]}
    share = args["mixup_switch_prob"] if alpha["mixup"] and alpha["cutmix"] else 0.5
    only = next((kind for kind, at in (("mixup", 0), ("cutmix", 1)) if share == at), None)
    active = [kind for kind in alpha if alpha[kind] and only in (None, kind)]
    if not active or args["mixup_prob"] == 0:
        return
    if len(active) == 2:
        draft.put("mix.name", "mixup_or_cutmix")
        draft.put("mix.mixup_alpha", alpha["mixup"], "mixup")
        draft.put("mix.cutmix_alpha", alpha["cutmix"], "cutmix")
        draft.put("mix.cutmix_share", share, "mixup_switch_prob")
    else:
        draft.put("mix.name", active[0])
        draft.put("mix.alpha", alpha[active[0]], active[0])
    draft.assume("mix.partner", "reversed", "timm mixes a batch with itself in reverse order")
    put_share(draft, "mix.mixed_share", "mixup_prob")
    each = {"elem": "image", "pair": "pair"}.get(args["mixup_mode"])
    if each is not None:
        draft.put("mix.each", each)
    if args.has("mixup_off_epoch") and 0 < args["mixup_off_epoch"] < draft.values["epochs"]:
        draft.put("mix.until_epochs", args["mixup_off_epoch"])


def put_optimizer(draft: Draft, given: str, fields: Mapping[str, Any] | None = None) -> None:
    """The optimizer of a name, as timm builds it. fields: values of its own, other than timm's."""
    args = draft.args
    name = given.lower().rpartition("lookahead_")[2]
    if name != given.lower():
        draft.lose("opt", f"Lookahead; the recipe says {name} alone")
    if name.startswith("fused"):
        name = name.removeprefix("fused")
        draft.assumed["optimizer.name"] = f"{args.label('opt')} fused{name} is apex's; as timm's"
    try:
        known = [str(one) for one in list_optimizers()]
        if name not in known:
            raise ValueError(f"timm has no such optimizer{did_you_mean(name, known)}")
        numbers = {**numbers_of(name), **(fields or {})}
    except ValueError as error:
        found = f"{args.written('opt')}: {error}"
        raise UserError(found, "see timm.optim.list_optimizers()", place="args") from None
    if get_optimizer_info(name).has_momentum:
        numbers["momentum"] = args["momentum"]
    for key, flag in _FLAGS_OF_FIELDS.items():
        if key in numbers and args.has(flag) and args[flag] is not None:
            numbers[key] = args[flag]
    draft.put("optimizer", _as_component(name, numbers))
    made = draft.values["optimizer"]
    if "fields" in made:
        draft.assumed["optimizer.fields"] = f"timm's defaults of {name}, but for what is given"
    for key in ("alpha", *_FLAGS_OF_FIELDS):
        flag = _FLAGS_OF_FIELDS.get(key, "")
        if key in made and (not args.has(flag) or args[flag] is None):
            draft.assumed[f"optimizer.{key}"] = f"default of {name} in {args.program}"
        elif key in made:
            draft.put(f"optimizer.{key}", made[key], flag)
    if not args.is_given("opt"):
        draft.put("optimizer.name", made["name"], "opt")
    draft.put("optimizer.weight_decay", args["weight_decay"], "weight_decay")
    if made["name"] == "lamb":
        why = "timm's LAMB clips inside its step"
        draft.assume("optimizer.clip_global_norm", numbers["max_grad_norm"], why)


def spare_vectors(draft: Draft, *kinds: str) -> None:
    """timm's rule of what does not decay. kinds: further ones."""
    why = "timm spares all vectors and biases, and what a model itself lists (no_weight_decay)"
    draft.assume("optimizer.no_decay", ("vectors", "biases", *kinds), why)


def _as_component(name: str, numbers: dict[str, Any]) -> dict[str, Any]:
    """The fields of the suite's own component where it has one for them, else of timm's by name."""
    keys = set(numbers)
    if name in _NESTEROV and keys <= {"momentum", "dampening"} and not numbers["dampening"]:
        fields = {"name": "sgd", "momentum": numbers["momentum"]}
        return fields | ({"nesterov": True} if _NESTEROV[name] and numbers["momentum"] else {})
    if name in ("adamw", "lamb") and keys <= {"betas", "eps", "max_grad_norm"}:
        return {"name": name, "betas": tuple(numbers["betas"]), "eps": numbers["eps"]}
    if name == "rmsproptf" and keys <= {"alpha", "eps", "momentum"}:
        return {"name": "rmsprop_tf", **numbers}
    fields = {
        key: tuple(value) if isinstance(value, list) else value for key, value in numbers.items()
    }
    return {"name": "timm", "optimizer": name, "fields": fields}


def put_clipping(draft: Draft, mode: str) -> None:
    """--clip-grad by its mode; a bound that is there already is that of LAMB."""
    args = draft.args
    bound, optimizer = args["clip_grad"], draft.values["optimizer"]
    if bound is None:
        return
    hidden = optimizer.get("clip_global_norm", math.inf)
    if mode == "norm":
        draft.put("optimizer.clip_global_norm", min(bound, hidden), "clip_grad")
        if bound <= hidden:
            draft.assumed.pop("optimizer.clip_global_norm", None)
    elif mode == "agc":
        if optimizer.pop("clip_global_norm", None):
            draft.assumed.pop("optimizer.clip_global_norm")
            draft.lost.append((f"LAMB's own clipping to {hidden:g}", "beside adaptive clipping"))
        draft.put("optimizer.clip_adaptive", bound, "clip_grad")
    elif mode == "value" and "clip_global_norm" not in optimizer:
        draft.put("optimizer.clip_value", bound, "clip_grad")
    elif mode == "value":
        draft.lose("clip_mode", f"beside LAMB's own clipping to {hidden:g}; it is left out")
    else:
        draft.lose("clip_mode", f"valid: norm, agc and value; clipping to {bound:g} is left out")


def step_schedule(every: float, factor: float, epochs: int, after_epochs: int) -> dict[str, Any]:
    """The rate times `factor` after every so many epochs, which are counted from `after_epochs`."""
    if after_epochs == 0:
        return {"name": "step", "every_epochs": every, "factor": factor}
    counted = range(1, epochs - after_epochs)
    places = [epoch for epoch in counted if epoch // every > (epoch - 1) // every]
    return multi_step_schedule([after_epochs + epoch for epoch in places], factor, epochs)


def multi_step_schedule(at_epochs: list[int], factor: float, epochs: int) -> dict[str, Any]:
    """The rate times `factor` at these epochs, of which those beyond the run's end do nothing."""
    within = tuple(epoch for epoch in at_epochs if 1 <= epoch < epochs)
    if not within:
        return {"name": "constant"}
    return {"name": "multi_step", "at_epochs": within, "factor": factor}


def crop_share(test_px: int, resized_px: int) -> float:
    """The shortest test_crop_share that resizes to resized_px: floor(test_px / share)."""
    for digits in range(2, 17):
        share = round(test_px / resized_px, digits)
        if share <= 1 and math.floor(test_px / share) == resized_px:
            return share
    return math.nextafter(test_px / resized_px, 0)


def scaled_peak(base: float, ratio: float, rule: str) -> float:
    """A base rate for `ratio` times as many images, by the rule linear or sqrt."""
    return tidy(base * (math.sqrt(ratio) if rule == "sqrt" else ratio))
