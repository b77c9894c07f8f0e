"""Images of one channel and of many: from the files to the row, the exported model and the
picture.
"""

import io
import json
from types import SimpleNamespace

import numpy as np
import pytest
import timm
import torch
from matplotlib import image as pictures
from PIL import Image
from rich.console import Console

from trainer.base.errors import UserError
from trainer.base.exits import EXIT_DONE
from trainer.base.settings import make_settings
from trainer.base.signals import StopRequest
from trainer.components.crops import Flip, RandomResizedCrop
from trainer.data.dataset import open_data
from trainer.data.datasets.builtin import open_set
from trainer.data.evaluation import EvaluationStream
from trainer.data.loader import TrainStream
from trainer.data.profile import find_profile
from trainer.runs import summary as show
from trainer.runs.job import Job, plan_of, run_job
from trainer.runs.loggers.first_batch import draw_first_batch
from trainer.runs.rescore import rescore
from trainer.runs.run_folder import open_model
from trainer.tasks import Classification

CROP = RandomResizedCrop(area=(0.3, 1.0), aspect=(0.75, 1.3333), interpolation="random")
SHORT = (
    "epochs=2 lr.warmup_epochs=null lr.warmup_from=null batch.images=8 batch.norm_images=4 "
    "image.train_px=32 image.test_px=32"
)


@pytest.fixture
def bands(tmp_path):
    """Write a folder of 12 + 12 and 3 + 3 images in two classes and its profile: bands(4) gives
    (profile, folder).
    """

    def make(channels, as_png=False):
        root = tmp_path / ("png" if as_png else "npy")
        rng = np.random.default_rng(channels)
        for split, num_images in (("train", 12), ("val", 3)):
            for label, name in enumerate(("dark", "light")):
                folder = root / split / name
                folder.mkdir(parents=True)
                for i in range(num_images):
                    pixels = rng.integers(
                        100 * label, 156 + 100 * label, (40, 44, channels), dtype=np.uint8
                    )
                    if as_png:
                        Image.fromarray(pixels).save(folder / f"{i}.png")
                    else:
                        np.save(folder / f"{i}.npy", pixels)
        page = tmp_path / f"bands{channels}.yaml"
        page.write_text(
            f"name: bands\nnum_classes: 2\nnum_train: 24\nnum_val: 6\nchannels: {channels}\n"
            f"mean: {[round(0.4 + 0.01 * c, 2) for c in range(channels)]}\n"
            f"std: {[0.25] * channels}\n"
        )
        return page, root

    return make


def go(tmp_path, page, root):
    """Run two epochs of it: (row, run folder, what was printed, plan)."""
    job = Job("A2", "test_resnet", str(page), root, overrides=SHORT)
    plan = plan_of(job)
    settings = make_settings(
        "cpu", workers="0", runs=tmp_path / "runs", results=tmp_path / "results"
    )
    console = Console(file=io.StringIO(), width=200)
    with StopRequest() as stop:
        show.plan_in_brief(console, plan, settings)
        code, row = run_job(job, plan, settings, open_data(plan.profile, root), console, stop)
    assert code == EXIT_DONE
    return row, settings.runs / row.run, console.file.getvalue(), plan


@pytest.mark.parametrize("channels", [1, 4])
def test_a_run_goes_from_arrays_to_a_row_and_its_model_scores_the_same(tmp_path, bands, channels):
    page, root = bands(channels)
    row, folder, printed, plan = go(tmp_path, page, root)
    assert (row.status, row.steps, row.num_val_images) == ("finished", 6, 6)
    assert f"note: rand_augment leaves out color for {channels}-channel images" in printed
    stored, scores, _ = rescore(folder, make_settings("cpu", workers="0"), root)
    assert stored == row and scores.top1_pct == row.top1_pct
    assert scores.loss_nats == pytest.approx(row.loss_nats, rel=1e-6)
    facts = json.loads((folder / "config.json").read_text())["pretrained_cfg"]
    assert facts["input_size"] == [channels, 32, 32]
    assert (tuple(facts["mean"]), tuple(facts["std"])) == (plan.profile.mean, plan.profile.std)
    assert pictures.imread(folder / "first_batch.png").std() > 0
    # from timm and the files alone
    model = timm.create_model(f"local-dir:{folder}", pretrained=True).eval()
    arrays = np.stack([np.load(path) for path in sorted((root / "val").glob("*/*.npy"))])
    mean, std = (torch.tensor(facts[key]).view(1, -1, 1, 1) for key in ("mean", "std"))
    short_px = int(32 / plan.recipe.image.test_crop_share)
    squares = [
        [plane_square(array[:, :, c], short_px) for c in range(channels)] for array in arrays
    ]
    images = (torch.tensor(np.array(squares)).float() / 255 - mean) / std
    with torch.no_grad():
        logits = model(images)
        torch.testing.assert_close(open_model(folder)(images), logits)
    assert 100 * (logits.argmax(1).tolist() == np.repeat([0, 1], 3)).mean() == pytest.approx(
        row.top1_pct
    )


def plane_square(plane, short_px):
    """One channel resized by its shorter side of 40 of 44 px, its central 32 kept."""
    image = Image.fromarray(plane).resize(
        (int(short_px * 44 / 40), short_px), Image.Resampling.BICUBIC
    )
    left, top = (round((side - 32) / 2) for side in image.size)
    return np.asarray(image.crop((left, top, left + 32, top + 32)))


def test_arrays_of_three_channels_are_the_same_bytes_as_pngs(bands):
    batches = []
    for as_png in (False, True):
        page, root = bands(3, as_png)
        profile = find_profile(str(page))
        stream = TrainStream(
            open_set(profile, root, "train"), 1, (CROP, Flip()), 24, 1, 8, 1, 3, False, "fail"
        )
        shown = [batch.images for batch in stream.batches(0, 3, 0, "cpu")]
        stream = EvaluationStream(open_set(profile, root, "val"), 24, 0.9, "bicubic", 4)
        shown += [stream[number][0] for number in range(len(stream))]
        batches.append(shown)
    assert len(batches[0]) == 5 and all(map(torch.equal, *batches))


@pytest.mark.parametrize("channels", [1, 2, 6])
def test_the_loader_gives_the_profiles_channels_in_their_order(bands, channels):
    page, root = bands(channels)
    images = open_set(find_profile(str(page)), root, "val")
    whole = CROP.model_copy(update={"area": (1.0, 1.0), "aspect": (1.1, 1.1)})  # all of 44 x 40
    stream = TrainStream(images, 1, (whole,), 20, 1, 6, 1, 1, False, "fail")
    (batch,) = stream.batches(0, 1, 0, "cpu")
    evaluated, _ = EvaluationStream(images, 20, 1.0, "bilinear", 6)[0]
    assert batch.images.shape == evaluated.shape == (6, channels, 20, 20)
    _, is_bicubic = whole.draw(1, batch.ids.numpy(), np.full(6, 40), np.full(6, 44))
    for image, (_, i, _), bicubic in zip(batch.images, batch.ids.tolist(), is_bicubic, strict=True):
        array = np.load(images.index.path(i))
        filtering = Image.Resampling.BICUBIC if bicubic else Image.Resampling.BILINEAR
        expected = [
            np.asarray(Image.fromarray(array[:, :, c]).resize((20, 20), filtering))
            for c in range(channels)
        ]
        assert np.array_equal(image.numpy(), np.stack(expected))


def test_a_grey_run_sees_what_a_colour_run_sees_once():
    seen = []
    for name in ("digits", "digits-grey"):
        stream = TrainStream(
            open_set(find_profile(name), None, "train"),
            1,
            (CROP, Flip()),
            24,
            1,
            64,
            1,
            23,
            False,
            "fail",
        )
        seen.append(next(stream.batches(0, 1, 0, "cpu")).images)
    assert seen[1].shape == (64, 1, 24, 24) and torch.equal(seen[0], seen[1].expand(-1, 3, -1, -1))


def test_a_folder_of_other_channels_than_the_profiles_stops_in_one_line(bands):
    _, root = bands(4)
    plan = plan_of(
        Job("A2", "test_resnet", str(root), overrides=SHORT)
    )  # the folder itself: three channels
    stream = open_data(plan.profile, root).train_stream(plan, make_settings("cpu", workers="0"), 0)
    with pytest.raises(
        UserError, match=r"\.npy: channels: 4, where the profile has 3; use .*"
    ) as refused:
        next(stream)
    assert "\n" not in str(refused.value)


@pytest.mark.parametrize(("channels", "is_grey"), [(1, True), (2, True), (3, False), (5, False)])
def test_pictures_show_any_number_of_channels(tmp_path, channels, is_grey):
    class Facts:
        mean, std = (0.5,) * channels, (0.25,) * channels

    images = torch.randn(3, channels, 8, 8, generator=torch.Generator().manual_seed(0))
    task = Classification(SimpleNamespace(profile=Facts), None)
    draw_first_batch(tmp_path / "a.png", images, torch.eye(3), task, ["a", "b", "c"])
    drawn = pictures.imread(tmp_path / "a.png")[..., :3]
    assert (np.ptp(drawn, axis=2).max() < 0.02) == is_grey and drawn.std() > 0


@pytest.mark.parametrize(("data", "is_noted"), [("digits", False), ("digits-grey", True)])
def test_plans_say_what_is_left_out(data, is_noted):
    console = Console(file=io.StringIO(), width=200)
    plan = plan_of(Job("A2", "test_resnet", data))
    show.plan_in_brief(console, plan, make_settings("cpu", workers="0"))
    assert (
        "note: rand_augment leaves out color for 1-channel images" in console.file.getvalue()
    ) == is_noted
