"""Errors carry fields, and their one line is made from them."""

import copy
import pickle

import pytest

from trainer.base.errors import ConfigError, OverrideError, UserError

FIELDS = {
    "hint": "write 5",
    "path": ("lr", "peak"),
    "kind": "missing",
    "place": "a.yaml",
    "line": 3,
}


@pytest.mark.parametrize(
    ("error", "line"),
    [
        (UserError("no place"), "no place"),
        (UserError("no folder", "use another", place="runs=x"), "runs=x: no folder; use another"),
        (ConfigError("none", **FIELDS), "a.yaml:3: none; write 5"),
        (
            ConfigError("zero", "write 1", can_be_off=True),
            "zero; write 1, or leave the key out to turn it off",
        ),
        (ConfigError("zero", can_be_off=True), "zero; leave the key out to turn it off"),
        (UserError("two\nlines \x1b[2J"), r"two\nlines \x1b[2J"),
    ],
)
def test_the_line_is_place_cause_and_remedy(error, line):
    assert str(error) == line


@pytest.mark.parametrize("pass_on", [copy.copy, lambda error: pickle.loads(pickle.dumps(error))])
def test_an_error_of_another_process_keeps_its_fields(pass_on):
    error = OverrideError("none", labels=("lr.peak",), **FIELDS)
    again = pass_on(error)
    assert type(again) is OverrideError and vars(again) == vars(error) and str(again) == str(error)


def test_an_error_raised_as_another_keeps_what_is_not_changed():
    error = ConfigError("none", **FIELDS).raised_as(
        OverrideError, place="set=lr.peak=", line=None, labels=("lr.peak",)
    )
    assert str(error) == "set=lr.peak=: none; write 5"
    assert (error.path, error.kind, error.labels) == (("lr", "peak"), "missing", ("lr.peak",))


def test_what_may_be_a_path_stays_whole_and_other_long_words_do_not():
    path = "/".join(["folder" * 10] * 10)
    assert path in str(UserError(f"{path}: not a recipe"))
    assert path in str(UserError("not a recipe", place=path))
    for text in ("x" * 5000, "a/" + "x" * 5000, "x y " * 5000, "\x1b" * 5000):
        for error in (UserError(f"recipe={text}: unknown"), UserError("unknown", place=text)):
            assert len(str(error)) < 250 and str(error).endswith(": unknown")
    assert len(str(UserError("a, b: c " * 5000))) <= 3000
