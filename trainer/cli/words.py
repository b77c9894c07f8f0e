"""Options as words, `recipe=A1 set="epochs=5"`: what make passes on, and what `rsb` takes beside
`--recipe A1`. One that a command does not have is refused with what to write instead.
"""

from __future__ import annotations

import difflib
import re
from collections.abc import Mapping, Sequence
from typing import Any

from trainer.base.errors import UserError
from trainer.cli.hints import HINTS, MORE_WORDS, described

WORD = re.compile(r"([A-Za-z_][\w.-]*)=(.*)", re.DOTALL)
ON, OFF = ("1", "yes", "true", "on"), ("0", "no", "false", "off", "")


def options_of(words: Sequence[str], group: Any) -> list[str]:
    """The command line with every word `name=value` as the option that it means.

    Without a command the words are those of `train`. group: the program's commands, as click has
    them. Raises UserError.
    """
    if words and WORD.fullmatch(words[0]):
        words = ["train", *words]
    command = group.commands.get(words[0]) if words else None
    if command is None:
        return list(words)
    known = _options(command)
    if command.context_settings.get(
        "ignore_unknown_options"
    ):  # of launch-slurm: train's own are passed on
        known = _options(group.commands["train"]) | known
    forms = {
        form: option for option in known.values() for form in (*option.opts, *option.secondary_opts)
    }
    made = [words[0]]
    given: set[str] = set()
    rest = iter(words[1:])
    for word in rest:
        found = WORD.fullmatch(word)
        if not found:
            made.append(word)
            form, equals, _ = word.partition("=")
            option = forms.get(form)
            if option is not None:
                _note(option, form, given)
                if not option.is_flag and not equals:
                    made.extend(value for value in [next(rest, None)] if value is not None)
            continue
        name, value = found[1].replace("-", "_"), found[2]
        if name not in known:
            raise _unknown(name, value, words[0], known, group)
        _note(known[name], f"{name}=", given)
        made += _as_option(name, value, known[name])
    return made


def _note(option: Any, form: str, given: set[str]) -> None:
    """Refuse an option that is given already, in whichever form: the parser would keep the last."""
    if option.name in given:
        raise UserError(f"{form} is given twice", "write all of it in one")
    given.add(option.name)


def _options(command: Any) -> dict[str, Any]:
    """The options that a user may write, by the names of their words."""
    return {
        form[2:].replace("-", "_"): option
        for option in command.params
        if not getattr(option, "hidden", False)
        for form in option.opts
        if form.startswith("--") and form != "--help"
    }


def help_text(name: str, group: Any, width: int) -> str:
    """What a command is for, and the words that it takes with their defaults, as make's user writes
    them.
    """
    command = group.commands[name]
    known = {
        f"{word}={'1' if option.is_flag else ''}": option
        for word, option in _options(command).items()
    }
    words = {}
    for word, option in known.items():
        default = option.default
        has_default = default not in (None, "") and default is not False
        words[word] = f"{in_words(option.help or '')}{f' [{default}]' if has_default else ''}"
    words |= {f"{word}=": said for word, said in MORE_WORDS.get(name, {}).items()}
    return described(name, in_words(command.help or ""), words, width)


def in_words(text: str) -> str:
    """A help text with its options as words: `--gpus` is gpus=."""
    return re.sub(r"--([a-z][\w-]*+)(?!=)", lambda form: f"{form[1].replace('-', '_')}=", text)


def _as_option(name: str, value: str, option: Any) -> list[str]:
    form = next(form for form in option.opts if form.startswith("--"))
    if not option.is_flag:
        return [form, value]
    if value.lower() in ON:
        return [form]
    if value.lower() in OFF:
        return list(option.secondary_opts[:1])
    raise UserError(f"{name}={value}: not a switch", f"use {name}=1 or {name}=0")


def _unknown(
    name: str, value: str, command: str, known: Mapping[str, Any], group: Any
) -> UserError:
    found = f"{name}=: {command} does not take it"
    takers = [other for other, one in group.commands.items() if name in _options(one)]
    near = difflib.get_close_matches(name, known, 1)
    set_is_here = "set" in known
    if name in HINTS and (set_is_here or not HINTS[name].startswith("set=")):
        hint = HINTS[name].format(value)
        hint = hint if hint.startswith("nothing") else f"use {hint}"
    elif takers:
        hint = f"taken by: {', '.join(takers)}"
    elif near:
        hint = f"did you mean {near[0]}=?"
    elif known:
        hint = f"valid: {' '.join(f'{one}=' for one in known)}"
    else:
        hint = "it takes no options"
    return UserError(found, hint, kind="unknown_option")
