"""sort=, columns= and filter= of make table: the cells and columns to show."""

from __future__ import annotations

import ast
import operator
import re
import warnings
from collections.abc import Callable, Collection
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

from trainer.base.errors import UserError, did_you_mean
from trainer.report.tables import CellSummary, Costs, Table

Fields = dict[str, Any]  # of one cell, by field name; None where there is no value
_Line = tuple[CellSummary, Fields]

# Columns as a user names them, and the fields that each shows.
COLUMNS: dict[str, tuple[str, ...]] = {
    "group": ("group",),
    "cell": ("cell",),
    "n": ("n",),
    "mean": ("metric", "mean", "std"),
    "difference": ("difference", "low", "high"),
    "p": ("p", "test"),
    "seeds_needed": ("smallest", "seeds_needed", "seeds_needed_pooled", "std_pooled"),
    "published": ("published",),
    "train_s": ("train_s", "train_s_low", "train_s_high"),
    "images_per_s": ("step_s", "images_per_s"),
    "peak_mem_mib": ("peak_mem_mib", "peak_mem_mib_low", "peak_mem_mib_high"),
    "num_params": ("num_params",),
    "gmacs": ("gmacs",),
    "marks": ("marks",),
    "set": ("set",),
}
COST_COLUMNS = ("train_s", "images_per_s", "peak_mem_mib", "num_params", "gmacs")
DEFAULT_COLUMNS = tuple(name for name in COLUMNS if name not in ("group", "set"))
FIELDS = tuple(field for fields in COLUMNS.values() for field in fields)
_TEXT_FIELDS = ("group", "cell", "metric", "test", "marks", "set")


@dataclass(frozen=True)
class View:
    """The part of a table to show. columns: in order; factors of the ablation may be among them."""

    table: Table
    columns: tuple[str, ...]
    is_whole: bool


def make_view(table: Table, sort: str = "", columns: str = "", filter_: str = "") -> View:
    """The cells and columns asked for; p stays corrected for all comparisons of the whole table.

    sort: column names, `-name` for descending; cells keep to their groups, missing values come
    last. columns: names separated by spaces or commas. filter_: such as `mean > 90 and "norm" in
    cell`.

    Raises UserError for an unknown column and for a filter that is no comparison of columns.
    """
    shown = _parse_columns(columns, (*COLUMNS, *factors_of(table)))
    known = (*FIELDS, *factors_of(table))
    lines = list(zip(table.cells, fields_of(table), strict=True))
    if filter_:
        matches = _Filter(filter_, known).matches
        lines = [(summary, fields) for summary, fields in lines if matches(fields)]
    cells = [summary for summary, _ in _sorted(lines, sort, known)]
    group_order = list(table.groups)
    cells.sort(key=lambda summary: group_order.index(summary.cell.group))
    return View(replace(table, cells=tuple(cells)), shown, not (sort or columns or filter_))


def factors_of(table: Table) -> tuple[str, ...]:
    """The ablation's factors, except those with the name of a built-in column."""
    factors = dict.fromkeys(factor for summary in table.cells for factor, _ in summary.cell.levels)
    return tuple(name for name in factors if name not in FIELDS and name not in COLUMNS)


def fields_of(table: Table) -> list[Fields]:
    """All values of each cell, unrounded, in the units of the rows; factor levels as text."""
    factors = factors_of(table)
    return [
        dict.fromkeys(factors) | dict(summary.cell.levels) | _own_fields(table, summary)
        for summary in table.cells
    ]


def _own_fields(table: Table, summary: CellSummary) -> Fields:
    difference, costs = summary.difference, summary.costs
    fields = dict.fromkeys(FIELDS) | {
        "group": summary.cell.group,
        "cell": summary.cell.name,
        "n": len(summary.values),
        "metric": table.metric.name,
        "mean": summary.mean,
        "std": summary.std,
        "p": summary.p_holm,
        "published": summary.cell.published,
        "marks": "; ".join(summary.marks),
        "set": summary.cell.overrides,
    }
    if difference:
        fields |= {"difference": difference.value, "low": difference.low, "high": difference.high}
        fields["test"] = difference.kind if summary.p_holm is not None else None
    if needed := summary.needed:
        fields |= {"smallest": table.smallest, "seeds_needed": needed.num_seeds}
        fields |= {"seeds_needed_pooled": needed.pooled_seeds, "std_pooled": needed.pooled_std}
    return fields | (_cost_fields(costs) if costs else {})


def _cost_fields(costs: Costs) -> Fields:
    """The costs, and the ends of those that have a range."""
    ends = {
        f"{name}_{end}": value
        for name, range_ in costs.ranges.items()
        for end, value in zip(("low", "high"), range_, strict=True)
    }
    names = ("step_s", *COST_COLUMNS)
    return {name: getattr(costs, name) for name in names} | ends


def field_names(columns: Collection[str]) -> list[str]:
    """The fields that some columns show."""
    return [field for name in columns for field in COLUMNS.get(name, (name,))]


def _parse_columns(text: str, known: Collection[str]) -> tuple[str, ...]:
    names = _split_names(text)
    if not names:
        return DEFAULT_COLUMNS
    for name in names:
        _check_known(name, known, f"columns={name}")
        if names.count(name) > 1:
            raise UserError(f"columns={text}: duplicate column {name}; list each column once")
    return names


def _sorted(lines: list[_Line], sort: str, known: Collection[str]) -> list[_Line]:
    for key in reversed(_split_names(sort)):  # sorting is stable: the first key is applied last
        name, is_descending = key.removeprefix("-"), key.startswith("-")
        _check_known(name, known, f"sort={name}")
        lines = _sorted_by(lines, name, is_descending)
    return lines


def _sorted_by(lines: list[_Line], name: str, is_descending: bool) -> list[_Line]:
    present = [line for line in lines if line[1][name] is not None]
    missing = [line for line in lines if line[1][name] is None]
    return sorted(present, key=lambda line: line[1][name], reverse=is_descending) + missing


def _split_names(text: str) -> tuple[str, ...]:
    return tuple(name for name in re.split(r"[\s,]+", text) if name)


def _check_known(name: str, known: Collection[str], place: str) -> None:
    if name not in known:
        raise UserError(
            f"{place}: unknown column{did_you_mean(name, known)}; valid: {', '.join(known)}"
        )


# ---- filter=

_MAX_FILTER_CHARS = 400  # also bounds the nesting, and so the recursion below
_EXAMPLE = 'example: filter="mean > 90 and n >= 3"'
_COMPARISONS: dict[type[ast.cmpop], Callable[[Any, Any], bool]] = {
    ast.Gt: operator.gt,
    ast.GtE: operator.ge,
    ast.Lt: operator.lt,
    ast.LtE: operator.le,
    ast.Eq: operator.eq,
    ast.NotEq: operator.ne,
    ast.In: lambda item, container: item in container,
    ast.NotIn: lambda item, container: item in container,  # negated where it is used
}


class _Operand(NamedTuple):
    """One side of a comparison. kind: "number", "text" or "list"."""

    kind: str
    is_column: bool
    value: Callable[[Fields], Any]


class _Filter:
    """A filter as a function of one cell's fields.

    The text is parsed by `ast` and its tree is checked and translated node by node, so nothing in
    it is ever executed: there is no eval, no call, no attribute access, no arithmetic.
    (`DataFrame.query` is no shortcut: `"norm" in cell` tests its index, a number compared with a
    text is silently false, and factors have dots in their names.)
    """

    def __init__(self, text: str, columns: Collection[str]) -> None:
        self.text, self.columns = text.strip(), columns
        if len(text) > _MAX_FILTER_CHARS:
            raise UserError(f"filter=: {len(text)} characters, the limit is {_MAX_FILTER_CHARS}")
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # SyntaxWarning, for example of an unknown escape
                tree = ast.parse(self.text, mode="eval").body
        except (SyntaxError, ValueError, MemoryError, RecursionError):
            raise UserError(f"filter={text}: not a comparison; {_EXAMPLE}") from None
        self.matches = self._condition(tree)

    def _condition(self, node: ast.expr) -> Callable[[Fields], bool]:
        if isinstance(node, ast.BoolOp):
            parts = [self._condition(value) for value in node.values]
            combine = all if isinstance(node.op, ast.And) else any
            return lambda fields: combine(part(fields) for part in parts)
        if isinstance(node, ast.UnaryOp) and isinstance(node.op, ast.Not):
            inner = self._condition(node.operand)
            return lambda fields: not inner(fields)
        if isinstance(node, ast.Compare):  # a < b < c is a < b and b < c
            sides = [node.left, *node.comparators]
            links = zip(sides, node.ops, sides[1:], strict=False)
            parts = [self._comparison(node, *link) for link in links]
            return lambda fields: all(part(fields) for part in parts)
        raise self._error(node, "not a comparison")

    def _comparison(
        self, node: ast.Compare, left: ast.expr, sign: ast.cmpop, right: ast.expr
    ) -> Callable[[Fields], bool]:
        """A missing value is neither above, below, equal to, unequal to nor in anything."""
        compare = _COMPARISONS.get(type(sign))
        if compare is None:
            raise self._error(node, "unsupported comparison, valid: < <= > >= == != in")
        a, b = self._operand(left), self._operand(right)
        if isinstance(sign, (ast.In, ast.NotIn)):
            is_choice = a.is_column and b.kind == "list"
            is_substring = not a.is_column and b.is_column and a.kind == b.kind == "text"
            if not (is_choice or is_substring):
                raise self._error(node, 'neither "text" in column nor column in (a, b)')
        elif "list" in (a.kind, b.kind) or not (a.is_column or b.is_column):
            raise self._error(node, "compares no column")
        elif a.kind != b.kind:
            raise self._error(node, f"compares a {a.kind} with a {b.kind}")
        is_negated = isinstance(sign, ast.NotIn)

        def holds(fields: Fields) -> bool:
            x, y = a.value(fields), b.value(fields)
            return is_negated != (x is not None and y is not None and compare(x, y))

        return holds

    def _operand(self, node: ast.expr) -> _Operand:
        if isinstance(node, (ast.Tuple, ast.List)):
            choices = [self._constant(choice) for choice in node.elts]
            return _Operand("list", False, lambda _: choices)
        name = _dotted_name(node)
        if name is not None:
            _check_known(name, self.columns, f"filter={name}")
            is_text = name in _TEXT_FIELDS or name not in FIELDS
            return _Operand("text" if is_text else "number", True, lambda fields: fields[name])
        value = self._constant(node)
        return _Operand("text" if isinstance(value, str) else "number", False, lambda _: value)

    def _constant(self, node: ast.expr) -> float | str:
        if isinstance(node, ast.Constant):
            value = node.value
            if isinstance(value, (int, float, str)) and not isinstance(value, bool):
                return value
        if isinstance(node, ast.UnaryOp) and isinstance(node.op, ast.USub):
            operand = self._constant(node.operand)
            if not isinstance(operand, str):
                return -operand
        raise self._error(node, "not a column, number or text")

    def _error(self, node: ast.expr, reason: str) -> UserError:
        part = ast.get_source_segment(self.text, node) or self.text
        return UserError(f"filter={part}: {reason}; {_EXAMPLE}")


def _dotted_name(node: ast.expr) -> str | None:
    """The name of a column; a factor such as `model.norm` parses as an attribute of a name."""
    if isinstance(node, ast.Name):
        return node.id
    if isinstance(node, ast.Attribute):
        prefix = _dotted_name(node.value)
        return f"{prefix}.{node.attr}" if prefix else None
    return None
