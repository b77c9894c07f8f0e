"""What is odd in each model is as its authors have it: against plain loops in float64."""

import math
import sys

import pytest
import timm
import torch
from timm.models import build_model_with_cfg, register_model
from torch import nn
from torch.nn import functional as F

from support.plans import small_plan
from trainer.base.settings import make_settings
from trainer.data.dataset import open_data
from trainer.engine.state import TrainingState
from trainer.engine.train import optimizer_step
from trainer.models.zoo.cct import CCT, CctBlock
from trainer.models.zoo.common import sinusoid_positions
from trainer.models.zoo.cvt import ConvAttention
from trainer.models.zoo.pvt import PVT, PvtBlock
from trainer.models.zoo.shufflenet_v1 import ShuffleUnit
from trainer.models.zoo.t2t_vit import T2TViT, TokenPerformer, TokenTransformer


@register_model
def tiny_t2t(pretrained=False, **options):
    shape = {"img_size": 32, "embed_dim": 32, "depth": 2, "num_heads": 2}
    return build_model_with_cfg(T2TViT, "tiny_t2t", pretrained, **shape | options)


def filter_of(model):
    """The map of names in the module of a model's class, where timm has its own."""
    return sys.modules[type(model).__module__].checkpoint_filter_fn


def random(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def made(module):
    """In float64 and evaluation mode, every weight random: nothing hides behind zero or one."""
    module = module.double().eval()
    for number, tensor in enumerate([*module.parameters(), *module.buffers()]):
        if tensor.is_floating_point():
            tensor.data = random(*tensor.shape, seed=number).abs() * 0.3 + 0.1
    return module


def softmax_attention(q, k, v, scale):
    """[N, D], [M, D], [M, E]: row by row."""
    rows = []
    for query in q:
        weights = torch.stack([(query * key).sum() * scale for key in k]).exp()
        rows.append((weights[:, None] * v).sum(0) / weights.sum())
    return torch.stack(rows)


def heads(x, number):
    """[N, D] as `number` of [N, D / number]."""
    return x.split(x.shape[1] // number, dim=1)


def multi_head(q, k, v, number, scale):
    parts = zip(heads(q, number), heads(k, number), heads(v, number), strict=True)
    return torch.cat([softmax_attention(*part, scale) for part in parts], dim=1)


def test_a_cct_block_normalizes_the_stream_itself():
    block, x = made(CctBlock(8, 2, 2.0, attn_drop=0.1, drop_path=0.1)), random(1, 5, 8)
    q, k, v = (block.norm1(x)[0] @ block.attn.qkv.weight.T).split(8, dim=1)
    assert block.attn.qkv.bias is None
    stream = x[0] + block.attn.proj(multi_head(q, k, v, 2, 4**-0.5))
    stream = F.layer_norm(stream, (8,), block.norm2.weight, block.norm2.bias)
    expected = stream + block.mlp.fc2(F.gelu(block.mlp.fc1(stream)))
    torch.testing.assert_close(block(x)[0], expected)


def test_cct_pools_tokens_by_a_softmax_over_them():
    model = made(CCT(img_size=32, embed_dim=8, depth=1, num_heads=2, num_classes=3))
    tokens = random(1, 4, 8)
    weights = torch.stack([model.attention_pool(token).exp() for token in tokens[0]])
    expected = model.head((weights * tokens[0]).sum(0) / weights.sum())
    torch.testing.assert_close(model.forward_head(tokens)[0], expected)


def test_ccts_learned_positions_start_wide_and_its_sinusoids_do_not_train():
    torch.manual_seed(0)
    learned = timm.create_model("cct_7_3x1_32").pos_embed
    assert learned.requires_grad and learned.std().item() == pytest.approx(0.2, rel=0.02)
    fixed = timm.create_model("cct_7_3x1_32_sine").pos_embed
    assert not fixed.requires_grad and torch.equal(fixed, sinusoid_positions(256, 256))


def test_sinusoids_are_the_formula():
    table = sinusoid_positions(5, 6)[0]
    for position in range(5):
        for channel in range(6):
            angle = position / 10000 ** (2 * (channel // 2) / 6)
            expected = math.cos(angle) if channel % 2 else math.sin(angle)
            assert table[position, channel].item() == pytest.approx(expected, abs=1e-7)


@pytest.mark.parametrize("has_class", [False, True])
def test_cvt_scales_by_the_whole_width_and_takes_keys_of_every_second_pixel(has_class):
    layer, x = made(ConvAttention(8, 2)), random(1, has_class + 12, 8)
    grid = x[0, has_class:].T.reshape(1, 8, 3, 4)

    def projected(conv, linear, stride):
        mixed = F.conv2d(grid, conv.conv.weight, stride=stride, padding=1, groups=8)
        norm = conv.bn
        mean, scale = norm.running_mean, norm.weight / (norm.running_var + 1e-5).sqrt()
        mixed = (mixed[0].reshape(8, -1).T - mean) * scale + norm.bias
        return linear(torch.cat((x[0, :has_class], mixed)))

    q = projected(layer.conv_proj_q, layer.proj_q, 1)
    k = projected(layer.conv_proj_k, layer.proj_k, 2)
    v = projected(layer.conv_proj_v, layer.proj_v, 2)
    assert len(q) == has_class + 12 and len(k) == has_class + 4
    expected = layer.proj(multi_head(q, k, v, 2, 8**-0.5))
    torch.testing.assert_close(layer(x, (3, 4))[0], expected)


def test_pvt_attends_to_a_map_made_smaller():
    block, x = made(PvtBlock(8, 2, 2, 2, drop_path=0.0)), random(1, 16, 8)
    normed = block.norm1(x)[0]
    small = F.conv2d(
        normed.T.reshape(1, 8, 4, 4), block.attn.sr.weight, block.attn.sr.bias, stride=2
    )
    small = F.layer_norm(
        small[0].reshape(8, 4).T, (8,), block.attn.norm.weight, block.attn.norm.bias, 1e-5
    )
    k, v = block.attn.kv(small).split(8, dim=1)
    stream = x[0] + block.attn.proj(multi_head(block.attn.q(normed), k, v, 2, 4**-0.5))
    normed = F.layer_norm(stream, (8,), block.norm2.weight, block.norm2.bias, 1e-6)
    expected = stream + block.mlp.fc2(F.gelu(block.mlp.fc1(normed)))
    torch.testing.assert_close(block(x, (4, 4))[0], expected)


def test_pvts_positions_follow_the_size_of_the_map_and_the_class_keeps_its_own():
    stage = PVT(img_size=64, embed_dims=(8, 8, 8, 8), num_heads=(1, 1, 1, 1)).stages[-1]
    assert stage.positions((2, 2)) is stage.pos_embed
    larger = stage.positions((3, 3))
    assert torch.equal(larger[:, :1], stage.pos_embed[:, :1])
    grid = stage.pos_embed[0, 1:].reshape(2, 2, 8)
    torch.testing.assert_close(larger[0, 1:].reshape(3, 3, 8)[1, 1], grid.mean(dim=(0, 1)))


def test_a_performer_is_linear_attention_by_positive_features():
    layer, x = made(TokenPerformer(9)), random(1, 6, 9) * 0.2

    def feature(vector):
        return torch.stack([(row @ vector - vector @ vector / 2).exp() for row in layer.w])

    k, q, v = layer.kqv(layer.norm1(x))[0].split(64, dim=1)
    k, q, v = k.float(), q.float(), v.float()
    layer_w, layer.w.data = layer.w.data, layer.w.data.float()
    rows = []
    for query in q:
        shares = torch.stack([feature(query) @ feature(key) / 32 for key in k])
        rows.append((shares[:, None] * v).sum(0) / (shares.sum() + 1e-8))
    layer.w.data = layer_w
    stream = v.double() + layer.proj(torch.stack(rows).double())
    expected = stream + layer.mlp(layer.norm2(stream))
    torch.testing.assert_close(layer(x)[0], expected, rtol=1e-4, atol=1e-4)


def test_the_features_rows_are_orthogonal_of_length_sqrt_32_and_do_not_train():
    weights = TokenPerformer(9).w
    torch.testing.assert_close(weights @ weights.T, 32 * torch.eye(32), rtol=0, atol=1e-3)
    assert not weights.requires_grad


def test_a_token_transformer_scales_by_its_inputs_width_and_skips_from_values():
    layer, x = made(TokenTransformer(9)), random(1, 6, 9)
    q, k, v = (layer.norm1(x)[0] @ layer.attn.qkv.weight.T).split(64, dim=1)
    stream = v + layer.attn.proj(softmax_attention(q, k, v, 9**-0.5))
    expected = stream + layer.mlp(layer.norm2(stream))
    torch.testing.assert_close(layer(x)[0], expected)


@pytest.mark.parametrize("freeze", ["", " 'model.freeze={all_but: [head], until_epochs: 0.1}'"])
def test_what_t2t_freezes_stays_through_steps_averages_and_a_freeze_that_ends(freeze):
    plan = small_plan(
        "A2", "tiny_t2t", f"'average={{name: ema, decay: 0.9, every_steps: 1}}'{freeze}"
    )
    settings = make_settings("cpu", workers="0")
    state = TrainingState(plan, settings)
    before = {name: tensor.clone() for name, tensor in state.model.state_dict().items()}
    fixed = {"pos_embed", "tokens.attention1.w", "tokens.attention2.w"}
    stream = open_data(plan.profile, None).train_stream(plan, settings, 0)
    for step in range(8):
        optimizer_step(state, stream, step)
    for weights in state.weights().values():
        after = weights.state_dict()
        same = {name for name, tensor in before.items() if torch.equal(after[name], tensor)}
        assert fixed <= same and "blocks.0.attn.qkv.weight" not in same
    in_groups = {id(w) for group in state.optimizer.param_groups for w in group["params"]}
    own = dict(state.model.named_parameters())
    assert not any(id(own[name]) in in_groups for name in fixed)


def test_shufflenets_groups_see_every_group_before_them():
    unit = ShuffleUnit(24, 24, groups=3, stride=1, is_first=False).double().eval()
    seen = []
    unit.conv3.register_forward_pre_hook(lambda module, given: seen.append(given[0]))
    before = []
    unit.bn2.register_forward_hook(lambda module, given, made: before.append(made))
    unit(random(1, 24, 2, 2))
    for group in range(3):
        for place in range(2):  # six middle channels, two a group
            expected = before[0][0, place * 3 + group]
            assert torch.equal(seen[0][0, group * 2 + place], expected)


def test_a_shuffle_unit_adds_or_puts_the_pooled_input_in_front():
    same = made(ShuffleUnit(24, 24, groups=3, stride=1, is_first=False))
    x = random(1, 24, 4, 4)
    branch = []
    same.bn3.register_forward_hook(lambda module, given, made: branch.append(made))
    torch.testing.assert_close(same(x), (branch[0] + x).clamp(min=0))
    half = made(ShuffleUnit(12, 24, groups=3, stride=2, is_first=True))
    assert half.conv1.groups == 1 and half.conv3.groups == 3
    x = random(1, 12, 4, 4)
    torch.testing.assert_close(half(x)[:, :12], F.avg_pool2d(x, 3, 2, 1))


def official_cct(size):
    yield "tokenizer.conv_layers.0.0.weight"
    yield from ("classifier.positional_emb", "classifier.attention_pool.weight")
    yield from ("classifier.attention_pool.bias", "classifier.fc.weight", "classifier.fc.bias")
    for i in range(size):
        block = f"classifier.blocks.{i}."
        for layer in ("pre_norm", "self_attn.proj", "linear1", "norm1", "linear2"):
            yield from (f"{block}{layer}.weight", f"{block}{layer}.bias")
        yield f"{block}self_attn.qkv.weight"
    yield from ("classifier.norm.weight", "classifier.norm.bias")


def official_cvt(depths):
    for i, depth in enumerate(depths):
        for layer in ("patch_embed.proj", "patch_embed.norm"):
            yield from (f"stage{i}.{layer}.weight", f"stage{i}.{layer}.bias")
        for j in range(depth):
            block = f"stage{i}.blocks.{j}."
            for layer in ("norm1", "norm2", "mlp.fc1", "mlp.fc2", "attn.proj"):
                yield from (f"{block}{layer}.weight", f"{block}{layer}.bias")
            for kind in "qkv":
                yield from (f"{block}attn.proj_{kind}.{part}" for part in ("weight", "bias"))
                yield f"{block}attn.conv_proj_{kind}.conv.weight"
                parts = ("weight", "bias", "running_mean", "running_var", "num_batches_tracked")
                yield from (f"{block}attn.conv_proj_{kind}.bn.{part}" for part in parts)
    yield from ("stage2.cls_token", "norm.weight", "norm.bias", "head.weight", "head.bias")


def official_pvt(depths):
    for i, depth in enumerate(depths, 1):
        yield f"pos_embed{i}"
        for layer in ("proj", "norm"):
            yield from (f"patch_embed{i}.{layer}.weight", f"patch_embed{i}.{layer}.bias")
        layers = ["norm1", "norm2", "attn.q", "attn.kv", "attn.proj", "mlp.fc1", "mlp.fc2"]
        for j in range(depth):
            for layer in layers + ["attn.sr", "attn.norm"] * (i < 4):
                yield from (f"block{i}.{j}.{layer}.weight", f"block{i}.{j}.{layer}.bias")
    yield from ("cls_token", "norm.weight", "norm.bias", "head.weight", "head.bias")


def official_t2t(depth):
    for i in (1, 2):
        for layer in ("kqv", "proj", "norm1", "norm2", "mlp.0", "mlp.2"):
            yield from (
                f"tokens_to_token.attention{i}.{layer}.{part}" for part in ("weight", "bias")
            )
        yield f"tokens_to_token.attention{i}.w"
    yield from ("tokens_to_token.project.weight", "tokens_to_token.project.bias")
    for j in range(depth):
        for layer in ("norm1", "norm2", "attn.proj", "mlp.fc1", "mlp.fc2"):
            yield from (f"blocks.{j}.{layer}.weight", f"blocks.{j}.{layer}.bias")
        yield f"blocks.{j}.attn.qkv.weight"
    yield from ("cls_token", "pos_embed", "norm.weight", "norm.bias", "head.weight", "head.bias")


def official_shufflenet():
    parts = ("weight", "bias", "running_mean", "running_var", "num_batches_tracked")
    yield "first_conv.0.weight"
    yield from (f"first_conv.1.{part}" for part in parts)
    for i in range(16):
        convs = ("branch_main_1.0", "branch_main_1.3", "branch_main_2.0")
        norms = ("branch_main_1.1", "branch_main_1.4", "branch_main_2.1")
        yield from (f"features.{i}.{conv}.weight" for conv in convs)
        yield from (f"features.{i}.{norm}.{part}" for norm in norms for part in parts)
    yield "classifier.0.weight"


OFFICIAL = {
    "cct_7_3x1_32": official_cct(7),
    "cvt_13": official_cvt((1, 2, 10)),
    "pvt_tiny": official_pvt((2, 2, 2, 2)),
    "t2t_vit_7": official_t2t(7),
    "shufflenet_v1_g3_050": official_shufflenet(),
}


@pytest.mark.parametrize("name", OFFICIAL)
def test_the_names_of_the_authors_weights_become_ours(name):
    model = timm.create_model(name)
    convert = filter_of(model)
    names = list(OFFICIAL[name])
    given = {each: torch.full((768, 256), float(i)) for i, each in enumerate(names)}
    if "classifier.positional_emb" in given:
        given["classifier.positional_emb"] = model.pos_embed.detach()
    found = convert(dict(given), model)
    assert set(found) == set(model.state_dict()) and len(names) == len(set(names))


# Of the authors' weights, by the end of their names; "bias" and norms have the first axis alone.
SHAPES = {
    "cct_7_3x1_32": {
        "conv_layers.0.0.weight": (256, 3, 3, 3), "positional_emb": (1, 256, 256),
        "attention_pool.weight": (1, 256), "attention_pool.bias": (1,), "qkv.weight": (768, 256),
        "self_attn.proj.weight": (256, 256), "linear1.weight": (512, 256), "linear1.bias": (512,),
        "linear2.weight": (256, 512), "fc.weight": (10, 256), "fc.bias": (10,),
        "weight": (256,), "bias": (256,),
    },
    "cvt_13": {
        "stage0.patch_embed.proj.weight": (64, 3, 7, 7), "cls_token": (1, 1, 384),
        "stage1.patch_embed.proj.weight": (192, 64, 3, 3), "head.weight": (1000, 384),
        "stage2.patch_embed.proj.weight": (384, 192, 3, 3), "head.bias": (1000,),
        "num_batches_tracked": (), "conv.weight": "w133", "fc1.weight": "4w", "fc1.bias": "4",
        "fc2.weight": "w4", "norm1.weight": "w", "norm2.weight": "w", "bn.weight": "w",
        "norm.weight": "w", "proj.weight": "ww", "proj_q.weight": "ww", "proj_k.weight": "ww",
        "proj_v.weight": "ww", "bias": "w", "running_mean": "w", "running_var": "w",
    },
    "t2t_vit_7": {
        "attention1.kqv.weight": (192, 147), "attention2.kqv.weight": (192, 576),
        "kqv.bias": (192,), "attention1.norm1.weight": (147,), "attention2.norm1.weight": (576,),
        "attention1.norm1.bias": (147,), "attention2.norm1.bias": (576,), ".w": (32, 64),
        "project.weight": (256, 576), "project.bias": (256,), "qkv.weight": (768, 256),
        "attn.proj.weight": (256, 256), "fc1.weight": (512, 256), "fc1.bias": (512,),
        "fc2.weight": (256, 512), "cls_token": (1, 1, 256), "pos_embed": (1, 197, 256),
        "head.weight": (1000, 256), "head.bias": (1000,), "attention1.proj.weight": (64, 64),
        "attention2.proj.weight": (64, 64), "mlp.0.weight": (64, 64), "mlp.2.weight": (64, 64),
        "attention1.norm2.weight": (64,), "attention2.norm2.weight": (64,),
        "attention1.norm2.bias": (64,), "attention2.norm2.bias": (64,), "mlp.0.bias": (64,),
        "mlp.2.bias": (64,), "attention1.proj.bias": (64,), "attention2.proj.bias": (64,),
        "weight": (256,), "bias": (256,),
    },
}  # fmt: skip


def shape_of(name, kinds):
    shape = next(shape for end, shape in kinds.items() if name.endswith(end))
    if isinstance(shape, tuple):
        return shape
    width = {"stage0": 64, "stage1": 192}.get(name.partition(".")[0], 384)
    sizes = {"w": width, "4": 4 * width, "1": 1, "3": 3}
    return tuple(sizes[one] for one in shape)


@pytest.mark.parametrize(
    ("name", "official"),
    [
        ("cct_7_3x1_32", lambda: official_cct(7)),
        ("cvt_13", lambda: official_cvt((1, 2, 10))),
        ("t2t_vit_7", lambda: official_t2t(7)),
    ],
)
def test_the_authors_weights_have_our_shapes(name, official):
    model = timm.create_model(name)
    theirs = {each: torch.zeros(shape_of(each, SHAPES[name])) for each in official()}
    model.load_state_dict(filter_of(model)(theirs, model))


def test_the_authors_cct_keeps_its_two_norms_apart():
    model = timm.create_model("cct_2_3x2_32")
    theirs = {"classifier.fc.weight": torch.zeros(1)}
    theirs |= {"classifier.blocks.0.pre_norm.weight": torch.ones(1)}
    theirs |= {"classifier.blocks.0.norm1.weight": torch.full((1,), 2.0)}
    found = filter_of(model)(theirs, model)
    assert found["blocks.0.norm1.weight"] == 1 and found["blocks.0.norm2.weight"] == 2


def test_the_authors_t2t_attends_by_the_whole_width():
    """Their weights, scaled by 256 ** -0.5, give the same logits q.k here, at 64 ** -0.5."""
    model = timm.create_model("t2t_vit_7")
    theirs = {
        name.replace("tokens.", "tokens_to_token."): tensor
        for name, tensor in model.state_dict().items()
    }
    ours = filter_of(model)(theirs, model)["blocks.3.attn.qkv.weight"]
    before = theirs["blocks.3.attn.qkv.weight"]
    torch.testing.assert_close(ours[:256] * 64**-0.5, before[:256] * 256**-0.5)
    assert torch.equal(ours[256:], before[256:])


def test_positions_of_another_size_are_resized():
    source, larger = (
        timm.create_model("cct_2_3x2_32"),
        timm.create_model("cct_2_3x2_32", img_size=64),
    )
    found = filter_of(larger)(source.state_dict(), larger)
    larger.load_state_dict(found)
    assert nn.functional.cosine_similarity(
        larger.pos_embed.mean(1), source.pos_embed.mean(1)
    ).item() == pytest.approx(1, abs=0.1)
