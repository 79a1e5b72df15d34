"""COCO files against pycocotools: its decoder, its areas and boxes, and its encoder byte for byte."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays
from pycocotools import mask as oracle
from pycocotools.coco import COCO
from scipy import ndimage

from hmg_gpu.commands.coco import annotations, run_lengths, write_coco

# pycocotools with numpy 2
pytestmark = pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning")

EIGHT = np.ones((3, 3))
COUNTS = [1, 15, 16, 17, 31, 32, 33, 511, 512, 513, 16383, 16384, 16385, 2**15 - 1, 2**15, 2**15 + 1, 2**19, 2**20]


def plane(height: int, width: int, *pixels: tuple[int, int]) -> np.ndarray:
    mask = np.zeros((height, width), bool)
    for y, x in pixels:
        mask[y, x] = True
    return mask


def striped(height: int, width: int, step: int) -> np.ndarray:
    """Every ``step``-th pixel in the order of the runs."""
    flat = np.zeros(height * width, bool)
    flat[::step] = True
    return flat.reshape(width, height).T


SHAPES = {
    "empty": plane(4, 7),
    "full": ~plane(4, 7),
    "one pixel in all": ~plane(1, 1),
    "first pixel": plane(4, 7, (0, 0)),
    "single pixel": plane(4, 7, (2, 3)),
    "last pixel": plane(4, 7, (3, 6)),
    "all but the first": ~plane(4, 7, (0, 0)),
    "all but the last": ~plane(4, 7, (3, 6)),
    "over a column's end": plane(4, 7, (3, 2), (0, 3)),
    "corners": plane(4, 7, (0, 0), (0, 6), (3, 0), (3, 6)),
    "tall": plane(50_000, 3, (0, 1), (49_999, 1), (7, 2)),
    "wide": plane(3, 50_000, (0, 1), (1, 49_999), (2, 7)),
    "one column": ~plane(40_000, 1, (39_000, 0)),
    "one row": ~plane(1, 40_000, (0, 39_000)),
    "large and empty": plane(1500, 1500),
    "large and full": ~plane(1500, 1500),
    "large with a hole": ~plane(1500, 1500, (750, 750)),
    "large with a pixel": plane(1500, 1500, (750, 750)),
    "stripes": striped(60, 80, 2),
    "wide stripes": striped(700, 900, 40_000),
}


def box(mask: np.ndarray) -> list[int]:
    """[left, top, width, height]; zeros where the mask is empty."""
    rows, columns = np.nonzero(mask)
    if len(rows) == 0:
        return [0, 0, 0, 0]
    return [columns.min(), rows.min(), np.ptp(columns) + 1, np.ptp(rows) + 1]


def agree(mask: np.ndarray) -> None:
    """The run lengths of a whole mask."""
    ours = run_lengths(*np.nonzero(mask), *mask.shape)
    theirs = oracle.encode(np.asfortranarray(mask, np.uint8))
    assert ours["size"] == theirs["size"] and ours["counts"].encode("ascii") == theirs["counts"]
    assert np.array_equal(oracle.decode(ours), mask)
    assert oracle.area(ours) == mask.sum() and oracle.toBbox(ours).tolist() == box(mask)


def agree_by_component(mask: np.ndarray) -> None:
    """The annotations of every component, in both forms."""
    labels, count = ndimage.label(mask, EIGHT)
    runs, polygons = (list(annotations(torch.from_numpy(mask), form)) for form in ("rle", "polygons"))
    assert len(runs) == len(polygons) == count
    covered = np.zeros_like(mask)
    for run, polygon in zip(runs, polygons, strict=True):
        part = oracle.decode(run["segmentation"]).astype(bool)
        assert np.array_equal(part, labels == labels[part].max()) and not (covered & part).any()
        covered |= part
        assert run["segmentation"]["counts"].encode() == oracle.encode(np.asfortranarray(part, np.uint8))["counts"]
        for one in (run, polygon):
            assert one["area"] == oracle.area(run["segmentation"]) == part.sum()
            assert one["bbox"] == oracle.toBbox(run["segmentation"]).tolist() == box(part)
        drawn = oracle.decode(oracle.merge(oracle.frPyObjects(polygon["segmentation"], *mask.shape)))
        assert np.array_equal(drawn, without_holes(part))
    assert np.array_equal(covered, mask)


def without_holes(part: np.ndarray) -> np.ndarray:
    """Each 4-connected piece filled, as polygons cannot have holes."""
    pieces, number = ndimage.label(part)
    filled = [ndimage.binary_fill_holes(pieces == piece, EIGHT) for piece in range(1, number + 1)]
    return np.logical_or.reduce(filled)


@pytest.mark.parametrize("name", SHAPES)
def test_shapes(name: str) -> None:
    agree(SHAPES[name])


@pytest.mark.parametrize("name", [name for name, mask in SHAPES.items() if mask.size < 1000])
def test_components_of_shapes(name: str) -> None:
    agree_by_component(SHAPES[name])


@pytest.mark.parametrize("shape", [(64, 64), (1, 500), (500, 1), (3, 400), (400, 3), (256, 300)])
@pytest.mark.parametrize("share", [0.001, 0.1, 0.5, 0.9, 0.999])
def test_random_masks(shape: tuple[int, int], share: float) -> None:
    rng = np.random.default_rng(0)
    for _ in range(5):
        agree(rng.random(shape) < share)


@pytest.mark.parametrize("seed", range(40))
def test_counts_at_the_limits_of_a_character(seed: int) -> None:
    """Counts, and differences of counts, on both sides of 2^4, 2^5, 2^9, 2^14, 2^15 and 2^20."""
    rng = np.random.default_rng(seed)
    counts = rng.choice(COUNTS, 7)
    start = seed % 2  # background or foreground first
    flat = np.repeat((np.arange(len(counts)) + start) % 2, counts).astype(bool)
    agree(flat[:, None])
    agree(flat[None])


@settings(max_examples=200, deadline=None)
@given(arrays(bool, st.tuples(st.integers(1, 9), st.integers(1, 9))))
def test_any_mask(mask: np.ndarray) -> None:
    agree(mask)
    agree_by_component(mask)


@pytest.mark.parametrize("form", ["rle", "polygons"])
def test_pycocotools_loads_the_file(form: str, tmp_path: Path) -> None:
    rng = np.random.default_rng(1)
    masks = [np.zeros((6, 9), bool), np.ones((9, 6), bool), rng.random((40, 30)) < 0.04]
    with write_coco(tmp_path / "coco.json", ["a.png", "b.png", "c.png"], [one.shape for one in masks], form) as writer:
        for row, mask in enumerate(masks):
            writer.add(row + 1, torch.from_numpy(mask))
    loaded = COCO(str(tmp_path / "coco.json"))
    assert loaded.getCatIds() == [1] and loaded.getImgIds() == [1, 2, 3]
    for row, mask in enumerate(masks):
        found = np.zeros_like(mask)
        for one in loaded.loadAnns(loaded.getAnnIds(imgIds=[row + 1])):
            part = loaded.annToMask(one).astype(bool)
            assert one["area"] == part.sum() and one["bbox"] == box(part)
            found |= part
        assert np.array_equal(found, mask)
    assert len(loaded.getAnnIds(imgIds=[2])) == 1 and loaded.getAnnIds(imgIds=[1]) == []
