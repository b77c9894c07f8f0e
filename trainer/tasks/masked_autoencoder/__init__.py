"""Images with most of their patches hidden, whose pixels a small decoder predicts."""

from __future__ import annotations

from trainer.tasks.masked_autoencoder.task import (
    MaskedAutoencoderScores,
    MaskedAutoencoderSection,
    MaskedAutoencoding,
)

__all__ = ["MaskedAutoencoderScores", "MaskedAutoencoderSection", "MaskedAutoencoding"]
