"""Which operations make sense for images of one channel, or of many.

Most operations work on each channel for itself. `contrast` needs the image's mean grey: the mean
luma of RGB images, the plain mean of all values otherwise. `color` is a blend with the grey image:
in one channel it changes nothing, and bands other than red, green and blue have no grey; it is left
out, and the others are drawn as often as each other.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Iterable

from trainer.components.augmentation import Augmentation, OfPixels

RGB_ONLY = ("color",)


class FromOperations(OfPixels):
    """An augmentation that draws from named operations."""

    @property
    @abstractmethod
    def operations(self) -> tuple[str, ...]:
        """What it draws from where images have three channels."""

    def left_out(self, num_channels: int) -> tuple[str, ...]:
        """What it does not draw for images of another number of channels."""
        return (
            () if num_channels == 3 else tuple(name for name in self.operations if name in RGB_ONLY)
        )


def channel_notes(augment: Iterable[Augmentation], num_channels: int) -> tuple[str, ...]:
    """One line for each augmentation of a recipe that leaves operations out for images of so many
    channels.
    """
    return tuple(
        f"note: {part.name} leaves out {', '.join(left)} for {num_channels}-channel images"
        for part in augment
        if (left := part.left_out(num_channels))
    )
