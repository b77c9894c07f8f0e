"""Boxes of some classes in each image: COCO's and VOC's sets, RetinaNet and DETA on any timm model
of several stages, COCO's mean average precision.
"""

from __future__ import annotations

from trainer.tasks.detection.deta import Deta
from trainer.tasks.detection.retinanet import RetinaNet
from trainer.tasks.detection.task import Detection, DetectionScores, DetectionSection

__all__ = ["Deta", "Detection", "DetectionScores", "DetectionSection", "RetinaNet"]
