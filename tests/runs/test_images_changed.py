"""Images that are not what a row or a run folder says, and what a run says about its images."""

import dataclasses
import io
import shutil
import tarfile

import numpy as np
import pytest
from PIL import Image
from rich.console import Console

from support.commands import rsb
from support.plans import small_set
from trainer.base.errors import DataError
from trainer.base.exits import EXIT_DONE, EXIT_STOPPED
from trainer.base.settings import make_settings
from trainer.base.signals import StopRequest
from trainer.data.dataset import open_data
from trainer.data.decode import BadImage
from trainer.data.profile import find_profile
from trainer.runs.job import Job, plan_of, run_job
from trainer.runs.verify import scores_check

SHORT = "batch.images=8 batch.norm_images=4 image.train_px=32 image.test_px=32 lr.warmup_epochs=1"
NUM_PER_CLASS = {"train": 12, "val": 3}


@pytest.fixture
def photos(tmp_path, monkeypatch):
    """An image folder of two classes, BMP: all files have the same size."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    rng = np.random.default_rng(0)
    for split, number in NUM_PER_CLASS.items():
        for name in ("cat", "dog"):
            folder = tmp_path / "photos" / split / name
            folder.mkdir(parents=True)
            for i in range(number):
                pixels = rng.integers(0, 256, (32, 32, 3), dtype=np.uint8)
                Image.fromarray(pixels).save(folder / f"{i}.bmp")
    return tmp_path / "photos"


def rewrite(path):
    """Other pixels under the same name and size."""
    Image.fromarray(255 - np.asarray(Image.open(path))).save(path)


def go(root, stop=None, **changes):
    """Run two small epochs: (exit code, row, what was printed, settings)."""
    text = small_set(SHORT)
    job = dataclasses.replace(Job("A2", "test_resnet", str(root), overrides=text), **changes)
    plan = plan_of(job)
    place = root.parent
    settings = make_settings("cpu", workers="0", runs=place / "runs", results=place / "results")
    out = Console(file=io.StringIO(), width=200)
    data = open_data(plan.profile, root)
    code, row = run_job(job, plan, settings, data, out, stop or StopRequest())
    return code, row, out.file.getvalue(), settings


def test_a_row_is_not_claimed_for_other_bytes_of_the_same_names_and_sizes(photos):
    _, first, _, settings = go(photos)
    assert go(photos)[1] == first
    rewrite(photos / "train/cat/3.bmp")
    with pytest.raises(DataError, match=f"{first.run}: has a row of other images"):
        go(photos)
    code, second, _, _ = go(photos, again=True)
    assert code == EXIT_DONE and second.run == f"{first.run}-2"
    assert second.data_fingerprint == first.data_fingerprint
    assert second.content_sha256 != first.content_sha256
    checks = scores_check(settings.runs / first.run, settings, None)
    assert [check.what for check in checks if not check.is_good] == ["content of the images now"]


def test_a_row_of_before_contents_were_recorded_is_still_found(photos):
    _, row, _, settings = go(photos)
    path = settings.results / "rows" / f"{row.run}.json"
    path.write_bytes(row.model_copy(update={"content_sha256": None}).as_json())
    assert go(photos)[0] == EXIT_DONE


def test_the_same_images_packed_otherwise_have_the_same_content(photos):
    row = go(photos)[1]
    packed = photos.parent / "packed"
    packed.mkdir()
    for split in NUM_PER_CLASS:
        with tarfile.open(packed / f"{split}-000000.tar", "w") as tar:
            for path in sorted((photos / split).glob("*/*"), reverse=True):
                tar.add(path, f"{path.parent.name}/{path.name}")
    data = open_data(find_profile(str(packed)), packed)
    *_, found = data.read_content()
    assert (found.fingerprint, found.content_sha256) == (row.data_fingerprint, row.content_sha256)


class StopsLater(StopRequest):
    """Asked to stop once a run has its first checks behind it."""

    num_asked = 0

    @property
    def is_requested(self):
        self.num_asked += 1
        if self.num_asked > 1:
            self.signal_name = "SIGTERM"
        return self.signal_name is not None


def test_a_stopped_run_is_not_resumed_over_other_images(photos):
    assert go(photos, StopsLater())[0] == EXIT_STOPPED
    whole = (photos / "train/dog/1.bmp").read_bytes()
    rewrite(photos / "train/dog/1.bmp")
    with pytest.raises(DataError, match="was begun on other images"):
        go(photos)
    (photos / "train/dog/1.bmp").write_bytes(whole)
    assert go(photos)[0] == EXIT_DONE


@pytest.mark.parametrize("bad_images", ["fail", "skip"])
@pytest.mark.parametrize("content", [b"", b"<html>404</html>"])
def test_a_bad_validation_image_is_named_before_the_first_step(photos, bad_images, content):
    path = photos / "val/dog/1.bmp"
    path.write_bytes(content)
    with pytest.raises(BadImage) as refused:
        go(photos, bad_images=bad_images)
    text = str(refused.value)
    assert text.startswith(f"{path}: ") and "no setting skips" in text
    assert "bad_images" not in text  # no remedy that is none
    assert not list((photos.parent / "runs").rglob("metrics.jsonl"))


def test_a_cut_validation_jpeg_is_named_before_the_first_step(photos):
    path = photos / "val/dog/1.jpg"
    Image.open(photos / "val/dog/1.bmp").save(path)
    path.write_bytes(path.read_bytes()[:-300])
    with pytest.raises(BadImage, match=r"val/dog/1\.jpg: cannot be decoded \(.*truncated"):
        go(photos)


def test_ignored_files_are_counted_in_plan_check_data_and_row(photos):
    shutil.copy(photos / "train/cat/0.bmp", photos / "train/cat/x.jfif")
    shutil.copy(photos / "train/cat/0.bmp", photos / "val/cat/x.GIF")
    row = go(photos)[1]
    assert row.ignored_files == {"train .jfif": 1, "val .gif": 1}
    of_run = ["--recipe", "A2", "--model", "test_resnet", "--set", small_set(SHORT)]
    for words in (
        ["plan", *of_run, "--data", str(photos)],
        ["check-data", "--data", str(photos)],
    ):
        done = rsb(*words)
        assert "1 train .jfif" in done.output and "1 val .gif" in done.output
