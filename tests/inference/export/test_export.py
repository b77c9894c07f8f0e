"""Exported files answer as the model does, by themselves."""

import json
import runpy
import shutil
import subprocess
import sys
from dataclasses import replace

import numpy as np
import onnxruntime
import pytest
import timm
import torch
from PIL import Image

from support import parts  # noqa: F401  the model bottlenecks
from support.commands import rsb
from support.plans import small_plan
from trainer.base.settings import make_settings
from trainer.data.datasets.members import read_image
from trainer.data.decode import evaluation_square
from trainer.inference.classifier import Classifier, ImageFacts
from trainer.inference.export.compare import compare, drawn_batches
from trainer.inference.export.formats import FORMATS, Onnx
from trainer.inference.export.use_text import preprocessing, use_script
from trainer.inference.export.write import export
from trainer.models.build import assembled

CPU = make_settings("cpu", "float32", workers="0")
FACTS = ImageFacts(3, 32, 0.875, "bicubic", (0.5, 0.4, 0.3), (0.2, 0.3, 0.25))
NAMES = tuple(f"class {number}" for number in range(10))
# of the parts that replace a model's own
CHANGED = {
    "group norms, standardized convolutions": ("gn-ws", "bottlenecks", ""),
    "batch-channel norms": ("bcn", "bottlenecks", ""),
    "attention, layer norms": (
        "torchvision-v1",
        "test_resnet",
        "'model.attention={name: eca, position: after_last_norm}' 'model.norm={name: layer_norm_2d, eps: 1e-6}'",
    ),
    "convnext": ("convnext", "test_convnext", ""),
}


def classifier_of(recipe, model, overrides, facts=FACTS, **changes):
    torch.manual_seed(0)
    made, _ = assembled(small_plan(recipe, model, overrides))
    for buffer in made.buffers():  # running statistics of some training
        if buffer.is_floating_point():
            buffer.add_(0.1 * torch.rand_like(buffer))
    return Classifier("small", made.eval(), facts, NAMES, "0" * 64, **changes)


@pytest.fixture(scope="module")
def plain():
    torch.manual_seed(0)
    model = timm.create_model("test_resnet", num_classes=10).eval()
    return Classifier("small", model, FACTS, NAMES, "0" * 64)


@pytest.fixture(scope="module")
def photos(tmp_path_factory):
    folder = tmp_path_factory.mktemp("photos")
    generator = np.random.default_rng(0)
    for name, shape in (("a.jpg", (60, 80, 3)), ("b.png", (50, 41, 4)), ("c.png", (33, 90))):
        coarse = generator.integers(0, 256, shape, dtype=np.uint8)
        Image.fromarray(coarse).resize((97, 64)).save(folder / name)
    Image.fromarray(generator.integers(0, 2**16, (40, 50), dtype=np.uint16)).save(folder / "d.png")
    return folder


@pytest.mark.parametrize("to", FORMATS)
def test_a_file_answers_any_number_of_images(plain, tmp_path, to):
    found, _ = export(plain, FORMATS[to], tmp_path / "out", lambda: drawn_batches(FACTS), CPU)
    assert found.is_good and found.num_images == 9 and found.max_difference < 1e-3
    engine = FORMATS[to].engine(tmp_path / "out" / FORMATS[to].file)
    for number in (1, 3, 5):
        images = torch.randn(number, 3, 32, 32, generator=torch.Generator().manual_seed(number))
        with torch.no_grad():
            expected = plain.model(images).numpy()
        np.testing.assert_allclose(engine(images.numpy()), expected, rtol=0, atol=1e-4)


@pytest.mark.parametrize("changed", CHANGED)
@pytest.mark.parametrize("to", ["openvino", "torchscript"])  # made of those of the other two
def test_models_with_replaced_parts_are_exported(tmp_path, to, changed):
    classifier = classifier_of(*CHANGED[changed])
    found, _ = export(classifier, FORMATS[to], tmp_path / "out", lambda: drawn_batches(FACTS), CPU)
    assert found.is_good and found.max_difference < 1e-2


@pytest.mark.parametrize("translate_px", [None, 1])
def test_an_evaluation_of_several_views_is_exported_whole(tmp_path, translate_px):
    views = {"test_flip": True, "test_translate_px": translate_px}
    classifier = classifier_of("A3", "test_resnet", "", **views)
    export(classifier, Onnx(), tmp_path / "out", lambda: drawn_batches(FACTS), CPU)
    (images,) = (batch for batch in drawn_batches(FACTS) if len(batch) == 1)
    session = onnxruntime.InferenceSession(tmp_path / "out" / "model.onnx")
    normal = (images.numpy() - 255 * np.float32(FACTS.mean)[:, None, None]) / (
        255 * np.float32(FACTS.std)[:, None, None]
    )
    answers = session.run(None, {"images": normal.astype(np.float32)})[0]
    np.testing.assert_allclose(answers, classifier.logits(images, CPU), atol=1e-3)


@pytest.fixture(scope="module", params=[1, 3])
def of_channels(request, tmp_path_factory):
    """(a classifier of images of so many channels, the folder of its ONNX model)."""
    number, out = request.param, tmp_path_factory.mktemp("channels") / "out"
    facts = replace(FACTS, channels=number, mean=FACTS.mean[:number], std=FACTS.std[:number])
    torch.manual_seed(0)
    model = timm.create_model("test_resnet", num_classes=10, in_chans=number).eval()
    classifier = Classifier("small", model, facts, NAMES, "0" * 64)
    export(classifier, Onnx(), out, lambda: drawn_batches(facts), CPU)
    return classifier, out


@pytest.mark.parametrize("interpolation", ["bicubic", "bilinear", "bilinear_no_antialias"])
def test_the_script_shows_a_model_the_same_pixels(of_channels, photos, interpolation, monkeypatch):
    classifier, out = of_channels
    facts = replace(classifier.image, interpolation=interpolation, crop_share=0.8)
    classifier = replace(classifier, image=facts)
    (out / "preprocessing.json").write_text(
        json.dumps(preprocessing(classifier, Onnx(), "model.onnx"))
    )
    (out / "use.py").write_text(use_script(classifier, Onnx()))
    for path in sorted(photos.iterdir()):
        monkeypatch.setattr(sys, "argv", ["use.py", str(path)])
        pixels = runpy.run_path(str(out / "use.py"))["pixels"]
        square = evaluation_square(read_image(path, facts.channels), 32, 0.8, interpolation)
        ours = np.frombuffer(square, np.uint8).reshape(32, 32, -1).transpose(2, 0, 1)
        levels = [255 * np.float32(one)[:, None, None] for one in (facts.mean, facts.std)]
        apart = np.abs(pixels * levels[1] + levels[0] - ours)
        assert apart.max() < (1.01 if interpolation == "bilinear_no_antialias" else 1e-3)


def test_the_script_needs_no_torch_and_gives_the_models_answers(plain, tmp_path, photos):
    export(plain, Onnx(), tmp_path / "out", lambda: drawn_batches(FACTS), CPU)
    (tmp_path / "run.py").write_text(
        "import runpy, sys\nsys.modules['torch'] = sys.modules['trainer'] = None\n"
        "del sys.argv[0]\nrunpy.run_path(sys.argv[0])\n"
    )
    paths = sorted(map(str, photos.iterdir()))
    done = subprocess.run(
        [sys.executable, tmp_path / "run.py", tmp_path / "out" / "use.py", *paths],
        capture_output=True, text=True, timeout=60, cwd=tmp_path,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    lines = done.stdout.splitlines()
    for path, line in zip(paths, lines, strict=True):
        pixels = evaluation_square(read_image(tmp_path / path), 32, 0.875, "bicubic")
        images = torch.frombuffer(bytearray(pixels), dtype=torch.uint8).view(1, 32, 32, 3)
        best = torch.softmax(plain.logits(images.permute(0, 3, 1, 2), CPU)[0], 0).topk(5)
        name, *answers = line.split("  ")
        assert name == path and len(answers) == 5
        assert answers[0].rpartition(" ")[0] == NAMES[best.indices[0]]
        assert [float(one.split()[-1]) for one in answers] == pytest.approx(
            best.values.tolist(), abs=2e-4
        )


def test_the_script_without_a_photo_says_how_to_use_it(plain, tmp_path, photos):
    """A folder is all its images, one that is none of them costs no other its answer."""
    export(plain, Onnx(), tmp_path / "out", lambda: drawn_batches(FACTS), CPU)
    script = tmp_path / "out" / "use.py"

    def used(*given):
        words = [sys.executable, script, *given]
        return subprocess.run(words, capture_output=True, text=True, timeout=60)

    for given in ([], [tmp_path / "out"]):
        nothing = used(*given)
        assert nothing.returncode == 2 and nothing.stderr.startswith("usage: ")
        assert nothing.stderr.count("\n") == 1 and not nothing.stdout
    inside = tmp_path / "all" / "more"
    shutil.copytree(photos, inside)
    (inside / "bad.jpg").write_bytes(b"no image")
    (inside / "notes.txt").touch()
    done = used(tmp_path / "all")
    assert done.returncode == 1 and done.stderr.count("\n") == 1 and "bad.jpg" in done.stderr
    named = [line.split("  ")[0] for line in done.stdout.splitlines()]
    assert named == [str(inside / path.name) for path in sorted(photos.iterdir())]


def test_the_facts_beside_a_model_say_how_to_show_it_an_image(plain, tmp_path):
    export(plain, Onnx(), tmp_path / "out", lambda: drawn_batches(FACTS), CPU)
    facts = json.loads((tmp_path / "out" / "preprocessing.json").read_text())
    assert facts["size_px"] == 32 and facts["resize_px"] == 36  # 32 / 0.875, floored
    assert facts["crop_share"] == 0.875 and facts["interpolation"] == "bicubic"
    assert (facts["mean"], facts["std"]) == (list(FACTS.mean), list(FACTS.std))
    assert facts["classes"] == list(NAMES) and facts["weights_sha256"] == "0" * 64


class Fixed:
    """A classifier with the logits that it is given."""

    def __init__(self, *logits):
        self._logits = torch.tensor(logits)

    def logits(self, images, settings):
        return self._logits


@pytest.mark.parametrize(
    ("ours", "theirs", "is_good", "num_same"),
    [
        ([1.0, 0.0, 0.5], [1.0001, 0.0, 0.5], True, 1),
        ([1.0, 0.0, 0.99999], [0.99999, 0.0, 1.0], True, 0),  # a tie
        ([1.0, 0.0, 0.99], [0.99, 0.0, 1.0], False, 0),
        ([1.0, 0.0, 0.5], [1.0, 0.1, 0.5], False, 1),  # another function
        ([1.0, 0.0, 0.5], [float("nan")] * 3, False, 1),
    ],
)
def test_a_tie_may_fall_otherwise_and_nothing_else(ours, theirs, is_good, num_same):
    found = compare(Fixed(ours), Fixed(theirs), [torch.zeros(1, 3, 2, 2)], CPU)
    assert (found.is_good, found.num_same) == (is_good, num_same)


@pytest.fixture(scope="module")
def weights(tmp_path_factory, plain):
    path = tmp_path_factory.mktemp("weights") / "model.pth"
    torch.save(plain.model.state_dict(), path)
    return path


def exported(weights, out, *words, to="onnx"):
    words = ("--to", to, "--model", "test_resnet", "--weights", weights, *words)
    return rsb("export", *words, "--out", out, "--test-px", "32", "--workers", "0")


def test_export_compares_on_photos_and_overwrites_only_when_asked(weights, photos, tmp_path):
    done = exported(weights, tmp_path / "out", "--images", photos)
    assert done.exit_code == 0, done.output
    record = json.loads((tmp_path / "out" / "export.json").read_text())
    assert record["agreement"]["num_images"] == record["agreement"]["num_same"] == 4
    assert {path.name for path in (tmp_path / "out").iterdir()} == {
        "model.onnx", "preprocessing.json", "use.py", "export.json"
    }  # fmt: skip
    again = exported(weights, tmp_path / "out")
    assert again.exit_code == 2 and "again=1" in again.stderr and again.stderr.count("\n") == 1
    assert exported(weights, tmp_path / "out", "--again").exit_code == 0


def test_a_file_that_answers_otherwise_is_not_left(weights, tmp_path, monkeypatch):
    engine = Onnx.engine

    def other(self, path, num_threads=None):
        run = engine(self, path, num_threads)
        return lambda images: run(images)[:, ::-1].copy()

    monkeypatch.setattr(Onnx, "engine", other)
    done = exported(weights, tmp_path / "out")
    assert done.exit_code == 1, done.output
    assert list(tmp_path.iterdir()) == []


def test_a_file_that_does_not_run_is_one_line(weights, tmp_path, monkeypatch):
    def broken(images):
        raise RuntimeError("for two images\nalone")

    monkeypatch.setattr(Onnx, "engine", lambda *_: broken)
    done = exported(weights, tmp_path / "out")
    assert done.exit_code == 2 and "two images" in done.stderr.strip()
    assert "\n" not in done.stderr.strip()  # a bar leaves an empty line
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("to", ["onnx", "openvino"])
def test_a_missing_package_is_one_line(to, weights, tmp_path, monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    done = exported(weights, tmp_path / "out", to=to)
    assert done.exit_code == 2 and done.stderr.count("\n") == 1 and "pip install" in done.stderr


@pytest.mark.parametrize(
    ("words", "found"),
    [
        (["--to", "onx"], "onnx"),
        (["--images", "/no/such"], "/no/such"),
        (["--test-px", "32 64"], "one"),
    ],
)
def test_what_export_cannot_do_is_one_line(words, found, weights, tmp_path):
    given = {"--to": "onnx", "--test-px": "32"} | dict([words])
    words = [word for pair in given.items() for word in pair]
    done = rsb(
        "export", *words, "--model", "test_resnet", "--weights", weights, "--out", tmp_path / "o"
    )
    assert done.exit_code == 2 and done.stderr.count("\n") == 1 and found in done.stderr
