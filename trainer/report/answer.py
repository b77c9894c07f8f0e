"""What a table says, in sentences worked out from its numbers."""

from __future__ import annotations

from collections.abc import Sequence

from trainer.base.plural import counted
from trainer.report.figures import SIGNIFICANT_P
from trainer.report.formats import format_number
from trainer.report.tables import CellSummary, Table

_MOST_NAMED = 4  # cells in one sentence


def answer(table: Table) -> tuple[str, ...]:
    """For each group: which cells are better or worse than their base beyond chance, and which may
    not be told apart from it.
    """
    sentences = []
    for group, cells in table.groups.items():
        prefix = f"{group}: " if len(table.groups) > 1 else ""
        sentences += [prefix + line for line in (*_of_group(table, cells), *_effects(table, group))]
    return tuple(sentences)


def _of_group(table: Table, cells: Sequence[CellSummary]) -> list[str]:
    scored = [one for one in cells if one.mean is not None]
    if not scored:
        return ["no run has a score yet."]
    sign = 1 if table.metric.is_share else -1  # of a loss the least is best
    best = max(scored, key=lambda one: sign * (one.mean or 0.0))
    lines = [f"highest {table.metric.label}: {_named(table, best)}."]
    if sign < 0:
        lines = [f"lowest {table.metric.label}: {_named(table, best)}."]
    base = next((one for one in scored if one.cell.is_base), None)
    if base is None or not any(one.difference for one in cells):
        return lines
    clear = [one for one in cells if one.p_holm is not None and one.p_holm < SIGNIFICANT_P]
    for word, side in (("better", sign), ("worse", -sign)):
        found = [one for one in clear if one.difference and one.difference.value * side > 0]
        found.sort(key=lambda one: -abs(one.difference.value if one.difference else 0.0))
        if found:
            lines.append(f"{word} than the base, {_named(table, base)}: {_listed(table, found)}.")
    return [*lines, *_open_sentences(table, cells, clear, base)]


def _open_sentences(
    table: Table, cells: Sequence[CellSummary], clear: Sequence[CellSummary], base: CellSummary
) -> list[str]:
    """What these runs leave open."""
    tested = [one for one in cells if one.p_holm is not None]
    compared = counted(table.num_compared, "comparison")
    alone = [one for one in cells if one.difference and one.difference.p is None]
    lines = []
    if tested and not clear:
        lines.append(
            f"no cell differs from the base, {_named(table, base)}, beyond chance "
            f"(p ≥ {SIGNIFICANT_P} after Holm's correction for {compared})."
        )
    elif len(tested) > len(clear):
        count = len(tested) - len(clear)
        lines.append(
            f"the difference{'s' * (count > 1)} of the other {counted(count, 'cell')} may be chance"
            f" (p ≥ {SIGNIFICANT_P} after Holm's correction for {compared})."
        )
    if alone:
        lines.append(
            f"{counted(len(alone), 'cell')} without an interval: nothing tells "
            f"{'its difference' if len(alone) == 1 else 'their differences'} from chance."
        )
    return lines


def _effects(table: Table, group: str) -> list[str]:
    """Which main effects and interactions of a full design are more than chance."""
    tested = [one for one in table.effects if one.group == group and one.p_holm is not None]
    if not tested:
        return []
    clear = [
        f"{one.factors}: {one.name} "
        f"({format_number(one.difference.value, table.metric.digits, '+')})"
        for one in sorted(tested, key=lambda one: one.p_holm or 0.0)
        if one.difference and one.p_holm is not None and one.p_holm < SIGNIFICANT_P
    ]
    if not clear:
        return [f"none of the {len(tested)} main effects and interactions is beyond chance."]
    more = f" and {len(clear) - _MOST_NAMED} more" if len(clear) > _MOST_NAMED else ""
    return [f"main effects and interactions beyond chance: {'; '.join(clear[:_MOST_NAMED])}{more}."]


def _named(table: Table, summary: CellSummary) -> str:
    unit = "\u00a0%" if table.metric.unit == "%" else f" {table.metric.unit}"
    assert summary.mean is not None
    return f"{summary.cell.name} ({format_number(summary.mean, table.metric.digits)}{unit})"


def _listed(table: Table, cells: Sequence[CellSummary]) -> str:
    texts = [
        f"{one.cell.name} ({format_number(one.difference.value, table.metric.digits, '+')})"
        for one in cells[:_MOST_NAMED]
        if one.difference
    ]
    more = len(cells) - len(texts)
    return ", ".join(texts) + (f" and {more} more" if more else "")
