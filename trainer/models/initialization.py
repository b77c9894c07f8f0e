"""Initial weights other than timm's: other distributions, or pretrained weights from a file."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Iterator
from pathlib import Path
from typing import Literal

import safetensors.torch
from torch import Tensor, nn

from trainer.base.disk import UnfitFile, read_regular
from trainer.base.errors import UserError
from trainer.models.edit.replacement import (
    Replacement,
    ReplacementError,
    classifier_of,
    counted,
    is_norm,
    nothing_to_replace,
)
from trainer.models.spec import Model, Pretrained, Start

LARGEST_WEIGHTS_BYTES = 2**36  # read whole into memory
_NUM_NAMED = 3
_TRUNCATED = "truncated_normal"
_FANS: dict[str, Literal["fan_in", "fan_out"]] = {
    "kaiming_fan_in": "fan_in",
    "kaiming_fan_out": "fan_out",
}
_TRUNCATED_STD = 0.02
_COUNTERS = "num_batches_tracked"  # BatchNorm's step counter; older files lack it


class WeightsError(UserError):
    """A weights file that is missing, is not the one in the recipe, or does not fit the model."""


def initialize_weights(
    model: nn.Module, section: Model | None, num_classes: int
) -> tuple[Replacement, ...]:
    """Initialize a built model as its recipe's `model` section asks: `pretrained`, then `start`.

    Raises ReplacementError and WeightsError as the two do, and ReplacementError where one key would
    overwrite another.
    """
    if section is None:
        return ()
    start, pretrained = section.start, section.pretrained
    if start is not None:
        _check_conflicts(section, start)
    replacements = (load_pretrained(model, pretrained, num_classes),) if pretrained else ()
    if (
        start
        and start.head_std is not None
        and any(
            f"{_classifier_name(model)}.weight" in replacement.places
            for replacement in replacements
        )
    ):
        raise ReplacementError(
            "model.start.head_std: overwrites the classifier that model.pretrained loads; "
            "leave one of them out"
        )
    return replacements + (apply_start(model, start) if start else ())


def _check_conflicts(section: Model, start: Start) -> None:
    conflicts = []
    if section.zero_init_last and start.norm_gamma:
        conflicts.append(("norm_gamma", "model.zero_init_last sets to zero"))
    if section.pretrained:
        conflicts += [
            (key, "model.pretrained loads")
            for key in ("convolutions", "norm_gamma")
            if getattr(start, key)
        ]
    if section.head_init_scale is not None:
        conflicts += (
            [("convolutions", "model.head_init_scale scales")]
            if start.convolutions == _TRUNCATED
            else []
        )
        conflicts += (
            [("head_std", "model.head_init_scale scales")] if start.head_std is not None else []
        )
    for key, why in conflicts:
        raise ReplacementError(f"model.start.{key}: overwrites what {why}; leave one of them out")


def apply_start(model: nn.Module, start: Start) -> tuple[Replacement, ...]:
    """Initialize weights as a recipe's `model.start` says, from torch's global generator; one
    Replacement for each key.

    Convolutions: those of the body, and for a truncated normal every linear layer and the
    classifier; one that starts at zero does so on purpose and is kept. Norms: every gamma, also
    those that start at zero. The classifier last.

    Raises ReplacementError where the model has nothing of the kind.
    """
    replacements = []
    if start.convolutions is not None:
        replacements.append(_init_convolutions(model, start.convolutions))
    if start.norm_gamma is not None:
        replacements.append(_init_gammas(model))
    if start.head_std is not None:
        replacements.append(_init_head(model, start.head_std))
    if start.head_bias is not None:
        replacements.append(_set_head_bias(model, start.head_bias))
    if not replacements:
        raise ReplacementError(
            "model.start: is empty; valid: convolutions, norm_gamma, head_std, head_bias"
        )
    return tuple(replacements)


def _init_convolutions(model: nn.Module, how: str) -> Replacement:
    """Initialize those that do not start at zero.

    Source: He et al. 2015, arXiv:1502.01852; torch computes a grouped convolution's fan_in from
    one group, and its fan_out from all. Liu et al. 2022, arXiv:2201.03545: a deviation of 0.02,
    truncated at +-2 (absolute, as in their code).
    """
    is_truncated = how == _TRUNCATED
    classifier = _classifier_name(model)
    found = {
        name: module
        for name, module in model.named_modules()
        if _is_convolution(module) and name != classifier
    }
    if is_truncated:
        found = {
            name: one
            for name, one in model.named_modules()
            if _is_convolution(one) or isinstance(one, nn.Linear)
        }
    drawn = {name: module for name, module in found.items() if module.weight.any()}
    if not drawn:
        raise nothing_to_replace(
            "start.convolutions",
            f"convolution{' or linear layer' * is_truncated} with random initial weights",
            model,
        )
    for module in drawn.values():
        if is_truncated:
            _init_truncated(module)
        else:
            weight = module.get_parameter("weight")
            nn.init.kaiming_normal_(weight, mode=_FANS[how], nonlinearity="relu")
    at_zero = len(found) - len(drawn)
    note = f"{at_zero} zero-initialized kept" if at_zero else ""
    after = f"{how}, deviation {_TRUNCATED_STD:g}, biases 0" if is_truncated else f"{how}, normal"
    return Replacement("start.convolutions", counted(drawn.values()), after, tuple(drawn), note)


def _init_truncated(module: nn.Module) -> None:
    nn.init.trunc_normal_(module.get_parameter("weight"), std=_TRUNCATED_STD)
    if getattr(module, "bias", None) is not None:
        nn.init.zeros_(module.get_parameter("bias"))


def _is_convolution(module: nn.Module) -> bool:
    """Has it a kernel and its weights? Also torchvision's deformable one, which is no Conv2d."""
    weight = _own_weight(module)
    return weight is not None and weight.ndim == 4 and hasattr(module, "kernel_size")


def _init_gammas(model: nn.Module) -> Replacement:
    norms = {name: module for name, module in model.named_modules() if _has_gamma(module)}
    if not norms:
        raise nothing_to_replace("start.norm_gamma", "norm with a gamma", model)
    for module in norms.values():
        nn.init.uniform_(module.get_parameter("weight"))
    return Replacement(
        "start.norm_gamma", counted(norms.values()), "gamma uniform in [0, 1)", tuple(norms)
    )


def _has_gamma(module: nn.Module) -> bool:
    return is_norm(module) and _own_weight(module) is not None


def _own_weight(module: nn.Module) -> nn.Parameter | None:
    """The parameter `weight` of a module itself; None where it has none, or computes it."""
    return dict(module.named_parameters(recurse=False)).get("weight")


def _init_head(model: nn.Module, std: float) -> Replacement:
    name, classifier = _classifier_with("weight", "head_std", model)
    nn.init.normal_(classifier.get_parameter("weight"), std=std)
    return Replacement(
        "start.head_std",
        counted([classifier]),
        f"normal, deviation {std:g}" if std else "zero",
        (name,),
    )


def _set_head_bias(model: nn.Module, value: float) -> Replacement:
    name, classifier = _classifier_with("bias", "head_bias", model)
    nn.init.constant_(classifier.get_parameter("bias"), value)
    return Replacement("start.head_bias", counted([classifier]), f"bias {value:g}", (name,))


def _classifier_with(part: str, key: str, model: nn.Module) -> tuple[str, nn.Module]:
    """Name and module of the classifier. Raises ReplacementError where it has no such part, a
    weight or a bias.
    """
    name = _classifier_name(model)
    classifier = model.get_submodule(name) if name else None
    if not name or classifier is None or getattr(classifier, part, None) is None:
        kind = type(model).__name__
        raise ReplacementError(
            f"model.start.{key}: the classifier of {kind} has no {part}; "
            f"leave model.start.{key} out"
        )
    return name, classifier


def _classifier_name(model: nn.Module) -> str | None:
    """The dotted name of what timm calls a model's classifier."""
    classifier = classifier_of(model)
    return next((name for name, module in model.named_modules() if module is classifier), None)


def load_pretrained(model: nn.Module, pretrained: Pretrained, num_classes: int) -> Replacement:
    """Load the weights of a file into a model; the Replacement's note names what stays random.

    The first convolution is adapted to the model's channels as timm does it: see
    `adapt_input_channels`. Where the file's classifier has another shape, or is missing, the
    model's own stays random.

    Raises WeightsError for a missing or damaged file, another sha256, and weights that are not this
    model's.
    """
    path, tensors = _read(pretrained)
    own = model.state_dict()
    heads = {key for key in own if key.startswith(f"{_classifier_name(model)}.")}
    first = (
        next((name for name, module in model.named_modules() if isinstance(module, nn.Conv2d)), "")
        + ".weight"
    )
    notes = []
    left = [
        key for key in sorted(heads) if key not in tensors or tensors[key].shape != own[key].shape
    ]
    if left:
        found = (
            f"{_shape(tensors[left[-1]])} in the file" if left[-1] in tensors else "not in the file"
        )
        notes.append(f"random: {', '.join(left)}: {found}, {num_classes} classes here")
        tensors = {key: tensor for key, tensor in tensors.items() if key not in heads}
    if _differs_in_channels(tensors.get(first), own.get(first)):
        before, now = tensors[first].shape[1], own[first].shape[1]
        tensors[first] = adapt_input_channels(tensors[first], now)
        notes.append(
            f"{first}: {before} input channels {'summed' if now == 1 else f'adapted to {now}'}"
        )
    _check_keys(path, tensors, own, heads if left else set())
    model.load_state_dict(own | tensors)
    taken = [key for key in own if key in tensors]
    return Replacement(
        "pretrained",
        (("random tensor" + "s" * (len(taken) > 1), len(taken)),),
        path.name,
        tuple(taken),
        "; ".join(notes),
    )


def adapt_input_channels(weight: Tensor, num_channels: int) -> Tensor:
    """A first convolution's weight [O, C, h, w] for images of num_channels: [O, num_channels, h,
    w].

    One channel gets the sum over all, so that a grey image gives what it gave standing in each of
    them. More channels repeat the C in turn, scaled by C / num_channels, so that an image of equal
    channels gives about the same.

    Source: timm's adapt_input_conv.
    """
    before = weight.shape[1]
    if num_channels == 1:
        return weight.float().sum(1, keepdim=True).to(weight.dtype)
    repeated = weight.float().repeat(1, math.ceil(num_channels / before), 1, 1)[:, :num_channels]
    return (repeated * (before / num_channels)).to(weight.dtype)


def _differs_in_channels(weight: Tensor | None, own: Tensor | None) -> bool:
    if weight is None or own is None or weight.ndim != 4 or own.ndim != 4:
        return False
    without_channels = (weight.shape[0], *weight.shape[2:]) == (own.shape[0], *own.shape[2:])
    return without_channels and weight.shape[1] != own.shape[1]


def _read(pretrained: Pretrained) -> tuple[Path, dict[str, Tensor]]:
    """The file's path and its tensors; read once, so that what is hashed is what is loaded."""
    path = Path(pretrained.file)
    path = path / "model.safetensors" if path.is_dir() else path
    try:
        content = read_regular(path, LARGEST_WEIGHTS_BYTES)
    except (OSError, UnfitFile) as error:
        remedy = "use a .safetensors file, or the folder of a finished run"
        reason = error.strerror if isinstance(error, OSError) else error
        raise WeightsError(
            f"model.pretrained.file: {path}: cannot be read ({reason}); {remedy}"
        ) from None
    found = hashlib.sha256(content).hexdigest()
    if found != pretrained.sha256:
        raise WeightsError(
            f"model.pretrained.sha256: {path} has {found}, the recipe {pretrained.sha256}; "
            f'use the file of the recipe, or set="model.pretrained.sha256={found}"'
        )
    try:
        return path, safetensors.torch.load(content)
    except Exception as error:  # whatever safetensors raises for a damaged file
        reason = " ".join(str(error).split()) or type(error).__name__
        raise WeightsError(
            f"model.pretrained.file: {path}: not safetensors ({reason}); use a .safetensors file"
        ) from None


def _check_keys(
    path: Path, tensors: dict[str, Tensor], own: dict[str, Tensor], may_lack: set[str]
) -> None:
    missing = [
        key
        for key in own
        if key not in tensors and key not in may_lack and not key.endswith(_COUNTERS)
    ]
    unexpected = sorted(tensors.keys() - own.keys())
    shapes = [
        f"{key} {_shape(tensors[key])} for {_shape(tensor)}"
        for key, tensor in own.items()
        if key in tensors and tensors[key].shape != tensor.shape
    ]
    found = list(
        _listed({"is missing": missing, "has unexpected": unexpected, "has other shapes": shapes})
    )
    if found:
        raise WeightsError(
            f"model.pretrained.file: {path}: {'; '.join(found)}; use weights of this timm model, "
            "trained with the same parts in the `model` section"
        )


def _listed(kinds: dict[str, list[str]]) -> Iterator[str]:
    for kind, keys in kinds.items():
        if keys:
            rest = len(keys) - _NUM_NAMED
            yield f"{kind} {', '.join(keys[:_NUM_NAMED])}" + (
                f" and {rest} more" if rest > 0 else ""
            )


def _shape(tensor: Tensor) -> str:
    return str(list(tensor.shape))
