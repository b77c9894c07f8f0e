"""The activation function of a model's body.

Memory that each layer keeps for the backward pass, in bytes per float32 input value; half under
bf16 autocast. Its own output costs nothing extra where the next layer saves its input anyway, as a
convolution does: the second column counts the rest.

                                   keeps   beside its output
    relu         in place              4                   0
    leaky_relu   in place              4                   0
    elu          in place              4                   0
    gelu                               4                   4
    silu                               4                   4
    mish                               4                   4
    hard_swish                         4                   4
    prelu                              4                   4
    swish        learned beta          8                   8

Only those three can work in place: their gradient can be computed from their output; the others
need their input. A layer is in place where the replaced one was, or had no such option (GELU after
a Linear): there nothing else uses the input.
"""

from __future__ import annotations

from abc import abstractmethod
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor, nn

from trainer.base.component import Positive
from trainer.models.edit.layer_kinds import ACTIVATIONS
from trainer.models.edit.replacement import (
    Part,
    Replacement,
    ReplacementError,
    counted,
    find_layers,
    inside_attention,
    is_activation,
    nothing_to_replace,
    replace_module,
)


class Activation(Part):
    """Replaces every activation of the body, also those inside norms; not gates, nor activations
    inside attention.
    """

    kind: ClassVar[str] = "activation"

    @abstractmethod
    def layer(self, in_place: bool) -> nn.Module:
        """One layer, in place where asked and possible."""

    def apply(self, model: nn.Module, image_px: int) -> Replacement:
        """Replace the activations that are not already this one."""
        names = _places(model)
        if not names:
            raise nothing_to_replace("activation", "activation outside attention", model)
        wanted = self.layer(in_place=False)
        changed = [name for name in names if not _is_same(model.get_submodule(name), wanted)]
        if not changed:
            raise ReplacementError(
                f"model.activation: all {len(names)} activations of {type(model).__name__} are "
                f"{type(wanted).__name__} already; leave model.activation out"
            )
        before = [model.get_submodule(name) for name in changed]
        for module in before:
            _replace(
                model,
                module,
                self.layer(in_place=getattr(module, "inplace", True)).train(module.training),
            )
        kept = len(names) - len(changed)
        note = f"{kept} are {type(wanted).__name__} already" if kept else ""
        return Replacement(
            "activation", counted(before), type(wanted).__name__, tuple(changed), note
        )


class Relu(Activation):
    """max(x, 0).

    Source: Nair and Hinton 2010, ICML.
    """

    name: Literal["relu"] = "relu"

    def layer(self, in_place: bool) -> nn.Module:
        return nn.ReLU(in_place)


class LeakyRelu(Activation):
    """x where it is positive, slope * x elsewhere.

    Source: Maas et al. 2013, ICML workshop.
    """

    name: Literal["leaky_relu"] = "leaky_relu"
    example: ClassVar[dict[str, Any]] = {"slope": 0.01}
    slope: Positive

    def layer(self, in_place: bool) -> nn.Module:
        return nn.LeakyReLU(self.slope, in_place)


class Gelu(Activation):
    """x * Phi(x), with the normal distribution's Phi.

    approximate: "tanh" takes x/2 * (1 + tanh(sqrt(2/pi) * (x + 0.044715 x**3))); absent, the exact
    Phi.

    Source: Hendrycks and Gimpel 2016, arXiv:1606.08415.
    """

    name: Literal["gelu"] = "gelu"
    approximate: Literal["tanh"] | None = None

    def layer(self, in_place: bool) -> nn.Module:
        return nn.GELU(self.approximate or "none")


class Silu(Activation):
    """x * sigmoid(x): Swish with beta 1.

    Source: Elfwing et al. 2017, arXiv:1702.03118.
    """

    name: Literal["silu"] = "silu"

    def layer(self, in_place: bool) -> nn.Module:
        return nn.SiLU()


class Swish(Activation):
    """x * sigmoid(beta * x), with one learned beta per layer.

    beta: its initial value. It is one-dimensional: its weight decay is that of norms and biases.

    Source: Ramachandran et al. 2017, arXiv:1710.05941.
    """

    name: Literal["swish"] = "swish"
    example: ClassVar[dict[str, Any]] = {"beta": 1.0}
    beta: Positive

    def layer(self, in_place: bool) -> nn.Module:
        return LearnedSwish(self.beta)


class Mish(Activation):
    """x * tanh(ln(1 + exp(x))).

    Source: Misra 2019, arXiv:1908.08681.
    """

    name: Literal["mish"] = "mish"

    def layer(self, in_place: bool) -> nn.Module:
        return nn.Mish()


class HardSwish(Activation):
    """x * min(max(x + 3, 0), 6) / 6.

    Source: Howard et al. 2019, arXiv:1905.02244.
    """

    name: Literal["hard_swish"] = "hard_swish"

    def layer(self, in_place: bool) -> nn.Module:
        return nn.Hardswish()


class Elu(Activation):
    """x where it is positive, alpha * (exp(x) - 1) elsewhere.

    Source: Clevert et al. 2015, arXiv:1511.07289.
    """

    name: Literal["elu"] = "elu"
    example: ClassVar[dict[str, Any]] = {"alpha": 1.0}
    alpha: Positive

    def layer(self, in_place: bool) -> nn.Module:
        return nn.ELU(self.alpha, in_place)


class Prelu(Activation):
    """x where it is positive, slope * x elsewhere, with one learned slope per layer (the paper's
    channel-shared form).

    slope: its initial value. The paper does not decay slopes; here they are one-dimensional, and
    treated as norms and biases are.

    Source: He et al. 2015, arXiv:1502.01852.
    """

    name: Literal["prelu"] = "prelu"
    example: ClassVar[dict[str, Any]] = {"slope": 0.25}
    slope: Positive

    def layer(self, in_place: bool) -> nn.Module:
        return nn.PReLU(1, self.slope)


def _places(model: nn.Module) -> list[str]:
    """Dotted names of the body's activations in module order, which is that of the forward pass."""
    found = find_layers(model)
    in_attention = inside_attention(model)
    norms = [place.name for place in found.norms if place.name not in in_attention]
    return [
        name
        for name, module in model.named_modules()
        if name in found.activations
        or (is_activation(module) and any(name.startswith(f"{norm}.") for norm in norms))
    ]


def _is_same(module: nn.Module, wanted: nn.Module) -> bool:
    """Do two layers compute the same function? Compared by outputs: timm has classes of its own for
    torch's functions.
    """
    if [weight.shape for weight in module.parameters()] != [
        weight.shape for weight in wanted.parameters()
    ]:
        return False
    with torch.no_grad():
        tried = torch.linspace(-8, 8, 129)
        return torch.equal(module(tried.clone()), wanted(tried.clone()))


def _replace(model: nn.Module, old: nn.Module, new: nn.Module) -> None:
    """Replace a module under all of its names: a block may share one."""
    for name, module in list(model.named_modules(remove_duplicate=False)):
        if module is old:
            replace_module(model, name, new)


@ACTIVATIONS.register
class LearnedSwish(nn.Module):
    """x * sigmoid(beta * x), with one learned beta [1] for the layer.

    Source: Ramachandran et al. 2017, arXiv:1710.05941.
    """

    def __init__(self, beta: float):
        super().__init__()
        self.beta = nn.Parameter(torch.full((1,), beta))

    def forward(self, given: Tensor) -> Tensor:
        """Any shape, any layout; in the dtype that is given, whatever beta's."""
        return given * torch.sigmoid(self.beta.to(given.dtype) * given)
