"""One run from its plan to its row: what it leaves, what it says, how it ends."""

import dataclasses
import hashlib
import io
import json
import time
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import timm
import torch
from PIL import Image
from rich.console import Console

from support.plans import small_plan, small_set
from trainer.base.errors import DataError
from trainer.base.exits import EXIT_DIVERGED, EXIT_DONE, EXIT_STOPPED
from trainer.base.settings import make_settings
from trainer.base.signals import StopRequest
from trainer.data.dataset import open_data
from trainer.data.transforms import autocast, normalize
from trainer.engine import train
from trainer.engine.evaluate import evaluate, evaluate_all
from trainer.engine.state import Progress, Timer, TrainingState, algorithms_kept, set_algorithms
from trainer.models.build import build_model
from trainer.runs.export import weights_digest
from trainer.runs.job import Job, plan_of, run_job
from trainer.runs.plan_lines import batch_line, growth_line
from trainer.runs.rescore import rescore
from trainer.runs.results import read_row
from trainer.tasks import task_of


def go(folder: Path, plan=None, job=None, stopped=False):
    """Run a small plan in a folder: (exit code, row, what was printed, run folder); None where it
    is to be stopped.
    """
    job = job or Job(
        "A2", "test_resnet", overrides=small_set("batch.images=96 batch.norm_images=48")
    )
    plan = plan or plan_of(job)
    data = open_data(plan.profile, job.data_dir)
    settings = make_settings("cpu", workers="0", runs=folder / "runs", results=folder / "results")
    out = Console(file=io.StringIO(), width=140)
    with StopRequest() as stop:
        code, row = run_job(job, plan, settings, data, out, stop)
    if stopped:
        assert (code, row) == (EXIT_STOPPED, None)
        return None
    return code, row, out.file.getvalue(), settings.runs / row.run


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    return go(tmp_path_factory.mktemp("finished"))


def test_a_finished_run_leaves_a_whole_folder_and_a_row(finished):
    code, row, _printed, folder = finished
    assert code == EXIT_DONE and row.status == "finished"
    names = {path.name for path in folder.iterdir()}
    assert names >= {
        "recipe.yaml", "plan.json", "metrics.jsonl", "speed.jsonl", "log.txt",
        "checkpoints", "model.safetensors", "config.json", "row.json", "first_batch.png",
    }  # fmt: skip
    assert [name for name in names if name.startswith("events.out.tfevents")]
    stored = folder.parent.parent / "results" / "rows" / f"{row.run}.json"
    assert stored.read_bytes() == (folder / "row.json").read_bytes()
    assert read_row(folder.parent.parent / "results", row.run) == row
    assert (row.steps, row.epochs, row.num_val_images) == (2 * (1437 // 96), 2, 360)
    assert {change.path for change in row.deviations} >= {
        "epochs",
        "batch.images",
        "image.train_px",
    }


def test_a_row_has_the_median_step_of_its_speed_log(finished):
    _, row, _, folder = finished
    lines = [json.loads(line) for line in (folder / "speed.jsonl").read_text().splitlines()]
    steps_s = [96 / line["images_per_s"] for line in lines]
    assert row.step_s == pytest.approx(np.median(steps_s), rel=1e-3)
    first, third = np.quantile(steps_s, (0.25, 0.75))
    assert row.step_spread_share == pytest.approx((third - first) / row.step_s, abs=2e-3)
    assert row.load_per_core == pytest.approx(
        np.mean([line["load_per_core"] for line in lines]), abs=0.01
    )


def test_the_images_of_an_evaluation_are_decoded_once_for_all_weights():
    job = Job("A3", "test_resnet", overrides=small_set("batch.images=96 batch.norm_images=48"))
    plan, settings = plan_of(job), make_settings("cpu", workers="0")
    models = {name: build_model(plan).train(name == "model") for name in ("model", "average")}
    with torch.no_grad():
        next(models["average"].parameters()).mul_(-1)
    batches = [
        (torch.randint(0, 256, (size, 3, 32, 32), dtype=torch.uint8), torch.arange(size) % 10)
        for size in (7, 5)
    ]
    together = evaluate_all(plan, settings, models, iter(batches))
    assert together == {
        name: evaluate(plan, settings, model, iter(batches)) for name, model in models.items()
    }
    assert together["model"] != together["average"] and {
        scores.num_images for scores in together.values()
    } == {12}
    assert models["model"].training and not models["average"].training


def test_the_rows_score_is_the_last_evaluation_in_the_curves(finished):
    _, row, printed, folder = finished
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    last = [line for line in lines if "num_top1" in line][-1]
    assert row.top1_pct == 100 * last["num_top1"] / 360 == last["top1_pct"]
    assert f"{row.top1_pct:.2f} %" in printed
    # the rate of the last step, by the closed form: per epoch, so that of the second of two epochs
    rates = [line["lr"] for line in lines if "lr" in line]
    plan = plan_of(
        Job("A2", "test_resnet", overrides=small_set("batch.images=96 batch.norm_images=48"))
    )
    end, peak = plan.recipe.lr.schedule.end, plan.recipe.lr.peak
    assert rates[-1] == pytest.approx(end + (peak - end) / 2, rel=1e-12)


def test_timm_loads_the_folder_and_scores_the_same(finished):
    _, row, _, folder = finished
    model = timm.create_model(f"local-dir:{folder}", pretrained=True).eval()
    assert weights_digest(model) == row.weights_sha256
    plan = plan_of(Job("A2", "test_resnet", overrides=small_set()))
    val = open_data(plan.profile, None).val
    # timm's own transform, from the exported facts alone
    transform = timm.data.create_transform(
        **timm.data.resolve_data_config(model.pretrained_cfg), is_training=False
    )
    images = torch.stack([transform(val.read(i).convert("RGB")) for i in range(val.num_images)])
    with torch.no_grad():
        found = (model(images).argmax(1).numpy() == val.labels).sum()
    assert found == round(row.top1_pct * 3.6)


def test_eval_gives_the_rows_score_exactly(finished):
    _, row, _, folder = finished
    settings = make_settings("cpu", workers="0")
    stored, scores, digest = rescore(folder, settings, None)
    assert stored == row and digest == row.weights_sha256
    assert (scores.top1_pct, scores.top5_pct) == (row.top1_pct, row.top5_pct)
    assert scores.loss_nats == pytest.approx(row.loss_nats, rel=1e-6)


def test_the_same_command_finds_the_row_and_again_makes_a_new_one(finished):
    _, row, _, folder = finished
    base = folder.parent.parent
    code, found, printed, _ = go(base)
    assert (code, found) == (EXIT_DONE, row) and "already has a row" in printed
    job = Job(
        "A2", "test_resnet", overrides=small_set("batch.images=96 batch.norm_images=48"), again=True
    )
    code, second, _, _ = go(base, job=job)
    assert second.run == f"{row.run}-2" and second.weights_sha256 == row.weights_sha256


def test_the_resolved_page_runs_again_as_the_same_science(finished):
    _, row, _, folder = finished
    again = plan_of(Job(str(folder / "recipe.yaml"), "test_resnet"))
    assert again.run_name(row.data_fingerprint) == row.run and again.page_digest == row.digest
    assert {change.path for change in again.deviations} == {
        change.path for change in row.deviations
    }


@pytest.mark.parametrize("loss", [float("nan"), float("inf")])
def test_a_loss_that_is_no_number_ends_the_run_as_diverged(tmp_path, monkeypatch, loss):
    step = train.optimizer_step

    def spoilt(state, window, number):
        return step(state, window, number) + (loss if number == 7 else 0)

    monkeypatch.setattr(train, "optimizer_step", spoilt)
    code, row, printed, _ = go(tmp_path)
    assert code == EXIT_DIVERGED and row.status == "diverged" and row.steps == 10
    assert row.top1_pct is None and row.weights_sha256 is None
    assert "diverged" in printed
    code, found, _, _ = go(tmp_path)
    assert (code, found) == (EXIT_DIVERGED, row)


@pytest.mark.parametrize("loss", [float("nan"), float("inf")])
def test_a_validation_loss_that_is_no_number_ends_the_run_as_diverged(tmp_path, monkeypatch, loss):
    evaluate_all = train.evaluate_all

    def spoilt(*given):
        return {
            which: dataclasses.replace(scores, loss_nats=loss)
            for which, scores in evaluate_all(*given).items()
        }

    monkeypatch.setattr(train, "evaluate_all", spoilt)
    code, row, printed, folder = go(tmp_path)
    assert code == EXIT_DIVERGED and row.status == "diverged" and row.top1_pct is None
    assert "validation loss" in printed
    for line in (folder / "metrics.jsonl").read_text().splitlines():
        assert all(value == value for value in json.loads(line).values())


def test_a_run_that_goes_on_elsewhere_says_so_in_its_row(tmp_path, monkeypatch):
    with monkeypatch.context() as patch:
        patch.setattr(train, "evaluate_epoch", stop_after_the_first(train.evaluate_epoch))
        assert go(tmp_path, stopped=True) is None
    monkeypatch.setattr(
        "trainer.runs.run.machine_of",
        lambda settings: {"device": "another", "precision": "float32"},
    )
    _, row, printed, _ = go(tmp_path)
    assert row.bitwise is False and len(row.changes) == 1
    assert "-> another after step" in row.changes[0] and "-> another" in printed


def stop_after_the_first(evaluate_epoch):
    def evaluated(state, data, run):
        done = evaluate_epoch(state, data, run)
        if state.progress.evaluated_step:
            run.stop._note(15, None)
        return done

    return evaluated


def broken_folder(tmp_path, num_bad: int) -> Path:
    """Two classes of 100 noise images each for training, 4 for testing; some of the training files
    are cut short.
    """
    generator = np.random.default_rng(0)
    for split, number in (("train", 100), ("val", 4)):
        for name in ("cat", "dog"):
            (tmp_path / "set" / split / name).mkdir(parents=True)
            for place in range(number):
                path = tmp_path / "set" / split / name / f"{place:03d}.png"
                Image.fromarray(generator.integers(0, 256, (20, 24, 3), dtype=np.uint8)).save(path)
    for place in range(num_bad):
        path = tmp_path / "set" / "train" / "dog" / f"{place:03d}.png"
        path.write_bytes(path.read_bytes()[:100])
    return tmp_path / "set"


def folder_job(root: Path, bad_images: str) -> Job:
    small = small_set(
        "image.train_px=32 image.test_px=32 batch.images=40 batch.norm_images=20 repeats=null"
    )
    return Job(
        "A2",
        "test_resnet",
        data=str(root),
        data_dir=root,
        overrides=small + " lr.warmup_epochs=1",
        bad_images=bad_images,
    )


def test_a_bad_image_ends_the_run_by_name_or_is_replaced_and_counted(tmp_path):
    root = broken_folder(tmp_path, num_bad=2)  # of 200: 1 %
    with pytest.raises(DataError, match=r"00[01]\.png"):
        go(tmp_path, job=folder_job(root, "fail"))
    code, row, _, _ = go(tmp_path, job=folder_job(root, "skip"))
    assert (
        code == EXIT_DONE and row.num_replaced_images == 4
    )  # two bad images, once in each of two epochs
    again = go(tmp_path / "again", job=folder_job(root, "skip"))[1]
    assert again.weights_sha256 == row.weights_sha256


def test_more_than_one_percent_of_bad_images_is_refused(tmp_path):
    root = broken_folder(tmp_path, num_bad=8)
    with pytest.raises(DataError, match="more than 1 % of an epoch"):
        go(tmp_path, job=folder_job(root, "skip"))


def entering(plan, workers: int, first_step: int = 0, number: int = 50) -> list[str]:
    """SHA-256 of micro-batches and targets as they enter the model."""
    settings = make_settings("cpu", workers=str(workers))
    stream = open_data(plan.profile, None).train_stream(plan, settings, first_step)
    digests = []
    for _ in range(number):
        images, targets = task_of(plan, settings).prepare(next(stream))
        digests.append(
            hashlib.sha256(images.numpy().tobytes() + targets.numpy().tobytes()).hexdigest()
        )
    return digests


def test_what_enters_the_model_is_the_same_for_any_number_of_workers():
    plan = small_plan("A1")
    assert plan.steps_per_epoch == 44 and plan.num_micro_batches == 4
    alone = entering(plan, 0)
    assert entering(plan, 1) == alone and entering(plan, 4) == alone
    assert len(set(alone)) == 50
    # the second epoch shows the images otherwise; from its own first step, without making the first
    assert not set(entering(plan, 0, first_step=44)) & set(alone)
    assert entering(plan, 0, first_step=2, number=8) == alone[8:16]


def test_normalizing_is_the_closed_form():
    plan = small_plan()
    images = torch.arange(256, dtype=torch.uint8).view(1, 1, 16, 16).expand(1, 3, 16, 16)
    mean, std = (
        np.array(values).reshape(1, 3, 1, 1) for values in (plan.profile.mean, plan.profile.std)
    )
    expected = (images.numpy().astype(np.float64) / 255 - mean) / std
    np.testing.assert_allclose(normalize(images, plan.profile).numpy(), expected, atol=1e-6)


def test_accumulated_gradients_equal_those_of_the_whole_step():
    """Norm-free of the batch (LayerNorm), unequal micro-batches included: 1437 = 14 x 100 + 37."""
    grads = {}
    for norm_images in (100, 25):
        plan = small_plan(
            "torchvision-v1",
            "test_convnext",
            f"batch.images=100 batch.norm_images={norm_images} optimizer.weight_decay=0.0",
        )
        settings = make_settings("cpu", workers="0")
        state = TrainingState(plan, settings)
        before = {name: weight.clone() for name, weight in state.model.named_parameters()}
        stream = open_data(plan.profile, None).train_stream(plan, settings, 14)
        assert plan.window_images(14) == 37
        train.optimizer_step(state, stream, 14)
        grads[norm_images] = {
            name: before[name] - weight for name, weight in state.model.named_parameters()
        }
    scale = max(grad.abs().max() for grad in grads[100].values())
    for name, grad in grads[100].items():
        torch.testing.assert_close(grads[25][name], grad, rtol=0, atol=1e-5 * scale.item())


JSD = (
    "mix=null repeats=null augment_splits=3 'loss={name: jensen_shannon, weight: 12, loss: {name:"
    " ce}}'"
)
GROWTH = (
    "'image.growth={from_px: 24, from_epoch: 0.5, to_epoch: 1.5, multiple_px: 4, updated:"
    " per_step}'"
)


def test_splits_enter_the_model_one_after_another_the_plain_one_first():
    plan = small_plan("A2", overrides=f"{JSD} smoothing=0.1")
    settings = make_settings("cpu", workers="0")
    batch = next(open_data(plan.profile, None).train_stream(plan, settings, 0))
    images, targets = task_of(plan, settings).prepare(batch)
    assert images.shape == (24, 3, 32, 32) and targets.shape == (8, 10)
    assert torch.equal(images[:8], normalize(batch.images, plan.profile))
    assert torch.equal(targets.argmax(1), batch.labels) and targets.max() == pytest.approx(0.91)
    plain, first, second = images.split(8)
    changed = [
        [not torch.equal(a, b) for a, b in zip(*pair, strict=False)]
        for pair in ((plain, first), (plain, second), (first, second))
    ]
    assert all(sum(pair) >= 4 for pair in changed)


def test_a_mirrored_evaluation_adds_the_logits():
    plan = small_plan(overrides="image.test_flip=true loss.name=ce")
    settings = make_settings("cpu", workers="0")
    torch.manual_seed(0)
    model = timm.create_model("test_resnet", num_classes=10).eval()
    data = open_data(plan.profile, None)
    logits, labels = [], []
    with torch.no_grad():
        for images, of_images in data.val_batches(plan, settings):
            images = normalize(images, plan.profile)
            logits.append(model(images) + model(images.flip(3)))
            labels.append(of_images)
    logits, labels = torch.cat(logits), torch.cat(labels)
    scores = evaluate(plan, settings, model, data.val_batches(plan, settings))
    assert scores.num_top1 == (logits.argmax(1) == labels).sum()
    assert scores.loss_nats == pytest.approx(
        torch.nn.functional.cross_entropy(logits, labels).item(), rel=1e-5
    )
    plain = small_plan(overrides="loss.name=ce")
    assert (
        evaluate(plain, settings, model, data.val_batches(plan, settings)).loss_nats
        != scores.loss_nats
    )


@pytest.mark.drill
def test_growing_images_of_splits_go_on_where_a_stop_left_them(tmp_path, monkeypatch):
    sgd = (
        "'optimizer={name: decoupled_sgd, momentum: 0.9, weight_decay: 0.0005, clip_adaptive: 0.1}'"
    )
    overrides = small_set(
        f"{JSD} {GROWTH} {sgd} batch.images=96 batch.norm_images=48 lr.warmup_epochs=1 epochs=2"
    )
    job = Job("A2", "test_resnet", overrides=overrides)
    plan = plan_of(job)
    assert [plan.train_px_at(step) for step in (0, plan.steps_per_epoch, plan.num_steps - 1)] == [
        24,
        28,
        32,
    ]
    assert batch_line(plan).endswith("x 48 images x 3 splits")
    assert growth_line(plan).startswith(
        "24 px from step 0, 28 px from step 11 (epoch 0.7857), 32 px from step 18"
    )
    _, straight, _, _ = go(tmp_path / "straight", job=job)
    with monkeypatch.context() as patch:
        patch.setattr(train, "evaluate_epoch", stop_after_the_first(train.evaluate_epoch))
        go(tmp_path / "halted", job=job, stopped=True)
    _, resumed, _, _ = go(tmp_path / "halted", job=job)
    assert (
        resumed.weights_sha256 == straight.weights_sha256 and resumed.top1_pct == straight.top1_pct
    )


def test_the_share_of_waiting_is_of_the_time_of_training(monkeypatch):
    """Each look at the clock is a second later; the first micro-batch is taken to be looked at."""
    seconds = iter(range(100))
    monkeypatch.setattr(time, "perf_counter", lambda: float(next(seconds)))
    progress = Progress()
    timer = Timer(progress)
    stream = timer.batches(iter("abc"))
    next(stream)
    for _ in range(2):
        with timer:  # four looks at the clock, two of them around a wait
            next(stream)
        progress.num_seen += 30
    assert timer.restart() == (60 / 6, 2 / 6)


def test_compiling_is_no_training_time(monkeypatch):
    """Of two steps the first takes 100 s to compile: each has 3 s of its own."""
    now = [0.0]
    monkeypatch.setattr(time, "perf_counter", lambda: now[0])
    compiled, progress = SimpleNamespace(seconds=0.0), Progress()
    timer = Timer(progress, compiled)
    for compile_s in (100.0, 0.0):
        with timer:
            now[0] += 3 + compile_s
            compiled.seconds += compile_s
        progress.num_seen += 30
    assert (progress.train_s, progress.compile_s) == (6, 100)
    assert timer.restart()[0] == 60 / 6


@pytest.mark.parametrize("precision", ["float32", "tf32", "bf16"])
def test_float32_on_a_gpu_is_float32_unless_less_is_asked_for(precision):
    settings = replace(make_settings("cpu", workers="0"), device="cuda:0", precision=precision)
    backends = torch.backends
    before = backends.cudnn.allow_tf32, backends.cuda.matmul.allow_tf32, backends.cudnn.benchmark
    with algorithms_kept():
        set_algorithms(settings)
        found = {backends.cudnn.allow_tf32, backends.cuda.matmul.allow_tf32}
        assert found == {precision == "tf32"}
        assert autocast(settings).fast_dtype == (
            torch.bfloat16 if precision == "bf16" else torch.float32
        )
    after = backends.cudnn.allow_tf32, backends.cuda.matmul.allow_tf32, backends.cudnn.benchmark
    assert after == before
