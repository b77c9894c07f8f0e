"""Work in threads: in order, failures where they are due, nothing left behind."""

import threading

import pytest
import torch

from trainer.data.threads import map_in_threads


def numbers(last, closed):
    try:
        yield from range(last)
    finally:
        closed.append(True)


def augmenting():
    return [thread for thread in threading.enumerate() if thread.name.startswith("augment")]


@pytest.mark.parametrize("num_threads", [1, 2, 4])
def test_results_come_in_the_order_of_the_items(num_threads):
    closed, first_may_end = [], threading.Event()

    def square(number):
        if number == 0 and num_threads > 1:
            assert first_may_end.wait(60)  # the first one ends after the second
        first_may_end.set()
        return number**2

    assert list(map_in_threads(square, numbers(20, closed), num_threads)) == [
        number**2 for number in range(20)
    ]
    assert closed == [True] and not augmenting()
    assert list(map_in_threads(square, [], num_threads)) == []


def test_torch_has_one_thread_in_each_and_its_own_number_outside():
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        assert set(map_in_threads(lambda _: torch.get_num_threads(), range(8), 2)) == {1}
        later = []
        thread = threading.Thread(target=lambda: later.append(torch.get_num_threads()))
        thread.start(), thread.join()
        assert torch.get_num_threads() == 2 and later == [2]
    finally:
        torch.set_num_threads(before)


def failing_items():
    yield from (1, 2, 3)
    raise ValueError("the fourth item")


def fail_at_3(number):
    if number == 3:
        raise ValueError("work on 3")
    return number


@pytest.mark.parametrize(
    ("work", "items", "whole", "message"),
    [
        (int, failing_items, [1, 2, 3], "the fourth item"),
        (fail_at_3, lambda: iter(range(9)), [0, 1, 2], "work on 3"),
    ],
    ids=["an item", "the work on one"],
)
def test_a_failure_is_raised_where_it_is_due(work, items, whole, message):
    seen = []
    with pytest.raises(ValueError, match=message):
        for result in map_in_threads(work, items(), 3):
            seen.append(result)
    assert seen == whole and not augmenting()


def test_ending_early_ends_the_items_and_the_threads():
    closed = []
    results = map_in_threads(abs, numbers(10**9, closed), 2)
    assert [next(results), next(results)] == [0, 1] and len(augmenting()) == 2
    results.close()
    assert closed == [True] and not augmenting()
