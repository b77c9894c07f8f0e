"""Epochs in which classes are shown by a recipe's sampling: what is shown, and that it is a
function of seed and epoch alone.
"""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from support.commands import rsb
from support.plans import small_set
from support.ranked import on_ranks, steps
from trainer.components.crops import Flip, RandomResizedCrop
from trainer.components.losses import CrossEntropy
from trainer.components.rand_augment import RandAugment
from trainer.components.sampling import Balanced, ProgressivelyBalanced, SquareRoot
from trainer.data.datasets.builtin import open_set
from trainer.data.loader import TrainStream
from trainer.data.order import Sampled, epoch_order, micro_batch_ids
from trainer.recipe.profiles import PROFILES
from trainer.runs.job import Job, plan_of
from trainer.tasks.constant import bias_only_loss

CROP = RandomResizedCrop(area=(0.08, 1.0), aspect=(0.75, 1.3333), interpolation="random")
LABELS = np.repeat([2, 0, 1, 3], [700, 250, 40, 10])  # class 2 is the largest
KINDS = (Balanced(), SquareRoot(), ProgressivelyBalanced())


def stream_of(sampling, **changes):
    images = open_set(PROFILES["digits"], None, "train")
    choices = {
        "image_set": images, "seed": 3, "augment": (CROP, Flip()), "train_px": 32, "repeats": 1,
        "batch_images": 64, "num_micro_batches": 2, "drop_last": False, "bad_images": "fail",
        "sampling": sampling, "epochs": 3,
    } | changes  # fmt: skip
    return TrainStream(**choices, steps_per_epoch=-(-images.num_images // choices["batch_images"]))


@pytest.mark.parametrize("sampling", KINDS, ids=lambda kind: kind.name)
def test_classes_have_the_draws_of_their_shares(sampling):
    num_images, epochs = len(LABELS), 60
    sampled = Sampled(sampling, LABELS, epochs)
    found = np.array(
        [
            np.bincount(LABELS[epoch_order(1, epoch, num_images, 1, sampled)[:, 1]])
            for epoch in range(epochs)
        ]
    )
    counts = np.bincount(LABELS)
    wanted = num_images * np.array([sampling.shares(counts, e / epochs) for e in range(epochs)])
    assert (np.abs(found - wanted) < 1 + 1e-9).all()  # each epoch rounds up or down
    # the mean of what rounding adds is 0: four standard errors of a rounding
    assert (np.abs((found - wanted).mean(0)) < 4 * 0.5 / np.sqrt(epochs)).all()


@given(
    counts=st.lists(st.integers(0, 40), min_size=2, max_size=6).filter(lambda each: sum(each) > 1),
    repeats=st.integers(1, 3),
    epoch=st.integers(0, 4),
    kind=st.sampled_from(KINDS),
)
@settings(max_examples=100)
def test_images_of_a_class_are_shown_alike_and_no_draw_comes_twice(counts, repeats, epoch, kind):
    labels = np.random.default_rng(0).permutation(np.repeat(np.arange(len(counts)), counts))
    sampled = Sampled(kind, labels, 5, repeats)
    ids = epoch_order(7, epoch, len(labels), repeats, sampled)
    assert ids.shape == (len(labels), 3) and len(np.unique(ids, axis=0)) == len(ids)
    assert (ids[:, 0] == epoch).all()
    images, showings = sampled.shown(7, epoch, len(labels))
    for label in range(len(counts)):
        times = np.bincount(images[labels[images] == label], minlength=len(labels))
        times = times[labels == label]
        assert not len(times) or times.max() - times.min() <= 1
    assert (showings >= 0).all() and showings.max() <= max(np.bincount(images)) - 1


def test_showings_and_splits_of_an_image_never_draw_the_same():
    """A split s has the draws of repeat + repeats * s: see TrainStream._drawn."""
    repeats, splits = 2, 3
    sampled = Sampled(Balanced(), LABELS, 1, repeats * splits)
    ids = epoch_order(0, 0, len(LABELS), repeats, sampled)
    drawn = np.concatenate([np.add(ids, [0, 0, repeats * split]) for split in range(splits)])
    assert len(np.unique(drawn, axis=0)) == len(drawn)


def test_micro_batches_are_the_draws_of_an_epoch_in_order():
    sampled = Sampled(Balanced(), LABELS, 4)
    order = epoch_order(0, 2, len(LABELS), 1, sampled)
    first = micro_batch_ids(0, 2 * 16 + 1, 0, len(LABELS), 1, 64, 2, 16, False, sampled)
    assert first.tolist() == order[64:128:2].tolist()
    other = Sampled(Balanced(), LABELS, 4)  # another process's
    assert epoch_order(0, 2, len(LABELS), 1, other).tolist() == order.tolist()
    assert epoch_order(0, 3, len(LABELS), 1, sampled)[:, 1].tolist() != order[:, 1].tolist()


@pytest.mark.parametrize("repeats", [1, 2])
def test_the_same_bytes_for_any_workers_and_from_any_step(repeats):
    stream = stream_of(
        SquareRoot(), repeats=repeats,
        augment=(CROP, Flip(), RandAugment(num_ops=2, op_share=0.5, magnitude=7.0,
                                           interpolation="random")),
    )  # fmt: skip
    last = stream.steps_per_epoch + 2

    def bytes_of(first, workers):
        return [
            (batch.ids.tolist(), batch.labels.tolist(), batch.images.numpy().tobytes())
            for batch in stream.batches(first, last, workers, "cpu")
        ]

    whole = bytes_of(0, 0)
    assert bytes_of(0, 2) == whole
    assert bytes_of(last - 4, 0) == whole[-8:]


def test_an_image_that_comes_again_is_cropped_anew():
    images = open_set(PROFILES["digits"], None, "train")
    rare = np.flatnonzero(images.labels == 0)[2:]
    places = np.setdiff1d(np.arange(images.num_images), rare)

    class Uneven:
        num_channels, classes, is_in_memory = images.num_channels, images.classes, True
        num_images, fingerprint, labels = len(places), "uneven", images.labels[places]

        def read(self, i):
            return images.read(int(places[i]))

    stream = stream_of(Balanced(), image_set=Uneven(), batch_images=256, num_micro_batches=1)
    batch = stream[0, 0]
    again = np.flatnonzero(batch.labels.numpy() == 0)
    assert len(again) > 15 and len(set(batch.ids[again, 1].tolist())) <= 2
    pictures = {batch.images[place].numpy().tobytes() for place in again}
    assert len(pictures) > 0.8 * len(again)


def test_ranks_share_a_sampled_step():
    overrides = small_set("sampling='{name: balanced}'")
    (alone,) = on_ranks(steps, 1, "A2", "test_resnet", overrides, 0, 2)
    both = on_ranks(steps, 2, "A2", "test_resnet", overrides, 0, 2)
    seen = sorted((step, number, ids) for rank in both for step, number, ids in rank["ids"])
    assert seen == sorted((step, number, ids) for step, number, ids in alone["ids"])
    assert both[0]["losses"] == pytest.approx(alone["losses"], rel=1e-5)


def test_the_baseline_loss_is_that_of_what_training_shows():
    overrides = "loss={name: ce} smoothing=null mix=null sampling={name: balanced}"
    overrides = overrides.replace("={", "='{").replace("}", "}'")
    plan = plan_of(Job("A3", "resnet18", overrides=overrides))
    assert isinstance(plan.loss, CrossEntropy)
    labels = np.repeat(np.arange(10), [900, *([10] * 9)])
    assert bias_only_loss(plan, labels) == pytest.approx(np.log(10), abs=1e-3)
    assert bias_only_loss(plan, labels, is_mixed=False) < 1.0


def test_a_sampled_weighted_run_on_photos_is_itself_resumed(make_folder, tmp_path):
    """By the command: uneven photos in a folder, a rule in the row, the same identity again."""

    root = make_folder(train={"a": 23, "b": 6, "c": 3}, val={"a": 2, "b": 2, "c": 2})
    words = [
        "train", "--recipe", "torchvision-v1", "--model", "test_resnet", "--data", root,
        "--runs", tmp_path / "runs", "--results", tmp_path / "results", "--workers", "0", "--set",
        small_set(
            "batch.images=8 batch.norm_images=8 image.train_px=32 image.test_px=32"
            " sampling='{name: balanced}' lr.warmup_epochs=null"
            " loss.class_weighting='{name: effective_number, beta: 0.9, mean_over: classes}'"
        ),
    ]  # fmt: skip
    done = rsb(*words)
    assert done.exit_code == 0, done.output
    assert "already has a row" in rsb(*words).output
    (run,) = (tmp_path / "runs").glob("torchvision-v1*")
    again = rsb("eval", "--run", run, "--workers", "0", "--results", tmp_path / "results")
    assert again.exit_code == 0, again.output
