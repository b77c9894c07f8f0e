"""torchvision's classification models, as `torchvision:<name>`: its own code and names of weights,
used as timm's models are. timm knows them as torchvision_<name>.

Source: github.com/pytorch/vision, torchvision.models.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from functools import cache, partial
from typing import Any
from unittest import mock

import torch
import torchvision
from timm.layers import DropPath, resample_abs_pos_embed
from timm.models import (
    adapt_input_conv,
    build_model_with_cfg,
    generate_default_cfgs,
    is_model,
    list_models,
    register_model,
)
from torch import Tensor, nn
from torchvision.models import regnet
from torchvision.models.convnext import LayerNorm2d
from torchvision.ops import SqueezeExcitation, StochasticDepth

from trainer.base.errors import PlanError, did_you_mean
from trainer.models.edit.layer_kinds import ATTENTION, CHANNELS_FIRST_LAYER_NORMS
from trainer.models.edit.replacement import replace_module

SCHEME, _PREFIX = "torchvision:", "torchvision_"
_LISTED = torchvision.models.list_models(module=torchvision.models)
_SIZED = {"vision_transformer": "image_size", "maxvit": "input_size"}  # argument of one size
_EMBEDDINGS = ("class_token", "pos_embedding", "relative_position_bias_table")

ATTENTION.register(SqueezeExcitation)
CHANNELS_FIRST_LAYER_NORMS.register(LayerNorm2d)


def timm_name(model: str) -> str:
    """The name by which timm knows a model that a user names."""
    return _PREFIX + model.removeprefix(SCHEME) if model.startswith(SCHEME) else model


def name_where_timm_lacks_it(model: str) -> str:
    """`torchvision:<name>` for a name that torchvision has and timm has not; else itself."""
    return SCHEME + model if model in _LISTED and not is_model(model) else model


def known_models() -> list[str]:
    """All names that `model=` takes: timm's, ours, torchvision's."""
    names = (name for name in list_models() if not name.startswith(_PREFIX))
    return [*names, *(SCHEME + name for name in _LISTED)]


def known_weights(model: str) -> dict[str, str]:
    """The address of each file of weights of a `torchvision:<name>`, by the name with a tag; empty
    for any other model.
    """
    name = model.removeprefix(SCHEME)
    if name not in _LISTED or name == model:
        return {}
    return {f"{model}.{one.name}": one.url for one in torchvision.models.get_model_weights(name)}


def tagged(model: str, file: str) -> str:
    """A model with the tag of the weights that torchvision has in a file of this name; itself where
    it has none.
    """
    known = known_weights(model.partition(".")[0])
    return next((name for name, url in known.items() if url.endswith(f"/{file}")), model)


def check_name(model: str) -> None:
    """Refuse what is no `torchvision:<name>` of a classification model. Raises PlanError."""
    name, _, tag = model.removeprefix(SCHEME).partition(".")
    if model.startswith(_PREFIX):
        raise PlanError(
            f"model={model}: is what timm calls it", f"use {SCHEME}{model.removeprefix(_PREFIX)}"
        )
    if name not in _LISTED:
        is_other = name in torchvision.models.list_models()
        why = "no classification model of images" if is_other else "torchvision has no such model"
        near = did_you_mean(name, _LISTED)
        raise PlanError(f"model={model}: {why}{near}", f"use model={SCHEME}resnet50")
    known = known_weights(SCHEME + name)
    if tag and model not in known:
        near = did_you_mean(model, list(known))
        raise PlanError(
            f"model={model}: torchvision has no weights {tag!r} for {name}{near}",
            f"use model={SCHEME}{name}, which starts from random weights",
        )


class TorchvisionModel(nn.Module):
    """What the suite asks of a model of timm's, beside the class of torchvision's."""

    num_classes: int
    in_chans: int

    def _classifier_name(self) -> str:
        """The last linear layer, or SqueezeNet's last convolution."""
        kinds = {name: type(module) for name, module in self.named_modules()}
        linear = [name for name, kind in kinds.items() if issubclass(kind, nn.Linear)]
        return linear[-1] if linear else [n for n, kind in kinds.items() if kind is nn.Conv2d][-1]

    def get_classifier(self) -> nn.Module:
        """The last layer, which has the classes."""
        return self.get_submodule(self._classifier_name())

    def no_weight_decay(self) -> set[str]:
        """Embeddings, as for timm's models: torchvision's classes have no such list."""
        names = [name for name, _ in self.named_parameters()]
        return {name for name in names if name.rpartition(".")[2] in _EMBEDDINGS}


@cache
def _class_of(kind: type[nn.Module]) -> type[nn.Module]:
    return type(kind.__name__, (TorchvisionModel, kind), {"__module__": __name__})


def make(
    name: str,
    num_classes: int = 1000,
    in_chans: int = 3,
    img_size: int | tuple[int, int] | None = None,
    drop_rate: float = 0.0,
    drop_path_rate: float = 0.0,
    **others: Any,
) -> nn.Module:
    """A model of torchvision's with random weights.

    drop_rate, drop_path_rate: of the dropouts and of the stochastic depth that torchvision gives
    it; off where absent, as in timm, whatever torchvision has. Depth rises as there, the last block
    at this rate. others: zero_init_last of ResNets, ls_init_value of ConvNeXts. Googlenet and
    Inception are without their auxiliary classifiers.

    Raises TypeError for an option that it does not have.
    """
    builder = torchvision.models.get_model_builder(name)
    family = builder.__module__.rpartition(".")[2]
    theirs = {"zero_init_last": "zero_init_residual", "ls_init_value": "layer_scale"}
    options = {theirs.get(key, key): value for key, value in others.items()}
    if img_size is not None:
        if family not in _SIZED:
            raise TypeError(f"{name} takes images of any size")
        height, width = img_size if isinstance(img_size, tuple) else (img_size, img_size)
        options[_SIZED[family]] = height if family == "vision_transformer" else (height, width)
    if family in ("googlenet", "inception"):
        # their weights are for images that are normalized again like this
        options |= {"aux_logits": False, "init_weights": True, "transform_input": in_chans == 3}
    with _widths_on_the_cpu() if family == "regnet" else nullcontext():
        model = builder(weights=None, num_classes=num_classes, **options)
    model.__class__ = _class_of(type(model))  # type: ignore[arg-type]  # a class can be hashed
    _set_dropouts(name, model, drop_rate)
    _set_depth(name, model, drop_path_rate)
    if in_chans != 3:
        _set_channels(model, in_chans)
    model.num_classes, model.in_chans = num_classes, in_chans
    return model


@contextmanager
def _widths_on_the_cpu() -> Iterator[None]:
    """A block in which RegNet's widths are tensors of the CPU: torchvision reads their values, and
    the meta device has none.
    """
    plain = regnet.BlockParams.from_init_params

    def computed(*args: Any, **options: Any) -> regnet.BlockParams:
        with torch.device("cpu"):
            return plain(*args, **options)

    with mock.patch.object(regnet.BlockParams, "from_init_params", computed):
        yield


def _set_dropouts(name: str, model: nn.Module, rate: float) -> None:
    found = [each for each in model.modules() if isinstance(each, nn.Dropout) and each.p > 0]
    if rate and not found:
        raise TypeError(f"{name} has no dropout")
    for module in found:
        module.p = rate


def _set_depth(name: str, model: nn.Module, rate: float) -> None:
    named = model.named_modules()
    found = {place: each.p for place, each in named if isinstance(each, StochasticDepth)}
    last = max(found.values(), default=0.0)
    if rate and not last:
        raise TypeError(f"{name} has no stochastic depth")
    for place, own in found.items():  # timm's module draws the same, and ranks can share its draws
        replace_module(model, place, DropPath(rate * own / last if last else 0.0))


def _set_channels(model: nn.Module, in_chans: int) -> None:
    named = model.named_modules()
    place, first = next((name, one) for name, one in named if isinstance(one, nn.Conv2d))
    made = nn.Conv2d(
        in_chans,
        first.out_channels,
        first.kernel_size,  # type: ignore[arg-type]
        first.stride,  # type: ignore[arg-type]
        first.padding,  # type: ignore[arg-type]
        bias=first.bias is not None,
    )
    made.weight.data = adapt_input_conv(in_chans, first.weight.data)
    made.bias = first.bias
    replace_module(model, place, made)


_OLD_DENSENET = re.compile(r"^(.*denselayer\d+\.(?:norm|conv))\.([12]\..*)$")


def checkpoint_filter_fn(weights: dict[str, Tensor], model: nn.Module) -> dict[str, Tensor]:
    """Files of torchvision's weights under the names of its models: DenseNet's older names, without
    auxiliary classifiers, position embeddings resized to the model's images.
    """
    found = {
        _OLD_DENSENET.sub(r"\1\2", name): tensor
        for name, tensor in weights.items()
        if not name.startswith(("AuxLogits.", "aux1.", "aux2."))
    }
    name = "encoder.pos_embedding"
    own = dict(model.named_parameters()).get(name)
    if own is not None and name in found and found[name].shape != own.shape:
        side = round((own.shape[1] - 1) ** 0.5)
        found[name] = resample_abs_pos_embed(found[name], [side, side])
    return found


def _facts(name: str) -> dict[str, dict[str, Any]]:
    """timm's facts of the weights of a model, by tag: how its images are shown."""
    enum = torchvision.models.get_model_weights(name)
    family = torchvision.models.get_model_builder(name).__module__.rpartition(".")[2]
    made = {}
    for weights in enum:
        shown: dict[str, Any] = getattr(weights.transforms, "keywords", {})
        px = shown["crop_size"]
        tag = f"{weights.name}{'*' if weights is enum.DEFAULT else ''}"
        made[f"{_PREFIX}{name}.{tag}"] = {
            "url": weights.url,
            "num_classes": 1000,
            "input_size": (3, px, px),
            "fixed_input_size": family in _SIZED,
            "crop_pct": px / shown.get("resize_size", 256),
            "interpolation": getattr(shown.get("interpolation"), "value", "bilinear"),
            "mean": (0.485, 0.456, 0.406),
            "std": (0.229, 0.224, 0.225),
        }
    return made


def _entrypoint(name: str) -> Callable[..., nn.Module]:
    def build(pretrained: bool = False, **options: Any) -> nn.Module:
        return build_model_with_cfg(
            partial(make, name),
            _PREFIX + name,
            pretrained,
            pretrained_filter_fn=checkpoint_filter_fn,
            **options,
        )

    build.__name__ = build.__qualname__ = _PREFIX + name
    return build


default_cfgs = generate_default_cfgs(
    {tagged: facts for name in _LISTED for tagged, facts in _facts(name).items()}
)
for _name in _LISTED:
    register_model(_entrypoint(_name))
