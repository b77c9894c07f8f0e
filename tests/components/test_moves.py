"""Vertical flips and shifted images are torchvision's."""

import numpy as np
import pytest
import torch
from PIL import Image
from scipy.stats import binomtest, chisquare
from torchvision.transforms import RandomCrop
from torchvision.transforms import functional as torchvisions

from support.draws import make_ids
from support.plans import small_plan
from trainer.base.errors import UserError
from trainer.components.moves import PadCrop, VerticalFlip

PX, PAD = 20, 4
FILL = (124, 3, 250)


def batch(num_images=40, px=PX):
    generator = torch.Generator().manual_seed(1)
    return torch.randint(0, 256, (num_images, 3, px, px), dtype=torch.uint8, generator=generator)


def tensors(drawn):
    return {name: torch.from_numpy(values) for name, values in drawn.items()}


@pytest.mark.parametrize("padding", ["black", "mean", "reflect"])
def test_a_shifted_image_is_torchvisions_crop_of_the_padded_one(padding):
    """torchvision's functions on PIL images, at the place that was drawn."""
    images, part = batch(), PadCrop(pad_px=PAD, padding=padding)
    drawn = part.draw(0, make_ids(len(images)), PX)
    found = part.apply(images, tensors(drawn), FILL)
    mode = "reflect" if padding == "reflect" else "constant"
    colour = FILL if padding == "mean" else 0
    for one, shifted, (top, left) in zip(images, found, drawn["start"].tolist(), strict=True):
        picture = Image.fromarray(one.permute(1, 2, 0).numpy())
        padded = torchvisions.pad(picture, PAD, colour, mode)
        expected = torchvisions.crop(padded, top, left, PX, PX)
        assert np.array_equal(shifted.permute(1, 2, 0), np.asarray(expected))


def test_shifts_are_as_frequent_as_torchvisions():
    drawn = PadCrop(pad_px=PAD, padding="black").draw(0, make_ids(8000), PX)["start"]
    counts = np.bincount(drawn[:, 0] * 9 + drawn[:, 1], minlength=81)
    torch.manual_seed(0)
    image = torch.zeros(3, PX + 2 * PAD, PX + 2 * PAD)
    theirs = {RandomCrop.get_params(image, (PX, PX))[:2] for _ in range(4000)}
    assert chisquare(counts).pvalue > 1e-3 and len(theirs) == len(counts) == 81


def test_padding_as_large_as_the_image_is_refused_before_the_first_step():
    plan = small_plan()
    with pytest.raises(UserError, match=f"pad_px 32 .* of {plan.train_px_at(0)} px"):
        PadCrop(pad_px=32, padding="reflect").check(plan)
    PadCrop(pad_px=4, padding="reflect").check(plan)


def test_the_share_is_flipped_upside_down():
    images, part = batch(1000, 4), VerticalFlip(share=0.3)
    drawn = part.draw(0, make_ids(len(images)), 4)
    found = part.apply(images, tensors(drawn), FILL)
    chosen = drawn["is_flipped"]
    assert binomtest(int(chosen.sum()), len(images), 0.3).pvalue > 1e-3
    assert torch.equal(found[chosen], torchvisions.vflip(images[chosen]))
    assert torch.equal(found[~chosen], images[~chosen])
