"""Several processes that make one run: how they agree, and how one's end ends all.

The only file that knows torch.distributed (launch.py starts processes by its launcher). A process
by itself is `alone()`: every method does nothing there, so that the story of a run reads the same
for any number.
"""

from __future__ import annotations

import contextlib
import io
import itertools
import os
import signal
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from datetime import timedelta

import torch
import torch.distributed as dist

from trainer.base.signals import Stopped, StopRequest
from trainer.distributed.env import Place
from trainer.distributed.rendezvous import Rendezvous

# Rank 0 alone saves, exports and draws: the others wait for it in the next thing that all do
# together.
LONGEST_WAIT = timedelta(minutes=30)
_STORE_WAIT = timedelta(seconds=30)


class LostRanks(RuntimeError):
    """The others no longer answer: one of them has ended."""


@dataclass(frozen=True)
class Ranks:
    """This process among the world_size ranks of a run; local_rank: among those of its machine.
    cores: its own share of that machine's; None for all that it may use.

    Results over all ranks are the same on each of them, bit for bit. group: torch's name for some
    of a run's ranks, see `groups_of`; None for all.
    """

    rank: int = 0
    world_size: int = 1
    local_rank: int = 0
    group: dist.ProcessGroup | None = None
    cores: int | None = None

    @property
    def is_alone(self) -> bool:
        """Is it the only rank?"""
        return self.world_size == 1

    @property
    def is_first(self) -> bool:
        """Is this rank 0, the one that writes and logs?"""
        return self.rank == 0

    def share(self, items: Iterable) -> Iterator:
        """This rank's of things that stand in one order for all: the rank-th, and every
        world_size-th after it.
        """
        return itertools.islice(items, self.rank, None, self.world_size)

    def sum(self, tensor: torch.Tensor) -> None:
        """Put the sum over all ranks in the place of each rank's tensor."""
        self.start_sum(tensor)()

    def start_sum(self, tensor: torch.Tensor) -> Callable[[], None]:
        """Start `sum` without waiting; the returned function waits for the
        sum.
        """
        if self.is_alone:
            return lambda: None
        with _others():
            work = dist.all_reduce(tensor, group=self.group, async_op=True)

        def wait() -> None:
            with _others():
                work.wait()

        return wait

    def gather(self, tensor: torch.Tensor) -> torch.Tensor:
        """Every rank's tensor [N], in the order of ranks: [world_size, N]."""
        if self.is_alone:
            return tensor[None]
        every = tensor.new_empty(self.world_size, *tensor.shape)
        with _others():
            dist.all_gather(list(every), tensor, group=self.group)
        return every

    def groups_of(self, number: int) -> Ranks:
        """This rank among the `number` ranks of its group; groups stand one after another. All
        ranks of a run form them together.
        """
        if number in (1, self.world_size):
            return alone() if number == 1 else self
        rank, found = self.rank % number, None
        with _others():
            for first in range(0, self.world_size, number):
                group = dist.new_group(list(range(first, first + number)))
                if first == self.rank - rank:
                    assert isinstance(group, dist.ProcessGroup)  # this rank is in it
                    found = group
        return Ranks(rank, number, self.local_rank, found)

    def total(self, number: int) -> int:
        """The sum of a whole number over all ranks."""
        return self._agreed(number, dist.ReduceOp.SUM)

    def most(self, number: int) -> int:
        """The largest of all ranks' whole numbers."""
        return self._agreed(number, dist.ReduceOp.MAX)

    def any(self, flag: bool) -> bool:
        """Is it so on any rank?"""
        return bool(self.most(int(flag)))

    def is_same(self, number: int) -> bool:
        """Do all ranks hold the same whole number?"""
        return self.most(number) == -self.most(-number)

    def barrier(self) -> None:
        """Wait until all ranks are here."""
        self.total(0)

    def check(self, stop: StopRequest) -> None:
        """Raise Stopped on all ranks, in the same place, once a signal has come to any."""
        number = self.most(signal.Signals[stop.signal_name].value if stop.signal_name else 0)
        if number:
            raise Stopped(signal.Signals(number).name)

    def broadcast(self, value):
        """Rank 0's value: plain types and tensors; what the others hold is not looked at. Tensors
        come on the CPU.
        """
        if self.is_alone:
            return value
        buffer = io.BytesIO()
        if self.is_first:
            torch.save(value, buffer)
        content = torch.frombuffer(buffer.getbuffer(), dtype=torch.uint8) if self.is_first else None
        length = self.total(len(content) if self.is_first else 0)
        if content is None:
            content = torch.empty(length, dtype=torch.uint8)
        with _others():
            dist.broadcast(content, group_src=0, group=self.group)
        if self.is_first:
            return value
        return torch.load(
            io.BytesIO(content.numpy().tobytes()), map_location="cpu", weights_only=True
        )

    def copy(self, tensors: Iterable[torch.Tensor]) -> None:
        """Put rank 0's tensors in the place of each rank's."""
        if not self.is_alone:
            with _others():
                for tensor in tensors:
                    dist.broadcast(tensor, group_src=0, group=self.group)

    @contextlib.contextmanager
    def first_here(self) -> Iterator[None]:
        """A block that one process of each machine goes through before the others: what it fetches,
        they find.
        """
        if self.local_rank:
            self.barrier()
        yield
        if not self.local_rank:
            self.barrier()

    def _agreed(self, number: int, how: dist.ReduceOp.RedOpType) -> int:
        if self.is_alone:
            return number
        # on the CPU, so by gloo: no device is waited for
        held = torch.tensor(number, dtype=torch.int64)
        with _others():
            dist.all_reduce(held, how, self.group)
        return int(held)


def alone() -> Ranks:
    """The one process of a run that has no others."""
    return Ranks()


@contextlib.contextmanager
def meet(
    place: Place | None,
    device: str,
    log: Callable[[str], None] = print,
    check: Callable[[], None] = lambda: None,
) -> Iterator[Ranks]:
    """The ranks of a run for as long as the block lasts; `alone()` where there is no place.

    check: called while this rank waits for the others to come; where it raises Stopped, all end
    with 75.

    Rank 0 logs the table of ranks. A rank that does not come is named after 20 s. An error on one
    rank ends all of them, with the exit code that it has there; only that rank prints its error. A
    rank that is killed is named by one that is left.

    Raises UserError where the rendezvous cannot be opened. Ends the process (SystemExit) where
    another failed first.
    """
    if place is None:
        yield alone()
        return
    rendezvous = Rendezvous(place, device, _open_store)
    try:
        rendezvous.check_in(check)
        if place.rank == 0:
            rendezvous.log_table(log)
        _join(place, device, rendezvous)
        cores = rendezvous.num_own_cores()
        _use_threads(cores)
        ranks = Ranks(place.rank, place.world_size, place.local_rank, cores=cores)
        yield ranks
        # nobody leaves while another still writes: what starts the ranks ends all with the first
        ranks.barrier()
        dist.destroy_process_group()
    except LostRanks as error:
        raise SystemExit(rendezvous.end_by_loss(str(error))) from None
    except BaseException as error:
        code = rendezvous.end_by(error)
        if code is not None:
            raise SystemExit(code) from None
        raise
    finally:
        rendezvous.close()


def _use_threads(cores: int) -> None:
    """No more of torch's threads than this rank has cores, unless the user has set their number."""
    if "OMP_NUM_THREADS" not in os.environ and torch.get_num_threads() > cores:
        torch.set_num_threads(cores)


def _open_store(place: Place, serves: bool) -> dist.Store:
    store = dist.TCPStore(
        place.host, place.port, is_master=serves, timeout=_STORE_WAIT, wait_for_workers=False
    )
    return dist.PrefixStore(f"rsb.{place.attempt}", store)


def _join(place: Place, device: str, rendezvous: Rendezvous) -> None:
    on_gpu = device.startswith("cuda")
    if on_gpu:
        torch.cuda.set_device(device)
    with _others():
        dist.init_process_group(
            "cpu:gloo,cuda:nccl" if on_gpu else "gloo",
            store=dist.PrefixStore("torch", rendezvous.store),
            rank=place.rank,
            world_size=place.world_size,
            timeout=LONGEST_WAIT,
        )


@contextlib.contextmanager
def _others() -> Iterator[None]:
    """What fails between ranks fails because of another one: torch has an error for each way of
    finding that out.
    """
    try:
        yield
    except RuntimeError as error:
        raise LostRanks(" ".join(str(error).split())) from None
