"""Ranks for tests: processes forked from one that has imported all they need, and what they do
there.

Not torchrun, which takes seconds to start: each process is told its place.
"""

import contextlib
import dataclasses
import io
import multiprocessing
import os
import signal
import socket
import sys
import tempfile
import uuid
from pathlib import Path

import torch
from rich.console import Console

from support.plans import small_plan
from support.rows import row_of
from trainer.base.settings import make_settings
from trainer.base.signals import StopRequest
from trainer.data import transforms as prepare
from trainer.data.dataset import open_data
from trainer.distributed import rendezvous
from trainer.distributed.communicator import alone, meet
from trainer.distributed.env import Place, rank_device
from trainer.engine import train
from trainer.engine.evaluate import evaluate
from trainer.engine.null_run import NullRun
from trainer.engine.state import TrainingState
from trainer.recipe.plan import make_plan
from trainer.runs.expected import ExpectedCurve
from trainer.runs.run import train_in_folder
from trainer.tasks import Classification

HERE = Path(__file__).parents[1]
_CONTEXT = multiprocessing.get_context("forkserver")
_CONTEXT.set_forkserver_preload(["support.ranked"])


def places(num_ranks: int) -> list[Place]:
    """The places of ranks on this machine, around a port that is free."""
    with socket.socket() as opened:
        opened.bind(("127.0.0.1", 0))
        port = opened.getsockname()[1]
    attempt = uuid.uuid4().hex
    return [
        Place(rank, num_ranks, rank, num_ranks, "127.0.0.1", port, rank == 0, attempt, "srun")
        for rank in range(num_ranks)
    ]


@dataclasses.dataclass
class Ended:
    """How one rank ended: its exit code, what its function gave, what it wrote."""

    code: int
    value: object
    text: str


def end_of(
    function,
    num_ranks: int,
    *given,
    come=None,
    come_s: float = 20,
    timeout_s: float = 90,
    device="cpu",
) -> list[Ended]:
    """function(ranks, *given) on each of the ranks at once. come: only these ranks come; come_s:
    how long they wait. device: "cuda" gives each a GPU.
    """
    path = os.environ.get("PYTHONPATH", "")
    os.environ["PYTHONPATH"] = os.pathsep.join(
        [str(HERE), str(HERE.parent)]
    )  # of the process that they are forked from
    with tempfile.TemporaryDirectory() as folder:
        ranks = [place for place in places(num_ranks) if come is None or place.rank in come]
        running = [
            _CONTEXT.Process(target=_rank, args=(function, place, given, folder, come_s, device))
            for place in ranks
        ]
        for process in running:
            process.start()
        os.environ["PYTHONPATH"] = path
        for process in running:
            process.join(timeout_s)
            if process.is_alive():
                process.kill()
                process.join()
        return [
            _ended(process, place.rank, Path(folder))
            for process, place in zip(running, ranks, strict=True)
        ]


def on_ranks(function, num_ranks: int, *given, device="cpu") -> list:
    """What function(ranks, *given) gives on each rank; with one, here, without any others."""
    if num_ranks == 1:
        return [function(alone(), *given)]
    ended = end_of(function, num_ranks, *given, device=device)
    assert all(rank.code == 0 for rank in ended), [(rank.code, rank.text) for rank in ended]
    return [rank.value for rank in ended]


def _rank(function, place: Place, given: tuple, folder: str, come_s: float, device: str) -> None:
    torch.set_num_threads(1)
    rendezvous.COME_S = come_s
    with open(Path(folder) / f"{place.rank}.txt", "ab", buffering=0) as file:
        for number in (1, 2):
            os.dup2(file.fileno(), number)
    with meet(place, rank_device(device, place), lambda line: print(line, flush=True)) as ranks:
        value = function(ranks, *given)
        torch.save(value, Path(folder) / f"{place.rank}.pt")
    sys.exit(0)


def _ended(process, rank: int, folder: Path) -> Ended:
    path = folder / f"{rank}.pt"
    value = torch.load(path, weights_only=False) if path.exists() else None
    return Ended(process.exitcode, value, (folder / f"{rank}.txt").read_text())


def ranked_plan(ranks, recipe: str, model: str, overrides: str):
    """A small plan for the number of ranks."""
    plan = small_plan(recipe, model, overrides)
    return make_plan(
        plan.recipe,
        model=plan.model,
        profile=plan.profile,
        seed=plan.seed,
        world_size=ranks.world_size,
        bad_images=plan.bad_images,
    )


@contextlib.contextmanager
def in_float64():
    """All that a step computes in float64, where the program says float32."""
    before = torch.Tensor.float
    torch.set_default_dtype(torch.float64)
    torch.Tensor.float = torch.Tensor.double
    prepare._per_channel.cache_clear()
    try:
        yield
    finally:
        torch.set_default_dtype(torch.float32)
        torch.Tensor.float = before
        prepare._per_channel.cache_clear()


def steps64(*given) -> dict:
    """`steps` in float64, where two orders of one sum stay close for longer."""
    with in_float64():
        return steps(*given)


def steps(ranks, recipe: str, model: str, overrides: str, first: int, number: int) -> dict:
    """Some optimizer steps from a place before the end of the first epoch (first < 0) or from its
    start; all there is to compare.
    """
    plan = ranked_plan(ranks, recipe, model, overrides)
    settings = make_settings("cpu", workers="0")
    first = first % plan.steps_per_epoch
    state = TrainingState(plan, settings, ranks)
    seen = []
    window = noting(open_data(plan.profile, None).train_stream(plan, settings, first, ranks), seen)
    found = {"losses": [], "lrs": [], "gradients": {}}
    step = state.optimizer.step

    def stepping(*given, **named):
        found["gradients"] = {
            name: weight.grad.clone()
            for name, weight in state.model.named_parameters()
            if weight.grad is not None  # else it is frozen
        }
        return step(*given, **named)

    state.optimizer.step = stepping
    for place in range(first, first + number):
        found["losses"].append(train.optimizer_step(state, window, place).item())
        found["lrs"].append(state.optimizer.param_groups[0]["lr"])
    state.check_equal()
    return found | {
        "ids": seen,
        "weights": {name: weight.detach() for name, weight in state.model.named_parameters()},
        "buffers": dict(state.model.named_buffers()),
        "average": state.average.state_dict() if state.average else {},
    }


def noting(stream, seen: list):
    """The stream, whose micro-batches are noted: (step, micro-batch, ids)."""
    for batch in stream:
        seen.append((batch.step, batch.micro_batch, batch.ids.tolist()))
        yield batch


def scores(ranks, num_images: int) -> tuple:
    """The scores of a freshly drawn model over the first validation images, in batches of 3."""
    plan = small_plan()  # 3 ranks cannot share its micro-batches, but evaluate
    settings = make_settings("cpu", workers="0")
    model = TrainingState(plan, settings).model
    batches = list(open_data(plan.profile, None).val_batches(plan, settings))
    images, labels = (torch.cat(parts)[:num_images] for parts in zip(*batches, strict=True))
    found = evaluate(
        plan,
        settings,
        model,
        ranks.share(zip(images.split(3), labels.split(3), strict=True)),
        ranks=ranks,
    )
    return dataclasses.astuple(found)


def whole_run(ranks, folder: str, overrides: str, stop_rank: int = -1, stop_step: int = 0) -> dict:
    """train_in_folder, where a signal may come to one rank in the middle of a step."""
    plan = ranked_plan(ranks, "A1", "test_resnet", overrides)
    settings = make_settings("cpu", workers="0", checkpoint_s=0)
    out = Console(file=io.StringIO(), width=200)
    stop, step = StopRequest(), train.optimizer_step

    def stepping(state, loader, number):
        if ranks.rank == stop_rank and number + 1 == stop_step:
            stop.signal_name = "SIGUSR1"
        return step(state, loader, number)

    train.optimizer_step = stepping
    outcome = train_in_folder(
        plan, settings, open_data(plan.profile, None), Path(folder), out, stop, ranks
    )
    progress = outcome.state.progress
    return {
        "status": outcome.status,
        "step": progress.step,
        "weights": {
            name: tensor.clone() for name, tensor in outcome.state.model.state_dict().items()
        },
        "average": outcome.state.average.state_dict(),
        "scores": progress.scores,
        "changes": progress.changes,
        "said": out.file.getvalue(),
    }


def off_track_run(ranks, folder: str, overrides: str) -> dict:
    """A run with stop_if=off_track beside two rows that are right about every image, which rank 0
    alone has.
    """
    plan = ranked_plan(ranks, "A1", "test_resnet", overrides)
    settings = make_settings("cpu", workers="0", stop_if="off_track")
    counts = (plan.profile.num_val,) * plan.recipe.epochs
    rows = [row_of(plan, num_top1_by_epoch=counts, num_val_images=counts[0]) for _ in range(2)]
    expected = ExpectedCurve(rows) if ranks.is_first else None
    out = Console(file=io.StringIO(), width=200)
    outcome = train_in_folder(
        plan,
        settings,
        open_data(plan.profile, None),
        Path(folder),
        out,
        StopRequest(),
        ranks,
        expected=expected,
    )
    found = outcome.status, outcome.run.is_off_track
    return {"end": found, "epoch": outcome.state.progress.step / plan.steps_per_epoch}


def killed_run(ranks, folder: str, overrides: str, bad_rank: int, moment: str, step: int) -> dict:
    """A run in which one rank is killed at a moment (see killed.py) of a step."""
    from support.killed import strike_at

    if ranks.rank == bad_rank:
        strike_at(moment, step)
    return whole_run(ranks, folder, overrides)


def diverging(ranks, folder: str, bad_rank: int) -> dict:
    """A run in which one rank's loss is no number from step 7 on."""
    step = train.optimizer_step
    made = Classification.prepare
    number = {"step": 0}

    def preparing(task, batch):
        images, targets = made(task, batch)
        return (
            images * (float("nan") if ranks.rank == bad_rank and number["step"] == 7 else 1),
            targets,
        )

    def stepping(state, window, place):
        number["step"] = place
        return step(state, window, place)

    Classification.prepare, train.optimizer_step = preparing, stepping
    return whole_run(
        ranks,
        folder,
        "batch.images=32 batch.norm_images=8 epochs=2 average='{name: ema, decay: 0.9,"
        " every_steps: 1}'",
    )


def failing(ranks, how: str, bad_rank: int) -> str:
    """Ranks that agree for ever, until one of them ends otherwise."""
    for number in range(1000):
        if number == 20 and ranks.rank == bad_rank:
            if how == "raise":
                raise ZeroDivisionError("a mistake of ours")
            if how == "user":
                from trainer.base.errors import UserError

                raise UserError("set=x: a mistake of theirs; use set=y")
            if how == "interrupt":
                raise KeyboardInterrupt
            os.kill(os.getpid(), signal.SIGKILL)
        ranks.sum(torch.ones(1000))
    return "all"


def agreements(ranks) -> dict:
    """One answer of each kind."""
    tensor = torch.full((3,), float(ranks.rank + 1))
    ranks.sum(tensor)
    copied = torch.full((2,), float(ranks.rank))
    ranks.copy([copied])
    return {
        "sum": tensor.tolist(),
        "total": ranks.total(ranks.rank + 1),
        "most": ranks.most(-ranks.rank),
        "any": (ranks.any(False), ranks.any(ranks.rank == 1), ranks.any(True)),
        "same": (ranks.is_same(7), ranks.is_same(ranks.rank)),
        "broadcast": ranks.broadcast(
            {"name": "run", "numbers": [1, 2.5, None], "tensor": torch.arange(3)}
            if ranks.is_first
            else None
        ),
        "copy": copied.tolist(),
        "share": list(ranks.share(range(10))),
    }


def stopped_in_evaluation(ranks, stop_rank: int) -> str:
    """A signal comes to one rank between two of its batches; which ranks raise Stopped?"""
    from trainer.base.signals import Stopped

    plan = small_plan()  # 3 ranks cannot share its micro-batches, but evaluate
    settings = make_settings("cpu", workers="0")
    model = TrainingState(plan, settings).model
    stop = StopRequest()
    stop.signal_name = "SIGUSR1" if ranks.rank == stop_rank else None
    batches = open_data(plan.profile, None).val_batches(plan, settings, ranks)
    try:
        evaluate(plan, settings, model, batches, stop.check, ranks)
    except Stopped:
        return "stopped"
    return "finished"


def size_scores(ranks, test_px: str) -> dict:
    """The scores of a freshly drawn model at further image sizes, by px."""
    plan, data = small_plan(), open_data(small_plan().profile, None)
    state = TrainingState(plan, make_settings("cpu", workers="0", test_px=test_px), ranks)
    train.evaluate_sizes(state, data, NullRun())
    return {px: dataclasses.astuple(found) for px, found in state.size_scores.items()}
