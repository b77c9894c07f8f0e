"""Boxes from COCO's JSON and VOC's XML: what is read, and what is refused by name."""

import numpy as np
import pytest
from PIL import Image

from support.boxed import changed, coco_folder
from trainer.base.errors import DataError
from trainer.data.check import check_data
from trainer.data.dataset import open_data
from trainer.data.datasets.layouts import layout_of
from trainer.data.decode import BadImage
from trainer.data.profile import find_profile
from trainer.tasks.detection.coco import annotation_files


@pytest.fixture
def folder(tmp_path):
    return coco_folder(tmp_path / "boxes")


def opened(folder):
    return open_data(find_profile(str(folder)), folder)


def test_boxes_are_read_by_image_and_classes_by_their_ids(folder):
    data = opened(folder)
    assert data.classes == ("bar", "block")  # ids 3 and 11
    assert (data.train.num_images, data.val.num_images) == (24, 9)
    profile = find_profile(str(folder))
    assert (profile.task, profile.num_classes, profile.num_train) == ("detection", 2, 24)
    for place in range(data.train.num_images):
        image, boxes = np.asarray(data.train.read(place)), data.train.read_target(place)
        for (left, top, right, bottom), label in zip(
            boxes.sides.astype(int), boxes.labels, strict=True
        ):
            inside = image[top:bottom, left:right].reshape(-1, 3)
            color = ((200, 30, 30), (30, 30, 220))[label]
            assert (inside == color).all(1).mean() > 0.2  # another may lie above
    assert not data.train.read_target(0).is_crowd.any()


def test_the_fingerprint_is_of_boxes_too(folder):
    before = opened(folder).fingerprint
    changed(
        folder / "instances_val.json", lambda data: data["annotations"][0].update(bbox=[1, 1, 9, 9])
    )
    assert opened(folder).fingerprint != before


def image_of(data, box):
    return next(one for one in data["images"] if one["id"] == box["image_id"])


BAD_BOXES = {
    "reversed": (lambda data, box: box.update(bbox=[10, 10, -4, 6]), "reversed"),
    "no size": (lambda data, box: box.update(bbox=[10, 10, 0, 6]), "no size"),
    "outside": (lambda data, box: box.update(bbox=[60, 60, 40, 40]), "outside"),
    "far away": (lambda data, box: box.update(bbox=[500, 10, 4, 4]), "outside"),
    "NaN": (lambda data, box: box.update(bbox=[float("nan"), 1, 4, 4]), "finite"),
    "three numbers": (lambda data, box: box.update(bbox=[1, 2, 3]), "four numbers"),
    "text": (lambda data, box: box.update(bbox="here"), "four numbers"),
    "no box": (lambda data, box: box.pop("bbox"), "four numbers"),
    "unknown class": (lambda data, box: box.update(category_id=99), "category_id 99"),
    "odd class": (lambda data, box: box.update(category_id=[3]), "unknown class"),
    "other size": (lambda data, box: image_of(data, box).update(width=1000), "1000"),
    "missing image": (lambda data, box: image_of(data, box).update(file_name="gone.png"), "gone.png"),
}  # fmt: skip


@pytest.mark.parametrize("kind", BAD_BOXES)
def test_a_bad_box_is_named_with_its_image(folder, kind):
    change, said = BAD_BOXES[kind]
    changed(folder / "instances_train.json", lambda data: change(data, data["annotations"][0]))
    train = opened(folder).train
    report = check_data(train)
    assert not report.is_sound and len(report.bad) == 1, report.bad
    assert said in report.bad[0] and "images/train/" in report.bad[0]
    [place] = [
        place for place in range(train.num_images) if str(train.path(place)) in report.bad[0]
    ]
    with pytest.raises(BadImage, match=said):
        train.read_target(place)
    with pytest.raises(BadImage, match=said):
        train.read(place)


def test_a_box_beyond_the_edge_by_rounding_is_cut_off(folder):
    changed(
        folder / "instances_train.json",
        lambda data: data["annotations"][0].update(bbox=[-0.5, 40, 48.9, 24.4]),
    )
    train = opened(folder).train
    assert check_data(train).is_sound
    assert train.read_target(0).sides[0].tolist() == [0, 40, 48, 64]


def test_images_without_boxes_and_with_crowds_are_listed(folder):
    def change(data):
        first = data["annotations"][0]["image_id"]
        data["annotations"] = [one for one in data["annotations"] if one["image_id"] != first]
        data["annotations"][0]["iscrowd"] = 1

    changed(folder / "instances_train.json", change)
    report = check_data(opened(folder).train)
    assert report.is_sound
    assert len(report.odd["no box"]) == 1 and len(report.odd["crowds or difficult boxes"]) == 1


BAD_FILES = {
    "not JSON": (lambda path: path.write_text("{"), "COCO's JSON"),
    "a list": (lambda path: path.write_text("[]"), "COCO's JSON"),
    "no categories": (
        lambda path: changed(path, lambda data: data.pop("categories")), "categories",
    ),
    "two of one id": (
        lambda path: changed(path, lambda data: data["categories"][0].update(id=3)), "id 3",
    ),
    "an unknown image": (
        lambda path: changed(path, lambda data: data["annotations"][0].update(image_id=999)), "999",
    ),
    "no box at all": (lambda path: changed(path, lambda data: data.update(annotations=[])), "box"),
    "images elsewhere": (
        lambda path: changed(
            path, lambda data: [one.update(file_name=f"x/{place}") for place, one in enumerate(data["images"])]
        ),
        "nowhere",
    ),
}  # fmt: skip


@pytest.mark.parametrize("kind", BAD_FILES)
def test_a_bad_file_is_refused_by_name(folder, kind):
    change, said = BAD_FILES[kind]
    change(folder / "instances_train.json")
    with pytest.raises(DataError, match=said) as error:
        find_profile(str(folder))
    assert "instances_train.json" in str(error.value)


def test_other_categories_in_val_are_refused(folder):
    changed(folder / "instances_val.json", lambda data: data["categories"][0].update(name="brick"))
    with pytest.raises(DataError, match="instances_val.json"):
        find_profile(str(folder))


def test_a_folder_with_two_files_of_a_split_is_refused(folder):
    (folder / "train.json").write_bytes((folder / "instances_train.json").read_bytes())
    with pytest.raises(DataError, match=r"instances_train\.json and in train\.json"):
        find_profile(str(folder))


@pytest.mark.parametrize("layout", ["coco2017", "roboflow"])
def test_folders_as_coco_and_others_lay_them_out(folder, layout):
    expected = opened(folder).fingerprint
    for split in ("train", "val"):
        file, images = folder / f"instances_{split}.json", folder / "images" / split
        if layout == "coco2017":
            (folder / "annotations").mkdir(exist_ok=True)
            file.rename(folder / "annotations" / f"instances_{split}2017.json")
            (folder / "annotations" / f"captions_{split}2017.json").write_text("{}")
            images.rename(folder / f"{split}2017")
        else:
            to = folder / {"train": "train", "val": "valid"}[split]
            images.rename(to)
            file.rename(to / "_annotations.coco.json")
    assert opened(folder).fingerprint == expected


def voc_folder(root, things, size=(64, 48)):
    """things: (name, four sides, difficult) of the objects of each image."""
    for name in ("JPEGImages", "Annotations", "ImageSets/Main"):
        (root / name).mkdir(parents=True)
    for place, objects in enumerate(things):
        Image.new("RGB", size).save(root / "JPEGImages" / f"{place:03}.jpg")
        boxes = "".join(
            f"<object><name>{name}</name><difficult>{difficult}</difficult><bndbox>"
            + "".join(
                f"<{key}>{side}</{key}>"
                for key, side in zip(("xmin", "ymin", "xmax", "ymax"), sides, strict=True)
            )
            + "</bndbox></object>"
            for name, sides, difficult in objects
        )
        (root / "Annotations" / f"{place:03}.xml").write_text(
            f"<annotation><filename>{place:03}.jpg</filename><size><width>{size[0]}</width>"
            f"<height>{size[1]}</height></size>{boxes}</annotation>"
        )
    for split, places in (("train", things[:-1]), ("val", things[-1:])):
        first = 0 if split == "train" else len(things) - 1
        lines = "".join(f"{first + place:03}\n" for place in range(len(places)))
        (root / "ImageSets" / "Main" / f"{split}.txt").write_text(lines)
    return root


def test_voc_counts_pixels_from_one_and_marks_what_is_too_hard(tmp_path):
    root = voc_folder(
        tmp_path / "voc",
        [[("dog", (1, 1, 64, 48), 0), ("cat", (10, 5, 10, 9), 1)], [("cat", (2, 2, 9, 9), 0)]],
    )
    data = opened(root)
    assert layout_of(root).task == "detection" and data.classes == ("cat", "dog")
    boxes = data.train.read_target(0)
    assert boxes.sides.tolist() == [[0, 0, 64, 48], [9, 4, 10, 9]]
    assert boxes.labels.tolist() == [1, 0] and boxes.is_crowd.tolist() == [False, True]


def test_a_class_of_val_alone_and_a_damaged_xml_are_refused(tmp_path):
    things = [[("dog", (1, 1, 9, 9), 0)], [("cow", (1, 1, 9, 9), 0), ("dog", (1, 1, 9, 9), 0)]]
    root = voc_folder(tmp_path / "voc", things)
    assert "unknown class (cow)" in check_data(opened(root).val).bad[0]
    entities = '<!DOCTYPE a [<!ENTITY x "lol">]><annotation>&x;</annotation>'
    for text in ("<annotation>", entities):
        (root / "Annotations" / "000.xml").write_text(text)
        with pytest.raises(DataError, match=r"000\.xml"):
            find_profile(str(root))


def test_a_voc_folder_with_boxes_and_masks_is_read_for_either_task(tmp_path):
    things = [[("dog", (1, 1, 9, 9), 0)], [("dog", (1, 1, 9, 9), 0)]]
    root = voc_folder(tmp_path / "voc", things)
    (root / "SegmentationClass").mkdir()
    (root / "ImageSets" / "Segmentation").mkdir()
    for split, name in (("train", "000"), ("val", "001")):
        Image.new("L", (64, 48)).save(root / "SegmentationClass" / f"{name}.png")
        (root / "ImageSets" / "Segmentation" / f"{split}.txt").write_text(f"{name}\n")
    for task in ("detection", "segmentation"):
        assert layout_of(root, task).task == task
        assert find_profile(str(root), task=task).task == task
        assert find_profile(str(root), task=task).num_train == 1


def test_the_facts_beside_a_beton_are_no_boxes_whatever_their_set_is_called(tmp_path):
    (tmp_path / "train.json").write_text('{"layout": 1, "profile": "images"}')
    (tmp_path / "train.beton").touch()
    assert not annotation_files(tmp_path, "train")
    (tmp_path / "train.beton").unlink()
    assert annotation_files(tmp_path, "train")
