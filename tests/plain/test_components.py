"""Labelling against scipy.ndimage.label, one image at a time, and that in turn against a flood fill.

The Triton kernels have tests of their own; here the two paths of the CPU are forced by HMG_BACKEND.
"""

from __future__ import annotations

from collections.abc import Sequence

import cases
import numpy as np
import pytest
import reference
import torch
from numpy.typing import NDArray
from scipy import ndimage
from torch import Tensor

from hmg_gpu.common.backend import backend_for
from hmg_gpu.common.errors import InputError
from hmg_gpu.common.tensors import valid_area
from hmg_gpu.plain.components import Components, connected_components


@pytest.fixture(params=["scipy", "torch"], autouse=True)
def backend(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    monkeypatch.setenv("HMG_BACKEND", request.param)
    return request.param


def expected_components(masks: Sequence[NDArray]) -> tuple[list[NDArray], list[tuple[int, int, int, int]]]:
    """Labels of each image, numbered through the batch, and (image, area, sum_y, sum_x) of every component."""
    planes, rows = [], []
    for index, mask in enumerate(masks):
        labels, count = ndimage.label(mask, reference.EIGHT)
        planes.append(np.where(labels > 0, labels + len(rows), 0))
        for label in range(1, count + 1):
            ys, xs = np.nonzero(labels == label)
            rows.append((index, len(ys), int(ys.sum()), int(xs.sum())))
    return planes, rows


def moments(found: Components) -> list[tuple[int, int, int, int]]:
    return list(zip(*(column.tolist() for column in (found.image, found.area, found.sum_y, found.sum_x)), strict=True))


def assert_labels_equal(masks: Sequence[NDArray]) -> None:
    """A padded batch whose padding is foreground: it must neither be labelled nor join anything."""
    batch, sizes = cases.pad(masks, fill=True)
    found = connected_components(batch, sizes)
    planes, rows = expected_components(masks)
    assert moments(found) == rows
    assert len(found) == len(rows)
    labels = found.labels()
    assert labels.dtype == torch.int64 and labels.shape == batch.shape
    for index, (ours, theirs) in enumerate(zip(cases.cut(labels, sizes), planes, strict=True)):
        np.testing.assert_array_equal(ours, theirs, err_msg=f"image {index}")
    assert not labels[~valid_area(sizes, batch)].any()


def flood(mask: NDArray) -> NDArray:
    """Labels by the definition: the first pixel in raster order without a label starts the next component."""
    labels = np.zeros(mask.shape, dtype=int)
    count = 0
    for start in np.argwhere(mask).tolist():
        if labels[tuple(start)]:
            continue
        count += 1
        todo = [start]
        while todo:
            y, x = todo.pop()
            if 0 <= y < mask.shape[0] and 0 <= x < mask.shape[1] and mask[y, x] and not labels[y, x]:
                labels[y, x] = count
                todo += [(y + dy, x + dx) for dy in (-1, 0, 1) for dx in (-1, 0, 1)]
    return labels


def test_one_case_by_eye() -> None:
    mask = torch.tensor([[[0, 0, 0, 1], [1, 0, 0, 1], [0, 1, 0, 0]], [[1, 0, 0, 1], [0, 0, 0, 0], [0, 0, 0, 0]]]).bool()
    found = connected_components(mask)
    assert found.labels().tolist() == [
        [[0, 0, 0, 1], [2, 0, 0, 1], [0, 2, 0, 0]],  # the diagonal joins
        [[3, 0, 0, 4], [0, 0, 0, 0], [0, 0, 0, 0]],  # the end of a row does not join the start of the next
    ]
    assert moments(found) == [(0, 2, 1, 6), (0, 2, 3, 1), (1, 1, 0, 0), (1, 1, 0, 3)]
    assert found.centroids.tolist() == [[0.5, 3.0], [1.5, 0.5], [0.0, 0.0], [0.0, 3.0]]
    kept = found.mask(torch.tensor([True, False, False, True]))
    assert kept.nonzero().tolist() == [[0, 0, 3], [0, 1, 3], [1, 0, 3]]


def test_reference_labels_are_in_raster_order(rng: np.random.Generator) -> None:
    """What reference.py takes from SciPy: its numbers follow the components' first pixels."""
    masks = [*cases.ADVERSARIAL_MASKS.values()]
    masks += [cases.random_mask(rng, cases.random_shape(rng, 20)) for _ in range(150)]
    for mask in masks:
        np.testing.assert_array_equal(ndimage.label(mask, reference.EIGHT)[0], flood(mask))


@pytest.mark.parametrize("name", cases.ADVERSARIAL_MASKS)
def test_adversarial_mask(name: str) -> None:
    assert_labels_equal([cases.ADVERSARIAL_MASKS[name]])


def test_adversarial_masks_in_one_batch() -> None:
    """Nothing leaks from one image into the next."""
    masks = [*cases.ADVERSARIAL_MASKS.values()]
    assert_labels_equal(masks + masks[::-1])


def test_random_masks(rng: np.random.Generator) -> None:
    masks = [cases.random_mask(rng, cases.random_shape(rng)) for _ in range(400)]
    for start in range(0, len(masks), 40):
        assert_labels_equal(masks[start : start + 40])


@pytest.mark.parametrize("width", [7, 8, 31, 32, 33, 64, 65])  # around the words and blocks that labellers work in
def test_full_neighbours_stay_apart(width: int) -> None:
    """Images filled to their borders, one behind the other in memory."""
    found = connected_components(torch.ones(3, 5, width, dtype=torch.bool))
    assert found.area.tolist() == [5 * width] * 3
    assert found.image.tolist() == [0, 1, 2]


def test_large_sums_fit() -> None:
    """A full image whose coordinate sums pass 2**31."""
    side = 1700
    found = connected_components(torch.ones(1, side, side, dtype=torch.bool))
    total = side * side * (side - 1) // 2
    assert total > 2**31
    assert moments(found) == [(0, side * side, total, total)]


@pytest.mark.parametrize("turn", [lambda m: m.flip(1), lambda m: m.flip(2), lambda m: m.mT, lambda m: m[:, ::2, ::3]])
def test_any_memory_layout(rng: np.random.Generator, turn) -> None:
    batch = turn(torch.from_numpy(rng.random((5, 24, 36)) < 0.3))
    found, planes = connected_components(batch), expected_components(list(batch.numpy()))[0]
    np.testing.assert_array_equal(found.labels().numpy(), np.stack(planes))


def test_the_mask_is_left_alone(rng: np.random.Generator) -> None:
    batch = torch.from_numpy(rng.random((3, 20, 20)) < 0.4)
    kept = batch.clone()
    connected_components(batch, torch.tensor([[20, 20], [3, 4], [10, 20]]))
    assert torch.equal(batch, kept)


@pytest.mark.parametrize("shape", [(0, 4, 5), (2, 4, 5)])
def test_nothing_to_label(shape: tuple[int, int, int]) -> None:
    found = connected_components(torch.zeros(shape, dtype=torch.bool))
    assert len(found) == 0 and found.labels().shape == shape and not found.labels().any()
    assert found.centroids.shape == (0, 2)
    assert not found.mask(torch.zeros(0, dtype=torch.bool)).any()


@pytest.mark.parametrize(
    ("mask", "sizes", "error", "text"),
    [
        (torch.rand(1, 4, 5), None, TypeError, r"mask: expected bool, got torch.float32; .*logits > 0"),
        (torch.ones(4, 5).bool(), None, ValueError, r"mask: expected \[B, H, W\], got \[4, 5\]"),
        (torch.ones(1, 4, 5).bool(), torch.tensor([4, 5]), ValueError, r"sizes: expected int64 \[1, 2\].* got .*\[2\]"),
        (torch.ones(1, 4, 5).bool(), torch.tensor([[4, 6]]), ValueError, r"sizes row 0: \[4, 6\] does not fit .*4 x 5"),
    ],
)
def test_wrong_arguments_are_named(mask: Tensor, sizes: Tensor | None, error, text: str) -> None:
    with pytest.raises(error, match=text):
        connected_components(mask, sizes)


def test_backend_is_the_forced_one(backend: str) -> None:
    assert backend_for(torch.zeros(1)) == backend


def test_default_backend_of_the_cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("HMG_BACKEND")
    assert backend_for(torch.zeros(1)) == "scipy"


def test_unknown_backend_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HMG_BACKEND", "cuda")
    with pytest.raises(InputError, match=r"HMG_BACKEND=cuda: expected one of auto, triton, scipy, torch"):
        connected_components(torch.zeros(1, 2, 2, dtype=torch.bool))


def test_scipy_needs_the_cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HMG_BACKEND", "scipy")
    with pytest.raises(InputError, match=r"HMG_BACKEND=scipy: SciPy works on CPU tensors, got one on meta"):
        backend_for(torch.zeros(1, device="meta"))
