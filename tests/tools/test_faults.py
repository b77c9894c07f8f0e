"""Each fault is injected once per run folder, where it says, and never passes for a clean run."""

import errno
import functools
import io
import re
import signal
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from rich.console import Console

from support.plans import small_plan, small_set
from trainer.base.errors import UserError
from trainer.base.exits import EXIT_DIVERGED, EXIT_DONE, EXIT_STOPPED
from trainer.base.settings import make_settings
from trainer.base.signals import StopRequest
from trainer.data.dataset import open_data
from trainer.data.decode import BadImage
from trainer.data.order import epoch_order
from trainer.distributed.communicator import Ranks, alone
from trainer.engine.micro_batches import MemoryFull
from trainer.runs.job import Job, plan_of, run_job
from trainer.runs.lock import LockLost
from trainer.runs.results import touches_result
from trainer.runs.run import TrainingRun
from trainer.tools import faults as inject
from trainer.tools.faults import Disk, Fault, Faults, check_faults, parse_faults, step_of


def test_faults_are_read_strictly():
    text = "kill@37, nan@50,oom@12,enospc@80,slow@5:3s,bad_image@100,term@20,raise@9,enospc@9:1.5s"
    faults = parse_faults(text)
    assert [str(fault) for fault in faults] == [word.strip() for word in text.split(",")]
    assert faults[4] == Fault("slow", 5, 3.0) and faults[0] == Fault("kill", 37)
    assert parse_faults("") == parse_faults(" ") == ()


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("kil@3", "unknown (did you mean kill?)"),
        ("kill", "needs the number of a step"),
        ("kill@", "needs the number of a step"),
        ("kill@0", "counted from 1"),
        ("kill@-1", "counted from 1"),
        ("kill@3.5", "counted from 1"),
        ("kill@0x10", "counted from 1"),
        ("kill@٣", "counted from 1"),  # a digit, but none of these ten
        ("kill@9999999999999999", "counted from 1"),
        ("kill@3,", "unknown"),
        ("bad_image@x", "needs the number of an image"),
        ("slow@5", "slow@5:3s"),
        ("slow@5:0s", "slow@5:3s"),
        ("slow@5:3", "needs the number of a step"),
        ("kill@5:3s", "use kill@5"),
        ("kill@5,nan@3,kill@5", "given twice"),
    ],
)
def test_an_invalid_fault_is_one_line(text, says):
    with pytest.raises(UserError) as caught:
        parse_faults(text)
    assert (
        says in str(caught.value)
        and str(caught.value).startswith("inject=")
        and "\n" not in str(caught.value)
    )


def test_a_fault_that_the_run_never_reaches_is_refused():
    plan = digits_plan("fail")  # 2 epochs of 11 steps
    check_faults(parse_faults("kill@22,bad_image@2816"), plan)
    with pytest.raises(
        UserError, match="inject=kill@23: the run has 22 steps; use kill@22 at most"
    ):
        check_faults(parse_faults("kill@23"), plan)
    with pytest.raises(UserError, match="has 2816 images"):
        check_faults(parse_faults("bad_image@2817"), plan)


def test_an_image_is_counted_in_the_order_of_the_run():
    plan = digits_plan("fail")  # 2 epochs of 11 steps
    assert [step_of(Fault("bad_image", number), plan) for number in (1, 128, 129, 1408, 1409)] == [
        0,
        0,
        1,
        10,
        11,
    ]
    assert step_of(Fault("kill", 1), plan) == 0


def test_a_full_disk_is_full_for_one_write_or_for_a_time(monkeypatch):
    disk = Disk()
    disk.before_write(Path("x"))
    disk.fill()
    with pytest.raises(OSError) as caught:
        disk.before_write(Path("folder/x"))
    assert caught.value.errno == errno.ENOSPC and caught.value.filename == "folder/x"
    disk.before_write(Path("x"))
    clock = {"s": 100.0}
    monkeypatch.setattr(inject.time, "monotonic", lambda: clock["s"])
    disk.fill(2.0)
    for clock["s"] in (100.0, 101.9):
        with pytest.raises(OSError):
            disk.before_write(Path("x"))
    clock["s"] = 102.0
    disk.before_write(Path("x"))


@functools.cache
def digits_plan(bad_images: str):
    return small_plan(overrides="batch.images=128 batch.norm_images=32", bad_images=bad_images)


def struck(faults: str, folder: Path, ranks: Ranks = alone(), bad_images: str = "fail"):
    """The Faults of a folder, and a state for them."""
    plan = digits_plan(bad_images)
    said: list[str] = []
    progress = SimpleNamespace(step=0, injected=[])
    state = SimpleNamespace(
        model=torch.nn.Identity(), progress=progress, say=said.append, said=said
    )
    return Faults(parse_faults(faults), plan, folder, ranks), state


def test_each_is_injected_once_per_folder_and_recorded_before(tmp_path, monkeypatch):
    signals = []
    monkeypatch.setattr(
        inject.os,
        "kill",
        lambda process, number: signals.append((number, (tmp_path / "injected").read_text())),
    )
    faults, state = struck("kill@2,term@3", tmp_path)
    for step in range(4):
        faults.before_step(step, state)
    assert signals == [(signal.SIGKILL, "kill@2\n"), (signal.SIGTERM, "kill@2\nterm@3\n")]
    assert state.said == ["injected: kill@2", "injected: term@3"] and state.progress.injected == []
    again, state = struck("kill@2,term@3,kill@4", tmp_path)
    for step in range(4):
        again.before_step(step, state)
    assert len(signals) == 3 and signals[-1][0] == signal.SIGKILL


def test_faults_that_change_the_row_are_recorded_in_it(tmp_path):
    faults, state = struck("nan@1,slow@2:1s,enospc@3,bad_image@500", tmp_path, bad_images="skip")
    for step in range(4):
        faults.before_step(step, state)
    disk_is_full = pytest.raises(OSError)
    with disk_is_full:
        faults.before_write(tmp_path)
    assert state.progress.injected == ["nan@1", "slow@2:1s", "bad_image@500"]
    assert [touches_result([fault]) for fault in state.progress.injected] == [True, False, True]
    assert not touches_result([])
    faults, state = struck("bad_image@1", tmp_path / "other")
    faults.before_step(0, state)
    assert state.progress.injected == []  # under bad_images=fail the next process reads it whole


def test_the_loaders_faults_of_its_first_step_are_marked_before_it_works(tmp_path):
    faults, state = struck("bad_image@7,slow@2:1s,kill@3", tmp_path)
    assert [str(fault) for fault in faults.in_loader(state)] == ["bad_image@7", "slow@2:1s"]
    assert (tmp_path / "injected").read_text() == "bad_image@7\n"
    assert [str(fault) for fault in faults.left] == ["slow@2:1s", "kill@3"]


@pytest.mark.parametrize("content", [b"kill@2\n\xff\xfe\n", None])
def test_records_that_cannot_be_read_are_one_line(tmp_path, content):
    if content is None:
        (tmp_path / "injected").mkdir()
    else:
        (tmp_path / "injected").write_bytes(content)
    with pytest.raises(UserError, match=r"injected: cannot be read .*; remove it") as caught:
        struck("kill@2", tmp_path)
    assert "\n" not in str(caught.value)
    struck("", tmp_path)  # who injects nothing does not look


def test_a_fault_that_cannot_be_recorded_is_not_injected_and_the_run_continues(
    tmp_path, monkeypatch
):
    def fsync(descriptor):
        raise OSError(errno.ENOSPC, "No space left on device")

    signals, sync = [], inject.os.fsync
    monkeypatch.setattr(inject.os, "kill", lambda process, number: signals.append(number))
    monkeypatch.setattr(inject.os, "fsync", fsync)
    faults, state = struck("bad_image@7,kill@2,slow@3:1s,term@4", tmp_path)
    assert [str(fault) for fault in faults.in_loader(state)] == [
        "slow@3:1s"
    ]  # not the image of the first step
    for step in range(3):
        faults.before_step(step, state)
    assert not signals and state.progress.injected == ["slow@3:1s"]  # the loader was at it already
    assert [line.partition(":")[0] for line in state.said] == [
        "not injected",
        "not injected",
        "injected",
    ]
    assert all("No space left on device" in line and "\n" not in line for line in state.said)
    monkeypatch.setattr(inject.os, "fsync", sync)
    faults.before_step(3, state)
    assert signals == [signal.SIGTERM] and state.said[-1] == "injected: term@4"
    assert (tmp_path / "injected").read_text() == "term@4\n"


def stream(folder: Path, inject: str, **job):
    plan = small_plan(
        "A1", overrides="batch.images=128 batch.norm_images=32", **job
    )  # with repeats
    settings = make_settings("cpu", workers="0")
    data = open_data(plan.profile, None)
    state = SimpleNamespace(
        progress=SimpleNamespace(step=0, injected=[]), settings=settings, say=lambda line: None
    )
    faults = Faults(parse_faults(inject), plan, folder, alone())
    return plan, data, data.train_stream(plan, settings, 0, wrap=faults.wrap(state))


def test_a_bad_image_is_the_one_of_that_number_and_no_other(tmp_path):
    plan, data, batches = stream(tmp_path, "bad_image@200", bad_images="skip")
    plain = data.train_stream(plan, make_settings("cpu", workers="0"), 0)
    replaced = []
    for _, batch, other in zip(range(8), batches, plain, strict=False):
        assert torch.equal(batch.ids, other.ids)
        for row in (batch.images != other.images).flatten(1).any(1).nonzero().flatten().tolist():
            replaced.append((batch.step, tuple(batch.ids[row].tolist()), batch.num_replaced))
    order = epoch_order(plan.seed, 0, plan.profile.num_train, plan.recipe.repeats)
    assert replaced == [(1, tuple(order[199].tolist()), 1)]
    plan, data, batches = stream(tmp_path, "bad_image@200")
    with pytest.raises(
        BadImage,
        match=f"image {order[199][1]} of the training set: damaged, as inject=bad_image@200 has it",
    ):
        for _ in range(8):
            next(batches)


def test_a_slow_loader_waits_once_in_its_step(tmp_path, monkeypatch):
    waits = []
    monkeypatch.setattr("trainer.data.faulty.time.sleep", waits.append)
    _, _, batches = stream(tmp_path, "slow@2:3s,slow@3:0.5s")
    for _ in range(12):
        next(batches)
    assert [wait for wait in waits if wait] == [3, 0.5]


SET = "epochs=1 batch.images=128 batch.norm_images=32"  # 11 steps


def trained(folder: Path, inject: str = "", **machine):
    """(exit code, row, what was said) of one call of a command."""
    job = Job(
        "A2", "test_resnet", overrides=small_set(SET), bad_images=machine.pop("bad_images", "fail")
    )
    plan = plan_of(job)
    settings = make_settings(
        "cpu",
        workers="0",
        runs=folder / "runs",
        results=folder / "results",
        checkpoint_s=0,
        **machine,
    )
    out = io.StringIO()
    with StopRequest() as stop:
        console, faults = (
            Console(file=out, width=300),
            functools.partial(Faults, parse_faults(inject)),
        )
        code, row = run_job(
            job, plan, settings, open_data(plan.profile, None), console, stop, faults=faults
        )
    return code, row, out.getvalue()


def stored(folder: Path) -> int:
    return len(list((folder / "results" / "rows").glob("*.json")))


@pytest.fixture(autouse=True)
def _no_picture(monkeypatch):
    """A third of such a short run's time."""
    monkeypatch.setattr("trainer.runs.run.draw_first_batch", lambda *given: None)
    monkeypatch.setattr("trainer.runs.loggers.logger.Log.picture", lambda *given: None)


@pytest.fixture(scope="module")
def clean(tmp_path_factory):
    return trained(tmp_path_factory.mktemp("clean"))[1]


@pytest.mark.drill
def test_a_signal_in_a_step_is_the_end_after_it(tmp_path, clean):
    code, row, said = trained(tmp_path, "term@4")
    assert (code, row) == (EXIT_STOPPED, None) and "stopped by SIGTERM after step 4: saved" in said
    code, row, _ = trained(tmp_path, "term@4")
    assert (
        code == EXIT_DONE
        and row.weights_sha256 == clean.weights_sha256
        and row.injected == ()
        and row.bitwise
    )


def test_a_loss_that_is_no_number_leaves_the_store_alone_and_the_next_call_goes_on_before_it(
    tmp_path, clean
):
    code, row, said = trained(tmp_path, "nan@7")
    assert code == EXIT_DIVERGED and row.injected == ("nan@7",) and row.status == "diverged"
    assert stored(tmp_path) == 0 and "stays out of the store: inject=nan@7" in said
    code, row, said = trained(tmp_path, "nan@7")
    assert re.search(
        r"resumed after step [1-6] of 11", said
    )  # a checkpoint may still be on its way when the next is due
    assert code == EXIT_DONE and row.weights_sha256 == clean.weights_sha256 and row.injected == ()
    assert stored(tmp_path) == 1


@pytest.mark.drill
def test_memory_that_runs_out_and_a_damaged_image_end_a_call_in_one_line_and_the_next_goes_on(
    tmp_path, clean
):
    with pytest.raises(MemoryFull, match=r"out of memory in step 3: .*activation_checkpointing=1"):
        trained(tmp_path, "oom@3,bad_image@1100")
    with pytest.raises(BadImage, match="inject=bad_image@1100"):
        trained(tmp_path, "oom@3,bad_image@1100")
    code, row, _ = trained(tmp_path, "oom@3,bad_image@1100")
    assert (
        code == EXIT_DONE
        and row.weights_sha256 == clean.weights_sha256
        and row.injected == ()
        and stored(tmp_path) == 1
    )


@pytest.mark.drill
def test_a_damaged_image_in_the_very_first_batch_is_marked_too(tmp_path, clean):
    with pytest.raises(BadImage):
        trained(tmp_path, "bad_image@1")
    assert trained(tmp_path, "bad_image@1")[1].weights_sha256 == clean.weights_sha256


@pytest.mark.drill
def test_what_moves_the_result_stays_out_of_the_store_for_good(tmp_path, clean):
    code, row, _ = trained(tmp_path, "bad_image@300", bad_images="skip")
    assert code == EXIT_DONE and row.injected == ("bad_image@300",) and row.num_replaced_images == 1
    code, row, _ = trained(tmp_path, bad_images="skip")  # it goes on from the end, without inject=
    assert row.injected == ("bad_image@300",) and stored(tmp_path) == 0
    assert row.weights_sha256 != clean.weights_sha256


def test_memory_that_runs_out_under_auto_is_in_the_row(tmp_path):
    code, row, _ = trained(tmp_path, "oom@2", micro_batch="auto")
    assert code == EXIT_DONE and row.injected == ("oom@2",) and not row.bitwise
    assert row.changes == ("micro_batch 32 -> 16 images after step 1: out of memory",)
    assert [change.path for change in row.deviations if change.origin == "memory"] == [
        "batch.norm_images"
    ]


def test_without_faults_nothing_is_recorded(tmp_path):
    faults, state = struck("", tmp_path)
    faults.before_step(0, state)
    assert (
        faults.in_loader(state) == ()
        and list(tmp_path.iterdir()) == []
        and np.size(state.said) == 0
    )


def test_a_run_whose_folder_was_taken_over_ends_at_the_next_step_and_writes_no_more(
    tmp_path, monkeypatch
):
    start, steps = TrainingRun.start_step, []

    def starting(run, step):
        start(run, step)
        steps.append(step)
        if step == 4:
            run.guard.lock.path.unlink()
            run.guard.lock.beat()
            (run.folder / "metrics.jsonl").unlink()
            (run.folder / "metrics.jsonl").write_text("theirs")

    monkeypatch.setattr(TrainingRun, "start_step", starting)
    with pytest.raises(LockLost):
        trained(tmp_path)
    assert steps[-1] == 4 and stored(tmp_path) == 0
    (metrics,) = tmp_path.glob("runs/*/metrics.jsonl")
    assert metrics.read_text() == "theirs"
