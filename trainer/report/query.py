"""sort=, columns= and filter=: what a user asks of a table, as text.

A filter is read by Python's own parser and walked here over a list of what may stand in it: comparisons of columns with
numbers and texts, `and`, `or`, `not`, `in`. Nothing of it is ever run: no call, no attribute of an object, no arithmetic.
"""

from __future__ import annotations

import ast
import operator
import re
import warnings
from collections.abc import Collection
from dataclasses import dataclass, replace

import pandas as pd

from trainer.base.errors import UserError, did_you_mean
from trainer.report.tables import CellSummary, Table

_LONGEST_FILTER = 400  # so that none nests deeper than Python walks
_EXAMPLE = 'try filter="mean > 90 and n >= 3"'
_COMPARED = {
    ast.Gt: operator.gt,
    ast.GtE: operator.ge,
    ast.Lt: operator.lt,
    ast.LtE: operator.le,
    ast.Eq: operator.eq,
    ast.NotEq: operator.ne,
}

# Columns as a user names them, and the fields of the frame that each shows.
COLUMNS: dict[str, tuple[str, ...]] = {
    "group": ("group",),
    "cell": ("cell",),
    "n": ("n",),
    "mean": ("metric", "mean", "std"),
    "difference": ("difference", "low", "high"),
    "p": ("p", "test"),
    "seeds_needed": ("seeds_needed",),
    "published": ("published",),
    "train_s": ("train_s",),
    "images_per_s": ("images_per_s",),
    "peak_mem_mib": ("peak_mem_mib",),
    "num_params": ("num_params",),
    "gmacs": ("gmacs",),
    "marks": ("marks",),
    "set": ("set",),
}
COST_COLUMNS = ("train_s", "images_per_s", "peak_mem_mib", "num_params", "gmacs")
DEFAULT_COLUMNS = tuple(name for name in COLUMNS if name not in ("group", "set"))
_TEXT_FIELDS = ("group", "cell", "metric", "test", "marks", "set")
_WHOLE_FIELDS = ("n", "num_params", "seeds_needed")


@dataclass(frozen=True)
class View:
    """A table as it was asked for. columns: in the order shown; factors of the ablation may be among them."""

    table: Table
    columns: tuple[str, ...]
    is_whole: bool


def make_view(table: Table, sort: str = "", columns: str = "", filter_: str = "") -> View:
    """The cells and columns asked for; p stays that of the whole table.

    sort: columns, a minus in front for the largest first; within groups, cells without a value last. columns: names with
    spaces or commas between. filter_: such as `mean > 90 and "norm" in cell`.

    Raises UserError for a column that there is not and a filter that says something else.
    """
    is_whole = not (sort or columns or filter_)
    shown = _columns(table, columns)
    frame = frame_of(table)
    if filter_:
        frame = frame[_Filter(frame, filter_).mask()]
    if sort:
        frame = _sorted(frame, sort)
    cells = tuple(table.cells[place] for place in frame.index)
    order = list(table.groups)
    in_groups = tuple(sorted(cells, key=lambda one: order.index(one.cell.group)))
    return View(replace(table, cells=in_groups), shown, is_whole)


def frame_of(table: Table) -> pd.DataFrame:
    """One line for each cell: all that has a number, in its own unit, and each factor's level as text."""
    frame = pd.DataFrame([{"metric": table.metric.name} | _fields(one) for one in table.cells])
    types = {
        name: "Int64" if name in _WHOLE_FIELDS else "string" if name in _TEXT_FIELDS else "Float64"
        for name in _FIELDS
    }
    types |= {name: "string" for name in factors_of(table)}
    return frame.reindex(columns=list(types)).astype(types)


def factors_of(table: Table) -> tuple[str, ...]:
    """The factors of the ablation that are no column by name already."""
    found = dict.fromkeys(factor for one in table.cells for factor, _ in one.cell.levels)
    return tuple(factor for factor in found if factor not in _FIELDS and factor not in COLUMNS)


_FIELDS = tuple(field for fields in COLUMNS.values() for field in fields)


def _fields(one: CellSummary) -> dict:
    difference, costs = one.difference, one.costs
    shown = {
        "group": one.cell.group,
        "cell": one.cell.name,
        "n": len(one.values),
        "mean": one.mean,
        "std": one.std,
        "p": one.p_holm,
        "seeds_needed": one.needed.num_seeds if one.needed else None,
        "published": one.cell.published,
        "marks": "; ".join(one.marks),
        "set": one.cell.overrides,
    }
    if difference:
        shown |= {"difference": difference.value, "low": difference.low, "high": difference.high}
        shown["test"] = difference.kind if one.p_holm is not None else None
    if costs:
        shown |= vars(costs)
    return dict(one.cell.levels) | shown


def _columns(table: Table, columns: str) -> tuple[str, ...]:
    if not columns:
        return DEFAULT_COLUMNS
    known = (*COLUMNS, *factors_of(table))
    names = tuple(re.split(r"[\s,]+", columns.strip(" ,\t\n")))
    for name in names:
        if name not in known:
            raise UserError(
                f"columns={name}: no column{did_you_mean(name, known)}; there are {', '.join(known)}"
            )
        if names.count(name) > 1:
            raise UserError(f"columns={columns}: {name} is there twice; name it once")
    return names


def _sorted(frame: pd.DataFrame, sort: str) -> pd.DataFrame:
    words = re.split(r"[\s,]+", sort.strip(" ,\t\n"))
    names = [word.removeprefix("-") for word in words]
    for name in names:
        _check_field(frame, name, f"sort={name}")
    down = [word.startswith("-") for word in words]
    return frame.sort_values(
        names, ascending=[not one for one in down], kind="stable", na_position="last"
    )


def _check_field(frame: pd.DataFrame, name: str, where: str) -> None:
    if name not in frame.columns:
        known = list(frame.columns)
        raise UserError(
            f"{where}: no column{did_you_mean(name, known)}; there are {', '.join(known)}"
        )


class _Filter:
    """A filter's text over a frame. A value that is not there is neither above nor below nor equal to anything."""

    def __init__(self, frame: pd.DataFrame, text: str) -> None:
        self.frame, self.text = frame, text

    def mask(self) -> pd.Series:
        """Which lines it keeps. Raises UserError naming the part that may not stand in a filter."""
        if len(self.text) > _LONGEST_FILTER:
            raise UserError(
                f"filter=: {len(self.text)} characters; write at most {_LONGEST_FILTER}"
            )
        try:
            with warnings.catch_warnings():
                warnings.simplefilter(
                    "ignore"
                )  # what Python warns of in such text is refused below
                parsed = ast.parse(self.text.strip(), mode="eval").body
        except (SyntaxError, ValueError, MemoryError, RecursionError):
            raise UserError(f"filter={self.text}: not a comparison; {_EXAMPLE}") from None
        return self._truth(parsed)

    def _truth(self, node: ast.expr) -> pd.Series:
        if isinstance(node, ast.BoolOp):
            first, *others = map(self._truth, node.values)
            for other in others:
                first = first & other if isinstance(node.op, ast.And) else first | other
            return first
        if isinstance(node, ast.UnaryOp) and isinstance(node.op, ast.Not):
            return ~self._truth(node.operand)
        if isinstance(node, ast.Compare):
            return self._compared(node)
        raise self._refusal(node, "is no comparison")

    def _compared(self, node: ast.Compare) -> pd.Series:
        """`a < b`, and `a < b < c` as Python means it."""
        mask, left = pd.Series(True, index=self.frame.index), node.left
        for sign, right in zip(node.ops, node.comparators, strict=True):
            mask &= self._one(node, left, sign, right)
            left = right
        return mask

    def _one(
        self, node: ast.Compare, left: ast.expr, sign: ast.cmpop, right: ast.expr
    ) -> pd.Series:
        if isinstance(sign, (ast.In, ast.NotIn)):
            found = self._is_in(node, left, right)
            return ~found if isinstance(sign, ast.NotIn) else found
        if type(sign) not in _COMPARED:
            raise self._refusal(node, "compares in another way than < <= > >= == != in")
        a, b = self._value(left), self._value(right)
        if not isinstance(a, pd.Series) and not isinstance(b, pd.Series):
            raise self._refusal(node, "names no column")
        if _is_text(a) != _is_text(b):
            raise self._refusal(node, "compares a number with a text")
        return _COMPARED[type(sign)](a, b).fillna(False).astype(bool)

    def _is_in(self, node: ast.Compare, left: ast.expr, right: ast.expr) -> pd.Series:
        """`"norm" in cell`, or `n in (2, 3)`."""
        found = self._value(left)
        if isinstance(right, (ast.Tuple, ast.List)):
            choices = [self._value(one) for one in right.elts]
            if isinstance(found, pd.Series) and not any(
                isinstance(one, pd.Series) for one in choices
            ):
                return found.isin(choices).fillna(False).astype(bool)
        else:
            column = self._value(right)
            if isinstance(found, str) and isinstance(column, pd.Series) and _is_text(column):
                return column.str.contains(found, regex=False).fillna(False).astype(bool)
        raise self._refusal(node, 'is neither "text" in column nor column in (a, b)')

    def _value(self, node: ast.expr) -> pd.Series | float | str:
        """A column, a number or a text."""
        if isinstance(node, ast.Constant) and type(node.value) in (int, float, str):
            if isinstance(node.value, int) and abs(node.value) > 2**53:
                raise self._refusal(node, "is larger than any value here")
            return node.value
        if isinstance(node, ast.UnaryOp) and isinstance(node.op, ast.USub):
            value = self._value(node.operand)
            if isinstance(value, (int, float)):
                return -value
        name = _name(node)
        if name is None:
            raise self._refusal(node, "is no column, number or text")
        _check_field(self.frame, name, f"filter={name}")
        return self.frame[name]

    def _refusal(self, node: ast.expr, what: str) -> UserError:
        return UserError(
            f"filter={ast.get_source_segment(self.text.strip(), node) or self.text}: {what}; {_EXAMPLE}"
        )


def _name(node: ast.expr) -> str | None:
    """A column's name; a factor's may have points in it, which Python's parser takes for attributes."""
    if isinstance(node, ast.Name):
        return node.id
    inner = _name(node.value) if isinstance(node, ast.Attribute) else None
    return f"{inner}.{node.attr}" if inner else None


def _is_text(value: pd.Series | float | str) -> bool:
    return isinstance(value, str) or (
        isinstance(value, pd.Series) and pd.api.types.is_string_dtype(value)
    )


def field_names(columns: Collection[str]) -> list[str]:
    """The frame's fields that some columns show."""
    return [field for name in columns for field in COLUMNS.get(name, (name,))]
