"""Our own checkpoints: written in one step, complete by themselves, and read back without trusting the file."""

from __future__ import annotations

import errno
import io
import json
import math
import resource
import signal
import warnings
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from refusal import refused
from safetensors.torch import save_file
from torch import Tensor

from hmg_gpu.common import files
from hmg_gpu.common.checksums import read_sealed_json, write_sealed_json
from hmg_gpu.common.errors import HMGError, InputError
from hmg_gpu.common.files import append_text, parse_json, write_beside, write_json, write_text
from hmg_gpu.models import build_model, checkpoints
from hmg_gpu.models.checkpoints import read_description, read_tensors, save_checkpoint
from hmg_gpu.models.weights import load_model
from hmg_gpu.training.state import recover

DESCRIPTION = {"settings": {"model": "acm"}, "normalisation": [101.5, 34.25], "epoch": 3, "results": {"iou": 0.5}}
TENSORS = {"model.weight": torch.arange(6.0).view(2, 3), "masks.current": torch.tensor([True, False])}


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


# ---- writing --------------------------------------------------------------------------------------------------------


def test_header_and_sidecar_say_the_same(tmp_path: Path) -> None:
    path = tmp_path / "new" / "last.safetensors"
    save_checkpoint(path, TENSORS, DESCRIPTION)
    assert names(path.parent) == ["last.json", "last.safetensors"]
    sidecar = json.loads(path.with_suffix(".json").read_text())
    assert sidecar.pop("checksum").encode() in path.read_bytes()
    assert read_description(path) == sidecar == DESCRIPTION
    found = read_tensors(path)
    assert found.keys() == TENSORS.keys() and all(torch.equal(found[name], TENSORS[name]) for name in TENSORS)
    path.with_suffix(".json").unlink()
    assert read_description(path) == DESCRIPTION  # the file alone is complete


@pytest.mark.filterwarnings("error")
def test_every_flipped_bit_is_told(tmp_path: Path) -> None:
    path = tmp_path / "last.safetensors"
    save_checkpoint(path, TENSORS, {"epoch": 3})
    content = path.read_bytes()
    for bit in range(8 * len(content)):
        changed = bytearray(content)
        changed[bit // 8] ^= 1 << bit % 8
        path.write_bytes(changed)
        # a key of another name makes it a file without a checksum, which is told by a warning
        with pytest.raises((InputError, UserWarning), match=r": (damaged|not a readable|has no check)"):
            read_tensors(path)
    path.write_bytes(content)
    assert read_description(path) == {"epoch": 3}


def test_files_of_two_runs_are_not_mixed_in_silence(tmp_path: Path) -> None:
    one, other = tmp_path / "one.safetensors", tmp_path / "other.safetensors"
    save_checkpoint(one, TENSORS, {"epoch": 3})
    save_checkpoint(other, TENSORS, {"epoch": 4})
    other.with_suffix(".json").replace(one.with_suffix(".json"))
    with pytest.warns(UserWarning, match=r"one\.json: does not belong to one\.safetensors"):
        assert read_description(one) == {"epoch": 3}
    checkpoints.write_sidecar(one)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert read_description(one) == {"epoch": 3}


def test_files_without_a_checksum(tmp_path: Path) -> None:
    """Weights of others have none; ours had none once."""
    theirs, old = tmp_path / "theirs.safetensors", tmp_path / "old.safetensors"
    save_file({"weight": torch.ones(3)}, theirs, metadata={"format": "pt"})
    save_file({"model.weight": torch.ones(3)}, old, metadata={"hmg_gpu": '{"epoch": 3}'})
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert read_tensors(theirs)["weight"].sum() == 3 and read_description(theirs) is None
    with pytest.warns(UserWarning, match=r"old\.safetensors: has no checksum: written by an older version, or damaged"):
        assert read_description(old) == {"epoch": 3}


def test_a_description_nested_too_deeply_is_refused(tmp_path: Path) -> None:
    """Its checksum fits, and so does that of the file beside it."""
    path, deep = tmp_path / "last.safetensors", {}
    for _ in range(60):
        deep = {"a": [deep]}
    save_checkpoint(path, TENSORS, {"stage": 1})
    save_checkpoint(path, TENSORS, deep)
    refused(lambda: read_description(path), "last.safetensors: not a readable safetensors file (nested too deeply)")
    refused(lambda: recover(path), "nested too deeply")
    save_file(TENSORS, tmp_path / "previous.safetensors")  # nobody's run
    refused(lambda: recover(path), "last.safetensors: not a readable", "nested too deeply")
    for text in ("[" * 101 + "]" * 101, "[" * 99999):
        with pytest.raises(ValueError, match="nested too deeply"):
            parse_json(text)
    assert parse_json("[" * 99 + "3" + "]" * 99) and parse_json('{"a": [1, {"b": null}]}') == {"a": [1, {"b": None}]}


@pytest.mark.parametrize("damage", ["flip", "key", "array", "cut", "gone"])
def test_sealed_json(damage: str, tmp_path: Path) -> None:
    path = tmp_path / "results.json"
    write_sealed_json(path, {"iou": 0.5, "pd": math.nan, "epochs": (2, 1)})
    assert read_sealed_json(path) == {"iou": 0.5, "pd": None, "epochs": [2, 1]}
    text = path.read_text()
    changed = {"flip": text.replace("0.5", "0.7"), "key": text.replace("checksum", "checksun"), "array": "[]"}
    path.unlink() if damage == "gone" else path.write_text(changed.get(damage, text[:20]))
    words = {"flip": "checksum does not fit", "key": "no checksum", "array": "no checksum", "gone": "no such file"}
    refused(lambda: read_sealed_json(path), f"{path}: ", words.get(damage, "not readable as JSON"))


def test_layouts_and_views_are_saved_by_value(tmp_path: Path) -> None:
    whole = torch.randn(2, 4, 3, 3)
    tensors = {
        "model.channels_last": whole.to(memory_format=torch.channels_last),
        "model.view": whole[:, ::2],
        "model.parameter": torch.nn.Parameter(torch.randn(3)),
        "model.scalar": torch.tensor(3),
    }
    save_checkpoint(tmp_path / "a.safetensors", tensors, {})
    found = read_tensors(tmp_path / "a.safetensors")
    assert all(torch.equal(found[name], value) and found[name].dtype == value.dtype for name, value in tensors.items())


def test_nan_is_null_for_other_tools(tmp_path: Path) -> None:
    """pd is NaN where a test set has no target; JSON has no NaN."""

    def no_constant(text: str) -> None:
        raise AssertionError(f"{text} is not JSON")

    path = tmp_path / "last.safetensors"
    save_checkpoint(path, TENSORS, {"results": {"pd": math.nan, "list": [math.inf, 1.5]}})
    loaded = json.loads(path.with_suffix(".json").read_text(), parse_constant=no_constant)
    assert loaded["results"] == {"pd": None, "list": [None, 1.5]}
    assert math.isnan(read_description(path)["results"]["pd"])  # our own reader gets the number back


def half_written(error: BaseException) -> type[io.FileIO]:
    """A file whose second write ends with the error, as a disk that fills up between two."""

    class Half(io.FileIO):
        writes = 0

        def write(self, content: bytes) -> int:
            self.writes += 1
            if self.writes > 1:
                raise error
            return super().write(content)

    return Half


@pytest.mark.parametrize("error", [OSError(28, "No space left on device"), KeyboardInterrupt(), RuntimeError("died")])
def test_an_interrupted_save_keeps_the_old_file(
    error: BaseException, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "last.safetensors"
    save_checkpoint(path, TENSORS, DESCRIPTION)
    before = path.read_bytes()
    with monkeypatch.context() as patch:
        patch.setattr(files, "open", half_written(error), raising=False)
        with pytest.raises(HMGError if isinstance(error, OSError) else type(error)) as caught:
            save_checkpoint(path, {"model.weight": torch.zeros(9)}, {"epoch": 4})
    if isinstance(error, OSError):
        text = str(caught.value)
        assert text.startswith(f"{path}: cannot be written (No space left on device: it needs at least 0.2 kB, ")
        assert text.endswith(" kB are free); free some space or choose another output folder")
    assert path.read_bytes() == before and read_description(path) == DESCRIPTION
    assert names(tmp_path) == ["last.json", "last.safetensors"]  # nothing half-written lies about


def test_a_full_disk_is_one_line(tmp_path: Path) -> None:
    """The real writer against a real limit: what it raises is its own kind of error."""
    path = tmp_path / "last.safetensors"
    save_checkpoint(path, TENSORS, DESCRIPTION)
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    handler = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (10_000, hard))
    try:
        with pytest.raises(HMGError) as caught:
            save_checkpoint(path, {"model.weight": torch.zeros(10_000)}, DESCRIPTION)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
        signal.signal(signal.SIGXFSZ, handler)
    assert str(path) in str(caught.value) and "cannot be written" in str(caught.value)
    assert "\n" not in str(caught.value)
    assert read_tensors(path).keys() == TENSORS.keys() and names(tmp_path) == ["last.json", "last.safetensors"]


def test_write_beside(tmp_path: Path) -> None:
    path = tmp_path / "a" / "report.txt"
    write_text(path, "old")
    with pytest.raises(KeyError), write_beside(path) as temporary:
        temporary.write_text("new, cut o")
        assert path.read_text() == "old" and temporary.parent == path.parent and temporary.suffix == ".txt"
        raise KeyError
    assert path.read_text() == "old" and names(path.parent) == ["report.txt"]
    with write_beside(path) as temporary:
        temporary.write_text("new")
        assert path.read_text() == "old"
    assert path.read_text() == "new" and names(path.parent) == ["report.txt"]


def test_append_text_keeps_what_is_there(tmp_path: Path) -> None:
    path = tmp_path / "a" / "log.jsonl"
    for line in ("first\n", "Maß\n"):
        append_text(path, line)
    assert path.read_bytes() == "first\nMaß\n".encode()
    with pytest.raises(HMGError, match=r"/a: cannot be written \(.*\); free some space or choose"):
        append_text(path.parent, "a folder")


def test_a_full_disk_is_told_with_what_is_needed_and_free(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    class Full(io.FileIO):
        def write(self, content: bytes) -> int:
            raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(files, "open", Full, raising=False)
    wanted = r"No space left on device: it needs at least 5\.0 kB, [\d.]+ kB are free\); free some space or choose"
    with pytest.raises(HMGError, match=wanted):
        write_text(tmp_path / "report.txt", "x" * 5000)


def test_a_file_where_a_folder_should_be(tmp_path: Path) -> None:
    (tmp_path / "taken").write_text("mine")
    with pytest.raises(HMGError, match=r"taken/last\.json: cannot be written \(.*\); free some space or choose"):
        write_json(tmp_path / "taken" / "last.json", {})
    assert (tmp_path / "taken").read_text() == "mine"


# ---- descriptions ---------------------------------------------------------------------------------------------------


def test_descriptions_of_foreign_files(tmp_path: Path) -> None:
    save_file({"weight": torch.ones(2)}, tmp_path / "plain.safetensors")
    save_file({"weight": torch.ones(2)}, tmp_path / "theirs.safetensors", metadata={"format": "pt"})
    torch.save({"weight": torch.ones(2)}, tmp_path / "weights.pth.tar")
    for file in ("plain.safetensors", "theirs.safetensors", "weights.pth.tar"):
        assert read_description(tmp_path / file) is None


@pytest.mark.parametrize("reader", [read_description, read_tensors])
def test_refused_files(reader: Callable[[Path], object], tmp_path: Path) -> None:
    path = tmp_path / "last.safetensors"
    refused(lambda: reader(path), "last.safetensors", "no such checkpoint; check the path")
    save_checkpoint(path, TENSORS, DESCRIPTION)
    whole = path.read_bytes()
    for content in (b"", whole[:5], whole[:-3], b"\xff" * 200):
        path.write_bytes(content)
        refused(lambda: reader(path), "last.safetensors", "not a readable safetensors file", "copy it again")


@pytest.mark.parametrize("text", ["[1, 2]", "3", '"acm"', "{broken"])
def test_refused_headers(text: str, tmp_path: Path) -> None:
    path = tmp_path / "last.safetensors"
    save_file({"weight": torch.ones(2)}, path, metadata={checkpoints.HEADER_KEY: text})
    refused(lambda: read_description(path), "last.safetensors")


# ---- load_model -----------------------------------------------------------------------------------------------------


def weights_of(name: str) -> dict[str, Tensor]:
    torch.manual_seed(5)
    return build_model(name, output_bias=None).state_dict()


def same(first: dict[str, Tensor], second: dict[str, Tensor]) -> bool:
    return first.keys() == second.keys() and all(torch.equal(first[name], second[name]) for name in first)


@pytest.mark.parametrize("name", ["acm", "dnanet"])
def test_load_model(name: str, tmp_path: Path) -> None:
    state = weights_of(name)
    description = DESCRIPTION | {"settings": {"model": name}}
    ours = {f"model.{key}": value for key, value in state.items()} | {"totals": torch.zeros(5)}
    save_checkpoint(tmp_path / "ours.safetensors", ours, description)
    save_checkpoint(tmp_path / "nameless.safetensors", ours, {"settings": 3})
    save_file(state, tmp_path / "bare.safetensors")
    torch.save({"state_dict": {f"model.{key}": value for key, value in state.items()}}, tmp_path / "lesps.pth.tar")
    for file, expected in (
        ("ours.safetensors", description),  # by the description
        ("nameless.safetensors", {"settings": 3}),  # by its tensors
        ("bare.safetensors", {}),
        ("lesps.pth.tar", {}),
    ):
        model, found = load_model(tmp_path / file)
        assert type(model).__name__.lower() == name and not model.training and found == expected
        assert same(model.state_dict(), state)
    model, _ = load_model(tmp_path / "bare.safetensors", name)
    assert same(model.state_dict(), state)


def test_load_model_refuses(tmp_path: Path) -> None:
    save_file(weights_of("dnanet"), tmp_path / "dnanet.safetensors")
    refused(lambda: load_model(tmp_path / "dnanet.safetensors", "acm"), "dnanet.safetensors: made for another model")
    refused(lambda: load_model(tmp_path / "dnanet.safetensors", "acm"), "looks like DNANet weights; use --model dnanet")
    save_file({"backbone.weight": torch.ones(3)}, tmp_path / "unet.safetensors")
    refused(lambda: load_model(tmp_path / "unet.safetensors"), "unet.safetensors: made for another model")
    (tmp_path / "photo.pth").write_bytes(b"\x89PNG" * 30)
    refused(lambda: load_model(tmp_path / "photo.pth"), "photo.pth: not a checkpoint, or damaged")
    refused(lambda: load_model(tmp_path / "nothing.pth"), "nothing.pth: no such weights file")
    described = DESCRIPTION | {"settings": {"model": "unet"}}
    save_checkpoint(tmp_path / "other.safetensors", TENSORS, described)
    refused(lambda: load_model(tmp_path / "other.safetensors"), "other.safetensors: made for another model")
