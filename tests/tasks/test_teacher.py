"""A task with a teacher: who sees what, which head learns what, and what training keeps of it."""

import dataclasses
import hashlib
import json

import numpy as np
import pytest
import safetensors.torch
import timm
import torch
from torch.nn import functional

from support.plans import small_plan
from support.ranked import on_ranks, steps64
from trainer.base.errors import PlanError
from trainer.base.settings import make_settings
from trainer.data.dataset import open_data
from trainer.engine.evaluate import evaluate
from trainer.engine.state import TrainingState
from trainer.engine.step_memory import step_memory
from trainer.engine.train import optimizer_step
from trainer.models.build import gmacs, num_parameters
from trainer.models.weights import WeightsError
from trainer.tasks import task_of
from trainer.tasks.teacher import open_teacher

SETTINGS = make_settings("cpu", workers="0")
DEIT = "deit_tiny_distilled_patch16_224"


def stored(path, model="test_convnext", number=10, **config):
    """The file of a model's weights, with a config.json as a run and timm write it."""
    torch.manual_seed(7)
    built = timm.create_model(model, num_classes=number)
    for weight in built.parameters():  # so that its answers differ from image to image
        torch.nn.init.normal_(weight, std=0.2)
    path.parent.mkdir(parents=True, exist_ok=True)
    safetensors.torch.save_file(built.state_dict(), path)
    if config:
        (path.parent / "config.json").write_text(json.dumps({"pretrained_cfg": config}))
    return built.eval()


@pytest.fixture
def file(tmp_path):
    return tmp_path / "teacher" / "model.safetensors"


def taught(file, more="", model="test_resnet", teacher="test_convnext", kind="hard"):
    fields = "temperature: 3.0, " if kind == "soft" else ""
    distill = f"{{name: {kind}, share: 0.3, {fields}teacher: {teacher}, weights: {file}}}"
    return small_plan(model=model, overrides=f"distill='{distill}' {more}")


@pytest.fixture(scope="module")
def digits():
    return open_data(small_plan().profile, None)


def batch_of(plan, digits):
    return next(iter(digits.train_stream(plan, SETTINGS, 0)))


def test_the_plan_says_which_file_the_teacher_is(file):
    stored(file)
    plan = taught(file)
    sha256 = hashlib.sha256(file.read_bytes()).hexdigest()
    assert plan.recipe.distill.sha256 == sha256
    stored(file, number=10, model="test_resnet")
    other = taught(file, teacher="test_resnet")
    assert other.recipe.distill.sha256 != sha256
    assert plan.run_name("f") != other.run_name("f")
    elsewhere = file.parent.parent / "moved.safetensors"
    stored(file)
    file.rename(elsewhere)
    assert taught(elsewhere).run_name("f") == plan.run_name("f")


@pytest.mark.parametrize("kind", ["hard", "soft"])
def test_the_loss_is_of_the_teachers_answers_to_the_same_mixed_images(file, digits, kind):
    """Beside an own pass: the student's images, taken back to pixels and normalized as the teacher
    was trained.
    """
    mean, std = (0.5, 0.4, 0.3), (0.2, 0.3, 0.4)
    built = stored(file, mean=mean, std=std)
    plan = taught(file, kind=kind)
    state = TrainingState(plan, SETTINGS)
    images, targets = state.task.prepare(batch_of(plan, digits))
    found = state.task.loss(state.model.eval(), images, targets)
    profile = plan.profile
    pixels = images.double().numpy() * np.reshape(profile.std, (3, 1, 1)) + np.reshape(
        profile.mean, (3, 1, 1)
    )
    shown = (pixels - np.reshape(mean, (3, 1, 1))) / np.reshape(std, (3, 1, 1))
    with torch.no_grad():
        answers = built(torch.from_numpy(shown).float())
        logits = state.model(images)
    base = plan.recipe.loss(logits, targets)
    if kind == "hard":
        distance = functional.cross_entropy(logits, answers.argmax(1))
    else:
        student, theirs = ((one / 3).log_softmax(1) for one in (logits, answers))
        distance = (theirs.exp() * (theirs - student)).sum() * 9 / logits.numel()
    assert found.item() == pytest.approx(0.7 * base.item() + 0.3 * distance.item(), rel=1e-4)


def test_shown_alike_the_teacher_gets_the_students_inputs_as_they_are(file):
    profile = small_plan().profile
    built = stored(file, mean=profile.mean, std=profile.std)
    teacher = open_teacher(taught(file))
    images = torch.randn(2, 3, 32, 32)
    assert teacher.is_shown_alike and torch.equal(teacher(images), built(images))
    assert not teacher(images.requires_grad_()).requires_grad


def test_both_heads_are_trained_each_by_its_own(file, digits):
    """The head of the labels gets no gradient from the teacher, nor the teacher's from labels."""
    stored(file)
    more = "mix=null smoothing=null loss='{name: ce}' drop_path=null"
    plan = taught(file, more, model=DEIT)
    state = TrainingState(plan, SETTINGS)
    images, targets = state.task.prepare(batch_of(plan, digits))
    state.model.train()
    of_labels, of_teacher = state.model(images)
    state.task.loss(state.model, images, targets).backward()
    found = {name: weight.grad for name, weight in state.model.named_parameters()}
    answers = state.teacher(images)
    state.model.zero_grad()
    (0.7 * functional.cross_entropy(of_labels, targets.argmax(1))).backward(retain_graph=True)
    assert torch.allclose(found["head.weight"], state.model.head.weight.grad, atol=1e-6)
    assert state.model.head_dist.weight.grad is None
    state.model.zero_grad()
    (0.3 * functional.cross_entropy(of_teacher, answers.argmax(1))).backward()
    assert torch.allclose(found["head_dist.weight"], state.model.head_dist.weight.grad, atol=1e-6)
    assert found["head_dist.weight"].abs().max() > 0 < found["head.weight"].abs().max()


def test_a_step_moves_both_heads_and_nothing_of_the_teacher(file, digits):
    stored(file)
    plan = taught(file, model=DEIT)
    state = TrainingState(plan, SETTINGS)
    before = {name: weight.clone() for name, weight in state.model.state_dict().items()}
    teacher = {name: one.clone() for name, one in state.teacher.state_dict().items()}
    optimizer_step(state, digits.train_stream(plan, SETTINGS, 0), 0)
    after = state.model.state_dict()
    for name in ("head.weight", "head_dist.weight", "dist_token"):
        assert not torch.equal(before[name], after[name]), name
    assert not state.teacher.training
    assert all(torch.equal(one, teacher[name]) for name, one in state.teacher.state_dict().items())


def test_an_evaluation_answers_with_the_mean_of_both_heads(file):
    stored(file)
    plan = taught(file, model=DEIT)
    state = TrainingState(plan, SETTINGS)
    images = torch.randint(0, 256, (12, 3, 32, 32), dtype=torch.uint8)
    labels = torch.arange(12) % 10
    scores = evaluate(plan, SETTINGS, state.model, [(images, labels)])
    profile = plan.profile
    inputs = (images.float() / 255 - torch.tensor(profile.mean).view(3, 1, 1)) / torch.tensor(
        profile.std
    ).view(3, 1, 1)
    heads = {}
    for name in ("head", "head_dist"):
        state.model.get_submodule(name).register_forward_hook(
            lambda module, given, made, name=name: heads.__setitem__(name, made)
        )
    with torch.no_grad():
        state.model.eval()(inputs)
    logits = (heads["head"] + heads["head_dist"]) / 2
    assert scores.num_top1 == (logits.argmax(1) == labels).sum().item()
    targets = functional.one_hot(labels, 10).float()
    assert scores.loss_nats == pytest.approx(plan.recipe.loss(logits, targets).item(), rel=1e-4)


def test_without_a_teacher_a_model_of_two_heads_trains_their_mean(digits):
    plan = small_plan(model=DEIT)
    state = TrainingState(plan, SETTINGS)
    images, targets = state.task.prepare(batch_of(plan, digits))
    state.model.train()
    assert isinstance(state.model(images), torch.Tensor)
    assert torch.isfinite(state.task.loss(state.model, images, targets))


def test_the_teacher_is_in_no_number_of_the_student(file):
    stored(file)
    plan, alone = taught(file), small_plan()
    state, other = TrainingState(plan, SETTINGS), TrainingState(alone, SETTINGS)
    assert state.state_dict()["model"].keys() == other.state_dict()["model"].keys()
    assert num_parameters(state.model) == num_parameters(other.model)
    assert gmacs(state.model, 3, 32) == gmacs(other.model, 3, 32)
    assert set(state.weights()) == {"model"}
    # and it draws nothing: the first weights are the same
    assert all(
        torch.equal(one, other.model.state_dict()[name])
        for name, one in state.model.state_dict().items()
    )
    sizes = [step_memory(plan, SETTINGS, state.model, state.teacher).teacher]
    sizes.append(sum(one.nbytes for one in state.teacher.state_dict().values()))
    assert sizes[0] == sizes[1] > 0


def test_the_loss_to_choose_a_rate_by_is_of_the_labels(file):
    stored(file)
    plan = taught(file, "loss='{name: ce}' smoothing=null")
    model = torch.nn.Module()
    model.forward = lambda images: torch.zeros(len(images), 10)
    images = torch.zeros(4, 3, 32, 32, dtype=torch.uint8)
    assert task_of(plan, SETTINGS).validation_loss(
        model, images, torch.arange(4)
    ).item() == pytest.approx(np.log(10), rel=1e-6)


@pytest.mark.parametrize("kind", ["hard", "soft"])
def test_ranks_and_micro_batches_make_the_same_steps(file, kind):
    stored(file)
    fields = "temperature: 2.0, " if kind == "soft" else ""
    distill = f"{{name: {kind}, share: 0.5, {fields}teacher: test_convnext, weights: {file}}}"
    more = "drop_path=null batch.images=16 mix.images=8"
    cuts = [(1, "batch.norm_images=8"), (2, "batch.norm_images=8"), (1, "batch.norm_images=16")]
    # a student without norms over images: its micro-batches are memory alone
    (whole,), pair, (single,) = (
        on_ranks(steps64, number, "A2", "test_vit", f"distill='{distill}' {more} {cut}", 0, 2)
        for number, cut in cuts
    )
    for other in (*pair, single):
        assert other["losses"] == pytest.approx(whole["losses"], rel=1e-9)
        for name, weight in whole["weights"].items():
            assert torch.allclose(weight, other["weights"][name], rtol=1e-6, atol=1e-9), name


def wrong_classes(file):
    stored(file, number=7)


def wrong_model(file):
    stored(file, model="test_resnet")


def headless(file):
    built = stored(file)
    held = {name: one for name, one in built.state_dict().items() if not name.startswith("head.fc")}
    safetensors.torch.save_file(held, file)


def grey(file):
    stored(file, mean=(0.5,), std=(0.5,))


def absent(file):
    pass


def damaged(file):
    file.parent.mkdir(parents=True)
    file.write_bytes(b"no weights")


@pytest.mark.parametrize(
    ("make", "names"),
    [
        (wrong_classes, ["distill.teacher", "7", "10"]),
        (wrong_model, ["distill.weights"]),
        (headless, ["distill.weights"]),
        (grey, ["distill.teacher", "1", "3"]),
        (absent, ["distill.weights", "No such file"]),
        (damaged, ["distill.weights"]),
    ],
)
def test_a_teacher_that_cannot_teach_is_refused_in_one_line(file, make, names):
    make(file)
    with pytest.raises((PlanError, WeightsError)) as refused:
        open_teacher(taught(file))
    line = str(refused.value)
    assert "\n" not in line and "; " in line
    assert all(name in line for name in names), line
    assert refused.value.path[0] == "distill"


def test_a_teacher_of_one_image_size_is_built_for_the_students(file):
    stored(file, model="test_vit")
    built = timm.create_model("test_vit", num_classes=10, img_size=32)
    safetensors.torch.save_file(built.state_dict(), file)
    teacher = open_teacher(taught(file, teacher="test_vit"))
    assert teacher(torch.zeros(1, 3, 32, 32)).shape == (1, 10)


def test_a_teacher_that_is_another_file_now_is_refused(file):
    stored(file)
    plan = taught(file)
    stored(file, number=11)
    with pytest.raises(WeightsError) as refused:
        open_teacher(plan)
    assert refused.value.path == ("distill", "sha256")


def test_no_teacher_given_is_one_line_that_says_what_to_set():
    plan = small_plan(overrides="distill='{name: hard, share: 0.5, teacher: resnet18}'")
    with pytest.raises(WeightsError) as refused:
        open_teacher(plan)
    assert refused.value.path == ("distill", "weights")
    assert 'set="distill.weights=timm:resnet18.' in str(refused.value)


def test_a_run_whose_model_was_changed_is_no_teacher(file):
    """Another activation has the same weights' names, and another function."""
    stored(file)
    recipe = small_plan(overrides="model.activation='{name: silu}'").recipe
    (file.parent / "recipe.yaml").write_text(recipe.to_yaml())
    with pytest.raises(WeightsError) as refused:
        open_teacher(taught(file))
    assert "model.activation" in str(refused.value)
    plain = dataclasses.replace(small_plan()).recipe
    (file.parent / "recipe.yaml").write_text(plain.to_yaml())
    assert open_teacher(taught(file)) is not None
