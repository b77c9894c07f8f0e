"""What a run finds in its folder is this run's, or it is passed over: nothing of it ends in a
traceback or in a wrong row.
"""

import contextlib
import copy
import dataclasses
import hashlib
import json
import math
import os
import shutil
from pathlib import Path

import pytest
import torch
from timm.optim import list_optimizers

from support import forked
from support.endings import ending
from support.plans import small_plan
from trainer.base.component import registered, tag_of
from trainer.base.provenance import Program
from trainer.base.settings import make_settings
from trainer.components.optimizers import Optimizer, TimmOptimizer
from trainer.components.param_groups import param_groups
from trainer.components.timm_optimizer import class_of, numbers_of
from trainer.engine.state import Progress, TrainingState
from trainer.recipe.check import check
from trainer.runs.run import TrainingRun
from trainer.runs.saved_state import check_saved
from trainer.runs.summary import console
from trainer.runs.verify import verify

SMALL = "batch.images=96 batch.norm_images=48 average='{name: ema, decay: 0.9, every_steps: 2}'"


def state_of(recipe: str = "A1", more: str = SMALL) -> TrainingState:
    plan = small_plan(recipe, overrides=more)
    state = TrainingState(plan, make_settings("cpu", workers="0"))
    for weight in state.model.parameters():
        weight.grad = torch.ones_like(weight)
    state.optimizer.step()
    return state


@pytest.fixture(scope="module")
def state() -> TrainingState:
    return state_of()


@pytest.fixture
def saved(state, tmp_path) -> dict:
    """A checkpoint's content after one epoch and two steps."""
    steps = state.plan.steps_per_epoch
    progress = state.progress
    progress.step, progress.evaluated_step, progress.loss_steps = steps + 2, steps, 2
    scores = {"num_images": state.plan.profile.num_val, "loss_nats": 1.5}
    scores |= {"num_top1": 3, "num_top5": 9}
    progress.scores = {"model": scores, "average": dict(scores)}
    run = TrainingRun(tmp_path, state, console(), None)
    return copy.deepcopy(run.state_dict())


def with_value(saved: dict, path: str, value) -> dict:
    keys = [int(key) if key.isdigit() else key for key in path.split("/")]
    place = saved
    for key in keys[:-1]:
        place = place[key]
    place[keys[-1]] = value
    return saved


def test_a_runs_own_state_is_taken(saved, state):
    check_saved(saved, saved["progress"]["step"], state)


def test_one_of_an_earlier_version_is_taken(saved, state):
    for name in ("metrics_sha256", "curves_incomplete", "code"):
        del saved["progress"][name]
    check_saved(saved, saved["progress"]["step"], state)


@pytest.mark.parametrize(
    ("path", "value"),
    [
        ("progress", None),
        ("progress/step", True),
        ("progress/step", 10**9),
        ("progress/step", -1),
        ("progress/step", 3.0),
        ("progress/evaluated_step", 1),
        ("progress/evaluated_step", "14"),
        ("progress/loss_sum", math.nan),
        ("progress/loss_steps", 10**6),
        ("progress/train_s", math.nan),
        ("progress/train_s", -1.0),
        ("progress/num_seen", 2**70),
        ("progress/num_pieces", 0),
        ("progress/scores", {}),
        ("progress/scores", []),
        ("progress/scores/model", {"num_top1": 1}),
        ("progress/scores/model/num_top1", 10**6),
        ("progress/scores/model/num_top1", 10),  # of which 9 are among the first five
        ("progress/scores/model/num_top1", 1.5),
        ("progress/scores/model/num_top1", -1),
        ("progress/scores/model/num_top1", True),
        ("progress/scores/model/num_images", 7),
        ("progress/scores/model/loss_nats", math.inf),
        ("progress/scores/junk", {}),
        ("progress/changes", ["\x1b[2J"]),
        ("progress/changes", [3]),
        ("progress/changes", "device"),
        ("progress/injected", ["x" * 5000]),
        ("progress/metrics_bytes", -1),
        ("progress/metrics_sha256", "00"),
        ("progress/machine", {"device": "\x1b]0;title\x07"}),
        ("progress/machine", {"device": 3}),
        ("progress/code", {"digest": "0"}),
        ("model", None),
        ("model/fc.weight", torch.zeros(3, 3)),
        ("model/fc.bias", [0.0]),
        ("model/more", torch.zeros(1)),
        ("average", None),
        ("average/fc.bias", torch.zeros(10, dtype=torch.float64)),
        ("scaler", {"scale": math.nan}),
        ("scaler", 3),
        ("optimizer", {}),
        ("optimizer/param_groups", []),
        ("optimizer/param_groups/0/weight_decay", 0.5),
        ("optimizer/param_groups/0/params", [0]),
        ("optimizer/param_groups/0/lr", "0.1"),
        ("optimizer/state", []),
        ("optimizer/state/0", {}),
        ("optimizer/state/0/exp_avg", torch.zeros(2)),
        ("optimizer/state/0/exp_avg", 0.5),
        ("optimizer/state/9999", {}),
    ],
)
def test_what_is_none_of_this_run_is_refused_in_one_line(saved, state, path, value):
    step = saved["progress"]["step"]
    with pytest.raises(ValueError) as caught:
        check_saved(with_value(saved, path, value), step, state)
    line = str(caught.value)
    assert path.split("/")[0] in line and line.isprintable() and len(line) <= 300


def optimizers() -> list[Optimizer]:
    """Every component's example, and all of timm's that can be built here."""
    found = [check(kind, {"name": tag_of(kind), **kind.example}) for kind in registered(Optimizer)]
    for name in list_optimizers():
        with contextlib.suppress(ValueError):
            class_of(name)
            fields = numbers_of(name)
            found.append(TimmOptimizer(optimizer=name, fields=fields, weight_decay=0.1))
    return found


@pytest.mark.parametrize(
    "optimizer", optimizers(), ids=lambda one: getattr(one, "optimizer", one.name)
)
def test_every_optimizer_has_its_own_state_taken(state, optimizer):
    """After three steps: some change their groups' numbers as they go."""
    recipe = state.plan.recipe.model_copy(update={"optimizer": optimizer})
    model = torch.nn.Sequential(
        torch.nn.Conv2d(3, 4, 3), torch.nn.Flatten(), torch.nn.Linear(4, 2), torch.nn.BatchNorm1d(2)
    )
    model.temperature = torch.nn.Parameter(torch.ones(()))
    made = copy.copy(state)
    made.model, made.average = model, None
    made.plan = dataclasses.replace(state.plan, recipe=recipe)
    made.progress = Progress(step=3)
    made.optimizer = optimizer.build(param_groups(model, optimizer), lr=1e-3)
    for _ in range(3):
        for weight in model.parameters():
            weight.grad = torch.ones_like(weight)
        made.optimizer.step()
    saved = copy.deepcopy(made.state_dict())
    made.optimizer = optimizer.build(param_groups(model, optimizer), lr=2e-3)
    check_saved(saved, 3, made)


# ---- runs of the program


@pytest.fixture(scope="module")
def whole(tmp_path_factory) -> dict:
    folder = tmp_path_factory.mktemp("whole")
    assert forked.end_of(forked.words(folder))[0] == 0
    return ending(folder)


@pytest.fixture(scope="module")
def killed_run(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("killed")
    assert forked.end_of(forked.words(folder), "step", 15)[0] == -9
    return folder


@pytest.fixture
def killed(killed_run, tmp_path) -> Path:
    """A folder with a run that was killed in its second epoch, after a checkpoint of each step."""
    return Path(shutil.copytree(killed_run, tmp_path / "killed"))


def checkpoints(folder: Path) -> list[Path]:
    return sorted(folder.glob("runs/*/checkpoints/step_*.pt"))


def rewrite(path: Path, **progress) -> None:
    """Change a checkpoint's progress; its checksum is right."""
    saved = torch.load(path, weights_only=True)
    for name, value in progress.items():
        if value is None:
            saved["progress"].pop(name, None)
        else:
            saved["progress"][name] = value
    torch.save(saved, path)
    path.with_suffix(".sha256").write_text(hashlib.sha256(path.read_bytes()).hexdigest())


@pytest.mark.parametrize("damage", ["step", "scores", "folder", "pipe", "checksum", "giant"])
def test_the_checkpoint_before_is_used_and_the_end_is_the_same(killed, whole, damage):
    before, last = checkpoints(killed)
    if damage in ("step", "scores"):
        rewrite(last, **{damage: {"step": True, "scores": {"model": "\x1b[2J"}}[damage]})
    elif damage == "giant":
        os.truncate(last, 10**12)
    else:
        path = last.with_suffix(".sha256") if damage == "checksum" else last
        path.unlink()
        path.mkdir() if damage == "folder" else os.mkfifo(path)
    code, printed = forked.end_of(forked.words(killed), timeout_s=120)
    assert code == 0 and "Traceback" not in printed, printed
    assert f"checkpoint {last.name} is " in printed and "\x1b" not in printed
    assert f"resumed after step {int(before.stem[5:])} of" in printed
    assert ending(killed) == whole


def test_where_none_is_this_runs_it_is_refused_and_nothing_is_lost(killed):
    for path in checkpoints(killed):
        rewrite(path, scores={"junk": {}})
    code, printed = forked.end_of(forked.words(killed))
    assert code == 2 and "Traceback" not in printed, printed
    assert len(checkpoints(killed)) == 2 and not list(killed.glob("results/rows/*"))


@pytest.mark.parametrize("damage", ["lost", "cut", "zeros", "pipe"])
def test_lost_curves_end_no_run_and_its_row_says_so(killed, whole, damage):
    (path,) = killed.glob("runs/*/metrics.jsonl")
    content = path.read_bytes()
    path.unlink()
    if damage == "cut":
        path.write_bytes(content[:-20])
    elif damage == "zeros":
        path.write_bytes(b"\0" * len(content))
    elif damage == "pipe":
        os.mkfifo(path)
    code, printed = forked.end_of(forked.words(killed))
    if damage == "pipe":
        assert code == 2 and "metrics.jsonl" in printed and "Traceback" not in printed, printed
        return
    assert code == 0 and "curves are incomplete" in printed, printed
    found = ending(killed)
    scores = found["row"].pop("num_top1_by_epoch")  # of the lines that are left
    assert scores in ([], whole["row"]["num_top1_by_epoch"])
    rest = {key: one for key, one in whole["row"].items() if key != "num_top1_by_epoch"}
    assert found["row"] == rest | {"curves_incomplete": True}
    assert found["row"]["bitwise"] and found["metrics"] != whole["metrics"]
    assert set(found["metrics"].splitlines()) < set(whole["metrics"].splitlines())
    checks = list(verify(path.parent, killed / "results"))
    assert [check for check in checks if not check.is_good] == []


def test_a_checkpoint_of_an_earlier_version_is_resumed(killed, whole):
    for path in checkpoints(killed):
        rewrite(path, metrics_sha256=None, curves_incomplete=None, code=None)
    code, printed = forked.end_of(forked.words(killed))
    assert code == 0 and "resumed after step" in printed, printed
    assert ending(killed) == whole


def test_other_code_than_at_the_stop_is_a_change_of_the_run(killed, whole):
    code = {"digest": "0" * 64, "commit": "f" * 40, "dirty": True}
    for path in checkpoints(killed):
        rewrite(path, code=code)
    assert forked.end_of(forked.words(killed))[0] == 0
    row = ending(killed)["row"]
    (change,) = row["changes"]
    assert not row["bitwise"] and change.startswith(f"code {Program(**code)} -> ")
    assert row | {"changes": [], "bitwise": True} == whole["row"]


def test_a_checkpoint_says_which_code_wrote_it(killed):
    saved = torch.load(checkpoints(killed)[-1], weights_only=True)["progress"]
    (path,) = killed.glob("runs/*/metrics.jsonl")
    written = path.read_bytes()[: saved["metrics_bytes"]]
    assert saved["metrics_sha256"] == hashlib.sha256(written).hexdigest()
    assert len(saved["code"]["digest"]) == 64 and set(saved["code"]) == {
        "digest", "commit", "dirty",
    }  # fmt: skip
    assert all(json.loads(line) for line in written.splitlines())
