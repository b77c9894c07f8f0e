"""Files of weights, of timm, of torch and of runs of ours: finding, reading, and naming them as a
model does.
"""

from __future__ import annotations

import hashlib
import io
import math
import ssl
import sys
import threading
import urllib.error
import urllib.request
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import safetensors.torch
import timm
import torch
from torch import Tensor, nn

from trainer.base.disk import UnfitFile, read_regular
from trainer.base.errors import UserError, did_you_mean
from trainer.base.json_text import json_file
from trainer.models.zoo import torchvision_models

LARGEST_WEIGHTS_BYTES = 2**36  # read whole into memory
TIMM, TORCHVISION = "timm:", torchvision_models.SCHEME
RUN = "run:"
_FILES = ("model.safetensors", "pytorch_model.bin")  # of a run folder, and of a timm local-dir:
# where other programs keep the weights in their checkpoints; an average of them comes first
_SECTIONS = ("state_dict_ema", "model_ema", "state_dict", "model")
_PREFIXES = ("module.", "_orig_mod.", "model.")  # that wrappers put before every name
_BODY = "body."  # of a model that a task has built around timm's: see trainer.tasks
_REMEDY = "use a .safetensors or .pth file, or the folder of a finished run"


class WeightsError(UserError):
    """A weights file that is missing, is not the one in the recipe, or does not fit the model."""


@dataclass(frozen=True)
class WeightsFile:
    """The tensors of a file, by name, without the prefixes that wrappers put before all of them.

    sha256: of the file's bytes. notes: what was chosen or left out.
    """

    path: Path
    sha256: str
    tensors: dict[str, Tensor]
    notes: tuple[str, ...] = ()


def weights_path(given: str) -> Path:
    """The file that is meant by a path, a folder with weights (a run's, timm's local-dir:),
    `run:<name>`, which is runs/<name>, `timm:<model>.<tag>`, which is downloaded to Hugging Face's
    cache unless it is there, or `torchvision:<model>.<tag>`, to torch's.

    Raises WeightsError for a name that has no weights there, or a download that fails.
    """
    if given.startswith(TIMM):
        return _of_timm(given.removeprefix(TIMM))
    if given.startswith(TORCHVISION):
        return _of_torchvision(given)
    if given.startswith(RUN):
        given = f"runs/{given.removeprefix(RUN)}"
    path = Path(given.removeprefix("local-dir:"))
    if path.is_dir():
        found = (path / name for name in _FILES if (path / name).exists())
        return next(found, path / _FILES[0])
    return path


def read_weights(path: Path) -> WeightsFile:
    """Read a .safetensors file, or a torch checkpoint's weights without running code in it.

    A checkpoint of a training with a weight average gives the average. Read once, so that what is
    hashed is what is loaded.

    Raises WeightsError for a file that is missing, damaged, or holds no weights.
    """
    try:
        content = read_regular(path, LARGEST_WEIGHTS_BYTES)
    except (OSError, UnfitFile) as error:
        reason = error.strerror if isinstance(error, OSError) else error
        raise WeightsError(f"{path}: cannot be read ({reason})", _REMEDY) from None
    held, notes = _contents(path, content)
    tensors, more = _named(held)
    if not tensors:
        raise WeightsError(f"{path}: holds no weights", _REMEDY)
    return WeightsFile(path, hashlib.sha256(content).hexdigest(), tensors, notes + more)


def named_beside(path: Path) -> str | None:
    """The timm model that weights are of, as the plan.json of their run folder says, or timm's
    config.json; None where neither lies beside them.
    """
    for name, key in (("plan.json", "model"), ("config.json", "architecture")):
        try:
            found = json_file(path.parent / name)
        except (OSError, ValueError):
            continue
        if isinstance(found, dict) and isinstance(model := found.get(key), str):
            return model.partition(".")[0]
    return None


def as_model_names(model: nn.Module, weights: WeightsFile) -> WeightsFile:
    """The same weights under a model's own names and in its shapes, where timm knows how: those of
    the authors' repositories, position embeddings of another image size.

    Raises WeightsError where timm's conversion fails on them.
    """
    own = model.state_dict()
    weights = _of_body(own, weights)
    fits = all(
        name in weights.tensors and weights.tensors[name].shape == tensor.shape
        for name, tensor in own.items()
    )
    convert = getattr(sys.modules[type(model).__module__], "checkpoint_filter_fn", None)
    if fits or convert is None:
        return weights
    before = dict(weights.tensors)
    try:
        with torch.no_grad():
            found, _ = _named(convert(dict(before), model))
    except Exception as error:  # whatever an unexpected name or shape makes of it
        raise WeightsError(
            f"{weights.path}: timm's conversion to {type(model).__name__} fails"
            f" ({type(error).__name__}: {error})",
            "use weights of this timm model",
        ) from None
    renamed = len(found.keys() - before.keys())
    resized = [
        name for name in found.keys() & before.keys() if found[name].shape != before[name].shape
    ]
    notes = [f"{renamed} names converted"] if renamed else []
    notes += [
        f"{name}: {list(before[name].shape)} resized to {list(found[name].shape)}"
        for name in sorted(resized)
    ]
    return WeightsFile(weights.path, weights.sha256, found, weights.notes + tuple(notes))


def _of_body(own: Mapping[str, Tensor], weights: WeightsFile) -> WeightsFile:
    """The weights of the timm model in one that a task has built around it; what stands beside it
    there, heads or a decoder, is left out.
    """
    inner = {
        name.removeprefix(_BODY): tensor
        for name, tensor in weights.tensors.items()
        if name.startswith(_BODY)
    }
    if not inner or any(name.startswith(_BODY) for name in own):
        return weights
    beside = [name for name in weights.tensors if not name.startswith(_BODY)]
    parts = ", ".join(sorted({name.partition(".")[0] for name in beside}))
    note = f"left out: {parts} ({len(beside)} tensors)" if beside else f"without {_BODY}"
    return WeightsFile(weights.path, weights.sha256, inner, (*weights.notes, note))


def adapt_input_channels(weight: Tensor, num_channels: int) -> Tensor:
    """A first convolution's weight [O, C, h, w] for images of num_channels: [O, num_channels, h,
    w].

    One channel gets the sum over all, so that a grey image gives what it gave standing in each of
    them. More channels repeat the C in turn, scaled by C / num_channels, so that an image of equal
    channels gives about the same.

    Source: timm's adapt_input_conv.
    """
    before = weight.shape[1]
    if num_channels == 1:
        return weight.float().sum(1, keepdim=True).to(weight.dtype)
    repeated = weight.float().repeat(1, math.ceil(num_channels / before), 1, 1)[:, :num_channels]
    return (repeated * (before / num_channels)).to(weight.dtype)


def _contents(path: Path, content: bytes) -> tuple[Mapping[str, Any], tuple[str, ...]]:
    """What a file holds by name, and which section of a checkpoint it is from."""
    # a zip, or a pickle as torch wrote before 1.6; safetensors has its JSON after eight bytes
    is_torch = content[:2] in (b"PK", b"\x80\x02") and content[8:9] != b"{"
    if not is_torch:
        try:
            return safetensors.torch.load(content), ()
        except Exception as error:  # whatever safetensors raises for a damaged file
            reason = " ".join(str(error).split()) or type(error).__name__
            raise WeightsError(f"{path}: not safetensors ({reason})", _REMEDY) from None
    try:
        held = torch.load(io.BytesIO(content), map_location="cpu", weights_only=True)
    except Exception as error:  # whatever torch's reader raises over anybody's bytes
        reason = str(error).partition("\n")[0][:200]
        raise WeightsError(
            f"{path}: not a torch file of weights alone ({reason})",
            "save its state_dict() as a .safetensors file",
        ) from None
    section = next(
        (name for name in _SECTIONS if isinstance(held, dict) and isinstance(held.get(name), dict)),
        None,
    )
    if section is not None:
        return held[section], (f"of its {section}",)
    return (held if isinstance(held, dict) else {}), ()


def _named(held: Mapping[str, Any]) -> tuple[dict[str, Tensor], tuple[str, ...]]:
    """The tensors of a state dict, without the prefixes that all of them have."""
    tensors = {name: value for name, value in held.items() if isinstance(value, Tensor)}
    if len(tensors) > 1:
        tensors.pop("n_averaged", None)  # of torch's AveragedModel: no weight of the model
    stripped = ""
    while prefix := next(
        (each for each in _PREFIXES if tensors and all(name.startswith(each) for name in tensors)),
        None,
    ):
        tensors = {name.removeprefix(prefix): tensor for name, tensor in tensors.items()}
        stripped += prefix
    return tensors, ((f"without the prefix {stripped}",) if stripped else ())


def _of_timm(name: str) -> Path:
    """The file of timm's weights of a name, downloaded unless it is in the cache."""
    try:  # a name without a tag means whichever timm's newest version prefers
        config = timm.get_pretrained_cfg(name, allow_unregistered=False) if "." in name else None
    except RuntimeError:
        config = None
    if config is None or not config.has_weights:
        model = name.partition(".")[0]
        known = timm.list_pretrained(f"{model}.*")
        raise WeightsError(
            f"{TIMM}{name}: timm has no such weights{did_you_mean(name, known)}",
            f"use {', '.join(TIMM + each for each in known[:3])}" if known else _REMEDY,
        )
    if not config.hf_hub_id:
        raise WeightsError(f"{TIMM}{name}: not on Hugging Face's hub: {config.url}", _REMEDY)
    import huggingface_hub  # a dependency of timm's that takes a second to import

    repository, _, revision = config.hf_hub_id.partition("@")
    hub = huggingface_hub.constants
    there = huggingface_hub.try_to_load_from_cache(
        repository, _FILES[0], revision=revision or None, cache_dir=hub.HF_HUB_CACHE
    )
    if isinstance(there, str):
        return Path(there)
    reason = "HF_HUB_OFFLINE is set" if hub.HF_HUB_OFFLINE else unreachable(hub.ENDPOINT)
    if not reason:
        try:
            return Path(
                huggingface_hub.hf_hub_download(repository, _FILES[0], revision=revision or None)
            )
        except Exception as error:  # of the network, of the hub, of the disk: whatever it raises
            reason = " ".join(str(error).split())[:150] or type(error).__name__
    raise WeightsError(
        f"{TIMM}{name}: not in {hub.HF_HUB_CACHE}, and cannot be downloaded ({reason})",
        f"download {hub.ENDPOINT}/{repository}/resolve/{revision or 'main'}/{_FILES[0]} where there"
        f" is a network, then weights=<the path of {_FILES[0]}>",
    )


def unreachable(url: str, timeout_s: float = 3.0) -> str:
    """Why a server does not answer at all within a few seconds; empty where it does, be it with an
    error.

    The hub's own client tries again for half a minute, and a name without a server to ask can take
    as long to look up: hence a thread, which is left behind.
    """
    found = [f"{url} does not answer within {timeout_s:g} s"]

    def ask() -> None:
        try:
            urllib.request.urlopen(urllib.request.Request(url, method="HEAD"), timeout=timeout_s)
        except urllib.error.URLError as error:
            is_answer = isinstance(error, urllib.error.HTTPError)
            is_secret = isinstance(error.reason, ssl.SSLError)  # the hub's client has its own roots
            found[0] = "" if is_answer or is_secret else f"{url}: {error.reason}"
        except OSError as error:
            found[0] = f"{url}: {error}"
        else:
            found[0] = ""

    asking = threading.Thread(target=ask, daemon=True)
    asking.start()
    asking.join(timeout_s)
    return found[0]


def _of_torchvision(name: str) -> Path:
    """The file of torchvision's weights of a name, downloaded unless it is in the cache."""
    known = torchvision_models.known_weights(name.partition(".")[0])
    url = known.get(name)
    if url is None:
        raise WeightsError(
            f"{name}: torchvision has no such weights{did_you_mean(name, list(known))}",
            f"use {' or '.join(known)}" if known else _REMEDY,
        )
    path = Path(torch.hub.get_dir()) / "checkpoints" / url.rpartition("/")[2]
    if path.exists():
        return path
    digest = path.stem.rpartition("-")[2]  # the name ends in the first digits of its sha256
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        torch.hub.download_url_to_file(url, str(path), digest, progress=False)
    except Exception as error:  # of the network, of the server, of the disk: whatever it raises
        reason = " ".join(str(error).split())[:150] or type(error).__name__
        raise WeightsError(
            f"{name}: cannot be downloaded ({reason})",
            f"download {url} where there is a network, and give its path",
        ) from None
    return path
