"""A rank that waits for the others looks up: for a signal, for one that has failed, for the meeting
point itself.
"""

import json
import socket
import threading

import pytest

from support.ranked import places
from trainer.base.exits import EXIT_FAILED, EXIT_STOPPED
from trainer.base.signals import Stopped
from trainer.distributed.rendezvous import MissingRank, Rendezvous


class Board(dict):
    """A store of words in this process; is_gone: whoever kept it has ended."""

    is_gone = False

    def _look(self) -> None:
        if self.is_gone:
            raise RuntimeError("Connection was likely closed")

    def set(self, name: str, value: str) -> None:
        self[name] = value

    def check(self, names: list[str]) -> bool:
        self._look()
        return all(name in self for name in names)

    def get(self, name: str) -> str:
        return self[name]

    def compare_set(self, name: str, expected: str, value: str) -> str:
        self._look()
        return self.setdefault(name, value)


@pytest.fixture
def board():
    return Board()


@pytest.fixture
def both(board):
    """Those of two ranks, at a port that somebody keeps."""
    found = places(2)
    with socket.create_server((found[0].host, found[0].port)):
        yield [Rendezvous(place, "cpu", lambda place, serves: board) for place in found]


def asked_at(number: int):
    """A signal that has come by the number-th look."""
    looks = iter(range(1, number))

    def check() -> None:
        if next(looks, None) is None:
            raise Stopped("SIGTERM")

    return check


def test_a_signal_while_a_rank_waits_for_one_that_does_not_come_ends_both_as_stopped(
    both, board, capsys
):
    late, waiting = both
    with pytest.raises(Stopped) as caught:
        waiting.check_in(asked_at(3))
    assert waiting.end_by(caught.value) == EXIT_STOPPED
    assert json.loads(board["failed"]) == {"rank": 1, "code": EXIT_STOPPED, "by": 1}
    with pytest.raises(MissingRank) as caught:  # it has been told, and waits for nobody
        del board["rank/1"]
        late.check_in()
    assert late.end_by(caught.value) == EXIT_STOPPED
    said = capsys.readouterr()
    assert said.out.startswith("stopped by SIGTERM") and "to resume" in said.out
    assert said.out.count("\n") == 1 and said.err == ""


def test_a_signal_while_nobody_keeps_the_meeting_point_is_a_stop(board):
    waiting = Rendezvous(places(2)[1], "cpu", lambda place, serves: board)
    with pytest.raises(Stopped) as caught:
        waiting.check_in(asked_at(2))
    assert waiting.end_by(caught.value) == EXIT_STOPPED


def test_a_launcher_that_ends_while_ranks_wait_is_named(both, board, capsys):
    def check() -> None:
        board.is_gone = True

    with pytest.raises(SystemExit) as caught:
        both[1].check_in(check)
    assert caught.value.code == EXIT_FAILED and both[1].end_by(caught.value) is None
    said = capsys.readouterr()
    assert (
        said.out == ""
        and said.err.startswith("error: rank 1: rank 0, which keeps 127.0.0.1:")
        and said.err.count("\n") == 1
    )


def test_no_heartbeat_is_left_inside_the_store_at_the_end(both, board, monkeypatch):
    monkeypatch.setattr("trainer.distributed.rendezvous.HEARTBEAT_S", 0.0)
    inside, answer = threading.Event(), threading.Event()

    def add(name: str, amount: int) -> int:
        inside.set()
        answer.wait(60)
        return 1

    board.add = add
    board.set("rank/1", json.dumps(["elsewhere", 1, "cpu"]))
    both[0].check_in()
    assert inside.wait(60)
    closing = threading.Thread(target=both[0].close)
    closing.start()
    closing.join(0.1)
    assert closing.is_alive()
    answer.set()
    closing.join(60)
    assert not closing.is_alive()
