"""A sweep: what runs, what waits, what is tried again, and what its end means. Processes are
pretended here.
"""

from itertools import count

import pytest

from support.repeats import repeat_of, row_of, shared_in
from trainer.ablation import runner as ablate
from trainer.ablation.cell_run import record_failure
from trainer.ablation.dry_run import DryTrial
from trainer.ablation.failures import cell_folder, read_failures
from trainer.ablation.runner import Sweep
from trainer.base.errors import UserError
from trainer.base.exits import EXIT_CLAIMED
from trainer.base.signals import StopRequest
from trainer.runs.lock import try_acquire
from trainer.runs.results import store_row


class Pretended:
    """Workers whose processes end as told: by cell, the exit codes of one attempt after another; 0
    where none is told.
    """

    def __init__(self, shared, told=None, num_slots=2, trials=None) -> None:
        self.shared, self.told, self.num_slots = (
            shared,
            {cell: iter(codes) for cell, codes in (told or {}).items()},
            num_slots,
        )
        self.trials, self.tried = trials or {}, []
        self.running, self.started, self.most = [], [], 0
        self.is_stopped = False
        self.meanwhile = {}

    @property
    def num_running(self):
        return len(self.running)

    def start(self, what):
        self.started.append((what.cell, what.seed))
        self.running.append(what)
        self.most = max(self.most, len(self.running))

    def ended(self, timeout_s):
        if not self.running:
            return []
        what = self.running.pop(0)
        self.meanwhile.pop(what.cell, lambda: None)()
        code = 75 if self.is_stopped else next(self.told.get(what.cell, count(0, 0)), 0)
        if code in (0, 3):
            self.store(row_of(what, status="finished" if code == 0 else "diverged"))
        elif code in (1, 2):  # such an end the process records itself
            record_failure(what, self.shared, code)
        return [(what, code)]

    def store(self, row):
        store_row(self.shared.results, row)

    def stop(self):
        self.is_stopped = True

    def streamed(self, function, shapes, shared):
        for shape, repeat in shapes.items():
            self.tried.append(repeat.cell)
            told = self.trials.get(repeat.cell, DryTrial(shape))
            if told is None:
                return
            yield DryTrial(shape, told.error, told.is_users, told.log_tail)

    def close(self):
        pass


CELLS = (0.01, 0.02, 0.03, 0.04)


@pytest.fixture
def sweeps(tmp_path, monkeypatch):
    monkeypatch.setattr(ablate, "_ELSEWHERE_POLL_S", 0.0)
    shared = shared_in(tmp_path)

    def sweep(
        told=None,
        cells=CELLS,
        seeds=(0,),
        stop=None,
        num_slots=2,
        trials=None,
        meanwhile=None,
        **named,
    ):
        backend = Pretended(shared, told, num_slots, trials)
        backend.meanwhile = meanwhile or {}
        repeats = [repeat_of(cell, seed) for seed in seeds for cell in cells]
        made = Sweep(repeats, shared, backend, stop or StopRequest(), lambda _: None, **named)
        made.code = made.run()
        made.states = {(each.repeat.cell, each.repeat.seed): each.state for each in made.statuses}
        return made

    sweep.shared = shared
    return sweep


def test_all_cells_run_once_and_the_next_call_runs_none(sweeps):
    first = sweeps(seeds=(0, 1))
    assert (
        first.code == 0
        and len(first.backend.started) == 8
        and set(first.states.values()) == {"finished"}
    )
    assert first.backend.most == 2
    assert [seed for _, seed in first.backend.started] == [0] * 4 + [
        1
    ] * 4  # a whole table is there early
    again = sweeps(seeds=(0, 1, 2))
    assert again.code == 0 and [seed for _, seed in again.backend.started] == [2] * 4
    assert sum(each.is_done_before for each in again.statuses) == 8


def test_one_that_raises_one_that_diverges_one_out_of_memory(sweeps):
    told = {"0.01": [1], "0.02": [3], "0.03": [-9]}
    first = sweeps(told)
    assert first.code == 1
    assert list(first.states.values()) == ["failed", "diverged", "failed", "finished"]
    failures = {failure.cell: failure for failure in read_failures(sweeps.shared.runs).values()}
    assert failures.keys() == {"0.01", "0.03"} and "SIGKILL" in failures["0.03"].error
    again = sweeps()
    assert [cell for cell, _ in again.backend.started] == ["0.01", "0.03"]
    assert again.code == 3  # one has diverged, which is its result


@pytest.mark.parametrize(
    ("codes", "retries", "num_attempts", "code"),
    [([1], 0, 1, 1), ([1], 1, 2, 0), ([-9, 1, 1], 2, 3, 1), ([-9, 1], 2, 3, 0)],
)
def test_retries_within_one_call(sweeps, codes, retries, num_attempts, code):
    sweep = sweeps({"0.01": codes}, cells=CELLS[:2], retries=retries)
    assert sweep.code == code
    assert [cell for cell, _ in sweep.backend.started].count("0.01") == num_attempts


def test_a_later_call_has_all_its_tries_again(sweeps):
    sweeps({"0.01": [1, 1]}, cells=CELLS[:1], retries=1)
    again = sweeps({"0.01": [1, 1]}, cells=CELLS[:1], retries=1)
    assert len(again.backend.started) == 2
    (failure,) = read_failures(sweeps.shared.runs).values()
    assert failure.num_attempts == 4


def test_fail_fast_stops_what_runs_and_begins_nothing_more(sweeps):
    sweep = sweeps({"0.01": [1]}, fail_fast=True)
    assert sweep.code == 1 and sweep.backend.is_stopped
    assert list(sweep.states.values()) == ["failed", "stopped", "waiting", "waiting"]


def test_a_signal_stops_what_runs_and_ends_with_75(sweeps):
    stop = StopRequest()
    sweep = sweeps({}, stop=stop, meanwhile={"0.01": lambda: stop._note(15, None)})
    assert sweep.code == 75 and sweep.backend.is_stopped
    assert list(sweep.states.values())[2:] == ["waiting", "waiting"]
    assert sweeps().code == 0


def test_a_signal_after_the_last_cell_changes_nothing(sweeps):
    stop = StopRequest()
    assert (
        sweeps(
            {}, cells=CELLS[:1], stop=stop, meanwhile={"0.01": lambda: stop._note(15, None)}
        ).code
        == 0
    )


def test_a_child_that_a_signal_stopped_is_left_to_the_next_call(sweeps):
    sweep = sweeps({"0.02": [75]})
    assert (
        sweep.code == 75
        and sweep.states["0.02", 0] == "stopped"
        and len(sweep.backend.started) == 4
    )


def test_a_process_that_says_done_and_stored_no_row_has_failed(sweeps, monkeypatch):
    monkeypatch.setattr(Pretended, "store", lambda *_: None)
    sweep = sweeps({}, cells=CELLS[:1])
    assert sweep.code == 1 and sweep.states["0.01", 0] == "failed"


def test_a_cell_that_another_caller_runs_is_waited_for(sweeps):
    theirs = repeat_of(CELLS[0])
    own = try_acquire(cell_folder(sweeps.shared.runs, theirs.key))

    def they_finish():
        store_row(sweeps.shared.results, row_of(theirs))
        own.release()

    sweep = sweeps({}, meanwhile={"0.03": they_finish})
    assert sweep.code == 0
    assert [cell for cell, _ in sweep.backend.started] == ["0.02", "0.03", "0.04"]


def test_a_cell_that_another_caller_gave_up_is_taken_over(sweeps):
    own = try_acquire(cell_folder(sweeps.shared.runs, repeat_of(CELLS[0]).key))
    sweep = sweeps({}, meanwhile={"0.03": own.release})
    assert sweep.code == 0 and sorted(sweep.backend.started) == [(f"{cell:g}", 0) for cell in CELLS]


def test_what_failed_under_another_caller_is_not_tried_by_this_call_too(sweeps):
    theirs = repeat_of(CELLS[0])
    own = try_acquire(cell_folder(sweeps.shared.runs, theirs.key))

    def they_fail():
        record_failure(theirs, sweeps.shared, 1)
        own.release()

    sweep = sweeps({}, meanwhile={"0.03": they_fail})
    assert sweep.code == 1 and sweep.states["0.01", 0] == "failed"
    assert ("0.01", 0) not in sweep.backend.started


def test_a_claim_that_comes_between_looking_and_starting_costs_nothing(sweeps):
    sweep = sweeps({"0.01": [EXIT_CLAIMED]})
    assert sweep.code == 0 and [cell for cell, _ in sweep.backend.started].count("0.01") == 2
    assert read_failures(sweeps.shared.runs) == {}


def test_a_row_that_another_ablation_stored_is_enough(sweeps):
    store_row(sweeps.shared.results, row_of(repeat_of(CELLS[1]), ablation="another", cell="there"))
    sweep = sweeps()
    assert ("0.02", 0) not in sweep.backend.started and sweep.states["0.02", 0] == "finished"


def test_every_new_shape_makes_one_step_first(sweeps):
    first = sweeps()
    assert first.backend.tried == ["0.01"]  # the four differ in a number only
    assert sweeps(seeds=(1,)).backend.tried == []


def test_a_failure_in_the_one_step_is_that_of_all_cells_of_the_shape(sweeps):
    bad = {"0.01": DryTrial("", "MemoryError: 1 TiB", log_tail=("Traceback", "MemoryError: 1 TiB"))}
    sweep = sweeps(trials=bad)
    assert (
        sweep.code == 1 and sweep.backend.started == [] and set(sweep.states.values()) == {"failed"}
    )
    failures = read_failures(sweeps.shared.runs)
    assert len(failures) == 4 and all(
        "MemoryError: 1 TiB" in failure.error for failure in failures.values()
    )
    again = sweeps()
    assert (
        again.backend.tried == ["0.01"]
        and again.code == 0
        and read_failures(sweeps.shared.runs) == {}
    )


def test_a_process_that_dies_of_a_shape_is_that_shapes_failure(sweeps):
    sweep = sweeps(trials={"0.01": None})
    assert sweep.code == 1 and "out of memory" in sweep.statuses[0].failure.error


def test_a_signal_in_the_one_step_is_no_failure(sweeps):
    stop = StopRequest()

    def died(shapes):
        stop._note(2, None)
        yield from ()

    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(Pretended, "streamed", lambda self, function, shapes, shared: died(shapes))
        assert sweeps(stop=stop).code == 75
    assert read_failures(sweeps.shared.runs) == {} and sweeps().code == 0


def test_what_the_user_wrote_wrong_ends_the_call_before_anything_runs(sweeps):
    with pytest.raises(UserError, match=r"cell 0.01: data: not found"):
        sweeps(trials={"0.01": DryTrial("", "data: not found", is_users=True)})
    assert read_failures(sweeps.shared.runs) == {}
