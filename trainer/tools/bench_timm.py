"""A training loop of timm's own parts, by the numbers of a recipe: what a run is measured
beside.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any, TypeVar

import torch
from timm import loss
from timm.data import ImageDataset, Mixup, create_loader
from timm.optim import create_optimizer_v2
from timm.utils import ModelEmaV3
from torch import Tensor, nn

from trainer.base.settings import Settings
from trainer.components.augmentation import Augmentation
from trainer.components.averaging import Ema
from trainer.components.crops import Flip, RandomResizedCrop
from trainer.components.erasing import RandomErasing
from trainer.components.losses import BinaryCrossEntropy, CrossEntropy
from trainer.components.mixing import MixupOrCutMix
from trainer.components.optimizers import AdamW, Lamb
from trainer.components.rand_augment import RandAugment
from trainer.data.transforms import autocast, in_format
from trainer.models.build import build_model
from trainer.recipe.plan import Plan
from trainer.recipe.schema import Recipe

# of its loader, at least: it fills its queue again at the end of each epoch, which ImageNet has
# seldom
_EPOCH_IMAGES = 1 << 18

Part = TypeVar("Part", bound=Augmentation)


def reason_against(plan: Plan, folder: Path | None) -> str:
    """Why timm's parts have no loop for a plan's recipe and data, or ""."""
    recipe, profile = plan.recipe, plan.profile
    if folder is None or not (folder / "train").is_dir() or profile.channels != 3:
        return "its loader reads folders of colour images"
    crops = RandomResizedCrop, Flip, RandAugment, RandomErasing
    for key, part, known in (
        ("augment", _part(recipe, RandomResizedCrop), crops),
        *(("augment", part, crops) for part in recipe.augment),
        ("optimizer", recipe.optimizer, (Lamb, AdamW)),
        ("loss", recipe.loss, (BinaryCrossEntropy, CrossEntropy)),
        ("mix", recipe.mix, (MixupOrCutMix,)),
        *((("average", recipe.average, (Ema,)),) if recipe.average else ()),
    ):
        if not isinstance(part, known):
            name = "off" if part is None else part.name
            return f"{key} {name} is not among the parts that are joined here"
    if recipe.augment_splits or recipe.image.growth or recipe.batch.norm_images % 2:
        return "augment_splits, image.growth and micro-batches of odd size are not joined here"
    if recipe.mix and recipe.mix.images not in (None, recipe.batch.norm_images):
        return "a mix.images other than batch.norm_images is not joined here"
    return ""


class TimmLoop:
    """One training loop of timm's ImageDataset, create_loader, Mixup, loss, optimizer and
    ModelEmaV3, as its train.py joins them.

    Images, batch, micro-batch, workers, precision and memory format are those of a run with the
    same plan and settings, and so is the model. Repeats are left out: its processes decode each
    repeat again, which is the work of another image.

    On a GPU its PrefetchLoader normalizes images there. stream: endless (images, labels) of
    micro-batches; whoever wants to watch it may put another in its place.
    """

    def __init__(self, plan: Plan, settings: Settings, folder: Path) -> None:
        recipe, mix = plan.recipe, plan.recipe.mix
        assert isinstance(mix, MixupOrCutMix)  # see reason_against
        self.plan, self.settings = plan, settings
        memory_format = torch.channels_last if settings.channels_last else torch.contiguous_format
        model = build_model(plan).to(settings.device).to(memory_format=memory_format)
        self.model = model.train()
        self.optimizer = _optimizer(self.model, recipe)
        average = recipe.average
        assert average is None or isinstance(average, Ema)
        self.average = ModelEmaV3(self.model, decay=average.decay) if average else None
        kind = settings.device.partition(":")[0]
        self.scaler = torch.amp.GradScaler(kind, enabled=settings.precision == "fp16")
        self.loss = _loss(recipe)
        self.mixup = Mixup(
            mix.mixup_alpha,
            mix.cutmix_alpha,
            prob=mix.mixed_share or 1.0,
            switch_prob=mix.cutmix_share,
            mode={"image": "elem", "pair": "pair"}.get(mix.each or "", "batch"),
            label_smoothing=recipe.smoothing or 0.0,
            num_classes=plan.profile.num_classes,
        )
        self.stream = _endless(timm_loader(plan, settings, folder, kind == "cuda"))

    def step(self) -> None:
        """One optimizer step over its micro-batches."""
        num_micro_batches, device = self.plan.num_micro_batches, self.settings.device
        for _ in range(num_micro_batches):
            images, targets = self.mixup(*(one.to(device) for one in next(self.stream)))
            with autocast(self.settings):
                loss = self.loss(self.model(in_format(images, self.settings)), targets)
            self.scaler.scale(loss / num_micro_batches).backward()
        self.scaler.unscale_(self.optimizer)
        self.clip()
        self.scaler.step(self.optimizer)
        self.scaler.update()
        self.optimizer.zero_grad(set_to_none=True)
        if self.average is not None:
            self.average.update(self.model)

    def clip(self) -> None:
        """Cut down the gradients where the recipe wants it, unless the optimizer does: timm's Lamb
        is one.
        """
        optimizer = self.plan.recipe.optimizer
        if optimizer.clip_global_norm is not None and not isinstance(optimizer, Lamb):
            nn.utils.clip_grad_norm_(self.model.parameters(), optimizer.clip_global_norm)


def timm_loader(
    plan: Plan,
    settings: Settings,
    folder: Path,
    has_prefetcher: bool,
    num_images: int = _EPOCH_IMAGES,
):
    """timm's loader of a recipe's training images, in passes of at least so many, each of the
    folder's as often as any other.
    """
    recipe, px = plan.recipe, plan.recipe.image.train_px
    crop, drawn = _part(recipe, RandomResizedCrop), _part(recipe, RandAugment)
    erasing = _part(recipe, RandomErasing)
    assert crop is not None  # see reason_against
    images = ImageDataset(str(folder / "train"))
    images.reader.samples *= -(-num_images // len(images))
    return create_loader(
        images,
        (3, px, px),
        recipe.batch.norm_images,
        is_training=True,
        hflip=0.5 if _part(recipe, Flip) else 0.0,
        scale=crop.area,
        ratio=crop.aspect,
        interpolation=crop.interpolation,
        auto_augment=_policy(drawn) if drawn else None,
        color_jitter=0.0,
        re_prob=erasing.share if erasing else 0.0,
        re_mode="pixel" if erasing and erasing.fill == "noise" else "const",
        mean=plan.profile.mean,
        std=plan.profile.std,
        num_workers=settings.num_workers,
        pin_memory=settings.device.startswith("cuda"),
        use_prefetcher=has_prefetcher,
        device=torch.device(settings.device),
        persistent_workers=settings.num_workers > 0,
    )


def _part(recipe: Recipe, kind: type[Part]) -> Part | None:
    return next((part for part in recipe.augment if isinstance(part, kind)), None)


def _policy(drawn: RandAugment) -> str:
    """rand-m7-n2-p0.5-mstd0.5-mmax9-inc1, as timm writes it. At 10, which its noise reaches, an
    increasing posterize keeps 0 bits, which newer Pillows refuse.
    """
    spread = f"-mstd{drawn.magnitude_std:g}" if drawn.magnitude_std else ""
    strength = f"rand-m{drawn.magnitude:g}-n{drawn.num_ops}-p{drawn.op_share:g}"
    return f"{strength}{spread}-mmax9-inc{int(drawn.increasing)}"


def _endless(loader) -> Iterator[tuple[Tensor, Tensor]]:
    while True:
        yield from loader


def _loss(recipe: Recipe) -> nn.Module:
    """timm's, for mixed targets."""
    if not isinstance(recipe.loss, BinaryCrossEntropy):
        return loss.SoftTargetCrossEntropy()
    return loss.BinaryCrossEntropy(
        smoothing=0.0, target_threshold=recipe.loss.threshold, sum_classes=recipe.loss.sum_classes
    )


def _optimizer(model: nn.Module, recipe: Recipe) -> torch.optim.Optimizer:
    ours = recipe.optimizer
    assert isinstance(ours, (Lamb, AdamW))  # see reason_against
    clipping: dict[str, Any] = (
        {"max_grad_norm": ours.clip_global_norm} if isinstance(ours, Lamb) else {}
    )
    return create_optimizer_v2(
        model,
        opt=ours.name,
        lr=recipe.lr.peak,
        weight_decay=ours.weight_decay,
        betas=ours.betas,
        eps=ours.eps,
        filter_bias_and_bn="vectors" in ours.no_decay,
        **clipping,
    )
