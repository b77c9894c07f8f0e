"""Components from a user's own files: plugins=my_losses.py, or an installed package's entry point
in the group rsb.plugins.

A plugin is a Python file that defines components (see base/component.py), datasets
(data/datasets/builtin.known_set) or formats (data/datasets/formats.FileFormat). It is imported as a
module below this one, so that whatever process gets one of its objects, a loader's or a cluster's,
finds its class again: the path travels in the environment.
"""

from __future__ import annotations

import hashlib
import importlib
import importlib.machinery
import importlib.metadata
import importlib.util
import os
import re
import sys
import traceback
from pathlib import Path

from trainer.base.errors import UserError, did_you_mean, printable

GROUP = "rsb.plugins"
# the files of this process and of those that it starts, absolute, os.pathsep between them
VARIABLE = "RSB_PLUGINS"

_digests: dict[str, str] = {}  # of what has been loaded: file name, or entry point, to sha256 (hex)


def _files() -> list[Path]:
    return [Path(path) for path in os.environ.get(VARIABLE, "").split(os.pathsep) if path]


class _Folders:
    """Where modules below this one are looked for: the folders of the plugins, as the environment
    now says.
    """

    def __iter__(self):
        return iter(dict.fromkeys(str(path.parent) for path in _files()))


__path__ = _Folders()


class PluginError(UserError):
    """A plugin that is not there, or cannot be imported."""


class _OfBytes(importlib.machinery.SourceFileLoader):
    """Runs the very bytes whose digest is kept, not what a cache has of a file of the same time and
    size.
    """

    def __init__(self, name: str, path: str, source: bytes) -> None:
        super().__init__(name, path)
        self._source = source

    def path_stats(self, path: str) -> dict:
        raise OSError("no cache")

    def get_data(self, path: str) -> bytes:
        return self._source


def load_plugins(text: str = "") -> dict[str, str]:
    """Import plugins, those of the environment, and those that installed packages bring; gives what
    `loaded_plugins` does.

    text: paths of Python files, commas between them. One that is loaded already is left alone.

    Raises PluginError in one line: the file, the line in it, what went wrong.
    """
    for path in [*_files(), *(Path(part.strip()) for part in text.split(",") if part.strip())]:
        _load_file(path)
    for point in importlib.metadata.entry_points(group=GROUP):
        _load_entry(point)
    return loaded_plugins()


def loaded_plugins() -> dict[str, str]:
    """sha256 (hex) of every plugin of this process, by its file's name, or by an entry point's
    package and name.
    """
    return dict(_digests)


def reasons_against(then: dict[str, str]) -> list[str]:
    """Why the plugins of this process are not those of a row, a line each; none where all of them
    are here as they were.
    """
    reasons = []
    for name, sha256 in then.items():
        now = _digests.get(name)
        if now is None:
            given = (
                f"plugins=<path of {name}>"
                if name.endswith(".py")
                else f"the package {name.partition(':')[0]}"
            )
            near = did_you_mean(name, _digests) if _digests else ""
            reasons.append(f"the plugin {name} is not loaded{near}; use {given}")
        elif now != sha256:
            reasons.append(
                f"the plugin {name} has the sha256 {now[:12]} now, the row's had {sha256[:12]}"
            )
    return reasons


def _load_file(path: Path) -> None:
    if path.suffix != ".py" or not path.is_file():
        raise PluginError(
            f"plugins={path}: there is no such Python file; write the path of a .py file"
        )
    if not re.fullmatch(r"[A-Za-z_]\w*", path.stem):
        raise PluginError(
            f"plugins={path}: cannot be the name of a module; use letters, digits and _ before .py"
        )
    full = path.resolve()
    same = [other for other in _files() if other.stem == full.stem]
    if same and same[0] != full:
        raise PluginError(f"plugins={path}: {same[0]} has the same name; rename one of them")
    if path.name in _digests:
        return
    name, source = f"{__name__}.{full.stem}", full.read_bytes()
    if not same:
        os.environ[VARIABLE] = os.pathsep.join(map(str, [*_files(), full]))
    if name not in sys.modules:  # else an object that came from another process has brought it
        _run(name, source, path, full)
    _digests[path.name] = hashlib.sha256(source).hexdigest()


def _run(name: str, source: bytes, path: Path, full: Path) -> None:
    loader = _OfBytes(name, str(full), source)
    spec = importlib.util.spec_from_file_location(name, full, loader=loader)
    assert spec is not None  # it has its loader
    module = sys.modules[name] = importlib.util.module_from_spec(spec)
    try:
        loader.exec_module(module)
    except Exception as error:
        sys.modules.pop(name, None)
        os.environ[VARIABLE] = os.pathsep.join(str(other) for other in _files() if other != full)
        raise PluginError(f"{_place(path, full, error)}: {_reason(error)}") from None


def _load_entry(point: importlib.metadata.EntryPoint) -> None:
    assert point.dist is not None  # the package that has it installed
    name = f"{point.dist.name}:{point.name}"
    if name in _digests:
        return
    try:
        module = importlib.import_module(point.module)
        point.load()
    except Exception as error:
        raise PluginError(
            f"the plugin {name} ({point.value}): {_reason(error)}; fix it, or uninstall it"
        ) from None
    file = getattr(module, "__file__", None)
    content = Path(file).read_bytes() if file else point.value.encode()
    _digests[name] = hashlib.sha256(content).hexdigest()


def _place(path: Path, full: Path, error: Exception) -> str:
    """The file as the user wrote it, and the line where importing it failed."""
    if isinstance(error, SyntaxError) and error.filename == str(full):
        return f"{path}:{error.lineno}"
    lines = [
        frame.lineno
        for frame in traceback.extract_tb(error.__traceback__)
        if frame.filename == str(full)
    ]
    return f"{path}:{lines[-1]}" if lines else str(path)


def _reason(error: Exception) -> str:
    message = printable(
        " ".join((error.msg if isinstance(error, SyntaxError) else str(error)).split())
    )
    return (
        message
        if isinstance(error, UserError)
        else f"{type(error).__name__}: {message}"
        if message
        else type(error).__name__
    )
