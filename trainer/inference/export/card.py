"""A run's model card: what it is, how good, on what data, and how it departs from its recipe."""

from __future__ import annotations

from pathlib import Path

from trainer.base.errors import PlanError
from trainer.recipe.schema import Recipe
from trainer.runs.results import Row, read_row_file
from trainer.runs.run_folder import recipe_of

CARD = "README.md"


def model_card(folder: Path, license: str = "") -> str:
    """The text of a card in Markdown, with the head that the Hugging Face Hub reads. license: as
    the Hub names it; empty leaves it to whoever publishes the model.

    Raises PlanError for a run that has not finished.
    """
    if not (folder / "row.json").exists():
        raise PlanError(
            f"{folder}: the run has not finished; rerun the command that started it to resume"
        )
    row = read_row_file(folder / "row.json")
    recipe, facts = recipe_of(folder)
    num_classes = facts["profile"]["num_classes"]
    named = f"license: {license}\n" if license else ""
    tag = recipe.of_task.hub_tag
    head = f"---\nlibrary_name: timm\npipeline_tag: {tag}\n{named}tags:\n- timm\n---\n"
    return head + "\n".join(
        [f"# {row.run}", "", *_facts(row, recipe, license, num_classes), "", *_use(recipe)]
    )


def _facts(row: Row, recipe: Recipe, license: str, num_classes: int) -> list[str]:
    score = "none: the training diverged"
    if row.top1_pct is not None:
        score = f"top-1 {row.top1_pct:.2f} %"
        if row.top5_pct is not None and num_classes > 5:
            score += f", top-5 {row.top5_pct:.2f} %"
    elif row.scores_pct:
        parts = (f"{name.removesuffix('_pct')} {pct:.2f} %" for name, pct in row.scores_pct.items())
        score = ", ".join(parts)
    if row.status == "finished":
        score += f" of {row.num_val_images:,} images of its split `{row.split}`"
    commit = "" if row.commit is None else f", commit `{row.commit[:12]}`"
    facts = {
        "Model": f"`{row.model}`, {row.num_params / 1e6:.2f} million weights",
        "Score": score,
        "Data": f"`{row.data}` (fingerprint `{row.data_fingerprint[:12]}`)",
        "Recipe": f"{row.recipe}.v{row.version}: {recipe.title} ({recipe.source})",
        "Training": f"{row.epochs} epochs, {row.steps:,} steps of {row.batch_images} images, seed"
        f" {row.seed}; {row.precision} on {row.device}",
        "Teacher": row.teacher
        and f"`{row.teacher}`, file of weights `{row.teacher_sha256}`"
        + (f", run `{row.teacher_run}`" if row.teacher_run else ""),
        "Program": f"rsb {row.versions.get('trainer', '')}, torch {row.versions.get('torch', '')}"
        f"{commit}{', changed' if row.dirty else ''}; weights `{row.weights_sha256}`",
        "Licence": license or "to be named by whoever publishes it; that of its data may apply",
    }
    lines = [f"- {name}: {text}" for name, text in facts.items() if text is not None]
    if not row.deviations:
        return [*lines, "- Deviations from the recipe: none"]
    table = [
        "",
        "Deviations from the recipe:",
        "",
        "| value | recipe | here | by |",
        "|---|---|---|---|",
    ]
    return lines + table + [
        f"| `{one.path}` | {one.before} | {one.after} | {one.origin} |".replace("\n", " ")
        for one in row.deviations
    ]  # fmt: skip


def _use(recipe: Recipe) -> list[str]:
    by_timm = [
        "",
        "import timm  # where config.json names a model of timm's",
        'model = timm.create_model("local-dir:<this folder>", pretrained=True)',
    ]
    return [
        "```python",
        "import trainer  # for any model, also one whose parts the recipe replaced",
        'model = trainer.load_run("<this folder>").model',
        *(by_timm if recipe.of_task.is_timms else ()),
        "```",
        "",
    ]
