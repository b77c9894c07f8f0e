"""RetinaNet: a feature pyramid, two towers of convolutions shared by its levels, and boxes told
from anchors.

The pyramid, the towers, anchors, matching and coding are torchvision's own classes, so that its
weights and its outputs are these.

Source: Lin et al. 2017, arXiv:1708.02002; torchvision's models/detection/retinanet.py.
"""

from __future__ import annotations

import functools
from typing import Annotated, Any, ClassVar, Literal

import torch
from pydantic import Field
from torch import Tensor, nn
from torchvision.models.detection import _utils as torchvision_boxes
from torchvision.models.detection.anchor_utils import AnchorGenerator
from torchvision.models.detection.retinanet import RetinaNetHead
from torchvision.ops import batched_nms, box_iou, clip_boxes_to_image
from torchvision.ops.feature_pyramid_network import FeaturePyramidNetwork, LastLevelP6P7

from trainer.components.losses import ImageLoss
from trainer.tasks.detection.detector import (
    NO_CLASS,
    ConstantParts,
    Detector,
    Open,
    check_multiple,
    pyramid_levels,
)

STRIDES = (8, 16, 32)  # of the backbone's features; two more levels are made from them
LEVEL_STRIDES = (*STRIDES, 64, 128)
SCALES, ASPECTS = (1.0, 2 ** (1 / 3), 2 ** (2 / 3)), (0.5, 1.0, 2.0)
FOREGROUND_IOU, BACKGROUND_IOU = 0.5, 0.4  # between the two an anchor has no target
_MOST_PER_LEVEL = 1000  # candidates before suppression

_BOXES = torchvision_boxes.BoxCoder(weights=(1.0, 1.0, 1.0, 1.0))
_MATCHER = torchvision_boxes.Matcher(FOREGROUND_IOU, BACKGROUND_IOU, allow_low_quality_matches=True)


class RetinaNetModel(nn.Module):
    """Images [B, C, H, W] to [B, A, K + 4]: the logits of K classes and the four numbers of a box
    for each of A anchors, level after level.
    """

    def __init__(self, body: Any, places: list[int], pyramid: nn.Module, head: nn.Module) -> None:
        super().__init__()
        self.body: Any = body
        self.places, self.pyramid, self.head = places, pyramid, head

    def forward(self, images: Tensor) -> Tensor:
        features = self.body.forward_intermediates(
            images, indices=self.places, intermediates_only=True
        )
        levels = self.pyramid({str(place): one for place, one in enumerate(features)})
        made = self.head(list(levels.values()))
        return torch.cat([made["cls_logits"], made["bbox_regression"]], dim=2)

    def get_classifier(self) -> nn.Module:
        """What is new beside the backbone: what timm's name of a classifier is for."""
        return nn.ModuleList([self.pyramid, self.head])


class RetinaNet(Detector):
    """One yes/no question per class and anchor, by the recipe's `loss`, and a box for the anchors
    that have one.

    An anchor whose IoU with a box is FOREGROUND_IOU or more, and the best of each box, is to answer
    with it; one of less than BACKGROUND_IOU is to answer nothing. Both losses are summed over the
    anchors of an image and divided by how many have a box: `loss` needs sum_classes, or it is a
    mean over classes. Its focal loss is the paper's, `bce` is its cross-entropy.

    channels: of the pyramid. anchor_px: the side of the smallest anchors; they are three sizes an
    octave and three shapes, twice as large from level to level. extra_from: what the levels at
    strides 64 and 128 are made from, the pyramid's last level or the backbone's. norm_groups: of a
    group norm after each convolution of the towers; absent: none. box_loss: l1 and smooth_l1 of the
    coded box, the others of the box itself. least_score, nms_iou, most_found: what is no answer,
    the IoU above which the lower of two answers of a class is dropped, and the most that are kept.
    """

    name: Literal["retinanet"] = "retinanet"
    channels: Annotated[int, Field(ge=8, le=1024)]
    anchor_px: Annotated[int, Field(ge=4, le=256)]
    extra_from: Literal["p5", "c5"]
    norm_groups: Annotated[int, Field(ge=1, le=256)] | None = None
    box_loss: Literal["l1", "smooth_l1", "giou", "diou", "ciou"]
    least_score: Open
    nms_iou: Open
    most_found: Annotated[int, Field(ge=1, le=1000)]
    example: ClassVar[dict[str, Any]] = {
        "channels": 256,
        "anchor_px": 32,
        "extra_from": "p5",
        "box_loss": "l1",
        "least_score": 0.05,
        "nms_iou": 0.5,
        "most_found": 100,
    }

    def build(self, body: Any, num_classes: int) -> nn.Module:
        places, widths = pyramid_levels(body, STRIDES)
        body.prune_intermediate_layers(places, prune_norm=True, prune_head=True)
        extra = LastLevelP6P7(
            self.channels if self.extra_from == "p5" else widths[-1], self.channels
        )
        # torchvision takes the pyramid's level where the two have the same number of channels
        extra.use_P5 = self.extra_from == "p5"
        norm = functools.partial(nn.GroupNorm, self.norm_groups) if self.norm_groups else None
        head = RetinaNetHead(self.channels, len(SCALES) * len(ASPECTS), num_classes, norm)
        pyramid = FeaturePyramidNetwork(widths, self.channels, extra)
        return RetinaNetModel(body, places, pyramid, head)

    def check_side(self, key: str, image_px: int) -> None:
        check_multiple(key, image_px, STRIDES[-1])

    def loss(
        self, outputs: Tensor, boxes: Tensor, image_px: int, classification: ImageLoss
    ) -> Tensor:
        anchors = torch.cat(_anchors(self.anchor_px, image_px, outputs.device))
        each = [
            self._loss_of_image(made, rows[rows[:, 4] >= 0], anchors, classification)
            for made, rows in zip(outputs, boxes, strict=True)
        ]
        return torch.stack(each).mean()

    def _loss_of_image(
        self, outputs: Tensor, boxes: Tensor, anchors: Tensor, classification: ImageLoss
    ) -> Tensor:
        """outputs: [A, K + 4]; boxes: [n, 5]."""
        logits, coded = outputs[:, :-4], outputs[:, -4:]
        matches = matched(boxes[:, :4], anchors)
        has_box = matches >= 0
        own = boxes[matches[has_box]]
        targets = torch.zeros_like(logits)
        targets[has_box, own[:, 4].long()] = 1.0
        is_asked = matches != torchvision_boxes.Matcher.BETWEEN_THRESHOLDS
        of_classes = classification(logits[is_asked], targets[is_asked]) * is_asked.sum()
        of_boxes = self._box_loss(anchors[has_box], own[:, :4], coded[has_box])
        return (of_classes + of_boxes) / has_box.sum().clamp(min=1)

    def found(self, outputs: Tensor, image_px: int, seen_px: Tensor) -> Tensor:
        anchors = _anchors(self.anchor_px, image_px, outputs.device)
        made = outputs.new_zeros(len(outputs), self.most_found, 6)
        made[:, :, 5] = NO_CLASS
        for row, own, (width, height) in zip(made, outputs, seen_px.tolist(), strict=True):
            best = self._found_in_image(own, anchors, (height, width))
            row[: len(best)] = best
        return made

    def _found_in_image(
        self, outputs: Tensor, anchors: list[Tensor], seen_px: tuple[float, float]
    ) -> Tensor:
        """[n, 6] of outputs [A, K + 4], seen_px (height, width): as torchvision's
        postprocess_detections.
        """
        sides, scores, labels = [], [], []
        num_classes = outputs.shape[1] - 4
        levels = outputs.split([len(level) for level in anchors])
        for made, level in zip(levels, anchors, strict=True):
            score = made[:, :-4].sigmoid().flatten()
            places = torch.where(score > self.least_score)[0]
            best, order = score[places].topk(min(_MOST_PER_LEVEL, len(places)))
            places = places[order]
            anchor = places // num_classes
            boxes = _BOXES.decode_single(made[anchor, -4:], level[anchor])
            sides.append(clip_boxes_to_image(boxes, seen_px))  # type: ignore[arg-type]
            scores.append(best)
            labels.append(places % num_classes)
        boxes, score, label = torch.cat(sides), torch.cat(scores), torch.cat(labels)
        kept = batched_nms(boxes, score, label, self.nms_iou)[: self.most_found]
        return torch.cat([boxes[kept], score[kept, None], label[kept, None].to(boxes)], dim=1)

    def constant_parts(
        self, boxes: Tensor, image_px: int, num_classes: int
    ) -> tuple[ConstantParts, ...]:
        anchors = torch.cat(_anchors(self.anchor_px, image_px, boxes.device))
        num_asked, counts, pairs = [], [], []
        for rows in boxes:
            own = rows[rows[:, 4] >= 0]
            matches = matched(own[:, :4], anchors)
            has_box = matches >= 0
            number = has_box.sum().clamp(min=1)
            is_asked = matches != torchvision_boxes.Matcher.BETWEEN_THRESHOLDS
            own = own[matches[has_box]]
            num_asked.append(is_asked.sum() / number)
            counts.append(torch.bincount(own[:, 4].long(), minlength=num_classes) / number)
            pairs.append((own[:, :4], anchors[has_box], number))
        mean_asked = torch.stack(num_asked).double().mean()
        coded = torch.cat([_BOXES.encode_single(own, anchor) for own, anchor, _ in pairs])
        middle = coded.median(0).values if len(coded) else coded.new_zeros(4)
        of_boxes = [
            self._box_loss(anchor, own, middle.expand(len(own), 4)) / number
            for own, anchor, number in pairs
        ]
        shares = torch.stack(counts).double().mean(0) / mean_asked
        return (ConstantParts(float(mean_asked), shares, float(torch.stack(of_boxes).mean())),)

    def _box_loss(self, anchors: Tensor, boxes: Tensor, coded: Tensor) -> Tensor:
        """The sum over [n, 4] boxes that are told from their anchors."""
        return torchvision_boxes._box_loss(self.box_loss, _BOXES, anchors, boxes, coded)


def matched(boxes: Tensor, anchors: Tensor) -> Tensor:
    """For each of A anchors the box of [n, 4] that it is to answer with, else -1, or -2 where it is
    not asked: [A] int64.
    """
    if not len(boxes):
        return torch.full((len(anchors),), -1, dtype=torch.int64, device=anchors.device)
    return _MATCHER(box_iou(boxes, anchors))


@functools.lru_cache(maxsize=64)
def _anchors(anchor_px: int, image_px: int, device: torch.device) -> list[Tensor]:
    """The anchors of each level for images of a side, [A, 4] float32 each."""
    sizes = tuple(
        tuple(int(anchor_px * 2**level * scale) for scale in SCALES)
        for level in range(len(LEVEL_STRIDES))
    )
    made = AnchorGenerator(sizes, (ASPECTS,) * len(sizes))
    made.set_cell_anchors(torch.float32, device)
    maps = [-(-image_px // stride) for stride in LEVEL_STRIDES]
    # a last level of fewer pixels than its stride fits: torchvision's stride is then another
    strides = [[image_px // side] * 2 for side in maps]
    return made.grid_anchors([[side, side] for side in maps], strides)  # type: ignore[arg-type]
