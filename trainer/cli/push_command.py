"""What the command push does."""

from __future__ import annotations

from pathlib import Path

from trainer.inference.export import hub
from trainer.models import zoo
from trainer.runs import summary
from trainer.runs.export import is_timms
from trainer.runs.run_folder import find_run_folder, plan_of_run

__all__ = ["push"]


def push(run: str, repo: str, license: str, is_private: bool, runs: Path) -> None:
    """Upload a run's model, and say where it is. Raises UserError."""
    folder = find_run_folder(run, runs)
    url = hub.push(folder, repo, license, is_private)
    out = summary.console()
    out.print(f"model  {url}", markup=False)
    if is_timms(plan := plan_of_run(folder)):
        first = "import trainer.models.zoo, then " if zoo.has_model(plan.model) else ""
        line = f"timm   {first}create_model('hf-hub:{repo}', pretrained=True)"
    else:
        line = f"open   download {repo}, then trainer.load_run('<its folder>').model"
    out.print(line, markup=False)
