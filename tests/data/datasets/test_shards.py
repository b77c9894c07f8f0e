"""Tar shards: what their members mean, and what of other people's tars is refused."""

import ast
import io
import os
import tarfile
import tracemalloc
from pathlib import Path

import pytest

from support import packing
from trainer.base.errors import DataError, UserError
from trainer.data.datasets import shards
from trainer.data.datasets.packed import open_files


def listed(*paths):
    """(class or number, name, content) of every image of the shards, as they lie."""
    listing, reader = shards.scan(list(paths)), shards.Reader(list(paths))
    labels = list(listing.labels_found)
    rows = zip(listing._labels, listing._files, listing._starts, listing._sizes, strict=True)
    return [
        (labels[row[0]], listing._name(i).decode(), reader.content(*row[1:]))
        for i, row in enumerate(rows)
    ]


def test_labels_are_the_cls_else_the_json_of_an_images_key(tmp_path):
    path = packing.write_tar(
        tmp_path / "a.tar",
        {
            "0.cls": b"7\n", "0.jpg": b"a", "0.json": b'{"label": 9}',
            "x/1.seg.png": b"b", "x/1.json": b'{"label": 3, "id": "q"}',
            "2.jpeg": b"c", "2.cls": b"great white shark",
            "3.WEBP": b"", "3.json": b'{"label": "0012"}',
            "4.txt": b"no image", "._0.jpg": b"not listed",
        },
    )  # fmt: skip
    assert listed(path) == [
        (7, "0.jpg", b"a"),
        (3, "x/1.seg.png", b"b"),
        ("great white shark", "2.jpeg", b"c"),
        (12, "3.WEBP", b""),
    ]


def test_members_that_are_no_images_are_counted(tmp_path):
    members = {
        "0.cls": b"7",
        "0.jpg": b"a",
        "0.txt": b"caption",
        "readme.md": b"",
        "info.json": b"",
    }
    listing = shards.scan([packing.write_tar(tmp_path / "a.tar", members)])
    assert listing.num_images == 1 and listing.ignored == {".txt": 1, ".md": 1}


def test_folders_are_classes_where_no_image_has_a_label(tmp_path):
    one = packing.write_tar(
        tmp_path / "a.tar",
        {"./7/a.b.jpg": b"1", "7/deeper/c.png": b"2", "8/.hidden/d.jpg": b"", "readme.json": b"{}"},
    )
    two = packing.write_tar(
        tmp_path / "b.tar", {"train/cat/1.jpg": b"3", "train/train/1.jpg": b"4"}
    )
    three = packing.write_tar(tmp_path / "c.tar", {"train/1.jpg": b"5"})
    assert listed(one, two, three) == [
        ("7", "a.b.jpg", b"1"), ("7", "deeper/c.png", b"2"), ("cat", "1.jpg", b"3"),
        ("train", "1.jpg", b"4"), ("train", "1.jpg", b"5")
    ]  # fmt: skip


@pytest.mark.parametrize("form", [tarfile.USTAR_FORMAT, tarfile.GNU_FORMAT, tarfile.PAX_FORMAT])
def test_long_names_and_every_form_of_tar(tmp_path, form):
    name = f"{'k' * 90}/{'ü' * 30}.jpg"
    with tarfile.open(tmp_path / "a.tar", "w", format=form) as tar:
        packing.add(tar, "cat/1.jpg", b"x" * 700)
        packing.add(tar, name, b"y")
    assert listed(tmp_path / "a.tar") == [("cat", "1.jpg", b"x" * 700), (*name.split("/"), b"y")]


def test_more_shards_than_files_may_be_open_are_read_in_any_order(tmp_path, monkeypatch):
    monkeypatch.setattr(shards, "_OPEN_FILES", 3)
    paths = [
        packing.write_tar(tmp_path / f"{i}.tar", {f"cat/{i}.jpg": bytes([i])}) for i in range(12)
    ]
    before = len(os.listdir("/proc/self/fd"))
    reader = shards.Reader(paths)
    starts = shards.scan(paths)._starts
    for i in [*range(12), 5, 0, 11, 5]:
        assert reader.content(i, starts[i], 1) == bytes([i])
        assert len(os.listdir("/proc/self/fd")) <= before + 3
    del reader
    assert len(os.listdir("/proc/self/fd")) <= before


def test_a_shard_of_many_images_is_listed_in_little_memory(tmp_path):
    with tarfile.open(tmp_path / "a.tar", "w") as tar:
        for i in range(2000):
            packing.add(tar, f"cat/{i:08d}.jpg", b"")
    shards.scan([tmp_path / "a.tar"])  # what a first call alone needs
    tracemalloc.start()
    try:
        listing = shards.scan([tmp_path / "a.tar"])
        held, most = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert listing.num_images == 2000 and held < 100 * 2000 and most < 2**20 + 300 * 2000, (
        held,
        most,
    )  # a TarInfo takes a kilobyte


WHOLE = {"1.jpg": b"x" * 2000, "1.cls": b"0", "2.jpg": b"y" * 2000, "2.cls": b"1"}


def _bytes(members=WHOLE):
    file = io.BytesIO()
    with tarfile.open(fileobj=file, mode="w") as tar:
        for name, content in members.items():
            packing.add(tar, name, content)
    return file.getvalue()


def _about(**changes):
    """A tar of one odd member."""
    about = tarfile.TarInfo("cat/1.jpg")
    for name, value in changes.items():
        setattr(about, name, value)
    file = io.BytesIO()
    with tarfile.open(fileobj=file, mode="w") as tar:
        tar.addfile(about)
    return file.getvalue()


def _too_large():
    about = tarfile.TarInfo("cat/1.jpg")
    about.size = 10**9
    return about.tobuf() + b"x" * 512 + bytes(1024)


def _negative():
    """A size below zero, as GNU tar's base-256 numbers allow: the next header would be before this
    one.
    """
    about = bytearray(tarfile.TarInfo("cat/1.jpg").tobuf())
    about[124:136] = (256**12 - 2048).to_bytes(12, "big")
    about[148:156] = b" " * 8
    about[148:156] = f"{sum(about):06o}\0 ".encode()
    return bytes(about) + bytes(2048)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (_bytes()[:1000], "damaged"),
        (_bytes()[:600], "damaged"),
        (_bytes()[: 512 + 2048 + 512 + 512], "damaged (no end mark at byte 3584 of 3584); "),
        (b"", "damaged (empty file); "),
        (b"\x1f\x8b" + bytes(600), "damaged"),
        (b"not a tar" * 200, "damaged"),
        (_bytes()[:3584] + b"\xff" * 512 + _bytes()[4096:], "damaged (no end mark at byte 3584"),
        (_bytes() + _bytes(), "damaged (data after its end mark"),
        (_too_large(), "damaged"),
        (_negative(), "damaged"),
        (
            _bytes({"../../cat/1.jpg": b"x"}),
            "'../../cat/1.jpg', a name that leads out of the tar; ",
        ),
        (_bytes({"/etc/1.jpg": b"x"}), "'/etc/1.jpg', a name that leads out of the tar; "),
        (
            _about(type=tarfile.SYMTYPE, linkname="/etc/passwd"),
            "'cat/1.jpg' is a link, a sparse file or a device; ",
        ),
        (
            _about(type=tarfile.LNKTYPE, linkname="cat/0.jpg"),
            "'cat/1.jpg' is a link, a sparse file or a device; ",
        ),
        (_about(type=tarfile.FIFOTYPE), "'cat/1.jpg' is a link, a sparse file or a device; "),
        (_bytes({"1.jpg": b"x"}), "'1.jpg' has no label; use 1.cls, "),
        (_bytes(WHOLE | {"3.jpg": b"x"}), "'3.jpg' has no label; use 3.cls, "),
        (_bytes(WHOLE | {"1.png": b"x"}), "two images called '1'; "),
        (_bytes({"1.jpg": b"x", "1.cls": b""}), "'1.cls' holds no label"),
        (
            _bytes(WHOLE | {"3.heic": b"x", "3.cls": b"1"}),
            "without an image, the first '3' with 3.h",
        ),
        (
            _bytes(WHOLE | {"3.gif": b"x", "3.json": b"{}"}),
            "without an image, the first '3' with 3.",
        ),
        (_bytes(WHOLE | {"3.cls": b"1"}), "1 labelled samples without an image, the first '3'"),
        (_bytes({"1.jpg": b"x", "1.cls": b"\xff"}), "'1.cls' holds no label"),
        (_bytes({"1.jpg": b"x", "1.json": b"[1"}), "'1.json' holds no label"),
        (
            _bytes({"1.jpg": b"x", "1.json": b"[" * 100_000}),
            "'1.json' holds no label (nested too deep); ",
        ),
        (
            _bytes({"1.jpg": b"x", "1.json": b'{"class": 1}'}),
            "'1.json' holds no label (no \"label\"); ",
        ),
        (_bytes({"1.jpg": b"x", "1.json": b'{"label": 1.5}'}), "'1.json' holds no label ('1.5'); "),
        (_bytes({"1.jpg": b"x", "1.json": b'{"label": true}'}), "'1.json' holds no label"),
    ],
)
def test_what_is_damaged_or_has_no_label_is_refused_in_one_line(tmp_path, content, message):
    path = tmp_path / "train-0.tar"
    path.write_bytes(content)
    with pytest.raises(DataError) as refused:
        shards.scan([path])
    text = str(refused.value)
    assert text.startswith(f"{path}: ") and message in text and "; " in text and "\n" not in text
    assert os.listdir(tmp_path) == ["train-0.tar"]  # nothing is extracted


def test_a_tar_damaged_anywhere_is_read_or_refused_and_never_anything_else(tmp_path):
    import random

    rng, content, path = random.Random(0), _bytes(), tmp_path / "train-0.tar"
    num_refused = 0
    for _ in range(300):
        damaged = bytearray(content)
        for _ in range(rng.randint(1, 4)):
            damaged[rng.randrange(512 * rng.choice((1, 6, 12, 20)))] = rng.randrange(256)
        path.write_bytes(damaged[: rng.choice((len(damaged), rng.randrange(len(damaged))))])
        try:
            listed(path)
        except UserError:
            num_refused += 1
    assert 100 < num_refused < 300


def test_nothing_is_ever_extracted():
    calls = [
        node.func.attr
        for node in ast.walk(ast.parse(Path(shards.__file__).read_text()))
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute)
    ]
    assert "next" in calls and not {call for call in calls if call.startswith("extract")}


def test_a_shard_that_was_cut_after_it_was_listed_makes_a_bad_image(tmp_path):
    from trainer.data.datasets.builtin import FolderSet
    from trainer.data.decode import BadImage

    for name in ("train-0.tar", "val-0.tar"):
        (tmp_path / name).write_bytes(_bytes())
    images = FolderSet(open_files(tmp_path, "train"))
    os.truncate(tmp_path / "train-0.tar", 3000)
    with pytest.raises(
        BadImage,
        match=r"train-0.tar \(1/2.jpg\): cannot be decoded \(the shard ends 2000 bytes early\); ",
    ):
        images.read(1)
