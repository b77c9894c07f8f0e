"""Any two parts of the model section go together, or one line says why they do not."""

import itertools
import shlex

import pytest
import torch

from support.parts import CASES, FAMILIES, IMAGE_PX, PAGE, case_name, plain_model, written
from trainer.base.errors import UserError
from trainer.models.build import assemble
from trainer.models.spec import PARTS
from trainer.runs.job import Job, plan_of

pytestmark = pytest.mark.drill  # minutes in all: `make drill`

KEYS = (*PARTS, "layer_scale")
BY_KEY = {key: [case for case in CASES if case[0] == key] for key in KEYS}
RESNET, CONVNEXT = FAMILIES
OWN_FAMILY = {
    "body": RESNET,
    "isotropic": CONVNEXT,
    "convolution": RESNET,
    "blur_pool": RESNET,
    "fusion": RESNET,
}

# What two parts may not go together for; anything else has to be looked at by a person.
REASONS = (
    "is not a timm ResNet", "has no stride;", "has no 3x3 convolution",
    "has no strided convolution", "has no convolution to standardize", "the model has 1 stages",
    "lost under model.isotropic", "already has this stem", "addition cannot be replaced",
    "are ReLU already",
)  # fmt: skip


def pairs():
    """Every two keys twice, each time with other parts of theirs and, where both families have
    both, on another family.
    """
    for number, (one, other) in enumerate(itertools.combinations(KEYS, 2)):
        for turn in range(2):
            first = BY_KEY[one][(number + turn) % len(BY_KEY[one])]
            second = BY_KEY[other][(number + turn) % len(BY_KEY[other])]
            family = OWN_FAMILY.get(one) or OWN_FAMILY.get(other) or FAMILIES[turn]
            yield pytest.param(
                first, second, family, id=f"{case_name(first)}-{case_name(second)}-{family}-{turn}"
            )


def plan_with_both(first, second, family):
    sizes = f"epochs=1 drop_path=0.05 image.train_px={IMAGE_PX} image.test_px={IMAGE_PX} "
    sizes += "batch.images=64 batch.norm_images=64"
    return plan_of(
        Job(
            PAGE,
            family,
            overrides=f"{sizes} {shlex.quote(written(first))} {shlex.quote(written(second))}",
        )
    )


@pytest.mark.parametrize(("first", "second", "family"), pairs())
def test_two_parts_go_together(first, second, family):
    keys = {first[0], second[0]}
    try:
        plan = plan_with_both(first, second, family)
        model, replacements = assemble(plan)
    except UserError as refusal:
        text = str(refusal)
        assert "\n" not in text and any(f"model.{key}" in text for key in keys), text
        assert any(reason in text for reason in REASONS), text
        return
    assert {replacement.part for replacement in replacements} in (
        keys,
        keys - {"layer_scale"},
    )  # which is an option of timm's ConvNeXt
    torch.manual_seed(0)
    logits = model(torch.randn(4, 3, IMAGE_PX, IMAGE_PX))
    logits.square().sum().backward()
    assert logits.shape == (4, 10) and logits.isfinite().all()
    gradients = [weight.grad for weight in model.parameters() if weight.grad is not None]
    assert gradients and all(gradient.isfinite().all() for gradient in gradients)
    assert model.state_dict().keys() != plain_model(family).state_dict().keys() or repr(
        model
    ) != repr(plain_model(family))
