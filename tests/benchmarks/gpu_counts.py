"""What a step asks of a GPU, part by part, at the recipe's own size: launches, waits, copies,
bytes, and the host's time. On a pretended GPU (tests/support/gpu_stub), so on any machine with g++.

    python tests/benchmarks/gpu_counts.py [--recipes A2] [--models resnet50] [--ranks 1 2]
        [--settings cuda_graphs half_group_norm] [--data cifar10]

bytes: of the tensors that each operation of torch and each kernel of Triton reads and writes, once
for each; of a graph, those of the passes that it holds. host ms: of the process's own CPU time, the
median of a few steps. Images are random; one micro-batch stands for all.
"""

from __future__ import annotations

import argparse
import collections
import contextlib
import functools
import itertools
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

HERE = Path(__file__).parent
sys.path[:0] = [str(HERE.parents[1]), str(HERE.parent)]

import numpy as np
import torch
from PIL import Image
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from triton.runtime.jit import JITFunction

from support import gpu_stub
from support.ranked import on_ranks
from trainer.base.errors import UserError
from trainer.base.settings import make_settings
from trainer.components.mixing import UnitMixes
from trainer.components.pixels import fused
from trainer.data import transforms
from trainer.data.dataset import OpenedData
from trainer.data.prefetcher import prefetched
from trainer.distributed.communicator import Ranks
from trainer.engine.state import TrainingState, set_algorithms
from trainer.engine.train import optimizer_step, own_micro_batches
from trainer.runs.job import Job, plan_of

DATA = "imagenet-1k"
RECIPES = ["A1", "A2", "A3", "convnext", "ffcv-rn50-16", "gn-ws", "bcn"]
MODELS = ["resnet50", "convnext_tiny"]
PARTS = ["augment", "normalize", "mix", "forward", "loss", "backward"]
PARTS += ["graph", "reduce", "clip", "optimizer", "average", "other"]
NUM_UNTIMED = 3  # they copy what stays, and capture
NUM_TIMED = 3
# operations that make a tensor without moving its content
_VIEWS = {"view", "expand", "as_strided", "slice", "select", "unbind", "permute", "transpose", "t"}
_VIEWS |= {"detach", "unsqueeze", "squeeze", "split", "narrow", "alias", "_unsafe_view", "empty"}
_VIEWS |= {"empty_like", "empty_strided", "record_stream", "_reshape_alias", "unfold", "lift_fresh"}
_VIEWS |= {"new_empty", "new_empty_strided", "split_with_sizes", "diagonal", "is_pinned"}


class Photos:
    """A training set of the profile's size in which every image is the same."""

    is_in_memory, fingerprint, num_channels = True, "", 3

    def __init__(self, profile) -> None:
        self.num_images = profile.num_train
        self.labels = np.arange(self.num_images) % profile.num_classes
        self.classes = tuple(map(str, range(profile.num_classes)))
        pixels = np.random.default_rng(0).integers(0, 256, (256, 256, 3), np.uint8)
        self._photo = Image.fromarray(pixels)

    def read(self, i: int) -> Image.Image:
        return self._photo


class Account:
    """Counters and the process's CPU time, charged to the part of the step that is running."""

    def __init__(self) -> None:
        from support.gpu_stub.watch import counts  # needs the library

        self._counts, self._running = counts, ["other"]
        self.parts: dict[str, collections.Counter[str]] = {}
        self.restart()

    def restart(self) -> None:
        self.parts = {part: collections.Counter() for part in PARTS}
        self._before, self._since_s = self._counts(), time.process_time()

    def charge(self) -> None:
        """Charge what came since the last call."""
        now, now_s = self._counts(), time.process_time()
        part = self.parts[self._running[-1]]
        part.update(now - self._before)
        part["host_us"] += round(1e6 * (now_s - self._since_s))
        self._before, self._since_s = self._counts(), time.process_time()

    @contextlib.contextmanager
    def over(self, part: str) -> Iterator[None]:
        self.charge()
        self._running.append(part)
        try:
            yield
        finally:
            self.charge()
            self._running.pop()

    def add_bytes(self, num_bytes: int) -> None:
        self.parts[self._running[-1]]["bytes"] += num_bytes

    def wrap(self, owner, name: str, part: str) -> None:
        """Charge all calls of owner.name to a part."""
        plain = getattr(owner, name)

        @functools.wraps(plain)
        def charged(*given, **named):
            with self.over(part):
                return plain(*given, **named)

        setattr(owner, name, charged)


class Traffic(TorchDispatchMode):
    """Charges the bytes of every operation on the device."""

    def __init__(self, account: Account) -> None:
        super().__init__()
        self._account = account

    def __enter__(self):
        self._launch = launch = JITFunction.run

        def launched(kernel, *args, **kwargs):
            self._charge(args)
            return launch(kernel, *args, **kwargs)

        JITFunction.run = launched
        return super().__enter__()

    def __exit__(self, *exception):
        JITFunction.run = self._launch
        return super().__exit__(*exception)

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        given = kwargs or {}
        result = function(*args, **given)
        name = function.overloadpacket.__name__
        if name not in _VIEWS:
            self._charge((args, given, result))
        return result

    def _charge(self, given) -> None:
        tensors = (part for part in tree_leaves(given) if isinstance(part, torch.Tensor))
        self._account.add_bytes(sum(_bytes_of(part) for part in tensors if part.is_cuda))


def _bytes_of(tensor: torch.Tensor) -> int:
    """What lies behind a tensor: an expanded dimension lies there once."""
    sizes = (size for size, stride in zip(tensor.shape, tensor.stride(), strict=True) if stride)
    return int(np.prod(list(sizes), dtype=np.int64)) * tensor.element_size()


def charge_parts(account: Account, state: TrainingState) -> None:
    """Charge every part of a step of this state to its name."""
    recipe = state.plan.recipe
    account.wrap(transforms, "augmented", "augment")
    account.wrap(transforms, "normalize", "normalize")
    account.wrap(fused, "model_inputs", "normalize")  # erases and mixes too
    for kind in {type(part) for part in recipe.augment if part.stage == "normalized"}:
        account.wrap(kind, "apply", "augment")
    if recipe.mix is not None:
        account.wrap(type(recipe.mix), "drawn", "mix")
        account.wrap(UnitMixes, "of_images", "mix")
        account.wrap(UnitMixes, "of_targets", "mix")
    account.wrap(state.model, "forward", "forward")
    account.wrap(type(recipe.loss), "__call__", "loss")
    account.wrap(torch.Tensor, "backward", "backward")
    account.wrap(torch.cuda.CUDAGraph, "replay", "graph")
    account.wrap(state.gradients, "start", "reduce")
    account.wrap(state.gradients, "finish", "reduce")
    account.wrap(state.step_statistics, "finish", "reduce")
    account.wrap(Ranks, "sum", "reduce")
    account.wrap(type(recipe.optimizer), "clip", "clip")
    account.wrap(state.optimizer, "step", "optimizer")
    account.wrap(state.optimizer, "zero_grad", "optimizer")
    if state.average is not None:
        account.wrap(state.average, "update", "average")


def counted(
    ranks: Ranks, recipe: str, model: str, changed: list[str], data: str
) -> dict[str, dict[str, float]]:
    """One step by part, on this rank."""
    plan = plan_of(Job(recipe, model, data, None, 0, "", world_size=ranks.world_size))
    machine = dict.fromkeys(changed, True)
    settings = make_settings(f"cuda:{ranks.rank}", "bf16", workers="0", **machine)
    set_algorithms(settings)
    photos = Photos(plan.profile)
    state = TrainingState(plan, settings, ranks)
    key = 0, own_micro_batches(state, 0)[0]
    one = OpenedData(photos, photos).stream(plan, settings, ranks)[key]
    one = one._replace(images=one.images.pin_memory(), labels=one.labels.pin_memory())
    window = prefetched(
        (
            one._replace(step=step, micro_batch=number)
            for step in itertools.count()
            for number in own_micro_batches(state, step)
        ),
        settings.device,
    )
    account = Account()
    charge_parts(account, state)
    for step in range(NUM_UNTIMED):
        optimizer_step(state, window, step)
    timed = []
    for step in range(NUM_UNTIMED, NUM_UNTIMED + NUM_TIMED):
        account.restart()
        optimizer_step(state, window, step)
        account.charge()
        timed.append(account.parts)
    account.restart()
    state.captured = None  # a replay asks for no operation
    with Traffic(account):
        optimizer_step(state, window, NUM_UNTIMED + NUM_TIMED)
    found = {part: dict(timed[-1][part]) for part in PARTS}
    for part in PARTS:
        found[part]["bytes"] = account.parts[part]["bytes"]
        found[part]["host_us"] = statistics.median(each[part]["host_us"] for each in timed)
    found["micro_batches"] = {"number": len(own_micro_batches(state, 2)), "images": len(one.labels)}
    return found


COLUMNS = {
    "launches": lambda row: row.get("launches", 0),
    "collectives": lambda row: row.get("collectives", 0),
    "waits": lambda row: row.get("waits", 0),
    "pageable copies": lambda row: row.get("pageable_copies", 0),
    "copies to the device": lambda row: row.get("copies_to_device", 0),
    "MB copied there": lambda row: f"{row.get('bytes_to_device', 0) / 1e6:.2f}",
    "GB moved": lambda row: f"{row.get('bytes', 0) / 1e9:.3f}",
    "host ms": lambda row: f"{row.get('host_us', 0) / 1e3:.1f}",
}


def table(found: dict[str, dict[str, float]]) -> str:
    """Markdown: a line for each part that does something, and their sum."""
    rows = {part: found[part] for part in PARTS if any(found[part].values())}
    whole: collections.Counter[str] = collections.Counter()
    for row in rows.values():
        whole.update(row)
    lines = [f"| part | {' | '.join(COLUMNS)} |", "|---|" + "---:|" * len(COLUMNS)]
    for part, row in (rows | {"**step**": whole}).items():
        lines.append(f"| {part} | {' | '.join(str(of(row)) for of in COLUMNS.values())} |")
    return "\n".join(lines)


def show(recipe: str, model: str, num_ranks: int, changed: list[str], data: str) -> None:
    title = f"## {recipe}, {model}, {num_ranks} rank{'s' * (num_ranks > 1)}"
    title += "".join(f", {name}=1" for name in changed)
    title += f", {data}" * (data != DATA)
    try:
        found = on_ranks(counted, num_ranks, recipe, model, changed, data, device="cuda")[0]
    except (UserError, AssertionError) as error:
        print(f"{title}\n\nrefused: {str(error).splitlines()[0][:300]}\n", flush=True)
        return
    each = found["micro_batches"]
    print(
        f"{title}\n\n{each['number']} micro-batches of {each['images']} images on this rank\n\n"
        f"{table(found)}\n",
        flush=True,
    )


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--recipes", nargs="+", default=RECIPES)
    parser.add_argument("--models", nargs="+", default=MODELS)
    parser.add_argument("--ranks", nargs="+", type=int, default=[1, 2])
    parser.add_argument("--settings", nargs="+", default=[], help="those that are on")
    parser.add_argument("--data", default=DATA, help="a known set, as for small images cifar10")
    parser.add_argument("--one", nargs=3, help=argparse.SUPPRESS)  # in a process of its own
    given = parser.parse_args()
    if given.one:
        recipe, model, num_ranks = given.one
        show(recipe, model, int(num_ranks), given.settings, given.data)
        return
    built = gpu_stub.build(Path.home() / ".cache" / "rsb-gpu-stub")
    print(f"torch {torch.__version__}, bf16, the pretended GPU\n", flush=True)
    for recipe, model, num_ranks in itertools.product(given.recipes, given.models, given.ranks):
        environment = os.environ | built | {"GPU_STUB_DEVICES": str(num_ranks)}
        words = ["--one", recipe, model, str(num_ranks), "--data", given.data]
        words += ["--settings", *given.settings] if given.settings else []
        done = subprocess.run([sys.executable, "-W", "ignore", __file__, *words], env=environment)
        if done.returncode:
            print(f"## {recipe}, {model}: exit code {done.returncode}\n", flush=True)


if __name__ == "__main__":
    main()
