"""Damaged inputs for tests: mutations of valid ones from a seed, and a watch over what reading them
does.

Nothing may come of a damaged input but a value or a UserError: no other exception, no wait, no file
written elsewhere, no program started, no connection made, nothing unpickled.
"""

import contextlib
import copy
import io
import json
import os
import signal
import sys
import traceback

import numpy as np

from trainer.base.errors import UserError

LONGEST_S = 5.0
TOKENS = (
    "../", "../../../../tmp/out", "/etc/passwd", "C:\\x", "\x00", "\\u0000", "\x1b[2J",
    "\x1b]0;t\x07", "\u202e", "\ud800", "\ufeff", "&a", "*a", "<<: *a",
    "!!python/object/apply:os.system [\"touch out\"]", "!!binary x", "%TAG ! tag:x,2000:", "---\n",
    "...\n", "{", "}", "[", "]", ": ", "? ", "- ", "|", ">-", "'", '"', "#", "\t", "\r", "\n",
    "\n  ", ",", "=", "=null", "=off", "null", "true", "no", "~", "NaN", ".inf", "-.inf", "1e999",
    "-1", "0", "1e-400", "9" * 30, "9" * 5000, "0x10", "1:30", "1_0", "[" * 300, "{a: " * 300,
    "a." * 300, "x" * 5000, "name", "epochs", "lr", "norm", "$(touch out)", "`touch out`", "[/]",
    "[bold", "[link=x]",
)  # fmt: skip
VALUES = (
    None, True, False, 0, -1, 1, 2**31, 2**53 + 1, 10**40, 0.5, -0.0, 1e308, 1e-320, "", ".", "..",
    "../x", "/etc", "a/b", "x\x00", "\x1b[2J", "\u202e", "x" * 400, "NaN", "[/bold]", [], {}, [[]],
    {"": ""}, [None] * 3, "0" * 64, {"name": "bce"}, [1, "a", None],
)  # fmt: skip


class Mutator:
    """Mutations that depend on the seed alone."""

    def __init__(self, seed: int) -> None:
        self.rng = np.random.default_rng(seed)

    def below(self, number: int) -> int:
        return int(self.rng.integers(max(1, number)))

    def chosen(self, things):
        return things[self.below(len(things))]

    def bytes(self, content: bytes) -> bytes:
        """One to eight of: a bit flipped, bytes put in, taken out, written twice, written over, the
        end cut off.
        """
        found = bytearray(content)
        for _ in range(1 + self.below(8)):
            place, length = self.below(len(found)), self.below(1 + self.below(64))
            kind = self.below(8)
            if kind == 0 and found:
                found[place] ^= 1 << self.below(8)
            elif kind == 1:
                found[place:place] = self.rng.bytes(length)
            elif kind == 2:
                del found[place : place + length]
            elif kind == 3:
                found[place:place] = found[place : place + length]
            elif kind == 4:
                found[place : place + length] = self.rng.bytes(length)
            elif kind == 5 and self.below(4) == 0:
                del found[place:]
            elif kind == 6:
                found[place : place + 4] = self.chosen(
                    (b"\xff\xff\xff\xff", b"\0\0\0\0", b"\x7f\xff\xff\xff", b"\xff\xff\xff\x7f")
                )
            else:
                found[place:place] = self.chosen(TOKENS).encode(errors="surrogatepass")
        return bytes(found)

    def text(self, content: str) -> str:
        """One to six of: a token put in, a piece taken out, moved, written twice, or letters
        changed.
        """
        found = content
        for _ in range(1 + self.below(6)):
            place, length = self.below(len(found) + 1), self.below(1 + self.below(80))
            kind, piece = self.below(6), found[place : place + length]
            if kind == 0:
                found = found[:place] + found[place + length :]
            elif kind == 1:
                other = self.below(len(found) + 1)
                found = found[:other] + piece + found[other:]
            elif kind == 2:
                found = (
                    found[:place]
                    + chr(self.chosen((self.below(128), self.below(0x3000))))
                    + found[place + 1 :]
                )
            elif kind == 3:
                lines = found.split("\n")
                line, other = self.below(len(lines)), self.below(len(lines))
                lines[line], lines[other] = lines[other], lines[line]
                found = "\n".join(lines)
            else:
                found = found[:place] + self.chosen(TOKENS) + found[place:]
        return found[:200_000]

    def tree(self, data):
        """Plain data with one to three parts of it replaced, taken out, or added."""
        found = copy.deepcopy(data)
        for _ in range(1 + self.below(3)):
            places = list(_places(found))
            if not places:
                return self.chosen(VALUES)
            section, key = self.chosen(places)
            kind = self.below(5)
            if kind == 0:
                del section[key]
            elif kind == 1 and isinstance(section, dict):
                section[self.chosen((*TOKENS[:12], "unknown", ""))] = self.chosen(VALUES)
            elif (
                kind == 2
                and isinstance(section[key], (int, float))
                and not isinstance(section[key], bool)
            ):
                section[key] = self.chosen(
                    (
                        -section[key],
                        section[key] * 1000,
                        section[key] + 1,
                        float(section[key]),
                        str(section[key]),
                    )
                )
            else:
                section[key] = self.chosen(VALUES)
        return found

    def json(self, data) -> bytes:
        """JSON of a mutated tree, or mutated JSON of the tree."""
        if self.below(2):
            return json.dumps(self.tree(data)).encode(errors="surrogatepass")
        return self.bytes(json.dumps(data).encode())


def _places(data):
    parts = (
        data.items()
        if isinstance(data, dict)
        else enumerate(data)
        if isinstance(data, list)
        else ()
    )
    for key, part in list(parts):
        yield data, key
        yield from _places(part)


class Elsewhere:
    """What is done outside some folders, told by Python's own audit events. There is one for a
    process: hooks stay.
    """

    _WRITES = os.O_WRONLY | os.O_RDWR | os.O_CREAT | os.O_TRUNC | os.O_APPEND
    _PATHS = (
        "os.rename",
        "os.remove",
        "os.mkdir",
        "os.rmdir",
        "os.symlink",
        "os.link",
        "os.truncate",
        "os.chmod",
        "shutil.rmtree",
    )
    _NEVER = (
        "subprocess.Popen",
        "os.system",
        "os.exec",
        "os.posix_spawn",
        "os.fork",
        "socket.connect",
        "pickle.find_class",
        "ctypes.dlopen",
    )

    def __init__(self) -> None:
        self.allowed: tuple[str, ...] | None = None
        self.seen: list[str] = []
        sys.addaudithook(self._note)

    def _note(self, event: str, values: tuple) -> None:
        if self.allowed is None:
            return
        if event in self._NEVER:
            self.seen.append(f"{event} {values[0]!r}")
        elif (
            event == "open"
            and isinstance(values[0], (str, bytes))
            and isinstance(values[2], int)
            and values[2] & self._WRITES
        ):
            self._check(event, values[0])
        elif event in self._PATHS:
            for value in values[:2]:
                if isinstance(value, (str, bytes, os.PathLike)):
                    self._check(event, value)

    def _check(self, event: str, path) -> None:
        try:
            text = os.path.realpath(os.fsdecode(path))
        except (ValueError, OSError):  # no path at all: the system will say so
            return
        if not text.startswith(self.allowed) and "__pycache__" not in text and text != os.devnull:
            self.seen.append(f"{event} {text}")


_elsewhere = Elsewhere()


class Hang(BaseException):
    """A reader took more than LONGEST_S."""


@contextlib.contextmanager
def watched(*folders):
    """A block in which nothing is done but in these folders; gives the list of what was done
    elsewhere.
    """
    _elsewhere.seen.clear()
    _elsewhere.allowed = tuple(os.path.realpath(folder) + os.sep for folder in folders)
    try:
        yield _elsewhere.seen
    finally:
        _elsewhere.allowed = None


def _late(number, frame):
    raise Hang


@contextlib.contextmanager
def in_time(seconds: float = LONGEST_S):
    """A block of so many seconds of this process's own time, however busy the machine; one that
    waits has a minute.
    """
    timers = {
        signal.SIGPROF: (signal.ITIMER_PROF, seconds),
        signal.SIGALRM: (signal.ITIMER_REAL, 60.0),
    }
    before = {number: signal.signal(number, _late) for number in timers}
    for timer, limit_s in timers.values():
        signal.setitimer(timer, limit_s)
    try:
        yield
    finally:
        for number, (timer, _) in timers.items():
            signal.setitimer(timer, 0)
            signal.signal(number, before[number])


def survived(tries, folder) -> tuple[int, int, dict[str, str]]:
    """Make all tries, functions without a word: (how many, how many refused, what went wrong by its
    place in the program).
    """
    num_tries, num_refused, wrong = 0, 0, {}
    with watched(folder) as elsewhere, contextlib.redirect_stdout(io.StringIO()):
        for number, attempt in enumerate(tries):
            num_tries += 1
            try:
                with in_time():
                    attempt()
            except UserError as error:
                num_refused += 1
                if len(str(error)) > 100_000:
                    wrong.setdefault(
                        "length", f"try {number}: {len(str(error))} letters of refusal"
                    )
            except (Exception, Hang) as error:
                place = traceback.extract_tb(error.__traceback__)[-1]
                name = f"{type(error).__name__} {os.path.basename(place.filename)}:{place.lineno}"
                wrong.setdefault(
                    name, f"try {number}: {''.join(traceback.format_exception(error))[-3000:]}"
                )
            if elsewhere:
                wrong.setdefault(elsewhere[0][:200], f"try {number}")
                elsewhere.clear()
    return num_tries, num_refused, wrong
