"""Masks in folders: found, checked, and moved exactly as their images are."""

import numpy as np
import pytest
import torch
from PIL import Image

from support.masked import (
    CLASSES,
    COLOURS,
    IGNORED,
    picture,
    write_masked,
    write_recipe,
    write_tables,
)
from trainer.base.errors import DataError, UserError
from trainer.base.settings import make_settings
from trainer.components.crops import Flip, ScaleCrop
from trainer.data.check import check_data
from trainer.data.content import content_digest
from trainer.data.dataset import open_data
from trainer.data.datasets.layouts import layout_of
from trainer.data.decode import BadImage
from trainer.data.profile import find_profile
from trainer.runs.job import Job, plan_of
from trainer.tasks.segmentation.masks import moved_mask, read_classes

SETTINGS = make_settings("cpu", workers="0")


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    return write_masked(tmp_path_factory.mktemp("set") / "shapes")


def plan_for(root, tmp_path, overrides="", **job):
    path = write_recipe(tmp_path)
    return plan_of(Job(str(path), "test_resnet", str(root), overrides=overrides, **job))


# ---- found


@pytest.mark.parametrize("is_split_first", [False, True])
def test_a_folder_is_found_with_its_counts_and_classes(tmp_path, is_split_first):
    root = write_masked(tmp_path / "shapes", is_split_first=is_split_first)
    profile = find_profile(str(root))
    found = profile.name, profile.task, profile.num_classes, profile.num_train, profile.num_val
    assert found == ("shapes", "segmentation", 3, 12, 4)
    data = open_data(profile, root)
    assert data.classes == CLASSES and data.val.num_images == 4
    assert np.array_equal(data.train.read_target(3), picture(3)[1])


def test_vocs_layout_has_vocs_classes_and_palette_masks(tmp_path):
    for name in ("JPEGImages", "SegmentationClass", "ImageSets/Segmentation"):
        (tmp_path / name).mkdir(parents=True)
    for i, split in enumerate(("train", "val")):
        (tmp_path / "ImageSets" / "Segmentation" / f"{split}.txt").write_text(f"a{i}\n")
        image, mask = picture(i)
        Image.fromarray(image).save(tmp_path / "JPEGImages" / f"a{i}.jpg")
        labels = Image.fromarray(mask)
        labels.putpalette([value % 256 for value in range(768)])
        labels.save(tmp_path / "SegmentationClass" / f"a{i}.png")
    profile = find_profile(str(tmp_path))
    assert (profile.num_classes, profile.num_train, profile.num_val) == (21, 1, 1)
    val = open_data(profile, tmp_path).val
    assert val.classes[15] == "person" and np.array_equal(val.read_target(0), picture(1)[1])


def test_a_class_that_is_not_scored_is_ignored_wherever_it_stands(tmp_path):
    (tmp_path / "classes.txt").write_text("!other\nwall\nfloor\n!void\n")
    classes, table = read_classes(tmp_path / "classes.txt")
    assert classes == ("wall", "floor") and table[:4] == (IGNORED, 0, 1, IGNORED)
    assert table[255] == IGNORED and len(table) == 256 and set(table[4:255]) == {-1}


@pytest.mark.parametrize("text", ["one\n", "a\nb\na\n", "a\n\x1b[2J\n", "!a\n!b\n"])
def test_a_classes_file_that_says_nothing_is_refused(tmp_path, text):
    (tmp_path / "classes.txt").write_text(text)
    with pytest.raises(DataError, match="classes.txt"):
        read_classes(tmp_path / "classes.txt")


def test_a_recipe_for_whole_images_is_not_for_masks_and_the_other_way_round(root, tmp_path):
    with pytest.raises(UserError, match="task classification.* for segmentation"):
        plan_of(Job("A3", "test_resnet", str(root)))
    with pytest.raises(UserError, match="task segmentation.* for classification"):
        plan_for("digits", tmp_path)


@pytest.mark.parametrize(
    "columns", [("image", "mask"), ("pixel_values", "label"), ("image", "drawn")]
)
def test_a_table_of_images_and_masks_is_the_folder_of_the_same_files(root, tmp_path, columns):
    """Counts, classes, masks, the digest of the content, and every sample of training for any
    workers.
    """
    table = write_tables(tmp_path / "shapes", root, columns)
    profile = find_profile(str(table))
    assert profile == find_profile(str(root))
    of_files, of_rows = open_data(profile, root), open_data(profile, table)
    assert of_rows.classes == CLASSES and of_rows.split == "val"
    assert np.array_equal(of_rows.val.read_target(3), picture(1003)[1])
    for files, rows in ((of_files.train, of_rows.train), (of_files.val, of_rows.val)):
        *_, first = content_digest(files)
        *_, second = content_digest(rows)
        assert first == second and files.fingerprint != rows.fingerprint
    plan = plan_for(root, tmp_path)
    streams = [
        data.train_stream(plan, make_settings("cpu", workers=number), 0)
        for data, number in ((of_files, "0"), (of_rows, "0"), (of_rows, "2"))
    ]
    for one, *others in zip(*streams, strict=True):
        for other in others:
            assert torch.equal(one.labels, other.labels) and torch.equal(one.ids, other.ids)
            if one.is_augmented == other.is_augmented:
                assert torch.equal(one.images, other.images)


def test_a_bad_mask_of_a_table_is_named_by_its_row(tmp_path):
    root = write_masked(tmp_path / "files", 6, 2)
    write("002.png", np.full((48, 64), 7, np.uint8))(root)
    train = open_data(find_profile(str(root)), write_tables(tmp_path / "rows", root)).train
    [line] = check_data(train).bad
    assert "mask of row 2" in line and "label 7" in line and str(tmp_path / "rows") in line


def test_a_table_without_classes_or_of_whole_images_is_no_table_of_masks(root, tmp_path):
    import datasets

    table = write_tables(tmp_path / "a", root)
    (table / "classes.txt").unlink()
    with pytest.raises(DataError, match=r"classes\.txt: .*one a line"):
        find_profile(str(table))
    depth = ("image", "depth")
    label = (datasets.ClassLabel(names=["in", "out"]), "in")
    whole = write_tables(tmp_path / "b", root, depth, label=label)
    assert layout_of(whole) is None
    both = write_tables(tmp_path / "c", root, label=label)
    assert layout_of(both) is not None  # classes.txt says that the masks are meant
    (both / "classes.txt").unlink()
    assert layout_of(both) is None


# ---- bad ones


def spoiled(tmp_path, change):
    root = write_masked(tmp_path / "shapes", 6, 2)
    profile = find_profile(str(root))  # counted while all was well
    change(root)
    return root, profile


def write(name, array):
    return lambda root: Image.fromarray(array).save(root / "masks" / "train" / name)


BAD = {
    "another size": (write("002.png", np.zeros((48, 63), np.uint8)), "63 x 48 px .* 64 x 48"),
    "colours": (write("002.png", COLOURS[np.zeros((48, 64), int)]), "in colours"),
    "16 bits": (write("002.png", np.zeros((48, 64), np.uint16)), "mode I;16"),
    "unknown": (write("002.png", np.full((48, 64), 7, np.uint8)), "label 7, .* 3 classes"),
    "no image": (
        lambda root: (root / "masks" / "train" / "002.png").write_bytes(b"\x89PNG\r\n\x1a\n"),
        "cannot be decoded",
    ),
}


@pytest.mark.parametrize("kind", BAD)
def test_a_bad_mask_is_named_by_check_data_and_by_training(tmp_path, kind):
    change, said = BAD[kind]
    root, profile = spoiled(tmp_path, change)
    data = open_data(profile, root)
    report = check_data(data.train)
    assert not report.is_sound and len(report.bad) == 1
    with pytest.raises(BadImage, match=said) as error:
        data.train.read_target(2)
    assert str(error.value) == report.bad[0] and "002.png" in str(error.value)
    plan = plan_for(root, tmp_path)
    with pytest.raises(BadImage, match=said):
        list(data.train_stream(plan, SETTINGS, 0))


def test_a_mask_that_is_missing_is_named(tmp_path):
    root = write_masked(tmp_path / "shapes")
    for i in (4, 5):
        (root / "masks" / "train" / f"00{i}.png").unlink()
    with pytest.raises(DataError, match=r"004\.png: no mask .*, nor of 1 more"):
        find_profile(str(root))


def test_without_classes_it_says_what_to_write(tmp_path):
    root = write_masked(tmp_path / "shapes")
    (root / "classes.txt").unlink()
    with pytest.raises(DataError, match=r"classes\.txt: .*one a line"):
        find_profile(str(root))


def test_check_data_counts_images_of_each_class(root):
    data = open_data(find_profile(str(root)), root)
    report = check_data(data.val)
    assert report.is_sound and report.class_counts == {"ground": 4, "red": 4, "green": 4}
    assert report.pixels is not None and report.pixels.sizes[0].tolist() == [64, 48]


def test_masks_count_for_the_content(tmp_path):
    root = write_masked(tmp_path / "shapes")
    before = open_data(find_profile(str(root)), root).train
    *_, first = content_digest(before)
    _image, mask = picture(0)
    mask[10, 10] = 1 if mask[10, 10] != 1 else 2
    Image.fromarray(mask).save(root / "masks" / "train" / "000.png")
    *_, second = content_digest(open_data(find_profile(str(root)), root).train)
    assert first != second


# ---- moved


def labels_in(image):
    """The class of each pixel of an image [C, H, W] by the nearest of COLOURS."""
    pixels = image.permute(1, 2, 0).numpy().astype(int)
    return np.abs(pixels[:, :, None] - (COLOURS + 15).astype(int)).sum(-1).argmin(-1)


def test_masks_move_exactly_as_their_images(root, tmp_path):
    """Every crop, scale and flip: where an image shows a colour, its mask has that class. Next to
    edges, which the image's filter blends, one of the classes around.
    """
    plan = plan_for(root, tmp_path, "augment.color_jitter=null image.train_px=96")
    stream = open_data(plan.profile, root).train_stream(plan, SETTINGS, 0)
    num_flipped, num_padded = 0, 0
    for batch in stream:
        assert batch.labels.shape == (len(batch.images), 96, 96)
        for image, mask in zip(batch.images, batch.labels.numpy(), strict=True):
            assert set(np.unique(mask)) <= {0, 1, 2, IGNORED}
            around = np.stack(
                [np.roll(mask, (down, right), (0, 1)) for down in range(-3, 4)
                 for right in range(-3, 4)]
            )  # fmt: skip
            is_inside = (around == mask).all(0) & (mask != IGNORED)
            is_inside[:3] = is_inside[-3:] = is_inside[:, :3] = is_inside[:, -3:] = False
            assert np.array_equal(labels_in(image)[is_inside], mask[is_inside])
            num_padded += (mask == IGNORED).mean() > 0.2
        num_flipped += 1
    assert num_padded > 0 and num_flipped > 1


def test_a_crop_of_its_own_size_moves_pixel_by_pixel():
    _image, mask = picture(3)
    labels = np.asarray(mask)
    for box, is_flipped in (((5, 7, 30, 30), False), ((5, 7, 30, 30), True)):
        top, left, side, _ = box
        found = moved_mask(labels, np.array(box), is_flipped, side)
        part = labels[top : top + side, left : left + side]
        assert np.array_equal(found, part[:, ::-1] if is_flipped else part)


@pytest.mark.parametrize("side", [17, 40, 41, 48, 90, 133])
def test_a_resized_mask_is_pils_nearest(side):
    _, mask = picture(5)
    found = moved_mask(mask, np.array((3, 6, 41, 41)), False, side)
    part = Image.fromarray(mask).crop((6, 3, 47, 44)).resize((side, side), Image.Resampling.NEAREST)
    assert np.array_equal(found, np.asarray(part))


def test_what_is_outside_of_an_image_is_ignored():
    mask = np.ones((4, 6), np.uint8)
    found = moved_mask(mask, np.array((0, 0, 8, 8)), False, 8)
    assert (found[:4, :6] == 1).all() and (found[4:] == IGNORED).all()
    assert (found[:, 6:] == IGNORED).all()


def test_scale_crop_draws_squares_by_the_sources_rule():
    """Independent of the class: sides and starts from the bounds alone."""
    crop = ScaleCrop(scale=(0.5, 2.0), share=480 / 520, interpolation="bilinear")
    ids = np.stack([np.zeros(4000, int), np.arange(4000), np.zeros(4000, int)], 1)
    heights, widths = np.full(4000, 375), np.full(4000, 500)
    boxes, is_bicubic = crop.draw(1, ids, heights, widths)
    top, left, height, width = boxes.T
    assert (height == width).all() and not is_bicubic.any()
    factor = 375 * 480 / 520 / height
    assert 0.5 <= factor.min() < 0.51 and 1.99 < factor.max() <= 2.02
    assert factor.mean() == pytest.approx(1.25, abs=0.03)
    is_larger = height > 375
    assert is_larger.any() and (top[is_larger] == 0).all()
    assert (top >= 0).all() and (left + width <= np.maximum(500, width)).all()
    is_small = height < 200
    assert left[is_small].min() == 0 or left[is_small].min() < 10
    assert (left + width)[is_small].max() > 490


def test_whole_images_are_refused_a_crop_that_reaches_outside():
    overrides = (
        "augment='[{name: scale_crop, scale: [0.5, 2.0], share: 0.9, interpolation: bilinear}]'"
    )
    with pytest.raises(UserError, match="scale_crop.*out of the image"):
        plan_of(Job("A3", "test_resnet", overrides=overrides))


@pytest.mark.parametrize(
    "given",
    [
        "mix='{name: mixup, alpha: 0.2}'",
        "augment.rand_augment='{magnitude: 7, num_operations: 2}'",
        "image.test_crop_share=0.875",
    ],
)
def test_what_means_whole_images_is_refused(root, tmp_path, given):
    with pytest.raises(UserError):
        plan_for(root, tmp_path, given)


def test_any_number_of_workers_gives_the_same_samples(root, tmp_path):
    plan = plan_for(root, tmp_path)
    data = open_data(plan.profile, root)
    none, two = (
        list(data.train_stream(plan, make_settings("cpu", workers=number), 0))
        for number in ("0", "2")
    )
    assert len(none) == len(two) == plan.num_steps * plan.num_micro_batches
    for one, other in zip(none, two, strict=True):
        assert torch.equal(one.labels, other.labels) and torch.equal(one.ids, other.ids)
        if one.is_augmented == other.is_augmented:
            assert torch.equal(one.images, other.images)
    assert Flip().draw(0, none[0].ids.numpy()).dtype == bool


def test_an_evaluation_has_whole_images_and_masks_at_full_size(root, tmp_path):
    plan = plan_for(root, tmp_path, "image.test_px=24")
    batches = list(open_data(plan.profile, root).val_batches(plan, SETTINGS))
    assert [tuple(images.shape) for images, _ in batches] == [(1, 3, 24, 32)] * 4
    assert all(
        np.array_equal(mask[0].numpy(), picture(1000 + i)[1]) for i, (_, mask) in enumerate(batches)
    )
