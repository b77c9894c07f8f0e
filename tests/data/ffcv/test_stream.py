"""ffcv's micro-batches against the torch loader's: the same bytes, and no hang."""

import itertools

import numpy as np
import pytest
import torch

import support.requires_ffcv  # noqa: F401 - skips where ffcv is not built
from trainer.base.errors import UserError
from trainer.components.crops import Flip, RandomResizedCrop
from trainer.components.erasing import RandomErasing
from trainer.components.rand_augment import RandAugment
from trainer.components.sampling import Balanced
from trainer.data.dataset import open_data
from trainer.data.datasets.beton import beton_file, open_beton
from trainer.data.datasets.builtin import FolderSet, open_set
from trainer.data.decode import BadImage
from trainer.data.evaluation import EvaluationStream
from trainer.data.ffcv import loader as ffcv_loader
from trainer.data.ffcv.beton_writer import Storage, write_beton
from trainer.data.ffcv.stream import FfcvStream, boxes_in
from trainer.data.index import open_index
from trainer.data.loader import TrainStream
from trainer.data.profile import find_profile
from trainer.recipe.assignment import Assignment
from trainer.recipe.profiles import PROFILES
from trainer.recipe.sections import Growth

CROP = RandomResizedCrop(area=(0.08, 1.0), aspect=(0.75, 1.3333), interpolation="random")
ERASING = RandomErasing(share=0.5, area=(0.02, 0.3), aspect=(0.3, 3.3), fill="noise")
RAND_AUGMENT = RandAugment(num_ops=2, op_share=0.5, magnitude=7.0, interpolation="random")
AUGMENTED = {"augment": (CROP, RAND_AUGMENT), "fill": (9, 99, 199)}
GROWTH = Growth(from_px=16, from_epoch=0.5, to_epoch=1.5, multiple_px=4, updated="per_step")


@pytest.fixture
def photos(make_folder):
    """23 training photos and a .beton beside them in which half lie as they came, the others
    plainly.
    """
    root = make_folder(train={"cat": 12, "dog": 11}, val={"cat": 3, "dog": 2})
    for split in ("train", "val"):
        write_beton(
            FolderSet(open_index(root, split)), root, split, find_profile(str(root)), Storage()
        )
    return root


def stream_of(kind, image_set, **changes):
    choices = dict(
        image_set=image_set,
        seed=3,
        augment=(CROP, Flip(), RAND_AUGMENT, ERASING),
        train_px=32,
        repeats=1,
        batch_images=8,
        num_micro_batches=2,
        drop_last=False,
        bad_images="fail",
    )
    choices |= changes
    return kind(**choices, steps_per_epoch=-(-image_set.num_images // choices["batch_images"]))


def assert_same(ours, theirs):
    """Two streams' micro-batches, in all that they hold."""
    pairs = list(itertools.zip_longest(ours, theirs))
    assert pairs and all(first is not None and second is not None for first, second in pairs)
    for first, second in pairs:
        assert (first.step, first.micro_batch, first.num_replaced) == (
            second.step,
            second.micro_batch,
            second.num_replaced,
        )
        for one, other in zip(
            (first.images, first.labels, first.ids),
            (second.images, second.labels, second.ids),
            strict=False,
        ):
            assert one.dtype == other.dtype and torch.equal(one, other)
        for one, other in zip(first.drawn, second.drawn, strict=True):
            assert one.keys() == other.keys() and all(
                torch.equal(one[key], other[key]) for key in one
            )


@pytest.mark.parametrize(
    ("changes", "first_step", "num_threads"),
    [
        ({}, 0, 1),
        ({"repeats": 3, "num_micro_batches": 4}, 2, 2),
        ({"growth": GROWTH}, 1, 2),
        ({"assigned": Assignment(1, 2)}, 0, 1),
        ({"assigned": Assignment(1, 2, 1, 2)}, 0, 1),
        ({"repeats": 3, "num_micro_batches": 4, "assigned": Assignment(1, 2)}, 1, 2),
        (AUGMENTED | {"repeats": 3, "num_micro_batches": 4}, 1, 2),
        (AUGMENTED | {"repeats": 5, "num_micro_batches": 1}, 0, 3),
        ({"num_splits": 3, "augment": (CROP, RAND_AUGMENT), "fill": (9, 99, 199)}, 3, 1),
        ({"sampling": Balanced(), "epochs": 2}, 1, 2),
        ({"sampling": Balanced(), "epochs": 2, "repeats": 3, "num_micro_batches": 4}, 2, 2),
    ],
)  # fmt: skip
def test_micro_batches_are_the_torch_loaders_from_any_step_on_any_threads(
    photos, changes, first_step, num_threads
):
    """Over the border of two epochs, whose last step holds seven images."""
    ours = stream_of(TrainStream, FolderSet(open_index(photos, "train")), **changes).batches(
        first_step, 6, 0, "cpu"
    )
    theirs = stream_of(FfcvStream, open_beton(photos, "train", 3), **changes).batches(
        first_step, 6, num_threads, "cpu"
    )
    assert_same(ours, theirs)


def test_one_channel_and_torchs_threads(tmp_path):
    digits = open_set(PROFILES["digits-grey"], None, "val")
    write_beton(digits, tmp_path, "train", PROFILES["digits-grey"])
    kept = torch.get_num_threads()
    torch.set_num_threads(2)
    theirs = list(stream_of(FfcvStream, open_beton(tmp_path, "train", 1)).batches(40, 48, 1, "cpu"))
    assert torch.get_num_threads() == 2
    torch.set_num_threads(kept)
    assert theirs[0].images.shape[1:] == (1, 32, 32)
    assert_same(stream_of(TrainStream, digits).batches(40, 48, 0, "cpu"), theirs)


def test_boxes_on_shrunk_images_are_the_drawn_ones_to_half_a_pixel(photos, tmp_path):
    images = FolderSet(open_index(photos, "train"))
    write_beton(
        images,
        tmp_path,
        "train",
        find_profile(str(photos)),
        Storage(max_side_px=25, jpeg_share=0.0),
    )
    found, places = open_beton(tmp_path, "train", 3), np.arange(23)
    ids = np.stack([np.zeros(23, int), places, places % 3], axis=1)
    boxes, is_bicubic = boxes_in(found, CROP, 3, ids, places)
    drawn, also_bicubic = CROP.draw(3, ids, *found.source_sides(places))
    scale = np.stack(found.sides(places), 1) / np.stack(found.source_sides(places), 1)
    assert (scale <= 1).all() and (scale < 0.7).any() and np.array_equal(is_bicubic, also_bicubic)
    assert np.abs(boxes[:, :2] - drawn[:, :2] * scale).max() <= 0.5
    assert np.abs(boxes[:, :2] + boxes[:, 2:] - (drawn[:, :2] + drawn[:, 2:]) * scale).max() <= 0.5
    batch = next(stream_of(FfcvStream, found).batches(0, 1, 1, "cpu"))
    assert torch.equal(batch.ids, next(stream_of(TrainStream, images).batches(0, 1, 0, "cpu")).ids)


def damage(photos, i: int) -> None:
    """Write zeros over the second half of an image's bytes."""
    found = open_beton(photos, "train", 3)
    place, size = int(found.samples["image"]["data_ptr"][i]), int(found.places["size"][i])
    with open(found.path, "r+b") as file:
        file.seek(place + size // 2)
        file.write(bytes(size - size // 2))


def taken_until_refused(batches) -> list[tuple[int, int]]:
    """(step, micro-batch) of those that come before a bad image."""
    seen = []
    with pytest.raises(BadImage, match="image 5 is damaged"):
        seen.extend((batch.step, batch.micro_batch) for batch in batches)
    return seen


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"repeats": 3, "num_micro_batches": 4},
        {"augment": (CROP, RAND_AUGMENT), "fill": (9, 99, 199)},
    ],
)
def test_a_damaged_image_ends_the_run_or_is_replaced_as_the_torch_loader_does(photos, changes):
    damage(photos, 5)
    found = open_beton(photos, "train", 3)
    ours, theirs = (
        stream_of(kind, found, **changes).batches(0, 30, 1, "cpu")
        for kind in (TrainStream, FfcvStream)
    )
    assert taken_until_refused(ours) == taken_until_refused(theirs)
    ours, theirs = (
        list(stream_of(kind, found, bad_images="skip", **changes).batches(0, 30, 1, "cpu"))
        for kind in (TrainStream, FfcvStream)
    )
    assert sum(batch.num_replaced for batch in theirs) > 0
    assert_same(ours, theirs)


def test_turbojpegs_own_word_is_heard(photos, monkeypatch):
    """Without the look at CRC-32s: the decoder's return code alone finds a JPEG that ends early."""
    damage(photos, 5)
    monkeypatch.setattr(FfcvStream, "_is_damaged", lambda self, shown: np.zeros(len(shown), bool))
    with pytest.raises(BadImage, match="image 5 is damaged"):
        list(stream_of(FfcvStream, open_beton(photos, "train", 3)).batches(0, 3, 1, "cpu"))


def test_an_exception_in_ffcvs_thread_is_raised_and_not_waited_for(photos, monkeypatch):
    def rows(self, ids, shown, side, real=FfcvStream.rows):
        if ids[0, 0] == 1:
            raise ZeroDivisionError("in its thread")
        return real(self, ids, shown, side)

    monkeypatch.setattr(FfcvStream, "rows", rows)
    batches, seen = (
        stream_of(FfcvStream, open_beton(photos, "train", 3)).batches(0, 6, 1, "cpu"),
        [],
    )
    with pytest.raises(ZeroDivisionError, match="in its thread"):
        seen.extend(batch.step for batch in batches)
        seen.extend(batches)


def test_a_thread_that_ends_without_a_word_is_not_waited_for(photos, monkeypatch):
    monkeypatch.setattr(ffcv_loader._Batches, "run", lambda self: None)
    with pytest.raises(RuntimeError, match="thread has ended"):
        next(stream_of(FfcvStream, open_beton(photos, "train", 3)).batches(0, 1, 1, "cpu"))


def test_evaluation_images_from_the_beton_are_the_folders(photos):
    folder, found = FolderSet(open_index(photos, "val")), open_beton(photos, "val", 3)
    ours, theirs = (EvaluationStream(images, 32, 0.95, "bicubic", 4) for images in (folder, found))
    for number in range(len(ours)):
        assert all(
            torch.equal(one, other) for one, other in zip(ours[number], theirs[number], strict=True)
        )


@pytest.mark.drill
def test_a_run_ends_in_the_same_weights_whoever_reads(tmp_path):
    from rich.console import Console

    from support.plans import small_plan
    from trainer.base.settings import make_settings
    from trainer.base.signals import StopRequest
    from trainer.runs.job import Job, run_job

    plan = small_plan(overrides="epochs=1 batch.images=128 batch.norm_images=32")
    for split in ("train", "val"):
        write_beton(open_set(plan.profile, None, split), tmp_path, split, plan.profile)
    rows = {}
    for loader in ("torch", "ffcv"):
        settings = make_settings(
            "cpu", workers="0", loader=loader, runs=tmp_path / loader, results=tmp_path / loader
        )
        data = open_data(
            plan.profile, tmp_path if loader == "ffcv" else None, in_beton=loader == "ffcv"
        )
        with StopRequest() as stop:
            _, rows[loader] = run_job(
                Job("A2", "test_resnet"), plan, settings, data, Console(quiet=True), stop
            )
    assert rows["ffcv"].loader == "ffcv" and rows["torch"].loader == "torch"
    assert rows["ffcv"].run == rows["torch"].run
    assert rows["ffcv"].weights_sha256 == rows["torch"].weights_sha256


def test_faults_of_a_loader_are_refused(photos, tmp_path):
    from types import SimpleNamespace

    from trainer.base.settings import make_settings
    from trainer.distributed.communicator import alone
    from trainer.runs.job import Job, plan_of
    from trainer.tools.faults import Faults, parse_faults

    plan = plan_of(
        Job(
            "A2",
            "test_resnet",
            data=str(photos),
            overrides="batch.images=8 batch.norm_images=4 epochs=9",
        )
    )
    progress = SimpleNamespace(step=0, injected=[])
    state = SimpleNamespace(
        progress=progress, settings=make_settings("cpu", loader="ffcv"), say=lambda line: None
    )
    with pytest.raises(UserError, match="loader=torch"):
        Faults(parse_faults("bad_image@3"), plan, tmp_path, alone()).wrap(state)
    assert beton_file(photos, "train").exists()
