"""First weights: other distributions than timm's, and the weights of files."""

import hashlib
import math

import pytest
import safetensors.torch
import timm
import torch
from pydantic import ValidationError
from scipy.stats import kstest
from timm.models import adapt_input_conv
from torch import nn

from support.plans import small_plan
from trainer.models.build import assemble
from trainer.models.edit.replacement import ReplacementError
from trainer.models.initialization import (
    WeightsError,
    adapt_input_channels,
    apply_start,
    initialize_weights,
    is_head_loaded,
    load_pretrained,
)
from trainer.models.spec import Model, Pretrained, Start


def make(name="resnet18", seed=0, **options):
    """A timm model with random weights, drawn from a seed of its own."""
    torch.manual_seed(seed)
    return timm.create_model(name, **({"num_classes": 10} | options))


def stored(path, tensors):
    """What a page would say of these tensors, written to a file."""
    path.write_bytes(safetensors.torch.save(tensors))
    return Pretrained(file=str(path), sha256=hashlib.sha256(path.read_bytes()).hexdigest())


def same(model, tensors, but=()):
    """Are these the model's weights, all but some?"""
    own = model.state_dict()
    assert own.keys() == tensors.keys()
    return {key for key in own if not torch.equal(own[key], tensors[key])} == set(but)


@pytest.mark.parametrize("mode", ["fan_in", "fan_out"])
@pytest.mark.parametrize("name", ["resnet18", "convnext_atto"])
def test_convolutions_are_drawn_from_kaimings_normal(name, mode):
    model = make(name)
    linear = {key: value.clone() for key, value in model.state_dict().items() if value.ndim == 2}
    (replacement,) = apply_start(model, Start(convolutions=f"kaiming_{mode}"))
    drawn = [model.get_submodule(place) for place in replacement.places]
    assert drawn == [module for module in model.modules() if isinstance(module, nn.Conv2d)]
    assert replacement.before == (("Conv2d", len(drawn)),)
    scaled = []
    for module in drawn:
        out, per_group, *kernel = module.weight.shape
        fan = (per_group if mode == "fan_in" else out) * math.prod(kernel)
        scaled.append((module.weight.detach() * math.sqrt(fan / 2)).flatten())
    assert kstest(torch.cat(scaled)[::37].numpy(), "norm").pvalue > 1e-3
    assert all(torch.equal(model.state_dict()[key], value) for key, value in linear.items())


@pytest.mark.parametrize("name", ["resnet18", "resnetv2_50", "convnext_atto", "seresnet50"])
def test_a_truncated_normal_is_convnexts_for_every_matrix(name):
    model = make(name)
    nn.init.ones_(model.get_classifier().bias)
    rest = {key: value.clone() for key, value in model.state_dict().items() if value.ndim < 2}
    (replacement,) = apply_start(model, Start(convolutions="truncated_normal"))
    drawn = [model.get_submodule(place) for place in replacement.places]
    assert drawn == [
        module for module in model.modules() if isinstance(module, nn.Conv2d | nn.Linear)
    ]
    weights = torch.cat([module.weight.detach().flatten() for module in drawn])
    assert kstest(weights[::101].numpy() / 0.02, "norm").pvalue > 1e-3
    # the sample's deviation is within five of its own standard errors
    assert weights.double().std().item() == pytest.approx(
        0.02, abs=5 * 0.02 / math.sqrt(2 * len(weights))
    )
    biases = {f"{place}.bias" for place in replacement.places}
    for key, value in model.state_dict().items():
        if key in rest:
            assert torch.equal(value, torch.zeros_like(value) if key in biases else rest[key])
    assert model.get_classifier().bias.tolist() == [0] * 10


def test_timm_draws_its_convnexts_from_the_same_truncated_normal():
    """Another draw of the same distribution, as two samples of it are alike."""
    theirs, ours = make("convnext_atto", seed=1), make("convnext_atto", seed=2)
    apply_start(ours, Start(convolutions="truncated_normal"))
    pairs = zip(theirs.named_parameters(), ours.parameters(), strict=True)
    for (key, a), b in pairs:
        assert (
            a.std().item() == pytest.approx(b.std().item(), rel=0.2)
            if a.ndim > 1
            else torch.equal(a, b)
        ), key


def test_what_starts_at_zero_stays_there_under_a_truncated_normal_too():
    model = make(seed=1)
    model.layer1[0].conv1.weight.data.zero_()
    (replacement,) = apply_start(model, Start(convolutions="truncated_normal"))
    assert not model.layer1[0].conv1.weight.any() and "1 zero-initialized" in str(replacement)
    assert "layer1.0.conv1" not in replacement.places


@pytest.mark.parametrize("std", [0.0, 0.01, 3.0])
@pytest.mark.parametrize("name", ["resnet18", "resnetv2_50", "convnext_atto"])
def test_the_classifiers_weight_has_the_deviation_of_the_page(name, std):
    model = make(name, num_classes=100)
    before = {key: value.clone() for key, value in model.state_dict().items()}
    (replacement,) = apply_start(model, Start(head_std=std))
    key = f"{replacement.places[0]}.weight"
    weight = model.state_dict()[key].flatten()
    assert same(model, before, but={key})
    assert not weight.any() if std == 0 else kstest(weight.numpy() / std, "norm").pvalue > 1e-3


def test_the_classifiers_own_keys_have_the_last_word():
    model = make()
    replacements = apply_start(
        model, Start(head_bias=-2.0, head_std=0.0, convolutions="truncated_normal")
    )
    assert [replacement.part for replacement in replacements] == [
        "start.convolutions",
        "start.head_std",
        "start.head_bias",
    ]
    assert not model.fc.weight.any() and model.fc.bias.tolist() == [-2.0] * 10
    assert model.conv1.weight.std().item() == pytest.approx(0.02, rel=0.05)


def test_a_convolution_that_starts_at_zero_and_a_classifier_are_no_such_convolutions():
    model = make("resnetv2_50", seed=1)
    model.stages[0].blocks[0].conv1.weight.data.zero_()
    head = model.head.fc.weight.clone()
    (replacement,) = apply_start(model, Start(convolutions="kaiming_fan_in"))
    assert isinstance(model.head.fc, nn.Conv2d) and torch.equal(head, model.head.fc.weight)
    assert not model.stages[0].blocks[0].conv1.weight.any() and "1 zero-initialized" in str(
        replacement
    )


@pytest.mark.parametrize("name", ["resnet18", "resnetv2_50", "convnext_atto"])
def test_every_gamma_is_drawn_from_0_to_1(name):
    model = make(name)
    (replacement,) = apply_start(model, Start(norm_gamma="uniform"))
    # each vector of a norm is a weight or a bias; of these models' other vectors none is called
    # weight
    gammas = [
        value
        for key, value in model.named_parameters()
        if key.endswith("weight") and value.ndim == 1
    ]
    assert len(replacement.places) == len(gammas) == sum(count for _, count in replacement.before)
    assert kstest(torch.cat(gammas).detach().numpy(), "uniform").pvalue > 1e-3


@pytest.mark.parametrize("name", ["resnet18", "resnetv2_50", "convnext_atto"])
def test_the_classifiers_bias_is_what_the_page_says(name):
    model = make(name)
    before = {key: value.clone() for key, value in model.state_dict().items()}
    (replacement,) = apply_start(model, Start(head_bias=-math.log(1000)))
    bias = f"{replacement.places[0]}.bias"
    assert same(model, before, but={bias})
    assert model.state_dict()[bias].tolist() == pytest.approx([-6.907755] * 10)


def test_what_finds_nothing_is_refused():
    mlp = make("mixer_s32_224")
    for module in list(mlp.modules()):
        if isinstance(module, nn.LayerNorm):
            module.weight = None
    mlp.stem.proj.weight.data.zero_()
    mlp.head = nn.Identity()
    for start, message in (
        (
            {"convolutions": "kaiming_fan_in"},
            "model.start.convolutions: MlpMixer has no convolution",
        ),
        ({"head_std": 0.1}, "model.start.head_std: the classifier of MlpMixer has no weight"),
        ({"norm_gamma": "uniform"}, "model.start.norm_gamma: MlpMixer has no norm with a gamma"),
        ({"head_bias": 1.0}, "model.start.head_bias: the classifier of MlpMixer has no bias"),
        ({}, "model.start: .*; valid: convolutions"),
    ):
        with pytest.raises(ReplacementError, match=message):
            apply_start(mlp, Start(**start))


@pytest.mark.parametrize("folder", [False, True])
def test_a_files_weights_are_taken_as_they_are(tmp_path, folder):
    source, model = make(seed=1), make(seed=2)
    pretrained = stored(tmp_path / "model.safetensors", source.state_dict())
    if folder:
        pretrained = pretrained.model_copy(update={"file": str(tmp_path)})
    replacement = load_pretrained(model, pretrained, 10)
    assert same(model, source.state_dict()) and not replacement.note
    assert is_head_loaded(model, [replacement])
    assert replacement.places == tuple(source.state_dict()) and "model.safetensors" in str(
        replacement
    )


@pytest.mark.parametrize("name", ["resnet18", "resnetv2_50", "convnext_atto"])
def test_a_classifier_of_other_classes_is_left_random_and_that_is_said(tmp_path, name):
    source, model = make(name, seed=1, num_classes=12), make(name, seed=2)
    head = {
        key: value.clone()
        for key, value in model.state_dict().items()
        if key.split(".")[-2] == "fc"
    }
    loaded = load_pretrained(model, stored(tmp_path / "a.safetensors", source.state_dict()), 10)
    note = loaded.note
    assert not is_head_loaded(model, [loaded])
    assert len(head) == 2 and same(model, source.state_dict() | head)
    assert all(key in note for key in head) and "[12" in note and "10 classes here" in note


def test_a_file_without_a_classifier_leaves_it_random(tmp_path):
    source, model = make(seed=1, num_classes=0), make(seed=2)
    head = {
        key: value.clone() for key, value in model.state_dict().items() if key.startswith("fc.")
    }
    replacement = load_pretrained(
        model, stored(tmp_path / "a.safetensors", source.state_dict()), 10
    )
    assert (
        same(model, source.state_dict() | head)
        and "fc.bias, fc.weight: not in the file" in replacement.note
    )


@pytest.mark.parametrize(
    ("before", "now"), [(3, 1), (3, 2), (3, 4), (3, 6), (3, 7), (4, 1), (1, 5), (5, 3)]
)
def test_a_first_convolution_is_fitted_as_timm_does_it(before, now):
    weight = torch.randn(8, before, 3, 3, generator=torch.Generator().manual_seed(0))
    found = adapt_input_channels(weight, now)
    torch.testing.assert_close(found, adapt_input_conv(now, weight, before), rtol=0, atol=1e-6)
    # an image of equal channels gives the same wherever each channel was repeated equally often
    if now == 1 or now % before == 0:
        torch.testing.assert_close(found.sum(1), weight.sum(1), rtol=0, atol=1e-5)


@pytest.mark.parametrize("channels", [1, 4])
@pytest.mark.parametrize("name", ["resnet18", "resnet18d", "convnext_atto"])
def test_weights_of_colour_images_serve_other_channels(tmp_path, name, channels):
    source, model = make(name, seed=1), make(name, seed=2, in_chans=channels)
    replacement = load_pretrained(
        model, stored(tmp_path / "a.safetensors", source.state_dict()), 10
    )
    first = (
        next(key for key, module in model.named_modules() if isinstance(module, nn.Conv2d))
        + ".weight"
    )
    fitted = adapt_input_conv(channels, source.state_dict()[first])
    torch.testing.assert_close(model.state_dict()[first], fitted, rtol=0, atol=1e-6)
    assert {
        key
        for key, value in source.state_dict().items()
        if not torch.equal(value, model.state_dict()[key])
    } == {first}
    assert (
        f"{first}: 3 input channels " + ("summed" if channels == 1 else "adapted to 4")
        in replacement.note
    )
    if channels == 1:
        image = torch.randn(2, 1, 64, 64, generator=torch.Generator().manual_seed(0))
        found, expected = model.eval()(image), source.eval()(image.expand(-1, 3, -1, -1))
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)


def test_another_digest_is_refused_with_the_one_that_is_there(tmp_path):
    model = make()
    right = stored(tmp_path / "a.safetensors", model.state_dict())
    with pytest.raises(WeightsError) as refused:
        load_pretrained(model, right.model_copy(update={"sha256": "0" * 64}), 10)
    text = str(refused.value)
    assert (
        text.startswith("model.pretrained.sha256: ")
        and right.sha256 in text
        and "0" * 64 in text
        and "\n" not in text
    )


def test_other_models_weights_are_refused_naming_the_first(tmp_path):
    model, before = make(), {key: value.clone() for key, value in make().state_dict().items()}
    wide = {
        key: value[:32] if key.startswith("layer1.0.conv") else value
        for key, value in before.items()
    }
    for other, parts in (
        (
            make("resnet18d").state_dict(),
            ("missing conv1.weight", "unexpected conv1.0.weight, ", " more; "),
        ),
        (
            wide,
            ("layer1.0.conv1.weight [32, 64, 3, 3] for [64, 64, 3, 3], layer1.0.conv2.weight ",),
        ),
    ):
        with pytest.raises(WeightsError) as refused:
            load_pretrained(model, stored(tmp_path / "a.safetensors", other), 10)
        text = str(refused.value)
        assert all(part in text for part in parts) and "\n" not in text and len(text) < 700
    assert same(model, before)


def test_a_first_convolution_of_another_kernel_is_refused(tmp_path):
    source, model = make().state_dict(), make(in_chans=1)
    source["conv1.weight"] = torch.zeros(64, 3, 3, 3)
    with pytest.raises(
        WeightsError, match=r"has other shapes conv1.weight \[64, 3, 3, 3\] for \[64, 1, 7, 7\]"
    ):
        load_pretrained(model, stored(tmp_path / "a.safetensors", source), 10)


def test_the_count_of_steps_may_be_missing(tmp_path):
    source, model = make(seed=1), make(seed=2)
    tensors = {
        key: value
        for key, value in source.state_dict().items()
        if not key.endswith("num_batches_tracked")
    }
    load_pretrained(model, stored(tmp_path / "a.safetensors", tensors), 10)
    assert same(model, source.state_dict())


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (None, "cannot be read .No such file"),
        (b"", "not safetensors"),
        (b"\x80\x04pickle", "not safetensors"),
    ],
)
def test_what_is_no_file_of_weights_is_refused_in_one_line(tmp_path, content, message):
    path = tmp_path / "a.safetensors"
    if content is not None:
        path.write_bytes(content)
    page = Pretrained(file=str(path), sha256=hashlib.sha256(content or b"").hexdigest())
    with pytest.raises(WeightsError, match=f"model.pretrained.file: {path}: {message}") as refused:
        load_pretrained(make(), page, 10)
    assert "\n" not in str(refused.value)


@pytest.mark.parametrize(
    ("section", "message"),
    [
        (
            Model(start=Start(norm_gamma="uniform"), zero_init_last=True),
            "model.start.norm_gamma: .*model.zero_init_last",
        ),
        (
            Model(start=Start(convolutions="truncated_normal"), head_init_scale=0.5),
            "model.start.convolutions: .*head_init_scale",
        ),
        (
            Model(start=Start(head_std=0.0), head_init_scale=0.5),
            "model.start.head_std: .*model.head_init_scale",
        ),
        (
            Model(
                start=Start(norm_gamma="uniform"), pretrained=Pretrained(file="a", sha256="0" * 64)
            ),
            "model.start.norm_gamma: ",
        ),
        (
            Model(
                start=Start(convolutions="kaiming_fan_in"),
                pretrained=Pretrained(file="a", sha256="0" * 64),
            ),
            "model.start.conv",
        ),
    ],
)
def test_keys_that_undo_one_another_are_refused(section, message):
    with pytest.raises(ReplacementError, match=message):
        initialize_weights(make(), section, 10)


def test_a_deviation_serves_a_classifier_that_no_file_brings_and_no_other(tmp_path):
    page = stored(tmp_path / "a.safetensors", make(seed=1, num_classes=12).state_dict())
    section, model = Model(start=Start(head_std=0.0), pretrained=page), make()
    initialize_weights(model, section, 10)
    assert not model.fc.weight.any()
    with pytest.raises(
        ReplacementError,
        match=r"model.start.head_std: .*model.pretrained",
    ):
        initialize_weights(make(num_classes=12), section, 12)


@pytest.mark.parametrize("std", [-0.1, float("nan"), float("inf")])
def test_what_is_no_deviation_is_refused(std):
    with pytest.raises(ValidationError):
        Start(head_std=std)


def test_a_page_gives_its_model_these_weights_and_the_same_ones_for_the_same_seed(tmp_path):
    source = make("test_resnet", seed=1, num_classes=1000)
    page = stored(tmp_path / "a.safetensors", source.state_dict())
    written = (
        f"model.pretrained.file={page.file} model.pretrained.sha256={page.sha256} "
        "model.start.head_bias=-2.0"
    )
    model, replacements = assemble(small_plan(overrides=written, data="digits-grey"))
    assert [replacement.part for replacement in replacements] == ["pretrained", "start.head_bias"]
    assert torch.equal(model.layer2[0].conv1.weight, source.layer2[0].conv1.weight)
    assert (
        model.state_dict()[
            "conv1.0.weight" if isinstance(model.conv1, nn.Sequential) else "conv1.weight"
        ].shape[1]
        == 1
    )
    assert model.get_classifier().bias.tolist() == [-2.0] * 10
    drawn = (
        "model.zero_init_last=null model.start.norm_gamma=uniform "
        "model.start.convolutions=kaiming_fan_in"
    )
    twice = [assemble(small_plan(overrides=drawn, seed=3))[0].state_dict() for _ in range(2)]
    assert all(torch.equal(twice[0][key], twice[1][key]) for key in twice[0])
    narrow = "model.start.convolutions=truncated_normal model.start.head_std=0.01"
    again = [assemble(small_plan(overrides=narrow, seed=3))[0].state_dict() for _ in range(2)]
    assert all(torch.equal(again[0][key], again[1][key]) for key in again[0])
    other = assemble(small_plan(overrides=drawn, seed=4))[0]
    assert not torch.equal(
        other.state_dict()["layer1.0.conv1.weight"], twice[0]["layer1.0.conv1.weight"]
    )
