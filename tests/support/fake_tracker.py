"""A package `wandb` that notes each call, and fails at one as told."""

import json
import os
import sys
from functools import partial
from pathlib import Path

SOURCE = """
import json, os, signal, sys


def _do(call, **facts):
    with open(os.environ["FAKE_JOURNAL"], "a") as file:
        file.write(json.dumps({"call": call, "pid": os.getpid(), **facts}) + "\\n")
    if os.environ.get("FAKE_FAULT") != call:
        return
    kind = os.environ["FAKE_KIND"]
    if kind == "raise":
        raise ConnectionError("no\\nnetwork")
    if kind == "exit":
        sys.exit(0)
    if kind == "kill":
        os.kill(os.getpid(), signal.SIGKILL)
    while kind == "hang":
        signal.pause()


_do("import")


class _Summary:
    def update(self, values):
        _do("summary", values=values)


class _Run:
    url, dir = None, "offline-run/files"

    def __init__(self, id, **given):
        self.id, self.summary = id, _Summary()
        _do("init", id=id, **{name: given[name] for name in ("name", "group", "job_type", "config")})

    def log(self, values, step):
        print("printed by the package")
        _do("log", names=list(values), step=step)

    def save(self, path, **given):
        _do("save", path=path)

    def mark_preempting(self):
        pass

    def finish(self, exit_code):
        _do("finish", exit_code=exit_code)


init = _Run
Settings = dict
Image = str
"""


class FakeTracker:
    """The package in front of any real one, for processes started from here on."""

    def __init__(self, folder: Path, patch) -> None:
        package = folder / "packages" / "wandb"
        package.mkdir(parents=True)
        (package / "__init__.py").write_text(SOURCE)
        self._patch, self._journal = patch, folder / "journal.jsonl"
        patch.syspath_prepend(package.parent)
        patch.setenv("PYTHONPATH", str(package.parent))
        patch.setenv("FAKE_JOURNAL", str(self._journal))

    def fail(self, call: str, kind: str) -> None:
        """kind: raise, exit, kill or hang."""
        self._patch.setenv("FAKE_FAULT", call)
        self._patch.setenv("FAKE_KIND", kind)

    def calls(self, *names: str) -> list[dict]:
        """What has been called by now, of these names."""
        lines = self._journal.read_text().splitlines() if self._journal.exists() else []
        return [call for call in map(json.loads, lines) if call["call"] in names]

    def is_over(self) -> bool:
        """Has every process ended that imported it?"""
        return not any(Path(f"/proc/{call['pid']}").exists() for call in self.calls("import"))

    def prepare(self):
        """What a process that was started before has to call."""
        return partial(_set, {name: os.environ[name] for name in ("PYTHONPATH", "FAKE_JOURNAL")})


def _set(names: dict[str, str]) -> None:
    os.environ.update(names)
    sys.path.insert(0, names["PYTHONPATH"])
