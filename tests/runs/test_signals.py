"""A signal at any time: what there is is saved, the exit code is 75, the same command ends as the
undisturbed run does.
"""

import functools
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from support import forked
from support.endings import ending
from support.forked import words
from support.killed import STARTS, strike_at_start
from trainer.base import signals as stop
from trainer.base.signals import EarlySignals, Stopped, StopRequest

ROOT = Path(__file__).parents[2]
# sends itself a signal at the first look for a module: as if it had come while the program was
# still importing
AT_IMPORT = """
import os, runpy, signal, sys
module, name, how, *words = sys.argv[1:]
class Watch:
    def find_spec(self, found, *given):
        if found == module:
            sys.meta_path.remove(self)
            for _ in range(2 if how == "twice" else 1):
                os.kill(os.getpid(), signal.Signals[name])
sys.meta_path.insert(0, Watch())
sys.argv = ["rsb", *words]
runpy.run_module("trainer", run_name="__main__")
"""


def send(name: str):
    """A function that a process forked from here can be given."""
    return {"SIGTERM": send_term, "SIGINT": send_int, "SIGUSR1": send_usr1}[name]


def send_term() -> None:
    os.kill(os.getpid(), signal.SIGTERM)


def send_int() -> None:
    os.kill(os.getpid(), signal.SIGINT)


def send_usr1() -> None:
    os.kill(os.getpid(), signal.SIGUSR1)


def send_int_twice() -> None:
    send_int()
    send_int()
    time.sleep(60)  # at once, not after this


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory) -> dict:
    folder = tmp_path_factory.mktemp("undisturbed")
    code, printed = forked.end_of(words(folder))
    assert code == 0, printed
    return ending(folder)


@pytest.mark.drill
@pytest.mark.parametrize("turn", range(3))
def test_signals_while_it_trains_evaluates_and_saves(undisturbed, tmp_path, turn):
    """One after the other, each on what the one before it left."""
    moments = [
        ("step", 2),
        ("copy", 4),
        ("write", 6),
        ("rename", 8),
        ("evaluate", 10),
        ("batch", -1),
        ("drop", 13),
        ("update", 16),
    ]
    for number, (moment, step) in enumerate(moments):
        name = ("SIGTERM", "SIGINT", "SIGUSR1")[(number + turn) % 3]
        code, printed = forked.end_of(words(tmp_path), moment, step, send(name))
        assert (
            code == 75
            and f"stopped by {name} after step" in printed
            and ": saved; rerun the same command to resume" in printed
        ), (moment, printed)
        assert number == 0 or "resumed after step" in printed
    code, printed = forked.end_of(words(tmp_path))
    assert code == 0 and "resumed after step 17" in printed, printed
    assert ending(tmp_path) == undisturbed


@pytest.mark.drill
def test_a_signal_while_the_end_is_written_lets_it_be_written(undisturbed, tmp_path):
    assert forked.end_of(words(tmp_path / "all"), "export")[0] == -signal.SIGKILL
    for moment in ("export", "row", "store"):
        shutil.copytree(tmp_path / "all", tmp_path / moment)
        code, printed = forked.end_of(words(tmp_path / moment), moment, -1, send_term)
        assert code == 0, printed
        assert ending(tmp_path / moment) == undisturbed


@pytest.mark.drill
def test_a_signal_while_it_starts(undisturbed, tmp_path):
    for place in STARTS:
        folder = tmp_path / place
        code, printed = forked.end_of(
            words(folder), prepare=functools.partial(strike_at_start, place, send_term)
        )
        assert code == 75, (place, printed)
        assert (
            "stopped by SIGTERM before the first step; rerun" in printed
            or "stopped by SIGTERM after step 0: saved; rerun" in printed
        )
    code, printed = forked.end_of(words(folder))
    assert code == 0, printed
    assert ending(folder) == undisturbed


@pytest.mark.drill
def test_a_signal_while_it_starts_again_leaves_what_was_saved(undisturbed, tmp_path):
    assert forked.end_of(words(tmp_path), "step", 15)[0] == -signal.SIGKILL
    code, printed = forked.end_of(
        words(tmp_path), prepare=functools.partial(strike_at_start, "resume", send_term)
    )
    assert code == 75 and "stopped by SIGTERM after step 15: saved" in printed, printed
    code, printed = forked.end_of(words(tmp_path))
    assert code == 0 and "resumed after step 15" in printed
    assert ending(tmp_path) == undisturbed


@pytest.mark.drill
@pytest.mark.parametrize(
    ("module", "how", "code"),
    [("typer", "once", 75), ("torch", "once", 75), ("timm", "once", 75), ("torch", "twice", 130)],
)
def test_a_signal_while_it_imports(tmp_path, module, how, code):
    name = "SIGINT" if how == "twice" else "SIGUSR1"
    command = [sys.executable, "-c", AT_IMPORT, module, name, how, *words(tmp_path)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=120)
    assert done.returncode == code, (done.stdout, done.stderr)
    assert "Traceback" not in done.stderr and not list(tmp_path.rglob("*.pt"))


@pytest.mark.drill
@pytest.mark.parametrize(("moment", "step"), [("step", 5), ("batch", 10)])
def test_a_second_interrupt_ends_it_at_once_and_the_same_command_goes_on(
    undisturbed, tmp_path, moment, step
):
    before_s = time.monotonic()
    code, printed = forked.end_of(words(tmp_path), moment, step, send_int_twice)
    assert code == 130 and "stopped by" not in printed and time.monotonic() - before_s < 50, printed
    code, printed = forked.end_of(words(tmp_path))
    assert code == 0 and "resumed after step" in printed
    assert ending(tmp_path) == undisturbed


@pytest.fixture
def none_ignored():
    """Whoever started the tests may ignore some, as nohup does SIGHUP; those are left alone."""
    ignored = [number for number in stop.SIGNALS if signal.getsignal(number) is signal.SIG_IGN]
    for number in ignored:
        signal.signal(number, signal.SIG_DFL)
    yield
    for number in ignored:
        signal.signal(number, signal.SIG_IGN)


def test_a_signal_is_noted_and_handed_back(none_ignored):
    actions = [signal.getsignal(number) for number in stop.SIGNALS]
    for number in stop.SIGNALS:
        with StopRequest() as request:
            request.check()
            os.kill(os.getpid(), number)
            with pytest.raises(Stopped, match=number.name):
                request.check()
    assert [signal.getsignal(number) for number in stop.SIGNALS] == actions


def test_what_came_before_there_was_a_request_is_in_it():
    actions = [signal.getsignal(number) for number in stop.SIGNALS]
    with EarlySignals():
        os.kill(os.getpid(), signal.SIGTERM)
        with StopRequest() as request:
            assert request.signal_name == "SIGTERM"
        assert [
            signal.getsignal(number) for number in stop.SIGNALS
        ] == actions  # what follows the run is as ever
        with StopRequest() as request:
            assert not request.is_requested
    assert [signal.getsignal(number) for number in stop.SIGNALS] == actions


@pytest.mark.parametrize("number", [signal.SIGHUP, signal.SIGINT], ids=["SIGHUP", "SIGINT"])
def test_what_was_ignored_before_is_left_alone(number):
    """nohup ignores SIGHUP, a shell's `&` SIGINT."""
    before = signal.signal(number, signal.SIG_IGN)
    try:
        with EarlySignals(), StopRequest() as request:
            os.kill(os.getpid(), number)
            assert not request.is_requested
        assert signal.getsignal(number) is signal.SIG_IGN
    finally:
        signal.signal(number, before)


@pytest.mark.drill
@pytest.mark.parametrize(
    "words", [["ablate", "--ablation=repeated-augmentation"], ["lr-find"], ["reproduce", "--row=x"]]
)
def test_other_long_commands_hear_a_signal_while_they_import(tmp_path, words):
    words = [*words, f"--runs={tmp_path}", f"--results={tmp_path}"]
    done = subprocess.run(
        [sys.executable, "-c", AT_IMPORT, "typer", "SIGTERM", "once", *words],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=120,
    )
    expected = 2 if words[0] == "reproduce" else 75  # there is no such row
    assert done.returncode == expected, (done.stdout, done.stderr)
    assert "Traceback" not in done.stderr


@pytest.mark.parametrize(
    ("begin", "between"),
    [
        ("stop.EarlySignals().__enter__()", ""),
        ("stop.StopRequest().__enter__()", ""),
        ("stop.EarlySignals().__enter__()", "stop.StopRequest().__enter__()"),
    ],
    ids=["early", "late", "one early and one late"],
)
def test_a_second_interrupt_ends_the_process_whatever_it_is_in(begin, between):
    script = f"""
import os, signal, time
from trainer.base import signals as stop
{begin}
os.kill(os.getpid(), signal.SIGTERM)
os.kill(os.getpid(), signal.SIGINT)
{between}
print("first", flush=True)
try:
    os.kill(os.getpid(), signal.SIGINT)
    time.sleep(60)
except BaseException:
    print("caught", flush=True)
"""
    done = subprocess.run(
        [sys.executable, "-c", script], cwd=ROOT, capture_output=True, text=True, timeout=30
    )
    assert (done.returncode, done.stdout, done.stderr) == (130, "first\n", "")
