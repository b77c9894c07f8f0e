"""A data profile of a folder of one's own: counted and measured, and accepted by every recipe."""

import re

import numpy as np
import pytest
import yaml
from PIL import Image
from typer.testing import CliRunner

from trainer.base.errors import UserError
from trainer.cli.main import app
from trainer.data.check import DataReport, check_data
from trainer.data.datasets.builtin import FolderSet
from trainer.data.index import open_index
from trainer.data.own_profile import adapted_to, own_profile
from trainer.data.profile import find_profile
from trainer.recipe.schema import apply_overrides, load_recipe
from trainer.recipe.shipped import find_recipe, recipe_paths
from trainer.runs.job import Job, plan_of


def reports_of(root):
    return [check_data(FolderSet(open_index(root, split))) for split in ("train", "val")]


def test_the_mean_and_the_deviation_are_of_the_training_pixels(make_folder):
    root = make_folder(train={"cat": 3, "dog": 4}, val={"cat": 1, "dog": 2})
    (root / "train/dog/0.jpg").write_bytes(b"")
    pixels = [
        np.asarray(Image.open(path).convert("RGB"), np.float64).reshape(-1, 3) / 255
        for path in root.glob("train/*/*.jpg")
        if path.stat().st_size
    ]
    mean = np.mean([one.mean(axis=0) for one in pixels], axis=0)
    square = np.mean([(one**2).mean(axis=0) for one in pixels], axis=0)

    found = own_profile("photos", *reports_of(root))

    assert np.allclose(found.mean, mean, atol=1e-4)
    assert np.allclose(found.std, np.sqrt(square - mean**2), atol=1e-4)
    assert (found.num_classes, found.num_train, found.num_val) == (2, 7, 3)
    assert found.majority_pct == pytest.approx(200 / 3, abs=0.01) and found.native_px is None


@pytest.mark.parametrize("num_train", [10, 33, 95, 182, 1437, 3000, 50_000, 99_999])
@pytest.mark.parametrize("short_px", [8, 64, 375])
def test_an_adaptation_has_whole_steps_and_a_warm_up_within_the_run(num_train, short_px):
    adapt = adapted_to(num_train, short_px)
    assert adapt.batch_images <= num_train and adapt.warmup_epochs < adapt.epochs
    assert num_train < 160 or num_train // adapt.batch_images >= 10
    assert adapt.train_px % 32 == 0 and adapt.train_px <= 128


def test_no_epoch_ends_with_a_step_of_one_image():
    left = [num % adapted_to(num, 375).batch_images for num in range(10, 3000)]
    assert 1 not in left


def test_a_large_set_is_not_adapted():
    assert adapted_to(1_281_167, 375) is None


@pytest.mark.parametrize("num_train", [23, 95, 129, 182])
def test_every_recipe_takes_the_profile_as_it_is_written(tmp_path, num_train):
    root = tmp_path / "photos"
    for i in range(num_train + 20):
        folder = root / ("train" if i < num_train else "val") / "abcde"[i % 5]
        folder.mkdir(parents=True, exist_ok=True)
        Image.fromarray(np.full((12, 9, 3), i, np.uint8)).save(folder / f"{i}.png")
    path = tmp_path / "new/photos.yaml"
    words = ["check-data", "--data", str(root), "--workers", "1"]

    shown = CliRunner().invoke(app, words)
    written = CliRunner().invoke(app, [*words, "--profile", str(path)])

    assert (shown.exit_code, written.exit_code) == (0, 0)
    assert path.read_text().rstrip() in shown.stdout and path.read_text().rstrip() in written.stdout
    assert f"lr-find recipe=A3 model=resnet18 data={path}" in written.stdout.replace("\n", "")
    profile = find_profile(str(path))
    assert profile.num_train == num_train and profile.num_val == 20 and profile.num_classes == 5
    for recipe in (path for path in recipe_paths() if load_recipe(path).task is None):
        plan = plan_of(Job(str(recipe), "resnet18", str(path), root))
        assert plan.num_steps >= 30
    assert yaml.safe_load(path.read_text())["adapt"]["batch_images"] <= num_train
    again = CliRunner().invoke(app, [*words, "--profile", str(path)])
    assert again.exit_code == 2 and str(path) in again.stderr


def test_a_profile_of_no_image_is_refused():
    with pytest.raises(UserError, match="photos"):
        own_profile("photos", DataReport(1, ("bad",), {}, {"a": 1}), DataReport(0, (), {}, {}))


@pytest.mark.parametrize(
    "given", [["--data", "digits"], ["--data", "photos", "--profile", "x.txt"]]
)
def test_what_cannot_be_written_is_refused_before_reading(given, make_folder, monkeypatch):
    monkeypatch.chdir(make_folder(train={"a": 1, "b": 1}, val={"a": 1, "b": 1}).parent)
    words = ["check-data", *given, *([] if "--profile" in given else ["--profile", "x.yaml"])]
    done = CliRunner().invoke(app, words)
    assert done.exit_code == 2 and "profile=x" in done.stderr


def test_uneven_classes_are_told_sets_that_a_recipe_takes(make_folder):
    root = make_folder(train={"a": 6, "b": 2, "c": 3}, val={"a": 1, "b": 1, "c": 1})
    done = CliRunner().invoke(app, ["check-data", "--data", str(root), "--workers", "1"])
    printed = re.findall(r'set="([^"]*(?:sampling|class_weighting)[^"]*)"', done.stdout)
    assert len(printed) == 5
    for given in printed:
        recipe, _ = apply_overrides(
            load_recipe(find_recipe("torchvision-v1")).for_model("resnet18"), given
        )
        assert recipe.sampling or recipe.loss.class_weighting


def test_even_classes_are_told_nothing(make_folder):
    root = make_folder(train={"a": 3, "b": 4}, val={"a": 1, "b": 1})
    done = CliRunner().invoke(app, ["check-data", "--data", str(root), "--workers", "1"])
    assert "sampling" not in done.stdout


def test_photos_without_classes_are_told_what_labels_them_and_what_answers_them(make_folder):
    root = make_folder(train={"a": 2, "b": 1}, val={"a": 1, "b": 1}) / "train" / "a"
    done = CliRunner().invoke(app, ["check-data", "--data", str(root)])
    assert done.exit_code == 2 and done.stderr.count("\n") == 1
    assert f"split data={root}" in done.stderr
    assert "predict" in done.stderr and f"images={root}" in done.stderr


@pytest.mark.parametrize("where", [[], ["--data-dir", "x"]])
def test_half_a_profile_says_what_writes_a_whole_one(tmp_path, where):
    path = tmp_path / "mine.yaml"
    path.write_text("name: mine\nnum_classes: 3\n")
    done = CliRunner().invoke(app, ["check-data", "--data", str(path), *where])
    assert done.exit_code == 2 and "check-data data=" in done.stderr


def test_no_profile_is_written_of_images_that_are_to_be_mended(make_folder, tmp_path):
    root = make_folder(train={"cat": 3, "dog": 4}, val={"cat": 1, "dog": 2})
    path = tmp_path / "photos.yaml"
    words = ["check-data", "--data", str(root), "--profile", str(path)]
    good = (root / "train/dog/0.jpg").read_bytes()
    (root / "train/dog/0.jpg").write_bytes(b"")
    bad = CliRunner().invoke(app, words)
    assert bad.exit_code == 1 and "not written" in bad.stdout and not path.exists()
    (root / "train/dog/0.jpg").write_bytes(good)
    assert CliRunner().invoke(app, words).exit_code == 0 and path.exists()


def test_a_profile_that_cannot_be_written_is_refused_before_an_image_is_read(
    make_folder, tmp_path, monkeypatch
):
    root = make_folder(train={"a": 1, "b": 1}, val={"a": 1, "b": 1})
    (tmp_path / "file").touch()
    monkeypatch.setattr("trainer.cli.data_commands.check_images", None)
    words = ["check-data", "--data", str(root), "--profile", str(tmp_path / "file/x.yaml")]
    done = CliRunner().invoke(app, words)
    assert done.exit_code == 2 and "profile=" in done.stderr
