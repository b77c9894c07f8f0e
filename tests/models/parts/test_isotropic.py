"""An isotropic ConvNeXt against closed forms, a plain forward pass over its weights, and timm's own
blocks.
"""

import copy

import pytest
import timm
import torch
from torch import nn
from torch.nn import functional as F

from support.plans import small_plan
from trainer.base.errors import UserError
from trainer.models.build import assemble, gmacs, num_parameters
from trainer.models.edit.replacement import ReplacementError, find_layers
from trainer.models.edit.stages import blocks, stages
from trainer.models.parts.activations import Silu
from trainer.models.parts.depth import StochasticDepth
from trainer.models.parts.isotropic import IsotropicBody
from trainer.models.parts.norms import BatchNorm

SMALL = {"depth": 3, "width": 16, "patch_px": 8}
KINDS = (
    "test_convnext2",
    "convnext_atto",
    "convnext_tiny_hnf",
    "convnext_zepto_rms",
    "convnextv2_atto",
)


def rebuilt(model="test_convnext2", seed=0, fields=SMALL, **options):
    torch.manual_seed(seed)
    made = timm.create_model(model, **({"num_classes": 5} | options))
    return made, IsotropicBody(**fields).apply(made, 64)


def images(px=32, channels=3):
    return torch.randn(2, channels, px, px, generator=torch.Generator().manual_seed(1))


def jittered(model):
    with torch.no_grad():
        for weight in model.parameters():
            weight.add_(torch.randn_like(weight), alpha=0.1)
    return model


def closed_form(depth, width, patch_px, classes=1000, px=224):
    """Parameters, and billions of multiply-adds, of the paper's model without layer scale."""
    stem, block = 3 * patch_px**2 * width, 49 * width + 2 * 4 * width**2
    biases = width + depth * (width + 2 * width + 4 * width + width) + 2 * width + classes
    places = (px // patch_px) ** 2
    return stem + depth * block + width * classes + biases, (
        (stem + depth * block) * places + width * classes
    ) / 1e9


@pytest.mark.parametrize(("model", "depth", "width", "millions", "giga"), [
    ("convnext_small", 18, 384, 22, 4.3), ("convnext_base", 18, 768, 87, 16.9),
    ("convnext_large", 36, 1024, 306, 59.7),
])  # fmt: skip
def test_the_sources_sizes_have_its_parameters_and_multiply_adds(
    model, depth, width, millions, giga
):
    with torch.device("meta"):
        made, _ = rebuilt(
            model, fields={"depth": depth, "width": width, "patch_px": 16}, num_classes=1000
        )
    expected_params, expected_gmacs = closed_form(depth, width, 16)
    assert num_parameters(made) == expected_params and round(expected_params / 1e6) == millions
    counted = gmacs(made, 3, 224)
    assert counted == pytest.approx(expected_gmacs, rel=1e-9) and counted == pytest.approx(
        giga, abs=0.06
    )


def by_hand(state, images, depth, layer_scale):
    """The paper's forward pass in float64: patches, residual blocks, mean, norm, classifier."""
    w = {name: tensor.double() for name, tensor in state.items()}
    width = w["stem.0.weight"].shape[0]
    x = F.conv2d(
        images.double(), w["stem.0.weight"], w["stem.0.bias"], stride=w["stem.0.weight"].shape[-1]
    )
    for number in range(depth):
        at = f"stages.0.blocks.{number}."
        y = F.conv2d(
            x, w[at + "conv_dw.weight"], w[at + "conv_dw.bias"], padding=3, groups=width
        ).permute(0, 2, 3, 1)
        y = F.layer_norm(y, (width,), w[at + "norm.weight"], w[at + "norm.bias"], 1e-6)
        y = F.gelu(F.linear(y, w[at + "mlp.fc1.weight"], w[at + "mlp.fc1.bias"]))
        y = F.linear(y, w[at + "mlp.fc2.weight"], w[at + "mlp.fc2.bias"]).permute(0, 3, 1, 2)
        x = x + (y * w[at + "gamma"].reshape(-1, 1, 1) if layer_scale else y)
    x = F.layer_norm(x.mean((2, 3)), (width,), w["head.norm.weight"], w["head.norm.bias"], 1e-6)
    return F.linear(x, w["head.fc.weight"], w["head.fc.bias"])


@pytest.mark.parametrize("layer_scale", [None, 0.5])
def test_the_forward_pass_is_the_papers(layer_scale):
    model, _ = rebuilt("convnext_tiny", fields=SMALL | {"layer_scale": layer_scale})
    model = jittered(model).double().eval()
    expected = by_hand(model.state_dict(), images(), 3, layer_scale)
    torch.testing.assert_close(model(images().double()), expected, rtol=0, atol=1e-10)


def test_layer_scale_is_there_where_it_is_asked_for():
    plain, _ = rebuilt("convnext_tiny")
    scaled, _ = rebuilt("convnext_tiny", fields=SMALL | {"layer_scale": 1e-6})
    assert not [name for name, _ in plain.named_parameters() if name.endswith("gamma")]
    gammas = [weight for name, weight in scaled.named_parameters() if name.endswith("gamma")]
    assert len(gammas) == 3 and all(torch.equal(gamma, torch.full((16,), 1e-6)) for gamma in gammas)


@pytest.mark.parametrize("model", KINDS)
def test_blocks_and_head_are_of_the_models_own_kind(model):
    theirs = timm.create_model(model, num_classes=5)
    ours, replacement = rebuilt(model)
    kind = theirs.stages[0].blocks[0]
    assert [type(block) for block in ours.stages[0].blocks] == [type(kind)] * 3
    for block in ours.stages[0].blocks:
        found, wanted = (
            [type(layer) for layer in one.modules() if not isinstance(layer, nn.Identity)]
            for one in (block, kind)
        )
        assert found == wanted and block.norm.eps == kind.norm.eps
    assert [type(layer) for layer in ours.head.modules()] == [
        type(layer) for layer in theirs.head.modules()
    ]
    assert type(ours.norm_pre) is type(theirs.norm_pre) and replacement.before == (
        ("ConvNeXtBlock", len(blocks_of(theirs))),
    )
    assert list(replacement.places) == blocks(ours)[0] and stages(ours) == ["stages.0"]


def blocks_of(model):
    return [name for stage in blocks(model) for name in stage]


@pytest.mark.parametrize("model", KINDS)
def test_every_weight_is_trained_and_reads_back(model):
    ours, _ = rebuilt(model)
    jittered(ours)(images()).square().sum().backward()
    assert [
        name
        for name, weight in ours.named_parameters()
        if weight.grad is None or not weight.grad.any()
    ] == []
    other, _ = rebuilt(model, seed=1)
    other.load_state_dict(ours.state_dict())
    assert torch.equal(other.eval()(images()), copy.deepcopy(ours).eval()(images()))


def test_first_weights_are_timms_and_follow_the_seed():
    one, again, other = (rebuilt(seed=seed, fields=SMALL | {"width": 64})[0] for seed in (3, 3, 4))
    assert all(map(torch.equal, one.state_dict().values(), again.state_dict().values()))
    for name, weight in one.named_parameters():
        if weight.ndim > 1:
            assert (
                weight.std().item() == pytest.approx(0.02, rel=0.15) and weight.abs().max() < 2
            ), name
            assert not torch.equal(weight, other.get_parameter(name))
        else:
            assert torch.equal(
                weight, torch.full_like(weight, float(name.endswith("norm.weight")))
            ), name


def test_drop_path_grows_from_zero_to_the_models_rate():
    model, _ = rebuilt(drop_path_rate=0.3)
    assert [
        getattr(block.drop_path, "drop_prob", 0.0) for block in model.stages[0].blocks
    ] == pytest.approx([0, 0.15, 0.3])
    assert all(isinstance(block.drop_path, nn.Identity) for block in rebuilt()[0].stages[0].blocks)


def test_head_keeps_its_options_and_the_stem_its_channels():
    model, replacement = rebuilt(num_classes=7, in_chans=1, drop_rate=0.25)
    assert model(images(channels=1)).shape == (2, 7) and model.head.drop.p == 0.25
    assert model.num_features == model.head_hidden_size == model.get_classifier().in_features == 16
    assert model.forward_intermediates(images(channels=1))[1][0].shape == (2, 16, 4, 4)
    assert str(replacement) == (
        "isotropic: stages.0.blocks.0, stages.0.blocks.1 … stages.0.blocks.2: "
        "4 ConvNeXtBlock -> 3 ConvNeXtBlock "
        "(one stage of 16 channels, patches of 8 px)"
    )


def test_the_other_parts_find_theirs_in_it():
    model, _ = rebuilt("convnext_tiny", drop_path_rate=0.2)
    found = find_layers(model)
    names = [f"stages.0.blocks.{number}" for number in range(3)]
    assert [place.name for place in found.norms] == [f"{name}.norm" for name in names]
    assert found.vector_norms == ("head.norm",) and list(found.activations) == [
        f"{name}.mlp.act" for name in names
    ]
    assert [(place.name, place.is_depthwise) for place in found.convolutions] == [
        ("stem.0", False), *((f"{name}.conv_dw", True) for name in names),
    ]  # fmt: skip
    parts = (
        BatchNorm(name="batch_norm", **BatchNorm.example),
        Silu(name="silu"),
        StochasticDepth(over_depth="constant", per="batch"),
    )
    assert [len(part.apply(model, 64).places) for part in parts] == [3, 3, 3]
    jittered(model)(images()).sum().backward()
    assert all(weight.grad is not None for weight in model.stem.parameters())


@pytest.mark.parametrize("model", ["resnet18", "regnetx_002", "resnetv2_50"])
def test_other_models_are_refused_in_one_line(model):
    with torch.device("meta"):
        made = timm.create_model(model)
    with pytest.raises(ReplacementError) as refusal:
        IsotropicBody(**SMALL).apply(made, 64)
    kind = type(made).__name__
    assert str(refusal.value).startswith(f"model.isotropic: {kind} ") and "\n" not in str(
        refusal.value
    )
    assert "model=convnext_small" in str(refusal.value)


@pytest.mark.parametrize(
    ("lost", "remedy"),
    [("layer_scale=1e-6", "isotropic.layer_scale"), ("head_init_scale=0.5", "leave it out")],
)
def test_options_that_would_be_lost_are_refused(lost, remedy):
    written = "'model.isotropic={depth: 3, width: 16, patch_px: 8}'"
    with pytest.raises(
        UserError, match=rf"{lost.partition('=')[0]}.*lost under model\.isotropic.*{remedy}"
    ):
        small_plan("torchvision-v1", model="test_convnext2", overrides=f"{written} model.{lost}")


@pytest.mark.parametrize(("model", "drop_path", "depth", "width", "gamma"), [
    ("convnext_small", 0.1, 18, 384, None), ("convnext_base", 0.2, 18, 768, None),
    ("convnext_large", 0.5, 36, 1024, 1e-6),
])  # fmt: skip
def test_the_page_has_the_sources_three_sizes(model, drop_path, depth, width, gamma):
    plan = small_plan("convnext-isotropic", model=model)
    body = plan.recipe.model.isotropic
    assert (plan.recipe.drop_path, body.depth, body.width, body.patch_px, body.layer_scale) == (
        drop_path,
        depth,
        width,
        16,
        gamma,
    )


def test_the_page_builds_the_small_one():
    model, (replacement,) = assemble(small_plan("convnext-isotropic", model="convnext_small"))
    assert replacement.part == "isotropic" and len(replacement.places) == 18
    num_classes = model.num_classes
    assert num_parameters(model) == closed_form(18, 384, 16, classes=num_classes)[0]
