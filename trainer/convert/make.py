"""From a command of another program to a recipe, and the file of it."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from timm.models import is_model

from trainer.base.errors import ConfigError, UserError, did_you_mean, printable
from trainer.convert import from_convnext, from_timm, from_torchvision, timm_flags
from trainer.convert.command_text import Command, find_command, read_source
from trainer.convert.draft import Draft
from trainer.convert.flags import Args, Flag, read_mapping, read_words
from trainer.models.zoo import timm_name, torchvision_models
from trainer.recipe.check import check
from trainer.recipe.schema import Recipe

_LONGEST_SOURCE = 1500


@dataclass(frozen=True)
class Program:
    """Another program. scripts: what its commands run. defaults: those of a version.

    gpus_of: the GPUs that a script's own arguments name, if they do.
    """

    title: str
    scripts: tuple[str, ...]
    flags: tuple[Flag, ...]
    convert: Callable[[Draft, int], None]
    defaults: Callable[[str], Mapping[str, Any]] = lambda version: {}
    gpus_of: Callable[[str, Args], int | None] = lambda script, args: None


@dataclass(frozen=True)
class Made:
    """A recipe that was made, and what became of the command's other flags.

    lost: (flag with its value, why a recipe cannot say it): the recipe is another one by that.
    settings: (flag, what says it here). idle: given, but of no effect beside the others. data:
    facts of the data, which a profile holds. ignored: paths, logging and the like.
    """

    recipe: Recipe
    model: str
    lost: tuple[tuple[str, str], ...]
    settings: tuple[tuple[str, str], ...]
    idle: tuple[str, ...]
    data: tuple[str, ...]
    ignored: tuple[str, ...]

    @property
    def has_model(self) -> bool:
        """Is it a name that `model=` takes?"""
        return is_model(timm_name(self.model))

    def to_yaml(self) -> str:
        """The file: what a recipe cannot say stands in comments above it."""
        rows = [
            *(("cannot be said:", f"{flag}: {why}") for flag, why in self.lost),
            *(
                ("settings of a run, not of a recipe:", f"{flag}: {how}")
                for flag, how in self.settings
            ),
            *(("without effect in that command:", flag) for flag in self.idle),
            *(("facts of the data, see its profile:", flag) for flag in self.data),
            *(("ignored:", flag) for flag in self.ignored),
        ]
        lines, title = [f"# {self.recipe.title}. Check it before you cite it."], ""
        for heading, row in rows:
            lines += [f"# {heading}"] if heading != title else []
            lines.append(f"#   {printable(row)}")
            title = heading
        return "\n".join([*lines, self.recipe.to_yaml()])


def _timm_defaults(version: str) -> Mapping[str, Any]:
    if not version:
        return {}
    found = re.match(r"(\d+)\.(\d+)", version)
    if not found:
        raise UserError(f"version={version}", "write one of timm's, such as 0.5.4")
    at = int(found[1]), int(found[2])
    return next((values for before, values in timm_flags.OLD_DEFAULTS if at < before), {})


PROGRAMS = {
    "timm": Program(
        "timm's train.py",
        ("train.py", "distributed_train.sh"),
        timm_flags.FLAGS,
        from_timm.convert,
        _timm_defaults,
    ),
    "torchvision": Program(
        "torchvision's train.py", ("train.py",), from_torchvision.FLAGS, from_torchvision.convert
    ),
    "convnext": Program(
        "ConvNeXt's main.py",
        ("main.py", "run_with_submitit.py"),
        from_convnext.FLAGS,
        from_convnext.convert,
        gpus_of=from_convnext.gpus_of_job,
    ),
}


def make_recipe(name: str, source: str, gpus: int | None = None, version: str = "") -> Made:
    """The recipe of a command of a program, `timm`, `torchvision` or `convnext`.

    source: the command, its flags alone, the path of a text file with it, or of an args.yaml. gpus:
    where the command's launcher does not say how many. version: of timm, whose defaults fill in.

    Raises UserError for what is no such command, or makes no recipe.
    """
    program = PROGRAMS[name]
    title = program.title.replace("timm", f"timm {version}", 1) if version else program.title
    text, data = read_source(source)
    if data is None:
        command = find_command(text, program.scripts)
        given = read_words(command.words, program.flags, title)
    else:
        command = Command(text, [])
        given = read_mapping(data, program.flags, title)
    known = {flag.key for flag in program.flags}
    unknown = {key: given.pop(key) for key in list(given) if key not in known}
    args = Args(title, program.flags, given, program.defaults(version), data is not None)
    launched = program.gpus_of(command.script, args) or command.gpus
    draft = Draft(args)
    program.convert(draft, _num_gpus(launched, gpus))
    if not launched and not gpus:
        draft.assumed["batch.images"] = "one GPU: the command names none; gpus= says how many"
    for key, value in unknown.items():
        near = did_you_mean(key, known)
        draft.lost.append((f"{key}: {value}", f"{title} has no such flag{near}"))
    draft.lost += [(args.written(flag.key), flag.note) for flag in args.unsayable()]
    return _made(draft, command.line)


def _num_gpus(launched: int | None, gpus: int | None) -> int:
    if launched and gpus and launched != gpus:
        raise UserError(f"gpus={gpus}: the command runs on {launched}", "leave gpus= out")
    return launched or gpus or 1


def _made(draft: Draft, written: str) -> Made:
    args = draft.args
    model = str(args["model"])
    slug = re.sub(r"[^A-Za-z0-9_-]+", "-", model.rpartition("/")[2]).strip("-_") or "model"
    about = {
        "name": f"my-{slug}",
        "version": 1,
        "title": printable(f"{model}, made from a command of {args.program}"),
        "source": printable(f"{args.program}: {written}"[:_LONGEST_SOURCE]),
    }
    try:
        recipe = check(Recipe, {**about, **draft.recipe()})
    except ConfigError as error:
        raise error.raised_as(UserError, place="args") from None
    is_torchvisions = args.program == PROGRAMS["torchvision"].title
    return Made(
        recipe,
        torchvision_models.name_where_timm_lacks_it(model) if is_torchvisions else model,
        tuple(draft.lost),
        tuple((args.written(flag.key), flag.note) for flag in args.of_fate("setting")),
        tuple(args.written(flag.key) for flag in args.unread()),
        tuple(args.written(flag.key) for flag in args.of_fate("data")),
        tuple(args.written(flag.key) for flag in args.of_fate("nothing")),
    )


def write_recipe(made: Made, out: Path | None) -> Path:
    """The new file, by default my-<model>.v1.yaml in the current folder.

    Raises UserError for a name that is no recipe's, and a file that is there or cannot be written.
    """
    recipe = made.recipe
    if out is not None:
        stem = re.fullmatch(r"([A-Za-z0-9][A-Za-z0-9_-]*)\.v([1-9]\d{0,3})\.yaml", out.name)
        if not stem:
            hint = f"write out={recipe.name}.v{recipe.version}.yaml, or another name with a version"
            raise UserError(f"out={printable(str(out))}: a recipe's file is <name>.v1.yaml", hint)
        changed = recipe.model_copy(update={"name": stem[1], "version": int(stem[2])})
        made = Made(**{**vars(made), "recipe": changed})
    path = out or Path(f"{recipe.name}.v{recipe.version}.yaml")
    try:
        with path.open("x", encoding="utf-8") as file:
            file.write(made.to_yaml())
    except FileExistsError:
        raise UserError(f"{path}: is there already", "write out=<another name>.v1.yaml") from None
    except OSError as error:
        raise UserError(f"{path}: cannot be written ({error.strerror})", "write out=...") from None
    return path
