"""What the command push does."""

from __future__ import annotations

from pathlib import Path

from trainer.inference.export import hub
from trainer.runs import summary
from trainer.runs.run_folder import find_run_folder

__all__ = ["push"]


def push(run: str, repo: str, license: str, is_private: bool, runs: Path) -> None:
    """Upload a run's model, and say where it is. Raises UserError."""
    url = hub.push(find_run_folder(run, runs), repo, license, is_private)
    out = summary.console()
    out.print(f"model  {url}", markup=False)
    out.print(f"timm   create_model('hf-hub:{repo}', pretrained=True)", markup=False)
