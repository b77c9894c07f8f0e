"""The columns of a table as words and numbers, before any format escapes them."""

from __future__ import annotations

from collections.abc import Callable

from trainer.base.stats import MOST_SEEDS
from trainer.report.query import COLUMNS, DEFAULT_COLUMNS, View
from trainer.report.tables import CellSummary, Metric, Needed

# What stands where a value would.
STATE_WORDS = {
    "finished": "finished",
    "diverged": "diverged",
    "failed": "failed",
    "missing": "no row",
    "no value": "no such score",
}
_LEAST_P = 0.001


def shown_columns(view: View) -> tuple[str, ...]:
    """The view's columns; of those that nobody asked for, the ones with something in them."""
    if view.columns != DEFAULT_COLUMNS:
        return view.columns
    always = ("cell", "n", "mean")
    return tuple(
        name
        for name in view.columns
        if name in always or any(text_of(view, one, name) for one in view.table.cells)
    )


def is_text(column: str) -> bool:
    """Words, not numbers: a factor's levels are words too."""
    return column in ("group", "cell", "marks", "set") or column not in COLUMNS


def heading_of(view: View, column: str) -> str:
    """The head of a column, its unit included."""
    metric = view.table.metric
    return {
        "mean": metric.heading,
        "difference": "difference [95 %]" if view.table.num_compared else "difference",
        "p": "p (Holm)",
        "seeds_needed": "seeds needed",
        "published": "published top-1 %",
        "train_s": "train s",
        "images_per_s": "images/s",
        "peak_mem_mib": "peak MiB",
        "num_params": "params M",
        "gmacs": "GMACs",
    }.get(column, column)


def text_of(view: View, one: CellSummary, column: str) -> str:
    """What stands in one column of a cell's line; empty where there is nothing to say."""
    told = _TOLD.get(column)
    return told(one, view.table.metric) if told else dict(one.cell.levels).get(column, "")


def number(value: float, digits: int, sign: str = "") -> str:
    """A number with so many digits behind the point; never -0.00."""
    text = f"{value:{sign}.{digits}f}"
    return text.replace("-", "+" if sign else "") if not text.strip("+-0.") else text


def _n(one: CellSummary, _: Metric) -> str:
    num_values, num_seeds = len(one.values), len(one.seeds)
    return str(num_values) if num_values == num_seeds else f"{num_values} of {num_seeds}"


def _mean(one: CellSummary, metric: Metric) -> str:
    if one.mean is None:
        return ", ".join(dict.fromkeys(STATE_WORDS[result.state] for result in one.seeds))
    spread = f" ± {number(one.std, metric.digits)}" if one.std is not None else ""
    return number(one.mean, metric.digits) + spread


def _difference(one: CellSummary, metric: Metric) -> str:
    if one.cell.is_base:
        return "base"
    found = one.difference
    if found is None:
        return ""
    value = number(found.value, metric.digits, sign="+")
    if found.low is None:
        return value
    return f"{value} [{number(found.low, metric.digits)}, {number(found.high, metric.digits)}]"


def _p(one: CellSummary, _: Metric) -> str:
    if one.p_holm is None:
        return ""
    return f"{one.p_holm:.3f}" if one.p_holm >= _LEAST_P else f"<{_LEAST_P}"


def needed_text(needed: Needed | None) -> str:
    """≈ where the spread is borrowed."""
    if needed is None:
        return ""
    about = "≈" if needed.origin != "measured" else ""
    return f"> {MOST_SEEDS:,}" if needed.num_seeds is None else f"{about}{needed.num_seeds:,}"


def _cost(key: str, unit: float = 1.0) -> Callable[[CellSummary, Metric], str]:
    def told(one: CellSummary, _: Metric) -> str:
        if one.costs is None:
            return ""
        value = getattr(one.costs, key) / unit
        return f"{value:,.0f}" if value >= 100 else f"{value:.3g}"

    return told


_TOLD: dict[str, Callable[[CellSummary, Metric], str]] = {
    "group": lambda one, _: one.cell.group,
    "cell": lambda one, _: one.cell.name,
    "n": _n,
    "mean": _mean,
    "difference": _difference,
    "p": _p,
    "seeds_needed": lambda one, _: needed_text(one.needed),
    "published": lambda one, _: "" if one.cell.published is None else f"{one.cell.published:g}",
    "train_s": _cost("train_s"),
    "images_per_s": _cost("images_per_s"),
    "peak_mem_mib": _cost("peak_mem_mib"),
    "num_params": _cost("num_params", unit=1e6),
    "gmacs": _cost("gmacs"),
    "marks": lambda one, _: "; ".join(one.marks),
    "set": lambda one, _: one.cell.overrides,
}
