"""torchvision's models as the suite's own: the same code, names and sizes, options as a recipe says."""

import hashlib
import json

import pytest
import timm
import torch
import torchvision
from torch import nn

from support.commands import rsb
from support.plans import small_plan
from trainer.base.errors import PlanError
from trainer.base.settings import make_settings
from trainer.data.dataset import open_data
from trainer.engine.state import TrainingState
from trainer.engine.train import optimizer_step
from trainer.inference.classifier import of_weights
from trainer.models.build import assembled, check_model_name, gmacs, num_parameters
from trainer.models.edit.replacement import classifier_of
from trainer.models.timm_options import create_model, takes_option
from trainer.models.weights import WeightsError, weights_path
from trainer.models.zoo import timm_name
from trainer.models.zoo.torchvision_models import checkpoint_filter_fn, known_weights
from trainer.runs.export import export_model
from trainer.runs.run_folder import open_model

NAMES = torchvision.models.list_models(module=torchvision.models)
FAMILIES = [  # the smallest of each
    "alexnet", "convnext_tiny", "densenet121", "efficientnet_b0", "googlenet", "inception_v3",
    "maxvit_t", "mnasnet0_5", "mobilenet_v2", "mobilenet_v3_small", "regnet_y_400mf", "resnet18",
    "shufflenet_v2_x0_5", "squeezenet1_1", "swin_t", "swin_v2_t", "vgg11_bn", "vit_b_16",
]  # fmt: skip


def test_there_is_one_of_each_family():
    families = {torchvision.models.get_model_builder(name).__module__ for name in NAMES}
    assert {torchvision.models.get_model_builder(name).__module__ for name in FAMILIES} == families


@pytest.mark.parametrize("name", NAMES)
def test_its_size_is_what_torchvision_says_of_its_weights(name):
    with torch.device("meta"):
        model = create_model(f"torchvision:{name}", 1000, 3, {})
    facts = torchvision.models.get_model_weights(name).DEFAULT.meta
    auxiliary = {"googlenet": 0, "inception_v3": 3_326_696}  # classifiers that only train
    assert num_parameters(model) == facts["num_params"] - auxiliary.get(name, 0)
    assert classifier_of(model).weight.shape[0] == 1000


@pytest.mark.parametrize("name", ["resnet18", "vit_b_16", "mobilenet_v3_small", "swin_t"])
def test_multiply_adds_are_torchvisions(name):
    with torch.device("meta"):
        model = create_model(f"torchvision:{name}", 1000, 3, {})
        found = gmacs(model, 3, 224)
    facts = torchvision.models.get_model_weights(name).DEFAULT.meta
    assert found == pytest.approx(facts["_ops"], rel=0.01)


@pytest.mark.parametrize("name", FAMILIES)
def test_its_weights_have_torchvisions_names(name):
    with torch.device("meta"):
        model = create_model(f"torchvision:{name}", 7, 3, {})
    is_older = name in ("googlenet", "inception_v3")
    options = {"aux_logits": False, "init_weights": False} if is_older else {}
    theirs = torchvision.models.get_model(name, num_classes=7, **options)
    found, expected = model.state_dict(), theirs.state_dict()
    assert {key: one.shape for key, one in found.items()} == {
        key: one.shape for key, one in expected.items()
    }


def test_its_answers_are_torchvisions():
    torch.manual_seed(0)
    theirs = torchvision.models.get_model("resnet18").eval()
    ours = create_model("torchvision:resnet18", 1000, 3, {}).eval()
    ours.load_state_dict(theirs.state_dict())
    images = torch.randn(2, 3, 64, 64)
    with torch.no_grad():
        assert torch.equal(ours(images), theirs(images))


@pytest.mark.parametrize("channels", [1, 4])
@pytest.mark.parametrize("name", ["resnet18", "vit_b_16", "squeezenet1_1", "densenet121"])
def test_it_takes_images_of_other_channels(name, channels):
    model = create_model(f"torchvision:{name}", 5, channels, {})
    with torch.no_grad():
        assert model.eval()(torch.randn(1, channels, 224, 224)).shape == (1, 5)


def test_what_is_absent_is_off_and_what_is_there_is_at_its_rate():
    """torchvision's own rates are 0.2 of both; a recipe without them has none."""

    def rates(**options):
        model = create_model("torchvision:efficientnet_b0", 10, 3, options)
        depth = [m.drop_prob for m in model.modules() if isinstance(m, timm.layers.DropPath)]
        return depth, [m.p for m in model.modules() if isinstance(m, nn.Dropout)]

    depth, dropout = rates()
    assert set(depth) == {0} and dropout == [0]
    depth, dropout = rates(drop_path_rate=0.3, drop_rate=0.4)
    assert depth == sorted(depth) and depth[0] == 0 and depth[-1] == pytest.approx(0.3)
    assert depth[1] == pytest.approx(0.3 / (len(depth) - 1)) and dropout == [0.4]


@pytest.mark.parametrize(
    ("name", "options", "taken"),
    [
        ("resnet18", {"drop_path_rate": 0.1}, False),
        ("swin_t", {"drop_path_rate": 0.1}, True),
        ("resnet18", {"drop_rate": 0.1}, False),
        ("vgg11", {"drop_rate": 0.5}, True),
        ("resnet18", {"zero_init_last": True}, True),
        ("vgg11", {"zero_init_last": True}, False),
        ("convnext_tiny", {"ls_init_value": 1e-6}, True),
        ("resnet18", {"img_size": 32}, False),
        ("vit_b_16", {"img_size": 32}, True),
    ],
)
def test_an_option_is_taken_or_refused(name, options, taken):
    assert takes_option(f"torchvision:{name}", **options) == taken
    if not taken and "img_size" not in options:
        with pytest.raises(PlanError, match="null"):
            create_model(f"torchvision:{name}", 10, 3, options)


def test_a_transformer_is_built_for_the_recipes_images():
    model, _ = assembled(small_plan("A2", "torchvision:vit_b_16", "drop_path=null"))
    assert model(torch.zeros(2, 3, 32, 32)).shape == (2, 10)


@pytest.mark.parametrize(
    ("model", "suggestion"),
    [
        ("torchvision:resnet5", "resnet50"),
        ("torchvision:fcn_resnet50", "classification"),
        ("torchvision:retinanet_resnet50_fpn", "classification"),
        ("torchvision:quantized_resnet50", "classification"),
        ("torchvision:", "torchvision:resnet50"),
        ("torchvision:resnet50.IMAGENET1K_V3", "IMAGENET1K_V2"),
        ("torchvision_resnet50", "torchvision:resnet50"),
        ("torchvision:resnet50/../x", "torchvision:resnet50"),
    ],
)
def test_a_name_that_is_no_classification_model_is_one_line(model, suggestion):
    with pytest.raises(PlanError) as caught:
        check_model_name(model)
    assert suggestion in str(caught.value) and "\n" not in str(caught.value)


def test_names_are_suggested_from_torchvisions_too():
    with pytest.raises(PlanError, match="did you mean torchvision:vit_b_16"):
        check_model_name("torchvison:vit_b_16")
    with pytest.raises(PlanError, match="use model=torchvision:shufflenet_v2_x1_0"):
        check_model_name("shufflenet_v2_x1_0")


@pytest.mark.parametrize("name", ["mobilenet_v3_small", "shufflenet_v2_x0_5"])
def test_a_recipe_trains_it_and_what_is_exported_opens(name, tmp_path):
    changes = "drop_path=null repeats=null batch.images=8 batch.norm_images=8"
    plan = small_plan("A2", f"torchvision:{name}", changes)
    assert ":" not in plan.run_name("x")
    settings = make_settings("cpu", workers="0")
    state = TrainingState(plan, settings)
    before = classifier_of(state.model).weight.detach().clone()
    stream = open_data(plan.profile, None).train_stream(plan, settings, 0)
    assert optimizer_step(state, stream, 0).isfinite()
    assert not torch.equal(classifier_of(state.model).weight, before)
    export_model(tmp_path, plan, state, tuple("0123456789"))
    opened = timm.create_model(f"local-dir:{tmp_path}", pretrained=True).eval()
    images = torch.randn(2, 3, 32, 32)
    with torch.no_grad():
        assert torch.equal(opened(images), state.weights()[state.scored].eval()(images))


def test_a_run_ends_with_a_row_and_its_model_opens(tmp_path):
    set_ = "epochs=2 batch.images=128 batch.norm_images=64"
    found = rsb(
        "train", "--recipe", "A3", "--model", "torchvision:shufflenet_v2_x0_5", "--set", set_,
        "--runs", tmp_path / "runs", "--results", tmp_path / "results", "--workers", 0,
    )  # fmt: skip
    assert found.exit_code == 0, found.output
    (row,) = (tmp_path / "results" / "rows").glob("*.json")
    assert json.loads(row.read_text())["model"] == "torchvision:shufflenet_v2_x0_5"
    (run,) = (tmp_path / "runs").glob("A3*")
    assert open_model(run)(torch.zeros(1, 3, 32, 32)).shape == (1, 10)


def _file_of(folder, name, tag):
    """A file as torchvision names it, with random weights."""
    url = known_weights(f"torchvision:{name}")[f"torchvision:{name}.{tag}"]
    path = folder / url.rpartition("/")[2]
    torch.save(torchvision.models.get_model(name).state_dict(), path)
    return path


def test_weights_are_a_file_as_torchvision_names_it(tmp_path):
    path = _file_of(tmp_path, "shufflenet_v2_x0_5", "IMAGENET1K_V1")
    found = of_weights("torchvision:shufflenet_v2_x0_5", str(path))
    assert len(found.classes) == 1000 and found.image.test_px == 224
    state = torch.load(path)
    assert all(torch.equal(state[key], one) for key, one in found.model.state_dict().items())


def test_a_file_says_how_its_images_are_shown(tmp_path):
    """torchvision's second weights of a ResNet-18's kind resize to 232, the first to 256."""
    shares = {}
    for tag in ("IMAGENET1K_V1", "IMAGENET1K_V2"):
        path = _file_of(tmp_path, "regnet_y_400mf", tag)
        shares[tag] = of_weights("torchvision:regnet_y_400mf", str(path)).image.crop_share
    assert shares == {"IMAGENET1K_V1": 224 / 256, "IMAGENET1K_V2": 224 / 232}


def test_weights_by_name_are_those_in_torchs_cache(tmp_path, monkeypatch):
    monkeypatch.setattr(torch.hub, "get_dir", lambda: str(tmp_path))
    (tmp_path / "checkpoints").mkdir()
    path = _file_of(tmp_path / "checkpoints", "shufflenet_v2_x0_5", "IMAGENET1K_V1")
    assert weights_path("torchvision:shufflenet_v2_x0_5.IMAGENET1K_V1") == path
    digest = hashlib.sha256(path.read_bytes()).hexdigest()
    changes = f"'model.pretrained={{file: torchvision:shufflenet_v2_x0_5.IMAGENET1K_V1, sha256: {digest}}}'"
    plan = small_plan("A3", "torchvision:shufflenet_v2_x0_5", changes)
    state = TrainingState(plan, make_settings("cpu", workers="0"))
    assert torch.equal(state.model.conv1[0].weight, torch.load(path)["conv1.0.weight"])


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("torchvision:resnet50.IMAGENET1K_V9", "IMAGENET1K_V2"),
        ("torchvision:resnet50", "IMAGENET1K_V1"),
        ("torchvision:nothing.IMAGENET1K_V1", "no such weights"),
        ("torchvision:resnet50.IMAGENET1K_V1", "https://download.pytorch.org/models/resnet50-"),
    ],
)
def test_weights_that_cannot_be_had_are_one_line(name, said, tmp_path, monkeypatch):
    def refuse(*_args, **_options):
        raise OSError("no network")

    monkeypatch.setattr(torch.hub, "get_dir", lambda: str(tmp_path))
    monkeypatch.setattr(torch.hub, "download_url_to_file", refuse)
    with pytest.raises(WeightsError) as caught:
        weights_path(name)
    assert said in str(caught.value) and "\n" not in str(caught.value)


def test_densenets_older_names_and_auxiliary_classifiers_are_known():
    model = create_model("torchvision:densenet121", 1000, 3, {})
    own = model.state_dict()
    older = {
        key.replace(".norm1.", ".norm.1.").replace(".norm2.", ".norm.2.")
        .replace(".conv1.", ".conv.1.").replace(".conv2.", ".conv.2.")
        if "denselayer" in key else key: one
        for key, one in own.items()
    }  # fmt: skip
    assert set(checkpoint_filter_fn(older, model)) == set(own)
    assert checkpoint_filter_fn({"AuxLogits.fc.weight": torch.ones(1)}, model) == {}


def test_position_embeddings_are_resized():
    small, large = (create_model("torchvision:vit_b_16", 5, 3, {"img_size": px}) for px in (32, 64))
    found = checkpoint_filter_fn(large.state_dict(), small)
    small.load_state_dict(found)
    assert set(small.no_weight_decay()) == {"class_token", "encoder.pos_embedding"}


def test_timm_knows_them_by_another_name():
    assert timm_name("torchvision:resnet50") == "torchvision_resnet50"
    assert timm_name("resnet50") == "resnet50"
    assert timm.is_model("torchvision_resnet50")
