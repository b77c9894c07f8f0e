"""How the ranks of a run find each other, watch each other's heartbeats, and learn which failed
first.
"""

from __future__ import annotations

import contextlib
import json
import os
import socket
import sys
import threading
import time
from collections.abc import Callable
from typing import TYPE_CHECKING

from trainer.base.cores import cores_each, own_cores
from trainer.base.errors import UserError, printable
from trainer.base.exits import EXIT_FAILED, EXIT_INTERRUPTED, EXIT_STOPPED, EXIT_USER
from trainer.base.numa import list_of, numbers_of
from trainer.base.signals import Stopped, StoppedAlone
from trainer.distributed.env import Place

if TYPE_CHECKING:
    from torch.distributed import Store

COME_S = 20.0  # how long a rank that has come waits for the others
HEARTBEAT_S = 1.0
SILENT_S = 20.0  # a rank that has not been heard of for so long is lost
GRACE_S = 5.0  # for a rank to end by itself once another one has failed


class MissingRank(Exception):
    """A rank has not come: one line."""


class Rendezvous:
    """One rank's side of the rendezvous, a key-value store that all ranks see.

    rank/R: host, process, device and cores of rank R. beat/R: R's heartbeat, a count that grows
    while it lives. failed: who failed first, and with what exit code; never written twice. heard/R:
    rank R has read it.

    open_store: connects to the place's port, or keeps it: (place, does it keep it) -> store.
    """

    def __init__(
        self, place: Place, device: str, open_store: Callable[[Place, bool], Store]
    ) -> None:
        self.place, self.device, self._open_store = place, device, open_store
        self._server: Store | None = None
        self._store: Store | None = None
        self.table: list[list] = []
        self._heartbeat: _Heartbeat | None = None
        self.heard: dict | None = None  # who failed first, once this rank has read it

    @property
    def store(self) -> Store:
        """The rendezvous, once this rank has found it."""
        assert self._store is not None
        return self._store

    def check_in(self, check: Callable[[], None] = lambda: None) -> None:
        """Come, and wait for the others. check: called while it waits, raises Stopped once a signal
        has come.

        Raises MissingRank where one does not come in time, UserError where the rendezvous cannot
        be opened, SystemExit where it is gone.
        """
        try:
            self._await_others(check)
        except RuntimeError:
            raise SystemExit(self.lost_point()) from None
        self._heartbeat = _Heartbeat(self)
        self._heartbeat.start()

    def _await_others(self, check: Callable[[], None]) -> None:
        self._store = self.connect(self.place.serves, check)
        mine = [socket.gethostname(), os.getpid(), self.device, list_of(own_cores())]
        self.store.set(f"rank/{self.place.rank}", json.dumps(mine))
        names = [f"rank/{rank}" for rank in range(self.place.world_size)]
        until_s = time.monotonic() + COME_S
        while not self.store.check(names):
            if self.failure() is not None:
                raise MissingRank("another rank has named it")
            check()
            if time.monotonic() > until_s:
                missing = [name.partition("/")[2] for name in names if not self.store.check([name])]
                raise MissingRank(
                    f"rank{'s' * (len(missing) > 1)} {', '.join(missing)} of"
                    f" {self.place.world_size} did not come within {COME_S:g} s to"
                    f" {self.place.host}:{self.place.port}"
                )
            time.sleep(0.05)
        self.table = [json.loads(self.store.get(name)) for name in names]

    def connect(self, serves: bool = False, check: Callable[[], None] = lambda: None) -> Store:
        """A connection of its own to the rendezvous. Raises MissingRank where nobody keeps
        it.
        """
        place = self.place
        if serves:
            try:
                self._server = self._open_store(place, True)
            except RuntimeError:
                raise UserError(
                    f"MASTER_PORT={place.port}: cannot be opened on this machine, another program"
                    " has it; use another MASTER_PORT"
                ) from None
        else:
            _await_port(place, check)
        return self._open_store(place, False)

    def log_table(self, log: Callable[[str], None]) -> None:
        """One line for each rank."""
        width = max(len(host) for host, *_ in self.table)
        for rank, (host, process, device, cores) in enumerate(self.table):
            log(f"rank {rank:>3}  {host:<{width}}  process {process:>7}  {device}  cores {cores}")

    def num_own_cores(self) -> int:
        """This rank's own share of the cores that it may run on: see `cores_each`."""
        host = self.table[self.place.rank][0]
        here = [rank for rank, (other, *_) in enumerate(self.table) if other == host]
        affinities = [numbers_of(self.table[rank][3]) for rank in here]
        return cores_each(affinities, here.index(self.place.rank))

    def failure(self) -> dict | None:
        """Who failed first, if anyone has."""
        return json.loads(self.store.get("failed")) if self.store.check(["failed"]) else None

    def post(self, rank: int, code: int) -> dict:
        """Report a failed rank; returns the first one that failed."""
        mine = json.dumps({"rank": rank, "code": code, "by": self.place.rank})
        return json.loads(self.store.compare_set("failed", "", mine))

    def end_by(self, error: BaseException) -> int | None:
        """Report an error of this rank to the others. None where it is the first, and to be raised;
        else the first one's code.
        """
        code = EXIT_USER if isinstance(error, UserError) else EXIT_FAILED
        if isinstance(error, KeyboardInterrupt):
            code = EXIT_INTERRUPTED
        if isinstance(error, (Stopped, StoppedAlone)):
            code = EXIT_STOPPED
        if self._store is None:
            return self._report(error, code)
        if self.heard is not None:
            return self._leave(self.heard)
        try:
            first = self.post(self.place.rank, code)
            if first["by"] != self.place.rank or first["rank"] != self.place.rank:
                self.hear(first, self.store)
                return self._leave(first)
            self.store.set(f"heard/{self.place.rank}", "1")
            self._await_hearing()
        except RuntimeError:
            pass  # the rendezvous is gone: there is nobody left to report to
        return self._report(error, code)

    def _report(self, error: BaseException, code: int) -> int | None:
        if isinstance(error, MissingRank):
            _print_error(str(error))
            return code
        if isinstance(error, StoppedAlone):
            print(
                f"rank {self.place.rank}: stopped by {error}; rerun the same command to resume from"
                " the last checkpoint",
                flush=True,
            )
            return code
        if isinstance(error, Stopped):
            print(
                f"stopped by {error} before all ranks had come; rerun the same command to resume",
                flush=True,
            )
            return code
        if not isinstance(error, (UserError, SystemExit, KeyboardInterrupt)):
            _print_error(
                f"rank {self.place.rank} of {self.place.world_size} on {socket.gethostname()}"
                " failed; the others end with it"
            )
        return None

    def hear(self, first: dict, store: Store) -> int:
        """Keep who failed first, for the rendezvous may be gone when it is asked for, and say
        so; gives the exit code.
        """
        self.heard = first
        store.set(f"heard/{self.place.rank}", "1")
        return first["code"]

    def _leave(self, first: dict) -> int:
        """The exit code of who failed first, once nobody needs this rank any more."""
        with contextlib.suppress(RuntimeError):  # the rendezvous is another process's, and gone
            self._await_hearing()
        return first["code"]

    def _await_hearing(self) -> None:
        """Who keeps the rendezvous must not leave before each of the others has read why."""
        others = [
            f"heard/{rank}" for rank in range(self.place.world_size) if rank != self.place.rank
        ]
        until_s = time.monotonic() + GRACE_S
        while self.place.serves and time.monotonic() < until_s and not self.store.check(others):
            time.sleep(0.05)

    def end_by_loss(self, reason: str) -> int:
        """The exit code once the others no longer answer: that of the first who failed, or of the
        one found silent.
        """
        if self.heard is not None:
            return self._leave(self.heard)
        try:
            first = self.failure()
            before = self._pulse()
            until_s = time.monotonic() + GRACE_S
            while first is None and time.monotonic() < until_s:
                time.sleep(0.1)
                first = self.failure()
            if first is not None:
                self.hear(first, self.store)
                return self._leave(first)
            silent = [
                rank
                for rank, beat in enumerate(self._pulse())
                if beat == before[rank] and rank != self.place.rank
            ]
            return self.lost(silent[0] if silent else None, reason)
        except RuntimeError:
            return self.lost_point()

    def lost(self, rank: int | None, reason: str = "") -> int:
        """Name a rank that no longer answers, unless another has done so; gives the exit code."""
        if self.post(-1 if rank is None else rank, EXIT_FAILED)["by"] == self.place.rank:
            if rank is None:
                _print_error(f"rank {self.place.rank}: the others no longer answer ({reason})")
            else:
                host, process, *_ = self.table[rank]
                _print_error(
                    f"rank {rank} (process {process} on {host}) no longer answers: it was killed,"
                    " or its machine is gone; rerun the same command to resume from the last"
                    " checkpoint"
                )
            self._await_hearing()
        return EXIT_FAILED

    def lost_point(self) -> int:
        """Say that the rendezvous itself is gone; gives the exit code."""
        place = self.place
        who = "rank 0" if place.by == "srun" else "the launcher"
        _print_error(
            f"rank {place.rank}: {who}, which keeps {place.host}:{place.port}, no longer answers;"
            " rerun the same command to resume"
        )
        return EXIT_FAILED

    def _pulse(self) -> list[int]:
        return [self.store.add(f"beat/{rank}", 0) for rank in range(self.place.world_size)]

    def close(self) -> None:
        """Stop the heartbeat, and wait for it: a thread that is inside the store while the process
        ends aborts it, after its last line.
        """
        if self._heartbeat is not None:
            self._heartbeat.done.set()
            self._heartbeat.join(GRACE_S)  # a store that hangs is not waited for


class _Heartbeat(threading.Thread):
    """Sends a heartbeat every second, and ends this rank where it cannot end by itself: a rank
    that waits for one that is gone may wait in the GPU's driver, where no exception reaches it.

    Each rank watches the next one.
    """

    def __init__(self, rendezvous: Rendezvous) -> None:
        super().__init__(daemon=True)
        self.rendezvous = rendezvous
        self.done = threading.Event()

    def run(self) -> None:
        """Send heartbeats until done is set; end the process where a rank has failed, gone silent,
        or the rendezvous is gone.
        """
        rendezvous, place = self.rendezvous, self.rendezvous.place
        next_rank, beat, heard_s = (place.rank + 1) % place.world_size, -1, time.monotonic()
        try:
            store = rendezvous.connect()
            while not self.done.wait(HEARTBEAT_S):
                store.add(f"beat/{place.rank}", 1)
                now = store.add(f"beat/{next_rank}", 0)
                if now != beat:
                    beat, heard_s = now, time.monotonic()
                if store.check(["failed"]):
                    first = json.loads(store.get("failed"))
                    self._end(
                        first["code"]
                        if first["by"] == place.rank
                        else rendezvous.hear(first, store)
                    )
                elif time.monotonic() - heard_s > SILENT_S:
                    self._end(rendezvous.lost(next_rank))
        except (RuntimeError, MissingRank):
            self._end()

    def _end(self, code: int | None = None) -> None:
        """End the process, unless it does so by itself in time. code: None where the rendezvous
        is gone.
        """
        if not self.done.wait(GRACE_S):
            code = self.rendezvous.lost_point() if code is None else code
            sys.stdout.flush()
            sys.stderr.flush()
            os._exit(code)


def _await_port(place: Place, check: Callable[[], None]) -> None:
    """Wait until somebody keeps the rendezvous: torch's own client would print a warning for
    each try.
    """
    until_s = time.monotonic() + COME_S
    while True:
        try:
            socket.create_connection((place.host, place.port), timeout=1).close()
            return
        except OSError as error:
            if time.monotonic() > until_s:
                raise MissingRank(
                    f"rank {place.rank}: nobody answers at {place.host}:{place.port} after"
                    f" {COME_S:g} s ({error}): rank 0 did not come"
                ) from None
            check()
            time.sleep(0.1)


def _print_error(line: str) -> None:
    print(f"error: {printable(line)}", file=sys.stderr, flush=True)
