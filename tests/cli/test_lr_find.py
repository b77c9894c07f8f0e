"""`lr-find` at the terminal: what it prints, how it ends, what a mistake costs."""

import io
import json
import math
import os
import re
import signal
import subprocess
import sys
from dataclasses import replace

import numpy as np
import pytest
from rich.console import Console
from typer.testing import CliRunner

from support.found import found_of
from support.plans import small_set
from support.range_trials import drawn, network
from trainer.base.exits import EXIT_STOPPED
from trainer.cli.main import app
from trainer.lr_finder import output, plots
from trainer.lr_finder.rules import Candidate, Curve

SET = small_set("batch.images=8 epochs=1")
FLAGS = [
    "lr-find",
    "--recipe",
    "A2",
    "--model",
    "test_resnet",
    "--set",
    SET,
    "--device",
    "cpu",
    "--workers",
    "0",
]
SHORT = ["--seeds", "2", "--steps", "8"]


def rsb(*words):
    return CliRunner().invoke(app, [str(word) for word in words], prog_name="rsb")


@pytest.fixture(scope="module")
def done(tmp_path_factory):
    folder = tmp_path_factory.mktemp("done")
    return folder, rsb(*FLAGS, *SHORT, "--runs", folder / "runs", "--results", folder / "results")


def test_it_says_how_long_it_will_be_what_it_does_and_what_came_out(done):
    folder, result = done
    assert result.exit_code == 0, result.output
    text = result.output
    assert "8 images per step = 1 rank x 1 micro-batch x 8 images" in text
    assert "held out: 144 of 1437 training images" in text
    assert re.search(r"2 ramps of 8 steps, .* at most [\d,]+ steps", text)
    assert (
        text.count("ramp, seed") == 2
        and "lr.peak from 1e-06 to 10 in equal ratios; the recipe has 0.005" in text
    )
    (made,) = (folder / "runs").iterdir()
    facts = json.loads((made / "suggestion.json").read_text())
    assert (facts["command"] in text) if facts["value"] else ("no reliable suggestion: " in text)
    assert not (folder / "results").exists()


def test_the_same_command_says_that_it_is_there_and_prints_it_again(done):
    folder, first = done
    second = rsb(*FLAGS, *SHORT, "--runs", folder / "runs")
    assert (
        second.exit_code == 0 and "has a result already; use again=1 to rerun it" in second.output
    )
    assert second.output.count("(cached)") == len(re.findall(r"\([\d.]+ s\)", first.output)) > 0
    tail = first.output.partition("rule ")[2]
    assert tail and tail == second.output.partition("rule ")[2]


@pytest.mark.parametrize(
    ("words", "found", "remedy"),
    [
        (["--ramp", "epochs"], "ramp=epochs", "lr.peak"),
        (["--ramp", "wieght_decay"], "ramp=wieght_decay", "did you mean weight_decay?"),
        (["--curve", "hold"], "curve=hold", "heldout"),
        (["--from", "2", "--to", "1"], "from=2", "from=1e-06"),
        (["--seeds", "0"], "seeds=0", "seeds=3"),
        (["--recipe", "A9"], "recipe=A9", "A1.v1"),
        (["--precision", "fp16"], "fp16", "float32"),
    ],
)
def test_a_mistake_is_one_line_and_exit_2(words, found, remedy):
    made = rsb(*FLAGS, *words)
    lines = made.stderr.strip().splitlines()
    assert made.exit_code == 2 and len(lines) == 1 and lines[0].startswith("error: "), lines
    assert found in lines[0] and remedy in lines[0]


@pytest.mark.drill
def test_a_signal_ends_it_with_75_and_the_same_command_goes_on(done, tmp_path):
    """The process is told to end once its first trial is over; what it kept is not run again."""
    command = [sys.executable, "-m", "trainer", *FLAGS, *SHORT, "--runs", str(tmp_path)]
    with subprocess.Popen(
        command,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env=os.environ | {"PYTHONUNBUFFERED": "1"},
    ) as process:
        for line in process.stdout:
            if line.startswith("ramp, seed 0"):
                process.send_signal(signal.SIGTERM)
                break
        rest, error = process.communicate(timeout=60)
    assert process.returncode == EXIT_STOPPED, error
    assert re.search(
        r"stopped by SIGTERM after \d+ trials?, which (are|is) kept; rerun the same command to resume",
        rest,
    )
    (folder,) = tmp_path.iterdir()
    kept = len(list((folder / "trials").iterdir()))
    assert kept and not (folder / "suggestion.json").exists()
    result = rsb(*FLAGS, *SHORT, "--runs", tmp_path)
    assert result.exit_code == 0 and result.output.count("(cached)") == kept
    undisturbed = next((done[0] / "runs").iterdir())
    assert (folder / "curve.csv").read_bytes() == (undisturbed / "curve.csv").read_bytes()


# ---- what is printed, for range tests that nothing was trained for


def printed(found, width=120):
    out = Console(file=io.StringIO(), width=width, highlight=False, soft_wrap=True)
    output.result(out, found)
    return out.file.getvalue()


TRIAL = drawn(network(best=0.05), 0.02)


def test_the_answer_has_the_value_the_reason_every_rule_the_batch_and_the_command():
    found = found_of(TRIAL, overrides="epochs=5")
    text = printed(found)
    value = found.suggestion.value
    ends = found.suggestion.interval
    over = f"{ends.lowest:.3g} to {ends.highest:.3g} over 3 seeds"
    assert f"lr.peak {value:.3g}, {over} (the recipe has 0.005): {found.suggestion.reason}" in text
    for rule, spread in found.suggestion.rules.items():
        assert re.search(
            rf"{re.escape(rule)} +{re.escape(f'{spread.median:.3g}')} +{re.escape(f'{spread.lowest:.3g}')}",
            text,
        )
    assert (
        "holds for 32 images per step" in text
        and "the recipe has no rule for another batch" in text
    )
    assert text.rstrip().endswith(
        f'make recipe=A1 model=test_resnet data=digits set="epochs=5 lr.peak={value:.3g}"'
    )
    assert "smoothing" in text and f"{found.suggestion.smoothing['train']:.2f}" in text


def test_the_pages_own_rule_says_what_another_batch_would_take():
    found = found_of(TRIAL, overrides="lr.scaling=linear")
    value = found.suggestion.value
    assert (
        f"by the recipe's linear rule: 16 images {value / 2:.3g}, 64 images {2 * value:.3g}, 128 images {4 * value:.3g}"
        in printed(found)
    )


def test_a_mean_that_is_cut_has_both_columns_and_the_level_in_words():
    """Losses of 6, 1.31 and 1.32 have a mean of 2.8767; the first counts as 2: 1.5433."""
    made = found_of(TRIAL)
    losses = {0: 6.0, 1: 1.31, 2: 1.32}
    cut = Candidate(0.1, losses, 8.63 / 3, 4.63 / 3)
    over = Candidate(1.0, losses | {0: math.inf}, math.inf, 4.63 / 3)
    plain = Candidate(0.01, dict.fromkeys(range(3), 1.0), 1.0, 1.0)
    for candidates, is_cut in (((plain, cut, over), True), ((plain,), False)):
        suggestion = replace(
            made.suggestion, candidates=candidates, level_nats=2.0, level_name="the loss of a stone"
        )
        text = printed(replace(made, suggestion=suggestion))
        assert ("counted as" in text) == is_cut == ("2, the loss of a stone" in text)
        assert re.search(r"^0.01 .* 1\.0000" + (r" +1\.0000 *$" if is_cut else " *$"), text, re.M)
        if is_cut:
            assert re.search(r"^0.1 +6\.0000 +1\.3100 +1\.3200 +2\.8767 +1\.5433 *$", text, re.M)
            assert re.search(r"^1 +diverged .* diverged +1\.5433 *$", text, re.M)


class Clock:
    """Seconds that pass only when a test says so."""

    def __init__(self):
        self.now_s = 100.0

    def __call__(self):
        return self.now_s


def test_a_file_is_told_now_and_then_how_far_it_is_and_after_a_trial_how_long_it_takes():
    """Two ramps of 40 steps of 2 s and 120 steps more: 200 in all, and a kept one of 20 between."""
    clock, file = Clock(), io.StringIO()
    log = output.TerminalLog(Console(file=file, width=120), 200, clock)
    none = np.array([])

    def trial(seed, num_steps):
        log.start(seed, "ramp", 40)
        for _ in range(num_steps):
            clock.now_s += 2.0
            log.step(0.01, 2.5)

    def over(seed, num_steps, was_kept=False):
        values = np.full(num_steps, 0.01)
        curve = Curve(values, values, (none.astype(int), none), 2.0, "ramp", seed, "ramp")
        log.end(curve, 0.01, was_kept)

    with log:
        trial(0, 40)
        lines = [line for line in file.getvalue().splitlines() if "step " in line]
        steps = [int(re.search(r"step (\d+)/40", line)[1]) for line in lines]
        assert steps == list(range(5, 41, 5)), "every ten seconds"
        assert all("seed 0" in line and "2.5000" in line for line in lines)
        assert "time left" not in file.getvalue()
        over(0, 40)
        over(1, 20, was_kept=True)
        trial(2, 5)
    # 200 - 40 - 20 - 5 steps of 2 s
    last = file.getvalue().splitlines()[-1]
    assert "seed 2" in last and "step 5/40" in last and "0:04:30" in last


def test_a_terminal_has_the_bar_and_no_such_lines():
    clock, file = Clock(), io.StringIO()
    log = output.TerminalLog(Console(file=file, width=120, force_terminal=True), 200, clock)
    log.start(0, "ramp", 40)
    clock.now_s += 60.0
    log.step(0.01, 2.5)
    assert "step 1/40" not in file.getvalue()


def test_where_there_is_none_it_says_so_and_gives_no_command():
    text = printed(found_of(drawn(lambda value, seed: 2.3, 0.02)))
    assert "no reliable suggestion: " in text and "make recipe" not in text


@pytest.mark.parametrize("width", [60, 80, 120, 200])
def test_the_plot_fits_the_terminal_and_its_lines_stand_where_they_should(width):
    found = found_of(TRIAL)
    out = Console(file=io.StringIO(), width=width, highlight=False)
    columns = plots.plot_columns(out)
    lines = [line.plain for line in plots.plot(found, columns)]
    assert max(map(len, lines[:-1])) <= width
    rows = [line for line in lines if "│" in line]
    value = found.suggestion.value
    share = np.log(value / 1e-6) / np.log(1e7)
    places = {row.index("┃") - row.index("│") - 1 for row in rows if "┃" in row}
    assert len(places) == 1 and abs(places.pop() - share * (columns - 1)) <= 1
    assert any("⠀" < letter <= "⣿" for row in rows for letter in row)
    assert "1e-06" in lines[-2] and ("0.01" in lines[-2] or width < 80)


def test_the_curve_in_the_terminal_is_high_where_the_loss_is_high():
    """A loss that falls from left to right goes from the top left corner to the bottom right one."""

    def trial(seed, values, purpose):
        losses = np.linspace(2.0, 1.0, len(values))
        steps = np.arange(len(values))
        return Curve(np.asarray(values), losses, (steps, losses), 2.0, "ramp", seed, purpose)

    found = found_of(trial, curve="train")
    rows = [line.plain.partition("│")[2] for line in plots.plot(found, 50) if "│" in line.plain]
    first = [
        min((place for place, letter in enumerate(row) if "⠀" < letter <= "⣿"), default=None)
        for row in rows
    ]
    inked = [place for place in first if place is not None]
    assert inked == sorted(inked) and inked[0] == 0 and inked[-1] >= 44


def test_an_explosion_and_the_valley_before_it_are_both_read_in_the_terminal():
    """From 2 down to 1 and up to a thousand: the last point is at the top, the start below it."""

    def trial(seed, values, purpose):
        num = len(values)
        losses = np.concatenate(
            [np.linspace(2.0, 1.0, num // 2), np.geomspace(2, 1e3, num - num // 2)]
        )
        steps = np.arange(num)
        return Curve(np.asarray(values), losses, (steps, losses), 2.0, "ramp", seed, purpose)

    rows = [line.plain for line in plots.plot(found_of(trial, curve="train"), 50)]
    rows = [row.partition("│") for row in rows if "│" in row]
    inked = [[i for i, letter in enumerate(row) if "⠀" < letter <= "⣿"] for _, _, row in rows]
    assert inked[0] and min(inked[0]) > 40 and max(inked[0]) == 49
    at_start = next(number for number, places in enumerate(inked) if 0 in places)
    at_lowest = max(number for number, places in enumerate(inked) if places)
    assert at_start > 2 and at_lowest - at_start > 4
    assert float(rows[0][0]) > 1000 and float(rows[-1][0]) < 1


@pytest.mark.parametrize("ended", ["ramp", "diverged", "not a number"])
def test_a_line_tells_how_a_trial_ended(ended):
    curve = Curve(
        np.array([0.1, 0.2]),
        np.array([2.0, 3.0]),
        (np.array([1]), np.array([2.5])),
        2.0,
        ended,
        7,
        "ramp",
    )
    line = output.trial_line(curve, 0.3, 1.0)
    assert "seed 7" in line and "up to 0.2" in line and "3.0000" in line and "2.5000" in line
    assert {"ramp": "(1.0 s)", "diverged": "diverged", "not a number": "NaN"}[ended] in line
    none = np.array([])
    empty = Curve(none, none, (none.astype(int), none), 2.0, "not a number", 7, "race")
    line = output.trial_line(empty, 0.3, None)
    assert "no step" in line and "cached" in line
    for purpose in ("probe", "race"):  # the value that the table of candidates has
        line = output.trial_line(replace(curve, purpose=purpose), 0.3, 1.0)
        assert "at 0.3 " in line and "up to" not in line
