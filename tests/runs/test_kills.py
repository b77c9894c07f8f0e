"""kill -9 at random moments, and a second process in the middle: the run ends as the undisturbed
one does, bit for bit.
"""

import functools
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from support import forked, ranked
from support.endings import ending, is_stopped
from support.forked import NUM_STEPS, words
from support.killed import MOMENTS, STARTS, strike_at_start

pytestmark = pytest.mark.drill  # minutes of processes that are killed: `make drill`
ROOT = Path(__file__).parents[2]
LATE = ("export", "row", "store")


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory) -> dict:
    folder = tmp_path_factory.mktemp("undisturbed")
    code, printed = forked.end_of(words(folder))
    assert code == 0, printed
    return ending(folder)


def random_moments(seed: int) -> list[tuple[str, int]]:
    """20 moments over the whole of a run, each kind at least once, in the order in which they come,
    so that each does.
    """
    draw = random.Random(seed)
    names = [name for name in MOMENTS if name not in LATE]
    names += draw.choices(names, k=20 - len(LATE) - len(names))
    found = []
    for name in names:
        place = draw.randrange(NUM_STEPS - 1)
        if name in ("evaluate", "batch", "line"):  # these come at the end of each half alone
            place = 10 if place <= 10 else 21
        found.append((name, place))
    return sorted(found, key=lambda moment: moment[1]) + [(name, -1) for name in LATE]


@pytest.mark.parametrize(("checkpoint_s", "seed"), [(0, 1), (0.01, 2)], ids=["waiting", "beside"])
def test_killed_at_twenty_random_moments_it_ends_the_same(
    undisturbed, tmp_path, checkpoint_s, seed
):
    moments = random_moments(seed)
    for number, (moment, step) in enumerate(moments):
        code, printed = forked.end_of(
            words(tmp_path, checkpoint_s, workers=number % 3), moment, step
        )
        assert code == -signal.SIGKILL, (moments[: number + 1], code, printed)
    code, printed = forked.end_of(words(tmp_path, checkpoint_s))
    assert code == 0, (moments, printed)
    assert ending(tmp_path) == undisturbed, moments


@pytest.mark.parametrize("place", STARTS)
def test_killed_as_it_starts_and_as_it_starts_again_it_ends_the_same(undisturbed, tmp_path, place):
    kill = functools.partial(strike_at_start, place)
    assert forked.end_of(words(tmp_path), prepare=kill)[0] == -signal.SIGKILL
    code, printed = forked.end_of(words(tmp_path), "step", 13)  # begins on what that left
    assert code == -signal.SIGKILL and "going on" not in printed, printed
    assert place == "picture" or forked.end_of(words(tmp_path), prepare=kill)[0] == -signal.SIGKILL
    code, printed = forked.end_of(words(tmp_path))
    assert code == 0 and "resumed after step 13" in printed, printed
    assert ending(tmp_path) == undisturbed


def test_the_command_itself_killed_at_any_time_ends_the_same(undisturbed, tmp_path):
    """From the start of Python on: imports, data, model, training."""
    draw = random.Random(3)
    command = [sys.executable, "-m", "trainer", *words(tmp_path)]
    for _ in range(5):
        with subprocess.Popen(
            command, cwd=ROOT, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
        ) as process:
            try:
                process.wait(draw.uniform(0, 8))
            except subprocess.TimeoutExpired:
                process.kill()
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=200)
    assert done.returncode == 0, done.stderr
    assert ending(tmp_path) == undisturbed


def test_one_of_two_ranks_killed_at_random_moments_ends_the_same(tmp_path):
    """In a step either of them, while it writes the first, which alone writes; in the evaluation
    the second.
    """
    flags = (
        "batch.images=128 batch.norm_images=32 epochs=1 average='{name: ema, decay: 0.9,"
        " every_steps: 2}'"
    )
    undisturbed, folder = tmp_path / "undisturbed", tmp_path / "killed"
    expected = ranked.end_of(ranked.whole_run, 2, str(undisturbed), flags, timeout_s=400)[0].value
    draw = random.Random(4)
    steps = sorted(draw.sample(range(10), 5))
    ranks = (draw.randrange(2), 0, draw.randrange(2), 0, draw.randrange(2), 1)
    for rank, moment, step in zip(
        ranks, ("step", "write", "update", "rename", "step", "evaluate"), (*steps, 10), strict=True
    ):
        ended = ranked.end_of(
            ranked.killed_run, 2, str(folder), flags, rank, moment, step, timeout_s=400
        )
        assert -signal.SIGKILL in [rank.code for rank in ended] and all(
            rank.code for rank in ended
        ), ended
    found = ranked.end_of(ranked.whole_run, 2, str(folder), flags, timeout_s=400)[0].value
    assert "resumed after step" in found["said"]
    for name, tensor in expected["weights"].items():
        assert tensor.equal(found["weights"][name]), name
    assert found["scores"] == expected["scores"]
    assert (folder / "metrics.jsonl").read_bytes() == (undisturbed / "metrics.jsonl").read_bytes()


def pause() -> None:
    os.kill(os.getpid(), signal.SIGSTOP)


def test_a_second_process_refuses_and_says_who_works_there(undisturbed, tmp_path):
    with forked.started(words(tmp_path), "step", 5, pause) as first:
        until_s = time.monotonic() + 60
        while time.monotonic() < until_s and not is_stopped(first.pid):
            time.sleep(0.05)
        code, printed = forked.end_of(words(tmp_path))
        assert code == 2, printed
        last = printed.splitlines()[-1]
        assert (
            last.startswith("error: ")
            and f"process {first.pid} on {os.uname().nodename}, since 20" in last
        )
    code, printed = forked.end_of(words(tmp_path))  # the first was killed: its claim is stale
    assert code == 0 and "resumed after step 5" in printed
    assert ending(tmp_path) == undisturbed


@pytest.mark.parametrize("how", ["cut", "flip"])
def test_a_checkpoint_damaged_at_random_places_is_found_and_the_one_before_it_used(
    undisturbed, tmp_path, how
):
    """What the whole run comes to; test_checkpoint tries more places."""
    code, _ = forked.end_of(words(tmp_path / "made"), "step", 10)
    assert code == -signal.SIGKILL
    draw = random.Random(5)
    for number in range(2):
        folder = tmp_path / str(number)
        shutil.copytree(tmp_path / "made", folder)
        (last,) = [path for path in (folder / "runs").glob("*/checkpoints/step_000000010.pt")]
        content = bytearray(last.read_bytes())
        place = draw.randrange(len(content))
        if how == "cut":
            del content[place:]
        else:
            content[place] ^= 1 << draw.randrange(8)
        last.write_bytes(content)
        code, printed = forked.end_of(words(folder))
        assert (
            code == 0
            and "step_000000010.pt is damaged" in printed
            and "resumed after step 9" in printed
        ), (place, printed)
        assert ending(folder) == undisturbed
