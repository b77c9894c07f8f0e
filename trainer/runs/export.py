"""The trained model as other programs take it.

`timm.create_model("local-dir:<run folder>", pretrained=True)` where timm alone builds the model,
and in any case `trainer.runs.run_folder.open_model("<run folder>")`. Models of trainer.models.zoo
are timm's once that folder is imported.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path

import safetensors.torch
import torch
from torch import nn

from trainer.base.disk import write_atomically
from trainer.engine.state import TrainingState
from trainer.models.sizes import size_options
from trainer.models.timm_options import takes_option
from trainer.models.zoo import timm_name
from trainer.recipe.plan import Plan


def export_model(folder: Path, plan: Plan, state: TrainingState, classes: tuple[str, ...]) -> str:
    """Write model.safetensors and config.json of the scored weights; gives their digest.

    config.json comes last: where it is, the weights are whole.
    """
    model = state.weights()[state.scored]
    tensors = {
        name: tensor.detach().cpu().contiguous() for name, tensor in model.state_dict().items()
    }
    write_atomically(
        folder / "model.safetensors", safetensors.torch.save(tensors, metadata={"format": "pt"})
    )
    facts = json.dumps(timm_facts(plan, classes), indent=2) + "\n"
    write_atomically(folder / "config.json", facts.encode())
    return weights_digest(model)


def timm_facts(plan: Plan, classes: tuple[str, ...]) -> dict:
    """What timm reads from config.json: the architecture and how to show it an image."""
    image, profile = plan.recipe.image, plan.profile
    section = plan.recipe.model
    layer_scale = section.layer_scale if section else None
    patch_px = section.patch_px if section else None
    model = timm_name(plan.model)
    return {
        # timm would load the weights of a changed model into its own without a word where the names
        # are the same
        "architecture": model if is_timms(plan) else f"{model}+{plan.recipe.name}",
        "num_classes": profile.num_classes,
        "model_args": ({} if layer_scale is None else {"ls_init_value": layer_scale})
        | ({} if patch_px is None else {"patch_size": patch_px})
        | ({} if profile.channels == 3 else {"in_chans": profile.channels})
        | size_options(plan),
        "label_names": list(classes),
        "pretrained_cfg": {
            "input_size": [profile.channels, image.test_px, image.test_px],
            "crop_pct": image.test_crop_share,
            "crop_mode": image.test_crop_mode or "center",
            "interpolation": image.test_interpolation.partition("_")[0],  # timm always smooths
            "mean": list(profile.mean),
            "std": list(profile.std),
            "num_classes": profile.num_classes,
        },
    }


def is_timms(plan: Plan) -> bool:
    """Does timm alone build this model, so that its local-dir: opens the run folder?"""
    section = plan.recipe.model
    if not plan.recipe.of_task.is_timms:
        return False
    if section is None:
        return True
    return section.is_plain and (
        section.layer_scale is None or takes_option(plan.model, ls_init_value=section.layer_scale)
    )


def weights_digest(model: nn.Module) -> str:
    """SHA-256 of a model's parameters and buffers, as of the file that they are exported to."""
    return file_digest(model.state_dict())


def file_digest(tensors: Mapping[str, torch.Tensor]) -> str:
    """SHA-256 over names, shapes, dtypes and bytes of a model's parameters and buffers, in the
    order of their names.
    """
    digest = hashlib.sha256()
    for name, tensor in sorted(tensors.items()):
        tensor = tensor.detach().cpu().contiguous()
        digest.update(f"{name} {tuple(tensor.shape)} {tensor.dtype}".encode())
        digest.update(
            tensor.view(-1).view(torch.uint8).numpy().tobytes() if tensor.numel() else b""
        )
    return digest.hexdigest()
