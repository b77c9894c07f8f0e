"""`rsb drill`: every fault has a promise, and a broken promise is exit 1."""

import json
from pathlib import Path

import pytest
import torch
from rich.console import Console
from safetensors.torch import save_file
from typer.testing import CliRunner

from trainer.base.errors import UserError
from trainer.cli.main import app
from trainer.cli.tool_commands import drill_table
from trainer.runs.job import Job, plan_of
from trainer.tools import drill
from trainer.tools.drill import DRILLS, Drill, chosen_drills, distance, run_drills
from trainer.tools.faults import KINDS, check_faults, parse_faults


def test_every_kind_of_fault_is_tested_within_its_run():
    plans = {
        norm: plan_of(Job("A1", "test_resnet", overrides=overrides))
        for norm, overrides in drill._SETS.items()
    }
    assert [plan.num_steps for plan in plans.values()] == [11, 11]
    for one in DRILLS:
        check_faults(parse_faults(one.fault), plans[one.norm])
    assert {one.fault.partition("@")[0] for one in DRILLS} == set(KINDS)


def test_drills_are_chosen_by_kind():
    assert chosen_drills("") == DRILLS
    assert {one.fault for one in chosen_drills("kill, term")} == {
        "kill@7",
        "kill@1,kill@10,kill@11",
        "term@6",
    }
    with pytest.raises(UserError, match=r"only=kil: .*did you mean kill"):
        chosen_drills("kil")


def test_the_distance_of_weights_is_relative_to_their_norm(tmp_path):
    one, other = (
        {"a": torch.ones(4), "b": torch.ones(9)},
        {"a": torch.ones(4), "b": torch.ones(9) + torch.eye(9)[0] * 0.3},
    )
    for name, weights in (("one", one), ("other", other)):
        save_file(weights, tmp_path / name)
    assert distance(tmp_path / "one", tmp_path / "other") == pytest.approx(0.1)


def faked(monkeypatch, **otherwise):
    """Commands that end at once; otherwise: how the output of the one under a fault differs from
    an undisturbed one's.
    """

    def calling(words, output):
        output.write_text("said this")
        folder, results = (Path(words[words.index(name) + 1]) for name in ("--runs", "--results"))
        given = otherwise if "--inject" in words else {}
        run = folder / "run"
        run.mkdir(parents=True, exist_ok=True)
        (run / "plan.json").touch()
        row = {
            "weights_sha256": "a" * 64,
            "top1_pct": 50.0,
            "train_s": 3.0,
            "deviations": [],
        } | given.get("row", {})
        (run / "row.json").write_text(json.dumps(row))
        (run / "metrics.jsonl").write_text(given.get("metrics", "{}"))
        save_file({"a": torch.ones(4) + given.get("off", 0.0)}, run / "model.safetensors")
        rows = results / "rows"
        rows.mkdir(parents=True, exist_ok=True)
        if given.get("stored", True):
            (rows / "run.json").touch()
        codes = given.get("codes", [0])
        return codes.pop(0) if len(codes) > 1 else codes[0]

    monkeypatch.setattr(drill, "call", calling)


SAME = Drill("slow@3:2s", "the same row", (0,))
OTHER = Drill("bad_image@3", "another result", (0,), "other", is_stored=False)
CLOSE = Drill("oom@3", "close", (0,), "close", is_stored=False)


@pytest.mark.parametrize(
    ("one", "otherwise", "failures"),
    [
        (SAME, {}, ()),
        (SAME, {"row": {"train_s": 9.0, "injected": ["slow@3:2s"]}}, ()),
        (SAME, {"row": {"weights_sha256": "b" * 64}}, ("the row differs in weights_sha256",)),
        (SAME, {"metrics": "{}{}"}, ("metrics.jsonl differs",)),
        (SAME, {"stored": False}, ("the row was not stored",)),
        (
            SAME,
            {"row": {"deviations": [{"path": "epochs"}]}},
            ("the row differs in deviations", "deviations: epochs"),
        ),
        (SAME, {"codes": [2]}, ("exit 0 expected",)),
        (OTHER, {"stored": False, "row": {"weights_sha256": "b" * 64}}, ()),
        (
            OTHER,
            {"stored": False},
            ("the weights equal the undisturbed run's: the fault had no effect",),
        ),
        (CLOSE, {"stored": False, "off": 1e-6}, ()),
        (CLOSE, {"stored": False, "off": 1e-3}, ("the weights differ by more than 1e-05",)),
        (
            CLOSE,
            {"stored": False, "off": float("nan")},
            ("the weights differ by more than 1e-05",),
        ),
    ],
)
def test_a_broken_promise_is_named(monkeypatch, one, otherwise, failures):
    faked(monkeypatch, **otherwise)
    (result,) = run_drills((one,), 1)
    assert result.failures == failures
    out = Console(width=200, record=True)
    out.print(drill_table([result]))
    text = out.export_text()
    assert f"inject={one.fault}" in text and ("no" if failures else "yes") in text.split()


def test_the_command_ends_with_1_where_a_promise_is_broken(monkeypatch):
    faked(monkeypatch)
    monkeypatch.setattr(drill, "DRILLS", (SAME,))
    assert CliRunner().invoke(app, ["drill", "--jobs", "1"]).exit_code == 0
    faked(monkeypatch, stored=False)
    done = CliRunner().invoke(app, ["drill", "--jobs", "1"])
    assert done.exit_code == 1
    assert "the row was not stored" in done.output and "said this" in done.output


def test_the_same_command_is_called_until_it_ends_as_expected(monkeypatch):
    codes = [-9, 0]
    faked(monkeypatch, codes=codes)
    (result,) = run_drills((Drill("kill@3", "the same row", (-9, 0)),), 1)
    assert result.failures == ()
    assert result.observed.startswith("exit -9, 0; weights aaaaaaaa, identical")
