"""Deformable attention in plain torch, and a transformer's encoder and decoder made of it.

Each query looks at a few points of every feature map, around its own place, in place of all of
them. Layers normalize after their sum, without dropout.

Sources: Zhu et al. 2020, arXiv:2010.04159; jozhang97/DETA at 0a9ce48d:
models/deformable_transformer.py, models/position_encoding.py at 358eff34.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional

_TEMPERATURE = 10000.0

Sides = Sequence[tuple[int, int]]  # (height, width) of each feature map


class DeformableAttention(nn.Module):
    """Queries [B, N, C] to [B, N, C]: for each head, a weighted mean of the values at `points`
    places of each of `levels` feature maps, places and weights told from the query.

    At first head h looks in the direction of 2 pi h / heads, at 1, 2 ... points from its place, all
    of the same weight.
    """

    def __init__(self, channels: int, heads: int, levels: int, points: int) -> None:
        super().__init__()
        self.heads, self.levels, self.points = heads, levels, points
        self.offsets = nn.Linear(channels, heads * levels * points * 2)
        self.weights = nn.Linear(channels, heads * levels * points)
        self.values = nn.Linear(channels, channels)
        self.out = nn.Linear(channels, channels)

    def initialize(self) -> None:
        """Draws from torch's global generator."""
        for layer in (self.offsets, self.weights):
            nn.init.zeros_(layer.weight)
        for layer in (self.values, self.out):
            nn.init.xavier_uniform_(layer.weight)
        for layer in (self.weights, self.values, self.out):
            nn.init.zeros_(layer.bias)
        angle = torch.arange(self.heads) * (2 * math.pi / self.heads)
        ray = torch.stack([angle.cos(), angle.sin()], dim=1)
        ray = ray / ray.abs().amax(1, keepdim=True)
        steps = torch.arange(1, self.points + 1.0)[:, None]
        start = (ray[:, None, None] * steps).expand(-1, self.levels, -1, -1)
        with torch.no_grad():
            self.offsets.bias.copy_(start.flatten())

    def forward(self, queries: Tensor, places: Tensor, memory: Tensor, sides: Sides) -> Tensor:
        """places: [B or 1, N, 2], (x, y) in shares of an image, whose offsets are in pixels of each
        map, or [B, N, 4], boxes (x, y, width, height), whose offsets are in half sides of the box
        over `points`. memory: [B, S, C], the maps' pixels level after level.
        """
        shape = self.heads, self.levels, self.points
        offsets = self.offsets(queries).unflatten(2, (*shape, 2)).float()
        weights = self.weights(queries).unflatten(2, (self.heads, -1)).float().softmax(3)
        weights = weights.unflatten(3, shape[1:])
        values = self.values(memory).float().split([height * width for height, width in sides], 1)
        place = places[:, :, None, None, :].float()
        found: Tensor | None = None
        for level, (own, (height, width)) in enumerate(zip(values, sides, strict=True)):
            unit = (
                place[..., 2:] * (0.5 / self.points)
                if places.shape[-1] == 4
                else place.new_tensor([1 / width, 1 / height])
            )
            grid = 2 * (place[..., :2] + offsets[:, :, :, level] * unit) - 1  # [B, N, H, P, 2]
            maps = own.unflatten(2, (self.heads, -1)).permute(0, 2, 3, 1)  # [B, H, d, S of it]
            seen = functional.grid_sample(
                maps.flatten(0, 1).unflatten(2, (height, width)),
                grid.transpose(1, 2).flatten(0, 1),
                align_corners=False,
            )  # [B * H, d, N, P]
            weight = weights[:, :, :, level].transpose(1, 2).flatten(0, 1)[:, None]
            part = (seen * weight).sum(3)
            found = part if found is None else found + part
        assert found is not None, "there is a level"
        return self.out(found.unflatten(0, (-1, self.heads)).flatten(1, 2).transpose(1, 2))


class EncoderLayer(nn.Module):
    """Each pixel of the maps [B, S, C] looks at the others, then a multilayer perceptron."""

    def __init__(self, channels: int, heads: int, levels: int, points: int, hidden: int) -> None:
        super().__init__()
        self.attention = DeformableAttention(channels, heads, levels, points)
        self.norm = nn.LayerNorm(channels)
        self.perceptron = _perceptron(channels, hidden)
        self.last_norm = nn.LayerNorm(channels)

    def forward(self, memory: Tensor, position: Tensor, places: Tensor, sides: Sides) -> Tensor:
        seen = self.attention(memory + position, places, memory, sides)
        memory = self.norm(memory + seen)
        return self.last_norm(memory + self.perceptron(memory))


class DecoderLayer(nn.Module):
    """Each query [B, Q, C] looks at the other queries, then at the maps around its own box, then a
    multilayer perceptron.
    """

    def __init__(self, channels: int, heads: int, levels: int, points: int, hidden: int) -> None:
        super().__init__()
        self.among = nn.MultiheadAttention(channels, heads, batch_first=True)
        self.among_norm = nn.LayerNorm(channels)
        self.attention = DeformableAttention(channels, heads, levels, points)
        self.norm = nn.LayerNorm(channels)
        self.perceptron = _perceptron(channels, hidden)
        self.last_norm = nn.LayerNorm(channels)

    def forward(
        self, queries: Tensor, position: Tensor, boxes: Tensor, memory: Tensor, sides: Sides
    ) -> Tensor:
        placed = queries + position
        queries = self.among_norm(
            queries + self.among(placed, placed, queries, need_weights=False)[0]
        )
        seen = self.attention(queries + position, boxes, memory, sides)
        queries = self.norm(queries + seen)
        return self.last_norm(queries + self.perceptron(queries))


def _perceptron(channels: int, hidden: int) -> nn.Sequential:
    return nn.Sequential(nn.Linear(channels, hidden), nn.ReLU(), nn.Linear(hidden, channels))


def initialize(layers: nn.Module) -> None:
    """Matrices by Xavier, vectors as torch has them, deformable attention its own way. Draws from
    torch's global generator.
    """
    for weight in layers.parameters():
        if weight.dim() > 1:
            nn.init.xavier_uniform_(weight)
    for module in layers.modules():
        if isinstance(module, DeformableAttention):
            module.initialize()


def sines(shares: Tensor, number: int) -> Tensor:
    """Numbers in [0, 1], [..., n], as `number` sines and cosines each: [..., n * number]."""
    step = torch.arange(number, dtype=torch.float32, device=shares.device)
    period = _TEMPERATURE ** (2 * (step // 2) / number)
    angle = shares.float()[..., None] * (2 * math.pi) / period
    waves = torch.stack([angle[..., 0::2].sin(), angle[..., 1::2].cos()], dim=-1)
    return waves.flatten(-3)


def middles(sides: Sides, device: torch.device) -> Tensor:
    """The middle of each pixel of all maps, level after level: [S, 2], (x, y) in shares of an
    image.
    """
    found = []
    for height, width in sides:
        down, across = (torch.arange(side, device=device) + 0.5 for side in (height, width))
        y, x = torch.meshgrid(down / height, across / width, indexing="ij")
        found.append(torch.stack([x, y], dim=-1).flatten(0, 1))
    return torch.cat(found)
