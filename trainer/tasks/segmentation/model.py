"""A timm model as the backbone of a head."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import Tensor, nn

from trainer.base.errors import PlanError
from trainer.tasks.segmentation.heads import Head, fcn, resized

_MOST_MAPS = 4  # of a backbone, the last ones: strides 4, 8, 16 and 32 of one that is not dilated
_AUX_DROPOUT = 0.1  # torchvision's and the PSPNet authors'


class SegmentationModel(nn.Module):
    """A backbone and its heads: images [B, C, H, W] to scores [B, K, H, W]; in training with an
    auxiliary head, those of both, (main, auxiliary).

    body: a timm model without its classifier. heads: "main", "aux".
    """

    def __init__(self, body: nn.Module, indices: Sequence[int], heads: dict[str, nn.Module]):
        super().__init__()
        self.body: Any = body  # of timm
        self.indices = list(indices)
        self.heads = nn.ModuleDict(heads)

    def forward(self, images: Tensor) -> Tensor | tuple[Tensor, Tensor]:
        features = self.body.forward_intermediates(
            images, indices=self.indices, intermediates_only=True
        )
        names = self.heads if self.training else ("main",)
        found = [resized(self.heads[name](features), images.shape[-2:]) for name in names]
        return found[0] if len(found) == 1 else (found[0], found[1])

    def set_grad_checkpointing(self, enable: bool = True) -> None:
        """timm's name of it, for the backbone."""
        self.body.set_grad_checkpointing(enable)

    def get_classifier(self) -> nn.Module:
        """What is new beside the backbone: what timm's name of a classifier is for."""
        return self.heads


def with_heads(
    name: str, body: nn.Module, head: Head, num_classes: int, has_aux: bool
) -> SegmentationModel:
    """A timm model with heads in the place of its classifier. name: the model's, for messages.

    Raises PlanError for a model that gives no feature maps.
    """
    info = getattr(body, "feature_info", None)
    if not hasattr(body, "forward_intermediates") or not info:
        raise PlanError(
            f"model={name}: gives no feature maps, on which heads of segmentation stand",
            "use a model such as resnet50, convnext_tiny or pvt_v2_b0",
        )
    number = len(info)
    indices = list(range(max(0, number - _MOST_MAPS), number))
    channels = [info[place]["num_chs"] for place in indices]
    if has_aux and len(channels) < 2:
        raise PlanError(
            f"task.aux_weight: {name} has one feature map only", "leave task.aux_weight out"
        )
    of_timm: Any = body
    of_timm.prune_intermediate_layers(indices, prune_norm=True, prune_head=True)
    heads = {"main": head.build(channels, num_classes)}
    if has_aux:
        heads["aux"] = fcn(channels, num_classes, _AUX_DROPOUT, place=-2)
    return SegmentationModel(body, indices, heads)
