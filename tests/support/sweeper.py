"""`python sweeper.py`: imports everything once; each line that it reads becomes a process of the
program, forked.

A line is JSON: {"words": [...], "environment": {...}, "output": path} begins one, and is answered
by its process id; {"wait": id} is answered by its exit code. Every process is a session of its own,
so that all of it can be killed.
"""

import importlib
import json
import os
import runpy
import sys

from support import faults
from trainer.ablation.backends.local import PRELOADED

for module in (*PRELOADED, "trainer.ablation.start", "trainer.cli.run_commands"):
    importlib.import_module(module)


def begin(asked: dict) -> int:
    pid = os.fork()
    if pid:
        return pid
    os.setsid()
    output = os.open(asked["output"], os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    null = os.open(os.devnull, os.O_RDONLY)
    for source, number in ((null, 0), (output, 1), (output, 2)):
        os.dup2(source, number)
    os.environ.update(asked["environment"])
    faults.install()
    sys.argv = ["rsb", *asked["words"]]
    code = 70
    try:
        runpy.run_module("trainer", run_name="__main__")
    except SystemExit as ended:
        code = ended.code or 0
    finally:
        sys.stdout.flush()
        os._exit(code)


for line in sys.stdin:
    asked = json.loads(line)
    if "wait" in asked:
        answer = os.waitstatus_to_exitcode(os.waitpid(asked["wait"], 0)[1])
    else:
        answer = begin(asked)
    print(answer, flush=True)
