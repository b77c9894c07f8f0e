"""Files of weights as other programs write them."""

import hashlib
import http.server
import json
import pickle
import socket
import threading

import pytest
import safetensors.torch
import timm
import torch

from trainer.models.initialization import is_head_loaded, load_pretrained
from trainer.models.spec import Pretrained
from trainer.models.weights import (
    WeightsError,
    as_model_names,
    read_weights,
    unreachable,
    weights_path,
)


@pytest.fixture(scope="module")
def source():
    torch.manual_seed(1)
    return timm.create_model("resnet18", num_classes=10).state_dict()


def of(path):
    return Pretrained(file=str(path), sha256=hashlib.sha256(path.read_bytes()).hexdigest())


def same(found, expected):
    return found.keys() == expected.keys() and all(
        torch.equal(found[name], tensor) for name, tensor in expected.items()
    )


def other(state):
    return {name: torch.zeros_like(tensor) for name, tensor in state.items()}


def prefixed(state, prefix):
    return {prefix + name: tensor for name, tensor in state.items()}


@pytest.mark.parametrize(
    "wrapped",
    [
        lambda state: state,
        lambda state: {"state_dict": prefixed(state, "module."), "epoch": 3},  # timm, torchvision
        lambda state: {"model": prefixed(state, "_orig_mod."), "optimizer": {"lr": 1.0}},
        lambda state: {"state_dict": prefixed(state, "module._orig_mod.")},
        lambda state: {"state_dict": prefixed(state, "model.")},  # Lightning
        lambda state: {"state_dict": other(state), "state_dict_ema": state},  # timm's average
        lambda state: {  # torchvision's, of torch's AveragedModel
            "model": other(state),
            "model_ema": {"n_averaged": torch.tensor(5), **prefixed(state, "module.")},
        },
        lambda state: {"model_ema": None, "model": state},
    ],
)
def test_a_checkpoint_gives_the_weights_under_the_models_names(tmp_path, source, wrapped):
    path = tmp_path / "checkpoint.pth"
    torch.save(wrapped(source), path)
    found = read_weights(path)
    assert same(found.tensors, source)
    assert found.sha256 == hashlib.sha256(path.read_bytes()).hexdigest()


def test_a_file_of_torch_before_its_zip_is_read(tmp_path, source):
    path = tmp_path / "old.pth"
    torch.save(source, path, _use_new_zipfile_serialization=False)
    assert same(read_weights(path).tensors, source)


def test_a_name_that_one_weight_alone_has_is_no_prefix(tmp_path):
    path = tmp_path / "a.safetensors"
    tensors = {"model.weight": torch.ones(2), "head.weight": torch.ones(2)}
    safetensors.torch.save_file(tensors, path)
    assert same(read_weights(path).tensors, tensors)


class Harm:
    def __reduce__(self):
        return print, ("run",)


def test_no_code_of_a_file_is_run(tmp_path, capsys):
    for name, save in (("zip.pth", torch.save), ("pickle.pkl", dumped)):
        save({"model": Harm()}, tmp_path / name)
        with pytest.raises(WeightsError) as error:
            read_weights(tmp_path / name)
        assert "\n" not in str(error.value) and name in str(error.value)
    assert "run" not in capsys.readouterr().out


def dumped(value, path):
    path.write_bytes(pickle.dumps(value, protocol=2))


@pytest.mark.parametrize("held", [{}, {"epoch": 3}, [1, 2], torch.ones(3)])
def test_a_checkpoint_without_weights_is_refused(tmp_path, held):
    torch.save(held, tmp_path / "a.pth")
    with pytest.raises(WeightsError, match="holds no weights"):
        read_weights(tmp_path / "a.pth")


def test_a_cut_checkpoint_is_refused(tmp_path, source):
    path = tmp_path / "a.pth"
    torch.save(source, path)
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
    with pytest.raises(WeightsError) as error:
        read_weights(path)
    assert str(path) in str(error.value)


def test_a_folder_of_timms_is_found(tmp_path, source):
    torch.save(source, tmp_path / "pytorch_model.bin")
    assert weights_path(f"local-dir:{tmp_path}") == tmp_path / "pytorch_model.bin"
    safetensors.torch.save_file(source, tmp_path / "model.safetensors")
    assert weights_path(str(tmp_path)) == tmp_path / "model.safetensors"


@pytest.mark.parametrize("name", ["resnet50.a9_in1k", "resnet5", "resnet50"])
def test_weights_that_timm_does_not_have_are_named_with_those_it_has(name):
    with pytest.raises(WeightsError) as error:
        weights_path(f"timm:{name}")
    assert name in str(error.value)
    assert name == "resnet5" or "timm:resnet50.a1_in1k" in error.value.hint


def test_weights_of_timm_come_from_the_cache(tmp_path, source, monkeypatch):
    """Laid out as the hub's own client does."""
    import huggingface_hub.constants

    commit = "0" * 40
    snapshot = tmp_path / "models--timm--resnet18.a1_in1k" / "snapshots" / commit
    snapshot.mkdir(parents=True)
    (snapshot.parents[1] / "refs").mkdir()
    (snapshot.parents[1] / "refs" / "main").write_text(commit)
    safetensors.torch.save_file(source, snapshot / "model.safetensors")
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path))
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    assert weights_path("timm:resnet18.a1_in1k") == snapshot / "model.safetensors"
    with pytest.raises(WeightsError) as error:
        weights_path("timm:resnet34.a1_in1k")
    assert "timm/resnet34.a1_in1k" in error.value.hint and "\n" not in str(error.value)


class _Answers(http.server.BaseHTTPRequestHandler):
    def do_HEAD(self):
        self.send_error(404)

    def log_message(self, *words):
        pass


@pytest.fixture
def no_proxy(monkeypatch):
    monkeypatch.setenv("no_proxy", "*")


def test_a_server_that_answers_anything_is_reachable(no_proxy):
    with http.server.HTTPServer(("127.0.0.1", 0), _Answers) as server:
        threading.Thread(target=server.handle_request, daemon=True).start()
        assert unreachable(f"http://127.0.0.1:{server.server_port}") == ""


def test_a_server_that_says_nothing_is_not_waited_for(no_proxy):
    with socket.create_server(("127.0.0.1", 0)) as silent:
        url = f"http://127.0.0.1:{silent.getsockname()[1]}"
        assert url in unreachable(url, timeout_s=0.05)


def test_without_a_network_weights_of_timm_are_refused_at_once(no_proxy, tmp_path, monkeypatch):
    """One line, without the hub's own retries, with what to fetch and how to give it."""
    import huggingface_hub

    with socket.create_server(("127.0.0.1", 0)) as closed:
        url = f"http://127.0.0.1:{closed.getsockname()[1]}"
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path))
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(huggingface_hub.constants, "ENDPOINT", url)
    monkeypatch.setattr(huggingface_hub, "hf_hub_download", None)  # not called
    with pytest.raises(WeightsError) as refused:
        weights_path("timm:resnet18.a1_in1k")
    assert f"{url}/timm/resnet18.a1_in1k/resolve/main/model.safetensors" in refused.value.hint
    assert "weights=<" in refused.value.hint and str(tmp_path) in refused.value.found
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    with pytest.raises(WeightsError, match="HF_HUB_OFFLINE is set"):
        weights_path("timm:resnet18.a1_in1k")


def test_position_embeddings_of_another_size_are_interpolated_as_timm_does(tmp_path):
    torch.manual_seed(0)
    source = timm.create_model("vit_tiny_patch16_224", img_size=64, num_classes=5)
    path = tmp_path / "a.safetensors"
    safetensors.torch.save_file(source.state_dict(), path)
    expected = timm.create_model(
        "vit_tiny_patch16_224", img_size=96, num_classes=5, pretrained=True,
        pretrained_cfg_overlay={"file": str(path), "num_classes": 5},
    )  # fmt: skip
    model = timm.create_model("vit_tiny_patch16_224", img_size=96, num_classes=5)
    note = load_pretrained(model, of(path), 5).note
    assert same(model.state_dict(), expected.state_dict())
    assert "pos_embed" in note


def test_names_of_the_authors_are_converted(tmp_path):
    """ConvNeXt's repository has other names for stem and stages."""
    model = timm.create_model("convnext_atto", num_classes=10)
    expected = model.state_dict()
    theirs = {
        name.replace("stem.", "downsample_layers.0.")
        .replace("mlp.fc1", "pwconv1").replace("mlp.fc2", "pwconv2")
        .replace("conv_dw", "dwconv").replace("head.norm", "norm").replace("head.fc", "head"): tensor
        for name, tensor in expected.items()
    }  # fmt: skip
    theirs = {moved(name): tensor for name, tensor in theirs.items()}
    torch.save({"model": theirs}, tmp_path / "a.pth")
    found = as_model_names(
        timm.create_model("convnext_atto", num_classes=10), read_weights(tmp_path / "a.pth")
    )
    assert same(found.tensors, expected) and any("converted" in note for note in found.notes)


def moved(name):
    """stages.<s>.blocks.<b> is stages.<s>.<b> there, stages.<s>.downsample downsample_layers.<s>."""
    parts = name.split(".")
    if parts[0] == "stages" and parts[2] == "blocks":
        parts = [*parts[:2], *parts[3:]]
    elif parts[0] == "stages":
        parts = ["downsample_layers", parts[1], *parts[3:]]
    return ".".join(parts)


def test_weights_that_fit_in_part_are_taken_where_that_is_asked_for(tmp_path, source):
    torch.manual_seed(2)
    model = timm.create_model("resnet18d", num_classes=10)
    path = tmp_path / "a.pth"
    torch.save(source, path)
    with pytest.raises(WeightsError) as error:
        load_pretrained(model, of(path), 10)
    assert "model.pretrained.partial=true" in error.value.hint
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    pretrained = of(path).model_copy(update={"partial": True})
    replacement = load_pretrained(model, pretrained, 10)
    after = model.state_dict()
    for name, tensor in after.items():
        fits = name in source and source[name].shape == tensor.shape
        assert torch.equal(tensor, source[name] if fits else before[name])
        assert (name in replacement.places) == fits
    assert "conv1.0.weight" in replacement.note and "unexpected conv1.weight" in replacement.note


@pytest.mark.parametrize(
    ("name", "text"),
    [("plan.json", {"model": "resnet18"}), ("config.json", {"architecture": "resnet18"})],
)
def test_weights_of_another_models_run_name_that_model_first(tmp_path, source, name, text):
    path = tmp_path / "a.pth"
    torch.save(source, path)
    (tmp_path / name).write_text(json.dumps(text))
    with pytest.raises(WeightsError) as error:
        load_pretrained(timm.create_model("resnet18d", num_classes=10), of(path), 10)
    assert "use model=resnet18," in error.value.hint.partition("partial=true")[0]


def test_weights_of_which_none_fits_are_refused_in_part_as_well(tmp_path):
    path = tmp_path / "a.pth"
    torch.save({"a": torch.ones(3), "b": torch.ones(3)}, path)
    pretrained = of(path).model_copy(update={"partial": True})
    with pytest.raises(WeightsError):
        load_pretrained(timm.create_model("resnet18", num_classes=10), pretrained, 10)


def test_a_new_head_stays_random(tmp_path, source):
    torch.manual_seed(3)
    model = timm.create_model("resnet18", num_classes=10)
    before = model.fc.weight.clone()
    path = tmp_path / "a.pth"
    torch.save(source, path)
    replacement = load_pretrained(model, of(path).model_copy(update={"head": "new"}), 10)
    assert torch.equal(model.fc.weight, before) and "fc.weight" not in replacement.places
    assert torch.equal(model.conv1.weight, source["conv1.weight"])


@pytest.mark.parametrize("model", ["levit_128s", "deit_tiny_distilled_patch16_224"])
def test_both_heads_of_a_distilled_model_are_its_classifier(tmp_path, model):
    """They are loaded together, and start anew together for other classes or where it is asked."""
    source = timm.create_model(model, num_classes=10)
    names = {name for name, _ in source.named_parameters() if name.startswith("head")}
    path = tmp_path / "weights.safetensors"
    safetensors.torch.save_file(source.state_dict(), path)
    same_classes, others = (timm.create_model(model, num_classes=number) for number in (10, 7))
    kept = load_pretrained(same_classes, of(path), 10)
    assert is_head_loaded(same_classes, [kept]) and names <= set(kept.places)
    for built, pretrained in (
        (others, of(path)),
        (same_classes, of(path).model_copy(update={"head": "new"})),
    ):
        anew = load_pretrained(built, pretrained, built.num_classes)
        assert not is_head_loaded(built, [anew]) and not names & set(anew.places)
