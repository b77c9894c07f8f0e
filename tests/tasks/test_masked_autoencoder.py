"""A masked autoencoder is the plain loop that its paper describes, whatever shares its work; its
encoder starts a classifier.
"""

import dataclasses
import hashlib
import io
import math
import os
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import safetensors.torch
import timm
import torch
from PIL import Image
from rich.console import Console
from typer.testing import CliRunner

from support.autoencoded import MODEL, RECIPE, autoencoded_steps, plan_for, write_recipe
from support.ranked import on_ranks
from trainer.base import streams
from trainer.base.errors import UserError
from trainer.base.settings import make_settings
from trainer.base.signals import StopRequest
from trainer.cli.main import app
from trainer.data.dataset import open_data
from trainer.distributed.communicator import alone
from trainer.engine import train
from trainer.engine.evaluate import evaluate
from trainer.engine.state import TrainingState
from trainer.models.build import build_model
from trainer.recipe.schema import load_recipe
from trainer.recipe.shipped import find_recipe
from trainer.runs.job import Job, plan_of, run_job
from trainer.runs.loggers.first_batch import draw_first_batch
from trainer.runs.results import read_row
from trainer.tasks import task_of
from trainer.tasks.masked_autoencoder.model import images_of, patches_of, sin_cos_positions

ROOT = Path(__file__).parents[2]
SETTINGS = make_settings("cpu", workers="0")
SHORT = "epochs=2 batch.images=60 batch.norm_images=30"


@pytest.fixture(scope="module")
def recipe(tmp_path_factory):
    return write_recipe(tmp_path_factory.mktemp("recipe"))


@pytest.fixture(scope="module")
def digits(recipe):
    return open_data(plan_for(recipe).profile, None)


# ---- masks, targets, loss


def plain_mask(seed, address, num_patches, num_hidden):
    """Hidden are the patches with the largest of so many uniform numbers."""
    drawn = streams.uniforms(seed, "hidden_patches", np.array([address]), num_patches)[0].tolist()
    largest = sorted(range(num_patches), key=lambda i: drawn[i])[num_patches - num_hidden :]
    return [i in largest for i in range(num_patches)]


def plain_patch(image, place, patch_px, side):
    """The pixels [C, px, px] of a patch, as a flat list: row, column, channel."""
    top, left = place // side * patch_px, place % side * patch_px
    return [
        float(image[channel, top + row, left + column])
        for row in range(patch_px)
        for column in range(patch_px)
        for channel in range(image.shape[0])
    ]


def plain_target(pixels):
    mean = sum(pixels) / len(pixels)
    variance = sum((each - mean) ** 2 for each in pixels) / (len(pixels) - 1)
    return [(each - mean) / math.sqrt(variance + 1e-6) for each in pixels]


def test_masks_targets_and_loss_are_those_of_a_plain_loop(recipe, digits):
    plan = plan_for(recipe, "batch.images=8 batch.norm_images=4", seed=3)
    task, state = task_of(plan, SETTINGS), TrainingState(plan, SETTINGS)
    batch = next(iter(digits.train_stream(plan, SETTINGS, 5)))
    inputs, is_hidden = task.prepare(batch)
    expected = [plain_mask(3, address, 64, 48) for address in batch.ids.tolist()]
    assert is_hidden.tolist() == expected and is_hidden.sum(1).tolist() == [48] * 4
    with torch.no_grad():
        found = state.model(inputs, is_hidden)
    total = count = 0
    for image, hidden, answers in zip(inputs, expected, found, strict=True):
        for place in range(64):
            if not hidden[place]:
                continue
            wanted = plain_target(plain_patch(image, place, 4, 8))
            pairs = zip(answers[place].tolist(), wanted, strict=True)
            total += sum((answer - want) ** 2 for answer, want in pairs) / 48
            count += 1
    loss = task.loss(state.model, inputs, is_hidden).item()
    assert loss == pytest.approx(total / count, 1e-5)


def test_the_encoder_sees_the_patches_that_are_not_hidden_alone(recipe):
    model = build_model(plan_for(recipe)).eval()
    image = torch.randn(1, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    is_hidden = torch.tensor([plain_mask(0, (1, 2, 3), 64, 48)])
    patches = patches_of(image, 4)
    other = images_of(torch.where(is_hidden[..., None], torch.randn(patches.shape), patches), 4)
    with torch.no_grad():
        assert torch.equal(model(image, is_hidden), model(other, is_hidden))
        assert not torch.equal(model(image, is_hidden), model(image, is_hidden.flip(1)))
    assert torch.equal(images_of(patches, 4), image)


def test_the_model_is_a_plain_loop_over_the_tokens(recipe):
    """Token by token, in the order of the patches, with timm's own blocks."""
    model = build_model(plan_for(recipe)).eval().double()
    body, decoder = model.body, model.decoder
    image = torch.randn(1, 3, 32, 32, dtype=torch.float64)
    hidden = plain_mask(0, (1, 2, 3), 64, 48)
    embedded = body.patch_embed(image)[0] + body.pos_embed[0, 1:]
    seen = [embedded[place] for place in range(64) if not hidden[place]]
    tokens = torch.stack([body.cls_token[0, 0] + body.pos_embed[0, 0], *seen])[None]
    for block in body.blocks:
        tokens = block(tokens)
    tokens = decoder.embed(body.norm(tokens))[0]
    rest = iter(tokens[1:])
    every = [
        (decoder.mask_token[0, 0] if hidden[place] else next(rest)) + decoder.positions[0, place]
        for place in range(64)
    ]
    found = torch.stack([tokens[0], *every])[None]
    for block in decoder.blocks:
        found = block(found)
    found = decoder.predict(decoder.norm(found))[:, 1:]
    torch.testing.assert_close(model(image, torch.tensor([hidden])), found)


def test_positions_and_first_weights_are_the_papers(recipe):
    model = build_model(plan_for(recipe))
    expected = np.zeros((64, 64))
    for place in range(64):
        for half, position in ((0, place % 8), (32, place // 8)):
            for i in range(16):
                angle = position / 10000 ** (i / 16)
                expected[place, half + i] = math.sin(angle)
                expected[place, half + 16 + i] = math.cos(angle)
    assert np.allclose(sin_cos_positions(8, 64).numpy(), expected, atol=1e-6)
    positions = model.body.pos_embed
    assert not positions.requires_grad and not positions[:, 0].any()
    assert np.allclose(positions[0, 1:].numpy(), expected, atol=1e-6)
    for layer in (model.body.blocks[0].attn.qkv, model.decoder.predict):
        bound = math.sqrt(6 / sum(layer.weight.shape))
        assert 0.95 * bound < layer.weight.abs().max() <= bound and not layer.bias.any()
    projection = model.body.patch_embed.proj.weight
    assert 0.95 < projection.abs().max() / math.sqrt(6 / (64 + 48)) <= 1
    assert model.decoder.mask_token.std().item() == pytest.approx(0.02, rel=0.5)


def test_scores_are_exact_however_the_batches_are_shared(recipe, digits):
    plan = plan_for(recipe)
    task, model = task_of(plan, SETTINGS), build_model(plan).eval()
    batches = list(digits.val_batches(plan, SETTINGS))
    whole = evaluate(plan, SETTINGS, model, batches)
    with torch.no_grad():
        parts = [task.evaluate(model, *batch) for batch in batches[::-1]]
    shared = task.scores((parts[0] + (parts[1] + parts[2])).tolist(), 360)
    assert shared == whole and task.restored(whole.record()) == whole
    total = spread = 0.0
    images, numbers = batches[-1]
    inputs = (images.double() / 255 - torch.tensor(plan.profile.mean).view(-1, 1, 1)) / (
        torch.tensor(plan.profile.std).view(-1, 1, 1)
    )
    masks = [plain_mask(0, (2**32 - 1, int(number)), 64, 48) for number in numbers]
    with torch.no_grad():
        found = model(inputs.float(), torch.tensor(masks))
    for image, hidden, answers in zip(inputs[:4], masks, found, strict=False):
        for place in (place for place in range(64) if hidden[place]):
            wanted = plain_target(plain_patch(image, place, 4, 8))
            pairs = zip(answers[place].tolist(), wanted, strict=True)
            total += sum((answer - want) ** 2 for answer, want in pairs) / 48 / 48
            spread += sum(want**2 for want in wanted) / 48 / 48
    sums = task.evaluate(model, images[:4], numbers[:4])
    assert (sums * 2.0**-20).tolist() == pytest.approx([total, spread], rel=1e-4)
    assert whole.main_pct == pytest.approx(0, abs=30) and whole.main_pct >= 0


def test_what_no_pass_gives_is_no_record(recipe):
    task = task_of(plan_for(recipe), SETTINGS)
    for record in (
        {"num_images": 0, "num_spread_units": 1, "loss_nats": 0.1},
        {"num_images": 4, "num_spread_units": -1, "loss_nats": 0.1},
        {"num_images": 4, "num_spread_units": 1, "loss_nats": -0.1},
    ):
        with pytest.raises(ValueError, match=r"."):
            task.restored(record)


# ---- what shares the work


def test_any_workers_give_the_same_batches(recipe, digits):
    plan = plan_for(recipe)
    found = []
    for workers in ("0", "2"):
        settings = make_settings("cpu", workers=workers)
        with digits.started_for(plan, settings, alone(), lambda line: None) as data:
            stream, task = data.train_stream(plan, settings, 0), task_of(plan, settings)
            found.append([task.prepare(next(stream)) for _ in range(5)])
    for one, other in zip(*found, strict=True):
        assert all(torch.equal(*pair) for pair in zip(one, other, strict=True))


def test_four_micro_batches_are_one_on_each_of_four_ranks(recipe):
    given = str(recipe.parent), 2
    [one] = on_ranks(autoencoded_steps, 1, *given)
    for found in on_ranks(autoencoded_steps, 4, *given):
        assert found["losses"] == pytest.approx(one["losses"], rel=1e-9)
        for name, weight in found["weights"].items():
            torch.testing.assert_close(weight, one["weights"][name], rtol=1e-6, atol=1e-8)
        assert found["scores"] == pytest.approx(one["scores"], rel=1e-6)


# ---- runs


def go(folder, recipe, overrides=SHORT, stop=None, model=MODEL):
    """(exit code, row, what was printed)."""
    job = Job(str(recipe), model, "digits", overrides=overrides)
    plan = plan_of(job)
    out = Console(file=io.StringIO(), width=160)
    where = {"runs": folder / "runs", "results": folder / "results"}
    settings = make_settings("cpu", workers="0", **where)
    data = open_data(plan.profile, None)
    code, row = run_job(job, plan, settings, data, out, stop or StopRequest())
    return code, row, out.file.getvalue()


@pytest.fixture(scope="module")
def finished(tmp_path_factory, recipe):
    folder = tmp_path_factory.mktemp("finished")
    code, row, _ = go(folder, recipe)
    assert code == 0
    return folder, row


def test_a_row_has_the_score_and_learns(finished):
    folder, row = finished
    again = read_row(folder / "results", row.run)
    assert again.task == "masked_autoencoder" and again.top1_pct is None
    assert again.scores_pct == {"explained_pct": row.main_pct} and row.main_pct > 0
    assert row.majority_pct is None and row.loss_nats < 1.5


def test_it_is_scored_again_and_shown(finished, tmp_path, recipe, digits):
    folder, row = finished
    where = ("--runs", str(folder / "runs"), "--results", str(folder / "results"))
    done = CliRunner().invoke(app, ["eval", "--run", row.run, *where, "--device", "cpu"])
    assert done.exit_code == 0, done.output
    image = tmp_path / "digit.png"
    Image.fromarray(np.asarray(digits.val.read(0))).save(image)
    words = ["predict", "--run", row.run, "--runs", str(folder / "runs"), "--device", "cpu"]
    words += ["--images", str(image), "--out", str(tmp_path / "found")]
    done = CliRunner().invoke(app, words)
    assert done.exit_code == 0, done.output
    picture = np.asarray(Image.open(tmp_path / "found" / "digit.png"))
    assert picture.shape == (32, 96, 3)
    before, seen, after = np.split(picture, 3, axis=1)
    is_grey = (seen == 128).all(2) | (seen == 127).all(2)
    assert 0.74 < is_grey.mean() <= 0.8 and np.array_equal(before[~is_grey], after[~is_grey])
    assert not np.array_equal(before, after)


def test_the_first_batch_shows_each_image_and_what_is_seen_of_it(recipe, digits, tmp_path):
    plan = plan_for(recipe)
    task = task_of(plan, SETTINGS)
    inputs, is_hidden = task.prepare(next(iter(digits.train_stream(plan, SETTINGS, 0))))
    draw_first_batch(tmp_path / "first.png", inputs, is_hidden, task, digits.classes)
    assert Image.open(tmp_path / "first.png").size[0] > 500
    pictures = np.ones((2, 32, 32, 3))
    shown = task.shown(pictures, is_hidden[:2], digits.classes)
    assert len(shown) == 4 and (shown[1].picture == 0.5).mean() == 0.75


def test_a_stopped_run_resumes_to_the_same_bits(recipe, finished, tmp_path, monkeypatch):
    straight, row = finished
    stop, step = StopRequest(), train.optimizer_step

    def stopping(state, loader, number):
        if number == 3:
            stop.signal_name = "SIGUSR1"
        return step(state, loader, number)

    with monkeypatch.context() as patch:
        patch.setattr(train, "optimizer_step", stopping)
        code, _, _ = go(tmp_path, recipe, stop=stop)
    assert code == 75
    _, resumed, said = go(tmp_path, recipe)
    assert "resumed after step 4" in said
    assert resumed.weights_sha256 == row.weights_sha256 and resumed.scores_pct == row.scores_pct
    lines = [each / "runs" / row.run / "metrics.jsonl" for each in (straight, tmp_path)]
    assert lines[0].read_bytes() == lines[1].read_bytes()


@pytest.mark.drill
def test_killed_it_resumes_to_the_same_bits_with_other_workers(recipe, finished, tmp_path):
    _, row = finished
    words = ["train", "--recipe", recipe, "--model", MODEL, "--data", "digits", "--device", "cpu"]
    words += ["--set", SHORT, "--checkpoint-s", "0", "--runs", tmp_path / "runs"]
    words += ["--results", tmp_path / "results"]

    def end_of(step, workers):
        killed = ROOT / "tests" / "support" / "killed.py"
        given = [killed, "step", step, *words, "--workers", workers]
        path = os.pathsep.join((str(ROOT / "tests"), str(ROOT)))
        return subprocess.run(
            [sys.executable, *map(str, given)],
            env=os.environ | {"PYTHONPATH": path},
            capture_output=True,
            text=True,
            timeout=300,
        )

    assert end_of("3", "2").returncode == -signal.SIGKILL
    done = end_of("99", "0")
    assert done.returncode == 0, done.stderr
    assert read_row(tmp_path / "results", row.run).weights_sha256 == row.weights_sha256


# ---- a classifier from its encoder

CLASSIFIER = """\
name: small-classifier
version: 1
title: "a small recipe for tests"
source: "none"
epochs: 1
batch: {images: 480, norm_images: 120}
lr: {peak: 0.001, updated: per_step, schedule: {name: cosine, end: 0.0, period: after_warmup}}
optimizer: {name: adamw, betas: [0.9, 0.999], eps: 1.0e-8, weight_decay: 0.05, no_decay: [vectors], layer_decay: 0.65}
loss: {name: ce}
augment:
  - {name: random_resized_crop, area: [0.2, 1.0], aspect: [0.75, 1.3333333333333333], interpolation: bicubic}
image: {train_px: 32, test_px: 32, test_crop_share: 1.0, test_interpolation: bicubic}
model: {pretrained: {head: new}}
"""


def test_a_classifier_takes_the_encoder_of_a_run(finished, tmp_path):
    folder, row = finished
    path = tmp_path / "small-classifier.v1.yaml"
    path.write_text(CLASSIFIER)
    where = ["--runs", str(folder / "runs"), "--results", str(folder / "results")]
    words = ["train", "--recipe", str(path), "--model", MODEL, "--data", "digits", "--weights"]
    words += [row.run, "--set", "epochs=1 batch.images=480 batch.norm_images=120", *where]
    done = CliRunner().invoke(app, [*words, "--device", "cpu", "--workers", "0"])
    assert done.exit_code == 0, done.output
    said = " ".join(done.output.split())
    assert "left out: decoder" in said and "random: head.bias, head.weight" in said
    weights = folder / "runs" / row.run / "model.safetensors"
    digest = hashlib.sha256(weights.read_bytes()).hexdigest()
    overrides = f"model.pretrained.file={weights} model.pretrained.sha256={digest}"
    model = build_model(plan_of(Job(str(path), MODEL, "digits", overrides=overrides)))
    encoder = {
        name: t
        for name, t in safetensors.torch.load_file(weights).items()
        if name.startswith("body.")
    }
    own = model.state_dict()
    assert {f"body.{name}" for name in own} - set(encoder) == {"body.head.weight", "body.head.bias"}
    for name, tensor in encoder.items():
        assert torch.equal(tensor, own[name.removeprefix("body.")]), name
    probe = build_model(plan_of(Job("linear-probe", MODEL, "digits", overrides=overrides)))
    trained = [name for name, weight in probe.named_parameters() if weight.requires_grad]
    assert trained == ["head.weight", "head.bias"]
    assert torch.equal(probe.blocks[3].mlp.fc2.weight, encoder["body.blocks.3.mlp.fc2.weight"])


def test_a_linear_probe_of_a_run_trains_its_classifier_alone(finished, tmp_path):
    """By its command, to a row: all other weights stay those of the encoder, to the bit."""
    folder, row = finished
    where = ["--runs", str(tmp_path / "runs"), "--results", str(tmp_path / "results")]
    weights = folder / "runs" / row.run
    words = ["train", "--recipe", "linear-probe", "--model", MODEL, "--data", "digits", "--weights"]
    short = "epochs=1 lr.peak=10 lr.schedule={name: constant}"
    words += [str(weights), "--set", short, *where]
    done = CliRunner().invoke(app, [*words, "--device", "cpu", "--workers", "0"])
    assert done.exit_code == 0, done.output
    [made] = (tmp_path / "runs").glob("linear-probe*/model.safetensors")
    before = safetensors.torch.load_file(weights / "model.safetensors")
    after = safetensors.torch.load_file(made)
    heads = {"head.weight", "head.bias"}
    assert heads < set(after)
    for name in set(after) - heads:
        assert torch.equal(after[name], before[f"body.{name}"]), name
    assert after["head.weight"].std() > 0.05  # from 0.01
    [path] = (tmp_path / "results" / "rows").iterdir()
    assert read_row(tmp_path / "results", path.stem).status == "finished"


def test_continued_from_a_classifier_the_encoder_is_its(recipe, tmp_path):

    given = timm.create_model(MODEL, num_classes=7)
    path = tmp_path / "given.safetensors"
    safetensors.torch.save_file(given.state_dict(), path)
    digest = hashlib.sha256(path.read_bytes()).hexdigest()
    overrides = f"model.pretrained.file={path} model.pretrained.sha256={digest}"
    body = build_model(plan_for(recipe, overrides)).body.state_dict()
    assert all(torch.equal(body[name], given.state_dict()[name]) for name in body)


# ---- what is refused


@pytest.mark.parametrize(
    ("overrides", "place"),
    [
        ("loss.name=ce", "loss"),
        ("smoothing=0.1", "smoothing"),
        ("image.test_px=64", "image.test_px"),
        ("task.patch_px=5", "image.train_px"),
        ("task.hidden_share=0.999", "task.hidden_share"),
        ("task.decoder.heads=3", "task.decoder.width"),
        ("model.start.head_std=0.1", "model.start"),
    ],
)
def test_what_does_not_fit_is_refused(recipe, overrides, place):
    with pytest.raises(UserError, match=place):
        plan_for(recipe, overrides)


def test_another_model_or_other_patches_are_refused_with_the_remedy(recipe):
    with pytest.raises(UserError, match="vit_base_patch16_224"):
        build_model(dataclasses.replace(plan_for(recipe), model="test_resnet"))
    with pytest.raises(UserError, match=r"task\.patch_px=4"):
        build_model(plan_for(recipe, "task.patch_px=8"))


def test_the_shipped_recipe_is_for_a_vit_base():
    page = load_recipe(find_recipe("mae-vit-base"))
    plan = plan_of(Job("mae-vit-base", "vit_base_patch16_224", "imagenet-1k"))
    assert page.task.numbers(plan) == (196, 147)
    with torch.device("meta"):
        body = timm.create_model("vit_base_patch16_224", num_classes=0)
    assert sum(weight.numel() for weight in body.parameters()) == 85_798_656


def test_the_recipe_of_the_tests_is_whole(recipe):
    assert load_recipe(recipe).task.hidden_share == 0.75 and "mse" in RECIPE
