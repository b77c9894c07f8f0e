"""A training loop of timm's own parts, by the numbers of a recipe: what a run is measured
beside.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import torch
from timm import loss
from timm.data import ImageDataset, Mixup, create_loader
from timm.optim import create_optimizer_v2
from timm.utils import ModelEmaV3
from torch import Tensor, nn

from trainer.base.settings import Settings
from trainer.components.crops import Flip, RandomResizedCrop
from trainer.components.erasing import RandomErasing
from trainer.components.losses import BinaryCrossEntropy, CrossEntropy
from trainer.components.mixing import MixupOrCutMix
from trainer.components.optimizers import AdamW, Lamb
from trainer.components.rand_augment import RandAugment
from trainer.data.transforms import autocast, in_format
from trainer.models.build import build_model
from trainer.recipe.plan import Plan

_EPOCH_IMAGES = (
    1 << 18
    # of its loader, at least: it fills its queue again at the end of each epoch, which ImageNet has
    # seldom
)


def reason_against(plan: Plan, folder: Path | None) -> str:
    """Why timm's parts have no loop for a plan's recipe and data, or ""."""
    recipe, profile = plan.recipe, plan.profile
    if folder is None or not (folder / "train").is_dir() or profile.channels != 3:
        return "its loader reads folders of colour images"
    known = {
        "augment": (RandomResizedCrop, Flip, RandAugment, RandomErasing),
        "optimizer": (Lamb, AdamW),
        "loss": (BinaryCrossEntropy, CrossEntropy),
        "mix": (MixupOrCutMix,),
    }
    written = {
        "augment": recipe.augment,
        "optimizer": (recipe.optimizer,),
        "loss": (recipe.loss,),
        "mix": (recipe.mix,),
    }
    for key, parts in written.items():
        for part in parts:
            if not isinstance(part, known[key]):
                return (
                    f"{key} {getattr(part, 'name', 'off')} is not among the parts that are joined"
                    " here"
                )
    if recipe.augment_splits or recipe.image.growth or recipe.batch.norm_images % 2:
        return "augment_splits, image.growth and micro-batches of odd size are not joined here"
    if recipe.mix.images not in (None, recipe.batch.norm_images):
        return "a mix.images other than batch.norm_images is not joined here"
    return ""


class TimmLoop:
    """One training loop of timm's ImageDataset, create_loader, Mixup, loss, optimizer and
    ModelEmaV3, as its train.py joins them.

    Images, batch, micro-batch, workers, precision and memory format are those of a run with the
    same plan and settings, and so is the model. Repeats are left out: its processes decode each
    repeat again, which is the work of another image.

    has_prefetcher: are images normalized on the device by its PrefetchLoader? None: where that is a
    GPU. stream: endless (images, labels) of micro-batches; whoever wants to watch it may put
    another in its place.
    """

    def __init__(
        self, plan: Plan, settings: Settings, folder: Path, has_prefetcher: bool | None = None
    ) -> None:
        recipe, mix = plan.recipe, plan.recipe.mix
        self.plan, self.settings = plan, settings
        memory_format = torch.channels_last if settings.channels_last else torch.contiguous_format
        self.model = build_model(plan).to(settings.device, memory_format=memory_format).train()
        self.optimizer = _optimizer(self.model, recipe)
        self.average = (
            ModelEmaV3(self.model, decay=recipe.average.decay) if recipe.average else None
        )
        self.scaler = torch.amp.GradScaler(
            settings.device.split(":")[0], enabled=settings.precision == "fp16"
        )
        self.loss = _loss(recipe)
        self.mixup = Mixup(
            mix.mixup_alpha,
            mix.cutmix_alpha,
            switch_prob=mix.cutmix_share,
            label_smoothing=recipe.smoothing or 0.0,
            num_classes=plan.profile.num_classes,
        )
        on_gpu = settings.device.startswith("cuda")
        self.stream = _endless(
            timm_loader(
                plan, settings, folder, on_gpu if has_prefetcher is None else has_prefetcher
            )
        )

    def step(self) -> None:
        """One optimizer step over its micro-batches."""
        num_micro_batches = self.plan.num_micro_batches
        for _ in range(num_micro_batches):
            images, targets = self.mixup(*self._arrived(next(self.stream)))
            with autocast(self.settings):
                loss = (
                    self.loss(self.model(in_format(images, self.settings)), targets)
                    / num_micro_batches
                )
            self.scaler.scale(loss).backward()
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
        page = self.plan.recipe.optimizer
        if page.clip_global_norm is not None and not isinstance(page, Lamb):
            nn.utils.clip_grad_norm_(self.model.parameters(), page.clip_global_norm)

    def _arrived(self, batch: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
        images, labels = batch
        return images.to(self.settings.device), labels.to(self.settings.device)


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
    parts = {type(part): part for part in recipe.augment}
    crop, drawn, erasing = (
        parts[RandomResizedCrop],
        parts.get(RandAugment),
        parts.get(RandomErasing),
    )
    images = ImageDataset(str(folder / "train"))
    images.reader.samples *= -(-num_images // len(images))
    return create_loader(
        images,
        (3, px, px),
        recipe.batch.norm_images,
        is_training=True,
        hflip=0.5 if Flip in parts else 0.0,
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


def _policy(drawn: RandAugment) -> str:
    """rand-m7-n2-p0.5-mstd0.5-inc1, as timm writes it."""
    spread = f"-mstd{drawn.magnitude_std:g}" if drawn.magnitude_std else ""
    strength = f"rand-m{drawn.magnitude:g}-n{drawn.num_ops}-p{drawn.op_share:g}"
    return f"{strength}{spread}-inc{int(drawn.increasing)}"


def _endless(loader) -> Iterator[tuple[Tensor, Tensor]]:
    while True:
        yield from loader


def _loss(recipe) -> nn.Module:
    """timm's, for mixed targets."""
    if isinstance(recipe.loss, CrossEntropy):
        return loss.SoftTargetCrossEntropy()
    return loss.BinaryCrossEntropy(
        smoothing=0.0, target_threshold=recipe.loss.threshold, sum_classes=recipe.loss.sum_classes
    )


def _optimizer(model: nn.Module, recipe) -> torch.optim.Optimizer:
    page = recipe.optimizer
    clipping = {"max_grad_norm": page.clip_global_norm} if isinstance(page, Lamb) else {}
    return create_optimizer_v2(
        model,
        opt=page.name,
        lr=recipe.lr.peak,
        weight_decay=page.weight_decay,
        betas=page.betas,
        eps=page.eps,
        filter_bias_and_bn="vectors" in page.no_decay,
        **clipping,
    )
