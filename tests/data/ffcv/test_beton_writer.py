"""Writing a .beton: what is stored of which image, the same bytes every time, after a stop too."""

import hashlib
import os

import numpy as np
import pytest
from PIL import Image

from trainer.base.errors import UserError
from trainer.data.datasets.beton import JPEG, RAW, beton_file, open_beton
from trainer.data.datasets.builtin import FolderSet, open_set
from trainer.data.decode import BadImage
from trainer.data.ffcv import beton_writer
from trainer.data.ffcv.beton_writer import Storage, write_beton
from trainer.data.index import open_index
from trainer.data.profile import find_profile
from trainer.recipe.profiles import PROFILES


@pytest.fixture
def photos(make_folder):
    """12 training photos of two classes: 10 JPEGs, of which one is grey, one PNG and one CMYK."""
    root = make_folder(train={"cat": 6, "dog": 6}, val={"cat": 1, "dog": 1})
    folder = root / "train" / "cat"
    first = Image.open(folder / "0.jpg").convert("RGB")
    first.save(folder / "7.png")
    (folder / "0.jpg").unlink()
    first.convert("CMYK").save(folder / "1.jpg")
    first.convert("L").save(folder / "2.jpg")
    return root


def written(root, out, storage=Storage(), **more):
    images = FolderSet(open_index(root, "train"))
    return (
        images,
        write_beton(images, out, "train", find_profile(str(root)), storage, **more),
        open_beton(out, "train", 3),
    )


def test_jpeg_files_keep_their_bytes_and_all_others_their_pixels(photos, tmp_path):
    images, facts, found = written(photos, tmp_path / "out")
    names = [images.index.path(i).name for i in range(12)]
    modes = found.samples["image"]["mode"].tolist()
    assert [name for name, mode in zip(names, modes, strict=True) if mode == RAW] == [
        "1.jpg",
        "7.png",
    ]  # CMYK is not any decoder's
    for i in range(12):
        assert np.array_equal(np.asarray(found.read(i)), np.asarray(images.read(i)))
        assert modes[i] == RAW or found.content(i) == images.index.path(i).read_bytes()
    assert facts.is_lossless and facts.fingerprint == facts.source == images.fingerprint


def test_shrunk_and_compressed_images_are_another_data_set(photos, tmp_path):
    images, facts, found = written(
        photos, tmp_path / "out", Storage(max_side_px=30, jpeg_share=0.25, quality=95)
    )
    assert not facts.is_lossless and facts.source == images.fingerprint != facts.fingerprint
    assert (found.samples["image"]["mode"] == JPEG).nonzero()[0].tolist() == [3, 7, 11]
    for i in range(12):
        width, height = images.read(i).size
        shrink = min(1, 30 / max(width, height))
        assert found.read(i).size == (round(width * shrink), round(height * shrink))
        assert [int(side[0]) for side in found.source_sides(np.array([i]))] == [height, width]
    other = written(
        photos, tmp_path / "other", Storage(max_side_px=30, jpeg_share=0.25, quality=80)
    )[1]
    assert other.fingerprint != facts.fingerprint


def test_the_same_bytes_every_time_also_after_a_stop_anywhere(photos, tmp_path, monkeypatch):
    def digest(out):
        return hashlib.sha256(beton_file(out, "train").read_bytes()).hexdigest()

    written(photos, tmp_path / "whole", num_threads=3)
    monkeypatch.setattr(beton_writer, "_IMAGES_AT_ONCE", 2)
    for stop_after in (1, 4, 7):
        out, seen = tmp_path / str(stop_after), []

        def each(seen=seen, stop_after=stop_after):
            seen.append(1)
            if len(seen) == stop_after:
                raise KeyboardInterrupt

        with pytest.raises(KeyboardInterrupt):
            written(photos, out, each=each)
        assert not beton_file(out, "train").exists()
        read = []
        monkeypatch.setattr(
            FolderSet,
            "read",
            lambda self, i, real=FolderSet.read, read=read: read.append(i) or real(self, i),
        )
        written(photos, out)
        monkeypatch.undo()
        monkeypatch.setattr(beton_writer, "_IMAGES_AT_ONCE", 2)
        assert digest(out) == digest(tmp_path / "whole") and min(read) == stop_after
        assert sorted(path.name for path in out.iterdir()) == ["train.beton", "train.json"]


def test_what_is_there_is_not_written_again_and_a_stop_with_other_storage_is_not_taken_up(
    photos, tmp_path
):
    out = tmp_path / "out"
    written(photos, out)
    before = beton_file(out, "train").stat().st_mtime_ns
    written(photos, out)
    assert beton_file(out, "train").stat().st_mtime_ns == before
    (out / ".train.beton.part").write_bytes(b"x" * 100)
    (out / ".train.beton.part.notes").write_bytes(b"y" * 1000)
    facts = written(photos, out, Storage(jpeg_share=0.0))[1]
    assert (
        facts.is_lossless
        and facts.jpeg_share == 0.0
        and beton_file(out, "train").stat().st_mtime_ns != before
    )


def test_a_source_written_anew_at_the_same_sizes_is_written_again(photos, tmp_path):
    out = tmp_path / "out"
    before = written(photos, out)[1]
    found = sorted((photos / "train").rglob("*.jpg"))
    path = next(path for path in found if path.read_bytes()[6:13] == b"JFIF\0\x01\x01")
    content, facts = path.read_bytes(), path.stat()
    # another comment: other bytes and time, the same name, size and pixels
    path.write_bytes(content.replace(b"JFIF\0\x01\x01", b"JFIF\0\x01\x02", 1))
    os.utime(path, ns=(facts.st_atime_ns, facts.st_mtime_ns + 10**9))
    assert path.stat().st_size == facts.st_size and path.read_bytes() != content
    after = written(photos, out)[1]
    assert after.source == before.source and after.content != before.content


def test_a_bad_image_and_impossible_storage_are_refused(photos, tmp_path):
    (photos / "train" / "dog" / "3.jpg").write_bytes(b"\xff\xd8nothing")
    with pytest.raises(BadImage, match=r"dog/3.jpg"):
        written(photos, tmp_path / "out")
    for words, place in (
        ({"max_side_px": 3}, "max_side=3"),
        ({"jpeg_share": 1.5}, "jpeg_share=1.5"),
        ({"quality": 0}, "quality=0"),
    ):
        with pytest.raises(UserError, match=place):
            Storage(**words)


def test_grey_digits_in_one_channel(tmp_path):
    images = open_set(PROFILES["digits-grey"], None, "val")
    write_beton(images, tmp_path, "val", PROFILES["digits-grey"])
    found = open_beton(tmp_path, "val", 1)
    assert found.labels.tolist() == images.labels.tolist()
    assert all(found.read(i).tobytes() == images.read(i).tobytes() for i in range(0, 360, 29))


def test_ffcvs_own_reader_reads_it(photos, tmp_path):
    from support.built import needs_ffcv

    needs_ffcv()
    from ffcv.reader import Reader

    found = written(photos, tmp_path / "out")[2]
    reader = Reader(str(found.path))
    assert reader.field_names == ["image", "label", "size", "crc"] and reader.num_samples == 12
    assert reader.metadata["f1"].tolist() == found.labels.tolist()
    assert reader.metadata["f0"]["data_ptr"].tolist() == found.samples["image"]["data_ptr"].tolist()
    assert reader.alloc_table["ptr"].tolist() == reader.metadata["f0"]["data_ptr"].tolist()
