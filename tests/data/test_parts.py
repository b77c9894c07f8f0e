"""Steps made part by part: the same micro-batches, for fewer decoded images."""

from collections import Counter
from itertools import product

import numpy as np
import pytest
import torch
from PIL import Image

from trainer.components.crops import Flip, RandomResizedCrop
from trainer.components.erasing import RandomErasing
from trainer.components.rand_augment import RandAugment
from trainer.data import jpeg
from trainer.data.datasets.builtin import FolderSet, for_training, open_set
from trainer.data.decode import BadImage
from trainer.data.faulty import FaultyStream
from trainer.data.index import open_index
from trainer.data.loader import TrainStream
from trainer.data.parts import has_parts
from trainer.recipe.assignment import Assignment
from trainer.recipe.profiles import PROFILES
from trainer.recipe.sections import Growth

AUGMENT = (
    RandomResizedCrop(area=(0.08, 1.0), aspect=(0.75, 1.3333), interpolation="random"),
    Flip(),
    RandAugment(
        num_ops=2,
        op_share=0.5,
        magnitude=7.0,
        magnitude_std=0.5,
        increasing=True,
        interpolation="random",
    ),
    RandomErasing(share=0.5, area=(0.02, 0.3), aspect=(0.3, 3.3), fill="noise"),
)
NUM_STEPS = 6  # of 5 an epoch, the last one smaller


@pytest.fixture(scope="module")
def photos(tmp_path_factory):
    """53 JPEG files of unlike sizes, some so large that their crops are decoded at a half."""
    root = tmp_path_factory.mktemp("photos")
    random = np.random.default_rng(0)
    for number in range(53):
        height, width = random.integers(20, 90, 2)
        coarse = Image.fromarray(random.integers(0, 256, (6, 6, 3), dtype=np.uint8)).resize(
            (width, height), Image.Resampling.BICUBIC
        )
        for split in ("train", "val"):
            path = root / split / "ab"[number % 2] / f"{number:02}.jpg"
            path.parent.mkdir(parents=True, exist_ok=True)
            coarse.save(path, quality=90)
    return for_training(FolderSet(open_index(root, "train")))


def stream_of(images, make=TrainStream, **changes):
    choices = dict(
        seed=3,
        augment=AUGMENT,
        train_px=24,
        repeats=3,
        batch_images=12,
        num_micro_batches=4,
        drop_last=False,
        bad_images="fail",
    )
    choices |= changes
    return make(images, steps_per_epoch=-(-images.num_images // choices["batch_images"]), **choices)


def assert_same(ours, theirs):
    assert len(ours) == len(theirs)
    for one, other in zip(ours, theirs, strict=True):
        assert (one.step, one.micro_batch, one.is_augmented) == (
            other.step,
            other.micro_batch,
            other.is_augmented,
        )
        for name in ("images", "labels", "ids", "shown"):
            assert torch.equal(getattr(one, name), getattr(other, name)), name
        for mine, others in zip(one.drawn, other.drawn, strict=True):
            assert mine.keys() == others.keys() and all(
                torch.equal(mine[key], others[key]) for key in mine
            )


def micro_batch_by_micro_batch(stream, first_step=0, num_steps=NUM_STEPS):
    """Each by itself, from its key, as no part knows it; and nothing of an image in it shared."""
    alone = FaultyStream(**vars(stream)) if type(stream) is TrainStream else stream
    return [alone[key] for key in stream.keys(first_step, num_steps)]


@pytest.mark.parametrize(
    "fill", [None, (124, 116, 104)], ids=["augmented later", "augmented there"]
)
@pytest.mark.parametrize(("rank", "num_ranks"), [(0, 1), (0, 2), (1, 2), (2, 3)])
@pytest.mark.parametrize("num_workers", [0, 2])
def test_micro_batches_are_the_same_bytes_as_made_one_by_one(
    photos, num_workers, rank, num_ranks, fill
):
    stream = stream_of(photos, assigned=Assignment(rank, num_ranks), fill=fill)
    assert has_parts(stream) == (num_ranks < 3)
    batches = list(stream.batches(0, NUM_STEPS, num_workers, "cpu"))
    assert [(batch.step, batch.micro_batch) for batch in batches] == list(stream.keys(0, NUM_STEPS))
    assert_same(batches, micro_batch_by_micro_batch(stream))
    assert_same(
        list(stream.batches(3, NUM_STEPS, num_workers, "cpu")),
        [batch for batch in batches if batch.step >= 3],
    )


@pytest.mark.parametrize(("repeats", "num_micro_batches"), product((2, 3, 5), (1, 2, 3)))
def test_for_any_number_of_repeats_and_micro_batches(photos, repeats, num_micro_batches):
    growth = Growth(from_px=16, from_epoch=0, to_epoch=1, multiple_px=4, updated="per_step")
    stream = stream_of(photos, repeats=repeats, num_micro_batches=num_micro_batches, growth=growth)
    assert_same(list(stream.batches(0, NUM_STEPS, 0, "cpu")), micro_batch_by_micro_batch(stream))


def test_each_image_of_a_step_is_read_and_decoded_once(photos, monkeypatch):
    read, decoded = Counter(), []
    decode = jpeg.simplejpeg.decode_jpeg
    monkeypatch.setattr(
        jpeg.simplejpeg,
        "decode_jpeg",
        lambda *given, **chosen: (
            decoded.append(chosen.get("min_factor", 1)) or decode(*given, **chosen)
        ),
    )

    class Counted(FolderSet):
        def read(self, i):
            read[i] += 1
            return super().read(i)

    counted = Counted(photos.index, 3, photos.reader)
    stream = stream_of(
        counted, train_px=64, batch_images=48, num_micro_batches=4
    )  # so large that nothing is decoded at a half
    list(stream.batches(0, 1, 0, "cpu"))
    # 16 images three times; a part's end may divide an image, and so may a chunk's
    assert len(read) == 16 and sum(read.values()) == len(decoded) <= 16 + 3 and set(decoded) == {1}
    read.clear(), decoded.clear()
    for key in stream.keys(0, 1):
        stream[key]
    assert sum(read.values()) == len(decoded) == 48


def test_without_processes_nothing_is_made_for_later_steps(photos):
    made = []

    class Noted(TrainStream):
        def made(self, step, number, ids):
            made.append((step, number))
            return super().made(step, number, ids)

    batches = stream_of(photos, make=Noted).batches(0, NUM_STEPS, 0, "cpu")
    taken = [next(batches) for _ in range(4)]
    assert (
        made
        == [(0, part) for part in range(4)]
        == [(batch.step, batch.micro_batch) for batch in taken]
    )
    next(batches)
    assert made[4:] == [(1, part) for part in range(4)]


def test_where_nothing_could_be_shared_micro_batches_are_made_as_they_are(photos):
    digits = open_set(PROFILES["digits"], None, "train")
    for images, changes in (
        (photos, {"repeats": 1}),
        (photos, {"num_micro_batches": 1}),
        (photos, {"num_splits": 3}),
        (digits, {}),
    ):
        assert not has_parts(stream_of(images, **changes))
    assert has_parts(stream_of(photos))


@pytest.fixture
def damaged(photos, tmp_path):
    """The same photos but for one that is cut off behind its header, and one that is empty."""
    for path in sorted(photos.index.folder.rglob("*.jpg")):
        there = tmp_path / path.relative_to(photos.index.folder.parent)
        there.parent.mkdir(parents=True, exist_ok=True)
        content = path.read_bytes()
        there.write_bytes(
            {"07": content[: content.index(b"\xff\xda") + 2] + b"\xff\xd9", "31": b""}.get(
                path.stem, content
            )
        )
    for name in "ab":
        (tmp_path / "val" / name).mkdir(parents=True)
        Image.new("RGB", (8, 8)).save(tmp_path / "val" / name / "x.png")
    return for_training(FolderSet(open_index(tmp_path, "train")))


@pytest.mark.parametrize("num_workers", [0, 2])
def test_bad_images_are_replaced_draw_by_draw_as_ever(damaged, num_workers):
    stream = stream_of(damaged, bad_images="skip")
    batches = list(stream.batches(0, 3 * stream.steps_per_epoch, num_workers, "cpu"))
    alone = micro_batch_by_micro_batch(stream, 0, 3 * stream.steps_per_epoch)
    assert_same(batches, alone)
    assert (
        sum(batch.num_replaced for batch in batches)
        == sum(batch.num_replaced for batch in alone)
        > 0
    )
    bad = {
        place
        for place in range(damaged.num_images)
        if damaged.index.path(place).stem in ("07", "31")
    }
    replaced = {
        image
        for batch in batches
        for image in batch.ids[batch.shown != batch.ids[:, 1], 1].tolist()
    }
    assert replaced == bad


@pytest.mark.parametrize("num_workers", [0, 2])
def test_a_bad_image_ends_the_run_where_its_step_begins(damaged, num_workers):
    stream, seen = stream_of(damaged), []
    keys = list(stream.keys(0, 3 * stream.steps_per_epoch))
    first_bad_step = next(
        step for step, micro_batch in keys if isinstance(stream[step, micro_batch], BadImage)
    )
    with pytest.raises(BadImage, match="bad_images=skip"):
        for batch in stream.batches(0, 3 * stream.steps_per_epoch, num_workers, "cpu"):
            seen.append((batch.step, batch.micro_batch))
    assert seen == [key for key in keys if key[0] < first_bad_step] and first_bad_step > 0
