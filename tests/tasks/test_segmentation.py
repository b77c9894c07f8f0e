"""Segmentation as a task: exact scores, and runs that resume, repeat, are shared and shown."""

import dataclasses
import io
import json
import os
import re
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import timm
import torch
from PIL import Image
from rich.console import Console
from torch import nn
from torch.nn import functional
from typer.testing import CliRunner

from support.masked import CLASSES, IGNORED, RECIPE, masked_steps, write_masked, write_recipe
from support.ranked import on_ranks
from trainer.base.errors import UserError
from trainer.base.settings import make_settings
from trainer.base.signals import StopRequest
from trainer.cli.main import app
from trainer.components.losses import CrossEntropy, Dice
from trainer.data.dataset import open_data
from trainer.engine.evaluate import evaluate
from trainer.engine.state import TrainingState
from trainer.inference.classifier import of_run
from trainer.inference.export.formats import FORMATS
from trainer.models.freezing import frozen_names
from trainer.report.tables import METRICS, find_metric, value_of
from trainer.runs.job import Job, plan_of, run_job
from trainer.runs.loggers.first_batch import draw_first_batch
from trainer.runs.results import read_row
from trainer.runs.run_folder import open_model
from trainer.tasks import task_of
from trainer.tasks.segmentation import SegmentationScores

ROOT = Path(__file__).parents[2]
SETTINGS = make_settings("cpu", workers="0")


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    return write_masked(tmp_path_factory.mktemp("set") / "shapes")


@pytest.fixture(scope="module")
def recipe(tmp_path_factory):
    return write_recipe(tmp_path_factory.mktemp("recipe"))


def plan_for(root, recipe, overrides="", **job):
    return plan_of(Job(str(recipe), "test_resnet", str(root), overrides=overrides, **job))


class Answering(torch.nn.Module):
    """Gives the same scores whatever it sees."""

    def __init__(self, logits):
        super().__init__()
        self.logits = logits

    def forward(self, images):
        return self.logits


# ---- scores


def test_scores_are_those_of_a_plain_loop_over_pixels(root, recipe):
    task, random = task_of(plan_for(root, recipe), SETTINGS), np.random.default_rng(0)
    for case in range(5):
        logits = torch.from_numpy(random.normal(size=(2, 3, 9, 11)).astype(np.float32))
        masks = random.integers(0, 3 if case else 2, (2, 9, 11)).astype(np.uint8)
        masks[random.random(masks.shape) < 0.2] = IGNORED
        images = torch.zeros(2, 3, 9, 11, dtype=torch.uint8)
        sums = task.evaluate(Answering(logits), images, torch.from_numpy(masks))
        scores = task.scores(sums.tolist(), 2)
        right, expected, called, loss = [0] * 3, [0] * 3, [0] * 3, 0.0
        for image in range(2):
            for row in range(9):
                for column in range(11):
                    label = int(masks[image, row, column])
                    if label == IGNORED:
                        continue
                    of_pixel = logits[image, :, row, column]
                    answer = int(of_pixel.argmax())
                    expected[label] += 1
                    called[answer] += 1
                    right[label] += label == answer
                    loss -= float(of_pixel.double().log_softmax(0)[label])
        ious = [
            100 * right[k] / (expected[k] + called[k] - right[k])
            for k in range(3)
            if expected[k] + called[k]
        ]
        assert (scores.right, scores.expected, scores.predicted) == tuple(
            map(tuple, (right, expected, called))
        )
        assert scores.percentages() == {
            "mIoU_pct": pytest.approx(sum(ious) / len(ious)),
            "pixel_accuracy_pct": pytest.approx(100 * sum(right) / sum(expected)),
        }
        assert scores.loss_nats == pytest.approx(loss / sum(expected), rel=1e-5)
        assert task.restored(scores.record()) == scores


def test_a_class_that_is_nowhere_has_no_score():
    scores = SegmentationScores(1, 0.5, (4, 0, 2), (6, 0, 2), (4, 0, 4))
    assert scores.of_classes() == (pytest.approx(400 / 6), None, 50.0)
    assert scores.main_pct == pytest.approx((400 / 6 + 50) / 2)


def test_what_no_pass_gives_is_no_record(root, recipe):
    task = task_of(plan_for(root, recipe), SETTINGS)
    record = SegmentationScores(4, 0.5, (4, 0, 2), (6, 0, 2), (4, 0, 4)).record()
    for name, value in (("num_right_0", 5), ("num_expected_0", 7), ("num_right_1", -1)):
        with pytest.raises(ValueError, match="num_right|pixels"):
            task.restored(record | {name: value})
    with pytest.raises(KeyError):
        task.restored({"num_images": 4, "loss_nats": 0.5})


def test_the_loss_is_over_all_pixels_that_are_not_ignored(root, recipe):
    task = task_of(plan_for(root, recipe), SETTINGS)
    logits = torch.randn(2, 3, 8, 8, generator=torch.Generator().manual_seed(0))
    masks = torch.randint(0, 3, (2, 8, 8), generator=torch.Generator().manual_seed(1)).byte()
    masks[0, :3] = IGNORED
    expected = functional.cross_entropy(logits, masks.long(), ignore_index=IGNORED)
    torch.testing.assert_close(task.loss(Answering(logits), logits, masks), expected)
    both = task.loss(Answering((logits, 2 * logits)), logits, masks)
    aux = functional.cross_entropy(2 * logits, masks.long(), ignore_index=IGNORED)
    torch.testing.assert_close(both, expected + 0.4 * aux)
    nothing = task.loss(Answering(logits), logits, torch.full_like(masks, IGNORED))
    assert nothing == 0


def test_dice_is_a_loop_over_classes():
    logits = torch.randn(30, 4, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    targets = torch.eye(4, dtype=torch.float64)[torch.arange(30) % 3]
    found = 0.0
    shares = logits.softmax(1)
    for k in range(4):
        met = sum(2 * float(shares[n, k] * targets[n, k]) for n in range(30))
        both = sum(float(shares[n, k] + targets[n, k]) for n in range(30))
        found += (1 - (met + 0.5) / (both + 0.5)) / 4
    assert Dice(smooth=0.5)(logits, targets).item() == pytest.approx(found, rel=1e-12)
    joined = Dice(smooth=0.5, loss=CrossEntropy())(logits, targets)
    assert joined == Dice(smooth=0.5)(logits, targets) + CrossEntropy()(logits, targets)


def test_mirrored_images_are_added_where_they_lie(root, recipe):
    """A model that looks at columns: with test_flip its answer is symmetric in what it sees."""
    task = task_of(plan_for(root, recipe, "image.test_flip=true"), SETTINGS)

    class Columns(torch.nn.Module):
        def forward(self, images):
            place = torch.arange(images.shape[3], dtype=torch.float32).expand(images.shape[2:])
            return torch.stack([place, images[0, 0], images[0, 1]])[None]

    images = torch.randint(0, 255, (1, 3, 4, 6), generator=torch.Generator().manual_seed(0))
    found = task.scored(Columns(), images.byte(), (4, 6))
    assert torch.equal(found[0, 0], torch.full((4, 6), 5.0))  # columns 0 to 5 and back
    plain = task_of(plan_for(root, recipe), SETTINGS).scored(Columns(), images.byte(), (4, 6))
    torch.testing.assert_close(found[0, 1:], 2 * plain[0, 1:])


def test_one_class_for_all_pixels_is_what_a_score_is_held_against(root, recipe):
    plan = plan_for(root, recipe)
    task, data = task_of(plan, SETTINGS), open_data(plan.profile, root)
    pixels = np.concatenate([data.train.read_target(i).ravel() for i in range(12)])
    most = np.bincount(pixels[pixels != IGNORED], minlength=3).argmax()
    sums = torch.zeros(task.num_sums, dtype=torch.float64)
    for i in range(data.val.num_images):
        mask = torch.from_numpy(data.val.read_target(i))[None]
        logits = torch.zeros(1, 3, *mask.shape[1:])
        logits[:, most] = 1
        images = torch.zeros(1, 3, *mask.shape[1:], dtype=torch.uint8)
        sums += task.evaluate(Answering(logits), images, mask)
    expected = task.scores(sums.tolist(), data.val.num_images).main_pct
    assert task.majority_pct(data.train, data.val) == pytest.approx(expected, rel=1e-12)


def test_windows_are_a_plain_loop(root, recipe):
    """The mean over windows that a loop cuts out one by one, of an image that strides do not
    divide, and of one that is smaller than a window.
    """
    window = "task.window='{px: 5, stride_px: 3}' image.test_flip=true"
    task = task_of(plan_for(root, recipe, window), SETTINGS)
    weight = torch.randn(3, 3, 3, 3, generator=torch.Generator().manual_seed(0))
    seen = []

    class Local(torch.nn.Module):
        def forward(self, images):
            seen.append(tuple(images.shape))
            return functional.conv2d(images, weight, padding=1)  # knows the window's edge

    profile = task.plan.profile
    for height, width in ((12, 10), (5, 5), (4, 9)):
        images = torch.randint(0, 255, (1, 3, height, width)).byte()
        seen.clear()
        found = task.scored(Local(), images, (height, width))
        assert set(seen) == {(1, 3, 5, 5)}
        mean, std = (torch.tensor(one).view(1, 3, 1, 1) for one in (profile.mean, profile.std))
        padded = torch.zeros(1, 3, max(5, height), width)
        top = (max(5, height) - height) // 2
        padded[:, :, top : top + height] = (images / 255 - mean) / std
        sums, counts = torch.zeros(1, 3, *padded.shape[2:]), torch.zeros(padded.shape[2:])
        down = {12: (0, 3, 6, 7), 5: (0,), 4: (0,)}[height]
        right = {10: (0, 3, 5), 5: (0,), 9: (0, 3, 4)}[width]
        for row in down:
            for column in right:
                part = padded[:, :, row : row + 5, column : column + 5]
                whole = functional.conv2d(part, weight, padding=1)
                mirrored = functional.conv2d(part.flip(3), weight, padding=1).flip(3)
                sums[:, :, row : row + 5, column : column + 5] += whole + mirrored
                counts[row : row + 5, column : column + 5] += 1
        expected = (sums / counts)[:, :, top : top + height]
        torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)


def test_a_model_of_one_size_is_scored_by_windows_of_it(root, recipe):
    """It is never shown another side than that of the windows, whatever the images have."""
    overrides = (
        "image.train_px=32 image.test_px=48 task.output_stride=null task.aux_weight=null"
        " task.window={px: 32, stride_px: 24}"
    )
    job = Job(str(recipe), "vit_tiny_patch4_32", str(root), overrides=overrides)
    plan = plan_of(job)
    state = TrainingState(plan, SETTINGS)
    data = open_data(plan.profile, root)
    scores = evaluate(plan, SETTINGS, state.model, data.val_batches(plan, SETTINGS))
    assert scores.num_images == 4
    with pytest.raises(UserError, match="task.window.px=34"):
        job = dataclasses.replace(job, overrides=job.overrides.replace("px: 32", "px: 34"))
        TrainingState(plan_of(job), SETTINGS)


def test_a_run_of_a_model_of_one_size_ends_with_its_row(root, recipe, tmp_path):
    overrides = (
        "epochs=1 image.train_px=32 image.test_px=48 task.output_stride=null task.aux_weight=null"
        " task.window={px: 32, stride_px: 24}"
    )
    code, row, _ = go(tmp_path, root, recipe, overrides, model="vit_tiny_patch4_32")
    assert code == 0 and row.status == "finished" and row.gmacs > 0


@pytest.mark.parametrize("name, model", [("psp-r50", "resnet50"), ("refinenet-r101", "resnet101")])
def test_the_published_recipes_are_planned_on_their_backbones(root, name, model):
    """The heads learn ten times as fast, and of RefineNet's backbone all but the norms."""
    few = "model.pretrained=null" + " batch.images=4 batch.norm_images=4" * (name == "psp-r50")
    plan = plan_of(Job(name, model, str(root), overrides=few))
    with torch.device("meta"):
        body = timm.create_model(model, **plan.recipe.task.model_options())
        made = plan.recipe.task.model_of(plan, body)
    assert plan.recipe.optimizer.head_lr_scale == 10
    if name == "refinenet-r101":
        frozen = frozen_names(made, plan.recipe.model.freeze)
        assert frozen and all(re.search(r"\.bn\d\.|downsample\.1\.", one) for one in frozen)
        assert len(frozen) == 2 * sum(isinstance(one, nn.BatchNorm2d) for one in made.modules())
    else:
        assert plan.recipe.task.window.stride_px == -(-plan.recipe.task.window.px * 2 // 3)
        assert plan.recipe.model.freeze is None


def test_windows_that_leave_pixels_out_are_refused(root, recipe):
    with pytest.raises(UserError, match="stride_px 6.*5"):
        plan_for(root, recipe, "task.window='{px: 5, stride_px: 6}'")


def test_the_constant_loss_is_the_entropy_of_the_pixels(root, recipe):
    plan = plan_for(root, recipe)
    data = open_data(plan.profile, root)
    pixels = np.concatenate([data.train.read_target(i).ravel() for i in range(12)])
    shares = np.bincount(pixels[pixels != IGNORED], minlength=3) / (pixels != IGNORED).sum()
    found = task_of(plan, SETTINGS).constant_loss(data.train)
    assert found == pytest.approx(-(shares * np.log(shares)).sum(), rel=1e-6)
    dice = plan_for(root, recipe, "loss='{name: dice, smooth: 1.0}'")
    assert 0 < task_of(dice, SETTINGS).constant_loss(data.train) < 1


# ---- runs


def go(folder, root, recipe, overrides="", stop=None, model="test_resnet", **settings):
    """(exit code, row, what was printed)."""
    job = Job(str(recipe), model, str(root), overrides=overrides)
    plan = plan_of(job)
    where = {"runs": folder / "runs", "results": folder / "results"}
    out = Console(file=io.StringIO(), width=140)
    made = make_settings("cpu", workers="0", **where, **settings)
    data = open_data(plan.profile, root)
    code, row = run_job(job, plan, made, data, out, stop or StopRequest())
    return code, row, out.file.getvalue()


@pytest.fixture(scope="module")
def finished(root, recipe, tmp_path_factory):
    folder = tmp_path_factory.mktemp("run")
    adam = "optimizer='{name: adamw, betas: [0.9, 0.99], eps: 1.0e-8, weight_decay: 0.01}'"
    average = "average='{name: ema, decay: 0.5, every_steps: 1}'"
    overrides = f"epochs=20 lr.peak=0.01 {adam} {average}"
    code, row, _ = go(folder, root, recipe, overrides, keep="best")
    assert code == 0
    return folder, row


def test_a_run_learns_and_its_row_has_the_tasks_scores(finished):
    folder, row = finished
    assert row.task == "segmentation" and row.top1_pct is None and row.top5_pct is None
    assert list(row.scores_pct) == ["mIoU_pct", "pixel_accuracy_pct"]
    assert tuple(row.class_pct) == CLASSES
    assert row.main_pct == row.scores_pct["mIoU_pct"] > 45  # 25 is what one class gives
    assert row.main_pct == pytest.approx(np.mean(list(row.class_pct.values())))
    assert len(row.score_by_epoch_pct) == 20 and row.score_by_epoch_pct[-1] == row.main_pct
    assert row.num_top1_by_epoch == () and 25 < row.majority_pct < 26
    assert row.best_epoch == 1 + row.score_by_epoch_pct.index(max(row.score_by_epoch_pct))
    assert row.other_top1_pct is not None and row.other_top1_pct != row.main_pct
    assert not [one for one in row.deviations if one.origin == "weights"]
    assert read_row(folder / "results", row.run) == row


def test_the_first_batch_is_shown_under_its_masks(root, recipe, tmp_path):
    plan = plan_for(root, recipe)
    task = task_of(plan, SETTINGS)
    batch = next(open_data(plan.profile, root).train_stream(plan, SETTINGS, 0))
    inputs, masks = task.prepare(batch)
    draw_first_batch(tmp_path / "a.png", inputs, masks, task, CLASSES)
    assert Image.open(tmp_path / "a.png").size[0] > 500
    [one, *_] = task.shown(
        np.full((1, 4, 4, 3), 0.5), torch.tensor([[[0, 0, 1, 255]] * 4]), CLASSES
    )
    assert one.title == "ground\nred"
    colours = one.picture.reshape(-1, 3)
    assert len(np.unique(colours, axis=0)) == 3 and (colours[3] == 0.5).all()


def test_tables_have_the_tasks_score(finished):
    _, row = finished
    assert value_of(row, METRICS["top1"]) == row.main_pct
    assert value_of(row, find_metric("pixel_accuracy")) == row.scores_pct["pixel_accuracy_pct"]
    assert find_metric("mIoU").label == "mIoU"
    with pytest.raises(UserError, match="mIoU"):
        find_metric("miu")


def rsb(*words):
    done = CliRunner().invoke(app, [str(word) for word in words])
    return done.exit_code, done.output


def test_commands_show_the_score_and_find_it_again(finished, tmp_path):
    folder, row = finished
    where = ("--runs", folder / "runs", "--results", folder / "results")
    code, text = rsb("runs", *where, "--json")
    [one] = [one for one in json.loads(text) if one["run"] == row.run]
    assert (one["score"], one["score_pct"]) == ("mIoU", row.main_pct) and code == 0
    code, text = rsb("eval", "--run", row.run, *where, "--device", "cpu")
    assert code == 0 and text.count(f"mIoU {row.main_pct:.4f} %") == 2
    code, text = rsb("verify", "--run", row.run, *where)
    assert code == 0, text


def test_predict_writes_masks_and_overlays(finished, root, tmp_path):
    folder, row = finished
    out = tmp_path / "found"
    words = ("predict", "--run", row.run, "--runs", folder / "runs", "--device", "cpu")
    words += ("--images", root / "images" / "val", "--out", out)
    code, text = rsb(*words)
    assert code == 0, text
    names = sorted(path.name for path in out.iterdir())
    assert names == [f"00{i}{end}" for i in range(4) for end in (".overlay.png", ".png")]
    hits = total = 0
    for i in range(4):
        mask = np.asarray(Image.open(root / "masks" / "val" / f"00{i}.png"))
        found = Image.open(out / f"00{i}.png")
        assert found.mode == "P" and found.size == mask.shape[::-1]
        hits += int((np.asarray(found) == mask)[mask != IGNORED].sum())
        total += int((mask != IGNORED).sum())
        assert Image.open(out / f"00{i}.overlay.png").mode == "RGB"
    # of the scored weights, the same answers as the last evaluation's
    assert 100 * hits / total == pytest.approx(row.scores_pct["pixel_accuracy_pct"], abs=1e-9)
    code, text = rsb(*words)
    assert code == 2 and "is there already" in text


@pytest.mark.parametrize("to", ["onnx", "torch_export"])
def test_an_exported_model_gives_the_scores_of_pixels(finished, root, tmp_path, to):
    """Of any number of squares the scores of the model; beside it what a user needs to know."""
    folder, row = finished
    out = tmp_path / "out"
    words = ("export", "--run", row.run, "--runs", folder / "runs", "--to", to, "--out", out)
    code, text = rsb(*words, "--images", root / "images" / "val", "--workers", "0")
    assert code == 0, text
    facts = json.loads((out / "preprocessing.json").read_text())
    assert facts["input"]["shape"] == ["batch", 3, 48, 48] and facts["crop_share"] == 1
    assert facts["output"]["shape"] == ["batch", 3, 48, 48] and facts["classes"] == list(CLASSES)
    found = json.loads((out / "export.json").read_text())["agreement"]
    assert found["num_images"] == 4 and found["num_answers"] == 4 * 48 * 48
    assert found["num_same"] + found["num_ties"] == found["num_answers"]
    assert found["max_difference"] < 1e-3
    run, model = FORMATS[to].engine(out / facts["file"]), open_model(folder / "runs" / row.run)
    for number in (1, 3):
        images = torch.randn(number, 3, 48, 48, generator=torch.Generator().manual_seed(number))
        with torch.no_grad():
            np.testing.assert_allclose(run(images.numpy()), model(images), rtol=0, atol=1e-3)
    card = (out / "README.md").read_text()
    assert f"mIoU {row.main_pct:.2f} %" in card and "image-segmentation" in card
    assert "diverged" not in card and "timm.create_model" not in card


def test_an_export_takes_the_size_of_the_windows_and_no_class_folders(finished, tmp_path):
    folder, row = finished
    copy = tmp_path / "runs" / row.run
    shutil.copytree(folder / "runs" / row.run, copy)
    path = copy / "recipe.yaml"
    path.write_text(
        path.read_text().replace("  name: segmentation\n", "  name: segmentation\n  window:\n"
                                 "    px: 32\n    stride_px: 16\n")
    )  # fmt: skip
    given = of_run(copy, with_maps=True)
    assert given.image.test_px == 32 and given.gives_maps
    words = ("export", "--run", row.run, "--runs", folder / "runs", "--to", "torch_export")
    code, text = rsb(*words, "--data", tmp_path)
    assert code == 2 and "data=" in text
    code, text = rsb("latency", "--run", row.run, "--runs", folder / "runs")
    assert code == 2 and "segmentation" in text


def test_a_stopped_run_resumes_to_the_same_bits(root, recipe, tmp_path, monkeypatch):
    _, straight, _ = go(tmp_path / "straight", root, recipe)
    stop = StopRequest()
    from trainer.engine import train

    step = train.optimizer_step

    def stopping(state, loader, number):
        if number == 3:
            stop.signal_name = "SIGUSR1"
        return step(state, loader, number)

    with monkeypatch.context() as patch:
        patch.setattr(train, "optimizer_step", stopping)
        code, row, _ = go(tmp_path / "stopped", root, recipe, stop=stop)
    assert (code, row) == (75, None)
    _, resumed, said = go(tmp_path / "stopped", root, recipe)
    assert "resumed after step 4" in said
    assert resumed.weights_sha256 == straight.weights_sha256
    assert resumed.scores_pct == straight.scores_pct
    lines = [folder / "runs" / straight.run / "metrics.jsonl" for folder in
             (tmp_path / "straight", tmp_path / "stopped")]  # fmt: skip
    assert lines[0].read_bytes() == lines[1].read_bytes()


@pytest.mark.drill
def test_killed_it_resumes_to_the_same_bits(root, recipe, tmp_path):
    killed = ROOT / "tests" / "support" / "killed.py"

    def end_of(name, *moment):
        words = ["train", "--recipe", recipe, "--model", "test_resnet", "--data", root, "--device"]
        words += ["cpu", "--workers", "2" if moment[1] == "3" else "0", "--checkpoint-s", "0"]
        words += ["--runs", tmp_path / name / "runs", "--results", tmp_path / name / "results"]
        path = os.pathsep.join((str(ROOT / "tests"), str(ROOT)))
        return subprocess.run(
            [sys.executable, killed, *moment, *map(str, words)],
            env=os.environ | {"PYTHONPATH": path},
            capture_output=True,
            text=True,
            timeout=600,
        )

    assert end_of("straight", "step", "99").returncode == 0
    assert end_of("killed", "step", "3").returncode == -signal.SIGKILL
    resumed = end_of("killed", "step", "99")
    assert resumed.returncode == 0, resumed.stderr
    rows = [
        next((tmp_path / name / "results" / "rows").iterdir()) for name in ("straight", "killed")
    ]
    first, second = (json.loads(path.read_text()) for path in rows)
    for key in ("weights_sha256", "scores_pct", "class_pct", "score_by_epoch_pct"):
        assert first[key] == second[key]


@pytest.mark.parametrize("window", ["", "task.window={px: 32, stride_px: 20}"])
def test_four_micro_batches_are_one_on_each_of_four_ranks(root, recipe, window):
    """Losses and weights in float64 to rounding; the counts of a shared pass to the last one."""
    given = str(root), str(recipe.parent), 2, window
    [alone], *_ = on_ranks(masked_steps, 1, *given), None
    shared = on_ranks(masked_steps, 4, *given)
    for found in shared:
        assert found["losses"] == pytest.approx(alone["losses"], rel=1e-9)
        for name, weight in found["weights"].items():
            torch.testing.assert_close(weight, alone["weights"][name], rtol=1e-7, atol=1e-9)
        counts = {name: one for name, one in found["scores"].items() if name != "loss_nats"}
        assert counts == {name: alone["scores"][name] for name in counts}
        assert found["scores"]["loss_nats"] == pytest.approx(alone["scores"]["loss_nats"], rel=1e-9)


def test_a_backbone_takes_weights_of_a_classifier(root, recipe, tmp_path):
    """Weights of a run on whole images: the backbone's are its, the heads are new, and the row
    claims nothing of a classifier.
    """
    import hashlib

    import safetensors.torch
    import timm

    given = timm.create_model("test_resnet", num_classes=7)
    path = tmp_path / "given.safetensors"
    safetensors.torch.save_file(given.state_dict(), path)
    digest = hashlib.sha256(path.read_bytes()).hexdigest()
    overrides = f"model.pretrained.file={path} model.pretrained.sha256={digest}"
    state = TrainingState(plan_for(root, recipe, overrides), SETTINGS)
    own = state.model.body.state_dict()
    assert own and all(torch.equal(own[name], given.state_dict()[name]) for name in own)
    assert not any(name.startswith("fc") for name in own)


def test_settings_that_read_no_masks_are_refused(root, recipe):
    plan = plan_for(root, recipe)
    with pytest.raises(UserError, match="loader=ffcv"):
        plan.recipe.task.check_settings(plan, dataclasses.replace(SETTINGS, loader="ffcv"))


def test_the_recipe_without_its_head_says_what_is_missing(root, tmp_path):
    path = write_recipe(tmp_path, RECIPE.replace("head: {name: fcn, dropout: 0.1}, ", ""))
    with pytest.raises(UserError, match="task"):
        plan_for(root, path)
