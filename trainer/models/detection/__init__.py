"""Detectors: what stands on a timm model to find boxes, their losses and their answers."""
