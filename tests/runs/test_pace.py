"""What a row says of its steps' times: medians, so that what ran beside a run does not move them."""

import json

import pytest

from trainer.runs.job import Job, plan_of
from trainer.runs.pace import pace_of


def written(folder, speeds, loads=None):
    """speed.jsonl of windows of ten steps: images per second of each."""
    path = folder / "speed.jsonl"
    lines = [
        {"step": 10 * (place + 1), "images_per_s": speed, "wait_share": 0.0}
        | ({"load_per_core": loads[place]} if loads else {})
        for place, speed in enumerate(speeds)
    ]
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return path


PLAN = plan_of(Job("A3", "resnet18", "digits"))  # 32 images a step


def test_a_neighbour_of_a_while_moves_the_mean_and_not_the_median(tmp_path):
    speeds = [64.0] * 9 + [2.0] * 3  # three windows at a thirtieth of the speed
    pace = pace_of(written(tmp_path, speeds, [0.5] * 9 + [3.0] * 3), PLAN)
    assert pace["step_s"] == 0.5 and pace["load_per_core"] == pytest.approx(1.12, abs=0.01)
    assert pace["step_spread_share"] > 5


def test_even_steps_have_no_spread(tmp_path):
    assert pace_of(written(tmp_path, [64.0] * 5), PLAN) == {"step_s": 0.5, "step_spread_share": 0.0}


def test_images_that_grow_are_no_spread_and_every_size_counts(tmp_path):
    growth = (
        "image.growth={from_px: 16, from_epoch: 2, to_epoch: 6, multiple_px: 8, updated: per_epoch}"
    )
    plan = plan_of(Job("A3", "resnet18", "digits", overrides=growth))
    sizes = [plan.train_px_at(10 * place + 9) for place in range(30)]
    assert len(set(sizes)) > 1
    speeds = [1e4 / px for px in sizes]  # a step of 32 images: 0.0032 s a px
    pace = pace_of(written(tmp_path, speeds), plan)
    assert pace["step_spread_share"] == pytest.approx(0, abs=1e-3)
    assert pace["step_s"] == pytest.approx(0.0032 * sum(sizes) / len(sizes), rel=1e-3)


@pytest.mark.parametrize("text", [None, "", "{", "[]\n1\n", '{"step": 3, "images_per_s": 0.0}\n'])
def test_a_log_that_is_lost_or_broken_says_nothing(tmp_path, text):
    path = tmp_path / "speed.jsonl"
    if text is not None:
        path.write_text(text)
    assert pace_of(path, PLAN) == {}
    path.unlink(missing_ok=True)
    path.mkdir()
    assert pace_of(path, PLAN) == {}
