"""What a range test leaves in its folder, and that a trial which is there is not run again."""

import csv
import json
import math
from dataclasses import asdict, replace

import numpy as np
import pytest
from PIL import Image
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from support.found import found_of
from support.plans import small_plan
from support.range_trials import drawn, network
from trainer.lr_finder.output import lr_find_name, start_note, write_results
from trainer.lr_finder.plots import median_curve
from trainer.lr_finder.rules import Curve
from trainer.lr_finder.trial import TrialFolder, curve_from_json, curve_to_json

TRIAL = drawn(network(best=0.05), 0.02)


@pytest.fixture(scope="module")
def written(tmp_path_factory):
    found = found_of(TRIAL, folder=tmp_path_factory.mktemp("lr-find"))
    write_results(found)
    return found


def test_the_folder_holds_all_of_it(written):
    assert {path.name for path in written.folder.iterdir()} == {
        "curve.csv",
        "curve.png",
        "curve.svg",
        "suggestion.json",
        "tensorboard",
    }
    assert Image.open(written.folder / "curve.png").size[0] == 900


@pytest.mark.parametrize(("start", "is_said"), [(8.55, True), (1.7, False)])
def test_a_loss_that_starts_far_above_equal_odds_is_said_with_a_remedy(start, is_said):
    """As under a new classifier of large first weights."""
    found = replace(found_of(TRIAL), equal_odds_nats=math.log(5))
    curves = tuple(replace(one, start_loss=start) for one in found.suggestion.curves)
    found = replace(found, suggestion=replace(found.suggestion, curves=curves))
    note = start_note(found)
    assert ("model.head_init_scale=" in note and "8.55" in note) if is_said else note == ""
    assert start_note(replace(found, equal_odds_nats=None)) == ""


def test_the_table_holds_every_step_of_every_trial_to_the_last_digit(written):
    with open(written.folder / "curve.csv") as file:
        lines = list(csv.DictReader(file))
    for number, curve in enumerate(written.suggestion.curves):
        own = [line for line in lines if line["trial"] == str(number)]
        assert [float(line["value"]) for line in own] == curve.values.tolist()
        assert [float(line["loss_nats"]) for line in own] == curve.losses.tolist()
        assert {line["purpose"] for line in own} == {curve.purpose}
        measured = {
            int(line["step"]): float(line["held_out_nats"]) for line in own if line["held_out_nats"]
        }
        assert measured == dict(zip(*(part.tolist() for part in curve.held_out), strict=True))


def test_the_suggestion_is_json_with_what_it_holds_for_and_how_to_use_it(written):
    facts = json.loads((written.folder / "suggestion.json").read_text())
    suggestion = written.suggestion
    assert facts["value"] == suggestion.value and facts["reason"] == suggestion.reason
    assert facts["interval"] == asdict(suggestion.interval)
    assert [one["mean"] for one in facts["candidates"]] == [
        one.mean for one in suggestion.candidates
    ]
    assert facts["command"] == written.command and "set=" in facts["command"]
    assert (facts["scalar"], facts["batch_images"], facts["model"], facts["recipe"]) == (
        "lr.peak",
        32,
        "test_resnet",
        "A1.v2",
    )
    assert facts["rules"]["steepest"]["median"] == suggestion.rules["steepest"].median
    assert [one["value"] for one in facts["candidates"]] == [
        one.value for one in suggestion.candidates
    ]
    assert [one["counted_as"] for one in facts["candidates"]] == [
        one.counted for one in suggestion.candidates
    ]
    assert facts["level"] == {"nats": suggestion.level_nats, "name": suggestion.level_name}
    assert "NaN" not in json.dumps(facts) and "Infinity" not in json.dumps(facts)


def test_tensorboard_has_the_curves_and_the_picture_once_even_where_it_is_written_again(written):
    write_results(written)
    board = EventAccumulator(str(written.folder / "tensorboard"))
    board.Reload()
    ramp = written.suggestion.curves[0]
    points = [event.value for event in board.Scalars("ramp_00_s0/loss_nats")]
    assert points == pytest.approx(ramp.losses, rel=1e-6)
    assert len(board.Images("view/curve")) == 1


def test_a_trial_reads_back_bit_for_bit_and_only_for_the_same_values(tmp_path):
    values = np.geomspace(1e-6, 10, 7)
    curve = Curve(
        values[:3],
        np.array([0.1 + 0.2, 1 / 3, 1e300]),
        (np.array([2]), np.array([2 / 3])),
        0.7,
        "diverged",
        4,
        "probe",
    )
    for kept in (TrialFolder(tmp_path / "trials"), TrialFolder(None)):
        assert kept.read(4, values, "probe") is None
        kept.write(curve_to_json(curve), values)
        found = curve_from_json(kept.read(4, values, "probe"))
        assert curve_to_json(found) == curve_to_json(curve) and found.held_out[0].dtype == np.int64
        assert (
            kept.read(5, values, "probe")
            is kept.read(4, values, "race")
            is kept.read(4, values * 1.0000001, "probe")
            is None
        )
    assert json.loads(next((tmp_path / "trials").iterdir()).read_text())["ended"] == "diverged"


def test_a_trial_without_a_single_step_can_be_kept():
    empty = Curve(
        np.array([]),
        np.array([]),
        (np.array([], dtype=int), np.array([])),
        0.7,
        "not a number",
        0,
        "ramp",
    )
    kept = TrialFolder(None)
    kept.write(curve_to_json(empty), np.array([1.0]))
    assert len(curve_from_json(kept.read(0, np.array([1.0]), "ramp")).losses) == 0


def test_the_name_tells_what_was_asked_and_changes_with_it():
    plan, asked = small_plan(), {"from": 1e-6}
    name = lr_find_name(plan, "f" * 64, asked)
    assert (
        name.startswith("lr-find-A2.v2-test_resnet-digits-") and len(name.rpartition("-")[2]) == 6
    )
    assert name == lr_find_name(plan, "f" * 64, asked)
    others = (
        lr_find_name(plan, "f" * 64, {"from": 1e-5}),
        lr_find_name(plan, "e" * 64, asked),
        lr_find_name(small_plan(overrides="drop_path=0.5"), "f" * 64, asked),
    )
    assert len({name, *others}) == 4


def test_the_median_is_of_the_seeds_that_came_so_far():
    values = np.arange(1.0, 21.0)

    def ramp(level, length, seed):
        return Curve(
            values[:length],
            np.full(length, level),
            (np.array([], dtype=int), np.array([])),
            None,
            "ramp",
            seed,
            "ramp",
        )

    reached, losses = median_curve([ramp(1.0, 20, 0), ramp(2.0, 20, 1), ramp(9.0, 12, 2)], "train")
    assert reached.tolist() == values.tolist()
    assert losses[:12] == pytest.approx(2.0) and losses[12:] == pytest.approx(1.5)
    assert len(median_curve([ramp(1.0, 20, 0), ramp(9.0, 8, 1), ramp(9.0, 8, 2)], "train")[0]) == 8
