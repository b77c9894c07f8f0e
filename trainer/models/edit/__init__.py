"""Finding and replacing parts of any timm model."""
