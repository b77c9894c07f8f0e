"""The loader: the same bytes by any road, bad images, evaluation, signals."""

import hashlib
import multiprocessing
import os
import signal

import numpy as np
import pytest
import torch
from PIL import Image
from torchvision.transforms import functional

from trainer.components.crops import Flip, RandomResizedCrop
from trainer.components.erasing import RandomErasing
from trainer.components.rand_augment import RandAugment
from trainer.data.datasets.builtin import ArraySet, FolderSet, for_training, open_set
from trainer.data.decode import BadImage
from trainer.data.evaluation import EvaluationStream, evaluation_batches
from trainer.data.index import open_index
from trainer.data.loader import TrainStream, shrunk
from trainer.data.order import epoch_order
from trainer.recipe.profiles import PROFILES
from trainer.recipe.sections import Growth

CROP = RandomResizedCrop(area=(0.08, 1.0), aspect=(0.75, 1.3333), interpolation="random")
ERASING = RandomErasing(share=0.5, area=(0.02, 0.3), aspect=(0.3, 3.3), fill="noise")
RAND_AUGMENT = RandAugment(num_ops=2, op_share=0.5, magnitude=7.0, interpolation="random")


def stream_of(image_set, **changes):
    choices = dict(
        image_set=image_set,
        seed=3,
        augment=(CROP, Flip()),
        train_px=32,
        repeats=1,
        batch_images=32,
        num_micro_batches=2,
        drop_last=False,
        bad_images="fail",
    )
    choices |= changes
    steps_per_epoch = -(-image_set.num_images // choices["batch_images"])
    return TrainStream(**choices, steps_per_epoch=steps_per_epoch)


def digest(batches):
    """SHA-256 of all that micro-batches hold."""
    sha = hashlib.sha256()
    for batch in batches:
        sha.update(f"{batch.step} {batch.micro_batch} {batch.num_replaced}".encode())
        for values in (
            batch.images,
            batch.labels,
            batch.ids,
            *(v for drawn in batch.drawn for v in drawn.values()),
        ):
            sha.update(values.numpy().tobytes())
    return sha.hexdigest()


@pytest.fixture(scope="module")
def digits():
    return open_set(PROFILES["digits"], None, "train")


def test_the_first_50_micro_batches_are_the_same_bytes_for_any_workers(digits):
    stream = stream_of(digits, augment=(CROP, Flip(), ERASING, RAND_AUGMENT), repeats=3)
    epochs = [digest(stream.batches(0, 25, num_workers, "cpu")) for num_workers in (0, 1, 4)]
    assert len(set(epochs)) == 1
    first = stream.steps_per_epoch
    assert digest(stream.batches(first, first + 25, 0, "cpu")) != epochs[0]


def test_starting_at_a_step_gives_what_the_whole_run_gives_there(digits):
    stream = stream_of(digits, num_micro_batches=3)
    last = stream.steps_per_epoch + 2
    whole = list(stream.batches(0, last, 0, "cpu"))
    late = list(stream.batches(last - 4, last, 2, "cpu"))
    assert digest(whole[-len(late) :]) == digest(late)
    assert [(b.step, b.micro_batch) for b in whole] == list(stream.keys(0, last))


def test_every_image_is_shown_once_an_epoch_with_its_label(digits):
    batches = list(stream_of(digits).batches(0, 45, 0, "cpu"))
    ids = torch.cat([b.ids for b in batches])
    assert sorted(ids[:, 1].tolist()) == list(range(1437))
    assert (
        torch.cat([b.labels for b in batches]).tolist() == digits.labels[ids[:, 1].numpy()].tolist()
    )
    assert {len(b.ids) for b in batches} == {16, 14, 15}  # the last step holds 29 = 15 + 14


@pytest.mark.parametrize("grey", [True, False])
def test_images_are_cropped_resized_and_flipped_as_drawn(grey):
    pixels = np.random.default_rng(0).integers(
        0, 256, (40, 28, 30) if grey else (40, 28, 30, 3), dtype=np.uint8
    )
    stream = stream_of(ArraySet(pixels, np.arange(40) % 2, ("a", "b")))
    batch = stream[0, 1]
    ids = batch.ids.numpy()
    boxes, bicubic = CROP.draw(3, ids, np.full(16, 28), np.full(16, 30))
    assert bicubic.any() and not bicubic.all()
    for image, (_, i, _), box, is_bicubic, is_flipped in zip(
        batch.images, ids, boxes, bicubic, Flip().draw(3, ids), strict=False
    ):
        mode = (
            functional.InterpolationMode.BICUBIC
            if is_bicubic
            else functional.InterpolationMode.BILINEAR
        )
        expected = functional.resized_crop(
            Image.fromarray(pixels[i]).convert("RGB"), *box.tolist(), [32, 32], mode
        )
        expected = functional.pil_to_tensor(
            expected.transpose(Image.FLIP_LEFT_RIGHT) if is_flipped else expected
        )
        assert torch.equal(image, expected)


@pytest.mark.parametrize("grey", [True, False])
@pytest.mark.parametrize("num_channels", [1, 3])
def test_a_set_in_memory_opened_for_training_gives_the_same_bytes(grey, num_channels):
    pixels = np.random.default_rng(0).integers(
        0, 256, (40, 28, 30) if grey else (40, 28, 30, 3), dtype=np.uint8
    )
    images = ArraySet(pixels, np.arange(40) % 2, ("a", "b"), num_channels)
    opened = for_training(images)
    assert digest(stream_of(opened).batches(0, 4, 0, "cpu")) == digest(
        stream_of(images).batches(0, 4, 0, "cpu")
    )
    assert opened.fingerprint == images.fingerprint


def test_draws_come_pixels_first_and_only_for_what_the_loader_leaves_undone(digits):
    (erased_last, augmented_first) = stream_of(digits, augment=(CROP, ERASING, RAND_AUGMENT))[
        0, 0
    ].drawn[::-1]
    ids = epoch_order(3, 0, 1437, 1)[0:32:2]
    assert torch.equal(erased_last["box"], torch.from_numpy(ERASING.draw(3, ids, 32)["box"]))
    assert torch.equal(
        augmented_first["argument"], torch.from_numpy(RAND_AUGMENT.draw(3, ids, 32)["argument"])
    )


GROWTH = Growth(from_px=16, from_epoch=0.5, to_epoch=1.5, multiple_px=4, updated="per_step")


def test_growing_images_are_the_same_crops_in_the_steps_own_size(digits):
    augment = (CROP, Flip(), RAND_AUGMENT, ERASING)
    stream, fixed = (
        stream_of(digits, augment=augment, growth=GROWTH),
        stream_of(digits, augment=augment),
    )
    last = 2 * stream.steps_per_epoch
    sizes = [stream[step, 0].images.shape[-1] for step in range(0, last, 3)]
    line = np.interp(np.arange(0, last, 3) / stream.steps_per_epoch, [0.5, 1.5], [16, 32])
    assert sizes == (np.round(line / 4) * 4).astype(int).tolist() and set(sizes) == {
        16,
        20,
        24,
        28,
        32,
    }
    for step in (0, 40, last - 1):
        ours, theirs = stream[step, 1], fixed[step, 1]
        small = stream_of(digits, augment=augment, train_px=ours.images.shape[-1])[step, 1]
        assert torch.equal(ours.ids, theirs.ids) and torch.equal(ours.images, small.images)
        for drawn, of_small in zip(ours.drawn, small.drawn, strict=True):
            assert all(torch.equal(drawn[key], of_small[key]) for key in drawn)
        assert torch.equal(ours.drawn[0]["operation"], theirs.drawn[0]["operation"])


def test_nearest_growth_leaves_rows_and_columns_of_the_whole_crop_out(digits):
    """As composer, whose images are shrunk by torch's interpolate at a factor."""
    growth = GROWTH.model_copy(update={"shrink": "nearest"})
    augment = (CROP, Flip(), RAND_AUGMENT)
    stream, whole = stream_of(digits, augment=augment, growth=growth), stream_of(digits)
    for step in (0, 40, 50, 2 * stream.steps_per_epoch - 1):
        batch, full = stream[step, 1], stream_of(digits, augment=augment)[step, 1].images
        side = growth.px_at(step, stream.steps_per_epoch, 32)
        expected = torch.nn.functional.interpolate(
            full.float(), scale_factor=side / 32, mode="nearest"
        )
        assert batch.images.shape[-1] == side and torch.equal(batch.images.float(), expected)
        ids = batch.ids.numpy()
        assert torch.equal(
            batch.drawn[0]["argument"],
            torch.from_numpy(RAND_AUGMENT.draw(3, ids, side)["argument"]),
        )
    assert torch.equal(
        stream[2 * stream.steps_per_epoch, 0].ids, whole[2 * stream.steps_per_epoch, 0].ids
    )


@pytest.mark.parametrize("side", range(88, 177, 4))
def test_the_rows_left_out_are_composers_at_every_side_of_its_recipe(side):
    rows = torch.arange(176.0).expand(1, 1, 176, 176)
    expected = torch.nn.functional.interpolate(rows, scale_factor=side / 176, mode="nearest")
    if expected.shape[-1] == side:  # torch floors 176 * (side / 176), once to one row less
        assert torch.equal(shrunk(rows, side), expected)


def test_growing_images_go_on_at_any_step_for_any_workers(digits):
    stream = stream_of(digits, augment=(CROP, Flip(), RAND_AUGMENT), growth=GROWTH)
    whole = list(stream.batches(0, 60, 0, "cpu"))
    assert len({batch.images.shape[-1] for batch in whole}) > 3
    for first_step, num_workers in ((1, 0), (30, 2), (59, 1)):
        assert digest(stream.batches(first_step, 60, num_workers, "cpu")) == digest(
            whole[2 * first_step :]
        )


def test_splits_share_the_crop_and_draw_on_their_own(digits):
    augment, repeats = (CROP, Flip(), RAND_AUGMENT, ERASING), 2
    stream = stream_of(digits, augment=augment, num_splits=3, repeats=repeats)
    batch, plain = stream[5, 1], stream_of(digits, augment=augment, repeats=repeats)[5, 1]
    assert torch.equal(batch.images, plain.images) and torch.equal(batch.ids, plain.ids)
    ids = batch.ids.numpy()
    for split in (1, 2):
        drawn = RAND_AUGMENT.draw(3, np.add(ids, [0, 0, repeats * split]), 32)
        own = {
            key: values[(split - 1) * len(ids) : split * len(ids)]
            for key, values in batch.drawn[0].items()
        }
        assert all(torch.equal(own[key], torch.from_numpy(drawn[key])) for key in drawn)
        assert not torch.equal(own["argument"], plain.drawn[0]["argument"])
    assert [len(values["box"]) for values in batch.drawn[1:]] == [2 * len(ids)]
    assert len(batch.drawn[1]["noise_key"].unique()) == 2 * len(
        ids
    )  # no two splits or repeats drew the same


def test_torchs_own_generator_stays_where_it_is(digits):
    before = torch.get_rng_state()
    list(stream_of(digits).batches(0, 2, 1, "cpu"))
    assert torch.equal(torch.get_rng_state(), before)


@pytest.fixture
def photos(make_folder):
    """12 + 12 photos, of which cat/3 and dog/5 are no images."""
    root = make_folder(train={"cat": 12, "dog": 12}, val={"cat": 1, "dog": 1})
    for name in ("cat/3.jpg", "dog/5.jpg"):
        (root / "train" / name).write_bytes(b"")
    return FolderSet(open_index(root, "train"))


@pytest.mark.parametrize("num_workers", [0, 2])
def test_a_bad_image_ends_the_run_with_its_own_line(photos, num_workers):
    stream = stream_of(photos, batch_images=6)
    with pytest.raises(BadImage) as refused:
        list(stream.batches(0, 4, num_workers, "cpu"))
    text = str(refused.value)
    assert text.endswith("(0 bytes); use an intact file, or bad_images=skip in training")
    assert text.startswith(str(photos.index.folder)) and "\n" not in text


def test_skipped_images_are_replaced_by_a_fixed_rule_and_counted(photos):
    stream = stream_of(photos, batch_images=6, bad_images="skip")
    batches = list(stream.batches(0, 12, 0, "cpu"))
    assert digest(batches) == digest(stream.batches(0, 12, 2, "cpu"))
    assert sum(b.num_replaced for b in batches) == 2 * 3  # two images in each of three epochs
    bad = [i for i in range(24) if photos.index.path(i).stat().st_size == 0]
    stand_ins = set()
    for batch in batches:
        for image, label, (_, i, _) in zip(
            batch.images, batch.labels, batch.ids.tolist(), strict=True
        ):
            if i in bad:
                stand_ins.add(image.numpy().tobytes())
                assert image.float().std() > 0 and label in (0, 1)
    assert len(stand_ins) == 6  # each time another crop, mostly of another image


def test_a_stand_in_brings_its_own_label():
    class OneIsBad(ArraySet):
        def read(self, i):
            if i == 0:
                raise BadImage("photo 0: bad")
            return super().read(i)

    images = np.repeat(np.arange(8, dtype=np.uint8), 64).reshape(8, 8, 8)
    stream = stream_of(
        OneIsBad(images, np.arange(8), tuple("abcdefgh")), batch_images=8, bad_images="skip"
    )
    seen = set()
    for epoch in range(20):
        for batch in stream.batches(epoch, epoch + 1, 0, "cpu"):
            assert batch.images[:, 0, 0, 0].tolist() == batch.labels.tolist()
            seen.update(batch.labels[batch.ids[:, 1] == 0].tolist())
    assert len(seen) > 3 and 0 not in seen


def test_skipping_ends_where_all_images_are_bad(make_folder):
    root = make_folder(train={"cat": 2, "dog": 2}, val={"cat": 1, "dog": 1})
    for path in (root / "train").glob("*/*"):
        path.write_bytes(b"")
    stream = stream_of(FolderSet(open_index(root, "train")), batch_images=4, bad_images="skip")
    with pytest.raises(BadImage, match=r"10 .* are bad as well"):
        list(stream.batches(0, 1, 0, "cpu"))


@pytest.mark.parametrize("num_workers", [0, 2])
def test_evaluation_shows_each_image_once_in_order(num_workers):
    val = open_set(PROFILES["digits"], None, "val")
    batches = list(
        evaluation_batches(EvaluationStream(val, 32, 1.0, "bicubic", 100), num_workers, "cpu")
    )
    assert [len(images) for images, _ in batches] == [100, 100, 100, 60]
    assert torch.cat([labels for _, labels in batches]).tolist() == val.labels.tolist()
    expected = Image.fromarray(val.images[359]).convert("RGB").resize((32, 32), Image.BICUBIC)
    assert torch.equal(batches[-1][0][-1], functional.pil_to_tensor(expected))


def test_a_bad_image_ends_an_evaluation(photos):
    with pytest.raises(BadImage, match="0 bytes"):
        list(evaluation_batches(EvaluationStream(photos, 32, 1.0, "bicubic", 5), 1, "cpu"))


def test_workers_leave_signals_to_the_main_process(digits):
    stream = stream_of(digits)
    batches = stream.batches(0, 20, 1, "cpu")
    head = [next(batches)]
    for worker in multiprocessing.active_children():
        for name in (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1):
            os.kill(worker.pid, name)
    assert digest(head + list(batches)) == digest(stream.batches(0, 20, 0, "cpu"))
