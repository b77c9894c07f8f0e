"""How fast a run will be on a device that need not be here, from what has been measured."""

from __future__ import annotations

import contextlib
import statistics
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from torch import nn

from trainer.ablation.throughput import shape_of, shape_of_row
from trainer.base.plural import counted
from trainer.base.provenance import device_name
from trainer.base.settings import Settings
from trainer.data.loader_speed import A100_RESNET50_IMAGES_PER_S
from trainer.models.build import gmacs
from trainer.recipe.plan import Plan
from trainer.runs.results import Row, RowError, read_row_file, rows_folder

_PUBLISHED_PX = 224
_NVIDIA = "NVIDIA's DeepLearningExamples 729963dd, with DALI"
_TIMM = "as an RTX 3090 in timm's benchmark of train steps alone, torch 1.12"
# Images a second of one GPU in mixed precision, channels last, at 224 px; by model.
_PUBLISHED = {
    "resnet18": (3482.0, _TIMM),
    "resnet34": (2037.0, _TIMM),
    "resnet50": (A100_RESNET50_IMAGES_PER_S, f"as an A100 of 80 GB in {_NVIDIA}"),
    "convnext_tiny": (819.0, _TIMM),
    "deit_small_patch16_224": (1051.0, _TIMM),
    "efficientnet_b0": (1752.0, _TIMM),
    "mobilenetv2_100": (2313.0, _TIMM),
    "vit_small_patch16_224": (1058.0, _TIMM),
}


@dataclass(frozen=True)
class Speed:
    """images_per_s: that one device trains on. source: of the number, in words. is_measured: by
    runs of this suite, of the same recipe, model and data; else by another program, of the plain
    model.
    """

    images_per_s: float
    source: str
    is_measured: bool

    def run_s(self, plan: Plan) -> float:
        """Seconds of a run's training, evaluations left out, were N devices N times as fast."""
        num_images = plan.draws_per_epoch * plan.recipe.epochs
        return num_images / (self.images_per_s * plan.world_size)


def speed_of(plan: Plan, settings: Settings, results: Path, model: nn.Module) -> Speed | None:
    """From the rows of a store; else, for a GPU, from what others have published; else None."""
    return _stored(plan, settings, results) or _published(plan, settings, model)


def _stored(plan: Plan, settings: Settings, results: Path) -> Speed | None:
    """The median of the newest run's device."""
    rows = sorted(_rows_like(plan, settings, results), key=lambda row: row.finished_utc)
    if not rows:
        return None
    device = rows[-1].device
    speeds = [_images_per_s(row) for row in rows if row.device == device]
    source = f"the median of {counted(len(speeds), 'run')} in {results} on {device}"
    return Speed(statistics.median(speeds), source, is_measured=True)


def _rows_like(plan: Plan, settings: Settings, results: Path) -> Iterator[Row]:
    """Of runs whose steps cost what this plan's do, on the same kind of device."""
    recipe, on_gpu = plan.recipe, settings.device.startswith("cuda")
    prefix, shape = f"{recipe.name}.v{recipe.version}-{plan.model}-", shape_of(plan)
    for path in rows_folder(results).glob("*.json"):
        if not path.name.startswith(prefix):
            continue
        with contextlib.suppress(RowError):  # a damaged row is no matter of this plan's
            row = read_row_file(path)
            is_like = (
                (row.reserved_mem_mib is not None) == on_gpu
                and row.precision == settings.precision
                and row.activation_checkpointing == settings.activation_checkpointing
                and (row.compiled, row.compile_mode) == (settings.compile, settings.compile_mode)
                and row.cuda_graphs == settings.cuda_graphs
                and row.half_group_norm == settings.half_group_norm
                and (on_gpu or _is_same_cpu(row, plan, settings))
                and shape_of_row(row) == shape
                and _images_per_s(row) > 0
            )
            if is_like:
                yield row


def _is_same_cpu(row: Row, plan: Plan, settings: Settings) -> bool:
    """Several processes on a CPU share it, so that their number is part of each one's speed."""
    here = (device_name("cpu"), settings.num_threads, plan.world_size)
    return here == (row.device, row.num_threads, row.world_size)


def _images_per_s(row: Row) -> float:
    whole = row.batch_images / row.step_s if row.step_s else row.images_per_s
    return whole / row.world_size


def _published(plan: Plan, settings: Settings, model: nn.Module) -> Speed | None:
    """Of the plain model in mixed precision, without a teacher; at another size of images in
    proportion to its multiply-adds.
    """
    section, known = plan.recipe.model, _PUBLISHED.get(plan.model.partition(".")[0])
    is_plain = section is None or section.is_plain
    if (
        known is None
        or not is_plain
        or plan.recipe.distill
        or settings.precision not in ("bf16", "fp16")
    ):
        return None
    images_per_s, source = known
    channels, train_px = plan.profile.channels, plan.recipe.image.train_px
    if train_px != _PUBLISHED_PX:
        images_per_s *= gmacs(model, channels, _PUBLISHED_PX) / gmacs(model, channels, train_px)
        source += f", at {_PUBLISHED_PX} px, scaled by multiply-adds to {train_px} px"
    return Speed(images_per_s, source, is_measured=False)
