"""The stages and residual blocks of any timm model, found by its module hierarchy."""

from __future__ import annotations

from torch import nn

from trainer.models.edit.layer_kinds import CONVOLUTIONS
from trainer.models.edit.replacement import ReplacementError, is_attention


def stages(model: nn.Module) -> list[str]:
    """Dotted names of the stages, in order: `layer1 … layer4`, or `stages.0 … stages.3`.

    A stage holds a series of residual blocks and, in ConvNeXt, the downsampling before it.

    Raises ReplacementError where a model has none.
    """
    return [_with_downsampling(model, series, _series(model)) for series in _series(model)]


def blocks(model: nn.Module) -> list[list[str]]:
    """Dotted names of the residual blocks, in order, a list for each stage.

    Raises ReplacementError where a model has none.
    """
    return [
        [
            f"{series}.{name}"
            for name, child in model.get_submodule(series).named_children()
            if _is_block(child)
        ]
        for series in _series(model)
    ]


def _series(model: nn.Module) -> list[str]:
    """Dotted names of the innermost modules whose children with weights are all blocks (or
    attention at their end).
    """
    found = [name for name, module in model.named_modules() if name and _holds_blocks(module)]
    innermost = [name for name in found if not any(other.startswith(f"{name}.") for other in found)]
    if not innermost:
        kind = type(model).__name__
        raise ReplacementError(
            f"model: {kind} has no stages of residual blocks; use a ResNet or a ConvNeXt"
        )
    return innermost


def _holds_blocks(module: nn.Module) -> bool:
    weighted = [inner for inner in module.children() if next(inner.parameters(), None) is not None]
    weighted = [inner for inner in weighted if not is_attention(inner)]
    return (
        bool(weighted) and not is_attention(module) and all(_is_block(inner) for inner in weighted)
    )


def _is_block(module: nn.Module) -> bool:
    """Is this a model's own class around two or more layers with weights? Not a torch container,
    nor a convolution with its norm.
    """
    if (
        type(module).__module__.startswith("torch.")
        or is_attention(module)
        or _is_convolution(module)
    ):
        return False
    return _num_layers(module) > 1


def _num_layers(module: nn.Module) -> int:
    """Convolutions and linear layers; a convolution counts once, whatever it contains."""
    if isinstance(module, nn.Linear) or _is_convolution(module):
        return 1
    return sum(map(_num_layers, module.children()))


def _is_convolution(module: nn.Module) -> bool:
    return CONVOLUTIONS.has(module) and next(module.parameters(), None) is not None


def _with_downsampling(model: nn.Module, series: str, all_series: list[str]) -> str:
    """The module that is one stage: the outermost of a class of its own that holds this series and
    no other.
    """
    stage, above = series, series.rpartition(".")[0]
    while above and not type(model.get_submodule(above)).__module__.startswith("torch."):
        if sum(name.startswith(f"{above}.") for name in all_series) > 1:
            break
        stage, above = above, above.rpartition(".")[0]
    return stage
