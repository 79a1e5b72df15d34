"""Weights from files, our own and the published ones, without ever running code that a file carries."""

from __future__ import annotations

import os
import pickle
import warnings
import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

from hmg_gpu.common.errors import InputError
from hmg_gpu.models import NETWORKS, build_model
from hmg_gpu.models.checkpoints import MODEL_PREFIX, check_whole, one_line, quote, read_description
from hmg_gpu.models.custom import as_option, is_custom

WRAPPERS = ("module.", "model.", "_orig_mod.")  # DistributedDataParallel, LESPS's Net and our own files, torch.compile

LAYOUTS = ("state_dict", "net", "model")  # keys under which checkpoints keep their weights


def load_weights(model: nn.Module, path: str | os.PathLike) -> None:
    """Copy the weights in a file into a network, or refuse in one line and leave the network as it was.

    Reads .safetensors (in files of our own trainer only the tensors under ``model.``) and what ``torch.save`` writes
    (.pth, .pt, .pth.tar): a bare state dict, or one under ``state_dict`` or ``net``, at most two deep. Leading
    ``model.``, ``module.`` and ``_orig_mod.`` are dropped from the names on both sides, so a wrapped network loads too.
    Values are converted to the network's dtype and device. Batch norm's ``num_batches_tracked`` may be absent.

    Args:
        model: the network, for example from :func:`hmg_gpu.models.build_model`; changed in place.
        path: the file.

    Raises:
        InputError: the file is missing, empty or no checkpoint; it holds pickled Python objects (never run; the message
            says how to convert it); it was made for another network; a shape differs; a value is not finite.
    """
    path = Path(path)
    weights = {_bare_name(name): value for name, value in _read(path).items()}
    targets = {_bare_name(name): value for name, value in model.state_dict().items()}
    _check_names(path, model, weights, targets)
    for name, target in targets.items():
        if name in weights:
            _check_tensor(path, name, weights[name], target)
    with torch.no_grad():
        for name, target in targets.items():
            if name in weights:
                target.copy_(weights[name])


def load_model(path: str | os.PathLike, name: str | None = None) -> tuple[nn.Module, dict[str, Any]]:
    """Build the network that a weights file was made for and load it, in eval mode.

    Args:
        path: a checkpoint of ours, or weights published by others, see :func:`load_weights`.
        name: as :func:`hmg_gpu.models.build_model`; None takes it from the description, or else from the tensors. A
            file never starts the code of a FILE.py:Class that its description names: that must be given here.

    Returns:
        The network on the CPU, and the description: for our own files what :func:`save_checkpoint` wrote
        (``normalisation`` holds [mean, std]), else an empty dict.

    Raises:
        InputError: as :func:`load_weights`; or the network is a FILE.py:Class and ``name`` does not say so.
    """
    description = read_description(path) or {}
    settings = description.get("settings")
    described = settings.get("model") if isinstance(settings, dict) else None
    if name is None and isinstance(described, str) and is_custom(described):
        raise InputError(
            f"{path}: its network is {quote(described)}, code that a file may not start by itself; if it is yours, "
            f"add {as_option(described)}"
        )
    if name is None and isinstance(described, str) and described.partition(":")[0] in NETWORKS:
        name = described  # its options are checked where it is built
    if name is None:
        weights = {_bare_name(key): value for key, value in _read(Path(path)).items()}
        title = _recognise(weights, {})
        name = title.lower() if title else "acm"  # load_weights says why it is not
    model = build_model(name)
    load_weights(model, path)
    return model.eval(), description


def _read(path: Path) -> dict[str, Tensor]:
    if path.is_dir():
        raise InputError(f"{path}: is a folder; give the weights file in it")
    try:
        if path.stat().st_size == 0:
            raise InputError(f"{path}: the file is empty; copy or download it again")
        weights = _read_safetensors(path) if path.suffix == ".safetensors" else _read_torch(path)
    except FileNotFoundError as error:
        raise InputError(f"{path}: no such weights file; check the path") from error
    except OSError as error:
        raise InputError(f"{path}: cannot be read ({error.strerror or one_line(error)})") from error
    if not weights:
        raise InputError(f"{path}: holds no weights; expected a state dict, alone or under 'state_dict' or 'net'")
    return weights


def _read_safetensors(path: Path) -> dict[str, Tensor]:
    check_whole(path)
    try:
        with safe_open(path, framework="pt", device="cpu") as handle:
            names = list(handle.keys())
            prefixed = [name for name in names if name.startswith(MODEL_PREFIX)]
            return {name: handle.get_tensor(name) for name in prefixed or names}
    except FileNotFoundError:
        raise
    except (SafetensorError, ValueError, RuntimeError, KeyError, AttributeError, TypeError, MemoryError) as error:
        raise InputError(f"{path}: not a readable safetensors file ({one_line(error)}); copy it again") from error


def _read_torch(path: Path) -> dict[str, Tensor]:
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # torch warns about the pickle protocol; the refusal below says what to do
            _refuse_compressed(path)
            content = torch.load(path, map_location="cpu", weights_only=True)
    except (OSError, InputError):
        raise
    except Exception as error:  # a damaged file can fail anywhere in the unpickler, with any type
        reason = str(error).rpartition("WeightsUnpickler error:")[2].strip()  # without torch's advice to run the pickle
        if isinstance(error, pickle.UnpicklingError) and ("global" in reason.lower() or _is_pickle(path)):
            raise InputError(
                f"{path}: holds pickled Python objects besides tensors, which are never run here; if you trust the "
                "file, convert it once: torch.save(torch.load(FILE, weights_only=False, map_location='cpu')"
                "['state_dict'], 'weights.pth')"
            ) from error
        raise InputError(
            f"{path}: not a checkpoint, or damaged ({one_line(reason or error)}); copy it again"
        ) from error
    for _ in range(2):
        inner = [content[key] for key in LAYOUTS if key in content] if isinstance(content, Mapping) else []
        if inner and isinstance(inner[0], Mapping):
            content = inner[0]
    if not isinstance(content, Mapping):
        return {}
    return {name: value for name, value in content.items() if isinstance(name, str) and isinstance(value, Tensor)}


def _refuse_compressed(path: Path) -> None:
    """torch.save stores without compression; a compressed record may unpack to a thousand times the file's size."""
    if zipfile.is_zipfile(path):
        with zipfile.ZipFile(path) as archive:
            for record in archive.infolist():
                if record.compress_type != zipfile.ZIP_STORED:
                    raise InputError(f"{path}: {quote(record.filename)} is compressed; write it by torch.save")


def _check_names(path: Path, model: nn.Module, weights: Mapping[str, Tensor], targets: Mapping[str, Tensor]) -> None:
    missing = [name for name in targets if name not in weights and not _optional(name)]
    unexpected = [name for name in weights if name not in targets and not _optional(name)]
    if not missing and not unexpected:
        return
    parts = [
        f"{len(names)} tensors {what} (first {', '.join(map(quote, names[:2]))})"
        for what, names in (("missing", missing), ("unexpected", unexpected))
        if names
    ]
    title = _recognise(weights, targets)
    others = f"they fit none of {', '.join(NETWORKS)}; for a network of your own give --model FILE.py:Class"
    hint = f"looks like {title} weights; use --model {title.lower()}" if title else others
    tried = type(model).__name__
    raise InputError(f"{path}: made for another model: as {tried} {' and '.join(parts)}; {hint}")


def _recognise(weights: Mapping[str, Tensor], targets: Mapping[str, Tensor]) -> str | None:
    """The class name of the known network whose names and shapes the file has, unless the target is that network."""
    shapes = {name: value.shape for name, value in weights.items() if not _optional(name)}
    for network in NETWORKS.values():
        with torch.device("meta"):
            known = network().state_dict()
        if known.keys() != targets.keys() and shapes == {k: v.shape for k, v in known.items() if not _optional(k)}:
            return network.__name__
    return None


def _check_tensor(path: Path, name: str, value: Tensor, target: Tensor) -> None:
    if value.shape != target.shape:
        raise InputError(
            f"{path}: {name} has shape {list(value.shape)}, expected {list(target.shape)}; "
            "the file was made for a network of another width or input"
        )
    plain = value.layout == torch.strided and value.device.type == "cpu" and not value.is_quantized
    if not plain or value.is_floating_point() != target.is_floating_point() or value.is_complex():
        raise InputError(f"{path}: {name} is no plain real tensor; save the state dict of the float network")
    # the value as the network will hold it: float64 weights beyond float32 become infinite in the copy
    if value.is_floating_point() and not torch.isfinite(value.to(target.dtype)).all():
        raise InputError(f"{path}: {name} holds values that are not finite; use an earlier checkpoint of that run")


def _bare_name(name: str) -> str:
    while prefix := next((wrapper for wrapper in WRAPPERS if name.startswith(wrapper)), None):
        name = name.removeprefix(prefix)
    return name


def _optional(name: str) -> bool:
    return name.endswith("num_batches_tracked")  # absent from files of old PyTorch; unused with a fixed momentum


def _is_pickle(path: Path) -> bool:
    with path.open("rb") as handle:
        return handle.read(1) == pickle.PROTO  # a bare pickle; torch.save writes a zip
