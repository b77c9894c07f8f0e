"""Every part of the model section, found by walking the section: what is new there is tested
without a new test.

And every layer of our own, found by walking the files of layers, against numerical gradients.
"""

import copy
import importlib
import inspect
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from torch import nn

from support.parts import (
    CASES,
    FAMILIES,
    IMAGE_PX,
    PAGE,
    case_name,
    plain_model,
    public_kinds,
    written,
)
from support.plans import small_plan
from trainer.models.build import assemble
from trainer.models.edit.replacement import Part, ReplacementError, counted
from trainer.models.parts import bodies, fusion
from trainer.models.spec import PARTS, Model
from trainer.recipe import check
from trainer.recipe.tree import plain
from trainer.runs.export import export_model, is_timms
from trainer.runs.job import Job
from trainer.runs.plan_file import write_plan
from trainer.runs.run_folder import open_model


def test_the_walk_finds_every_part_that_there_is():
    assert {kind for _, kind in CASES} == set(public_kinds())
    keys = {
        key
        for key, field in Model.model_fields.items()
        if any(issubclass(one, Part) for one in check.kinds_in(field.annotation))
    }
    assert keys == set(PARTS), "a part that is never put in"


def plan_with(case, family):
    sizes = f"drop_path=0.05 image.train_px={IMAGE_PX} image.test_px={IMAGE_PX} "
    sizes += "batch.images=64 batch.norm_images=64"
    text = f"{sizes} '{written(case)}'"
    if "split_batch_norm" in text:
        text += (
            " augment_splits=2 'augment=[{name: random_resized_crop, area: [0.08, 1.0], aspect: [0.75, 1.3333333333333333], interpolation: bilinear}, {name: grayscale, share: 0.2}]'"
            " 'loss={name: jensen_shannon, weight: 12, loss: {name: ce}}'"
        )
    return small_plan(PAGE, model=family, overrides=text), text


def jittered(model: nn.Module) -> None:
    """Random weights of the same mean and width, away from ones, zeros and other special starts."""
    with torch.no_grad():
        for weight in model.parameters():
            is_random = weight.numel() > 1 and weight.std() > 0
            drawn = torch.randn_like(weight)
            weight.copy_(
                weight.mean() + weight.std() * drawn if is_random else weight + 0.1 * drawn
            )


def images(seed: int = 0) -> torch.Tensor:
    return torch.randn(4, 3, IMAGE_PX, IMAGE_PX, generator=torch.Generator().manual_seed(seed))


def outputs(model: nn.Module, seed: int) -> torch.Tensor:
    torch.manual_seed(seed)
    return model(images(seed))


def check_swap(replacement, key: str, model: nn.Module, plain_model: nn.Module) -> None:
    """Its places are there, each once, and what it says that it found is what stands there in
    timm's own model.
    """
    assert replacement.part == key and replacement.after and "\n" not in str(replacement)
    assert replacement.places and len(set(replacement.places)) == len(replacement.places)
    for place in replacement.places:
        model.get_submodule(place)
    there = dict(counted(plain_model.modules()))
    assert all(0 < count <= there[kind] for kind, count in replacement.before), str(replacement)
    if key in ("norm", "activation", "weight_standardization"):
        assert replacement.before == counted(map(plain_model.get_submodule, replacement.places))
        changed = counted(map(model.get_submodule, replacement.places))
        assert changed != replacement.before or replacement.after.startswith(
            changed[0][0]
        )  # a batch norm of other numbers


def check_equal(model: nn.Module, other: nn.Module) -> None:
    ours, others = model.state_dict(), other.state_dict()
    assert ours.keys() == others.keys()
    assert all(torch.equal(tensor, others[name]) for name, tensor in ours.items())


def check_gradients(model: nn.Module) -> None:
    """Every weight is reached in one of a few passes: in another it may be left out at random, or
    its ReLU be shut.
    """
    missed = dict(model.named_parameters())
    first = copy.deepcopy(model.state_dict())
    for seed in range(40):
        model.load_state_dict(
            first
        )  # widths estimated from widths estimated before would shrink to nothing
        jittered(model)
        made = outputs(model, seed)
        assert made.shape == (4, 10) and made.isfinite().all()
        (
            made * torch.randn(made.shape, generator=torch.Generator().manual_seed(seed))
        ).sum().backward()
        assert all(weight.grad is not None or seed < 39 for weight in missed.values())
        missed = {
            name: weight
            for name, weight in missed.items()
            if weight.grad is None or not weight.grad.any()
        }
        missed = {name: weight for name, weight in missed.items() if not is_taken_away(model, name)}
        if not missed:
            return
    raise AssertionError(sorted(missed))


def is_taken_away(model: nn.Module, name: str) -> bool:
    """Is it a bias of a convolution straight before a batch normalization, which takes it away:
    gradient zero?
    """
    parent, _, word = name.rpartition(".")
    chain, _, number = parent.rpartition(".")
    if word != "bias" or not number.isdigit():
        return False
    layers = model.get_submodule(chain)
    after = layers[int(number) + 1] if int(number) + 1 < len(layers) else None
    return isinstance(layers[int(number)], nn.Conv2d) and isinstance(after, nn.BatchNorm2d)


def check_export(model: nn.Module, plan, text: str, folder: Path) -> None:
    """What a run would leave opens as the same function."""
    assert not is_timms(plan) or plan.recipe.model.layer_scale
    write_plan(folder, Job(PAGE, plan.model, overrides=text), plan)
    state = SimpleNamespace(weights=lambda: {"model": model}, scored="model")
    export_model(folder, plan, state, tuple("0123456789"))
    opened = open_model(folder)
    check_equal(model, opened)
    with torch.no_grad():
        assert torch.equal(model.eval()(images(3)), opened(images(3)))


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("case", CASES, ids=case_name)
def test_a_part_works_on_both_families(case, family, tmp_path):
    """Or is refused on one of them, in one line that names the place and what the model has."""
    key, _ = case
    plan, text = plan_with(case, family)
    try:
        model, replacements = assemble(plan)
    except ReplacementError as error:
        other = next(one for one in FAMILIES if one != family)
        assert str(error).startswith(f"model.{key}: ") and "\n" not in str(error)
        assemble(plan_with(case, other)[0])
        return
    if not is_timms(plan):
        (replacement,) = replacements
        check_swap(replacement, key, model, plain_model(family))
    again, same = assemble(plan)
    assert same == replacements
    check_equal(model, again)
    assert torch.equal(outputs(model, 5), outputs(again, 5))
    check_gradients(model)
    check_export(model, plan, text, tmp_path)


@pytest.mark.parametrize("case", CASES, ids=case_name)
def test_a_part_says_what_it_is_and_where_it_comes_from(case):
    _, kind = case
    text = inspect.getdoc(kind) if "__doc__" in vars(kind) else None
    assert text and ("Source" in text or check.tag_of(kind) == "auto"), (
        kind.__name__
    )  # `auto` is our own choice
    check.check(kind, plain(kind.example))
    # a required number has no default: what is in no page is no number
    fields = {
        name for name, field in kind.model_fields.items() if name != "name" and field.is_required()
    }
    assert fields <= set(kind.example)


# ---- layers of our own

LAYER_MODULES = [
    "trainer.models.edit.layer_kinds",
    *(
        f"trainer.models.parts.{path.stem}"
        for path in Path(bodies.__file__).parent.glob("[!_]*.py")
    ),
]


def layers_in(name: str) -> list[type[nn.Module]]:
    module = importlib.import_module(name)
    return [
        found
        for found in vars(module).values()
        if isinstance(found, type)
        and issubclass(found, nn.Module)
        and found.__module__ == module.__name__
        and not inspect.isabstract(found)
    ]


OURS = [layer for name in sorted(LAYER_MODULES) for layer in layers_in(name)]
FEATURES = (4, 4, 2, 3)
FORM = bodies.BlockForm("bottleneck", 3, "all", "all", nn.BatchNorm2d, nn.SiLU, True)


class Joined(nn.Module):
    """A fusion of features with a multiple of themselves."""

    def __init__(self, fusion):
        super().__init__()
        self.fusion = fusion

    def forward(self, x):
        return self.fusion(x, 3 * x)


def fused(block):
    block.fusion = fusion.AttentionalFusion(4, 1, is_iterative=True)
    return block


# How to make one of each, and the shape that it is given.
LAYERS = {
    "LearnedSwish": (lambda kind: kind(1.3), FEATURES),
    "Gate": (lambda kind: kind(2, 1), (2, 2, 2, 2)),
    "AttentionalFusion": (lambda kind: Joined(kind(2, 1, is_iterative=True)), (2, 2, 2, 2)),
    "FusedBasicBlock": (lambda kind: fused(kind(4, 4)), (2, 4, 2, 2)),
    "FusedBottleneck": (lambda kind: fused(kind(4, 1)), (2, 4, 2, 2)),
    "BottleneckAttention": (lambda kind: kind(2, 1, 1, 1), (2, 2, 3, 3)),
    "StagedBlock": (lambda kind: kind(FORM, 2, 1, 1, 0.0), (2, 2, 3, 3)),
    "Stage": (lambda kind: kind(nn.Conv2d(4, 2, 1)), FEATURES),
    "NormedPool": (lambda kind: kind("avg", 4), FEATURES),
    "BatchDropPath": (lambda kind: kind(0.5), FEATURES),
    "BlockDropout": (lambda kind: kind(0.2, 2), FEATURES),
    "ChannelsLast": (lambda kind: kind(nn.GroupNorm(1, 3)), FEATURES),
    "GhostBatchNorm2d": (lambda kind: kind(4, 2, 1e-5, 0.1), FEATURES),
    "SplitBatchNorm2d": (lambda kind: kind(4, 2, 1e-5, 0.1), FEATURES),
    "EstimatedBatchNorm2d": (lambda kind: kind(4, 1e-5, 0.1), FEATURES),
    "BatchChannelNorm2d": (lambda kind: kind(4, 2, 1e-5, 0.1, "batch"), FEATURES),
    "_GroupNorm": (lambda kind: kind(2, 4), FEATURES),  # on a CPU in float64: the reference's pass
    "_BatchChannelNorm2d": (lambda kind: kind(4, 2, 1e-5, 0.1, "batch"), FEATURES),
    "StandardizedConv2d": (
        lambda kind: kind(4, 2, 2, is_unbiased=True, eps=1e-5, is_inside=False),
        FEATURES,
    ),
    "DeformableConv2d": (lambda kind: kind(1, 2, 3, padding=1), (1, 1, 3, 3)),
    "SelfCalibratedConv2d": (lambda kind: kind(2, 2, 1, 1, 1, 2), (2, 2, 4, 4)),
    "Blur": (lambda kind: kind(3, 2, "reflect"), FEATURES),
    "BlurConv2d": (
        lambda kind: kind(nn.Conv2d(4, 2, 3, stride=2, padding=1), 3, "reflect", True),
        FEATURES,
    ),
    "SamePadded": (lambda kind: kind(nn.Conv2d(4, 2, 3, stride=2, padding=1)), FEATURES),
    "ScaledStandardizedConv2d": (lambda kind: kind(4, 2, 2, gamma=1.7, eps=1e-6), FEATURES),
}


def test_every_layer_of_ours_has_its_gradient_checked():
    assert {layer.__name__ for layer in OURS} == set(LAYERS)


@pytest.mark.parametrize("kind", OURS, ids=lambda kind: kind.__name__)
def test_the_gradient_of_a_layer_is_its_numerical_one(kind):
    make, shape = LAYERS[kind.__name__]
    torch.manual_seed(0)
    layer = make(kind).double()
    jittered(layer)
    names = [name for name, _ in layer.named_parameters()]

    def called(given, *weights):
        torch.manual_seed(1)  # what is drawn is the same in every call
        return torch.func.functional_call(layer, dict(zip(names, weights, strict=True)), given)

    given = torch.randn(shape, dtype=torch.float64, requires_grad=True)
    weights = [weight.detach().clone().requires_grad_() for weight in layer.parameters()]
    assert torch.autograd.gradcheck(called, (given, *weights))


# ---- the section


def test_parts_come_in_their_order_and_an_empty_section_is_timms():
    assert Model().is_plain and not list(Model().parts())
    given = {"norm": {"name": "no_norm"}, "stem": {"name": "cifar"}, "dropout": 0.1}
    section = check.check(Model, given)
    assert [key for key, _ in section.parts()] == ["stem", "norm"] and not section.is_plain


def test_several_parts_are_put_in_together():
    parts = (
        "model.stem={name: cifar} model.norm={name: group_norm, groups: 32, eps: 1e-5} "
        "model.activation={name: silu} "
        "'model.attention={name: squeeze_excite, position: after_last_norm, reduction: 16}' "
        "'model.weight_standardization={name: weight_standardization, of: followed_by_norm, "
        "depthwise: false, "
        "variance: unbiased, eps: 1e-5, eps_place: outside}'"
    )
    quoted = (
        parts.replace("model.stem={name: cifar}", "'model.stem={name: cifar}'")
        .replace(
            "model.norm={name: group_norm, groups: 32, eps: 1e-5}",
            "'model.norm={name: group_norm, groups: 32, eps: 1e-5}'",
        )
        .replace("model.activation={name: silu}", "'model.activation={name: silu}'")
    )
    plan = small_plan("A2", model="bottlenecks", overrides=quoted)
    model, replacements = assemble(plan)
    assert [replacement.part for replacement in replacements] == [
        "stem",
        "attention",
        "norm",
        "activation",
        "weight_standardization",
    ]
    check_gradients(model)
