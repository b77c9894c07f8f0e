"""Random erasing is timm's pixel mode and torchvision's, in distribution."""

import random

import numpy as np
import pytest
import torch
from scipy.stats import binomtest, ks_2samp, kstest
from timm.data.random_erasing import RandomErasing as TimmErasing
from torchvision.transforms import RandomErasing as TorchvisionErasing

from support.draws import make_ids
from trainer.base.streams import device_normals
from trainer.components.erasing import RandomErasing

IMAGE_PX = 40
NUM_DRAWS = 3000


def make(**changes):
    """timm's usual one, and what is changed."""
    fields = {"share": 0.25, "area": (0.02, 1 / 3), "aspect": (0.3, 1 / 0.3), "fill": "noise"}
    return RandomErasing(**(fields | changes))


def tensors(drawn):
    """Arrays as CPU tensors."""
    return {key: torch.from_numpy(value) for key, value in drawn.items()}


def timm_boxes():
    """The boxes timm erases, found in the images; a value of exactly zero is never drawn."""
    random.seed(0)
    torch.manual_seed(0)
    erase = TimmErasing(probability=1.0, mode="pixel", device="cpu")
    boxes = []
    for _ in range(NUM_DRAWS):
        changed = erase(torch.zeros(1, IMAGE_PX, IMAGE_PX))[0].nonzero()
        low, high = changed.amin(0), changed.amax(0)
        boxes.append([*low.tolist(), *(high - low + 1).tolist()])
    return np.array(boxes)


def torchvision_boxes():
    """The boxes torchvision erases with its own bounds."""
    torch.manual_seed(0)
    image = torch.empty(3, IMAGE_PX, IMAGE_PX)
    get = TorchvisionErasing.get_params
    return np.array([get(image, (0.02, 0.33), (0.3, 3.3), [0.0])[:4] for _ in range(NUM_DRAWS)])


@pytest.mark.parametrize(
    ("reference", "changes"),
    [(timm_boxes, {}), (torchvision_boxes, {"area": (0.02, 0.33), "aspect": (0.3, 3.3)})],
)
def test_boxes_are_distributed_as_the_references(reference, changes):
    ours, theirs = (
        make(share=1.0, **changes).draw(0, make_ids(NUM_DRAWS), IMAGE_PX)["box"],
        reference(),
    )
    for column in range(4):
        assert ks_2samp(ours[:, column], theirs[:, column]).pvalue > 1e-3
    for measure in (lambda box: box[:, 2] * box[:, 3], lambda box: box[:, 2] / box[:, 3]):
        assert ks_2samp(measure(ours), measure(theirs)).pvalue > 1e-3


def test_the_share_is_erased_and_the_rest_is_left_alone():
    erase, images = make(), torch.zeros(2000, 1, IMAGE_PX, IMAGE_PX)
    drawn = erase.draw(0, make_ids(2000), IMAGE_PX)
    changed = erase.apply(images, tensors(drawn), (0,)).flatten(1).ne(0).sum(1).numpy()
    assert np.array_equal(changed, drawn["box"][:, 2] * drawn["box"][:, 3])
    assert binomtest(int((changed > 0).sum()), 2000, 0.25).pvalue > 1e-3
    assert not images.any()


@pytest.mark.parametrize("num_channels", [1, 3, 6])
def test_noise_is_standard_normal_in_every_channel(num_channels):
    erase = make(share=1.0)
    images = torch.full((50, num_channels, IMAGE_PX, IMAGE_PX), 100.0)
    erased = erase.apply(
        images, tensors(erase.draw(0, make_ids(50), IMAGE_PX)), (0,) * num_channels
    )
    for channel in erased.unbind(1):
        values = channel[channel != 100.0].numpy()
        assert kstest(values, "norm").pvalue > 1e-3
        assert len(np.unique(values)) > 0.99 * len(values)


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
def test_a_box_holds_the_first_numbers_of_its_key(layout):
    erase = make(share=0.5)
    images = torch.randn(
        40, 3, IMAGE_PX, IMAGE_PX, generator=torch.Generator().manual_seed(0)
    ).contiguous(memory_format=layout)
    drawn = tensors(erase.draw(0, make_ids(40), IMAGE_PX))
    expected = images.clone()
    for image, (top, left, height, width), key in zip(
        expected, drawn["box"].tolist(), drawn["noise_key"], strict=True
    ):
        size = 3 * height * width
        noise = device_normals(key[None], torch.zeros(size, dtype=torch.int64), torch.arange(size))
        image[:, top : top + height, left : left + width] = noise.view(3, height, width)
    assert torch.equal(erase.apply(images, drawn, (0, 0, 0)), expected)


def test_mean_is_zero_after_normalization():
    erase = make(share=1.0, fill="mean")
    images = torch.ones(20, 3, IMAGE_PX, IMAGE_PX)
    erased = erase.apply(images, tensors(erase.draw(0, make_ids(20), IMAGE_PX)), (0, 0, 0))
    assert set(erased.unique().tolist()) == {0.0, 1.0}


def test_an_image_depends_on_its_own_address_alone():
    erase, ids = make(share=0.5), make_ids(40)
    images = torch.zeros(40, 3, IMAGE_PX, IMAGE_PX)
    together = erase.apply(images, tensors(erase.draw(3, ids, IMAGE_PX)), (0, 0, 0))
    for some in ([5, 1, 17], [30], list(range(20, 40))):
        alone = erase.apply(images[some], tensors(erase.draw(3, ids[some], IMAGE_PX)), (0, 0, 0))
        assert torch.equal(together[some], alone)


def test_nothing_is_erased_where_no_box_fits():
    erase = make(share=1.0, area=(1.0, 1.0), aspect=(1.0, 1.0))
    assert not erase.draw(0, make_ids(10), IMAGE_PX)["box"].any()


def test_nothing_is_erased_from_an_epoch_on():
    plain, ending = make(share=1.0), make(share=1.0, until_epochs=2)
    for epoch in range(4):
        box = ending.draw(0, make_ids(20, epoch), IMAGE_PX)["box"]
        before = plain.draw(0, make_ids(20, epoch), IMAGE_PX)["box"]
        assert np.array_equal(box, before if epoch < 2 else np.zeros_like(box)) and before.any()
