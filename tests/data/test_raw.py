"""`make data format=raw`: pixels that any loader reads from the memory map, and what a run on them
records.
"""

import json
import pickle

import numpy as np
import pytest
import torch
from PIL import Image
from typer.testing import CliRunner

from trainer.cli.main import app
from trainer.components.crops import Flip, RandomResizedCrop
from trainer.data.dataset import open_data
from trainer.data.datasets import beton
from trainer.data.datasets.beton import chosen_loader, open_beton
from trainer.data.datasets.builtin import FolderSet, for_training
from trainer.data.decode import BadImage
from trainer.data.index import open_index
from trainer.data.loader import TrainStream, boxes_in
from trainer.data.profile import find_profile

CROP = RandomResizedCrop(area=(0.08, 1.0), aspect=(0.75, 1.3333), interpolation="random")
SIDE_PX = 30  # images have sides of 20 to 59 px: most are shrunk, some kept
TRAIN = (
    "train", "--recipe", "A3", "--model", "resnet18", "--device", "cpu", "--set",
    "epochs=1 lr.warmup_epochs=null lr.warmup_from=null batch.images=4 batch.norm_images=4"
    " image.train_px=32 image.test_px=32",
)  # fmt: skip


def rsb(*words):
    return CliRunner().invoke(app, [str(word) for word in words])


@pytest.fixture
def photos(make_folder):
    return make_folder(train={"cat": 8, "dog": 6}, val={"cat": 2, "dog": 2})


def raw_of(photos, out, *more):
    done = rsb("data", "--format", "raw", "--data", photos, "--out", out, "--workers", 2, *more)
    assert done.exit_code == 0, done.output
    return out


@pytest.fixture
def raw(photos, tmp_path):
    return raw_of(photos, tmp_path / "raw", "--side", SIDE_PX)


def stream_of(image_set, **changes):
    given = dict(
        image_set=image_set, seed=3, augment=(CROP, Flip()), train_px=32, repeats=1, batch_images=6,
        num_micro_batches=2, steps_per_epoch=3, drop_last=False, bad_images="fail",
    )  # fmt: skip
    return TrainStream(**given | changes)


def test_the_shorter_side_is_shrunk_by_pils_bicubic_and_no_image_is_enlarged(photos, raw):
    folder, found = FolderSet(open_index(photos, "train")), open_beton(raw, "train")
    assert (found.samples["image"]["mode"] == beton.RAW).all()
    num_shrunk = 0
    for i in range(folder.num_images):
        image = folder.read(i)
        if min(image.size) > SIDE_PX:
            size = [round(side * SIDE_PX / min(image.size)) for side in image.size]
            assert min(size) == SIDE_PX
            image, num_shrunk = image.resize(size, Image.Resampling.BICUBIC), num_shrunk + 1
        assert np.array_equal(np.asarray(found.read(i)), np.asarray(image))
    assert 0 < num_shrunk < folder.num_images
    assert not found.facts.is_lossless and found.fingerprint != found.facts.source
    assert found.facts.source == folder.fingerprint
    assert found.labels.tolist() == folder.labels.tolist()


def test_images_that_are_no_larger_are_the_same_data(photos, tmp_path):
    whole = raw_of(photos, tmp_path / "whole")  # 256 px
    assert open_beton(whole, "train").fingerprint == open_index(photos, "train").fingerprint
    assert open_data(find_profile(str(whole)), whole).changes == ""


def test_boxes_are_those_of_the_originals(photos, raw):
    """In relative coordinates: an edge moves by half a stored pixel at most."""
    folder, found = FolderSet(open_index(photos, "train")), open_beton(raw, "train")
    ids = np.stack([np.full(14, 2), np.arange(14), np.zeros(14, int)], axis=1)
    widths, heights = np.array([folder.read(i).size for i in range(14)]).T
    drawn, is_bicubic = CROP.draw(3, ids, heights, widths)
    boxes, filters = boxes_in(found, CROP, 3, ids, ids[:, 1])
    assert filters.tolist() == is_bicubic.tolist()
    stored = np.stack(found.sides(ids[:, 1]), axis=1)
    scale = stored / np.stack([heights, widths], axis=1)
    assert np.abs(boxes[:, :2] - drawn[:, :2] * scale).max() <= 0.5
    ends = np.minimum((drawn[:, :2] + drawn[:, 2:]) * scale, stored)
    assert np.abs(boxes[:, :2] + boxes[:, 2:] - ends).max() <= 1


@pytest.mark.parametrize("side", [0, SIDE_PX])
def test_training_reads_what_pil_would_crop_and_resize(photos, tmp_path, side):
    found = open_beton(raw_of(photos, tmp_path / str(side), "--side", side), "train")
    by_map, by_pil = stream_of(for_training(found)), stream_of(found)
    originals = stream_of(FolderSet(open_index(photos, "train")))
    for key in by_map.keys(0, 3):
        ours, theirs, whole = by_map[key], by_pil[key], originals[key]
        difference = (ours.images.int() - theirs.images.int()).abs()
        assert difference.max() <= 2 and difference.float().mean() < 0.1
        assert torch.equal(ours.ids, whole.ids) and torch.equal(ours.labels, whole.labels)
        if side == 0:
            assert torch.equal(theirs.images, whole.images)


def test_any_number_of_processes_and_any_first_step_give_the_same_bytes(raw):
    found = pickle.loads(pickle.dumps(for_training(open_beton(raw, "train"))))
    stream = stream_of(found, repeats=3, steps_per_epoch=1)
    alone = list(stream.batches(0, 3, 0, "cpu"))
    for first, num_workers in ((0, 2), (1, 1)):
        again = list(stream.batches(first, 3, num_workers, "cpu"))
        assert [(batch.step, batch.micro_batch) for batch in again] == [
            (step, number) for step in range(first, 3) for number in range(2)
        ]
        for one, other in zip(alone[2 * first :], again, strict=True):
            assert torch.equal(one.images, other.images) and torch.equal(one.labels, other.labels)


def test_one_channel_is_the_luma(tmp_path):
    raw_of("digits-grey", tmp_path / "grey")
    found = open_beton(tmp_path / "grey", "val")
    assert found.num_channels == 1 == find_profile(str(tmp_path / "grey")).channels
    image = for_training(found).read(5)
    assert image.pixels.shape == (8, 8, 1)
    assert np.array_equal(image.pixels[:, :, 0], np.asarray(found.read(5)))


def test_a_damaged_image_is_bad_in_training_and_in_check_data(raw):
    found = open_beton(raw, "train")
    place = int(found.samples["image"]["data_ptr"][4]) + 300
    with open(found.path, "r+b") as file:
        file.seek(place)
        file.write(bytes([file.read(1)[0] ^ 255]))
    with pytest.raises(BadImage, match="image 4 is damaged"):
        for_training(open_beton(raw, "train")).read(4)
    skipping = stream_of(for_training(open_beton(raw, "train")), bad_images="skip")
    assert sum(batch.num_replaced for batch in skipping.batches(0, 3, 0, "cpu")) == 1
    assert rsb("check-data", "--data", raw).exit_code == 1


def test_the_torch_loader_is_chosen_without_a_word_whatever_is_installed(raw, monkeypatch):
    said = []
    for is_installed in (True, False):
        monkeypatch.setattr(
            beton.importlib.util, "find_spec", lambda name, it=is_installed: it or None
        )
        assert chosen_loader("auto", raw, said.append) == "torch"
    assert said == []


def test_a_run_on_it_says_so_and_is_verified(photos, raw, tmp_path):
    stores = ("--runs", tmp_path / "runs", "--results", tmp_path / "results")
    done = rsb(*TRAIN, "--data", photos, "--data-dir", raw, "--workers", 1, *stores)
    assert done.exit_code == 0, done.output
    alone = rsb(*TRAIN, "--data", raw, "--workers", 0, *stores)
    assert alone.exit_code == 0, alone.output
    rows = [json.loads(path.read_text()) for path in (tmp_path / "results/rows").glob("*.json")]
    assert len(rows) == 2
    for row in rows:
        assert row["loader"] == f"torch, raw side={SIDE_PX}"
        changes = [change for change in row["deviations"] if change["origin"] == "data"]
        assert [change["after"] for change in changes] == [f"side={SIDE_PX}"]
        for command in ("eval", "verify"):
            again = rsb(command, "--run", row["run"], *stores)
            assert again.exit_code == 0, again.output
    # the same images, crops and statistics, whichever way they are named
    assert rows[0]["weights_sha256"] == rows[1]["weights_sha256"]
    assert rows[0]["data_fingerprint"] == rows[1]["data_fingerprint"]


def test_ffcvs_loader_cuts_the_same_boxes_from_it(raw):
    from support.built import needs_ffcv

    needs_ffcv()
    from trainer.data.ffcv.stream import FfcvStream

    by_pil = stream_of(open_beton(raw, "train"))
    by_ffcv = FfcvStream(**vars(by_pil))
    for ours, theirs in zip(
        by_pil.batches(0, 3, 0, "cpu"), by_ffcv.batches(0, 3, 1, "cpu"), strict=True
    ):
        assert torch.equal(ours.images, theirs.images)


@pytest.mark.parametrize(
    ("words", "named"),
    [
        (("--format", "rwa"), "did you mean raw"),
        (("--side", 24), "needs format=raw"),
        (("--format", "raw", "--max-side", 24), "max_side=24"),
        (("--format", "raw", "--jpeg-share", 0.5), "jpeg_share=0.5"),
        (("--format", "raw", "--side", 3), "side=3"),
        (("--format", "raw"), "folder of its own"),
    ],
)
def test_what_cannot_be_is_refused_in_one_line(photos, words, named):
    done = rsb("data", "--data", photos, *words)
    assert done.exit_code == 2 and named in done.output
    assert len(done.output.strip().splitlines()) == 1
    assert not list(photos.glob("*.beton"))
