"""A run's model in a repository of the Hugging Face Hub, laid out as timm reads it."""

from __future__ import annotations

import shutil
import tempfile
from pathlib import Path

from trainer.base.errors import UserError
from trainer.inference.export.card import CARD, model_card

# timm reads the first two; trainer.load_run, which opens changed models too, all of them
_FILES = ("model.safetensors", "config.json", "recipe.yaml", "plan.json", "row.json")


def push(folder: Path, repo: str, license: str, is_private: bool) -> str:
    """Upload a finished run's model with its card; gives the repository's address.

    Raises UserError for a run that has not finished, without a token, and for what the Hub says.
    """
    import huggingface_hub  # seconds, and for this alone
    from huggingface_hub.errors import HFValidationError, HTTPError
    from huggingface_hub.utils import get_token

    card = model_card(folder, license)
    if not (folder / "model.safetensors").exists():
        raise UserError(f"{folder}: has no model, its training diverged", "use run=<another>")
    if get_token() is None:
        raise UserError(
            "push: no token of the Hugging Face Hub", "run hf auth login, or set HF_TOKEN"
        )
    hub = huggingface_hub.HfApi()
    with tempfile.TemporaryDirectory() as made:
        for name in _FILES:
            shutil.copy(folder / name, made)
        (Path(made) / CARD).write_text(card, "utf-8")
        try:
            url = hub.create_repo(repo, private=is_private, exist_ok=True)
            hub.upload_folder(repo_id=repo, folder_path=made, commit_message=f"{folder.name}")
        except HFValidationError as error:
            reason = " ".join(str(error).split())
            raise UserError(f"repo={repo}: {reason}", "use repo=<user>/<name>") from None
        except (HTTPError, OSError) as error:
            reason = " ".join(str(error).split()) or type(error).__name__
            raise UserError(
                f"repo={repo}: the Hub did not take it ({reason})", "mend that, and rerun"
            ) from None
    return str(url)
