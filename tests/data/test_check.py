"""The check of a whole data set."""

import io

import numpy as np
from PIL import Image
from rich.console import Console

from trainer.data.check import DataReport, check_data, report_table, rotated_note
from trainer.data.dataset import open_data
from trainer.data.datasets.builtin import FolderSet, open_set
from trainer.data.ffcv.beton_writer import write_beton
from trainer.data.index import open_index
from trainer.data.profile import find_profile
from trainer.recipe.profiles import PROFILES


def rendered(report):
    console = Console(file=io.StringIO(), width=400)
    console.print(report_table(report, "train"))
    return console.file.getvalue()


def test_bad_and_odd_files_are_listed(make_folder):
    root = make_folder(train={"cat": 4, "dog": 3}, val={"cat": 1, "dog": 1})
    cats = root / "train/cat"
    (cats / "0.jpg").write_bytes(b"")
    (cats / "1.jpg").rename(cats / "[bold]1.jpg")
    (cats / "[bold]1.jpg").write_bytes((cats / "2.jpg").read_bytes()[:400])
    Image.open(cats / "2.jpg").convert("CMYK").save(cats / "2.jpg")
    images = FolderSet(open_index(root, "train"))

    report = check_data(images, num_threads=2)

    assert not report.is_sound
    bad = [line.split(": cannot be decoded")[0] for line in report.bad]
    assert bad == [str(cats / "0.jpg"), str(cats / "[bold]1.jpg")]
    assert report.odd == {"CMYK": (str(cats / "2.jpg"),)}
    assert report.class_counts == {"cat": 4, "dog": 3}
    text = rendered(report)
    assert "7 images, 2 classes of 3 to 4" in text and "[bold]1.jpg" in text and "0 bytes" in text


def test_a_sound_folder_is_called_sound(make_folder):
    root = make_folder(train={"cat": 2, "dog": 3}, val={"cat": 1, "dog": 1})
    report = check_data(FolderSet(open_index(root, "train")))
    assert report.is_sound and not report.odd


def test_a_set_in_memory_is_counted():
    report = check_data(open_set(PROFILES["digits"], None, "val"))
    assert report.is_sound and report.class_counts == dict.fromkeys("0123456789", 36)


def test_every_image_of_a_beton_is_read(make_folder, tmp_path):
    root = make_folder(train={"cat": 2, "dog": 3}, val={"cat": 1, "dog": 1})
    profile, out = find_profile(str(root)), tmp_path / "out"
    for split in ("train", "val"):
        write_beton(open_set(profile, root, split), out, split, profile)
    images = open_data(profile, out, in_beton=True).train
    assert check_data(images).is_sound
    content = bytearray(images.path.read_bytes())
    place = content.find(next((root / "train/dog").glob("*.jpg")).read_bytes())
    content[place + 200] ^= 255
    images.path.write_bytes(content)
    report = check_data(open_data(profile, out, in_beton=True).train)
    assert len(report.bad) == 1 and "train.beton" in report.bad[0]


def test_many_bad_files_are_named_in_part(make_folder):
    root = make_folder(train={"cat": 25, "dog": 1}, val={"cat": 1, "dog": 1})
    for path in (root / "train/cat").iterdir():
        path.write_bytes(b"")
    text = rendered(check_data(FolderSet(open_index(root, "train"))))
    assert text.count("cannot be decoded") == 20 and "… and 5 more" in text


def test_files_of_other_channels_are_bad_and_alpha_is_a_channel_among_four(make_folder):
    root = make_folder(train={"cat": 2, "dog": 1}, val={"cat": 1, "dog": 1})
    Image.new("RGBA", (9, 9)).save(root / "train/cat/a.png")
    np.save(root / "train/dog/b.npy", np.zeros((9, 9, 4), np.uint8))
    report = check_data(FolderSet(open_index(root, "train"), num_channels=4))
    assert [line.split(": ")[0] for line in report.bad] == [
        str(root / "train" / name) for name in ("cat/0.jpg", "cat/1.jpg", "dog/0.jpg")
    ]
    assert not report.odd


def test_a_turned_camera_is_explained_for_training():
    """EXIF orientation is not applied: the report says so where such files are."""
    turned = DataReport(2, (), {"EXIF-rotated": ("a.jpg",)}, {})
    assert "not turned" in rotated_note(DataReport(1, (), {}, {}), turned)
    assert rotated_note(DataReport(1, (), {}, {})) == ""


def test_the_remedy_for_turned_links_is_about_the_files_that_they_lead_to(tmp_path):
    """exiftran in place would put a file where the link is, and leave the image as it was."""
    (tmp_path / "a.jpg").symlink_to(tmp_path / "b.jpg")
    paths = {"EXIF-rotated": (str(tmp_path / "a.jpg"),)}
    assert "links" in rotated_note(DataReport(1, (), paths, {}))
    assert "links" not in rotated_note(DataReport(1, (), {"EXIF-rotated": ("b.jpg",)}, {}))
