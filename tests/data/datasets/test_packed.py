"""Packed images are the image folder they were packed from: the same numbers, bytes, classes and
fingerprint.
"""

import hashlib
import os
import pickle
import shutil
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
from PIL import Image
from sklearn.datasets import load_sample_images
from typer.testing import CliRunner

from support import packing
from trainer.base.errors import DataError
from trainer.components.crops import Flip, RandomResizedCrop
from trainer.data.check import check_data
from trainer.data.dataset import open_data
from trainer.data.datasets import packed
from trainer.data.datasets.beton import open_beton
from trainer.data.datasets.builtin import FolderSet, for_training
from trainer.data.datasets.packed import PackedIndex, open_files, packed_kind
from trainer.data.decode import BadImage
from trainer.data.evaluation import EvaluationStream, evaluation_batches
from trainer.data.ffcv.beton_writer import write_beton
from trainer.data.index import open_index
from trainer.data.jpeg import Jpeg
from trainer.data.loader import TrainStream
from trainer.data.profile import find_profile
from trainer.recipe.assignment import Assignment

CLASSES = ["ant", "bee", "cat"]
CROP = RandomResizedCrop(area=(0.08, 1.0), aspect=(0.75, 1.3333), interpolation="random")
WAYS = {
    "cls": lambda root, out: packing.into_tars(root, out, "cls"),
    "json": lambda root, out: packing.into_tars(
        root, out, "json", "photos-{split}-{shard:04d}.tar"
    ),
    "folders": lambda root, out: packing.into_tars(root, out, "folders", "{split}/{shard}.tar"),
    "parquet": lambda root, out: packing.into_parquet(root, out, CLASSES),
    "parquet of names": lambda root, out: packing.into_parquet(
        root, out, None, val="val", group_rows=100
    ),
    "datasets": lambda root, out: packing.into_datasets(root, out, CLASSES),
}


def write_photos(root, num_train=7, num_val=3):
    """Cut-outs of two photographs as JPEG (colour, grey, progressive, CMYK), PNG and WebP; names
    are unlike their order.
    """
    photos, rng = load_sample_images().images, np.random.default_rng(0)
    forms = [
        ("jpg", "RGB", {}),
        ("JPEG", "L", {}),
        ("png", "RGB", {}),
        ("jpg", "RGB", {"progressive": True}),
        ("webp", "RGB", {}),
        ("jpg", "CMYK", {}),
    ]
    for split, num_images in (("train", num_train), ("val", num_val)):
        for number, name in enumerate(CLASSES):
            (root / split / name).mkdir(parents=True)
            for i in range(num_images):
                ending, mode, how = forms[(i + number) % len(forms)]
                top, left, height, width = (
                    int(rng.integers(low, high))
                    for low, high in ((0, 250), (0, 400), (40, 170), (40, 230))
                )
                cut = Image.fromarray(
                    photos[i % 2][top : top + height, left : left + width]
                ).convert(mode)
                cut.save(root / split / name / f"{number}{(i * 5) % 9}{i}é.{ending}", **how)
    return root


@pytest.fixture(scope="module")
def photos(tmp_path_factory):
    return write_photos(tmp_path_factory.mktemp("photos") / "photos")


@pytest.fixture(scope="module")
def packed_photos(photos, tmp_path_factory):
    """The photos packed in every way, by way."""
    return {
        way: pack(photos, tmp_path_factory.mktemp("packed") / "photos")
        for way, pack in WAYS.items()
    }


def stream_of(images, **changes):
    choices = dict(
        seed=3,
        augment=(CROP, Flip()),
        train_px=32,
        repeats=2,
        batch_images=6,
        num_micro_batches=2,
        steps_per_epoch=-(-images.num_images // 6),
        drop_last=False,
        bad_images="fail",
    )
    return TrainStream(images, **(choices | changes))


def digest(batches):
    sha = hashlib.sha256()
    for batch in batches:
        sha.update(f"{batch.step} {batch.micro_batch} {batch.num_replaced} ".encode())
        for values in (batch.images, batch.labels, batch.ids):
            sha.update(values.numpy().tobytes())
    return sha.hexdigest()


@pytest.mark.parametrize("way", WAYS)
def test_the_same_images_are_the_same_run_however_they_are_packed(photos, packed_photos, way):
    ours, folder = (
        open_data(find_profile(str(root)), root) for root in (packed_photos[way], photos)
    )
    assert isinstance(ours.train.index, PackedIndex) and not isinstance(
        folder.train.index, PackedIndex
    )
    assert (ours.classes, ours.fingerprint) == (tuple(CLASSES), folder.fingerprint)
    assert ours.train.labels.tolist() == folder.train.labels.tolist() == [0] * 7 + [1] * 7 + [2] * 7
    for road in (lambda images: images, for_training):
        mine, theirs = (stream_of(road(each.train)) for each in (ours, folder))
        assert digest(mine.batches(0, 10, 0, "cpu")) == digest(
            theirs.batches(0, 10, 0, "cpu")
        )  # 20 micro-batches
    assert digest(mine.batches(4, 8, 2, "cpu")) == digest(
        theirs.batches(4, 8, 0, "cpu")
    )  # taken up again, by two workers
    rank = [
        stream_of(each.train, assigned=Assignment(1, 2)).batches(0, 3, 0, "cpu")
        for each in (ours, folder)
    ]
    assert digest(rank[0]) == digest(rank[1])
    shown = [
        list(evaluation_batches(EvaluationStream(each.val, 32, 0.9, "bicubic", 4), 0, "cpu"))
        for each in (ours, folder)
    ]
    assert len(shown[0]) == 3
    for mine, theirs in zip(*shown, strict=True):
        assert mine[0].equal(theirs[0]) and mine[1].equal(theirs[1])


@pytest.mark.parametrize("way", WAYS)
def test_photographs_go_the_fast_road_for_jpeg_files(photos, packed_photos, way):
    mine, theirs = (
        for_training(FolderSet(open_files(root, "train"))) for root in (packed_photos[way], photos)
    )
    kinds = [(type(mine.read(i)), type(theirs.read(i))) for i in range(21)]
    assert all(one == other for one, other in kinds) and sum(one is Jpeg for one, _ in kinds) >= 9


@pytest.mark.parametrize("way", WAYS)
def test_what_is_open_is_sent_as_names_and_read_by_threads_and_forks_at_once(
    photos, packed_photos, way
):
    found, folder = open_files(packed_photos[way], "train"), open_index(photos, "train")
    sent = pickle.dumps(found)
    there = pickle.loads(sent)
    contents = [folder.path(i).read_bytes() for i in range(21)]
    assert len(sent) < 2000 and isinstance(there.labels, np.memmap)
    with ThreadPoolExecutor(4) as pool:
        for index in (found, there):
            assert list(pool.map(index.content, list(range(21)) * 4)) == contents * 4
    child = os.fork()
    if child == 0:  # what the parent has open serves both
        os._exit(0 if [found.content(i) for i in reversed(range(21))] == contents[::-1] else 1)
    assert [found.content(i) for i in range(21)] == contents
    assert os.waitpid(child, 0)[1] == 0


@pytest.mark.parametrize("way", ["cls", "parquet", "datasets"])
def test_bad_images_are_found_named_and_replaced_as_a_folders_are(tmp_path, way):
    root = write_photos(tmp_path / "photos")
    names = sorted(os.listdir(root / "train/bee"))
    (root / "train/bee" / names[2]).write_bytes(b"")
    (root / "train/bee" / names[4]).write_bytes((root / "train/bee" / names[4]).read_bytes()[:90])
    mine, theirs = (
        FolderSet(open_files(place, "train"))
        for place in (WAYS[way](root, tmp_path / "packed"), root)
    )
    report, expected = check_data(mine, 2), check_data(theirs)
    assert (
        len(report.bad) == len(expected.bad) == 2 and report.class_counts == expected.class_counts
    )
    assert {kind: len(paths) for kind, paths in report.odd.items()} == {
        kind: len(paths) for kind, paths in expected.odd.items()
    }
    assert (
        f"(bee/{names[2]}): cannot be decoded (0 bytes)" in report.bad[0]
        and str(tmp_path / "packed") in report.bad[0]
    )
    streams = [stream_of(for_training(images), bad_images="skip") for images in (mine, theirs)]
    assert digest(streams[0].batches(0, 8, 0, "cpu")) == digest(streams[1].batches(0, 8, 0, "cpu"))
    with pytest.raises(BadImage, match="bad_images=skip in training"):
        list(stream_of(mine).batches(0, 8, 0, "cpu"))


@pytest.mark.parametrize("way", ["cls", "parquet", "datasets"])
def test_an_unchanged_folder_is_not_listed_again_a_changed_one_is(
    photos, tmp_path, monkeypatch, way
):
    root = WAYS[way](photos, tmp_path / "packed")
    paths = [path for path in root.rglob("*") if path.is_file()]
    for path in paths:
        os.utime(path, (1e9, 1e9))
    monkeypatch.setattr(packed, "SETTLED_NS", -(10**18))  # no program sets a file's change time
    first = open_files(root, "train"), open_files(root, "val")
    with monkeypatch.context() as again:
        again.setattr(packed, "_build", lambda *_: pytest.fail("listed again"))
        second = open_files(root, "train"), open_files(root, "val")
    assert [index.fingerprint for index in first] == [index.fingerprint for index in second]
    assert second[1].content(4) == first[1].content(4)
    monkeypatch.setattr(
        packed, "_build", lambda *_: (_ for _ in ()).throw(DataError("listed again"))
    )
    os.utime(next(path for path in paths if "val" in str(path.relative_to(root))), (1e9, 1e9 + 5))
    with pytest.raises(DataError, match="listed again"):
        open_files(root, "train")


@pytest.mark.parametrize("content", [b"", b"{}", b"garbage"])
@pytest.mark.parametrize("pattern", ["train.json", "train-*.starts.npy", "train-*.labels.npy"])
def test_a_damaged_cache_is_built_anew(packed_photos, tmp_path, cache, pattern, content):
    root = shutil.copytree(packed_photos["cls"], tmp_path / "packed")
    for path in root.iterdir():
        os.utime(path, (1e9, 1e9))
    expected = open_files(root, "train").content(5)
    (damaged,) = cache.rglob(pattern)
    damaged.write_bytes(content)
    assert open_files(root, "train").content(5) == expected


def test_an_image_folder_in_place_of_shards_is_seen_and_the_other_way_round(
    photos, packed_photos, tmp_path
):
    root = tmp_path / "data"
    for way in (packed_photos["cls"], photos, packed_photos["parquet"]):
        shutil.copytree(way, root)
        assert open_files(root, "train").fingerprint == open_index(photos, "train").fingerprint
        shutil.rmtree(root)


def test_check_data_takes_shards_from_the_command_line(packed_photos):
    from trainer.cli.main import app

    done = CliRunner().invoke(
        app, ["check-data", "--data", str(packed_photos["folders"]), "--workers", "1"]
    )
    assert done.exit_code == 0, done.output
    assert "21 images, 3 classes of 7 to 7" in done.output and "CMYK" in done.output


def test_a_beton_of_shards_holds_the_files_own_bytes(photos, packed_photos, tmp_path):
    profile = find_profile(str(photos))
    for root, to in ((photos, tmp_path / "a"), (packed_photos["cls"], tmp_path / "b")):
        write_beton(FolderSet(open_files(root, "train")), to, "train", profile)
    assert (
        open_beton(tmp_path / "b", "train", 3).fingerprint
        == open_index(photos, "train").fingerprint
    )
    assert (tmp_path / "a/train.beton").read_bytes() == (tmp_path / "b/train.beton").read_bytes()


def _shard(path, *names, label=b"0"):
    members = {}
    for name in names:
        members |= {f"{name}.jpg": b"x", f"{name}.cls": label}
    return packing.write_tar(path, members)


def _numbered(root, train, val):
    for split, labels in (("train", train), ("val", val)):
        members = {}
        for i, label in enumerate(labels):
            members |= {f"{i}.jpg": b"x", f"{i}.cls": str(label).encode()}
        packing.write_tar(root / f"{split}-000000.tar", members)
    return root


def test_numbers_name_their_classes_unless_classes_txt_does(tmp_path):
    _numbered(tmp_path, [*range(11), 3], [*range(11)])
    found = open_files(tmp_path, "train")
    assert found.classes == tuple(map(str, range(11))) and found.labels.tolist() == [
        0,
        1,
        2,
        3,
        3,
        *range(4, 11),
    ]
    (tmp_path / "classes.txt").write_text("".join(f"class {letter}\n" for letter in "kjihgfedcba"))
    found = open_files(tmp_path, "train")
    assert found.classes[:2] == ("class k", "class j") and found.labels.tolist() == [
        0,
        1,
        2,
        3,
        3,
        *range(4, 11),
    ]


def test_names_in_classes_txt_keep_its_order(photos, tmp_path):
    root = packing.into_tars(photos, tmp_path)
    (root / "classes.txt").write_text("cat\nant\nbee\n")
    found = open_files(root, "train")
    assert (
        found.classes == ("cat", "ant", "bee")
        and found.content(0) == open_index(photos, "train").path(14).read_bytes()
    )


@pytest.mark.parametrize(
    ("train", "val", "names", "message"),
    [
        ([0, 1, 3], [0, 1, 3], None, "no label 2, but label 3; "),
        ([0, 1, -1], [0, 1, -1], None, "label -1; "),
        ([0, 1], [0], None, "class '1' is in train only; "),
        ([0, 1], [0, 1, 2], None, "class '2' is in val only; "),
        ([0, 1, "dog"], [0, 1], None, "some labels are numbers, some names; "),
        ([0, 1, 2], [0], "a\nb\n", "label 2 is not among the 2 named classes; "),
        ([0, 1], [0], "a\nb\nc\n", "class 'c' has no image in train; "),
        ([0, 1], [0], "a\n\nb\n", "classes.txt: "),
        (["a", "b"], ["a"], "a\nc\n", "label 'b' is not among the 2 named classes; "),
    ],
)
def test_labels_that_fit_no_class_are_refused_in_one_line(tmp_path, train, val, names, message):
    _numbered(tmp_path, train, val)
    if names:
        (tmp_path / "classes.txt").write_text(names)
    with pytest.raises(DataError) as refused:
        open_files(tmp_path, "train")
    text = str(refused.value)
    assert text.startswith(str(tmp_path)) and message in text and "; " in text and "\n" not in text


def test_a_named_class_may_be_missing_in_val(tmp_path):
    _numbered(tmp_path, [0, 1, 2], [0, 2])
    (tmp_path / "classes.txt").write_text("a\nb\nc\n")
    assert open_files(tmp_path, "val").labels.tolist() == [0, 2]


@pytest.mark.parametrize(
    ("names", "stand_in", "num_val"),
    [
        (["test-0.tar"], "test", 1),
        (["test/a.tar", "test/b.tar"], "test", 2),
        (["valid-0.tar", "test-0.tar", "test-1.tar"], "valid", 1),
        (["val-0.tar", "valid-0.tar", "test-0.tar"], "", 1),
    ],
)
def test_files_of_valid_or_test_stand_for_val(tmp_path, names, stand_in, num_val):
    for name in ["train-0.tar", *names]:
        _shard(tmp_path / name, "a")
    val = open_files(tmp_path, "val")
    assert (val.stand_in, val.num_images) == (stand_in, num_val)


def _mixed(names):
    return lambda root: [_shard(root / name, "1") for name in names]


@pytest.mark.parametrize(
    ("write", "message"),
    [
        (_mixed(["train-0.tar"]), "tar shards without val; use val-000000.tar or val/*.tar"),
        (_mixed(["train-0.tar", "Dev-0.tar"]), "val/*.tar (rename Dev… to val…)"),
        (_mixed(["val-0.tar", "test-0.tar"]), "tar shards without train; "),
        (_mixed(["train-0.tar", "train/0.tar", "val-0.tar"]), "images of train both in "),
        (_mixed(["train-0.tar", "val-0.tar", "validation-0.tar"]), "images of val both in "),
        (
            _mixed(["train-0.tar", "train-val-1.tar"]),
            "train-val-1.tar: ",
        ),
        (
            _mixed(["train-00000-of-00002.tar", "val-0.tar"]),
            "1 files, but 2 by their names; ",
        ),
        (
            _mixed(["train-0.tar", "val-0.tar", "data/train-0.parquet"]),
            "holds tar shards and parquet files; ",
        ),
        (
            _mixed(["train-0.tar", "val-0.tar", "train/cat/1.jpg"]),
            "holds an image folder and tar shards; ",
        ),
        (_mixed(["00000.tar", "00001.tar"]), "00000.tar: belongs to no split; "),
        (
            _mixed(["plain/train-0.parquet", "plain/validation-0.parquet"]),
            "plain, which holds one",
        ),
        (
            _mixed(["train-0.tar", "train-1.tar.gz", "val-0.tar"]),
            "train-1.tar.gz: compressed, ",
        ),
        (_mixed(["train/0.tar.zst", "val/0.tar"]), "0.tar.zst: compressed, "),
        (
            _mixed(["train-0.tar", "val-0.tar", "dataset_dict.json", "train/state.json"]),
            "holds tar shards and a datasets folder; ",
        ),
    ],
)
def test_folders_that_are_no_one_data_set_are_refused_in_one_line(tmp_path, write, message):
    write(tmp_path)
    with pytest.raises(DataError) as refused:
        find_profile(str(tmp_path))
    text = str(refused.value)
    assert str(tmp_path) in text and message in text and "; " in text and "\n" not in text


def test_archives_that_an_image_folder_was_unpacked_from_may_lie_beside_it(photos, tmp_path):
    root = shutil.copytree(photos, tmp_path / "photos")
    for name in (
        "train.tar",
        "ILSVRC2012_img_train.tar",
        "train/ant.tar",
        "train.tar.gz",
        "test-0.parquet",
        "devkit.tar.gz",
    ):
        (root / name).write_bytes(b"x")
    assert packed_kind(root) is None and open_files(root, "train").num_images == 21
