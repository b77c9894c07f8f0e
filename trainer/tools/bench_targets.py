"""What a run on a GPU costs at least, how near it comes, and what it was meant to reach: facts, and
words for them.
"""

from __future__ import annotations

import statistics
from dataclasses import dataclass

from torch import Tensor

from trainer.engine.state import TrainingState
from trainer.models.build import gmacs
from trainer.tools.bench import Rate, ratios
from trainer.tools.bench_run import BOUND_SHARE

TIMM_RATIO = 1.3  # images/s, times those of a loop of timm's parts
OPTIMIZER_MS = 2.0  # of one step of the optimizer, clipping included
_PASSES = 3  # a backward pass counts as two forward ones: gradients of activations and of weights


@dataclass(frozen=True)
class Floor:
    """What must be done whatever does it.

    gmacs: billions of multiply-adds of one image's forward pass. image_bytes: of an image as it
    goes to the device. weight_bytes, gradient_bytes, state_bytes: of the model, and of what its
    optimizer keeps.
    """

    gmacs: float
    image_bytes: int
    weight_bytes: int
    gradient_bytes: int
    state_bytes: int

    @property
    def train_gflop(self) -> float:
        """Billions of operations of one image, forward and backward: two for each multiply-add."""
        return 2 * _PASSES * self.gmacs

    @property
    def optimizer_bytes(self) -> int:
        """Of one step: gradients are read, weights and state read and written."""
        return self.gradient_bytes + 2 * (self.weight_bytes + self.state_bytes)


@dataclass(frozen=True)
class Target:
    """Something to reach. wanted, found: in words. is_reached: None where it was not measured."""

    what: str
    wanted: str
    found: str
    is_reached: bool | None

    @property
    def word(self) -> str:
        """In one word, or three."""
        return {True: "reached", False: "missed", None: "not measured"}[self.is_reached]

    def as_facts(self) -> dict:
        """For a JSON file."""
        return {"what": self.what, "wanted": self.wanted, "found": self.found, "verdict": self.word}


@dataclass(frozen=True)
class Measured:
    """All that was measured of one plan.

    rates: of the parts, "step", "end to end" and, where there is such a loop, "timm's parts".
    optimizer: of the optimizers alone, "ours" and "timm's"; their images are steps. peak_mib: of
    the two loops; None where memory is not counted. against: why there is no loop of timm's parts,
    or "".
    """

    optimizer_name: str
    rates: dict[str, Rate]
    optimizer: dict[str, Rate]
    peak_mib: dict[str, float | None]
    floor: Floor
    against: str


def floor_of(state: TrainingState) -> Floor:
    """Of a plan's model and its optimizer, once that has done a step."""
    plan = state.plan
    px, channels = plan.recipe.image.train_px, plan.profile.channels
    weights = list(state.model.parameters())
    kept = [
        value
        for each in state.optimizer.state.values()
        for value in each.values()
        if isinstance(value, Tensor)
    ]
    return Floor(
        gmacs(state.model, channels, px),
        channels * px * px,
        _bytes(weights),
        _bytes([weight.grad for weight in weights if weight.grad is not None]),
        _bytes(kept),
    )


def _bytes(tensors: list[Tensor]) -> int:
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors)


def floor_facts(found: Measured) -> dict:
    """The floor, and what was achieved of it: operations and bytes a second."""
    floor = found.floor
    done = {
        name: rate
        for name, rate in found.rates.items()
        if name in ("model", "step", "end to end", "timm's parts")
    }
    facts = {
        "gmacs_per_image": round(floor.gmacs, 4),
        "train_gflop_per_image": round(floor.train_gflop, 3),
        "image_bytes": floor.image_bytes,
        "weight_bytes": floor.weight_bytes,
        "gradient_bytes": floor.gradient_bytes,
        "state_bytes": floor.state_bytes,
        "optimizer_bytes_per_step": floor.optimizer_bytes,
        "tflop_per_s": {
            name: _round(rate.images_per_s * floor.train_gflop / 1e3) for name, rate in done.items()
        },
        "optimizer_gb_per_s": {
            name: _round(floor.optimizer_bytes / rate.image_ms / 1e6)
            for name, rate in found.optimizer.items()
        },
    }
    if "transfer" in found.rates:
        facts["transfer_gb_per_s"] = _round(
            found.rates["transfer"].images_per_s * floor.image_bytes / 1e9
        )
    return facts


def spread_of(values: list[float]) -> dict:
    """The median, the lowest and the highest."""
    return {
        "median": _round(statistics.median(values)),
        "low": _round(min(values)),
        "high": _round(max(values)),
    }


def comparison_facts(found: Measured) -> dict:
    """Ours against the step alone and against timm's parts: ratios over the turns, milliseconds,
    memory.
    """
    rates, facts = (
        found.rates,
        {"of_step": spread_of(ratios(found.rates["end to end"], found.rates["step"]))},
    )
    if found.against:
        facts["not_compared"] = found.against
    else:
        facts["x_timm"] = spread_of(ratios(rates["end to end"], rates["timm's parts"]))
    times = {
        name: spread_of([1e3 * seconds / rate.num_images for seconds in rate.seconds])
        for name, rate in found.optimizer.items()
    }
    peaks = {name: mib and round(mib, 1) for name, mib in found.peak_mib.items()}
    return facts | {
        "optimizer": found.optimizer_name,
        "optimizer_ms": times,
        "peak_mib": peaks,
        "num_turns": len(rates["step"].seconds),
    }


def targets_of(found: Measured) -> list[Target]:
    """What a run on a GPU was meant to reach, and whether it did."""
    return [_of_step(found), _of_timm(found), _of_optimizer(found), _of_memory(found)]


def _of_step(found: Measured) -> Target:
    each = ratios(found.rates["end to end"], found.rates["step"])
    share = spread_of(each)
    text = (
        f"{100 * share['median']:.1f} % ({100 * share['low']:.1f} to {100 * share['high']:.1f},"
        f" {_turns(each)})"
    )
    return Target(
        "end to end, of the step on data on the device",
        f">= {100 * BOUND_SHARE:.0f} %",
        text,
        share["median"] >= BOUND_SHARE,
    )


def _of_timm(found: Measured) -> Target:
    what, wanted = "images/s, times a loop of timm's parts", f">= {TIMM_RATIO}"
    if found.against:
        return Target(what, wanted, f"no such loop: {found.against}", None)
    each = ratios(found.rates["end to end"], found.rates["timm's parts"])
    ratio = spread_of(each)
    return Target(
        what,
        wanted,
        f"{ratio['median']:.2f} ({ratio['low']:.2f} to {ratio['high']:.2f}, {_turns(each)})",
        ratio["median"] >= TIMM_RATIO,
    )


def _turns(each: list[float]) -> str:
    return f"{len(each)} turn{'s' * (len(each) > 1)}"


def _of_optimizer(found: Measured) -> Target:
    ours, timms = found.optimizer["ours"].image_ms, found.optimizer.get("timm's")
    text = f"{ours:.2f} ms" + (f" (timm's {timms.image_ms:.2f} ms)" if timms else "")
    return Target(
        f"a step of {found.optimizer_name} alone",
        f"< {OPTIMIZER_MS:g} ms",
        text,
        ours < OPTIMIZER_MS,
    )


def _of_memory(found: Measured) -> Target:
    what, wanted = "peak memory", "no more than timm's parts"
    ours, timms = found.peak_mib.get("end to end"), found.peak_mib.get("timm's parts")
    if ours is None:
        return Target(what, wanted, "memory is counted on a GPU alone", None)
    if timms is None:
        return Target(what, wanted, f"{ours:,.0f} MiB; no such loop: {found.against}", None)
    return Target(what, wanted, f"{ours:,.0f} MiB (timm's {timms:,.0f} MiB)", ours <= timms)


def _round(value: float) -> float:
    """To four digits: a quotient has no more."""
    return float(f"{value:.4g}")
