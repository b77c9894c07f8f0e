"""Ranks that share a sample of statistics make the run of one process that has all of it."""

import pytest

from support import ranked
from support.pieced import relative
from support.ranked import on_ranks

# smooth, as in test_communicator.py; stochastic depth, mixing, repeats, LAMB, an average
SMOOTH = "stem: {name: patchify, patch_px: 4}, activation: {name: silu}"
SHARED = (
    "lr.peak=5e-4 batch.images=16 batch.norm_images=8 batch.drop_last=false"
    " average='{name: ema, decay: 0.9, every_steps: 1}'"
)
BCN = "norm: {name: batch_channel_norm, groups: 4, eps: 1e-5, momentum: 0.1, statistics: %s}"


def test_two_groups_of_two_ranks_make_the_weights_of_one_process():
    words = ("A1", "test_resnet", f"'model={{{SMOOTH}}}' {SHARED}", -6, 8)
    whole = on_ranks(ranked.steps, 1, *words)[0]
    assert {len(ids) for _, _, ids in whole["ids"]} == {6, 7, 8}
    for rank in on_ranks(ranked.steps, 4, *words):
        assert rank["losses"] == pytest.approx(whole["losses"], rel=1e-5)
        assert relative(rank["weights"], whole["weights"]) < 1e-5
        assert relative(rank["average"], whole["average"]) < 1e-5
        assert relative(rank["buffers"], whole["buffers"]) < 1e-5
