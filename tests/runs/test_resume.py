"""A run that is killed or stopped, at whatever moment, ends as the undisturbed run does: bit for
bit.
"""

import functools
import json
import os
import random
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from support import forked
from support.endings import ending
from support.killed import strike_at_start
from support.plans import small_set

HERE = Path(__file__).parents[1]
# mixing, accumulation (4 micro-batches), repeats, an average and stochastic depth, all at once
FLAGS = [
    "train", "--recipe", "A1", "--model", "test_resnet", "--device", "cpu", "--checkpoint-s", "0",
    "--workers", "0", "--set",
    small_set("batch.images=128 batch.norm_images=32 average='{name: ema, decay: 0.9, every_steps: 2}'"),
]  # fmt: skip
NUM_STEPS = 22  # 2 epochs of 1437 // 128


def rsb(folder: Path, *words: str, **named) -> subprocess.CompletedProcess:
    command = [
        sys.executable,
        *words,
        *FLAGS,
        "--runs",
        str(folder / "runs"),
        "--results",
        str(folder / "results"),
    ]
    return subprocess.run(command, capture_output=True, text=True, timeout=300, **named)


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory) -> dict:
    folder = tmp_path_factory.mktemp("undisturbed")
    done = rsb(folder, "-m", "trainer")
    assert done.returncode == 0, done.stderr
    return ending(folder)


@pytest.mark.drill
def test_the_undisturbed_run_is_whole(undisturbed):
    lines = [json.loads(line) for line in undisturbed["metrics"].splitlines()]
    assert [line["step"] for line in lines if "loss_nats" in line] == [10, 11, 20, 22]
    assert [(line["step"], line["weights"]) for line in lines if "top1_pct" in line] == [
        (11, "model"), (11, "average"), (22, "model"), (22, "average"),
    ]  # fmt: skip
    assert (
        undisturbed["row"]["status"] == "finished"
        and len(undisturbed["row"]["weights_sha256"]) == 64
    )


def test_killed_as_it_starts_at_five_random_steps_and_as_it_goes_on_it_ends_the_same(tmp_path):
    """In processes forked from one that has imported all there is to import; the drills start the
    program itself.
    """
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    assert (
        forked.end_of(forked.words(whole, checkpoint_s=3600))[0] == 0
    )  # how often it is saved changes nothing either
    assert (
        forked.end_of(forked.words(killed), prepare=functools.partial(strike_at_start, "facts"))[0]
        == -signal.SIGKILL
    )
    steps = sorted(random.Random(2110_00476).sample(range(forked.NUM_STEPS), 5))
    for step in steps:
        code, printed = forked.end_of(forked.words(killed), "step", step)
        assert code == -signal.SIGKILL, (steps, printed)
    assert (
        forked.end_of(forked.words(killed), prepare=functools.partial(strike_at_start, "cut"))[0]
        == -signal.SIGKILL
    )
    code, printed = forked.end_of(forked.words(killed))
    assert code == 0 and f"resumed after step {steps[-1]} of {forked.NUM_STEPS}" in printed, (
        steps,
        printed,
    )
    assert ending(killed) == ending(whole), steps


@pytest.mark.drill
def test_the_program_itself_killed_at_two_random_steps_ends_the_same(undisturbed, tmp_path):
    steps = sorted(random.Random(2110_00476).sample(range(NUM_STEPS), 2))
    for step in steps:
        killed = rsb(tmp_path, str(HERE / "support" / "killed.py"), "step", str(step))
        assert killed.returncode == -signal.SIGKILL, (steps, killed.stderr)
    done = rsb(tmp_path, "-m", "trainer")
    assert done.returncode == 0, (steps, done.stderr)
    assert f"resumed after step {steps[-1]} of {NUM_STEPS}" in done.stdout or steps[-1] == 0
    assert ending(tmp_path) == undisturbed, steps


@pytest.mark.drill
def test_killed_while_saving_evaluating_exporting_and_storing_it_ends_the_same(tmp_path):
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    assert forked.end_of(forked.words(whole))[0] == 0
    for moment, step in (
        ("rename", 3),
        ("evaluate", 10),
        ("rename", 21),
        ("export", -1),
        ("row", -1),
        ("store", -1),
    ):
        code, printed = forked.end_of(forked.words(killed), moment, step)
        assert code == -signal.SIGKILL, (moment, printed)
    assert forked.end_of(forked.words(killed))[0] == 0
    assert ending(killed) == ending(whole) and not list(killed.rglob(".*.part"))


@pytest.mark.drill
def test_a_signal_to_the_program_itself_saves_and_exits_75_and_the_same_command_goes_on(
    undisturbed, tmp_path
):
    """Slurm's; test_signals.py sends all three at every moment, to forked processes."""
    name = "SIGUSR1"
    command = [
        sys.executable,
        "-m",
        "trainer",
        *FLAGS,
        "--runs",
        str(tmp_path / "runs"),
        "--results",
        str(tmp_path / "results"),
    ]
    with subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    ) as process:
        for line in process.stdout:  # the first evaluation: half of the run is done
            if "val top-1" in line:
                process.send_signal(getattr(signal, name))
                break
        rest, error = process.communicate(timeout=120)
    assert process.returncode == 75, error
    assert f"stopped by {name}" in rest
    assert rsb(tmp_path, "-m", "trainer").returncode == 0
    assert ending(tmp_path) == undisturbed


@pytest.mark.drill
def test_the_number_of_workers_changes_nothing(undisturbed, tmp_path):
    flags = [*FLAGS[: FLAGS.index("--workers") + 1], "2", *FLAGS[FLAGS.index("--workers") + 2 :]]
    command = [
        sys.executable,
        "-m",
        "trainer",
        *flags,
        "--runs",
        str(tmp_path / "runs"),
        "--results",
        str(tmp_path / "results"),
    ]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300, env=os.environ)
    assert done.returncode == 0, done.stderr
    assert ending(tmp_path) == undisturbed
