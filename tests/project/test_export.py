"""COCO files against decoders written from the format's description; torch.export and ONNX reloaded."""

from __future__ import annotations

import json
import math
import warnings
from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnxruntime
import pytest
import torch
from command_tools import decode
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays
from scipy import ndimage

from hmg_gpu import false_alarm_filter, point_to_mask, update
from hmg_gpu.commands.coco import annotations, write_coco
from hmg_gpu.deployment import HybridMasks, PointMasks, filter_by_propagation
from hmg_gpu.models import build_model

EIGHT = np.ones((3, 3))

MASKS = {
    "one pixel": ["#"],
    "corner of the image": ["#..", "...", "..#"],
    "whole image": ["###", "###"],
    "diagonal": ["#..", ".#.", "..#"],
    "anti-diagonal": ["..#", ".#.", "#.."],
    "ring": ["####", "#..#", "####"],
    "ring with a target inside": ["#######", "#.....#", "#..#..#", "#.....#", "#######"],
    "pinched": ["##...", "##...", "..##.", "..##.", "....."],
    "last column and row": ["...#", "...#", "####"],
}


def from_rows(rows: list[str]) -> np.ndarray:
    return np.array([[cell == "#" for cell in row] for row in rows])


def fill(polygons: list[list[int]], shape: tuple[int, int]) -> np.ndarray:
    """Pixels whose centre lies in one of the polygons: crossings of a ray to the left."""
    rows, columns = np.mgrid[: shape[0], : shape[1]] + 0.5
    mask = np.zeros(shape, bool)
    for polygon in polygons:
        corners = np.array(polygon).reshape(-1, 2)
        inside = np.zeros(shape, bool)
        for (x0, y0), (x1, y1) in zip(corners, np.roll(corners, -1, 0), strict=True):
            assert (x0 == x1) != (y0 == y1)  # along pixel edges, no corner twice
            if x0 == x1:
                inside ^= (min(y0, y1) < rows) & (rows < max(y0, y1)) & (x0 < columns)
        mask |= inside
    return mask


def check(mask: np.ndarray) -> None:
    labels, count = ndimage.label(mask, EIGHT)
    runs = list(annotations(torch.from_numpy(mask), "rle"))
    polygons = list(annotations(torch.from_numpy(mask), "polygons"))
    assert len(runs) == len(polygons) == count
    found = np.zeros_like(labels)
    for run, polygon in zip(runs, polygons, strict=True):
        part = decode(run["segmentation"])
        label = labels[part].max()
        assert np.array_equal(part, labels == label) and (found[part] == 0).all()
        found[part] = label
        rows, columns = np.nonzero(part)
        box = [columns.min(), rows.min(), np.ptp(columns) + 1, np.ptp(rows) + 1]
        assert run["bbox"] == polygon["bbox"] == box and run["area"] == polygon["area"] == part.sum()
        filled = np.zeros_like(part)  # each 4-connected part without its holes
        pieces, number = ndimage.label(part)
        for piece in range(1, number + 1):
            filled |= ndimage.binary_fill_holes(pieces == piece, EIGHT)
        assert np.array_equal(fill(polygon["segmentation"], mask.shape), filled)
    assert np.array_equal(found, labels)


@pytest.mark.parametrize("name", MASKS)
def test_shapes(name: str) -> None:
    check(from_rows(MASKS[name]))


def test_square_by_eye() -> None:
    """Two by two pixels at y = 1, x = 2 of a 4 x 5 image: columns of 4, so 9 background, 2, 2, 2, then the rest."""
    mask = torch.zeros(4, 5, dtype=torch.bool)
    mask[1:3, 2:4] = True
    (run,) = annotations(mask, "rle")
    (polygon,) = annotations(mask, "polygons")
    assert run["segmentation"] == {"size": [4, 5], "counts": "92203"}  # 9, 2, 2, 2 - 2, 5 - 2
    assert polygon["segmentation"] == [[2, 1, 4, 1, 4, 3, 2, 3]]
    assert run["bbox"] == [2, 1, 2, 2] and run["area"] == 4


@settings(max_examples=60, deadline=None)
@given(arrays(bool, st.tuples(st.integers(1, 9), st.integers(1, 9))))
def test_any_mask(mask: np.ndarray) -> None:
    check(mask)


def test_long_runs_survive_the_text() -> None:
    """Counts and differences of several characters, negative ones too."""
    mask = np.zeros((700, 900), bool)
    mask[3, 1] = mask[650, 400] = mask[2:690, 800] = True
    check(mask)
    snake = np.zeros((400, 8), bool)
    snake[0], snake[:, 0], snake[10:300, 3], snake[5, :4], snake[20:25, 5] = True, True, True, True, True
    check(snake)


@pytest.mark.parametrize("form", ["rle", "polygons"])
def test_file(form: str, tmp_path: Path) -> None:
    masks = {"b.png": from_rows(MASKS["ring"]), "a.tif": np.zeros((2, 5), bool), "c.png": from_rows(MASKS["diagonal"])}
    path = tmp_path / "coco.json"
    with write_coco(path, list(masks), [mask.shape for mask in masks.values()], form) as writer:
        for row, mask in enumerate(masks.values()):
            writer.add(row + 1, torch.from_numpy(mask))
        assert not path.exists()
    content = json.loads(path.read_text())
    assert content["categories"] == [{"id": 1, "name": "target"}]
    assert [(one["id"], one["file_name"], one["height"], one["width"]) for one in content["images"]] == [
        (1, "b.png", 3, 4),
        (2, "a.tif", 2, 5),
        (3, "c.png", 3, 3),
    ]
    assert [(one["id"], one["image_id"], one["category_id"], one["iscrowd"]) for one in content["annotations"]] == [
        (1, 1, 1, 0),
        (2, 3, 1, 0),
    ]
    assert writer.count == 2


def test_no_mask_at_all(tmp_path: Path) -> None:
    with write_coco(tmp_path / "coco.json", ["a.png"], [(2, 2)], "rle") as writer:
        writer.add(1, torch.zeros(2, 2, dtype=torch.bool))
    assert json.loads((tmp_path / "coco.json").read_text())["annotations"] == []


def test_a_failed_run_leaves_no_file(tmp_path: Path) -> None:
    with pytest.raises(KeyError), write_coco(tmp_path / "coco.json", ["a.png"], [(2, 2)], "rle"):
        raise KeyError("stopped")
    assert list(tmp_path.iterdir()) == []


# ---- torch.export and ONNX ------------------------------------------------------------------------------------------


def scene(count: int, capacity: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Two 64 x 64 images with bright blobs, their points, and unused rows of -1."""
    rng = np.random.default_rng(count)
    rows, columns = np.mgrid[:64, :64]
    images = 60 + rng.normal(0, 3, (2, 64, 64))
    points = torch.full((capacity, 3), -1)
    for index in range(count):
        image, y, x = rng.integers(0, [2, 64, 64])
        images[image] += 100 * np.exp(-((rows - y) ** 2 + (columns - x) ** 2) / 4)
        points[index] = torch.tensor([image, y, x])
    return torch.from_numpy(images.round()).float(), points


def reload(module: torch.nn.Module, example: tuple[torch.Tensor, ...], path: Path, form: str) -> Callable:
    """What another process would run: the module exported with an example, written and read again."""
    program = torch.export.export(module, example)
    if form == "torch":
        torch.export.save(program, path)
        return torch.export.load(path).module()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of the exporter about itself
        torch.onnx.export(program, example, verbose=False).save(path)
    session = onnxruntime.InferenceSession(path)
    names = [one.name for one in session.get_inputs()]

    def run(*inputs: torch.Tensor) -> torch.Tensor:
        (result,) = session.run(None, {name: one.numpy() for name, one in zip(names, inputs, strict=True)})
        return torch.from_numpy(result)

    return run


FORMS = pytest.mark.parametrize("form", ["torch", pytest.param("onnx", marks=pytest.mark.slow)])


@FORMS
def test_exported_pmg(form: str, tmp_path: Path) -> None:
    settings = {"extent": 8, "half_width": 3, "alpha": 0.2}
    module = reload(PointMasks(**settings), scene(5, 8), tmp_path / "pmg", form)
    for count in (0, 3, 8):
        images, points = scene(count, 8)
        wanted = point_to_mask(images, points[:count], **settings)
        assert torch.equal(module(images, points), wanted) and bool(wanted.any()) == (count > 0)


@pytest.mark.slow
@FORMS
def test_exported_network_threshold_update(form: str, tmp_path: Path) -> None:
    net = build_model("acm", output_bias=0.0).eval()
    level = math.log(0.6 / 0.4)
    with torch.no_grad():  # a tenth of everything is foreground
        logits = net((scene(6, 6)[0][:, None] - 63) / 21)
        for convolution in net.output_convolutions():
            convolution.bias += level - logits.quantile(0.9)
    settings = {"mean": 63.0, "std": 21.0, "threshold": 0.6, "radius": 12, "extent": 8}
    module = reload(HybridMasks(net, **settings), scene(3, 6), tmp_path / "hybrid", form)
    for count in (0, 2, 6):
        images, points = scene(count, 6)
        with torch.no_grad():
            prediction = net((images[:, None] - 63) / 21)[:, 0] > level
        initial = point_to_mask(images, points[:count], extent=8)
        wanted = update(prediction, initial, points[:count], radius=12)
        assert torch.equal(module(images, points), wanted) and prediction.any()
        assert count == 0 or not torch.equal(wanted, initial)


def spiral(size: int) -> torch.Tensor:
    """One component whose ends are as far apart as can be: labels need many rounds."""
    plane = torch.zeros(size, size, dtype=torch.bool)
    top, left, bottom, right = 0, 0, size - 1, size - 1
    while top <= bottom and left <= right:
        plane[top, left : right + 1] = plane[top : bottom + 1, right] = plane[bottom, left : right + 1] = True
        plane[top + 2 : bottom + 1, left] = True
        if left + 1 < size and top + 2 < size:
            plane[top + 2, left : left + 2] = True
        top, left, bottom, right = top + 2, left + 2, bottom - 2, right - 2
    return plane


class Filter(torch.nn.Module):
    def forward(self, prediction: torch.Tensor, points: torch.Tensor) -> torch.Tensor:
        return filter_by_propagation(prediction, points, 4)


@pytest.mark.parametrize("form", ["torch", "onnx"])
def test_exported_filter(form: str, rng: np.random.Generator, tmp_path: Path) -> None:
    """Against the library's: random masks, everything, nothing, a spiral, and points outside their image."""
    plain = torch.zeros(33, 33, dtype=torch.bool)
    masks = [torch.from_numpy(rng.random((33, 33)) < share) for share in (0.02, 0.1, 0.3)]
    masks = torch.stack([*masks, ~plain, plain, spiral(33)])
    unused = torch.tensor([[-1, -1, -1], [0, 33, 0], [6, 0, 0]])
    module = None
    for _ in range(3):
        points = torch.from_numpy(rng.integers(0, [len(masks), 33, 33], (9, 3)))
        wanted = false_alarm_filter(masks, points, radius=4)
        example = (masks, torch.cat((points, unused)))
        module = module or reload(Filter(), example, tmp_path / "filter", form)
        assert torch.equal(module(*example), wanted)
        assert wanted.any() and not torch.equal(wanted, masks)
        masks = masks.flip(0)
