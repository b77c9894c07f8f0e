"""Text to typed values: what misleads is one error with its line, and nothing ends in a traceback."""

import re
import time
from pathlib import Path
from typing import Annotated, Literal

import pytest
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic import Field

from trainer.base.component import Component, Positive, StrictModel
from trainer.base.errors import ConfigError, OverrideError
from trainer.models.spec import Pretrained
from trainer.recipe.load import load_yaml, parse, parse_recipe
from trainer.recipe.overrides import overrides_of
from trainer.recipe.profiles import Profile
from trainer.recipe.schema import Recipe
from trainer.recipe.shipped import find_recipe

A3 = find_recipe("A3.v1").read_text()
ONE_LINE = re.compile(r"page:[1-9][0-9]*: [^\n\r]+")


class Apple(Component):
    name: Literal["apple"]
    seeds: Annotated[int, Field(ge=0, lt=100)]
    is_red: bool = False


class Pear(Component):
    name: Literal["pear"]
    length: Positive
    sides: tuple[float, float]


class Basket(StrictModel):
    title: str
    weight: Positive
    size: Literal["small", "large"] | None = None
    first: Annotated[Apple | Pear, Field(discriminator="name")]
    others: tuple[Annotated[Apple | Pear, Field(discriminator="name")], ...] = ()


BASKET = """\
title: fruit
weight: 1.5
first:
  name: apple
  seeds: 5
others:
  - {name: pear, length: 2.0e-1, sides: [1, 2.5]}
"""


@pytest.mark.parametrize(
    "text", ["9" * 100_000 + "x", "1_" * 50_000 + "x", "." + "9" * 100_000 + "e", "9" * 100_000]
)
def test_no_text_takes_long_to_be_told_from_a_number(text):
    before_s = time.process_time()
    try:
        assert parse(f"a: {text}", "page")[0] == {"a": text}
    except ConfigError as error:
        assert ONE_LINE.fullmatch(str(error))
    assert time.process_time() - before_s < 2.0


def refusal(text: str, kind=Basket) -> ConfigError:
    with pytest.raises(ConfigError) as error:
        parse_recipe(text, "page", kind)
    assert ONE_LINE.fullmatch(str(error.value))
    assert str(error.value).startswith(f"page:{error.value.line}: ")
    return error.value


def test_a_page_becomes_typed_values_with_lines():
    basket, positions = parse_recipe(BASKET, "page", Basket)
    assert basket.first == Apple(name="apple", seeds=5)
    assert basket.others == (Pear(name="pear", length=0.2, sides=(1.0, 2.5)),)
    assert positions.line(("first", "seeds")) == 5
    assert positions.line(("others", 0, "sides")) == 7
    assert positions.line(("first", "not there")) == 3


@pytest.mark.parametrize(
    ("value", "found", "remedy"),
    [
        ("-.5e3", "text", "write -500.0"),
        ("1e400", "1e400 is no finite number", "write one"),
        ("'5e-3'", "weight is '5e-3'", "write a number"),
        ("08", "08 is text", "write 8"),
        ("08_", "weight is '08_'", "write a number"),
        ("no", "'no' is read as false", "write false"),
        ("On", "'On' is read as true", "write true"),
        ("TRUE", "'TRUE' is read as true", "write true"),
        ("1:30", "'1:30' is not read as it looks", "plain finite number"),
        ("010", "'010' is not read as it looks", "plain finite number"),
        ("0x1f", "'0x1f' is not read", "plain finite number"),
        ("1_000", "'1_000' is not read", "plain finite number"),
        ("1.", "'1.' is not read", "plain finite number"),
        (".inf", "'.inf'", "finite number"),
        (".nan", "'.nan'", "finite number"),
        ("1.0e+999", "'1.0e+999'", "finite number"),
        ("9" * 30, "9", "finite number"),
        ("nan", "'nan'", "write a number"),
        ("2026-11-21", "is read as a date", "quote it"),
        ("~", "'~' is read as null", "leave the key out"),
        ("", "'' is read as null", "leave the key out"),
        ("=", "'=' means something else", "quote it"),
        ("&a 1.5", "an anchor", "write the value out"),
        ("*a", "alias", "write the value out"),
        ("!!float 1.5", "the tag", "leave it out"),
        ("!!python/object/apply:os.getcwd []", "the tag", "leave it out"),
        ("'1.5'", "weight is '1.5'", "write a number"),
        ("true", "weight is true", "write a number"),
        ("[1.5]", "weight is a list of 1", "write a number"),
        ("-1.5", "weight is -1.5", "it must be above 0"),
        ('"\\ud800"', "cannot be printed", "leave it out"),
        ('"\\UFFFFFFFF"', "not YAML", "fix"),
        ("@x", "not YAML", "quote the text"),
    ],
)
def test_values_that_mislead_are_refused_with_their_line(value, found, remedy):
    text = BASKET.replace("weight: 1.5", f"weight: {value}")
    error = refusal(text)
    # PyYAML gives no place for an escape beyond Unicode.
    assert error.line == (1 if "UFFFFFFFF" in value else 2)
    assert found in error.found and remedy in str(error).removeprefix(error.found)


@pytest.mark.parametrize(
    ("old", "new", "line", "path", "kind", "words"),
    [
        ("weight: 1.5", "wieght: 1.5", 2, ("wieght",), "unknown_key", "did you mean weight?"),
        ("weight: 1.5\n", "", 1, (), "missing", "weight"),
        ("title: fruit\nweight: 1.5\n", "", 1, (), "missing", "title, weight"),
        (
            "seeds: 5",
            "sides: [1, 2]",
            5,
            ("first", "sides"),
            "unknown_key",
            "sides is a key of pear, not of apple",
        ),
        ("seeds: 5", "seed: 5", 5, ("first", "seed"), "unknown_key", "did you mean seeds?"),
        ("  seeds: 5\n", "", 3, ("first",), "missing", "seeds"),
        ("name: apple", "nmae: apple", 4, ("first", "nmae"), "unknown_key", "did you mean name?"),
        ("  name: apple\n", "", 3, ("first",), "missing", "one of apple, pear"),
        ("name: apple", "name: aple", 4, ("first", "name"), "unknown_name", "did you mean apple?"),
        ("name: apple", "name: 5", 4, ("first", "name"), "unknown_name", "known: apple, pear"),
        ("seeds: 5", "seeds: 100", 5, ("first", "seeds"), "less_than", "100; it must be below 100"),
        ("seeds: 5", "seeds: 5.0", 5, ("first", "seeds"), "int_type", "5.0; write a whole number"),
        (
            "seeds: 5",
            "seeds: 5\n  is_red: 1",
            6,
            ("first", "is_red"),
            "bool_type",
            "1; write true or false",
        ),
        (
            "weight: 1.5",
            "weight: 0",
            2,
            ("weight",),
            "greater_than",
            "it must be above 0",
        ),
        (
            "[1, 2.5]",
            "[1]",
            7,
            ("others", 0, "sides"),
            "missing",
            "others.pear.sides is a list of 1; write 2 values",
        ),
        ("[1, 2.5]", "[1, 2, 3]", 7, ("others", 0, "sides"), "too_long", "others.pear.sides"),
        (
            "title: fruit",
            "title: fruit\nsize: medium",
            2,
            ("size",),
            "literal_error",
            "write 'small' or 'large'",
        ),
    ],
)
def test_slips_are_refused_at_their_place(old, new, line, path, kind, words):
    assert old in BASKET
    error = refusal(BASKET.replace(old, new))
    assert (error.line, error.path, error.kind) == (line, path, kind)
    assert words in str(error)


@pytest.mark.parametrize(
    ("old", "new", "line", "words"),
    [
        (
            "weight: 1.5",
            "weight: 1.5\nweight: 2.5",
            3,
            "'weight' is written twice, first in line 2",
        ),
        ("{name: pear", "{<<: {}, name: pear", 7, "the merge key <<"),
        ("title: fruit", "title: fruit\non: 1", 2, "the key 'on' is not text"),
        ("title: fruit", "title: fruit\n? [a]\n: 1", 2, "a key that is a list"),
        ("weight: 1.5", "weight:\t1.5", 2, "a tab"),
        ("weight: 1.5", "weight: \x07", 2, r"the character '\x07'"),
        ("  name: apple", "\tname: apple", 4, "a tab"),
        ("others:", "...\n---\nothers:", 7, "a second document"),
    ],
)
def test_yaml_that_misleads_is_refused_at_its_line(old, new, line, words):
    assert old in BASKET
    error = refusal(BASKET.replace(old, new))
    assert error.line == line and words in error.found and error.hint


@pytest.mark.parametrize(
    ("kind", "page", "words"),
    [
        (
            Pretrained,
            "file: a\nsha256: abc\n",
            "sha256 is 'abc'; write 64 hex digits in small letters, as sha256sum prints them",
        ),
        (
            Recipe,
            A3.replace("name: A3", "name: A 3", 1),
            "name is 'A 3'; write letters A to Z, digits, - and _, the first",
        ),
        (
            Profile,
            (
                "name: a b\nnum_classes: 2\nnum_train: 5\nnum_val: 5\nmean: [0, 0, 0]\nstd: [1, 1,"
                " 1]\n"
            ),
            "write letters, digits and . +",
        ),
    ],
)
def test_a_text_of_other_letters_is_refused_by_what_it_is_made_of(kind, page, words):
    found = str(refusal(page, kind))
    assert words in found and "pattern" not in found and "matches" not in found


@pytest.mark.parametrize(
    "text", ["", "# nothing\n", "- 1\n- 2\n", "text", "5", "[" * 5000, "a:\n" + " a:" * 3000]
)
def test_what_is_no_page_is_refused(text):
    refusal(text)


def test_nesting_has_an_end():
    deep = "".join(f"{' ' * depth}a:\n" for depth in range(30))
    error = refusal(deep)
    assert error.line == 20 and "20 deep" in error.found


@pytest.mark.parametrize("text", ["5e-3", "1e-05", "1E5", "1.5e3", "2e+4", "6.0e-3"])
def test_an_exponent_makes_a_number_in_a_file_as_in_an_override(text):
    """Text in YAML 1.1 without a point and a sign; a number in 1.2, to Python and to a reader."""
    basket, _ = parse_recipe(BASKET.replace("weight: 1.5", f"weight: {text}"), "page", Basket)
    assert basket.weight == float(text)
    assert overrides_of(f"weight={text}") == {"weight": float(text)}


@pytest.mark.parametrize("text", ["no", "1:30", "08", "010", "1_000"])
def test_what_misleads_in_a_file_is_refused_in_an_override(text):
    refusal(BASKET.replace("weight: 1.5", f"weight: {text}"))
    with pytest.raises(OverrideError):
        overrides_of(f"weight={text}")


def test_files_that_are_no_pages_are_refused(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)

    def said(name: str, raw: bytes | None = None) -> str:
        if raw is not None:
            Path(name).write_bytes(raw)
        with pytest.raises(ConfigError) as error:
            load_yaml(Path(name), Basket)
        return str(error.value)

    Path("folder.yaml").mkdir()
    assert said("folder.yaml").startswith("folder.yaml:1: is a folder")
    assert said("absent.yaml").startswith("absent.yaml:1: is no file")
    assert said("large.yaml", b"#" * (256 * 1024 + 1)).startswith(
        "large.yaml:1: 262145 bytes; a recipe holds at most"
    )
    assert (
        said("latin.yaml", b"title: fruit\nweight: \xe9")
        == "latin.yaml:2: the byte 0xe9; save the recipe as UTF-8"
    )
    assert said("nul.yaml", b"title: fruit\n\0").startswith(r"nul.yaml:2: the character '\x00'")
    assert said("wide.yaml", BASKET.encode("utf-16")).startswith("wide.yaml:1: the byte 0xff")
    assert said("x" * 300).endswith(
        ":1: cannot be read (File name too long); check its path and permissions"
    )
    assert "\n" not in said("two\nlines.yaml", b"")


def test_a_byte_order_mark_and_windows_line_ends_are_read(tmp_path):
    path = tmp_path / "recipe.yaml"
    path.write_bytes(b"\xef\xbb\xbf" + BASKET.replace("\n", "\r\n").encode())
    basket, positions = load_yaml(path, Basket)
    assert basket.weight == 1.5 and positions.line(("first", "seeds")) == 5


def one_error_or_none(text: str) -> None:
    try:
        parse_recipe(text, "page", Recipe)
    except ConfigError as error:
        assert ONE_LINE.fullmatch(str(error))
        assert int(str(error).split(":")[1]) <= len(re.split("\r\n|\r|\n", text))


MARKS = "abc:- {}[]#&*!|>%@`'\"\\,?=<~.0159eE+_\n\n\t\r\x00\x85\u2028\ufeff\u00e9\U0001f600"
WORDS = [
    "name",
    "version",
    "epochs",
    "batch",
    "images",
    "lr",
    "peak",
    "loss",
    "bce",
    "threshold",
    "augment",
    "flip",
    "mix",
    "null",
    "on",
    "5e-3",
    "1:30",
]


@settings(max_examples=400)
@given(
    st.lists(
        st.text(MARKS, max_size=8) | st.sampled_from(WORDS) | st.text(max_size=3), max_size=12
    ).map("".join)
)
def test_made_up_text_never_ends_in_a_traceback(text):
    one_error_or_none(text)


@settings(max_examples=60)
@given(st.integers(0, len(A3)), st.integers(0, 40), st.text(MARKS, max_size=6))
def test_a_damaged_page_never_ends_in_a_traceback(start, num_lost, inserted):
    one_error_or_none(A3[:start] + inserted + A3[start + num_lost :])


SCALARS = st.none() | st.booleans() | st.integers() | st.floats() | st.dates() | st.text(max_size=4)
NAMES = st.sampled_from([*Recipe.model_fields, *WORDS]) | st.text(max_size=3)
STRUCTURES = st.recursive(
    SCALARS | st.sampled_from(["bce", "lamb", "cosine", "flip", "resnet50"]),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(NAMES, inner, max_size=4),
    max_leaves=15,
)


@settings(max_examples=150)
@given(st.dictionaries(NAMES, STRUCTURES, max_size=6))
def test_made_up_structures_never_end_in_a_traceback(structure):
    one_error_or_none(yaml.safe_dump(structure, allow_unicode=True))


@settings(max_examples=60)
@given(
    st.sampled_from(sorted(set(Recipe.model_fields) - {"assumed", "published", "per_model"})),
    STRUCTURES,
)
def test_a_page_with_a_made_up_part_never_ends_in_a_traceback(key, structure):
    page = {**yaml.safe_load(A3), "published": [], "per_model": {}, key: structure}
    one_error_or_none(yaml.safe_dump(page))


@settings(max_examples=100)
@given(raw=st.binary(max_size=60))
def test_noise_never_ends_in_a_traceback(raw, tmp_path_factory):
    path = tmp_path_factory.getbasetemp() / "noise.yaml"
    path.write_bytes(raw)
    with pytest.raises(ConfigError):
        load_yaml(path, Recipe)
