"""Weights from files, our own and the published ones, without ever running code that a file carries."""

from __future__ import annotations

import json
import os
import pickle
import re
import shutil
import warnings
import zipfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor, nn

from .errors import InputError
from .files import write_beside, write_bytes, write_json
from .models import NETWORKS, build_model

WRAPPERS = ("module.", "model.", "_orig_mod.")  # DistributedDataParallel, LESPS's Net and our own files, torch.compile
LAYOUTS = ("state_dict", "net", "model")  # keys under which checkpoints keep their weights
MODEL_PREFIX = "model."  # in our own safetensors files; the other tensors there are the trainer's state
PREVIOUS = "previous.safetensors"  # beside last.safetensors: the one before it
HEADER_KEY = "hmg_gpu"  # under which our safetensors files carry their description


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
    _check_names(path, weights, targets)
    for name, target in targets.items():
        if name in weights:
            _check_tensor(path, name, weights[name], target)
    with torch.no_grad():
        for name, target in targets.items():
            if name in weights:
                target.copy_(weights[name])


def save_checkpoint(path: str | os.PathLike, tensors: Mapping[str, Tensor], description: Mapping[str, Any]) -> None:
    """Write tensors and what they are to one safetensors file, and the description also to a JSON file beside it.

    The safetensors file alone is complete (its header carries the description) and replaces the old one in one step;
    the JSON is for people and other tools.

    Args:
        path: ends in .safetensors.
        tensors: any device; weights under ``model.``, anything else under other names.
        description: settings, normalisation, epoch, metrics, versions: JSON values.

    Raises:
        HMGError: the file cannot be written.
    """
    path = Path(path)
    plain = {name: value.detach().to("cpu").contiguous() for name, value in tensors.items()}
    content = save(plain, metadata={HEADER_KEY: json.dumps(description)})  # safetensors' own file would be 0600
    write_bytes(path, content)
    write_json(path.with_suffix(".json"), description)


def read_description(path: str | os.PathLike) -> dict[str, Any] | None:
    """What :func:`save_checkpoint` wrote beside the tensors, or None for a file that is not ours."""
    path = Path(path)
    if path.suffix != ".safetensors":
        return None
    try:
        with safe_open(path, framework="pt", device="cpu") as handle:
            text = (handle.metadata() or {}).get(HEADER_KEY)
        description = None if text is None else json.loads(text)
    except FileNotFoundError as error:
        raise InputError(f"{path}: no such checkpoint; check the path") from error
    except (SafetensorError, OSError, ValueError, RuntimeError) as error:
        raise InputError(f"{path}: not a readable safetensors file ({_one_line(error)}); copy it again") from error
    if description is not None and not isinstance(description, dict):
        raise InputError(
            f"{path}: the description in its header is not an object; the file was not written by train.py"
        )
    if description is not None and not _is_normalisation(description.get("normalisation", [0, 1])):
        raise InputError(
            f"{path}: normalisation {_quote(str(description['normalisation']))} in its header is no mean and positive "
            "std; copy the file again"
        )
    return description


def read_tensors(path: str | os.PathLike) -> dict[str, Tensor]:
    """All tensors of a checkpoint of ours, on the CPU."""
    path = Path(path)
    try:
        with safe_open(path, framework="pt", device="cpu") as handle:
            return {name: handle.get_tensor(name) for name in handle.keys()}  # noqa: SIM118, a handle is no dict
    except FileNotFoundError as error:
        raise InputError(f"{path}: no such checkpoint; check the path") from error
    except (SafetensorError, OSError, ValueError, RuntimeError) as error:
        raise InputError(f"{path}: not a readable safetensors file ({_one_line(error)}); copy it again") from error


def check_state(
    path: Path, description: Mapping[str, Any], tensors: Mapping[str, Tensor], parameters: Sequence[Tensor]
) -> None:
    """Refuse a run's state whose parts are not what ``Training.save`` writes, before any of it is taken up.

    Args:
        path: where it comes from.
        description, tensors: what :func:`read_description` and :func:`read_tensors` gave.
        parameters: those of the network, in the optimiser's order.

    Raises:
        InputError: the position, the results, or a tensor of the optimiser is none; the text names it.
    """

    def require(good: bool, what: str) -> None:
        if not good:
            raise InputError(f"{path}: {what} is not what a run of train.py writes; take an earlier checkpoint")

    for key in ("stage", "epoch", "step"):
        require(type(description[key]) is int and 0 <= description[key] < 2**31, key)
    require(description["stage"] <= 2, "stage")
    warned, results = description["warned"], description["results"]
    require(isinstance(warned, list) and all(isinstance(text, str) for text in warned), "warned")
    require(isinstance(results, dict), "results")
    rows = [row for name, row in results.items() if name != "masks"]
    masks = results.get("masks", {})
    require(isinstance(masks, dict), "results of the masks")
    for row in (*rows, *masks.values()):
        known = isinstance(row, dict) and row.keys() >= {"iou", "niou", "pd", "fa", "pixel_fa", "matched", "targets"}
        require(known, "results")
        for value in row.values():  # Pd is NaN where there are no targets
            require(type(value) in (int, float) and not abs(value) > 1e18, "results")
    require(tensors["totals"].dtype == torch.float64 and tensors["totals"].shape == (5,), "totals")
    require(tensors["masks.current"].dtype == torch.bool, "masks.current")
    for name, value in tensors.items():
        if name.startswith("optimizer."):
            found = re.fullmatch(r"optimizer\.(\d{1,6})\.(step|exp_avg|exp_avg_sq)", name)
            require(found is not None and int(found[1]) < len(parameters), _quote(name))
            shape = () if found[2] == "step" else parameters[int(found[1])].shape
            require(value.shape == shape and value.dtype == torch.float32, name)
            others = {f"optimizer.{found[1]}.{key}" for key in ("step", "exp_avg", "exp_avg_sq")}
            require(others <= tensors.keys(), name)


def keep_previous(path: str | os.PathLike) -> None:
    """Before a checkpoint is replaced: let ``previous.safetensors`` beside it be what it is now (no copy where the file
    system has hard links)."""
    path = Path(path)
    if not path.exists():
        return
    with write_beside(path.with_name(PREVIOUS), path.stat().st_size) as temporary:
        temporary.unlink(missing_ok=True)
        try:
            os.link(path, temporary)
        except OSError:
            shutil.copyfile(path, temporary)


def recover(path: str | os.PathLike) -> str | None:
    """Where a checkpoint is missing or damaged, put the one that :func:`keep_previous` kept in its place.

    Returns:
        What was done, in words, or None where nothing had to be done.

    Raises:
        InputError: it is not readable, and neither is another.
    """
    path = Path(path)
    previous = path.with_name(PREVIOUS)
    try:
        read_description(path)
        return None
    except InputError as error:
        if not previous.exists():
            raise
        about = read_description(previous) or {}
        with write_beside(path, previous.stat().st_size) as temporary:
            shutil.copyfile(previous, temporary)
        place = f"stage {about.get('stage', 0) + 1}, epoch {about.get('epoch', 0) + 1}"
        return f"{error}; it is skipped: going on from the checkpoint before it, {place}"


def load_model(path: str | os.PathLike, name: str | None = None) -> tuple[nn.Module, dict[str, Any]]:
    """Build the network that a weights file was made for and load it, in eval mode.

    Args:
        path: a checkpoint of ours, or weights published by others, see :func:`load_weights`.
        name: "acm" or "dnanet"; None takes it from the description, or else from the file's tensors.

    Returns:
        The network on the CPU, and the description: for our own files what :func:`save_checkpoint` wrote
        (``normalisation`` holds [mean, std]), else an empty dict.
    """
    description = read_description(path) or {}
    settings = description.get("settings")
    described = settings.get("model") if isinstance(settings, dict) else None
    name = name or next((known for known in NETWORKS if known == described), None)
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
        raise InputError(f"{path}: cannot be read ({error.strerror or _one_line(error)})") from error
    if not weights:
        raise InputError(f"{path}: holds no weights; expected a state dict, alone or under 'state_dict' or 'net'")
    return weights


def _read_safetensors(path: Path) -> dict[str, Tensor]:
    try:
        with safe_open(path, framework="pt", device="cpu") as handle:
            names = list(handle.keys())
            own = [name for name in names if name.startswith(MODEL_PREFIX)]
            return {name: handle.get_tensor(name) for name in own or names}
    except FileNotFoundError:
        raise
    except (SafetensorError, ValueError, RuntimeError, KeyError, AttributeError, TypeError, MemoryError) as error:
        raise InputError(f"{path}: not a readable safetensors file ({_one_line(error)}); copy it again") from error


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
            f"{path}: not a checkpoint, or damaged ({_one_line(reason or error)}); copy it again"
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
                    raise InputError(f"{path}: {_quote(record.filename)} is compressed; write it by torch.save")


def _check_names(path: Path, weights: Mapping[str, Tensor], targets: Mapping[str, Tensor]) -> None:
    missing = [name for name in targets if name not in weights and not _optional(name)]
    unexpected = [name for name in weights if name not in targets and not _optional(name)]
    if not missing and not unexpected:
        return
    parts = [
        f"{len(names)} tensors {what} (first {', '.join(map(_quote, names[:2]))})"
        for what, names in (("missing", missing), ("unexpected", unexpected))
        if names
    ]
    title = _recognise(weights, targets)
    hint = f"looks like {title} weights; use --model {title.lower()}" if title else "give weights of this network"
    raise InputError(f"{path}: made for another model: {' and '.join(parts)}; {hint}")


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


def _is_normalisation(value: Any) -> bool:
    numbers = isinstance(value, list) and len(value) == 2 and all(type(number) in (int, float) for number in value)
    return numbers and all(abs(number) <= 1e30 for number in value) and value[1] > 0


def _quote(name: str) -> str:
    return name if name.isprintable() and len(name) <= 80 else ascii(name[:80])


def _is_pickle(path: Path) -> bool:
    with path.open("rb") as handle:
        return handle.read(1) == pickle.PROTO  # a bare pickle; torch.save writes a zip


def _one_line(error: BaseException | str) -> str:
    lines = str(error).strip().splitlines()
    return lines[0][:160] if lines else type(error).__name__
