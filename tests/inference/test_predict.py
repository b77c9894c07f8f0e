"""Answers on a folder of images: what is in the file, and that a stop loses nothing."""

import csv
import json
from pathlib import Path

import numpy as np
import pyarrow.parquet
import pytest
import timm
import torch
from PIL import Image

from support.commands import rsb
from trainer.base.errors import UserError
from trainer.base.settings import make_settings
from trainer.base.signals import Stopped
from trainer.data.workers import Watch
from trainer.inference.classifier import of_weights
from trainer.inference.images import find_images
from trainer.inference.predict import Answer, check_format, predict
from trainer.inference.sheet import write_sheet

CPU = make_settings("cpu", workers="0")


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Seven images at two depths, one of them damaged, and a text file."""
    folder = tmp_path_factory.mktemp("images")
    generator = np.random.default_rng(0)
    (folder / "more").mkdir()
    for name in ("b.png", "a.jpg", "d.png", "more/c.png", "more/é.png", "more/z.png"):
        pixels = generator.integers(0, 256, (60, 80, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(folder / name)
    (folder / "bad.jpg").write_bytes(b"\xff\xd8 no more")
    (folder / "notes.txt").write_text("x")
    return folder


@pytest.fixture(scope="module")
def classifier(tmp_path_factory):
    torch.manual_seed(0)
    path = tmp_path_factory.mktemp("weights") / "model.pth"
    torch.save(timm.create_model("test_resnet", num_classes=8).state_dict(), path)
    return of_weights("test_resnet", str(path))


def asked(classifier, folder, out, check=lambda: None, top_k=3, batch=2):
    paths = find_images(folder)
    return predict(classifier, paths, CPU, out, top_k, batch, Watch(check), lambda number: None)


def test_the_best_classes_are_those_of_the_models_softmax(classifier, folder, tmp_path):
    asked(classifier, folder, tmp_path / "a.csv")
    rows = list(csv.DictReader((tmp_path / "a.csv").read_text().splitlines()))
    assert [row["path"] for row in rows] == [str(path) for path in find_images(folder)]
    assert len(rows) == 7
    for row in rows:
        if row["path"].endswith("bad.jpg"):
            assert row["error"] and not row["class_1"]
            continue
        size = classifier.image.test_px
        image = Image.open(row["path"]).convert("RGB")
        transform = timm.data.create_transform(
            **timm.data.resolve_data_config(model=classifier.model)
        )
        assert size == timm.data.resolve_data_config(model=classifier.model)["input_size"][1]
        with torch.no_grad():
            expected = torch.softmax(classifier.model(transform(image)[None])[0].double(), 0)
        best = expected.topk(3)
        for place in range(3):
            assert row[f"class_{place + 1}"] == str(best.indices[place].item())
            found = float(row[f"probability_{place + 1}"])
            assert found == pytest.approx(best.values[place].item(), abs=2e-5)


def test_a_name_of_another_format_is_answered_with_those_there_are():
    with pytest.raises(UserError) as refused:
        check_format(Path("answers.txt"))
    assert refused.value.hint == "use a name that ends in .csv, .json or .parquet"


def test_all_formats_say_the_same(classifier, folder, tmp_path):
    answers = asked(classifier, folder, tmp_path / "a.json")
    asked(classifier, folder, tmp_path / "a.parquet")
    told = json.loads((tmp_path / "a.json").read_text())
    assert [one["path"] for one in told] == [answer.path for answer in answers]
    assert [tuple(one["classes"]) for one in told] == [answer.classes for answer in answers]
    table = pyarrow.parquet.read_table(tmp_path / "a.parquet").to_pylist()
    for row, answer in zip(table, answers, strict=True):
        assert row["class_1"] == (answer.classes[0] if answer.classes else None)
        assert row["probability_1"] == (answer.probabilities[0] if answer.classes else None)
        assert row["error"] == answer.error


class StopAfter:
    """Raises Stopped at the number-th look, as a signal does."""

    def __init__(self, number):
        self.left = number

    def __call__(self, number):
        self.left -= 1
        if self.left < 0:
            raise Stopped("SIGTERM")


@pytest.mark.parametrize("cut", [0, 7])
def test_a_stopped_call_is_resumed_to_the_same_file(classifier, folder, tmp_path, cut):
    whole, out = tmp_path / "whole.csv", tmp_path / "out.csv"
    asked(classifier, folder, whole)
    with pytest.raises(Stopped):
        predict(classifier, find_images(folder), CPU, out, 3, 2, Watch(), StopAfter(3))
    part = out.with_name("out.csv.part")
    assert part.exists() and not out.exists()
    if cut:  # a killed process's last line
        part.write_bytes(part.read_bytes()[:-cut])
    seen = []
    predict(classifier, find_images(folder), CPU, out, 3, 2, Watch(), seen.append)
    assert out.read_bytes() == whole.read_bytes() and not part.exists()
    assert seen[0] >= 3 and sum(seen) == 7  # those of the first call were not asked again


def test_a_part_of_another_model_or_of_other_images_is_refused(classifier, folder, tmp_path):
    out = tmp_path / "out.csv"
    with pytest.raises(Stopped):
        predict(classifier, find_images(folder), CPU, out, 3, 2, Watch(), StopAfter(2))
    for paths, top_k in ((find_images(folder), 2), (find_images(folder / "more"), 3)):
        with pytest.raises(UserError) as error:
            predict(classifier, paths, CPU, out, top_k, 2, Watch())
        assert "out.csv.part" in str(error.value)


@pytest.mark.parametrize("number", [1, 2, 5, 30])
def test_a_sheet_has_no_empty_rows(tmp_path, number):
    path = tmp_path / "a.png"
    Image.new("RGB", (8, 8), "red").save(path)
    answers = [Answer(str(path), ("a",), (0.9 - i / 100,)) for i in range(number)]
    write_sheet(tmp_path / "sheet.png", answers)
    pixels = np.asarray(Image.open(tmp_path / "sheet.png").convert("RGB")).astype(int)
    is_red = (pixels[..., 0] > 200) & (pixels[..., 1:].max(axis=2) < 60)
    assert is_red.mean() > 0.2


def test_predict_writes_answers_and_a_picture(folder, tmp_path, classifier):
    weights = tmp_path / "model.pth"
    torch.save(classifier.model.state_dict(), weights)
    words = ["predict", "--model", "test_resnet", "--weights", weights, "--images", folder]
    words += ["--out", tmp_path / "a.csv", "--workers", "0"]
    done = rsb(*words)
    assert done.exit_code == 0, done.output
    assert len(Image.open(tmp_path / "a.sheet.png").getcolors(1 << 24)) > 100
    again = rsb(*words)
    assert again.exit_code == 2 and "a.csv" in again.stderr and "again=1" in again.stderr


@pytest.mark.parametrize(
    ("words", "found"),
    [
        (["--images", "/no/such"], "/no/such"),
        (["--images", ".", "--out", "a.txt"], "a.txt"),
    ],
)
def test_what_predict_cannot_do_is_one_line(words, found, tmp_path):
    weights = tmp_path / "model.pth"
    torch.save(timm.create_model("test_resnet").state_dict(), weights)
    done = rsb("predict", "--model", "test_resnet", "--weights", weights, *words)
    assert done.exit_code == 2 and done.stderr.count("\n") == 1 and found in done.stderr
