"""What a swapped part costs: forward and backward of resnet50 with each norm and activation,
against timm's own.

    python tests/benchmarks/bench_parts.py [--device cuda] [--batch 64] [--px 64] [--rounds 9]
    [--only norm]

All models take turns in one process, so that a machine that grows slower grows slower for all; the
ratio is the median over rounds of a model's time over the plain model's just before and just after.
The whole table goes into results/bench unless --dry is given.
"""

from __future__ import annotations

import argparse
import statistics
import time

import timm
import torch
from torch import nn
from written import write

from trainer.base import provenance
from trainer.base.memory import keep_freed_memory
from trainer.base.settings import make_settings
from trainer.data.transforms import autocast
from trainer.models.edit.replacement import ReplacementError
from trainer.models.spec import Model
from trainer.recipe.check import check, kinds_in, tag_of
from trainer.recipe.tree import plain

MODEL = "resnet50"
KEYS = ("norm", "activation", "weight_standardization")
# The combinations that pages use.
PAIRS = {"group_norm + weight_standardization": ("group_norm", "weight_standardization"),
         "batch_channel_norm + weight_standardization": ("batch_channel_norm", "weight_standardization")}  # fmt: skip


def parts() -> dict[str, tuple]:
    """Every norm, activation and standardization of the page, as its source has it, by the table's
    name.
    """
    found = {}
    for key in KEYS:
        for kind in kinds_in(Model.model_fields[key].annotation):
            found[f"{key}: {tag_of(kind)}"] = (check(kind, plain(kind.example)),)
    by_name = {name.partition(": ")[2]: part for name, (part,) in found.items()}
    return found | {name: tuple(by_name[one] for one in names) for name, names in PAIRS.items()}


def build(swapped: tuple, settings, image_px: int) -> nn.Module:
    """A resnet50 with parts swapped, in training mode on the device."""
    torch.manual_seed(0)
    model = timm.create_model(MODEL)
    for part in swapped:
        part.apply(model, image_px)
    memory_format = torch.channels_last if settings.channels_last else torch.contiguous_format
    return model.to(settings.device, memory_format=memory_format).train()


def seconds(model: nn.Module, images: torch.Tensor, settings) -> float:
    """One forward and backward pass."""
    on_gpu = settings.device.startswith("cuda")
    if on_gpu:
        torch.cuda.synchronize()
    before = time.perf_counter()
    with autocast(settings):
        loss = model(images).float().square().mean()
    loss.backward()
    if on_gpu:
        torch.cuda.synchronize()
    taken_s = time.perf_counter() - before
    model.zero_grad(set_to_none=True)
    return taken_s


def measure(
    models: dict[str, nn.Module], images: torch.Tensor, settings, num_rounds: int
) -> dict[str, list[tuple[float, float]]]:
    """(seconds, seconds of the plain model around it) of every model in every round, after one
    round that warms up.
    """
    plain = models["plain"]
    taken: dict[str, list[tuple[float, float]]] = {name: [] for name in models}
    for number in range(num_rounds + 1):
        before = seconds(plain, images, settings)
        for name, model in models.items():
            one = seconds(model, images, settings)
            after = seconds(plain, images, settings)
            if number:
                taken[name].append((one, (before + after) / 2))
            before = after
    return taken


def as_markdown(facts: dict) -> str:
    """The table, cheapest first."""
    lines = [f"# Forward and backward of {MODEL} with one part swapped", ""]
    lines += [f"{facts['device']}, {facts['precision']}, {facts['num_threads']} threads, torch {facts['torch']}; "
              f"{facts['batch_images']} images of {facts['image_px']} px, {facts['num_rounds']} rounds in turns. Ratio: median "
              "over rounds of the time over that of the plain model just before and just after, with its quartiles; the "
              "plain model's own ratio shows what the machine's unrest makes of 1."]  # fmt: skip
    lines += ["", "| part | ratio | quartiles | median ms |", "|---|---|---|---|"]
    for row in sorted(facts["rows"], key=lambda row: row["ratio"]):
        low, high = row["quartiles"]
        lines.append(
            f"| {row['name']} | {row['ratio']:.3f} | {low:.3f} to {high:.3f} |"
            f" {row['median_ms']:.1f} |"
        )
    return "\n".join([*lines, ""])


def rows_of(taken: dict[str, list[tuple[float, float]]]) -> list[dict]:
    rows = []
    for name, times in taken.items():
        ratios = sorted(one / plain for one, plain in times)
        quartiles = statistics.quantiles(ratios, n=4)[::2] if len(ratios) > 1 else [ratios[0]] * 2
        rows.append({"name": name, "ratio": statistics.median(ratios), "quartiles": quartiles,
                     "median_ms": 1e3 * statistics.median(one for one, _ in times)})  # fmt: skip
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--device", default="auto")
    parser.add_argument("--precision", default="auto")
    parser.add_argument("--batch", type=int, default=64)
    parser.add_argument("--px", type=int, help="default 64 on the CPU, 224 on a GPU")
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument(
        "--only", default="", help="parts whose name holds this text; writes nothing"
    )
    parser.add_argument("--dry", action="store_true", help="print, write nothing")
    given = parser.parse_args()
    keep_freed_memory()  # as a run does
    settings = make_settings(given.device, given.precision)
    on_gpu = settings.device.startswith("cuda")
    image_px = given.px or (224 if on_gpu else 64)
    models = {"plain": build((), settings, image_px)}
    for name, swapped in parts().items():
        if given.only in name:
            try:
                models[name] = build(swapped, settings, image_px)
            except ReplacementError as error:
                print(f"left out: {error}")
    torch.manual_seed(0)
    images = torch.randn(given.batch, 3, image_px, image_px, device=settings.device)
    if settings.channels_last:
        images = images.contiguous(memory_format=torch.channels_last)
    taken = measure(models, images, settings, given.rounds)
    facts = {"benchmark": "parts", "model": MODEL, "device": provenance.device_name(settings.device),
             "precision": settings.precision, "num_threads": settings.num_threads, "torch": torch.__version__,
             "batch_images": given.batch, "image_px": image_px, "num_rounds": given.rounds, "rows": rows_of(taken)}  # fmt: skip
    table = as_markdown(facts)
    print(table)
    if not given.dry and not given.only:
        write(f"parts-{'cuda' if on_gpu else 'cpu'}", facts, table)


if __name__ == "__main__":
    main()
