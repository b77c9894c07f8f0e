"""DETA's network: maps of a backbone, an encoder that says where things may be, and a decoder that
says what and where they are.

Source: jozhang97/DETA at 0a9ce48d: models/deformable_detr.py, models/deformable_transformer.py.
"""

from __future__ import annotations

import copy
import functools
import math
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional
from torchvision.ops import batched_nms, box_convert

from trainer.tasks.detection.deformable import (
    DecoderLayer,
    EncoderLayer,
    Sides,
    initialize,
    middles,
    sines,
)

if TYPE_CHECKING:  # which builds this
    from trainer.tasks.detection.deta import Deta

STRIDES = (8, 16, 32)  # of the backbone's features; further levels are made from the last
_ANCHOR_SHARE = 0.05  # of an image's side; twice as much from level to level
_INSIDE = 0.01, 0.99  # middles and sides of the anchors that are used, in shares of an image
_PRIOR = 0.01  # of an answer at first
_MOST_PER_LEVEL = 1000  # anchors that suppression looks at
_SAME_IOU = 0.9  # above it the lower of two proposals of a level is dropped
_EPS = 1e-5


class Anchors(NamedTuple):
    """Of the pixels of some maps. boxes: [S, 4], (x, y, width, height) in shares of the image.
    levels: [S] int64. pixels: [S] int64, whose anchors these are, counted level after level.
    """

    boxes: Tensor
    levels: Tensor
    pixels: Tensor


class DetaModel(nn.Module):
    """Images [B, C, H, W] to [B, S + Q + L Q, K + 4]: a row of logits of K classes and a box (x, y,
    width, height), in shares of the image, for each of S anchors, Q proposals and, after each of L
    layers of the decoder, each proposal's answer. Anchors have one logit, the first, and proposals
    none: the others are 0.
    """

    def __init__(self, body: Any, places: list[int], head: DetaHead) -> None:
        super().__init__()
        self.body: Any = body
        self.places, self.head = places, head

    def forward(self, images: Tensor) -> Tensor:
        features = self.body.forward_intermediates(
            images, indices=self.places, intermediates_only=True
        )
        return self.head(features)

    def get_classifier(self) -> nn.Module:
        """What is new beside the backbone: what timm's name of a classifier is for."""
        return self.head


class DetaHead(nn.Module):
    """What stands on features of `widths` channels: see DetaModel. Draws from torch's global
    generator.
    """

    def __init__(self, spec: Deta, widths: list[int], num_classes: int) -> None:
        super().__init__()
        self.num_classes, self.num_queries = num_classes, spec.num_queries
        self.channels = channels = spec.channels
        sizes = (channels, spec.num_heads, spec.num_levels, spec.num_points, spec.hidden_channels)
        self.necks = nn.ModuleList(_necks(spec, widths))
        self.level_position = nn.Parameter(torch.empty(spec.num_levels, channels))
        self.encoder = nn.ModuleList(EncoderLayer(*sizes) for _ in range(spec.encoder_layers))
        self.decoder = nn.ModuleList(DecoderLayer(*sizes) for _ in range(spec.decoder_layers))
        self.of_pixel = _normed(channels)
        self.from_box = _normed(2 * channels)
        self.from_pixel = _normed(channels)
        initialize(self)
        nn.init.normal_(self.level_position)
        self.has_box = _classifier(channels, 1)
        self.classes = _copies(_classifier(channels, num_classes), spec.decoder_layers)
        self.first_box = _box_layers(channels)
        self.boxes = _copies(self.first_box, spec.decoder_layers)

    def forward(self, features: list[Tensor]) -> Tensor:
        maps = self._levels(features)
        sides = [(one.shape[2], one.shape[3]) for one in maps]
        anchors = anchors_of(tuple(sides), maps[0].device)
        memory = self._encoded(maps, sides)
        pixels = self.of_pixel(memory[:, anchors.pixels])
        logits = self.has_box(pixels).float()
        boxes = moved(anchors.boxes, self.first_box(pixels))
        chosen = torch.stack(
            [
                proposals(one, own, anchors.levels, self.num_queries)
                for one, own in zip(logits[:, :, 0], boxes, strict=True)
            ]
        )[:, :, None]
        proposed = boxes.detach().take_along_dim(chosen, 1)
        seen = pixels.detach().take_along_dim(chosen, 1)
        answers = self._decoded(proposed, seen, memory, sides)
        return torch.cat([self._rows(logits, boxes), self._rows(None, proposed), *answers], 1)

    def _levels(self, features: list[Tensor]) -> list[Tensor]:
        """The maps [B, C, h, w] of all levels; the further ones are each half as large."""
        maps = [neck(one) for neck, one in zip(self.necks, features, strict=False)]
        for neck in list(self.necks)[len(features) :]:
            maps.append(neck(features[-1] if len(maps) == len(features) else maps[-1]))
        return maps

    def _encoded(self, maps: list[Tensor], sides: Sides) -> Tensor:
        """[B, S, C], level after level."""
        memory = torch.cat([one.flatten(2).transpose(1, 2) for one in maps], 1)
        places = middles(sides, memory.device)
        each = zip(self.level_position, sides, strict=True)
        level = torch.cat([one.expand(height * width, -1) for one, (height, width) in each])
        position = sines(places[:, [1, 0]], self.channels // 2) + level
        for layer in self.encoder:
            memory = layer(memory, position[None], places[None], sides)
        return memory

    def _decoded(self, boxes: Tensor, seen: Tensor, memory: Tensor, sides: Sides) -> list[Tensor]:
        """After each layer [B, Q, K + 4], of proposals [B, Q, 4] and their pixels [B, Q, C]. A
        layer learns its own step alone: where it starts from has no gradient.
        """
        placed = self.from_box(sines(boxes, self.channels // 2))
        position, queries = placed.chunk(2, dim=2)
        queries = queries + self.from_pixel(seen)
        answers = []
        for layer, classes, steps in zip(self.decoder, self.classes, self.boxes, strict=True):
            queries = layer(queries, position, boxes, memory, sides)
            found = moved(boxes, steps(queries))
            answers.append(self._rows(classes(queries), found))
            boxes = found.detach()
        return answers

    def _rows(self, logits: Tensor | None, boxes: Tensor) -> Tensor:
        """[B, N, K + 4] of logits [B, N, K or 1], or of none, and boxes [B, N, 4]."""
        if logits is None:
            logits = boxes[:, :, :0]
        missing = self.num_classes - logits.shape[2]
        return torch.cat([functional.pad(logits.float(), (0, missing)), boxes], 2)


def _necks(spec: Deta, widths: list[int]) -> list[nn.Sequential]:
    channels, made = spec.channels, []
    for level in range(spec.num_levels):
        if level < len(widths):
            convolution = nn.Conv2d(widths[level], channels, 1)
        else:
            width = widths[-1] if level == len(widths) else channels
            convolution = nn.Conv2d(width, channels, 3, stride=2, padding=1)
        assert convolution.bias is not None, "torch's default"
        nn.init.zeros_(convolution.bias)
        made.append(nn.Sequential(convolution, nn.GroupNorm(spec.norm_groups, channels)))
    return made


def _normed(channels: int) -> nn.Sequential:
    return nn.Sequential(nn.Linear(channels, channels), nn.LayerNorm(channels))


def _classifier(channels: int, num_classes: int) -> nn.Linear:
    made = nn.Linear(channels, num_classes)
    nn.init.constant_(made.bias, math.log(_PRIOR / (1 - _PRIOR)))
    return made


def _box_layers(channels: int) -> nn.Sequential:
    """They say at first that no box moves."""
    hidden = [nn.Linear(channels, channels), nn.ReLU(), nn.Linear(channels, channels), nn.ReLU()]
    last = nn.Linear(channels, 4)
    nn.init.zeros_(last.weight)
    nn.init.zeros_(last.bias)
    return nn.Sequential(*hidden, last)


def _copies(layer: nn.Module, number: int) -> nn.ModuleList:
    return nn.ModuleList(copy.deepcopy(layer) for _ in range(number))


def moved(boxes: Tensor, steps: Tensor) -> Tensor:
    """Boxes in shares of an image, moved by steps in logits: float32."""
    return (boxes.logit(_EPS) + steps.float()).sigmoid()


def level_sides(image_px: int, num_levels: int) -> tuple[tuple[int, int], ...]:
    """Of the maps of images of a side that all strides divide."""
    sides = [image_px // stride for stride in STRIDES]
    while len(sides) < num_levels:
        sides.append(-(-sides[-1] // 2))
    return tuple((side, side) for side in sides)


@functools.lru_cache(maxsize=64)
def anchors_of(sides: tuple[tuple[int, int], ...], device: torch.device) -> Anchors:
    """A square around the middle of each pixel, but those too near to an edge of the image."""
    levels = torch.repeat_interleave(
        torch.arange(len(sides)), torch.tensor([height * width for height, width in sides])
    ).to(device)
    side = _ANCHOR_SHARE * 2.0 ** levels[:, None].float()
    boxes = torch.cat([middles(sides, device), side, side], 1)
    least, most = _INSIDE
    pixels = ((boxes > least) & (boxes < most)).all(1).nonzero()[:, 0]
    return Anchors(boxes[pixels], levels[pixels], pixels)


@torch.no_grad()
def proposals(logits: Tensor, boxes: Tensor, levels: Tensor, wanted: int) -> Tensor:
    """The places of the anchors that are proposals, [wanted] int64: as many of each level, the best
    of those that suppression keeps; then the next best of these; then the best of the others.

    logits, levels: [S]. boxes: [S, 4] (x, y, width, height) in shares of the image.
    """
    order = logits.sort(descending=True, stable=True).indices
    boxes, scores, levels = boxes[order], logits[order], levels[order]
    is_of = functional.one_hot(levels).bool()
    tried = (_ranks(is_of) <= _MOST_PER_LEVEL).nonzero()[:, 0]
    corners = box_convert(boxes[tried], "cxcywh", "xyxy").clamp(0, 1)
    kept = tried[batched_nms(corners, scores[tried], levels[tried], _SAME_IOU)]
    is_kept = torch.zeros_like(levels, dtype=torch.bool).index_fill_(0, kept, True)
    is_first = is_kept & (_ranks(is_of & is_kept[:, None]) <= wanted // is_of.shape[1])
    group = 2 - is_kept.long() - is_first.long()
    return order[group.sort(stable=True).indices[:wanted]]


def _ranks(is_of: Tensor) -> Tensor:
    """Which of its column each row is, from 1 on; 0 in none: [N] of [N, columns] bool."""
    return (is_of.cumsum(0) * is_of).sum(1)
