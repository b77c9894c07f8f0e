"""Recipes made from the commands of other programs: timm's train.py, torchvision's, ConvNeXt's."""
