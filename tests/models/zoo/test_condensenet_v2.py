"""CondenseNetV2: what it prunes and when, its form for use, resumed runs, the authors' weights."""

import math

import pytest
import timm
import torch
from torch import nn

from support.plans import small_plan
from trainer.base.settings import make_settings
from trainer.data.dataset import open_data
from trainer.engine.state import TrainingState
from trainer.engine.train import optimizer_step
from trainer.inference.classifier import Classifier, ImageFacts
from trainer.inference.export.compare import as_exported, drawn_batches
from trainer.inference.export.formats import FORMATS
from trainer.inference.export.write import export
from trainer.models.build import gmacs, num_parameters
from trainer.models.edit.hooks import ChangesInTraining, converted
from trainer.models.zoo.condensenet_v2 import (
    IndexedReactivation,
    LearnedGroups,
    Pruned,
    Reactivation,
    checkpoint_filter_fn,
)

# Weights as trained and in use, millions of operations in use: jianghaojun/CondenseNetV2, its code
# counted and its README.
SIZES = {
    "condensenetv2_a": (3_350_244, 2_038_444, 46),
    "condensenetv2_b": (6_311_412, 3_592_662, 146),
    "condensenetv2_c": (15_097_752, 6_177_512, 309),
}
TINY = {"depths": (1, 1, 2, 2), "growths": (4, 4, 8, 8), "groups": 4, "head_width": 12}


def tiny(**options):
    torch.manual_seed(0)
    return timm.create_model("condensenetv2_a", **TINY | options)


def set_progress(model, progress):
    for module in model.modules():
        if isinstance(module, ChangesInTraining):
            module.set_progress(progress)


def made(module, seed=0):
    """Float64 weights and statistics without a zero or one among them, in evaluation mode."""
    generator = torch.Generator().manual_seed(seed)
    module = module.double().eval()
    for tensor in [*module.parameters(), *module.buffers()]:
        if tensor.dtype == torch.float64:
            drawn = torch.randn(tensor.shape, generator=generator, dtype=torch.float64)
            tensor.data = drawn.abs() * 0.3 + 0.1 if tensor.ndim == 1 else drawn
    return module


def beside_multiply_adds(model):
    """What the authors count of one image beside them: a number of an activation, two of a sigmoid,
    those that a pooling reads.
    """
    counted = []
    costs = {
        nn.ReLU: 1, nn.Hardswish: 1, nn.Sigmoid: 2, nn.AvgPool2d: 1, nn.AdaptiveAvgPool2d: 1,
        timm.layers.SEModule: 1,
    }  # fmt: skip
    for module in model.modules():
        if cost := costs.get(type(module)):
            module.register_forward_hook(
                lambda _, given, __, cost=cost: counted.append(cost * given[0].numel())
            )
    with torch.no_grad():
        model(torch.zeros(1, 3, 224, 224))
    return sum(counted)


@pytest.mark.parametrize("name", SIZES)
def test_weights_and_operations_are_those_of_the_authors(name):
    trained, used, operations = SIZES[name]
    model = timm.create_model(name)
    assert num_parameters(model) == trained
    set_progress(model, 0.5)
    model = converted(model)
    assert num_parameters(model) == used
    total = 1e9 * gmacs(model, 3, 224) + beside_multiply_adds(model)
    assert total / 1e6 == pytest.approx(operations, rel=0.01)


@pytest.mark.parametrize("kind", [LearnedGroups, Reactivation])
def test_a_layer_is_a_convolution_of_what_its_groups_have_left(kind):
    layer = made(kind(8, 12, 4, is_hard_swish=True))
    layer.mask.copy_(torch.rand(layer.mask.shape, generator=torch.Generator().manual_seed(3)) < 0.5)
    x = torch.randn(1, 8, 1, 1, dtype=torch.float64)
    norm = layer.norm
    given = (x[0, :, 0, 0] - norm.running_mean) / (norm.running_var + norm.eps).sqrt()
    given = given * norm.weight + norm.bias
    given = given * (given + 3).clamp(0, 6) / 6
    for o in range(12):
        total = 0.0
        for j in range(8):
            is_left = layer.mask[o % 4, j] if kind is LearnedGroups else layer.mask[j % 4, o]
            total += (layer.conv.weight[o, j, 0, 0] * given[j]).item() * bool(is_left)
        assert layer(x)[0, o, 0, 0].item() == pytest.approx(total, abs=1e-12)


@pytest.mark.parametrize("kind", [LearnedGroups, Reactivation])
def test_each_group_loses_its_weakest_at_equal_times_of_the_first_half(kind):
    layer, groups, num_steps = made(kind(12, 12, 4, is_hard_swish=False)), 4, 200
    weight = layer.conv.weight[:, :, 0, 0]
    members = [range(g, 12, groups) for g in range(groups)]

    def strength(g, candidate):
        if kind is LearnedGroups:
            return sum(abs(weight[o, candidate].item()) for o in members[g])
        return sum(abs(weight[candidate, j].item()) for j in members[g])

    lost = [set() for _ in range(groups)]
    before = 0
    for step in range(num_steps):
        progress = step / num_steps
        layer.set_progress(progress)
        # the authors' words: the first stage whose end is not yet reached
        ends = [i for i in range(groups - 1) if progress * 2 < (i + 1) / (groups - 1)]
        stage = ends[0] if ends else groups - 1
        if stage > before:
            for g in range(groups):
                left = sorted(set(range(12)) - lost[g], key=lambda each: strength(g, each))
                lost[g] |= set(left[:3])
        before = stage
        found = [set((~row).nonzero()[:, 0].tolist()) for row in layer.mask]
        assert found == lost, step
        # training moves what is left, and decay what is not
        with torch.no_grad():
            layer.conv.weight.mul_(1 + 0.1 * math.sin(step)).add_(0.01 * math.cos(step))
    assert layer.is_pruned and [len(each) for each in lost] == [9] * groups


def test_a_run_of_few_steps_ends_pruned_all_the_same():
    model = tiny()
    for step in range(3):
        set_progress(model, step / 3)
    assert all(each.is_pruned for each in model.modules() if isinstance(each, Pruned))


@pytest.mark.parametrize("px", [32, 64])
def test_its_form_for_use_gives_the_same_answers(px):
    model = made(tiny(num_classes=5))
    set_progress(model, 0.6)
    images = torch.randn(2, 3, px, px, dtype=torch.float64)
    used = converted(model)
    with torch.no_grad():
        torch.testing.assert_close(used(images), model(images), rtol=1e-10, atol=1e-10)
    assert not any(isinstance(each, Pruned) for each in used.modules())
    assert any(isinstance(each, IndexedReactivation) for each in used.modules())
    assert any(isinstance(each, Pruned) for each in model.modules())  # still trains


def test_a_model_that_is_not_pruned_yet_stays_as_it_is():
    model = made(tiny())
    set_progress(model, 0.3)
    images = torch.randn(1, 3, 32, 32, dtype=torch.float64)
    with torch.no_grad():
        assert torch.equal(converted(model)(images), model(images))
    plain = timm.create_model("resnet18")
    assert converted(plain) is plain


def _plan():
    average = "'average={name: ema, decay: 0.9, every_steps: 1, is_scored: true}'"
    changes = f"drop_path=null repeats=null batch.images=8 batch.norm_images=8 {average}"
    return small_plan("A2", "condensenetv2_a", changes)


def test_a_resumed_run_prunes_to_the_same_bits_and_its_average_is_pruned_alike():
    plan, settings = _plan(), make_settings("cpu", workers="0")
    steps = [0, plan.num_steps // 3, plan.num_steps // 2]  # in stages 0, 4 and 7

    def run(state, steps):
        for step in steps:
            stream = open_data(plan.profile, None).train_stream(plan, settings, step)
            optimizer_step(state, stream, step)
        return state

    whole = run(TrainingState(plan, settings), steps)
    half = run(TrainingState(plan, settings), steps[:2])
    saved = {key: value for key, value in half.state_dict().items()}
    resumed = TrainingState(plan, settings)
    resumed.load_state_dict(saved)
    run(resumed, steps[2:])
    for which, model in whole.weights().items():
        other = resumed.weights()[which].state_dict()
        assert all(torch.equal(tensor, other[key]) for key, tensor in model.state_dict().items())
    averaged = {key: each for key, each in whole.average.state_dict().items() if "mask" in key}
    own = whole.model.state_dict()
    assert averaged and all(torch.equal(own[key], mask) for key, mask in averaged.items())
    assert all(each.is_pruned for each in whole.average.model.modules() if isinstance(each, Pruned))


def _theirs(model, form):
    """The state dict of a pruned model as the authors' code names and shapes it."""
    found = {"features.init_conv.weight": model.conv_stem.weight}

    def norm(name, module):
        found.update({f"{name}.{key}": each for key, each in module.state_dict().items()})

    def attention(name, module):
        found[f"{name}.fc.0.weight"] = module.fc1.weight[:, :, 0, 0]
        found[f"{name}.fc.2.weight"] = module.fc2.weight[:, :, 0, 0]

    for i, stage in enumerate(model.stages, 1):
        layers = [layer for layer in stage if not isinstance(layer, nn.AvgPool2d)]
        for j, layer in enumerate(layers, 1):
            place = f"features.denseblock_{i}.denselayer_{j}"
            form(found, f"{place}.conv_1", layer.conv1, norm)
            norm(f"{place}.conv_2.norm", layer.norm2)
            found[f"{place}.conv_2.conv.weight"] = layer.conv2.weight
            form(found, f"{place}.sfr", layer.reactivation, norm)
            if not isinstance(layer.se, nn.Identity):
                attention(f"{place}.se", layer.se)
    norm("features.norm_last", model.norm)
    attention("features.se_last", model.se)
    for name, module in (("fc", model.fc), ("classifier", model.head)):
        found |= {f"{name}.weight": module.weight, f"{name}.bias": module.bias}
    return {name: tensor.detach().clone() for name, tensor in found.items()}


def _as_trained(found, name, layer, norm):
    norm(f"{name}.norm", layer.norm)
    found[f"{name}.conv.weight"] = layer.conv.weight
    found[f"{name}._count"], found[f"{name}._stage"] = torch.zeros(1), torch.zeros(1)
    mask = torch.zeros_like(layer.conv.weight)
    for o in range(mask.shape[0]):
        for j in range(mask.shape[1]):
            is_left = (
                layer.mask[o % layer.groups, j]
                if isinstance(layer, LearnedGroups)
                else layer.mask[j % layer.groups, o]
            )
            mask[o, j] = float(is_left)
    found[f"{name}._mask"] = mask


def _as_used(found, name, layer, norm):
    """CondensingLGC and CondensingSFR of the authors, index by index."""
    weight, groups = layer.conv.weight[:, :, 0, 0], layer.groups
    after, before = weight.shape
    if isinstance(layer, LearnedGroups):
        index = torch.cat([row.nonzero()[:, 0] for row in layer.mask])
        each, outputs = before // groups, after // groups
        conv = torch.zeros(after, each, 1, 1)
        for place, j in enumerate(index.tolist()):
            g = place // each
            for k in range(outputs):
                conv[g * outputs + k, place % each] = weight[g + k * groups, j]
        for key, tensor in layer.norm.state_dict().items():
            found[f"{name}.norm.{key}"] = tensor[index] if tensor.ndim else tensor
        found[f"{name}.index"] = index
    else:
        norm(f"{name}.norm", layer.norm)
        conv = torch.zeros(after, before // groups, 1, 1)
        matrix, counts = torch.zeros(after, after), [0] * groups
        for i in range(after):
            for g in range(groups):
                if layer.mask[g, i]:
                    place = counts[g] + g * (after // groups)
                    for k in range(before // groups):
                        conv[place, k] = weight[i, g + k * groups]
                    matrix[place, i] = 1.0
                    counts[g] += 1
        found[f"{name}.index"] = matrix
    found[f"{name}.conv.weight"] = conv


@pytest.mark.parametrize("form", [_as_trained, _as_used])
def test_the_authors_weights_load_in_both_of_their_forms(form):
    model = made(tiny()).float()
    set_progress(model, 0.5)
    other = timm.create_model("condensenetv2_a", **TINY).eval()
    names = set(other.state_dict())
    found = checkpoint_filter_fn(_theirs(model, form), other)
    assert set(found) == names
    other.load_state_dict(found)
    images = torch.randn(2, 3, 32, 32)
    with torch.no_grad():
        torch.testing.assert_close(other(images), model(images), rtol=1e-4, atol=1e-4)
    assert all(each.is_pruned for each in other.modules() if isinstance(each, Pruned))


def test_its_own_weights_are_left_as_they_are():
    model = tiny()
    own = model.state_dict()
    assert checkpoint_filter_fn(own, model) is own


@pytest.mark.parametrize("to", FORMATS)
def test_what_is_exported_is_its_form_for_use_and_answers_alike(to, tmp_path):
    model = made(tiny(num_classes=5)).float()
    set_progress(model, 0.5)
    facts = ImageFacts(3, 32, 0.875, "bicubic", (0.5, 0.4, 0.3), (0.2, 0.3, 0.25))
    classifier = Classifier("tiny", model, facts, tuple("abcde"), "0" * 64)
    assert not any(isinstance(each, Pruned) for each in as_exported(classifier).modules())
    cpu = make_settings("cpu", "float32", workers="0")
    found, _ = export(classifier, FORMATS[to], tmp_path / "out", lambda: drawn_batches(facts), cpu)
    assert found.is_good and found.num_images == 9
    assert any(isinstance(each, Pruned) for each in model.modules())
