"""How many functions and files of trainer/ does one epoch of A3 on resnet18 visit?

    visits.py --checkout DIR --python DIR/.venv/bin/python [--list]

What is counted: every function or method under trainer/ that is called, as (file, qualified name),
in the command's own process and all its threads; a file's own body, which runs when it is imported,
is counted as a file loaded, not as a function. Comprehensions and lambdas count with the function
they stand in.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
from collections import Counter
from pathlib import Path

COMMAND = ["train", "--recipe", "A3", "--model", "resnet18", "--device", "cpu", "--workers", "0"]
SET = "epochs=1 lr.warmup_epochs=null lr.warmup_from=null"

TRACE = """
import json, os, runpy, sys, threading
out, root = sys.argv[1], os.path.join(os.getcwd(), "trainer") + os.sep
sys.argv = ["trainer", *sys.argv[2:]]
seen, codes = set(), set()
def trace(frame, event, argument):
    code = frame.f_code
    if event == "call" and code not in codes:
        codes.add(code)
        is_function = code.co_flags & 1  # CO_OPTIMIZED: not of a file's or a class's body
        if code.co_filename.startswith(root) and (is_function or code.co_name == "<module>"):
            seen.add((code.co_filename[len(root):], code.co_qualname))
sys.path.insert(0, os.getcwd())
threading.setprofile(trace)
sys.setprofile(trace)
status = 0
try:
    runpy.run_module("trainer", run_name="__main__", alter_sys=False)
except SystemExit as end:
    status = end.code or 0
finally:
    sys.setprofile(None)
    with open(out, "w") as file:
        json.dump(sorted(seen), file)
sys.exit(status)
"""


def visited(checkout: Path, python: Path) -> list[tuple[str, str]]:
    """(file, qualified name) of all that was called, trainer/ left out of the file's path."""
    environment = os.environ | {"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    environment.pop("PYTHONPATH", None)
    with tempfile.TemporaryDirectory() as made:
        out = Path(made) / "seen.json"
        words = [*COMMAND, "--set", SET, "--runs", f"{made}/runs", "--results", f"{made}/results"]
        done = subprocess.run(
            [python, "-c", TRACE, out, *words],
            cwd=checkout,
            env=environment,
            capture_output=True,
            text=True,
        )
        if done.returncode:
            sys.exit(f"exit {done.returncode}\n{done.stdout[-2000:]}\n{done.stderr[-2000:]}")
        return [tuple(pair) for pair in json.loads(out.read_text())]


def is_function(name: str) -> bool:
    """Is it neither a file's body nor a part of another function, as a lambda is?"""
    return not name.rpartition(".")[2].startswith("<")


def main() -> None:
    words = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    words.add_argument("--checkout", type=Path, required=True)
    words.add_argument("--python", type=Path)
    words.add_argument("--list", action="store_true", help="every function too")
    given = words.parse_args()
    python = Path(os.path.abspath(given.python or given.checkout / ".venv/bin/python"))
    seen = visited(given.checkout.resolve(), python)
    functions = [(file, name) for file, name in seen if is_function(name)]
    per_file = Counter(file for file, _ in functions)
    per_folder = Counter(os.path.dirname(file) or "." for file in per_file)
    print(f"python -m trainer {' '.join(COMMAND)} --set '{SET}'")
    print(f"files loaded        {sum(name == '<module>' for _, name in seen)}")
    print(f"files visited       {len(per_file)}")
    print(f"functions visited   {len(functions)}")
    for folder, number in sorted(per_folder.items()):
        inside = sum(
            count for file, count in per_file.items() if (os.path.dirname(file) or ".") == folder
        )
        print(f"  {folder:26} {number:4} files {inside:5} functions")
    for file, name in functions if given.list else ():
        print(f"{file}  {name}")


if __name__ == "__main__":
    main()
