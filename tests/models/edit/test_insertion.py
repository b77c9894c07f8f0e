"""A module that is put into a block runs once, on the residual branch, and survives copies and
compilation.
"""

import copy

import pytest
import timm
import torch
from torch import nn

from trainer.models.edit.insertion import block_ends, branch_ends, branch_middles, check_inserted
from trainer.models.edit.replacement import ReplacementError


class Double(nn.Module):
    def forward(self, features):
        assert features.shape[1] == 24  # channels first, wherever it stands
        return features * 2


@pytest.mark.parametrize("places_of", [branch_ends, branch_middles, block_ends])
def test_a_follower_is_given_channels_first_and_is_copied_with_its_block(places_of):
    model = timm.create_model(
        "test_convnext", num_classes=4
    ).eval()  # its blocks work channels last inside
    images = torch.randn(1, 3, 64, 64)
    before = model(images)
    place = places_of(model, ["stages.0.blocks.0"], "attention")[0]
    assert place.num_channels == 24
    place.insert(Double())
    check_inserted(model, "attention", [(place.block, place.name)])
    after = model(images)
    assert not torch.equal(before, after) or places_of is branch_middles
    assert torch.equal(copy.deepcopy(model)(images), after)
    compiled = torch.compile(model, backend="eager", fullgraph=True)
    torch.testing.assert_close(compiled(images), after)


def test_a_place_that_is_not_used_is_refused():
    model = timm.create_model("test_resnet")
    model.layer1[0].add_module("unused", nn.Identity())
    with pytest.raises(ReplacementError, match="residual branch"):
        check_inserted(model, "attention", [("layer1.0", "layer1.0.unused")])
