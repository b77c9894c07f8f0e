"""Rows for tests, made by hand."""

from trainer.runs.results import Row
from trainer.runs.row import deviation_rows

ROW = Row(
    run="A1.v1-resnet50-digits-s0-abcdef", recipe="A1", version=1, digest="0" * 12,
    model="resnet50", data="digits", data_fingerprint="f" * 64, split="val", seed=0, deviations=(),
    status="finished", scored="model", top1_pct=97.5, top5_pct=100.0, loss_nats=0.05,
    other_top1_pct=None, num_val_images=360, num_replaced_images=0, epochs=10, steps=220,
    batch_images=64, norm_images=64, num_params=23528522, gmacs=0.08, images_per_s=99.0,
    train_s=140.0, peak_mem_mib=900.0, precision="float32", loader="torch", num_workers=0,
    num_threads=2, world_size=1, bitwise=True, weights_sha256="a" * 64, device="a processor",
    versions={"torch": "2.15.0"}, commit=None, dirty=None,
    finished_utc="2026-11-21T00:00:00+00:00",
)  # fmt: skip


def row_of(plan, run="", **changes) -> Row:
    """A row as a finished run of a plan stores it, its scores made up."""
    facts = {
        "run": run or plan.run_name("0" * 64), "recipe": plan.recipe.name,
        "version": plan.recipe.version, "digest": plan.page_digest, "model": plan.model,
        "data": plan.profile.name, "data_fingerprint": "0" * 64, "split": "val", "seed": plan.seed,
        "deviations": deviation_rows(plan), "status": "finished", "scored": "model",
        "top1_pct": 90.0, "top5_pct": 99.0, "loss_nats": 0.1, "other_top1_pct": None,
        "num_val_images": 360, "num_replaced_images": 0, "epochs": plan.recipe.epochs,
        "steps": plan.num_steps, "batch_images": 32, "norm_images": 32, "num_params": 1,
        "gmacs": 1.0, "images_per_s": 1.0, "train_s": 1.0, "peak_mem_mib": 1.0,
        "precision": "float32", "loader": "torch", "num_workers": 0, "num_threads": 1,
        "world_size": 1, "bitwise": True, "weights_sha256": None, "device": "x", "versions": {},
        "commit": None, "dirty": None, "finished_utc": "2026-01-01T00:00:00+00:00",
    }  # fmt: skip
    return Row(**(facts | changes))
