"""DETA: a transformer that proposes boxes and corrects them, trained as detectors with anchors are:
several answers for each box, told by overlap, and suppression at the end.

Source: Ouyang-Zhang et al. 2022, arXiv:2212.06137; jozhang97/DETA at 0a9ce48d.
"""

from __future__ import annotations

from typing import Annotated, Any, ClassVar, Literal, NamedTuple, Self

import torch
from pydantic import Field, model_validator
from torch import Tensor, nn
from torchvision.ops import (
    batched_nms,
    box_convert,
    clip_boxes_to_image,
    generalized_box_iou_loss,
)

from trainer.base.component import NonNegative
from trainer.components.losses import ImageLoss
from trainer.tasks.detection.assignment import Pairs, assigned, owners
from trainer.tasks.detection.deta_model import (
    STRIDES,
    Anchors,
    DetaHead,
    DetaModel,
    anchors_of,
    level_sides,
)
from trainer.tasks.detection.detector import (
    NO_CLASS,
    ConstantParts,
    Detector,
    Open,
    check_multiple,
    pyramid_levels,
)

ANCHOR_IOU, PROPOSAL_IOU = 0.7, 0.6  # with the box that they are to answer with
_MOST_TRIED = 10_000  # answers of an image before suppression

Layers = Annotated[int, Field(ge=1, le=12)]


class Truth(NamedTuple):
    """The boxes of one image: shares [n, 4] (x, y, width, height) in shares of it, labels [n]."""

    shares: Tensor
    labels: Tensor

    @property
    def corners(self) -> Tensor:
        return box_convert(self.shares, "cxcywh", "xyxy")


class Deta(Detector):
    """An encoder asks of each anchor whether it is a thing, the best are proposals, num_queries or
    all that there are, and each layer of a decoder tells the class of each and moves its box.

    An anchor belongs to the box it overlaps most where their IoU is ANCHOR_IOU or more, a proposal
    where it is PROPOSAL_IOU, and the best of each box in any case; of these the most_per_box that
    overlap it most answer with it, all others with nothing. The loss of an image is summed over the
    anchors and over the proposals after each layer, and divided by its boxes: the recipe's `loss`,
    which needs sum_classes or is a mean over classes, l1_weight times L1 of (x, y, width, height)
    in shares of the image and giou_weight times 1 - GIoU. Padding is looked at as the image is.

    channels: of a query and of all maps. num_levels: of the maps, three of the backbone at strides
    8, 16 and 32 and others made from the last. num_heads, num_points: of deformable attention, the
    latter at each level. hidden_channels: of the perceptrons. norm_groups: of a group norm of each
    map. nms_iou, most_found: the IoU above which the lower of two answers of a class is dropped,
    and the most that are kept.

    Raises ValueError for channels that heads, groups and pairs of sines do not divide.
    """

    name: Literal["deta"] = "deta"
    channels: Annotated[int, Field(ge=8, le=1024)]
    num_levels: Annotated[int, Field(ge=3, le=5)]
    num_heads: Annotated[int, Field(ge=1, le=64)]
    num_points: Annotated[int, Field(ge=1, le=16)]
    hidden_channels: Annotated[int, Field(ge=8, le=8192)]
    encoder_layers: Layers
    decoder_layers: Layers
    norm_groups: Annotated[int, Field(ge=1, le=256)]
    num_queries: Annotated[int, Field(ge=1, le=3000)]
    most_per_box: Annotated[int, Field(ge=1, le=100)]
    l1_weight: NonNegative
    giou_weight: NonNegative
    nms_iou: Open
    most_found: Annotated[int, Field(ge=1, le=1000)]
    example: ClassVar[dict[str, Any]] = {
        "channels": 256,
        "num_levels": 5,
        "num_heads": 8,
        "num_points": 4,
        "hidden_channels": 2048,
        "encoder_layers": 6,
        "decoder_layers": 6,
        "norm_groups": 32,
        "num_queries": 900,
        "most_per_box": 4,
        "l1_weight": 5.0,
        "giou_weight": 2.0,
        "nms_iou": 0.7,
        "most_found": 100,
    }

    @model_validator(mode="after")
    def _divides(self) -> Self:
        for key, number in (
            ("num_heads", self.num_heads),
            ("norm_groups", self.norm_groups),
            ("4, a sine and a cosine of two sides", 4),
        ):
            if self.channels % number:
                raise ValueError(f"channels {self.channels} is no multiple of {key}: change one")
        return self

    def build(self, body: Any, num_classes: int) -> nn.Module:
        places, widths = pyramid_levels(body, STRIDES)
        body.prune_intermediate_layers(places, prune_norm=True, prune_head=True)
        return DetaModel(body, places, DetaHead(self, widths, num_classes))

    def check_side(self, key: str, image_px: int) -> None:
        check_multiple(key, image_px, STRIDES[-1])

    def _anchors(self, image_px: int, device: torch.device) -> Anchors:
        return anchors_of(level_sides(image_px, self.num_levels), device)

    def loss(
        self, outputs: Tensor, boxes: Tensor, image_px: int, classification: ImageLoss
    ) -> Tensor:
        anchors = self._anchors(image_px, outputs.device)
        each = [
            self._loss_of_image(made, _truth(rows, image_px), anchors, classification)
            for made, rows in zip(outputs, boxes, strict=True)
        ]
        return torch.stack(each).mean()

    def _loss_of_image(
        self, outputs: Tensor, truth: Truth, anchors: Anchors, classification: ImageLoss
    ) -> Tensor:
        """outputs: [S + Q + L Q, K + 4]."""
        of_anchors, proposed, *answers = self._parts(outputs, anchors)
        pairs = self._pairs(truth, anchors.boxes, ANCHOR_IOU)
        is_thing = truth._replace(labels=torch.zeros_like(truth.labels))
        first = torch.cat([of_anchors[:, :1], of_anchors[:, -4:]], 1)
        losses = [self._loss_of(first, is_thing, pairs, classification)]
        pairs = self._pairs(truth, proposed[:, -4:], PROPOSAL_IOU)
        losses += [self._loss_of(own, truth, pairs, classification) for own in answers]
        return torch.stack(losses).sum() / max(1, len(truth.labels))

    def _parts(self, outputs: Tensor, anchors: Anchors) -> tuple[Tensor, ...]:
        """The rows of the anchors, of the proposals, and of each layer's answers."""
        number = len(anchors.boxes)
        return outputs.split([number] + [self._queries(number)] * (1 + self.decoder_layers))

    def _queries(self, num_anchors: int) -> int:
        return min(self.num_queries, num_anchors)

    def _pairs(self, truth: Truth, candidates: Tensor, least_iou: float) -> Pairs:
        corners = box_convert(candidates, "cxcywh", "xyxy")
        return assigned(truth.corners, corners, least_iou, self.most_per_box)

    def _loss_of(
        self, rows: Tensor, truth: Truth, pairs: Pairs, classification: ImageLoss
    ) -> Tensor:
        """The sum over rows [N, K + 4] that answer each with a box of its own or with nothing."""
        logits, found = rows[:, :-4], rows[pairs.candidates, -4:]
        owner = owners(pairs, len(rows))
        is_own = owner >= 0
        targets = torch.zeros_like(logits)
        targets[is_own, truth.labels[owner[is_own]]] = 1.0
        return classification(logits, targets) * len(logits) + self._box_loss(found, truth, pairs)

    def _box_loss(self, found: Tensor, truth: Truth, pairs: Pairs) -> Tensor:
        """The sum over the boxes found [P, 4], one for each pair."""
        wanted = truth.shares[pairs.boxes]
        corners = (box_convert(one, "cxcywh", "xyxy") for one in (found, wanted))
        of_overlap = generalized_box_iou_loss(*corners, reduction="sum")
        return self.l1_weight * (found - wanted).abs().sum() + self.giou_weight * of_overlap

    def found(self, outputs: Tensor, image_px: int, seen_px: Tensor) -> Tensor:
        made = outputs.new_zeros(len(outputs), self.most_found, 6)
        made[:, :, 5] = NO_CLASS
        number = self._queries(len(self._anchors(image_px, outputs.device).boxes))
        answers = outputs[:, -number:]
        for row, own, (width, height) in zip(made, answers, seen_px.tolist(), strict=True):
            best = self._found_in_image(own, image_px, (height, width))
            row[: len(best)] = best
        return made

    def _found_in_image(
        self, answers: Tensor, image_px: int, seen_px: tuple[float, float]
    ) -> Tensor:
        """[n, 6] of answers [Q, K + 4]; seen_px: (height, width)."""
        num_classes = answers.shape[1] - 4
        scores = answers[:, :-4].sigmoid().flatten()
        scores, places = scores.topk(min(_MOST_TRIED, len(scores)))
        boxes = box_convert(answers[places // num_classes, -4:], "cxcywh", "xyxy") * image_px
        boxes = clip_boxes_to_image(boxes, seen_px)  # type: ignore[arg-type]
        labels = places % num_classes
        kept = batched_nms(boxes, scores, labels, self.nms_iou)[: self.most_found]
        columns = boxes[kept], scores[kept, None], labels[kept, None].to(boxes)
        return torch.cat(columns, dim=1)

    def constant_parts(
        self, boxes: Tensor, image_px: int, num_classes: int
    ) -> tuple[ConstantParts, ...]:
        """Of anchors that do not move and are all the proposals there are."""
        anchors = self._anchors(image_px, boxes.device)
        truths = [_truth(rows, image_px) for rows in boxes]
        things = [one._replace(labels=torch.zeros_like(one.labels)) for one in truths]
        number, layers = len(anchors.boxes), self.decoder_layers
        first = self._constant(things, anchors, ANCHOR_IOU, number, 1)
        queries = self._queries(number)
        second = self._constant(truths, anchors, PROPOSAL_IOU, queries, num_classes)
        return first, second._replace(
            num_asked=layers * second.num_asked, box_loss=layers * second.box_loss
        )

    def _constant(
        self, truths: list[Truth], anchors: Anchors, least_iou: float, asked: int, classes: int
    ) -> ConstantParts:
        num_asked, counts, of_boxes = [], [], []
        for truth in truths:
            pairs, number = self._pairs(truth, anchors.boxes, least_iou), max(1, len(truth.labels))
            num_asked.append(asked / number)
            owner = owners(pairs, len(anchors.boxes))
            own = truth.labels[owner[owner >= 0]]
            counts.append(torch.bincount(own, minlength=classes) / number)
            of_boxes.append(self._box_loss(anchors.boxes[pairs.candidates], truth, pairs) / number)
        mean_asked = sum(num_asked) / len(num_asked)
        shares = torch.stack(counts).double().mean(0) / mean_asked
        return ConstantParts(mean_asked, shares, float(torch.stack(of_boxes).mean()))


def _truth(rows: Tensor, image_px: int) -> Truth:
    """Of [M, 5]: see Detector.loss."""
    own = rows[rows[:, 4] >= 0]
    return Truth(box_convert(own[:, :4] / image_px, "xyxy", "cxcywh"), own[:, 4].long())
