"""Scores of a model on labelled images, against plain loops and timm's own evaluation."""

import json
import math
import re
from types import SimpleNamespace

import numpy as np
import pytest
import timm
import torch
from PIL import Image
from statsmodels.stats.proportion import proportion_confint
from timm.data import create_transform

from support.commands import rsb
from trainer.base.errors import DataError
from trainer.base.settings import make_settings
from trainer.base.stats import wilson_pct
from trainer.data.decode import BadImage
from trainer.data.workers import Watch
from trainer.inference.classifier import ImageFacts, of_weights, shown_otherwise
from trainer.inference.images import find_labelled, labelled_batches
from trainer.inference.quality import NUM_BINS, judge
from trainer.inference.quality_page import scores_line, write_quality

CPU = make_settings("cpu", workers="0")
NAMES = ("cat", "dog", "eel", "fox", "gnu", "hen", "ibis")


class Fixed:
    """A classifier with the logits that it is given."""

    classes = NAMES

    def __init__(self, logits):
        self._logits = list(logits)

    def on(self, settings):
        return self

    def logits(self, images, settings, with_mirrored):
        return torch.stack([self._logits.pop(0) for _ in images])

    def class_name(self, number):
        return NAMES[number]


def judged_of(logits, labels, among=None):
    halves = [
        (torch.zeros(len(part), 3, 4, 4, dtype=torch.uint8), part) for part in labels.split(4)
    ]
    return judge(Fixed(logits), halves, CPU, among=among)


@pytest.fixture(scope="module")
def drawn():
    generator = torch.Generator().manual_seed(0)
    logits = 2 * torch.randn(60, len(NAMES), generator=generator)
    labels = torch.randint(0, len(NAMES) - 1, (60,), generator=generator)  # the last has no image
    return logits, labels


def test_counts_by_class_and_pair_are_those_of_a_plain_loop(drawn):
    logits, labels = drawn
    found = judged_of(logits, labels)
    confusion, top1, top5 = np.zeros((7, 7), int), 0, 0
    for row, label in zip(logits.tolist(), labels.tolist(), strict=True):
        order = sorted(range(7), key=lambda one: -row[one])
        confusion[label, order[0]] += 1
        top1 += order[0] == label
        top5 += label in order[:5]
    assert (found.num_top1, found.num_top5, found.num_images) == (top1, top5, 60)
    counts, shown = found.confusion()
    assert np.array_equal(counts, confusion[np.ix_(shown, shown)])
    assert confusion.sum() == counts.sum()
    assert found.by_class() == [(c, confusion[c, c], confusion[c].sum()) for c in range(6)]
    pairs = [(c, d, n) for (c, d), n in np.ndenumerate(confusion) if n and c != d]
    most = sorted(pairs, key=lambda pair: -pair[2])
    assert [n for *_, n in found.confused_pairs(5)] == [n for *_, n in most[:5]]
    assert set(found.confused_pairs(100)) == set(pairs)


def test_the_calibration_error_is_that_of_a_plain_loop(drawn):
    logits, labels = drawn
    found = judged_of(logits, labels)
    total = 0.0
    for number in range(NUM_BINS):
        inside = []
        for row, label in zip(logits.tolist(), labels.tolist(), strict=True):
            largest = max(row)
            sure = 1 / sum(math.exp(one - largest) for one in row)
            if number / NUM_BINS < sure <= (number + 1) / NUM_BINS:
                inside.append((sure, row.index(largest) == label))
        if inside:
            sure, right = (sum(one[place] for one in inside) / len(inside) for place in (0, 1))
            total += len(inside) / 60 * abs(sure - right)
    assert found.calibration_error() == pytest.approx(total, rel=1e-12)


def test_the_worst_images_are_wrong_and_least_expected(drawn):
    logits, labels = drawn
    found = judged_of(logits, labels)
    probabilities = torch.softmax(logits.double(), 1)[range(60), labels]
    wrong = [place for place in range(60) if logits[place].argmax() != labels[place]]
    assert found.worst(100) == sorted(wrong, key=lambda place: probabilities[place])


def test_among_some_classes_no_other_is_answered(drawn):
    logits, labels = drawn
    found = judged_of(logits[:, :], labels % 3, among=[0, 1, 2])
    assert found.num_top1 == int((logits[:, :3].argmax(1) == labels % 3).sum())
    assert set(found.predicted.tolist()) <= {0, 1, 2}


@pytest.fixture(scope="module")
def photos(tmp_path_factory):
    """Class folders named as ImageNet's, two photos of unlike sizes each."""
    folder = tmp_path_factory.mktemp("photos")
    generator = np.random.default_rng(0)
    for name in ("n01440764", "n02123045", "n03954731"):
        (folder / name).mkdir()
        for place, size in enumerate([(50, 70), (90, 61)]):
            pixels = generator.integers(0, 256, (*size, 3), dtype=np.uint8)
            Image.fromarray(pixels).resize((120, 100)).save(folder / name / f"{place}.png")
    return folder


@pytest.fixture(scope="module")
def weights(tmp_path_factory):
    torch.manual_seed(0)
    path = tmp_path_factory.mktemp("weights") / "model.pth"
    torch.save(timm.create_model("test_resnet").state_dict(), path)
    return path


def test_a_timm_model_is_shown_what_timm_shows_it(photos, weights):
    classifier = of_weights("test_resnet", str(weights))
    model = timm.create_model("test_resnet", checkpoint_path=str(weights)).eval()
    config = timm.data.resolve_data_config(model=model)
    transform = create_transform(**config)
    found = find_labelled(photos, classifier.classes, 1000)
    ((images, labels),) = labelled_batches(found, classifier.image, 6, 0, Watch())
    with torch.no_grad():
        expected = model(
            torch.stack([transform(Image.open(path).convert("RGB")) for path in found.paths])
        )
    torch.testing.assert_close(classifier.logits(images, CPU), expected, rtol=0, atol=1e-5)
    assert labels.tolist() == [0, 0, 281, 281, 726, 726]  # tench, tabby cat, plane


@pytest.mark.parametrize(
    ("names", "numbers"),
    [
        (("dog", "hen"), [1, 5]),  # some of the model's
        (("0", "3", "6"), [0, 3, 6]),  # by number
        (tuple("abcdefg"), [0, 1, 2, 3, 4, 5, 6]),  # as many
    ],
)
def test_class_folders_are_the_models_classes(tmp_path, names, numbers):
    for name in names:
        (tmp_path / name).mkdir()
        Image.new("RGB", (4, 4)).save(tmp_path / name / "a.png")
    assert find_labelled(tmp_path, NAMES, 7).labels.tolist() == numbers


@pytest.mark.parametrize("names", [("dog", "cow"), ("0", "7"), ("a", "b"), ()])
def test_class_folders_that_are_not_the_models_are_refused(tmp_path, names):
    for name in names:
        (tmp_path / name).mkdir()
        Image.new("RGB", (4, 4)).save(tmp_path / name / "a.png")
    with pytest.raises(DataError) as error:
        find_labelled(tmp_path, NAMES, 7)
    assert str(tmp_path) in str(error.value) and error.value.hint
    if not names:  # images without labels are predict's
        assert f"predict images={tmp_path}" in error.value.hint


def test_an_unreadable_image_ends_an_evaluation_by_its_name(tmp_path, photos):
    (tmp_path / "dog").mkdir()
    (tmp_path / "dog" / "a.png").write_bytes(b"no image")
    images = find_labelled(tmp_path, NAMES, 7)
    facts = ImageFacts(3, 32, 1.0, "bilinear", (0.5,) * 3, (0.5,) * 3)
    with pytest.raises(BadImage) as error:
        list(labelled_batches(images, facts, 8, 0, Watch()))
    assert error.value.place.endswith("a.png")


def test_another_size_is_another_picture(weights):
    classifier = of_weights("test_resnet", str(weights))
    larger = shown_otherwise(classifier, {"test_px": 96, "crop_share": None})
    assert larger.image.test_px == 96
    assert larger.image.crop_share == classifier.image.crop_share


@pytest.mark.parametrize(("right", "number"), [(0, 5), (5, 5), (28, 30), (347, 360)])
def test_the_interval_of_an_accuracy_is_wilsons(right, number):
    low, high = proportion_confint(right, number, method="wilson")
    assert wilson_pct(right, number) == pytest.approx((100 * low, 100 * high), abs=1e-9)


def test_a_line_of_scores_has_the_interval_of_its_images(drawn):
    found = judged_of(*drawn)
    low, high = wilson_pct(found.num_top1, 60)
    assert f"interval {low:.1f} to {high:.1f} %" in scores_line(found)


def test_eval_scores_timm_weights_and_makes_a_page(tmp_path, photos, weights):
    words = ["eval", "--model", "test_resnet", "--weights", weights, "--data", photos]
    done = rsb(*words, "--page", tmp_path / "page", "--test-px", "64 96", "--workers", "0")
    assert done.exit_code == 0, done.output
    assert done.output.count("top-1") == 2
    written = {path.name for path in (tmp_path / "page").iterdir()}
    assert written == {
        "index.html", "per_class.csv", "confusion.csv", "confusion.png", "calibration.png"
    }  # fmt: skip
    text = (tmp_path / "page" / "index.html").read_text()
    refused = rsb(*words, "--page", tmp_path / "page")
    assert refused.exit_code == 2 and "again=1" in refused.output
    assert (tmp_path / "page" / "index.html").read_text() == text
    assert re.search(r"<br>n\d+/\d\.png<", text) and str(photos) not in text
    rows = (tmp_path / "page" / "per_class.csv").read_text().splitlines()
    assert [row.split(",")[0] for row in rows[1:]] == [
        "n01440764 tench",
        "n02123045 tabby",
        "n03954731 plane",
    ]


@pytest.mark.parametrize(
    ("words", "found"),
    [
        ([], "run="),
        (["--model", "test_resnet"], "weights="),
        (["--run", "a", "--model", "test_resnet"], "which model"),
        (["--model", "test_resnet", "--weights", "nowhere.pth", "--data", "."], "nowhere.pth"),
        (["--model", "test_resnet", "--weights", "w", "--test-px", "big"], "test_px=big"),
    ],
)
def test_what_eval_cannot_do_is_one_line(words, found):
    done = rsb("eval", *words)
    assert done.exit_code == 2 and done.stderr.count("\n") == 1 and found in done.stderr


def test_names_of_classes_do_no_harm_on_the_page(tmp_path):
    logits = torch.eye(7).repeat(2, 1)
    found = judged_of(logits, torch.arange(14) % 6)
    hostile = SimpleNamespace(name=lambda place: "<script>x</script>", picture=lambda place: None)
    names = ("<b>", "$x^2$", "a" * 50, "é", '"', "\x1b[2J", "&")
    found = type(found)(**{**vars(found), "classes": names})
    page = write_quality(tmp_path, found, hostile, "<i>", [("<u>", "</table>")]).read_text()
    assert "<script>" not in page and "<b><b>" not in page and "\x1b" not in page
    assert (
        "<i>" not in page and "<u>" not in page and page.count("</table>") == page.count("<table>")
    )


@pytest.mark.parametrize("mode", ["squash", "border", "center"])
def test_weights_are_shown_images_by_their_own_crop_mode(tmp_path, mode):
    torch.save(timm.create_model("test_resnet").state_dict(), tmp_path / "model.pth")
    facts = {"pretrained_cfg": {"crop_mode": mode}}
    (tmp_path / "config.json").write_text(json.dumps(facts))
    classifier = of_weights("test_resnet", str(tmp_path / "model.pth"))
    (tmp_path / "data/5").mkdir(parents=True)
    pixels = np.random.default_rng(0).integers(0, 256, (90, 150, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(tmp_path / "data/5/a.png")
    images = find_labelled(tmp_path / "data", (), 1000)
    [(found, labels)] = labelled_batches(images, classifier.image, 8, 0, Watch())
    config = timm.data.resolve_data_config(model=timm.create_model("test_resnet"))
    transform = create_transform(**config | {"crop_mode": mode}, use_prefetcher=True)
    assert labels.tolist() == [5]
    assert np.array_equal(found[0].numpy(), transform(Image.fromarray(pixels)))
