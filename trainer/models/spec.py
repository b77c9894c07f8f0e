"""The `model` section of a recipe: what it changes in the model as timm builds it."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Annotated, ClassVar, Literal, Self

from pydantic import Field, model_validator

from trainer.base.component import StrictModel
from trainer.models.edit.replacement import Part
from trainer.models.parts.activations import Activation
from trainer.models.parts.attention import Attention
from trainer.models.parts.blur import BlurPool
from trainer.models.parts.bodies import StagedBody
from trainer.models.parts.convolutions import Convolution
from trainer.models.parts.depth import DropBlock, StochasticDepth
from trainer.models.parts.fusion import Fusion
from trainer.models.parts.isotropic import IsotropicBody
from trainer.models.parts.norms import Norm
from trainer.models.parts.padding import SamePadding
from trainer.models.parts.standardize import Standardization
from trainer.models.parts.stems import Stem

InnerShare = Annotated[float, Field(gt=0, lt=1)]
ShareBelowOne = Annotated[float, Field(ge=0, lt=1)]

# The order in which parts are applied: those that bring norms or activations of their own come
# before those that replace norms or activations.
PARTS = (
    "isotropic", "body", "stem", "convolution", "blur_pool", "same_padding", "attention", "fusion",
    "norm", "activation", "weight_standardization", "stochastic_depth", "drop_block",
)  # fmt: skip


class Start(StrictModel):
    """Weight initialization other than timm's; an absent key leaves timm's.

    convolutions: Kaiming's normal distribution with fan_in or fan_out; "truncated_normal" covers
    linear layers too, the classifier among them, all with a standard deviation of 0.02, and sets
    their biases to zero. norm_gamma: "uniform" samples every norm's gamma from [0, 1). head_std:
    the standard deviation of the classifier's normally distributed weight; 0 sets it to zero.
    head_bias: the value of every bias of the classifier. head_std and head_bias are applied last.

    Source: He et al. 2015, arXiv:1502.01852 (Kaiming); Liu et al. 2022, arXiv:2201.03545, with its
    code (truncated_normal); MosaicML's ResNet benchmark (gamma and bias); pycls and big_vision
    (head_std).
    """

    convolutions: Literal["kaiming_fan_in", "kaiming_fan_out", "truncated_normal"] | None = None
    norm_gamma: Literal["uniform"] | None = None
    head_std: Annotated[float, Field(ge=0, le=100)] | None = None
    head_bias: Annotated[float, Field(ge=-100, le=100)] | None = None


class Pretrained(StrictModel):
    """Pretrained weights to start from.

    file: a .safetensors file, a torch checkpoint of weights (.pth), a run folder, or
    `timm:<model>.<tag>` or `torchvision:<model>.<tag>`, which is downloaded once. sha256: of the
    file's bytes, in hex: the weights are part of the recipe. Without the two it is a recipe that
    starts from weights, and a run names them (weights=). head: "new" leaves the classifier random;
    "kept" loads it where its shape fits. partial: weights that are missing, unexpected or of
    another shape are left out; false: refused.
    The first convolution is summed over its input channels for one-channel images; for more
    channels they are repeated and scaled, as timm does. Position embeddings of another image size
    are interpolated where timm does so.

    Raises ValueError for one of file and sha256 without the other.
    """

    example: ClassVar[dict[str, str]] = {
        "file": "weights.safetensors",
        "sha256": "<what sha256sum weights.safetensors prints>",
    }
    file: Annotated[str, Field(min_length=1)] | None = None
    sha256: Annotated[str, Field(pattern=r"^[0-9a-f]{64}$")] | None = None
    head: Literal["kept", "new"] = "kept"
    partial: bool = False

    @model_validator(mode="after")
    def _file_has_its_digest(self) -> Self:
        if (self.file is None) != (self.sha256 is None):
            there, absent = ("file", "sha256") if self.sha256 is None else ("sha256", "file")
            raise ValueError(f"{there} stands without {absent}: give both, or use weights=")
        return self


class Freeze(StrictModel):
    """Weights that do not train: their norms normalize by the running statistics that they came
    with.

    all_but: what trains all the same: names of weights or patterns of them ("layer4.*"), and "head"
    for the classifier. until_epochs: from then on all weights train; None: never. from_epochs:
    until then all weights train; None: frozen from the start.

    Raises ValueError for both.
    """

    all_but: Annotated[tuple[str, ...], Field(min_length=1)]
    until_epochs: Annotated[float, Field(gt=0)] | None = None
    from_epochs: Annotated[float, Field(gt=0)] | None = None

    @model_validator(mode="after")
    def _one_way(self) -> Self:
        if self.until_epochs is not None and self.from_epochs is not None:
            raise ValueError("until_epochs and from_epochs are both there: keep one of them")
        return self

    @property
    def is_for_good(self) -> bool:
        """Are they frozen for the whole run?"""
        return self.until_epochs is None and self.from_epochs is None


class Whitening(StrictModel):
    """The first convolution answers with uncorrelated numbers of one size: its filters are the
    eigenvectors of the covariance of the training images' patches, each over the root of its
    eigenvalue, and then all of them with the other sign. They do not train.

    images: so many training images, at equal steps through the set, as an evaluation shows them.
    patch_px: the side of a patch, which the convolution must have; it has 2 * channels * patch_px^2
    filters. eps: added to each eigenvalue.

    Source: tysam-code's hlb-CIFAR10; Jordan 2024, arXiv:2404.00498.
    """

    images: Annotated[int, Field(ge=1, le=1 << 20)]
    patch_px: Annotated[int, Field(ge=1, le=16)]
    eps: Annotated[float, Field(gt=0, le=1)]


class Model(StrictModel):
    """What is changed in the model as timm builds it; absent: nothing.

    zero_init_last: the last gamma of each residual branch starts at zero, whatever norm it belongs
    to. head_init_scale: what a new classifier's weights and biases are multiplied by, in any model.
    attention_dropout, projection_dropout: of the weights of attention and behind its
    projections and MLPs, where a model's class has them (CCT has 0.1 of the first, T2T-ViT's first
    layers 0.1 of the second, if absent; timm's models none). patch_px: the side of a transformer's
    patches, in place of what its name says. whitening: comes after start.

    Raises ValueError for whitening beside pretrained.
    """

    zero_init_last: bool | None = None
    layer_scale: InnerShare | None = None
    head_init_scale: Annotated[float, Field(gt=0, le=100)] | None = None
    dropout: InnerShare | None = None
    attention_dropout: ShareBelowOne | None = None
    projection_dropout: ShareBelowOne | None = None
    patch_px: Annotated[int, Field(ge=1, le=256)] | None = None
    isotropic: IsotropicBody | None = None
    body: StagedBody | None = None
    stem: Stem | None = None
    convolution: Convolution | None = None
    blur_pool: BlurPool | None = None
    same_padding: SamePadding | None = None
    attention: Attention | None = None
    fusion: Fusion | None = None
    norm: Norm | None = None
    activation: Activation | None = None
    weight_standardization: Standardization | None = None
    stochastic_depth: StochasticDepth | None = None
    drop_block: DropBlock | None = None
    start: Start | None = None
    whitening: Whitening | None = None
    pretrained: Pretrained | None = None
    freeze: Freeze | None = None

    @model_validator(mode="after")
    def _first_filters_once(self) -> Self:
        if self.whitening is not None and self.pretrained is not None:
            raise ValueError("whitening overwrites what pretrained loads: leave one of them out")
        return self

    def parts(self) -> Iterator[tuple[str, Part]]:
        """The parts that are set, in the order in which they are applied."""
        for key in PARTS:
            part = getattr(self, key)
            if part is not None:
                yield key, part

    @property
    def is_plain(self) -> bool:
        """Is the model built by timm alone, from its own options?"""
        return next(self.parts(), None) is None
