"""A timm ViT that sees some patches of an image, and a decoder that predicts the pixels of all."""

from __future__ import annotations

import math
from functools import partial
from typing import Any

import torch
from timm.models import checkpoint_seq
from timm.models.vision_transformer import Block, VisionTransformer
from torch import Tensor, nn

from trainer.base.errors import PlanError

_EPS = 1e-6
_TOKEN_STD = 0.02


def patches_of(images: Tensor, patch_px: int) -> Tensor:
    """The pixels of each patch, row by row: images [B, C, H, W] to [B, L, patch_px ** 2 * C], the
    channels of a pixel beside one another.
    """
    size, channels = (side // patch_px for side in images.shape[2:]), images.shape[1]
    rows, columns = size
    cut = images.reshape(-1, channels, rows, patch_px, columns, patch_px)
    return cut.permute(0, 2, 4, 3, 5, 1).reshape(len(images), rows * columns, -1)


def images_of(patches: Tensor, patch_px: int) -> Tensor:
    """Square images [B, C, H, H] of the patches that `patches_of` gives."""
    side = math.isqrt(patches.shape[1])
    cut = patches.reshape(len(patches), side, side, patch_px, patch_px, -1)
    return cut.permute(0, 5, 1, 3, 2, 4).reshape(len(patches), -1, side * patch_px, side * patch_px)


def hidden_places(is_hidden: Tensor, num_hidden: int) -> tuple[Tensor, Tensor]:
    """The numbers of the patches (seen [B, V], hidden [B, num_hidden]), rising, where each row of
    is_hidden [B, L] bool hides so many.
    """
    order = is_hidden.byte().argsort(dim=1, stable=True)
    number = is_hidden.shape[1] - num_hidden
    return order[:, :number], order[:, number:]


def taken(values: Tensor, places: Tensor) -> Tensor:
    """Of values [B, L, N] those at places [B, M]: [B, M, N]."""
    return values.gather(1, places[..., None].expand(-1, -1, values.shape[2]))


def sin_cos_positions(side: int, width: int) -> Tensor:
    """Fixed embeddings of side x side patches, row by row: [side ** 2, width] float32. The first
    half of the channels tells the column, the second the row, each sines, then cosines.

    Source: the MAE authors' util/pos_embed.py.
    """
    quarter = width // 4
    rates = 1.0 / 10_000 ** (torch.arange(quarter, dtype=torch.float64) / quarter)
    angles = torch.arange(side, dtype=torch.float64)[:, None] * rates
    each = torch.cat([angles.sin(), angles.cos()], 1)
    columns, rows = each.repeat(side, 1), each.repeat_interleave(side, 0)
    return torch.cat([columns, rows], 1).float()


class Decoder(nn.Module):
    """Transformer blocks over the encoder's tokens, with one learned token in the place of each
    hidden patch: [B, prefix + V, D] to [B, L, num_pixels].

    Source: He et al. 2021, arXiv:2111.06377.
    """

    positions: Tensor

    def __init__(
        self, before: int, width: int, depth: int, heads: int, side: int, num_pixels: int
    ) -> None:
        super().__init__()
        self.embed = nn.Linear(before, width)
        self.mask_token = nn.Parameter(torch.zeros(1, 1, width))
        self.register_buffer("positions", sin_cos_positions(side, width)[None], persistent=False)
        norm: Any = partial(nn.LayerNorm, eps=_EPS)
        self.blocks = nn.Sequential(
            *(Block(width, heads, qkv_bias=True, norm_layer=norm) for _ in range(depth))
        )
        self.norm = nn.LayerNorm(width, eps=_EPS)
        self.predict = nn.Linear(width, num_pixels)

    def forward(self, tokens: Tensor, seen: Tensor, num_prefix: int) -> Tensor:
        """seen: the places of the patches that tokens stand for, [B, V]."""
        embedded = self.embed(tokens)
        prefix, patches = embedded[:, :num_prefix], embedded[:, num_prefix:]
        every = self.mask_token.to(patches.dtype).expand(len(tokens), self.positions.shape[1], -1)
        places = seen[..., None].expand(-1, -1, patches.shape[2])
        every = every.scatter(1, places, patches) + self.positions
        found = self.norm(self.blocks(torch.cat([prefix.to(every.dtype), every], 1)))
        return self.predict(found[:, num_prefix:])


class MaskedAutoencoder(nn.Module):
    """Images [B, C, H, W] and which of their patches are hidden [B, L] bool, as many in each, to
    predictions [B, L, patch_px ** 2 * C]. Without the latter the last patches are hidden.

    body: a timm ViT, which the hidden patches do not pass through.
    """

    def __init__(self, body: VisionTransformer, decoder: Decoder, num_hidden: int) -> None:
        super().__init__()
        self.body, self.decoder, self.num_hidden = body, decoder, num_hidden

    def forward(self, images: Tensor, is_hidden: Tensor | None = None) -> Tensor:
        body, number = self.body, self.body.num_prefix_tokens
        tokens = body._pos_embed(body.patch_embed(images))
        prefix, patches = tokens[:, :number], tokens[:, number:]
        num_patches = patches.shape[1]
        if is_hidden is None:
            places = torch.arange(num_patches, device=images.device)
            is_hidden = (places >= num_patches - self.num_hidden).expand(len(images), -1)
        seen, _ = hidden_places(is_hidden, self.num_hidden)
        tokens = body.norm_pre(torch.cat([prefix, taken(patches, seen)], 1))
        if body.grad_checkpointing:
            tokens = checkpoint_seq(body.blocks, tokens)
        else:
            tokens = body.blocks(tokens)
        return self.decoder(body.norm(tokens), seen, number)

    def set_grad_checkpointing(self, enable: bool = True) -> None:
        """timm's name of it, for the encoder."""
        self.body.set_grad_checkpointing(enable)

    def get_classifier(self) -> nn.Module:
        """What is new beside the body: what timm's name of a classifier is for."""
        return self.decoder


def autoencoder_of(
    name: str, body: Any, decoder: tuple[int, int, int], patch_px: int, num_hidden: int
) -> MaskedAutoencoder:
    """A timm ViT with a decoder in the place of its classifier, its positions fixed; all other
    weights as they were, see `initialized`.

    name: the model's, for messages. decoder: width, blocks and heads. Raises PlanError for another
    kind of model, and for other patches than the recipe's.
    """
    if not isinstance(body, VisionTransformer) or body.pos_embed is None or body.embed_dim % 4:
        raise PlanError(
            f"model={name}: not one of timm's ViTs with position embeddings, which task"
            " masked_autoencoder needs",
            "use a model such as vit_base_patch16_224",
        )
    rows, columns = body.patch_embed.patch_size
    if (rows, columns) != (patch_px, patch_px):
        fix = {"task.patch_px": rows}
        hint = f'use set="task.patch_px={rows}"'
        raise PlanError(f"task.patch_px {patch_px}: {name} has patches of {rows} px", hint, fix=fix)
    body.reset_classifier(0, "")
    for weight in (body.pos_embed, *body.fc_norm.parameters()):  # which a classifier alone uses
        weight.requires_grad_(False)
    side, _ = body.patch_embed.grid_size
    num_pixels = patch_px**2 * body.patch_embed.proj.in_channels
    made = Decoder(body.embed_dim, *decoder, side, num_pixels)
    return MaskedAutoencoder(body, made, num_hidden)


@torch.no_grad()
def initialized(model: MaskedAutoencoder, with_body: bool) -> MaskedAutoencoder:
    """Fresh weights as the authors' code draws them, from torch's global generator: linear layers
    and the patches' projection by Xavier's uniform distribution, biases 0, tokens with a deviation
    of 0.02, the encoder's positions by sines and cosines. with_body: the encoder too.

    Source: the MAE authors' models_mae.py.
    """
    body = model.body
    if with_body:
        projection = body.patch_embed.proj
        nn.init.xavier_uniform_(projection.weight.view(len(projection.weight), -1))
        positions = body.pos_embed
        assert positions is not None, "autoencoder_of"
        patches = sin_cos_positions(body.patch_embed.grid_size[0], positions.shape[2])
        positions.zero_()[:, -len(patches) :] = patches
        for token in (body.cls_token, body.reg_token):
            if token is not None:
                nn.init.normal_(token, std=_TOKEN_STD)
    nn.init.normal_(model.decoder.mask_token, std=_TOKEN_STD)
    for module in (model if with_body else model.decoder).modules():
        if isinstance(module, nn.Linear):
            nn.init.xavier_uniform_(module.weight)
            if module.bias is not None:
                nn.init.zeros_(module.bias)
        elif isinstance(module, nn.LayerNorm):
            nn.init.ones_(module.weight)
            nn.init.zeros_(module.bias)
    return model
