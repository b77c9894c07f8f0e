"""The plain ViT of big_vision against its counts and plain loops."""

import math

import pytest
import timm
import torch

from trainer.models.zoo.vit_plain import sincos_positions


@pytest.mark.parametrize(("size", "width"), [("tiny", 192), ("small", 384), ("base", 768)])
def test_weights_are_counted(size, width):
    with torch.device("meta"):
        model = timm.create_model(f"vit_{size}_patch16_plain_224")
    block = 4 * (width * width + width) + 2 * 2 * width  # attention, two norms
    block += 2 * 4 * width * width + 4 * width + width  # MLP
    head = width * width + width + 1000 * width + 1000
    expected = 768 * width + width + 12 * block + 2 * width + head
    trained = [weight for weight in model.parameters() if weight.requires_grad]
    assert sum(weight.numel() for weight in trained) == expected
    assert not model.pos_embed.requires_grad and model.cls_token is None


def test_positions_are_sines_of_columns_and_rows():
    height, width, dim = 3, 5, 16
    found = sincos_positions(height, width, dim)[0]
    for row in range(height):
        for column in range(width):
            for k in range(4):
                rate = 10_000 ** -(k / 3)
                expected = [
                    math.sin(column * rate), math.cos(column * rate),
                    math.sin(row * rate), math.cos(row * rate),
                ]  # fmt: skip
                place = found[row * width + column]
                assert place[k::4].tolist() == pytest.approx(expected, abs=1e-6)


def test_logits_are_of_the_mean_token_through_a_tanh_and_start_at_zero():
    torch.manual_seed(0)
    model = timm.create_model("vit_tiny_patch16_plain_224", img_size=32, num_classes=7).eval()
    images = torch.randn(2, 3, 32, 32)
    assert not model(images).any()
    torch.nn.init.normal_(model.head.weight)
    tokens = model.forward_features(images)
    assert tokens.shape == (2, 4, 192)
    hidden = torch.tanh(tokens.mean(1) @ model.pre_logits.weight.T + model.pre_logits.bias)
    expected = hidden @ model.head.weight.T + model.head.bias
    assert torch.allclose(model(images), expected, atol=1e-6)
    # the last norm is before the mean
    means = tokens.mean(dim=2)
    assert torch.allclose(means, torch.zeros_like(means), atol=1e-5)


def test_other_sizes_have_positions_of_their_own():
    model = timm.create_model(
        "vit_tiny_patch16_plain_224", img_size=32, dynamic_img_size=True
    ).eval()
    larger = timm.create_model("vit_tiny_patch16_plain_224", img_size=64).eval()
    weights = model.state_dict() | {"pos_embed": larger.pos_embed}
    larger.load_state_dict(weights)
    images = torch.randn(1, 3, 64, 64)
    assert torch.allclose(
        model.forward_features(images), larger.forward_features(images), atol=1e-5
    )
