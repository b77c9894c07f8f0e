"""The speed that a plan reckons with."""

import dataclasses
import json
from pathlib import Path

import pytest

from support.rows import ROW
from trainer.base.provenance import device_name
from trainer.base.settings import make_settings
from trainer.data import loader_speed
from trainer.models.build import build_model, gmacs
from trainer.recipe import tree
from trainer.runs.job import Job, plan_of
from trainer.runs.results import store_row
from trainer.tools.estimate import speed_of

ROOT = Path(__file__).parents[2]
GPU = dataclasses.replace(make_settings("cpu", workers="0"), device="cuda", precision="bf16")


def row_of(plan, run, **more):
    """A row of a run of this plan on an imaginary GPU."""
    facts = {
        "run": f"{plan.recipe.name}.v{plan.recipe.version}-{plan.model}-{run}",
        "recipe": plan.recipe.name,
        "version": plan.recipe.version,
        "model": plan.model,
        "data": plan.profile.name,
        "resolved_recipe": json.loads(json.dumps(tree.plain(plan.recipe))),
        "batch_images": plan.recipe.batch.images,
        "world_size": 2,
        "precision": "bf16",
        "device": "GPU",
        "reserved_mem_mib": 100.0,
        "step_s": 2.0,
        "compiled": False,
        "activation_checkpointing": False,
    }
    return ROW.model_copy(update=facts | more)


def test_rows_of_the_same_recipe_model_and_kind_of_device_are_reckoned_with(tmp_path):
    plan = plan_of(Job("A3", "resnet18", "imagenet-1k", world_size=4))
    model, batch = build_model(plan), plan.recipe.batch.images
    longer = plan_of(Job("A3", "resnet18", "imagenet-1k", overrides="epochs=7"))
    other_px = plan_of(Job("A3", "resnet18", "imagenet-1k", overrides="image.train_px=96"))
    for row in (
        row_of(plan, "a"),
        row_of(longer, "b", step_s=4.0),
        row_of(plan, "c", step_s=8.0),
        row_of(other_px, "d", step_s=0.1),
        row_of(plan, "e", step_s=0.1, precision="float32"),
        row_of(plan, "f", step_s=0.1, reserved_mem_mib=None),
        row_of(plan, "g", step_s=0.1, compiled=True),
    ):
        store_row(tmp_path, row)
    (tmp_path / "rows" / "A3.v1-resnet18-damaged.json").write_text("{")
    found = speed_of(plan, GPU, tmp_path, model)
    assert found.is_measured
    assert found.images_per_s == pytest.approx(batch / 4.0 / 2)
    images = plan.draws_per_epoch * plan.recipe.epochs
    assert found.run_s(plan) == pytest.approx(images / (4 * batch / 4.0 / 2))


def test_a_cpus_rows_are_of_this_cpu_and_as_many_threads(tmp_path):
    plan, settings = plan_of(Job("A3", "resnet18")), make_settings("cpu", workers="0")
    here = {
        "device": device_name("cpu"), "reserved_mem_mib": None, "precision": "float32",
        "world_size": 1,
    }  # fmt: skip
    threads = settings.num_threads
    store_row(tmp_path, row_of(plan, "a", **here, num_threads=threads + 1))
    store_row(tmp_path, row_of(plan, "b", **here | {"device": "another"}, num_threads=threads))
    assert speed_of(plan, settings, tmp_path, build_model(plan)) is None
    store_row(tmp_path, row_of(plan, "c", **here, num_threads=threads))
    found = speed_of(plan, settings, tmp_path, build_model(plan))
    assert found.images_per_s == pytest.approx(plan.recipe.batch.images / 2.0)


def test_a_published_speed_is_scaled_to_the_size_of_the_images_and_is_no_measurement(tmp_path):
    plan = plan_of(Job("A3", "resnet18", "imagenet-1k"))
    model = build_model(plan)
    found = speed_of(plan, GPU, tmp_path, model)
    ratio = gmacs(model, 3, 224) / gmacs(model, 3, 160)
    assert ratio == pytest.approx((224 / 160) ** 2, rel=0.01)
    assert found.images_per_s == pytest.approx(3482 * ratio) and not found.is_measured
    float32 = dataclasses.replace(GPU, precision="float32")
    assert speed_of(plan, float32, tmp_path, model) is None
    other_norms = plan_of(Job("gn-ws", "resnet50", "imagenet-1k"))
    assert speed_of(other_norms, GPU, tmp_path, model) is None


def test_a_cores_speed_is_what_was_measured():
    rows = json.loads((ROOT / "results" / "bench" / "loader-224.json").read_text())
    ready = {
        row["who"]: row["images_per_s"] / rows["num_workers"]
        for row in rows["whole"]
        if row["stage"] == "ready for the device"
    }
    for who, speed in {
        "ours, loader=torch": loader_speed.DECODED_ONCE_IMAGES_PER_S,
        "ours, loader=torch, without repeats": loader_speed.CORE_IMAGES_PER_S,
        "ours, loader=ffcv (256 px, pixels)": loader_speed.FFCV_IMAGES_PER_S,
    }.items():
        assert speed == pytest.approx(ready[who], rel=0.005)
    assert loader_speed.cores_for(2470, 442) == 6
    assert loader_speed.core_images_per_s(3, 1) > loader_speed.core_images_per_s(3, 4)
