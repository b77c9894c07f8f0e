"""From a micro-batch of decoded images to the model's input: deterministic tensor operations on
the device.
"""

from __future__ import annotations

import functools

import torch

from trainer.base.devices import has_float64, kind_of
from trainer.components.mixing import UnitMixes
from trainer.components.pixels import fused
from trainer.components.pixels.choice import uses_kernels

_CACHED_PX = 1 << 15


def _pass_type(settings) -> torch.dtype:
    half = {"bf16": torch.bfloat16, "fp16": torch.float16}
    return half.get(settings.precision, torch.float32)


def autocast(settings) -> torch.autocast:
    """The forward pass's precision: float32 and tf32 turn it off."""
    dtype = _pass_type(settings)
    return torch.autocast(kind_of(settings.device), dtype=dtype, enabled=dtype != torch.float32)


def fill_of(profile) -> tuple[int, ...]:
    """The fill color of geometric operations: the dataset's mean, in 0 .. 255."""
    return tuple(min(255, round(255 * mean)) for mean in profile.mean)


def normalize(images: torch.Tensor, profile) -> torch.Tensor:
    """(images / 255 - mean) / std: [B, C, H, W] uint8 to float32."""
    mean, std = _levels(profile, images.device)
    if images.device.type != "cpu":
        return (images.float() - mean) / std
    normal = torch.empty(images.shape)
    for start in range(
        0, len(images), at_once := max(1, _CACHED_PX // (images.shape[2] * images.shape[3]))
    ):
        part = slice(start, start + at_once)  # so small that all three passes stay in the cache
        normal[part].copy_(images[part]).sub_(mean).div_(std)
    return normal


def _levels(profile, device: torch.device) -> tuple[torch.Tensor, torch.Tensor]:
    """Mean and deviation in grey levels, [1, C, 1, 1] float32."""
    return _per_channel(tuple(profile.mean), device), _per_channel(tuple(profile.std), device)


@functools.lru_cache(maxsize=64)
def _per_channel(values: tuple[float, ...], device: torch.device) -> torch.Tensor:
    # Cached, since each new copy to the GPU would synchronize with it.
    return 255 * torch.tensor(values, device=device).view(1, -1, 1, 1)


def _memory_format(settings, images: torch.Tensor) -> torch.memory_format:
    is_last = settings.is_channels_last(images.shape[3])
    return torch.channels_last if is_last else torch.contiguous_format


def in_format(images: torch.Tensor, settings) -> torch.Tensor:
    """Images [B, C, H, W] in the memory format of the model: the last operation before it."""
    return images.contiguous(memory_format=_memory_format(settings, images))


def scored_inputs(images: torch.Tensor, profile, settings) -> torch.Tensor:
    """The model's inputs of images that are not augmented: [B, C, H, W] uint8 on the device to its
    type and memory format.
    """
    if not uses_kernels(images.device):
        return in_format(normalize(images, profile), settings)
    levels, form = _levels(profile, images.device), _memory_format(settings, images)
    return fused.model_inputs(images, *levels, _pass_type(settings), form)


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


def model_inputs(plan, settings, batch, mixes: UnitMixes | None = None) -> torch.Tensor:
    """The model's inputs of a micro-batch: augmented, normalized, mixed; [N, C, H, W] in its memory
    format, float32 or, where a GPU's kernel makes them, what autocast would make of that.
    """
    batch = _with_pixels_augmented(plan, settings, batch)
    parts = _of_stage(plan.recipe.augment, "normalized")
    can_be_one = uses_kernels(batch.images.device) and plan.recipe.augment_splits is None
    if can_be_one and len(parts) < 2:
        in_kernel = [part.in_kernel(drawn) for part, drawn in zip(parts, batch.drawn, strict=True)]
        if None not in in_kernel:
            levels = _levels(plan.profile, batch.images.device)
            form = _pass_type(settings), _memory_format(settings, batch.images)
            one = in_kernel[0] if in_kernel else None
            return fused.model_inputs(batch.images, *levels, *form, one, mixes)
    images = _normalized(plan, batch)
    return in_format(images if mixes is None else mixes.of_images(images), settings)


def inputs_of(plan, settings, batch) -> torch.Tensor:
    """The images of a micro-batch on the device, before they are mixed: [B, C, H, W] float32.

    In the order of the sources: uint8 augmentations, normalization, erasing. With augment_splits S
    the images are [S * B, C, H, W], split after split: the first not augmented, the others
    augmented.
    """
    return _normalized(plan, _with_pixels_augmented(plan, settings, batch))


def _with_pixels_augmented(plan, settings, batch):
    recipe = plan.recipe
    drawing = recipe.augment, recipe.augment_splits, fill_of(plan.profile)
    if not has_float64(settings.device) and not batch.is_augmented:
        # its operations compute in float64 as PIL does: there, by the CPU
        batch = augmented(batch._replace(images=batch.images.cpu()), *drawing)
    batch = batch._replace(images=batch.images.to(settings.device, non_blocking=True))
    return batch if batch.is_augmented else augmented(batch, *drawing)


def _normalized(plan, batch) -> torch.Tensor:
    recipe = plan.recipe
    images = normalize(batch.images, plan.profile)
    num_plain = len(batch.labels) if recipe.augment_splits is not None else 0
    plain, images = images[:num_plain], images[num_plain:]
    for part, drawn in zip(_of_stage(recipe.augment, "normalized"), batch.drawn, strict=True):
        images = part.apply(images, drawn, fill_of(plan.profile))
    return torch.cat([plain, images]) if num_plain else images
