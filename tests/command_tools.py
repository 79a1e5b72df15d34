"""The hmg-gpu command as tests call it, what it may say, a run of it that is stopped, and a reader of its RLE."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pytest

from hmg_gpu.commands import main as cli
from hmg_gpu.commands import masks as command

FIXED = ("--extent", 8, "--batch", 2, "--device", "cpu")  # eight images: four parts


def run(*arguments: object) -> int:
    return cli.main([str(argument) for argument in arguments])


def make(root: Path, out: Path, *more: object) -> int:
    return run("masks", "--images", root / "images", "--points", root / "masks_centroid", "--out", out, *more)


def refused(capsys: pytest.CaptureFixture, code: int, *parts: str) -> None:
    assert code == 2
    text = capsys.readouterr().err
    assert text.startswith("error: ") and text.count("\n") == 1
    for part in parts:
        assert part in text, text


def summary(folder: Path) -> dict[str, object]:
    found = json.loads((folder / "hmg.json").read_text())
    clocks = (
        "checksum",
        "seconds",
        "peak_memory_gb",
        "images_per_second",
        "megapixels_per_second",
        "ranks",
        "points_from",
    )
    return {key: value for key, value in found.items() if key not in clocks}


@contextmanager
def ctrl_c_after(parts: int) -> Iterator[None]:
    """Ctrl-C while hmg-gpu masks writes the part after so many: one mask of it is there."""
    with pytest.MonkeyPatch.context() as patch:
        write, calls = command._write_masks, []

        def interrupted(folder: Path, data, found) -> None:
            calls.append(data)
            if len(calls) > parts:
                write(folder, data.subset([0]), found[:1])
                raise KeyboardInterrupt
            write(folder, data, found)

        patch.setattr(command, "_write_masks", interrupted)
        yield


def stopped(root: Path, out: Path, after: int, *more: object) -> None:
    """A run that Ctrl-C ends while it writes part ``after``."""
    with ctrl_c_after(after):
        assert make(root, out, *FIXED, *more) == 130


def decode(segmentation: dict) -> np.ndarray:
    """Compressed RLE to a mask, as COCO's description has it."""
    height, width = segmentation["size"]
    counts: list[int] = []
    value = shift = 0
    for character in segmentation["counts"].encode():
        chunk = character - 48
        value |= (chunk & 0x1F) << shift
        shift += 5
        if not chunk & 0x20:
            if chunk & 0x10:
                value -= 1 << shift
            counts.append(value + (counts[-2] if len(counts) > 2 else 0))
            value = shift = 0
    flat = np.zeros(height * width, bool)
    position = 0
    for index, count in enumerate(counts):
        assert count >= 0
        flat[position : position + count] = index % 2
        position += count
    assert position <= flat.size
    return flat.reshape(width, height).T
