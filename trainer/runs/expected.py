"""Is a run on the track of the earlier ones? Its score at every evaluation beside theirs.

Rows keep their main score by epoch (`Row.by_epoch_pct`). An evaluation is outside where one more
seed would be so low in one of a hundred, or more rarely in a long run; a run is off track after two
such evaluations in a row, or one that is ten times as unlikely.
"""

from __future__ import annotations

import contextlib
import statistics
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

from trainer.base.errors import UserError
from trainer.base.json_text import json_of
from trainer.base.plural import counted
from trainer.base.scores import main_score
from trainer.base.signals import Stopped
from trainer.base.stats import sigma_of, sigma_off, std_of
from trainer.recipe.identity import is_repetition
from trainer.recipe.plan import Plan
from trainer.recipe.schema import digest_of
from trainer.runs.results import Row, RowError, read_row, read_row_file, rows_folder

MOST_OUTSIDE = 0.01  # of the evaluations of healthy runs, on one side
MOST_OUTSIDE_IN_A_RUN = 0.1  # evaluations: of long runs so many times fewer
FAR_OUTSIDE = 0.1  # of these so many
FEWEST_SEEDS = 2

State = Literal["on track", "above", "below", "off track"]
Curve = Mapping[int, float]  # the main score in percent, by epoch from 1 on


class OffTrack(Stopped):
    """stop_if=off_track asks for the end of a run that is off track."""


@dataclass(frozen=True)
class Verdict:
    """One evaluation beside the same of earlier runs, scores in percent.

    sigma: how unlikely one more seed is so far from them, as sigmas of a normal distribution;
    below 0 where it is lower. state: "below" is a first evaluation outside, of which nothing
    follows yet. see: one of the earlier runs.
    """

    epoch: int
    score_pct: float
    mean_pct: float
    std_pct: float
    num_seeds: int
    sigma: float
    state: State
    see: str

    def __str__(self) -> str:
        off = f"{abs(self.sigma):.1f} sigma"
        verdict = {
            "on track": "on track",
            "above": f"{off} above",
            "below": f"{off} below; off track if the next is too",
            "off track": f"off track: {off} below, see {self.see}",
        }[self.state]
        return (
            f"epoch {self.epoch:>4}  {self.score_pct:.2f}, rows before {self.mean_pct:.2f} ±"
            f" {self.std_pct:.2f} ({self.num_seeds} seeds): {verdict}"
        )


def limits(num_epochs: int) -> tuple[float, float]:
    """Sigmas beyond which an evaluation of a run of so many epochs is outside, and far outside.

    As noise lasts from one evaluation to the next, two in a row are hardly rarer than one: a level
    that did not shrink would call a third of healthy runs of 300 epochs off track.
    """
    share = min(MOST_OUTSIDE, MOST_OUTSIDE_IN_A_RUN / num_epochs)
    return sigma_of(share), sigma_of(FAR_OUTSIDE * share)


class ExpectedCurve:
    """The curves of earlier runs, each of another seed.

    rows: with their scores by epoch, at least FEWEST_SEEDS of them, over the same images.
    """

    def __init__(self, rows: Sequence[Row]) -> None:
        self._rows = sorted(rows, key=lambda row: row.seed)
        self.num_seeds = len(rows)
        self.most_sigma, self.far_sigma = limits(self._rows[0].epochs)

    def verdict(self, curve: Curve, every_epochs: int = 1) -> Verdict:
        """What the last evaluation of a run says, given all so far. every_epochs: from one to the
        next; where that before the last is not known, the two are no pair.
        """
        epoch = max(curve)
        sigma, before = self._sigma(curve, epoch), self._sigma(curve, epoch - every_epochs)
        assert sigma is not None
        state: State = "on track"
        if sigma > self.most_sigma:
            state = "above"
        elif sigma < -self.most_sigma:
            is_again = before is not None and before < -self.most_sigma
            state = "off track" if is_again or sigma < -self.far_sigma else "below"
        scores = self._scores(epoch)
        return Verdict(
            epoch,
            curve[epoch],
            statistics.fmean(scores),
            std_of(scores) or 0.0,
            len(scores),
            sigma,
            state,
            self._rows[0].run,
        )

    def _sigma(self, curve: Curve, epoch: int) -> float | None:
        """Of one evaluation; None where there was none."""
        if epoch not in curve:
            return None
        return sigma_off(curve[epoch], self._scores(epoch), self._rows[0].num_val_images)

    def _scores(self, epoch: int) -> list[float]:
        return [row.by_epoch_pct[epoch - 1] for row in self._rows]


def expected_curve(
    results: Path,
    plan: Plan,
    data,
    expect: str,
    is_needed: bool,
    plan_of_recipe: Callable[[str], Plan],
) -> tuple[ExpectedCurve | None, str]:
    """(the curve that a run is compared with, a line about it, or ""): of the rows in the store
    with the run's resolved recipe, model and data, or of those that `expect` names.

    expect: a run, for all seeds of its recipe; <ablation>/<cell>; or a recipe, as it runs on the
    plan's model and data. is_needed: is it an error that there are too few? plan_of_recipe: the
    plan of such a recipe.

    Raises UserError for an `expect` that names nothing, and where there are too few.
    """
    prefix, is_one = _chosen(results, plan, expect, plan_of_recipe)
    named = list(_rows(results, prefix, is_one))
    rows = {row.seed: row for row in reversed(named) if _is_like(row, plan, data)}
    what = f"of {expect}" if expect else "of this recipe, model and data"
    if len(rows) >= FEWEST_SEEDS:
        curve = ExpectedCurve(list(rows.values()))
        return curve, f"expected   each evaluation is compared with {len(rows)} earlier rows {what}"
    found = (
        f"{len(rows)} of the {len(named)} rows {what} {'is a' if len(rows) == 1 else 'are'}"
        f" finished run{'s' * (len(rows) != 1)} of another seed on these images over"
        f" {counted(plan.recipe.epochs, 'epoch')} with scores by epoch; {FEWEST_SEEDS} are needed"
    )
    if expect or is_needed:
        option = f"expect={expect}" if expect else "stop_if=off_track"
        raise UserError(f"{option}: {found}", "run other seeds first, or name others by expect=")
    return None, f"expected   nothing yet: {found}" if rows else ""


def _chosen(
    results: Path, plan: Plan, expect: str, plan_of_recipe: Callable[[str], Plan]
) -> tuple[str, Callable[[Row], bool]]:
    """(how the run names of the rows begin, is a row one of those that were asked for?)."""
    named = read_row(results, Path(expect).name) if expect else None  # its folder names it too
    if named is not None:
        of = named
        prefix = f"{of.recipe}.v{of.version}-{of.model}-{of.data}-s"
        return prefix, lambda row: _science(row) == _science(of)
    ablation, _, cell = expect.rpartition("/")
    if ablation and not expect.endswith((".yaml", ".yml")):
        return "", lambda row: (row.ablation, row.cell) == (ablation, cell)
    wanted = plan_of_recipe(expect) if expect else plan
    prefix = wanted.identity.prefix.removesuffix(f"{wanted.seed}-")
    return prefix, lambda row: replace(wanted, seed=row.seed).identity.is_of(row)


def _science(row: Row) -> tuple:
    """All of a row that may change its score, but for its seed and images."""
    recipe = digest_of(row.resolved_recipe) if row.resolved_recipe else row.run
    return recipe, row.model, row.data, row.bad_images, sorted(row.plugins.values())


def _rows(results: Path, prefix: str, is_one: Callable[[Row], bool]) -> Iterator[Row]:
    """Rows by their run's name; a damaged one is nobody's."""
    for path in sorted(rows_folder(results).glob("*.json")):
        if path.name.startswith(prefix):
            with contextlib.suppress(RowError):
                row = read_row_file(path)
                if is_one(row):
                    yield row


def _is_like(row: Row, plan: Plan, data) -> bool:
    """Can a run of a plan be compared with a row, epoch by epoch?"""
    is_other_content = row.content_sha256 and data.content_sha256 not in (None, row.content_sha256)
    return (
        row.status == "finished"
        and len(row.by_epoch_pct) == row.epochs == plan.recipe.epochs
        and row.data_fingerprint == data.fingerprint
        and not is_other_content
        and not is_repetition(row.run)
        and row.num_val_images == plan.profile.num_val
        and not plan.identity.is_of(row)
    )


def curve_in(lines: Iterable[bytes], scored: str) -> dict[int, float]:
    """The main score by epoch of the scored weights, from lines of metrics.jsonl; what is no such
    line is skipped.
    """
    curve: dict[int, float] = {}
    for line in lines:
        with contextlib.suppress(ValueError, KeyError, TypeError, AttributeError):
            record = json_of(line)
            if record.get("weights") == scored and (score := main_score(record)):
                curve[int(record["epoch"])] = score[1]
    return curve


def whole_curve(curve: Curve, num_epochs: int) -> tuple[float, ...]:
    """A curve for a row; nothing where an epoch is missing."""
    scores = [curve.get(epoch) for epoch in range(1, num_epochs + 1)]
    return tuple(score for score in scores if score is not None) if None not in scores else ()
