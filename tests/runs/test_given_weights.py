"""A run that starts from given weights: killed and resumed to the same bits, and its parent named."""

import hashlib
import json
import signal

import pytest
import timm
import torch

from support import forked
from support.endings import ending


@pytest.fixture
def weights(tmp_path):
    path = tmp_path / "test_resnet.pth"
    torch.manual_seed(1)
    torch.save(timm.create_model("test_resnet", num_classes=7).state_dict(), path)
    return path


def test_killed_while_it_fine_tunes_it_ends_the_same(tmp_path, weights):
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    more = [f"--weights={weights}"]
    assert forked.end_of([*forked.words(whole), *more])[0] == 0
    for step in (5, 13):
        code, printed = forked.end_of([*forked.words(killed), *more], "step", step)
        assert code == -signal.SIGKILL, printed
    code, printed = forked.end_of([*forked.words(killed), *more])
    assert code == 0 and f"resumed after step 13 of {forked.NUM_STEPS}" in printed, printed
    assert ending(killed) == ending(whole)
    pretrained = ending(whole)["row"]["resolved_recipe"]["model"]["pretrained"]
    assert pretrained["sha256"] == hashlib.sha256(weights.read_bytes()).hexdigest()
    assert ending(whole)["row"]["parent"] is None


def test_a_run_trained_on_as_a_new_one_names_its_parent(tmp_path):
    first = forked.words(tmp_path)
    assert forked.end_of(first)[0] == 0
    (row,) = (json.loads(path.read_text()) for path in tmp_path.glob("results/rows/*.json"))
    code, printed = forked.end_of([*first, f"--weights={row['run']}", "--seed=1"])
    assert code == 0, printed
    rows = {path.stem: json.loads(path.read_text()) for path in tmp_path.glob("results/rows/*")}
    (child,) = (one for name, one in rows.items() if name != row["run"])
    assert (child["parent"], child["parent_sha256"]) == (row["run"], row["weights_sha256"])
    assert child["weights_sha256"] != row["weights_sha256"]
