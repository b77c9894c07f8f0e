"""`bench`: turns, medians, the bottleneck, and the whole command on a small run."""

import json
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from PIL import Image
from typer.testing import CliRunner

from support.packing import write_tar
from support.plans import small_plan
from trainer.base.errors import DataError
from trainer.base.settings import make_settings
from trainer.cli.main import app
from trainer.data.dataset import open_data
from trainer.data.profile import find_profile
from trainer.tools.bench import (
    Rate,
    _decoding,
    _on_one_thread,
    bottleneck_of,
    image_folder,
    in_turns,
    measure,
    photo_files,
    photos,
    ratios,
    seconds_a_step,
)


def test_parts_take_turns_and_are_timed_by_the_clock_given():
    calls, now = [], [0.0]

    def part(name, seconds, num_images):
        def run(number):
            calls.append((name, number))
            now[0] += seconds * (1 + max(number, 0))
            return num_images

        return run

    rates = in_turns({"a": part("a", 1, 10), "b": part("b", 4, 20)}, 3, lambda: now[0])
    assert calls == [(name, number) for number in (-1, 0, 1, 2) for name in "ab"]
    assert rates["a"].seconds == (1, 2, 3) and rates["b"].seconds == (4, 8, 12)
    assert (
        rates["a"].images_per_s == 5
        and rates["a"].image_ms == 200
        and rates["b"].images_per_s == 2.5
    )
    assert rates["a"].quartiles == (10 / 2.5, 10 / 1.5)
    assert ratios(rates["a"], rates["b"]) == [2, 2, 2]


def test_no_round_begins_when_the_time_is_over_and_one_is_there_at_least():
    now = [0.0]

    def part(number):
        now[0] += 2
        return 1

    assert (
        len(in_turns({"a": part}, 9, lambda: now[0], bound_s=7)["a"].seconds) == 3
    )  # and one that warms up
    assert len(in_turns({"a": part}, 9, lambda: now[0], bound_s=-1)["a"].seconds) == 1


@pytest.mark.parametrize(
    ("bound_s", "num_first", "num_counted"),
    [(1000.0, 5, 8), (40.0, 5, 8), (16.0, 5, 2), (6.0, 2, 1), (0.0, 1, 1)],
)
def test_a_turn_has_as_many_steps_as_its_time_allows(bound_s, num_first, num_counted):
    now, taken, marks = [0.0], [], []

    def step():
        now[0] += 2 if taken else 3  # the first one starts processes
        taken.append(now[0])

    found = seconds_a_step(step, 5, 8, bound_s, lambda: now[0], lambda: marks.append(len(taken)))
    assert (found, marks, len(taken)) == (2.0, [num_first], num_first + num_counted)


def rates(decode, augment, step, whole):
    """Images/s of each."""
    return {
        name: Rate((1 / rate,) * 3, 1)
        for name, rate in {
            "decode": decode,
            "augment": augment,
            "step": step,
            "end to end": whole,
        }.items()
    }


@pytest.mark.parametrize(
    ("found", "workers", "text"),
    [
        (
            (500, 1000, 900, 890),
            4,
            "compute-bound: 890 of 900 images/s (99 %); workers=4 could deliver 1,333",
        ),
        (
            (500, 1000, 5400, 3100),
            9,
            "data-bound: 3,100 of 5,400 images/s; decoding 67 % of a worker's time; try workers=18",
        ),
        ((500, 1000, 9999, 3100), 9, "it needs 33 workers, and this machine has 24 cores"),
        ((500, 1000, 900, 700), 4, "neither data-bound nor compute-bound"),
        ((500, 1000, 900, 240), 0, "no workers: 240 of 900 images/s (27 %)"),
    ],
)
def test_the_verdict_says_what_holds_the_run_up(found, workers, text):
    made = bottleneck_of(
        rates(*found), make_settings("cpu", workers=str(workers)), available_cores=24
    )
    assert text in made.text
    assert made.data == pytest.approx(
        max(1, workers) * 1000 / 3
    )  # a worker needs 2 ms + 1 ms for an image


def test_photos_are_jpegs_of_one_size_and_a_folder_of_links_is_a_data_set(tmp_path):
    files = photos(tmp_path / "photos", 5)
    assert {Image.open(path).format for path in files} == {"JPEG"} and {
        Image.open(path).size for path in files
    } == {(500, 375)}
    assert len({path.read_bytes() for path in files}) == 5
    profile = find_profile(str(image_folder(tmp_path / "data", files, 12, 4)))
    assert (profile.num_train, profile.num_val, profile.num_classes) == (12, 4, 2)


def test_a_tar_of_jpegs_is_as_good_as_a_folder_of_them_and_its_names_open_no_file(tmp_path):
    made = photos(tmp_path / "photos", 3)
    tar = write_tar(
        tmp_path / "photos.tar",
        {"b/2.JPEG": made[1].read_bytes(), "a/1.jpg": made[0].read_bytes(), "a/list.txt": b"1"},
    )
    found = photo_files(tar, tmp_path / "out")
    assert [path.read_bytes() for path in found] == [made[1].read_bytes(), made[0].read_bytes()]
    assert found == sorted((tmp_path / "out").iterdir())
    assert (
        photo_files(tmp_path / "photos", tmp_path / "unused") == made
        and not (tmp_path / "unused").exists()
    )
    tar.write_bytes(tar.read_bytes()[:-9000])
    with pytest.raises(DataError, match="damaged"):
        photo_files(tar, tmp_path / "again")
    assert len(photo_files(None, tmp_path / "drawn", 2)) == 2


@pytest.mark.parametrize("name", ["empty", "no.tar", "nowhere"])
def test_a_src_without_jpegs_is_one_line(tmp_path, name):
    (tmp_path / "empty").mkdir()
    write_tar(tmp_path / "no.tar", {"a.txt": b"1"})
    done = CliRunner().invoke(app, ["bench", "--device", "cpu", "--src", str(tmp_path / name)])
    assert done.exit_code == 2 and "a folder or a tar of JPEG files" in done.output


def test_the_command_measures_a_small_run_and_stores_what_it_says(tmp_path):
    words = [
        "bench",
        "--data",
        "digits",
        "--model",
        "test_resnet",
        "--recipe",
        "A3",
        "--device",
        "cpu",
        "--workers",
        "1",
        "--rounds",
        "2",
    ]
    done = CliRunner().invoke(
        app, [*words, "--set", "batch.images=32 batch.norm_images=16", "--results", str(tmp_path)]
    )
    assert done.exit_code == 0, done.output
    facts = json.loads((tmp_path / "bench" / "run-cpu.json").read_text())
    assert set(facts["parts"]) == {
        "decode",
        "augment",
        "model",
        "optimizer",
        "step",
        "evaluation",
        "end to end",
    }
    assert all(
        part["low_images_per_s"] <= part["images_per_s"] <= part["high_images_per_s"]
        for part in facts["parts"].values()
    )
    assert (
        facts["verdict"].split(":")[0] in " ".join(done.output.split())
        and facts["recipe"] == "A3.v2"
    )


def test_what_is_measured_runs_as_a_run_does(monkeypatch):
    made_fast, plan = [], small_plan("A3")
    monkeypatch.setattr("trainer.tools.bench.set_algorithms", made_fast.append)
    settings = make_settings("cpu", workers="0")
    rates = measure(plan, settings, open_data(plan.profile, None), 2, 1)
    assert made_fast == [settings] and rates["end to end"].num_images == 32


@pytest.mark.parametrize("fails", [False, True])
def test_a_workers_part_has_one_thread_and_gives_the_others_back(fails):
    seen = []

    def part(number):
        seen.append((number, torch.get_num_threads()))
        assert not fails
        return 7

    torch.set_num_threads(2)
    try:
        assert _on_one_thread(part)(3) == 7
    except AssertionError:
        assert fails
    finally:
        after = torch.get_num_threads()
        torch.set_num_threads(1)
    assert (seen, after) == ([(3, 1)], 2)


def test_ffcv_decodes_within_its_own_turns():
    """Its thread is begun and ended by each call, over the same whole steps; the stream knows what
    it has checked.
    """
    plan, asked = small_plan("A3"), []

    def batches(*given):
        asked.append(given)
        yield from [SimpleNamespace(labels=range(8))] * 4
        asked.append("ended")

    data = SimpleNamespace(stream=lambda *_: SimpleNamespace(batches=batches))
    decode = _decoding(plan, replace(make_settings("cpu", workers="1"), loader="ffcv"), data)
    assert decode(0) == decode(1) == 32 and asked == [(0, 16, 1, "cpu"), "ended"] * 2


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is one")
def test_a_gpu_that_is_not_there_is_one_line():
    done = CliRunner().invoke(app, ["bench", "--gpu", "1"])
    assert done.exit_code == 2 and "device=cuda" in done.output
