"""From a micro-batch of decoded images to the model's input: deterministic tensor operations on
the device.
"""

from __future__ import annotations

import functools

import torch

_CACHED_PX = 1 << 15


def autocast(settings) -> torch.autocast:
    """The forward pass's precision: float32 and tf32 turn it off."""
    half = {"bf16": torch.bfloat16, "fp16": torch.float16}
    dtype = half.get(settings.precision, torch.float32)
    return torch.autocast(
        settings.device.split(":")[0], dtype=dtype, enabled=dtype != torch.float32
    )


def fill_of(profile) -> tuple[int, ...]:
    """The fill color of geometric operations: the dataset's mean, in 0 .. 255."""
    return tuple(min(255, round(255 * mean)) for mean in profile.mean)


def normalize(images: torch.Tensor, profile) -> torch.Tensor:
    """(images / 255 - mean) / std: [B, C, H, W] uint8 to float32."""
    mean, std = (
        255 * _per_channel(tuple(values), images.device) for values in (profile.mean, profile.std)
    )
    if images.device.type != "cpu":
        return (images.float() - mean) / std
    normal = torch.empty(images.shape)
    for start in range(
        0, len(images), at_once := max(1, _CACHED_PX // (images.shape[2] * images.shape[3]))
    ):
        part = slice(start, start + at_once)  # so small that all three passes stay in the cache
        normal[part].copy_(images[part]).sub_(mean).div_(std)
    return normal


@functools.lru_cache(maxsize=64)
def _per_channel(values: tuple[float, ...], device: torch.device) -> torch.Tensor:
    # Cached, since each new copy to the GPU would synchronize with it.
    return torch.tensor(values, device=device).view(1, -1, 1, 1)


def in_format(images: torch.Tensor, settings) -> torch.Tensor:
    """Images [B, C, H, W] in the memory format of the model: the last operation before it."""
    memory_format = torch.channels_last if settings.channels_last else torch.contiguous_format
    return images.contiguous(memory_format=memory_format)


def _of_stage(augment, stage: str) -> list:
    return [part for part in augment if part.stage == stage]


def augmented(batch, augment, num_splits: int | None, fill: tuple[int, ...]):
    """A micro-batch after stage `pixels`, the uint8 augmentations; with splits its images are
    [S * b, C, H, W], the first b not augmented.
    """
    parts = _of_stage(augment, "pixels")
    images = batch.images if num_splits is None else batch.images.repeat(num_splits - 1, 1, 1, 1)
    for part, drawn in zip(parts, batch.drawn, strict=False):
        images = part.apply(images, drawn, fill)
    if num_splits is not None:
        images = torch.cat([batch.images, images])
    return batch._replace(images=images, drawn=batch.drawn[len(parts) :], is_augmented=True)


def inputs_of(plan, settings, batch) -> torch.Tensor:
    """The images of a micro-batch on the device, before they are mixed: [B, C, H, W] float32.

    In the order of the sources: uint8 augmentations, normalization, erasing. With augment_splits S
    the images are [S * B, C, H, W], split after split: the first not augmented, the others
    augmented.
    """
    recipe = plan.recipe
    fill = fill_of(plan.profile)
    batch = batch._replace(images=batch.images.to(settings.device, non_blocking=True))
    if not batch.is_augmented:
        batch = augmented(batch, recipe.augment, recipe.augment_splits, fill)
    images = normalize(batch.images, plan.profile)
    num_plain = len(batch.labels) if recipe.augment_splits is not None else 0
    plain, images = images[:num_plain], images[num_plain:]
    for part, drawn in zip(_of_stage(recipe.augment, "normalized"), batch.drawn, strict=True):
        images = part.apply(images, drawn, fill)
    return torch.cat([plain, images]) if num_plain else images
