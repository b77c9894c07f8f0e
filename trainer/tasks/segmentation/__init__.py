"""A class for each pixel: masks beside images, heads over any timm backbone, mean IoU."""

from __future__ import annotations

from trainer.tasks.segmentation import folders, tables  # noqa: F401  layouts register themselves
from trainer.tasks.segmentation.task import Segmentation, SegmentationScores, SegmentationSection

__all__ = ["Segmentation", "SegmentationScores", "SegmentationSection"]
