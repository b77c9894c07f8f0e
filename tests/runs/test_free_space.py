"""A run is refused before it trains where its disk cannot hold it, and by no more than it will
need.
"""

import shutil
from types import SimpleNamespace

import pytest
import torch

from support.plans import small_plan
from trainer.base.errors import UserError
from trainer.base.settings import make_settings
from trainer.data.dataset import open_data
from trainer.engine import train
from trainer.engine.state import TrainingState
from trainer.runs import free_space as room
from trainer.runs.checkpoint import save_checkpoint
from trainer.runs.free_space import check_free, check_room

MIB = 2**20
OPTIMIZERS = {
    "lamb": "",
    "adamw": "optimizer='{name: adamw, betas: [0.9, 0.999], eps: 1e-8, weight_decay: 0.05}'",
    "sgd": "optimizer='{name: sgd, momentum: 0.9, weight_decay: 1e-4}'",
    "plain": "optimizer='{name: sgd, momentum: 0.0, weight_decay: 1e-4}'",
}


@pytest.mark.parametrize(
    "average", ["", "average='{name: ema, decay: 0.9, every_steps: 1}'"], ids=["none", "ema"]
)
@pytest.mark.parametrize("name", OPTIMIZERS)
def test_the_estimate_is_what_a_checkpoint_takes(tmp_path, monkeypatch, name, average):
    plan = small_plan("A2", "test_resnet", f"{OPTIMIZERS[name]} {average}")
    settings = make_settings("cpu", workers="0")
    state = TrainingState(plan, settings)
    asked = []
    monkeypatch.setattr(room, "check_free", lambda *given: asked.append(given))
    check_room(state, tmp_path / "run")
    _, estimate, num_kept, _ = asked[0]
    train.optimizer_step(state, open_data(plan.profile, None).train_stream(plan, settings, 0), 0)
    size = save_checkpoint(tmp_path, 1, state.state_dict()).stat().st_size
    framing = (
        300 * len(state.model.state_dict()) * (4 if average else 3)
    )  # what torch's file has around each tensor
    assert estimate <= size <= estimate + framing and num_kept == 0


def test_a_disk_that_is_too_small_is_one_line_with_what_is_needed_and_what_is_there(
    tmp_path, monkeypatch
):
    monkeypatch.setattr(shutil, "disk_usage", lambda path: SimpleNamespace(free=39 * MIB))
    check_free(tmp_path / "run", 9 * MIB, 0, 12 * MIB)  # 3 * 9 + 12 = 39
    with pytest.raises(
        UserError,
        match=(
            r"will need 40 MiB there \(3 checkpoints of 9.0 MiB, the model, curves\), and 39 MiB"
            r" are free"
        ),
    ) as caught:
        check_free(tmp_path / "run", 9 * MIB, 0, 13 * MIB)
    assert "\n" not in str(caught.value) and "runs=" in str(caught.value)
    with pytest.raises(UserError, match="48 MiB.* 1 more of keep_every="):
        check_free(tmp_path / "run", 9 * MIB, 1, 12 * MIB)


def test_what_the_run_has_written_already_counts_as_free(tmp_path, monkeypatch):
    monkeypatch.setattr(shutil, "disk_usage", lambda path: SimpleNamespace(free=30 * MIB))
    (tmp_path / "checkpoints").mkdir()
    (tmp_path / "checkpoints" / "step_000000001.pt").write_bytes(bytes(9 * MIB))
    check_free(tmp_path, 9 * MIB, 0, 12 * MIB)
    with pytest.raises(UserError):
        check_free(tmp_path, 9 * MIB, 0, 13 * MIB)


def test_a_real_run_is_refused_before_its_first_step(tmp_path, monkeypatch):
    plan = small_plan("A2", "test_resnet")
    state = TrainingState(plan, make_settings("cpu", workers="0", keep_every=1))
    weights_mib = sum(weight.numel() for weight in state.model.parameters()) * 4 / MIB
    monkeypatch.setattr(
        shutil,
        "disk_usage",
        lambda path: SimpleNamespace(free=round((3 + 2) * 3 * weights_mib * MIB)),
    )
    with pytest.raises(
        UserError, match="2 more of keep_every="
    ):  # LAMB: weights and two moments, and the model is missing
        check_room(state, tmp_path / "run")
    check_room(
        SimpleNamespace(ranks=SimpleNamespace(is_first=False)), tmp_path
    )  # another rank has no folder to look at
    assert not (tmp_path / "run").exists()


def test_an_optimizer_is_counted_by_what_it_keeps():
    keeps = {
        name: room.moments_per_weight(small_plan("A2", overrides=text).recipe.optimizer)
        for name, text in OPTIMIZERS.items()
    }
    assert keeps == {
        "lamb": pytest.approx(2, abs=0.01),
        "adamw": pytest.approx(2, abs=0.01),
        "sgd": 1,
        "plain": 0,
    }
    assert torch.is_grad_enabled()
