"""Whoever imports the suite and trains with it, as from a notebook, finds the process as it was."""

import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
# a process with a life of its own: it prints what it does not find as it was
HOST = """
import atexit, faulthandler, json, multiprocessing, os, random, signal, subprocess, sys, threading, time, warnings
from pathlib import Path

import numpy as np
import torch

# What other packages do where they are imported (sklearn and torch's compiler set variables of the environment, one
# draws from `random`) is not ours.
import matplotlib.figure, scipy.stats, sklearn.datasets, timm, torch._inductor.config, torch.utils.flop_counter, torch.utils.tensorboard

folder = Path(sys.argv[1])

signal.signal(signal.SIGTERM, lambda *given: None)
signal.signal(signal.SIGUSR1, signal.SIG_IGN)
warnings.filterwarnings("error", category=BytesWarning)
torch.set_num_threads(2)
torch.manual_seed(5), np.random.seed(5), random.seed(5)
stop = threading.Event()
threading.Thread(target=stop.wait, name="theirs", daemon=True).start()
theirs = multiprocessing.get_context("spawn").Process(target=time.sleep, args=(600,), daemon=True)
forked = multiprocessing.get_context("fork").Process(target=time.sleep, args=(600,), daemon=True)
child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"])
theirs.start(), forked.start()


def seen() -> dict:
    found = {
        "handlers": {name: signal.getsignal(getattr(signal, name)) for name in ("SIGTERM", "SIGINT", "SIGUSR1", "SIGHUP")},
        # but those that other packages add for warnings of their own where they are imported
        "filters": [entry for entry in warnings.filters if entry[3] or not entry[1] and entry[2].__module__ == "builtins"],
        "threads": sorted(thread.name for thread in threading.enumerate()),
        "children": sorted(process.pid for process in multiprocessing.active_children()),
        "alive": (theirs.is_alive(), forked.is_alive(), child.poll()),
        "start method": multiprocessing.get_start_method(allow_none=True),
        "torch rng": torch.get_rng_state().numpy().tobytes(),
        "numpy rng": str(np.random.get_state()),
        "rng": str(random.getstate()),
        "torch threads": (torch.get_num_threads(), torch.get_num_interop_threads()),
        "torch modes": (torch.is_grad_enabled(), torch.get_default_dtype(), torch.are_deterministic_algorithms_enabled()),
        "environ": dict(os.environ),
        "cwd": os.getcwd(),
        "hooks": (sys.excepthook, threading.excepthook, sys.unraisablehook, faulthandler.is_enabled()),
        "argv": list(sys.argv),
        "streams": (sys.stdout, sys.stderr),
    }
    return found


def changed(before: dict) -> list:
    after = seen()
    differ = [name for name in before if before[name] != after[name]]
    pairs = {name: (before[name], after[name]) for name in differ}
    for name, (old, new) in pairs.items():
        if isinstance(old, dict):
            pairs[name] = [(key, old.get(key), new.get(key)) for key in {*old, *new} if old.get(key) != new.get(key)]
    return [f"{name}: {pair!r}"[:500] for name, pair in pairs.items()]


said = []
"""
TRAIN = """
import io
import trainer
import trainer.runs.job, trainer.data.dataset, trainer.base.settings, trainer.base.signals
from rich.console import Console

said += [f"import: {line}" for line in changed(before)]
job = trainer.runs.job.Job("A2", "test_resnet", overrides=SET)
plan = trainer.runs.job.plan_of(job)
data = trainer.data.dataset.open_data(plan.profile, None)
settings = trainer.base.settings.make_settings("cpu", workers="1", runs=folder / "runs", results=folder / "results", checkpoint_s=0)
code, row = trainer.runs.job.run_job(job, plan, settings, data, Console(file=io.StringIO()), trainer.base.signals.StopRequest())
assert code == 0 and row.steps == 11, row
"""
END = """
said += [f"training: {line}" for line in changed(before)]
print(json.dumps(said))
stop.set()
theirs.kill(), forked.kill(), child.kill()
"""


def test_a_process_that_imports_and_trains_is_as_it_was(tmp_path):
    from support.plans import small_set

    words = f"SET = {small_set('epochs=1 batch.images=128 batch.norm_images=32')!r}\n"
    script = HOST + words + "before = seen()\n" + TRAIN + END
    done = subprocess.run(
        [sys.executable, "-c", script, str(tmp_path)],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines()[-1] == "[]", done.stdout


def test_the_ends_of_loaders_are_not_those_of_other_children(tmp_path):
    """A program that ends while a loader still works: its own processes are ended, nobody else's by
    our hand.
    """
    script = """
import atexit, multiprocessing, os, sys, time
import torch
from trainer.data.workers import items_of, whole

class Numbers:
    def __getitem__(self, key):
        return torch.tensor(key)

theirs = multiprocessing.get_context("fork").Process(target=time.sleep, args=(600,), daemon=True)
theirs.start()
def look():
    print(theirs.is_alive(), flush=True)
items = whole(items_of(Numbers(), range(10**9), 2, "cpu"))
atexit.register(look)  # in the order of atexit it comes after what the loader registers
next(items)
"""
    done = subprocess.run(
        [sys.executable, "-c", script], cwd=ROOT, capture_output=True, text=True, timeout=100
    )
    assert (done.returncode, done.stdout) == (0, "True\n"), done.stderr


def test_ffcv_numba_and_torch_are_as_they_were_where_ffcv_reads():
    pytest.importorskip("ffcv")
    script = """
import numba, torch
torch.set_num_threads(2)
numba.config.THREADING_LAYER = "safe"
before = numba.config.THREADING_LAYER, numba.config.NUMBA_NUM_THREADS, torch.get_num_threads()
import trainer.data.ffcv.loader
assert before == (numba.config.THREADING_LAYER, numba.get_num_threads(), torch.get_num_threads())
from ffcv.loader import epoch_iterator
from ffcv.pipeline.compiler import Compiler
assert Compiler.set_num_threads.__func__.__module__ == "ffcv.pipeline.compiler"
assert epoch_iterator.IS_CUDA == torch.cuda.is_available()
"""
    done = subprocess.run(
        [sys.executable, "-c", script], cwd=ROOT, capture_output=True, text=True, timeout=200
    )
    assert done.returncode == 0, done.stderr
