"""A row leads back to its run: the recipe that it holds, refusals with the reason, and what a rerun
says.
"""

import json
from types import SimpleNamespace

import pytest

from support.commands import rsb
from support.plans import small_set
from support.tabled import row, stored_row
from trainer.ablation.spec import load_ablation
from trainer.base import provenance
from trainer.base.errors import UserError
from trainer.recipe import tree
from trainer.runs.job import Job, plan_of
from trainer.runs.plan_file import write_plan
from trainer.runs.reproduce import data_reasons, plan_again, same_cell, verdict
from trainer.runs.results import RowDeviation, read_row, store_row
from trainer.runs.row import deviation_rows
from trainer.runs.run_folder import recipe_of

FINGERPRINT = "f" * 64


def row_of(job: Job, is_old: bool = False, **facts):
    """The row that a job's run would have on this machine. is_old: as the first edition wrote it,
    without its recipe.
    """
    plan = plan_of(job)
    if not is_old:
        facts = {
            "resolved_recipe": json.loads(json.dumps(tree.plain(plan.recipe))),
            "bad_images": plan.bad_images,
        } | facts
    facts = {
        "run": plan.run_name(FINGERPRINT),
        "version": plan.recipe.version,
        "digest": plan.page_digest,
        "versions": provenance.versions(),
    } | facts
    facts |= {
        "recipe": plan.recipe.name,
        "model": plan.model,
        "data": plan.profile.name,
        "deviations": deviation_rows(plan),
    }
    return row("x", plan.seed, 90.0, **facts)


OVERRIDES = [
    "", "epochs=3 lr.peak=1.234e-3", "loss.name=ce", "mix=null loss.threshold=null smoothing=0.1",
    "repeats=null drop_path=null",
    "optimizer={name: adamw, betas: [0.9, 0.999], eps: 1e-8, weight_decay: 0.05}",
    "optimizer.name=sgd optimizer.momentum=0.9",
    "lr.schedule={name: step, every_epochs: 3, factor: 0.1}",
    "model.norm={name: group_norm, groups: 32, eps: 1e-5} model.activation={name: swish, beta: 1.0}",
    "augment.rand_augment=null",
    "augment.rand_augment.magnitude=9 augment.random_resized_crop.area=[0.5, 1]",
    "batch.images=64 batch.norm_images=16 average={name: ema, decay: 0.99, every_steps: 1}",
]  # fmt: skip
EXACT = [
    "lr.peak=0.0012345678901234567 optimizer.weight_decay=0.020000000000000004",
    "drop_path=0.30000000000000004",
]


@pytest.mark.parametrize("is_old", [False, True])
@pytest.mark.parametrize("overrides", OVERRIDES)
def test_the_row_of_any_departure_leads_back_to_its_plan(tmp_path, overrides, is_old):
    job = Job("A2", "resnet18", seed=3, overrides=overrides)
    again = plan_again(row_of(job, is_old), tmp_path)
    assert again.reasons == ()
    assert again.plan.recipe.digest == plan_of(job).recipe.digest
    assert (again.plan.seed, again.plan.bad_images, again.job.again) == (3, "fail", True)


@pytest.mark.parametrize("overrides", [*OVERRIDES, *EXACT])
def test_a_row_holds_its_recipe_exactly(tmp_path, overrides):
    """Through the file and back: the very values, and no recipe is asked."""
    job = Job("A2", "resnet18", overrides=overrides)
    made = row_of(job)
    store_row(tmp_path, made)
    read = read_row(tmp_path, made.run).model_copy(update={"recipe": "nobody"})
    store_row(tmp_path, read)
    again = plan_again(read_row(tmp_path, read.run), tmp_path / "runs")
    assert again.plan.recipe == plan_of(job).recipe


@pytest.mark.parametrize("overrides", EXACT)
def test_an_old_row_whose_texts_were_rounded_is_refused_but_for_its_run_folder(tmp_path, overrides):
    job = Job("A2", "resnet18", overrides=overrides)
    plan = plan_of(job)
    made = row_of(job, is_old=True)
    rounded = [
        (
            change.model_copy(update={"after": f"{float(change.after):.6g}"})
            if change.origin == "set"
            else change
        )
        for change in made.deviations
    ]
    made = made.model_copy(update={"deviations": tuple(rounded)})
    (reason,) = plan_again(made, tmp_path).reasons
    assert (
        reason.startswith("this row was stored before") and f"runs/{made.run}/recipe.yaml" in reason
    )
    write_plan(tmp_path / made.run, job, plan)
    again = plan_again(made, tmp_path)
    assert again.reasons == () and again.plan.recipe.digest == plan.recipe.digest


@pytest.mark.parametrize("name", ["tv2-cumulative", "rsb-ingredients"])
def test_the_old_rows_of_shipped_ablations_lead_back_to_their_plans(tmp_path, name):
    for cell in load_ablation(name).cells:
        again = plan_again(stored_row(cell, 1, 90.0, versions=provenance.versions()), tmp_path)
        assert again.reasons == (), cell.name
        assert again.plan.recipe.digest == cell.plan.recipe.digest, cell.name


@pytest.mark.parametrize("is_old", [False, True])
def test_a_run_that_skipped_bad_images_is_told_from_one_that_did_not(tmp_path, is_old):
    made = row_of(Job("A2", "resnet18", bad_images="skip"), is_old)
    assert plan_again(made, tmp_path).plan.bad_images == "skip"


def test_a_run_made_by_a_file_leads_back(tmp_path):
    page = tmp_path / "recipe.yaml"
    page.write_text(
        plan_of(Job("A2", "resnet18", overrides="epochs=3 loss.name=ce")).recipe.to_yaml()
    )
    job = Job(str(page), "resnet18", overrides="smoothing=0.2")
    assert {change.origin for change in deviation_rows(plan_of(job))} == {"file", "set"}
    assert plan_again(row_of(job), tmp_path).reasons == ()
    assert plan_again(row_of(job, is_old=True), tmp_path, recipe=str(page)).reasons == ()


def test_again_of_again_is_the_same_run(tmp_path):
    made = row_of(Job("A2", "resnet18"))
    assert plan_again(made.model_copy(update={"run": f"{made.run}-12"}), tmp_path).reasons == ()


@pytest.mark.parametrize(
    ("facts", "reason"),
    [
        ({"versions": provenance.versions() | {"torch": "1.0"}}, "torch is .*, the row's was 1.0"),
        ({"versions": {}}, "python is .*, the row's was not recorded"),
        (
            {"run": "A2.v2-resnet18-digits-s0-000000"},
            "its record leads to A2.v2-resnet18-digits-s0-.* now",
        ),
        ({"seed": 1}, "its record leads to"),
        (
            {"run": "A2.v2-resnet18-digits-s0-000000", "resolved_recipe": None},
            "this row was stored before .* A2.v2-resnet18-digits-s0-.* now",
        ),
    ],
)
def test_what_is_not_as_it_was_is_a_reason(tmp_path, facts, reason):
    import re

    made = row_of(Job("A2", "resnet18")).model_copy(update=facts)
    reasons = plan_again(made, tmp_path).reasons
    assert any(re.match(reason, one) for one in reasons), reasons


def test_other_images_are_a_reason():
    made = row("x", 0, 90.0, data_fingerprint="a" * 64)
    rewritten = made.model_copy(update={"content_sha256": "c" * 64})
    same = SimpleNamespace(fingerprint="a" * 64, content_sha256="c" * 64)
    assert data_reasons(made, same) == data_reasons(rewritten, same) == ()
    other = SimpleNamespace(fingerprint="a" * 64, content_sha256="d" * 64)
    assert "content dddddddddddd, the row's had cccccccccccc" in data_reasons(rewritten, other)[0]
    assert (
        "fingerprint bbbbbbbbbbbb, the row's had aaaaaaaaaaaa"
        in data_reasons(made, SimpleNamespace(fingerprint="b" * 64, content_sha256=None))[0]
    )


def test_a_page_or_a_data_set_that_is_not_here_is_named(tmp_path):
    made = row_of(Job("A2", "resnet18"), is_old=True)
    with pytest.raises(UserError, match="recipe=nobody.v2"):
        plan_again(made.model_copy(update={"recipe": "nobody"}), tmp_path)
    with pytest.raises(UserError, match="data=flowers: unknown"):
        plan_again(made.model_copy(update={"data": "flowers"}), tmp_path)
    lossy = RowDeviation(path="epochs", before="9", after="[", origin="set")
    with pytest.raises(UserError, match="epochs:1"):
        plan_again(made.model_copy(update={"deviations": (*made.deviations, lossy)}), tmp_path)
    recipe = row_of(Job("A2", "resnet18")).resolved_recipe | {"epochs": -1}
    with pytest.raises(UserError, match=f"row={made.run}: its resolved recipe: epochs.*at least 1"):
        plan_again(made.model_copy(update={"resolved_recipe": recipe}), tmp_path)


SEEDS = {0: 90.0, 1: 92.0, 2: 91.0}  # one more would lie within 91 +- 4.303 * sqrt(4 / 3) = 4.97


@pytest.mark.parametrize(
    ("top1_pct", "weights", "seeds", "kind"),
    [
        (90.0, "a", SEEDS, "bit-identical"),
        (90.0, "b", SEEDS, "within the seed spread"),
        (95.9, "b", SEEDS, "within the seed spread"),
        (96.1, "b", SEEDS, "different"),
        (90.0, "b", {0: 90.0}, "different"),
        (
            90.3,
            "a",
            SEEDS,
            "within the seed spread",
        ),  # the same weights scored otherwise are not the same result
    ],
)
def test_what_a_rerun_says(top1_pct, weights, seeds, kind):
    then = row("x", 0, 90.0, weights_sha256="a" * 64)
    found = verdict(then, row("x", 0, top1_pct, weights_sha256=weights * 64), seeds)
    assert found.kind == kind and found.is_reproduced is (kind != "different")
    text = " ".join(found.lines)
    assert f"top-1 90.0000 % then, {top1_pct:.4f} % now" in text
    if len(seeds) == 1:
        assert "the spread over seeds is unknown" in text
    elif kind != "bit-identical":
        assert "standard deviation 1.00" in text and "86.03 .. 95.97 %" in text


def test_what_may_have_moved_the_bits_is_told():
    then = row("x", 0, 90.0, device="one", num_threads=2, bitwise=False)
    text = " ".join(
        verdict(
            then, row("x", 0, 90.1, device="other", num_threads=1, weights_sha256="b" * 64), SEEDS
        ).lines
    )
    assert (
        "device one then, other now" in text
        and "threads 2 then, 1 now" in text
        and "from run to run" in text
    )


def test_a_run_that_diverges_again_and_one_that_does_not():
    gone = row("x", 0, None, steps=17)
    assert verdict(gone, row("x", 0, None, steps=18), {}).kind == "diverged again"
    assert (
        verdict(gone, row("x", 0, 90.0), {}).kind
        == verdict(row("x", 0, 90.0), gone, {}).kind
        == "different"
    )


def test_the_seeds_of_a_cell_are_its_rows_that_differ_in_the_seed_alone():
    rows = [row_of(Job("A2", "resnet18", seed=seed)) for seed in (0, 1, 2)]
    others = [
        row_of(Job("A2", "resnet18", seed=3, overrides="mix=null")),
        row_of(Job("A2", "resnet50", seed=4)),
    ]
    again = rows[0].model_copy(update={"run": f"{rows[0].run}-2", "top1_pct": 1.0})
    lost = rows[1].model_copy(update={"seed": 9, "top1_pct": None})
    rows[2] = row_of(Job("A2", "resnet18", seed=2), is_old=True)
    assert same_cell(plan_of(Job("A2", "resnet18", seed=7)), [*rows, *others, again, lost]) == {
        0: 90.0,
        1: 90.0,
        2: 90.0,
    }


def test_a_short_run_is_made_again_bit_for_bit(tmp_path):
    """Train with values of 17 digits, reproduce into a run of its own, refuse other images."""
    folders = [
        "--results",
        tmp_path / "results",
        "--runs",
        tmp_path / "runs",
        "--device",
        "cpu",
        "--workers",
        "0",
    ]
    overrides = small_set(
        "epochs=1 batch.images=256 batch.norm_images=256 lr.warmup_epochs=null lr.warmup_from=null"
        " lr.peak=0.0012345678 drop_path=0.12345678901234568"
    )
    assert (
        rsb(
            "train", "--recipe", "A2", "--model", "test_resnet", "--set", overrides, *folders
        ).exit_code
        == 0
    )
    (path,) = (tmp_path / "results" / "rows").iterdir()
    done = rsb("reproduce", "--row", path.stem, *folders)
    assert done.exit_code == 0 and "bit-identical" in done.output, done.output
    then, now = (read_row(tmp_path / "results", name) for name in (path.stem, f"{path.stem}-2"))
    assert (
        then.resolved_recipe["lr"]["peak"] == 0.0012345678
        and then.resolved_recipe["drop_path"] == 0.12345678901234568
    )
    assert then.resolved_recipe == now.resolved_recipe and then.deviations == now.deviations
    assert then.weights_sha256 == now.weights_sha256 and then.seed == now.seed
    assert (
        recipe_of(tmp_path / "runs" / now.run)[0].digest
        == recipe_of(tmp_path / "runs" / then.run)[0].digest
    )
    elsewhere = plan_of(Job("A2", "test_resnet", overrides=overrides)).run_name("0" * 64)
    store_row(
        tmp_path / "results",
        then.model_copy(update={"data_fingerprint": "0" * 64, "run": elsewhere}),
    )
    done = rsb("reproduce", "--row", elsewhere, *folders)
    assert done.exit_code == 2 and "fingerprint" in done.stderr and "anyway=1" in done.stderr, (
        done.output
    )
    assert not (tmp_path / "runs" / elsewhere).exists()
