"""A task answers for targets, loss and score: training without a folder, and a task that the engine
does not know.
"""

from dataclasses import dataclass

import pytest
import timm
import torch
from torch.nn import functional

from support.plans import small_plan
from trainer.base.settings import make_settings
from trainer.data.dataset import open_data
from trainer.data.transforms import in_format, inputs_of, normalize
from trainer.engine.null_run import NullLogger, NullRun
from trainer.engine.state import TrainingState
from trainer.engine.train import optimizer_step, train
from trainer.tasks import Scores, Task, classification, task_of

SMALL = (
    "batch.images=360 batch.norm_images=180 epochs=2 lr.warmup_epochs=1 average='{name: ema, decay:"
    " 0.9, every_steps: 2}'"
)
SETTINGS = make_settings("cpu", workers="0")


@pytest.fixture(scope="module")
def digits():
    return open_data(small_plan().profile, None)


@dataclass(frozen=True)
class DigitScores(Scores):
    """num_near: images whose number is found to within one."""

    num_near: int

    def percentages(self) -> dict[str, float]:
        return {"near_pct": 100 * self.num_near / self.num_images}

    def counts(self) -> dict[str, int]:
        return {"num_near": self.num_near, "num_images": self.num_images}

    def summary(self) -> str:
        return f"near {self.num_near}"


@dataclass(frozen=True)
class Regression(Task):
    """The first output is to be the label, as a number of [B] float."""

    num_sums = 2
    blank_targets = constant_loss = restored = shown = None  # no run folder, no lr-find

    def prepare(self, batch):
        return (
            in_format(inputs_of(self.plan, self.settings, batch), self.settings),
            batch.labels.float(),
        )

    def loss(self, model, inputs, targets):
        return functional.mse_loss(model(inputs)[:, 0], targets)

    def validation_loss(self, model, images, labels):
        return self.loss(model, normalize(images, self.plan.profile), labels.float())

    def evaluate(self, model, images, labels):
        error = model(normalize(images, self.plan.profile))[:, 0] - labels
        return torch.stack([error.square().sum(), (error.abs() < 1).sum()]).double()

    def scores(self, sums, num_images):
        return DigitScores(num_images, sums[0] / num_images, int(sums[1]))


class Kept(NullLogger):
    def __init__(self) -> None:
        self.losses, self.found = [], []

    def window(self, step, epoch, loss_nats, *rest) -> None:
        self.losses.append(loss_nats)

    def scores(self, step, epoch, which, scores) -> None:
        self.found.append((epoch, which, scores))


def test_another_task_trains_and_is_scored_by_the_same_engine(digits, monkeypatch):
    bound = lambda section, plan, settings: Regression(plan, settings)  # noqa: E731
    monkeypatch.setattr(classification.ClassificationSection, "bound", bound)
    plan = small_plan(overrides=f"{SMALL} epochs=4 mix=null")
    run = NullRun()
    run.logger = Kept()
    state = TrainingState(plan, SETTINGS)
    assert train(state, digits, run) == "finished"
    assert [(epoch, which) for epoch, which, _ in run.logger.found] == [
        (epoch, which) for epoch in (1, 2, 3, 4) for which in ("model", "average")
    ]
    last = run.logger.found[-2][2]
    assert last.num_images == 360 and state.progress.scores["model"] == last.record()
    assert run.logger.losses[-1] < run.logger.losses[0]


def test_without_a_folder_nothing_is_written_and_every_training_is_the_same(
    digits, tmp_path, monkeypatch
):
    monkeypatch.chdir(tmp_path)
    states = [TrainingState(small_plan(overrides=SMALL), SETTINGS) for _ in range(2)]
    assert [train(state, digits) for state in states] == ["finished", "finished"]
    assert not list(tmp_path.iterdir())
    one, other = states
    assert (
        one.progress.step == 6
        and one.progress.scores == other.progress.scores
        and set(one.progress.scores) == {"model", "average"}
    )
    for name, weight in one.model.state_dict().items():
        assert torch.equal(weight, other.model.state_dict()[name]), name


def test_a_state_loaded_into_a_fresh_one_takes_the_same_next_step(digits, tmp_path):
    plan = small_plan(overrides=SMALL)
    one, other = TrainingState(plan, SETTINGS), TrainingState(plan, SETTINGS)
    loader = digits.train_stream(plan, SETTINGS, 0)
    for step in range(2):
        one.loss_sum += optimizer_step(one, loader, step)
        one.progress.step = step + 1
    torch.save(one.state_dict(), tmp_path / "state.pt")
    other.load_state_dict(torch.load(tmp_path / "state.pt", weights_only=True))
    assert other.progress == one.progress and other.loss_sum == one.loss_sum
    losses = [
        optimizer_step(state, digits.train_stream(plan, SETTINGS, 2), 2) for state in (one, other)
    ]
    assert torch.equal(*losses)
    for name, weights in one.weights().items():
        for tensor, loaded in zip(
            weights.state_dict().values(), other.weights()[name].state_dict().values(), strict=True
        ):
            assert torch.equal(tensor, loaded)


def test_a_targets_row_is_smoothed_and_sums_to_one():
    task = task_of(small_plan(overrides="loss.name=ce smoothing=0.1"), SETTINGS)
    targets = task.targets(torch.tensor([3, 0]))
    assert targets.shape == (2, 10) and torch.allclose(targets.sum(1), torch.ones(2))
    assert targets[0, 3] == pytest.approx(0.91) and targets[0, 0] == pytest.approx(0.01)


def test_scores_are_counts_over_the_pass():
    task = task_of(small_plan(overrides="loss.name=ce"), SETTINGS)
    logits = torch.zeros(4, 10)
    logits[0, 3] = logits[1, 7] = logits[2, 7] = 9.0
    logits[2, 1] = 8.0
    model = torch.nn.Module()
    model.forward = lambda images: logits
    images = torch.zeros(4, 3, 32, 32, dtype=torch.uint8)
    scores = task.scores(task.evaluate(model, images, torch.tensor([3, 0, 1, 9])).tolist(), 4)
    assert (scores.num_top1, scores.num_images, scores.top1_pct) == (1, 4, 25.0)
    assert scores.loss_nats == pytest.approx(
        functional.cross_entropy(logits, torch.tensor([3, 0, 1, 9])).item()
    )


@pytest.mark.parametrize("model", ["test_resnet", "test_convnext"])
@pytest.mark.parametrize(
    ("num_images", "pieces"), [(128, [32] * 4), (97, [25, 24, 24, 24]), (33, [17, 16]), (31, [31])]
)
def test_large_images_are_scored_in_pieces_on_a_cpu_with_the_same_bits(
    monkeypatch, model, num_images, pieces
):
    monkeypatch.setattr(classification, "_PIXELS_AT_ONCE", 32 * 64**2)
    torch.manual_seed(0)
    net, sizes = timm.create_model(model, num_classes=10).eval(), []
    net.register_forward_pre_hook(lambda _, given: sizes.append(len(given[0])))
    images = torch.randn(num_images, 3, 64, 64)
    with torch.no_grad():
        pieced, whole = classification._scored(net, images), net(images)
    assert sizes == [*pieces, num_images] and torch.equal(pieced, whole)
