"""int8 models of a small trained network, and what is said of them."""

import json
import sys

import numpy as np
import onnx
import onnxruntime
import pytest
import timm
import torch
from PIL import Image

from support.commands import rsb
from trainer.inference.export.calibration import MOST_IMAGES, calibration_images


@pytest.fixture(scope="module")
def photos(tmp_path_factory):
    """Four class folders of noisy squares of a colour."""
    folder = tmp_path_factory.mktemp("photos")
    generator = np.random.default_rng(0)
    for name in range(4):
        (folder / str(name)).mkdir()
        colour = np.array([name % 2, name // 2, 0.5]) * 200
        for place in range(6):
            pixels = colour + generator.integers(0, 56, (40, 44, 3))
            Image.fromarray(pixels.astype(np.uint8)).save(folder / str(name) / f"{place}.png")
    return folder


@pytest.fixture(scope="module")
def weights(tmp_path_factory, photos):
    """Of a model that knows these classes."""
    torch.manual_seed(0)
    model = timm.create_model("test_resnet", num_classes=4)
    images, labels = [], []
    for path in sorted(photos.rglob("*.png")):
        pixels = np.asarray(Image.open(path).resize((32, 32)), np.float32)
        images.append(torch.from_numpy(pixels).permute(2, 0, 1) / 127.5 - 1)
        labels.append(int(path.parent.name))
    images, labels = torch.stack(images), torch.tensor(labels)
    optimizer = torch.optim.Adam(model.parameters(), 1e-3)
    for _ in range(30):
        optimizer.zero_grad()
        torch.nn.functional.cross_entropy(model(images), labels).backward()
        optimizer.step()
    path = tmp_path_factory.mktemp("weights") / "model.pth"
    torch.save(model.state_dict(), path)
    return path


def exported(weights, out, *words):
    given = ("--model", "test_resnet", "--weights", weights, "--test-px", "32", "--crop", "1")
    return rsb("export", *given, "--out", out, "--workers", "0", "--int8", *words)


@pytest.mark.parametrize("to", ["onnx", "openvino"])
def test_an_int8_model_is_smaller_and_its_right_answers_are_counted(to, weights, photos, tmp_path):
    out = tmp_path / "out"
    done = exported(weights, out, "--to", to, "--images", photos, "--data", photos)
    assert done.exit_code == 0, done.output
    record = json.loads((out / "export.json").read_text())
    assert record["calibration_images"] == 24
    before, after = record["right"]["model"], record["right"]["file"]
    assert before["num_images"] == after["num_images"] == 24 and before["others"] == 0
    assert before["right"] >= 22 and after["right"] >= before["right"] - 2
    assert record["agreement"]["num_same"] == 24  # of the float one
    names = {path.name for path in out.iterdir()}
    assert {"preprocessing.json", "use.py", "export.json"} < names and "float" not in names
    assert "openvino_telemetry" not in sys.modules  # which would report to Google Analytics


def test_an_onnx_model_is_quantized_in_the_form_that_others_read(weights, photos, tmp_path):
    out = tmp_path / "out"
    assert exported(weights, out, "--to", "onnx", "--images", photos).exit_code == 0
    graph = onnx.load(out / "model.onnx").graph
    kinds = [node.op_type for node in graph.node]
    assert kinds.count("QuantizeLinear") > 3 and kinds.count("DequantizeLinear") > 6
    kept = {one.data_type for one in graph.initializer if len(one.dims) == 4}
    assert kept <= {onnx.TensorProto.INT8, onnx.TensorProto.UINT8}
    session = onnxruntime.InferenceSession(out / "model.onnx")
    for number in (1, 5):
        images = np.zeros((number, 3, 32, 32), np.float32)
        assert session.run(None, {"images": images})[0].shape == (number, 4)


@pytest.mark.parametrize("number", [1, MOST_IMAGES, MOST_IMAGES + 1, 3 * MOST_IMAGES + 5])
def test_the_photos_that_are_calibrated_on_are_a_fixed_choice(number):
    found = calibration_images(range(number))
    assert len(set(found)) == len(found) == min(number, MOST_IMAGES)
    assert found == calibration_images(range(number)) and list(found) == sorted(found)
    assert found[-1] >= number - number / len(found) - 1


@pytest.mark.parametrize(
    ("words", "found"),
    [(["--to", "onnx"], "images="), (["--to", "torchscript", "--images", "."], "torchscript")],
)
def test_what_int8_cannot_do_is_one_line(words, found, weights, tmp_path):
    done = exported(weights, tmp_path / "out", *words)
    assert done.exit_code == 2 and done.stderr.count("\n") == 1 and found in done.stderr
