"""Models of the literature are their authors': the same weights, the same multiply-adds, and used as
timm's are.
"""

import inspect
import warnings

import pytest
import timm
import torch
from torch import nn

from support.plans import small_plan
from trainer.base.errors import PlanError
from trainer.base.settings import make_settings
from trainer.data.dataset import open_data
from trainer.engine.state import TrainingState
from trainer.engine.train import optimizer_step
from trainer.models import zoo
from trainer.models.build import assembled, gmacs, num_parameters
from trainer.models.timm_options import create_model, takes_option
from trainer.runs.export import export_model, is_timms, timm_facts

# Weights and billions of multiply-adds at the model's own image size and classes, counted by running
# the authors' code: KellerJordan/cifar10-airbench (f1c599c4), SHI-Labs/Compact-Transformers, microsoft/CvT (f851e68), whai362/PVT,
# yitu-opensource/T2T-ViT, megvii-model/ShuffleNet-Series.
COUNTS = {
    "airbench94": (1_972_792, 0.1181),
    "airbench96": (9_918_776, 0.4520),
    "cct_7_3x1_32": (3_760_139, 1.182),
    "cct_7_3x1_32_sine": (3_760_139, 1.182),
    "cct_7_7x2_224_sine": (4_573_735, 1.605),
    "cct_14_7x2_224": (22_367_273, 5.522),
    "cct_14_7x2_384": (22_513_193, 18.580),
    "cvt_13": (19_997_480, 4.566),
    "cvt_13_384": (19_997_480, 16.269),
    "cvt_21": (31_622_696, 7.178),
    "pvt_tiny": (13_229_288, 1.933),
    "pvt_small": (24_485_864, 3.816),
    "pvt_medium": (44_208_104, 6.659),
    "pvt_large": (61_369_320, 9.814),
    "t2t_vit_7": (4_310_222, 1.147),
    "t2t_vit_10": (5_889_230, 1.516),
    "t2t_vit_12": (6_941_902, 1.763),
    "t2t_vit_14": (21_545_550, 4.784),
    "t2t_vit_19": (39_177_422, 8.480),
    "t2t_vit_24": (64_105_934, 13.662),
    "t2t_vit_t_14": (21_541_070, 6.089),
    "t2t_vit_t_19": (39_172_942, 9.785),
    "t2t_vit_t_24": (64_101_454, 14.967),
    "shufflenet_v1_g3_050": (717_324, 0.0376),
    "shufflenet_v1_g3_100": (1_864_728, 0.1375),
    "shufflenet_v1_g3_150": (3_441_168, 0.2924),
    "shufflenet_v1_g3_200": (5_449_776, 0.5240),
    "shufflenet_v1_g8_050": (1_010_448, 0.0405),
    "shufflenet_v1_g8_100": (2_433_768, 0.1384),
    "shufflenet_v1_g8_150": (4_268_952, 0.2902),
    "shufflenet_v1_g8_200": (6_521_232, 0.5219),
}
# One of each kind, small enough to run at 32 px, and its image size where its positions have one.
SMALL = {
    "airbench94": {},
    "airbench96": {},
    "cct_2_3x2_32": {},
    "cct_2_3x2_32_sine": {},
    "cvt_13": {},
    "pvt_tiny": {},
    "t2t_vit_7": {"img_size": 32},
    "t2t_vit_t_14": {"img_size": 32, "depth": 2},
    "shufflenet_v1_g3_050": {},
    "condensenetv2_a": {},
    "ea_resnet50": {"img_size": 32},
    "vit_tiny_patch16_plain_224": {"img_size": 32},
}
NAMES = [
    name for name in timm.list_models() if timm.models.model_entrypoint(name).__module__.startswith(
        zoo.__name__
    )
]  # fmt: skip


def images(px=32, number=2, seed=0):
    return torch.randn(number, 3, px, px, generator=torch.Generator().manual_seed(seed))


def model_of(name, **options):
    torch.manual_seed(0)
    return timm.create_model(name, **SMALL[name], **options)


def test_timm_knows_them_and_had_none_of_their_names():
    assert set(COUNTS) | set(SMALL) <= set(NAMES)
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # timm warns of a name that is registered twice
        assert all(zoo.has_model(name) for name in NAMES)
    assert not zoo.has_model("resnet50")


@pytest.mark.parametrize("name", COUNTS)
def test_weights_and_multiply_adds_are_those_of_the_authors(name):
    with torch.device("meta"):
        model = timm.create_model(name)
    weights, multiply_adds = COUNTS[name]
    assert num_parameters(model) == weights
    assert gmacs(model, 3, model.default_cfg["input_size"][-1]) == pytest.approx(
        multiply_adds, rel=0.01
    )


@pytest.mark.parametrize("name", [*SMALL, "cct_14_7x2_224"])
def test_it_is_used_as_timms_models_are(name):
    with torch.device("meta"):
        model = timm.create_model(name, num_classes=7, in_chans=1)
        facts = model.default_cfg
        assert facts["architecture"] == name and facts["input_size"][0] == 3
        if facts["first_conv"]:
            assert model.get_submodule(facts["first_conv"]).weight.shape[1] == 1
        assert model.get_classifier() is model.get_submodule(facts["classifier"])
        px = facts["input_size"][-1]
        features = model.forward_features(torch.zeros(2, 1, px, px))
        assert model.forward_head(features, pre_logits=True).shape == (2, model.num_features)
        assert model.forward_head(features).shape == (2, 7)
        model.reset_classifier(0)
        assert model(torch.zeros(2, 1, px, px)).shape == (2, model.num_features)
        model.reset_classifier(3)
        assert model.head.weight.shape == (3, model.num_features)
    assert set(model.no_weight_decay()) <= set(model.state_dict())


@pytest.mark.parametrize("name", [*SMALL, "cct_14_7x2_224"])
def test_layers_of_their_own_rate_are_numbered_from_the_stem_to_the_head(name):
    with torch.device("meta"):
        model = timm.create_model(name)
    layers = timm.models.group_parameters(model, model.group_matcher(), reverse=True)
    assert set(layers) == {name for name, _ in model.named_parameters()}
    first = model.default_cfg["first_conv"] or "tokens.project"
    assert layers[f"{first}.weight"] == 0
    assert layers["head.weight"] == max(layers.values())
    assert sum(layer == layers["head.weight"] for layer in layers.values()) <= 2


@pytest.mark.parametrize("name", SMALL)
def test_it_is_finite_in_float32_and_under_autocast(name):
    model = model_of(name, num_classes=5)
    given = images()
    plain = model(given)
    with torch.autocast("cpu", torch.bfloat16):
        cast = model(given)
    for logits in (plain, cast):
        assert logits.shape == (2, 5) and logits.isfinite().all()
    plain.square().sum().backward()
    trained = [weight for weight in model.parameters() if weight.requires_grad]
    assert all(weight.grad is not None and weight.grad.isfinite().all() for weight in trained)


@pytest.mark.parametrize("name", SMALL)
def test_its_weights_make_the_same_model(name):
    one, other = model_of(name).eval(), timm.create_model(name, **SMALL[name]).eval()
    with torch.no_grad():
        # not the logits: big_vision's classifiers start at zero
        assert not torch.equal(one.forward_features(images()), other.forward_features(images()))
        other.load_state_dict(one.state_dict())
        assert torch.equal(one(images()), other(images()))


@pytest.mark.parametrize("name", SMALL)
def test_it_learns_a_few_images_by_heart(name):
    model = model_of(name, num_classes=4)
    given, labels = images(number=4), torch.arange(4)
    frozen = {
        key: weight.clone() for key, weight in model.named_parameters() if not weight.requires_grad
    }
    optimizer = torch.optim.AdamW([w for w in model.parameters() if w.requires_grad], lr=1e-3)
    losses = []
    while len(losses) < 20 and (len(losses) < 2 or losses[-1] > 0.5 * losses[0]):
        loss = nn.functional.cross_entropy(model(given), labels)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.5 * losses[0]
    assert all(torch.equal(dict(model.named_parameters())[key], frozen[key]) for key in frozen)


@pytest.mark.parametrize("name", ["cct_2_3x2_32", "cvt_13", "pvt_tiny", "t2t_vit_7"])
def test_branches_are_dropped_at_a_rate_that_rises_with_depth(name):
    model = timm.create_model(name, drop_path_rate=0.3)
    rates = [
        module.drop_prob for module in model.modules() if isinstance(module, timm.layers.DropPath)
    ]
    assert rates == sorted(rates) and rates[-1] == pytest.approx(0.3)
    assert not takes_option("shufflenet_v1_g3_050", drop_path_rate=0.1)


def test_cvt_drops_branches_in_its_last_stage_alone():
    model = timm.create_model("cvt_13", drop_path_rate=0.1)
    rates = [[block.drop_path.drop_prob for block in stage.blocks] for stage in model.stages]
    assert rates[0] == [0] and rates[1] == [0, 0]
    assert rates[2] == pytest.approx([0.1 * i / 9 for i in range(10)])


@pytest.mark.parametrize("name", ["cct_2_3x2_32", "t2t_vit_7"])
def test_images_of_another_size_are_refused_where_positions_do_not_fit(name):
    own = timm.create_model(name).default_cfg["input_size"][-1]
    with pytest.raises(ValueError, match=f"img_size={own}"):
        timm.create_model(name)(images(own + 32))
    assert timm.create_model(name, img_size=own + 32)(images(own + 32)).isfinite().all()
    torch.manual_seed(0)
    free = timm.create_model(name, dynamic_img_size=True).eval()
    bound = timm.create_model(name).eval()
    bound.load_state_dict(free.state_dict())
    with torch.no_grad():
        assert torch.equal(free(images(own)), bound(images(own)))
        assert free(images(own + 32)).isfinite().all()


@pytest.mark.parametrize(
    "name", ["cct_2_3x2_32", "pvt_tiny", "cvt_13", "shufflenet_v1_g3_050", "condensenetv2_a"]
)
def test_a_recipe_trains_it_and_timm_opens_what_is_exported(name, tmp_path):
    plan = small_plan("A2", name, "drop_path=null repeats=null batch.images=8 batch.norm_images=8")
    settings = make_settings("cpu", workers="0")
    state = TrainingState(plan, settings)
    before = state.model.head.weight.detach().clone()
    stream = open_data(plan.profile, None).train_stream(plan, settings, 0)
    assert optimizer_step(state, stream, 0).isfinite()
    assert not torch.equal(state.model.head.weight, before)
    export_model(tmp_path, plan, state, tuple("0123456789"))
    assert is_timms(plan)
    opened = timm.create_model(f"local-dir:{tmp_path}", pretrained=True).eval()
    scored = state.weights()[state.scored].eval()
    with torch.no_grad():
        assert torch.equal(opened(images()), scored(images()))


def test_models_without_an_option_say_which_line_of_the_recipe_to_leave_out():
    with pytest.raises(PlanError, match=r'set="drop_path=null"'):
        create_model("shufflenet_v1_g3_100", 10, 3, {"drop_path_rate": 0.1})


def test_every_class_names_its_options():
    """An unknown option is a TypeError, which recipes' errors are made of; no **kwargs takes it."""
    for name in SMALL:
        kinds = inspect.signature(type(model_of(name)).__init__).parameters.values()
        assert all(kind.kind is not kind.VAR_KEYWORD for kind in kinds)


def _dropouts(model, place):
    return {module.p for name, module in model.named_modules() if name.endswith(place)}


def test_the_dropouts_that_a_model_brings_are_options_of_a_recipe():
    def rates(name, place, overrides=""):
        plan = small_plan("A2", name, overrides)
        return _dropouts(assembled(plan)[0], place), plan.recipe.digest

    own, digest = rates("cct_2_3x2_32", "attn_drop")
    off, other = rates("cct_2_3x2_32", "attn_drop", "model.attention_dropout=0")
    assert own == {0.1} and off == {0} and digest != other
    assert rates("t2t_vit_7", "attention1.drop")[0] == {0.1}
    less = rates("t2t_vit_7", "attention1.drop", "model.projection_dropout=0.05")[0]
    assert less == {0.05}
    assert rates("deit_tiny_patch16_224", "attn_drop", "model.attention_dropout=0.2")[0] == {0.2}


def test_a_transformer_has_the_patches_of_its_recipe():
    plan = small_plan("A2", "deit_tiny_patch16_224", "model.patch_px=4")
    model, _ = assembled(plan)
    assert model.pos_embed.shape == (1, 1 + 8 * 8, 192)
    assert timm_facts(plan, tuple("0123456789"))["model_args"]["patch_size"] == 4


@pytest.mark.parametrize(
    ("name", "option"),
    [("resnet18", "attention_dropout"), ("resnet18", "patch_px"), ("cct_2_3x2_32", "projection_dropout")],
)  # fmt: skip
def test_an_option_of_other_models_is_refused_by_its_key(name, option):
    value = 4 if option == "patch_px" else 0.1
    with pytest.raises(PlanError, match=rf'set="model.{option}=null"'):
        assembled(small_plan("A2", name, f"model.{option}={value}"))
