"""Heads of segmentation and detection against the modules of transformers, weights copied.

transformers ports the authors' code. Version 5.24 has no DETA; DETA's encoder and decoder are made
of the layers of Deformable DETR, which it has. Maps have odd sides, so that resizing counts.
"""

from types import SimpleNamespace

import pytest
import torch
from torch import nn
from transformers import DeformableDetrConfig, SegformerConfig
from transformers.models.deformable_detr.modeling_deformable_detr import (
    DeformableDetrDecoderLayer,
    DeformableDetrEncoder,
    DeformableDetrEncoderLayer,
    DeformableDetrModel,
    DeformableDetrMultiscaleDeformableAttention,
    DeformableDetrSinePositionEmbedding,
)
from transformers.models.segformer.modeling_segformer import SegformerDecodeHead

from trainer.tasks.detection.deformable import (
    DecoderLayer,
    DeformableAttention,
    EncoderLayer,
    middles,
    sines,
)
from trainer.tasks.segmentation.heads import AllMlp

CHANNELS, HEADS, POINTS, HIDDEN, QUERIES = 16, 4, 3, 24, 7
SIDES = [(9, 12), (5, 6), (3, 3)]
PIXELS = sum(height * width for height, width in SIDES)
SIZES = CHANNELS, HEADS, len(SIDES), POINTS
CONFIG = DeformableDetrConfig(
    d_model=CHANNELS,
    num_feature_levels=len(SIDES),
    encoder_attention_heads=HEADS,
    decoder_attention_heads=HEADS,
    encoder_n_points=POINTS,
    decoder_n_points=POINTS,
    encoder_ffn_dim=HIDDEN,
    decoder_ffn_dim=HIDDEN,
    attn_implementation="eager",
)


def settled(module: nn.Module) -> nn.Module:
    """Weights of both signs that are not those of a start, in evaluation mode."""
    draw = torch.Generator().manual_seed(1)
    for name, tensor in module.state_dict().items():
        if name.endswith("running_var"):
            tensor.copy_(torch.rand(tensor.shape, generator=draw) + 0.5)
        elif tensor.is_floating_point():
            tensor.copy_(torch.randn(tensor.shape, generator=draw) * 0.3)
    return module.eval()


def attention_of(theirs: nn.Module, name: str) -> list[torch.Tensor]:
    """Weights and biases in the order in which DeformableAttention has its layers."""
    names = ("sampling_offsets", "attention_weights", "value_proj", "output_proj")
    return layers_of(theirs, *(f"{name}{one}" for one in names))


def layers_of(theirs: nn.Module, *names: str) -> list[torch.Tensor]:
    state = theirs.state_dict()
    return [state[f"{name}.{kind}"] for name in names for kind in ("weight", "bias")]


def loaded(ours: nn.Module, tensors: list[torch.Tensor]) -> nn.Module:
    """Every weight one after the other: the same numbers of each, whatever its shape."""
    state = ours.state_dict()
    pairs = zip(state.items(), tensors, strict=True)
    ours.load_state_dict({name: other.view_as(mine) for (name, mine), other in pairs})
    return ours.eval()


def drawn(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def references(numbers: int) -> torch.Tensor:
    """Places (x, y) or boxes (x, y, width, height) in shares of an image, some near its edges."""
    return torch.rand(2, QUERIES, numbers, generator=torch.Generator().manual_seed(numbers))


def looked_at(places: torch.Tensor) -> dict:
    """What transformers wants to know of the maps: the same places on every level."""
    return {
        "reference_points": places[:, :, None].expand(-1, -1, len(SIDES), -1),
        "spatial_shapes": torch.tensor(SIDES),
        "spatial_shapes_list": SIDES,
    }


def assert_same(ours: torch.Tensor, theirs: torch.Tensor) -> None:
    assert theirs.std() > 0.1  # something is compared
    torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-5)


# ---- segmentation


@torch.no_grad()
def test_segformers_head_is_transformers():
    """The whole head: both give scores of the finest map's size, which are resized elsewhere."""
    widths, random = (8, 12, 16, 24), torch.Generator().manual_seed(0)
    config = SegformerConfig(hidden_sizes=list(widths), decoder_hidden_size=10, num_labels=5)
    theirs = settled(SegformerDecodeHead(config))
    ours = AllMlp(channels=10, dropout=0.1).build(widths, 5)
    loaded(ours, list(theirs.state_dict().values()))
    maps = [
        torch.randn(2, width, side, side + 4, generator=random)
        for width, side in zip(widths, (17, 9, 5, 3), strict=True)
    ]
    assert_same(ours(maps), theirs(maps))


# ---- detection


@torch.no_grad()
@pytest.mark.parametrize("numbers", [2, 4])
def test_deformable_attention_is_transformers(numbers):
    theirs = settled(DeformableDetrMultiscaleDeformableAttention(CONFIG, HEADS, POINTS))
    ours = loaded(DeformableAttention(*SIZES), attention_of(theirs, ""))
    queries, memory = drawn(2, QUERIES, CHANNELS), drawn(2, PIXELS, CHANNELS, seed=1)
    places = references(numbers)
    expected, _ = theirs(queries, encoder_hidden_states=memory, **looked_at(places))
    assert_same(ours(queries, places, memory, SIDES), expected)


def test_places_of_pixels_are_transformers():
    ratios = torch.ones(1, len(SIDES), 2)
    expected = DeformableDetrEncoder.get_reference_points(SIDES, ratios, "cpu")
    assert_same(middles(SIDES, torch.device("cpu")), expected[0, :, 0])


@pytest.mark.parametrize("side", SIDES)
def test_sines_of_pixels_are_transformers(side):
    """Rows before columns. Theirs divide by the side and a millionth."""
    embedding = DeformableDetrSinePositionEmbedding(CHANNELS // 2, normalize=True)
    expected = embedding((1, CHANNELS, *side), "cpu", torch.float32)[0].flatten(1).T
    places = middles([side], torch.device("cpu"))[:, [1, 0]]
    assert_same(sines(places, CHANNELS // 2), expected)


def test_sines_of_boxes_are_transformers():
    logits = drawn(2, QUERIES, 4)
    expected = DeformableDetrModel.get_proposal_pos_embed(SimpleNamespace(config=CONFIG), logits)
    assert_same(sines(logits.sigmoid(), CHANNELS // 2), expected)


@torch.no_grad()
def test_encoder_layer_is_transformers():
    theirs = settled(DeformableDetrEncoderLayer(CONFIG))
    rest = layers_of(theirs, "self_attn_layer_norm", "mlp.fc1", "mlp.fc2", "final_layer_norm")
    ours = loaded(EncoderLayer(*SIZES, HIDDEN), attention_of(theirs, "self_attn.") + rest)
    memory, position = drawn(2, PIXELS, CHANNELS), drawn(2, PIXELS, CHANNELS, seed=1)
    places = middles(SIDES, torch.device("cpu"))[None]
    expected = theirs(memory, None, position, **looked_at(places.expand(2, -1, -1)))
    assert_same(ours(memory, position, places, SIDES), expected)


@torch.no_grad()
def test_decoder_layer_is_transformers():
    theirs = settled(DeformableDetrDecoderLayer(CONFIG))
    state = theirs.state_dict()
    among = [
        torch.cat([state[f"self_attn.{one}_proj.{kind}"] for one in "qkv"])
        for kind in ("weight", "bias")
    ]
    ours = loaded(
        DecoderLayer(*SIZES, HIDDEN),
        among
        + layers_of(theirs, "self_attn.o_proj", "self_attn_layer_norm")
        + attention_of(theirs, "encoder_attn.")
        + layers_of(theirs, "encoder_attn_layer_norm", "mlp.fc1", "mlp.fc2", "final_layer_norm"),
    )
    queries, position = drawn(2, QUERIES, CHANNELS), drawn(2, QUERIES, CHANNELS, seed=1)
    memory, boxes = drawn(2, PIXELS, CHANNELS, seed=2), references(4)
    expected = theirs(
        queries,
        object_queries_position_embeddings=position,
        encoder_hidden_states=memory,
        **looked_at(boxes),
    )
    assert_same(ours(queries, position, boxes, memory, SIDES), expected)
