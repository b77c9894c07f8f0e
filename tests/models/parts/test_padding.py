"""Padding of strided layers against TensorFlow's rule and timm's own "same" layers."""

import pytest
import timm
import torch
from timm.layers import Conv2dSame
from timm.layers.pool2d_same import MaxPool2dSame
from torch import nn

from trainer.models.edit.replacement import ReplacementError
from trainer.models.parts.padding import SamePadded, SamePadding


@pytest.mark.parametrize("side", [7, 8, 32, 33])
@pytest.mark.parametrize(
    ("kernel", "stride", "dilation"), [(3, 2, 1), (7, 2, 1), (5, 3, 1), (3, 2, 2)]
)
def test_a_convolution_pads_as_tensorflow_says(side, kernel, stride, dilation):
    conv = nn.Conv2d(2, 3, kernel, stride, kernel // 2, dilation, bias=False).double()
    images = torch.randn(2, 2, side, side, dtype=torch.float64)
    made = SamePadded(conv)(images)
    # ceil(side / stride) windows; what the last one lacks is split, the odd row to the far side.
    num = -(-side // stride)
    lacking = max((num - 1) * stride + dilation * (kernel - 1) + 1 - side, 0)
    expected = torch.zeros(2, 3, num, num, dtype=torch.float64)
    for row in range(num):
        for column in range(num):
            for y in range(kernel):
                for x in range(kernel):
                    i = row * stride + y * dilation - lacking // 2
                    j = column * stride + x * dilation - lacking // 2
                    if 0 <= i < side and 0 <= j < side:
                        expected[:, :, row, column] += (
                            images[:, :, i, j] @ conv.weight[:, :, y, x].T
                        )
    torch.testing.assert_close(made, expected)


@pytest.mark.parametrize("side", [32, 33])
def test_layers_are_timms_same_layers(side):
    images = torch.randn(2, 4, side, side)
    conv = nn.Conv2d(4, 6, 3, 2, 1)
    theirs = Conv2dSame(4, 6, 3, 2)
    theirs.load_state_dict(conv.state_dict())
    torch.testing.assert_close(SamePadded(conv)(images), theirs(images))
    pool = SamePadded(nn.MaxPool2d(3, 2, 1))
    # All below zero: padding with zeros would be seen.
    assert torch.equal(pool(images - 10), MaxPool2dSame(3, 2)(images - 10))


@pytest.mark.parametrize(
    ("pool", "places"),
    [
        (True, ["conv1", "maxpool", "layer2.0.conv2", "layer3.0.conv2", "layer4.0.conv2"]),
        (False, ["conv1", "layer2.0.conv2", "layer3.0.conv2", "layer4.0.conv2"]),
    ],
)
def test_it_takes_what_is_strided_and_pads(pool, places):
    model = timm.create_model("resnet50", num_classes=3).eval()
    size = model.forward_features(torch.randn(1, 3, 64, 64)).shape
    replacement = SamePadding(pool=pool).apply(model, 64)
    assert list(replacement.places) == places
    assert "3 without padding" in replacement.note  # the shortcuts' 1x1 convolutions
    assert model.forward_features(torch.randn(1, 3, 64, 64)).shape == size


def test_a_model_without_strided_padding_is_refused():
    with pytest.raises(ReplacementError, match=r"model.same_padding: ConvNeXt"):
        SamePadding(pool=True).apply(timm.create_model("convnext_atto"), 64)
