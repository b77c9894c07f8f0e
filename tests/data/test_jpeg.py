"""JPEG files for training: how far the pixels are from PIL's own road, and what is left to PIL."""

import io

import numpy as np
import pytest
import simplejpeg
import torch
from PIL import Image
from sklearn.datasets import load_sample_image

from support.packing import encoded
from trainer.components.crops import Flip, RandomResizedCrop
from trainer.data import jpeg
from trainer.data.datasets.builtin import FolderSet, for_training
from trainer.data.decode import RESAMPLING, BadImage, read_image
from trainer.data.index import open_index
from trainer.data.jpeg import SCALED_LEVELS, TOLERANCE_LEVELS, Jpeg, first_rows, read_for_training
from trainer.data.loader import TrainStream

PHOTOS = [Image.fromarray(load_sample_image(name)) for name in ("china.jpg", "flower.jpg")]
KINDS = {
    "4:4:4": {"quality": 95, "subsampling": 0},
    "4:2:2": {"quality": 90, "subsampling": 1},
    "4:2:0": {"quality": 75, "subsampling": 2},
    "restarts": {"quality": 80, "restart_marker_rows": 2},
    "progressive": {"quality": 85, "progressive": True},
}
CROP = RandomResizedCrop(area=(0.08, 1.0), aspect=(0.75, 1.3333), interpolation="random")


def pils_square(image, box, is_bicubic, train_px):
    """Decode all, crop, resize."""
    top, left, height, width = box
    filter_ = Image.Resampling.BICUBIC if is_bicubic else Image.Resampling.BILINEAR
    part = image.crop((left, top, left + width, top + height)).resize((train_px, train_px), filter_)
    return np.asarray(part).transpose(2, 0, 1).astype(int)


def drawn_boxes(image, num_boxes):
    ids = np.stack([np.arange(num_boxes)] * 3, axis=1)
    boxes, is_bicubic = CROP.draw(
        0, ids, np.full(num_boxes, image.height), np.full(num_boxes, image.width)
    )
    return zip(boxes.tolist(), is_bicubic.tolist(), strict=True)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("train_px", [224, 96, 32])
def test_squares_are_pils_within_the_stated_levels(tmp_path, kind, train_px):
    differences = []
    for number, photo in enumerate(PHOTOS):
        path = tmp_path / f"{number}.jpg"
        path.write_bytes(encoded(photo, **KINDS[kind]))
        found, whole = read_for_training(path), read_image(path)
        assert isinstance(found, Jpeg) and found.size == whole.size
        for box, is_bicubic in drawn_boxes(photo, 12):
            square = found.square(
                box, RESAMPLING["bicubic" if is_bicubic else "bilinear"], train_px
            )
            assert square.shape == (3, train_px, train_px) and square.dtype == np.uint8
            difference = np.abs(square - pils_square(whole, box, is_bicubic, train_px)).mean()
            if min(box[2:]) >= 2 * train_px:  # decoded at a half or less
                differences.append(difference)
            else:
                assert difference < TOLERANCE_LEVELS
    assert len(differences) > 10 if train_px < 200 else not differences
    assert train_px > 200 or np.mean(differences) < SCALED_LEVELS


@pytest.mark.parametrize("kind", KINDS)
def test_the_rows_above_an_early_end_are_the_same_bytes(kind):
    for photo in (
        PHOTOS[0],
        PHOTOS[1].crop((3, 5, 404, 338)),
        PHOTOS[1].convert("L").crop((0, 0, 333, 211)),
    ):
        content = encoded(photo, **KINDS[kind])
        whole = np.asarray(Image.open(io.BytesIO(content)).convert("RGB"))
        for wanted in (1, 7, 16, 100, photo.height - 40, photo.height - 1, photo.height):
            shorter, num_rows = first_rows(content, wanted, photo.height)
            assert (num_rows < photo.height) == (
                wanted < photo.height - 32 and kind != "progressive"
            )
            found = simplejpeg.decode_jpeg(shorter, "RGB", strict=False)
            assert len(found) == num_rows >= wanted and np.array_equal(
                found[:wanted], whole[:wanted]
            )


@pytest.mark.parametrize(
    "content",
    [
        encoded(PHOTOS[1], "PNG"),
        encoded(PHOTOS[1].convert("CMYK")),
        encoded(PHOTOS[1]) + b"\0",
        encoded(PHOTOS[1])[:9000],
        encoded(PHOTOS[1])[:300] + b"\xff\xd9",
        b"",
        b"\xff\xd8\xff\xd9",
    ],
    ids=["png", "cmyk", "trailing byte", "truncated", "header only", "empty", "markers only"],
)
def test_any_other_file_is_what_pil_makes_of_it(tmp_path, content):
    path = tmp_path / "a.jpg"
    path.write_bytes(content)
    box = (10, 20, 200, 300)
    try:
        expected = pils_square(read_image(path), box, True, 64)
    except BadImage as error:
        with pytest.raises(BadImage) as refused:
            read_for_training(path).square(box, RESAMPLING["bicubic"], 64)
        assert str(refused.value) == str(error)
    else:
        found = read_for_training(path)
        assert not isinstance(found, Jpeg) and np.array_equal(
            pils_square(found, box, True, 64), expected
        )


def test_a_file_that_claims_a_giant_picture_is_left_to_pil(tmp_path):
    content = bytearray(encoded(PHOTOS[0]))
    place = content.index(b"\xff\xc0") + 5
    content[place : place + 4] = b"\xff\xff\xff\xff"
    (tmp_path / "a.jpg").write_bytes(content)
    with pytest.raises(BadImage, match="decompression bomb"):
        read_for_training(tmp_path / "a.jpg")


def test_one_channel_and_a_machine_without_the_decoder_take_pils_road(tmp_path, monkeypatch):
    path = tmp_path / "a.jpg"
    path.write_bytes(encoded(PHOTOS[0]))
    assert read_for_training(path, 1).tobytes() == read_image(path, 1).tobytes()
    assert jpeg.decoder_name().startswith("simplejpeg ")
    monkeypatch.setattr(jpeg, "simplejpeg", None)
    assert (
        read_for_training(path).tobytes() == read_image(path).tobytes()
        and jpeg.decoder_name() == "PIL"
    )


@pytest.fixture
def photos(make_folder):
    """12 + 12 noisy photos; three have a good header and nothing that decodes behind it."""
    root = make_folder(train={"cat": 12, "dog": 12}, val={"cat": 1, "dog": 1})
    for name in ("cat/3.jpg", "dog/5.jpg", "dog/6.jpg"):
        path = root / "train" / name
        content = path.read_bytes()
        path.write_bytes(
            content[: content.index(b"\xff\xc4")] + b"\xff\xd9"
        )  # no Huffman tables, no scan
    return FolderSet(open_index(root, "train"))


def stream_of(images, **changes):
    choices = dict(
        image_set=images,
        seed=3,
        augment=(CROP, Flip()),
        train_px=24,
        repeats=1,
        batch_images=6,
        num_micro_batches=2,
    )
    choices |= dict(steps_per_epoch=4, drop_last=False, bad_images="skip") | changes
    return TrainStream(**choices)


@pytest.mark.parametrize("num_workers", [0, 2])
def test_a_stream_of_files_is_pils_with_the_same_stand_ins(photos, num_workers):
    ours = list(stream_of(for_training(photos)).batches(0, 8, num_workers, "cpu"))
    theirs = list(stream_of(photos).batches(0, 8, 0, "cpu"))
    assert sum(batch.num_replaced for batch in ours) == 2 * 3
    for own, other in zip(ours, theirs, strict=True):
        assert own.num_replaced == other.num_replaced and torch.equal(own.labels, other.labels)
        assert torch.equal(own.ids, other.ids)
        assert (own.images.int() - other.images.int()).abs().float().mean() < TOLERANCE_LEVELS
    assert for_training(photos).fingerprint == photos.fingerprint


def test_a_bad_file_behind_a_good_header_ends_the_run_with_its_own_line(photos):
    with pytest.raises(BadImage, match=r"jpg: cannot be decoded \(.*bad_images=skip in training"):
        list(stream_of(for_training(photos), bad_images="fail").batches(0, 4, 0, "cpu"))
