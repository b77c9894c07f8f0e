"""Initial weights other than timm's: other distributions, or pretrained weights from a file."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator
from typing import Literal

import torch
from torch import Tensor, nn

from trainer.models.edit.replacement import (
    Replacement,
    ReplacementError,
    classifier_of,
    counted,
    is_norm,
    nothing_to_replace,
)
from trainer.models.spec import Model, Pretrained, Start
from trainer.models.weights import (
    WeightsError,
    WeightsFile,
    adapt_input_channels,
    as_model_names,
    named_beside,
    read_weights,
    weights_path,
)
from trainer.models.zoo import timm_name

_NUM_NAMED = 3
_TRUNCATED = "truncated_normal"
_FANS: dict[str, Literal["fan_in", "fan_out"]] = {
    "kaiming_fan_in": "fan_in",
    "kaiming_fan_out": "fan_out",
}
_TRUNCATED_STD = 0.02
_OF_SPLIT = re.compile(r"\.aux_bn\.\d+\.")  # of the norms of all splits but the first
_COUNTERS = "num_batches_tracked"  # BatchNorm's step counter; older files lack it


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
    if section.whitening is not None and pretrained is not None:
        raise ReplacementError(
            "model.whitening: overwrites what model.pretrained loads; leave one of them out"
        )
    if start is not None:
        _check_conflicts(section, start)
    replacements = (load_pretrained(model, pretrained, num_classes),) if pretrained else ()
    if start and start.head_std is not None and is_head_loaded(model, replacements):
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


def scale_head(model: nn.Module, scale: float) -> Replacement:
    """Multiply a new classifier's weights and biases, of both of a distilled model's: what timm's
    head_init_scale does, for models whose class lacks it.
    """
    places = head_places(model)
    heads = [model.get_submodule(place.removesuffix(".")) for place in places]
    with torch.no_grad():
        for head in heads:
            for weight in head.parameters():
                weight.mul_(scale)
    names = tuple(place.removesuffix(".") for place in places)
    return Replacement("head_init_scale", counted(heads), f"new weights x {scale:g}", names)


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


def head_places(model: nn.Module) -> tuple[str, ...]:
    """What the names of a classifier's weights begin with; of both of a distilled model's."""
    classifier = classifier_of(model)
    heads = list(classifier) if isinstance(classifier, nn.ModuleList) else [classifier]
    named = model.named_modules()
    return tuple(f"{name}." for name, each in named if any(each is head for head in heads))


def is_head_loaded(model: nn.Module, replacements: Iterable[Replacement]) -> bool:
    """Is the classifier the one of `pretrained`, and not a new one? replacements: of the model's
    initialization.
    """
    loaded = [one.places for one in replacements if one.part == "pretrained"]
    heads = head_places(model)
    return any(key.startswith(heads) for places in loaded for key in places)


def load_pretrained(model: nn.Module, pretrained: Pretrained, num_classes: int) -> Replacement:
    """Load the weights of a file into a model; the Replacement's note names what stays random, and
    what was left out.

    The first convolution is adapted to the model's channels as timm does it: see
    `adapt_input_channels`. Where the file's classifier has another shape, or is missing, or
    `head` is "new", the model's own stays random.

    Raises WeightsError for a missing or damaged file, another sha256, and weights that are not this
    model's: any that is missing, unexpected or of another shape, or, where `partial`, all of them.
    """
    weights = _pretrained_file(pretrained)
    return load_file(model, weights, num_classes, "model.pretrained.file", pretrained)


def load_file(
    model: nn.Module,
    weights: WeightsFile,
    num_classes: int,
    place: str,
    pretrained: Pretrained = Pretrained(),
) -> Replacement:
    """The same of a file that has been read. place: what names it, for errors."""
    try:
        return _load(model, weights, num_classes, pretrained)
    except WeightsError as error:
        raise error.raised_as(WeightsError, place=place) from None


def _load(
    model: nn.Module, weights: WeightsFile, num_classes: int, pretrained: Pretrained
) -> Replacement:
    own = model.state_dict()
    heads = head_places(model)
    head = sorted(key for key in own if key.startswith(heads))
    weights = as_model_names(model, weights)
    tensors, notes = dict(weights.tensors), list(weights.notes)
    new = _new_head(pretrained, tensors, own, head)
    if new:
        notes.append(f"random: {', '.join(head)}: {new}, {num_classes} classes here")
        tensors = {key: tensor for key, tensor in tensors.items() if not key.startswith(heads)}
    for key in own.keys() - tensors.keys():  # as timm, whose split norms start from the one loaded
        plain = _OF_SPLIT.sub(".", key)
        if plain != key and plain in tensors:
            tensors[key] = tensors[plain]
    first = _first_convolution(model)
    if _differs_in_channels(tensors.get(first), own.get(first)):
        before, now = tensors[first].shape[1], own[first].shape[1]
        tensors[first] = adapt_input_channels(tensors[first], now)
        notes.append(
            f"{first}: {before} input channels {'summed' if now == 1 else f'adapted to {now}'}"
        )
    unfit = _unfit(tensors, own, set(head) if new else set())
    taken = [key for key in own if key in tensors and tensors[key].shape == own[key].shape]
    if unfit and not (pretrained.partial and taken):
        remedy = (
            "use weights of this timm model, trained with the same parts in the `model` section"
        )
        other = named_beside(weights.path)
        if other is not None and timm_name(other) != _architecture(model):
            remedy = f"these are weights of {other}: use model={other}, or other weights"
        if taken and pretrained.file:  # which only a recipe has
            remedy += f', or set="model.pretrained.partial=true" for the {len(taken)} that fit'
        raise WeightsError(f"{weights.path}: {'; '.join(unfit)}", remedy)
    model.load_state_dict(own | {key: tensors[key] for key in taken})
    return Replacement(
        "pretrained",
        (("random tensor" + "s" * (len(taken) > 1), len(taken)),),
        weights.path.name,
        tuple(taken),
        "; ".join(notes + unfit),
    )


def _architecture(model: nn.Module) -> str | None:
    """timm's name of a model."""
    return (getattr(model, "pretrained_cfg", None) or {}).get("architecture")


def _pretrained_file(pretrained: Pretrained) -> WeightsFile:
    """The file of a recipe, if it is the one. Raises WeightsError."""
    if pretrained.file is None:
        raise WeightsError(
            "model.pretrained: this recipe starts from weights, and none are given",
            "use weights=timm:<model>.<tag>, weights=<a .safetensors or .pth file> or"
            " weights=<a run's name>",
        )
    try:
        weights = read_weights(weights_path(pretrained.file))
    except WeightsError as error:
        raise WeightsError(f"model.pretrained.file: {error.found}", error.hint) from None
    if weights.sha256 != pretrained.sha256:
        raise WeightsError(
            f"model.pretrained.sha256: {weights.path} has {weights.sha256}, the recipe"
            f" {pretrained.sha256}",
            f'use the file of the recipe, or set="model.pretrained.sha256={weights.sha256}"',
        )
    return weights


def _new_head(
    pretrained: Pretrained, tensors: dict[str, Tensor], own: dict[str, Tensor], head: list[str]
) -> str:
    """Why the classifier stays random; empty where the file's is loaded."""
    if pretrained.head == "new":
        return "as asked for"
    for key in reversed(head):
        if key not in tensors:
            return "not in the file"
        if tensors[key].shape != own[key].shape:
            return f"{_shape(tensors[key])} in the file"
    return ""


def _first_convolution(model: nn.Module) -> str:
    convolutions = (name for name, each in model.named_modules() if isinstance(each, nn.Conv2d))
    return next(convolutions, "") + ".weight"


def _differs_in_channels(weight: Tensor | None, own: Tensor | None) -> bool:
    if weight is None or own is None or weight.ndim != 4 or own.ndim != 4:
        return False
    without_channels = (weight.shape[0], *weight.shape[2:]) == (own.shape[0], *own.shape[2:])
    return without_channels and weight.shape[1] != own.shape[1]


def _unfit(tensors: dict[str, Tensor], own: dict[str, Tensor], may_lack: set[str]) -> list[str]:
    """What does not fit, in words: names that one of the two does not have, and other shapes."""
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
    return list(
        _listed({"is missing": missing, "has unexpected": unexpected, "has other shapes": shapes})
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
