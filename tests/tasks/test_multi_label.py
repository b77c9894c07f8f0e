"""Several labels an image: one file of trainer/tasks, tables, and an exact mean average precision."""

import csv
import io
import re
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from rich.console import Console
from typer.testing import CliRunner

from support.ranked import on_ranks
from trainer.base.errors import UserError
from trainer.base.settings import make_settings
from trainer.base.signals import StopRequest
from trainer.cli.main import app
from trainer.data.dataset import open_data
from trainer.engine import train
from trainer.engine.evaluate import evaluate
from trainer.engine.state import TrainingState
from trainer.runs.job import Job, plan_of, run_job
from trainer.runs.results import read_row
from trainer.tasks import task_of
from trainer.tasks.multi_label import average_precision

SETTINGS = make_settings("cpu", workers="0")
CLASSES = ("red", "green", "blue")
RECIPE = """\
name: small-multi-label
version: 1
title: "a small recipe for tests"
source: "none"
task: {name: multi_label}
epochs: 3
batch: {images: 16, norm_images: 8}
lr: {peak: 0.01, updated: per_step, schedule: {name: cosine, end: 0.0, period: after_warmup}}
optimizer: {name: adamw, betas: [0.9, 0.999], eps: 1.0e-8, weight_decay: 0.05, no_decay: [vectors]}
loss: {name: bce}
mix: {name: mixup, alpha: 0.2, partner: reversed}
augment:
  - {name: random_resized_crop, area: [0.7, 1.0], aspect: [0.75, 1.3333333333333333], interpolation: bilinear}
  - {name: flip}
image: {train_px: 32, test_px: 32, test_crop_share: 1.0, test_interpolation: bilinear}
"""


def write_set(root: Path, num_train=48, num_val=20) -> Path:
    """Images whose channels are bright where their class is present; the third is never in val."""
    random = np.random.default_rng(0)
    (root / "images").mkdir(parents=True)
    for split, number in (("train", num_train), ("val", num_val)):
        with open(root / f"{split}.csv", "w", newline="") as file:
            table = csv.writer(file)
            table.writerow(["image", *CLASSES])
            for i in range(number):
                labels = random.integers(0, 2, 3)
                if split == "val":
                    labels[2] = 0
                pixels = 60 + 120 * labels + random.integers(-50, 50, (24, 30, 3))
                name = f"images/{split}-{i:03}.png"
                Image.fromarray(pixels.clip(0, 255).astype(np.uint8)).save(root / name)
                table.writerow([name, *labels])
    return root


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    return write_set(tmp_path_factory.mktemp("set") / "colours")


@pytest.fixture(scope="module")
def recipe(tmp_path_factory):
    path = tmp_path_factory.mktemp("recipe") / "small-multi-label.v1.yaml"
    path.write_text(RECIPE)
    return path


def plan_for(root, recipe, overrides="", **job):
    return plan_of(Job(str(recipe), "test_resnet", str(root), overrides=overrides, **job))


def plain_precision(scores, is_right):
    """Threshold by threshold, as scikit-learn and torchmetrics define it."""
    total, found, before = sum(is_right), 0.0, 0.0
    for threshold in sorted(set(scores), reverse=True):
        passed = [
            right for score, right in zip(scores, is_right, strict=True) if score >= threshold
        ]
        recall = sum(passed) / total
        found += (recall - before) * sum(passed) / len(passed)
        before = recall
    return 100 * found


def test_average_precision_is_a_plain_loop():
    random = np.random.default_rng(0)
    for case in range(20):
        scores = np.round(random.normal(size=17), 1 if case % 2 else 6)  # ties in every other
        is_right = random.random(17) < 0.4
        is_right[case % 17] = True
        found = average_precision(scores, is_right)
        assert found == pytest.approx(plain_precision(scores.tolist(), is_right.tolist()))
    assert average_precision(np.ones(3), np.zeros(3)) is None
    assert average_precision(np.array([0.1, 0.9]), np.array([0, 1])) == 100
    # by hand: right, wrong, right
    assert average_precision(np.array([3, 2, 1]), np.array([1, 0, 1])) == pytest.approx(250 / 3)


def test_scores_of_a_pass_are_those_of_all_its_images(root, recipe):
    plan = plan_for(root, recipe)
    data = open_data(plan.profile, root)
    model = TrainingState(plan, SETTINGS).model.eval()
    scores = evaluate(plan, SETTINGS, model, data.val_batches(plan, SETTINGS))
    [(images, rows)] = list(data.val_batches(plan, SETTINGS))
    mean, std = (
        torch.tensor(each).view(-1, 1, 1) for each in (plan.profile.mean, plan.profile.std)
    )
    with torch.no_grad():
        logits = model((images / 255 - mean) / std)
    expected = [plain_precision(logits[:, k].tolist(), rows[:, 1 + k].tolist()) for k in range(2)]
    assert scores.of_classes() == (pytest.approx(expected[0]), pytest.approx(expected[1]), None)
    assert scores.main_pct == pytest.approx(sum(expected) / 2)
    bce = torch.nn.functional.binary_cross_entropy_with_logits(logits, rows[:, 1:].float())
    assert scores.loss_nats == pytest.approx(bce.item(), rel=1e-4)
    task = task_of(plan, SETTINGS)
    assert task.restored(scores.record()) == scores
    halves = [task.evaluate(model, images[part], rows[part]) for part in (slice(7), slice(7, 20))]
    again = task.scores((halves[1] + halves[0]).tolist(), 20)
    assert again.main_pct == pytest.approx(scores.main_pct)


def test_targets_are_the_tables_rows_mixed(root, recipe):
    plan = plan_for(root, recipe, "mix=null")
    data, task = open_data(plan.profile, root), task_of(plan, SETTINGS)
    batch = next(iter(data.train_stream(plan, SETTINGS, 0)))
    _, targets = task.prepare(batch)
    with open(root / "train.csv") as file:
        rows = [list(map(float, row[1:])) for row in list(csv.reader(file))[1:]]
    assert targets.tolist() == [rows[place] for place in batch.ids[:, 1].tolist()]
    mixing = plan_for(root, recipe)
    batch = next(iter(data.train_stream(mixing, SETTINGS, 0)))
    mixed = task_of(mixing, SETTINGS).prepare(batch)[1]
    plain = torch.tensor([rows[place] for place in batch.ids[:, 1].tolist()])
    differ, other = plain != plain.flip(0), plain.flip(0)
    shares = ((mixed - other) / (plain - other))[differ]
    assert torch.equal(mixed[~differ], plain[~differ])
    torch.testing.assert_close(shares, shares[:1].expand_as(shares))
    assert not torch.equal(mixed, plain)
    assert task.constant_loss(data.train) == pytest.approx(entropy(rows), rel=1e-6)


def entropy(rows):
    shares = np.array(rows).mean(0)
    return float(-(shares * np.log(shares) + (1 - shares) * np.log(1 - shares)).mean())


def go(folder, root, recipe, stop=None):
    plan = plan_for(root, recipe)
    job = Job(str(recipe), "test_resnet", str(root))
    where = {"runs": folder / "runs", "results": folder / "results"}
    settings = make_settings("cpu", workers="0", **where)
    out = Console(file=io.StringIO(), width=160)
    code, row = run_job(
        job, plan, settings, open_data(plan.profile, root), out, stop or StopRequest()
    )
    return code, row, out.file.getvalue()


@pytest.fixture(scope="module")
def finished(tmp_path_factory, root, recipe):
    folder = tmp_path_factory.mktemp("finished")
    code, row, _ = go(folder, root, recipe)
    assert code == 0
    return folder, row


def test_a_run_has_its_scores_and_is_scored_again(finished, root):
    folder, row = finished
    again = read_row(folder / "results", row.run)
    assert again.task == "multi_label" and set(again.scores_pct) == {"mAP_pct"}
    assert row.main_pct > 90 and set(again.class_pct) == set(CLASSES)
    assert again.class_pct["blue"] is None
    where = ("--runs", str(folder / "runs"), "--results", str(folder / "results"))
    for command in ("eval", "verify"):
        done = CliRunner().invoke(app, [command, "--run", row.run, *where, "--device", "cpu"])
        assert done.exit_code == 0, done.output
    done = CliRunner().invoke(app, ["check-data", "--data", str(root)])
    assert done.exit_code == 0, done.output


def test_predict_gives_each_class_a_probability_of_its_own(finished, root, tmp_path):
    folder, row = finished
    words = ["predict", "--run", row.run, "--runs", folder / "runs", "--device", "cpu"]
    words += ["--images", root / "images", "--out", tmp_path / "found"]
    done = CliRunner().invoke(app, [str(word) for word in words])
    assert done.exit_code == 0, done.output
    assert len(list((tmp_path / "found").glob("*.png"))) == 68
    line = next(line for line in done.output.splitlines() if "train-000.png" in line)
    found = {name: float(share) for name, share in re.findall(r"(\w+) ([01]\.\d\d)", line)}
    with open(root / "train.csv") as file:
        right = dict(zip(CLASSES, list(csv.reader(file))[1][1:], strict=True))
    assert {name: str(int(share > 0.5)) for name, share in found.items()} == right


def test_a_stopped_run_resumes_to_the_same_bits(root, recipe, finished, tmp_path, monkeypatch):
    _, row = finished
    stop, step = StopRequest(), train.optimizer_step

    def stopping(state, loader, number):
        if number == 4:
            stop.signal_name = "SIGUSR1"
        return step(state, loader, number)

    with monkeypatch.context() as patch:
        patch.setattr(train, "optimizer_step", stopping)
        assert go(tmp_path, root, recipe, stop)[0] == 75
    _, resumed, _ = go(tmp_path, root, recipe)
    assert resumed.weights_sha256 == row.weights_sha256 and resumed.scores_pct == row.scores_pct


def shared_scores(ranks, root, recipe):
    """Of a pass that ranks share, two images a batch."""
    plan = plan_for(root, recipe)
    data = open_data(plan.profile, Path(root))
    model = TrainingState(plan, SETTINGS).model
    stream = plan.recipe.of_task.evaluation_stream(data.val, plan, 2, 32)
    batches = [stream[i] for i in range(ranks.rank, len(stream), ranks.world_size)]
    return evaluate(plan, SETTINGS, model, batches, ranks=ranks).record()


def test_ranks_share_a_pass_exactly(root, recipe):
    given = str(root), str(recipe)
    [one] = on_ranks(shared_scores, 1, *given)
    for found in on_ranks(shared_scores, 2, *given):
        assert found == pytest.approx(one, rel=1e-12)


@pytest.mark.parametrize("overrides", ["loss.name=ce", "smoothing=0.1 loss={name: bce}"])
def test_what_is_for_one_class_is_refused(root, recipe, overrides):
    with pytest.raises(UserError, match="loss|smoothing"):
        plan_for(root, recipe, overrides)


@pytest.mark.parametrize(
    ("line", "said"),
    [
        ("images/train-000.png,1,2,0", "val.csv:2"),
        ("images/train-000.png,1", "val.csv:2"),
        ("images/none.png,1,0,0", "none.png"),
    ],
)
def test_a_bad_table_is_named_with_its_line(tmp_path, recipe, line, said):
    root = write_set(tmp_path / "set", 16, 2)
    (root / "val.csv").write_text(f"image,red,green,blue\n{line}\n")
    with pytest.raises(UserError, match=said):
        plan_for(root, recipe)


def test_other_data_are_refused(recipe):
    with pytest.raises(UserError, match="multi_label"):
        plan_of(Job(str(recipe), "test_resnet", "digits"))
