"""Hard and soft distillation beside their formulas, written out in float64."""

import math
from types import SimpleNamespace

import pytest
import torch
from torch.nn import functional

from trainer.base.errors import ConfigError, PlanError
from trainer.components.distillation import HardDistillation, SoftDistillation
from trainer.recipe import check, tree
from trainer.recipe.schema import Recipe, digest_of, from_random_weights, load_recipe
from trainer.recipe.shipped import find_recipe, newest_recipe_paths

TEACHER = {"teacher": "resnet18"}


@pytest.fixture
def answers():
    torch.manual_seed(3)
    return torch.randn(5, 7) * 2, torch.randn(5, 7) * 3


def log_softmax(row):
    most = max(row)
    whole = most + math.log(sum(math.exp(one - most) for one in row))
    return [one - whole for one in row]


def divergence(student, teacher, temperature):
    """sum over images and classes of p * (log p - log q), in loops; p of the teacher."""
    total = 0.0
    for own, theirs in zip(student.tolist(), teacher.tolist(), strict=True):
        log_q, log_p = (log_softmax([one / temperature for one in row]) for row in (own, theirs))
        total += sum(math.exp(p) * (p - q) for p, q in zip(log_p, log_q, strict=True))
    return total


@pytest.mark.parametrize("temperature", [1.0, 3.0])
def test_soft_is_deits_formula(answers, temperature):
    """facebookresearch/deit: the sum of the divergence * T * T / numel."""
    student, teacher = answers
    soft = SoftDistillation(share=0.3, temperature=temperature, **TEACHER)
    wanted = divergence(student, teacher, temperature) * temperature**2 / student.numel()
    assert soft.distance(student, teacher).item() == pytest.approx(wanted, rel=1e-5)
    base = torch.tensor(1.7)
    assert soft(base, student, teacher).item() == pytest.approx(
        1.7 * (1 - 0.3) + wanted * 0.3, rel=1e-5
    )


def test_summed_over_classes_it_is_the_divergence_of_an_image(answers):
    """Hinton et al. and timm: mean over images alone."""
    student, teacher = answers
    soft = SoftDistillation(share=1.0, temperature=4.0, sum_classes=True, **TEACHER)
    wanted = divergence(student, teacher, 4.0) * 16 / len(student)
    assert soft.distance(student, teacher).item() == pytest.approx(wanted, rel=1e-5)
    timms = 16 * functional.kl_div(
        functional.log_softmax(student / 4, dim=-1),
        functional.log_softmax(teacher / 4, dim=-1),
        reduction="batchmean",
        log_target=True,
    )
    assert torch.allclose(soft.distance(student, teacher), timms)


@pytest.mark.parametrize("share", [0.5, 1.0])
def test_with_a_perfect_teacher_hard_is_cross_entropy_of_the_labels(share):
    torch.manual_seed(1)
    student, labels = torch.randn(6, 4), torch.tensor([3, 0, 1, 1, 2, 0])
    teacher = 20 * functional.one_hot(labels, 4).float()
    hard = HardDistillation(share=share, **TEACHER)
    wanted = -sum(
        log_softmax(row)[label]
        for row, label in zip(student.tolist(), labels.tolist(), strict=True)
    ) / len(labels)
    base = functional.cross_entropy(student, labels)
    assert hard.distance(student, teacher).item() == pytest.approx(wanted, rel=1e-6)
    assert hard(base, student, teacher).item() == pytest.approx(wanted, rel=1e-6)


def test_a_student_that_answers_as_its_teacher_is_at_no_distance(answers):
    _, teacher = answers
    student = teacher.clone().requires_grad_()
    soft = SoftDistillation(share=1.0, temperature=2.0, **TEACHER)
    distance = soft.distance(student, teacher)
    distance.backward()
    assert distance.item() == pytest.approx(0, abs=1e-6)
    assert student.grad.abs().max() < 1e-6


def distilled(**changed):
    plain = tree.plain(load_recipe(find_recipe("A2")).for_model("resnet50"))
    distill = {"name": "hard", "share": 0.5, **TEACHER, **changed}
    return {**plain, "distill": distill}


def test_which_file_it_is_makes_the_digest_and_not_where_it_lies():
    recipes = [
        check.check(Recipe, distilled(weights=path, sha256=digit * 64))
        for path, digit in (("a.pth", "0"), ("/b/c.pth", "0"), ("a.pth", "1"))
    ]
    one, moved, other = (recipe.digest for recipe in recipes)
    assert one == moved != other
    assert one == digest_of(tree.plain(recipes[0]))
    without = load_recipe(find_recipe("A2")).for_model("resnet50")
    assert without.digest not in (one, other)


@pytest.mark.parametrize(
    "changed", [{"share": 0.0}, {"share": 1.5}, {"sha256": "no"}, {"temperature": 2.0}]
)
def test_what_no_distillation_can_have_is_refused(changed):
    with pytest.raises(ConfigError) as refused:
        check.check(Recipe, distilled(**changed))
    assert refused.value.path[:2] == ("distill", *changed)[:2]


def test_a_teacher_and_compared_splits_exclude_each_other():
    plain = distilled() | {
        "augment_splits": 3,
        "mix": None,
        "loss": {"name": "jensen_shannon", "weight": 12.0, "loss": {"name": "ce"}},
    }
    with pytest.raises(ConfigError) as refused:
        check.check(Recipe, {key: value for key, value in plain.items() if value is not None})
    assert refused.value.path == ("distill",)


def test_a_recipe_that_waits_for_its_teacher_is_read_without():
    recipe = check.check(Recipe, distilled())
    assert from_random_weights(recipe).distill is None
    given = check.check(Recipe, distilled(weights="a.pth"))
    assert from_random_weights(given) == given


def test_a_task_without_classes_of_images_has_no_teacher():
    recipes = map(load_recipe, newest_recipe_paths())
    recipe = next(one for one in recipes if not one.of_task.is_timms)
    hard = HardDistillation(share=0.5, **TEACHER)
    with pytest.raises(PlanError) as refused:
        hard.check(SimpleNamespace(recipe=recipe))
    assert refused.value.path == ("distill",)
