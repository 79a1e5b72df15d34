"""Regions, squares around them, components that touch something, and filled holes, against SciPy."""

from __future__ import annotations

# isort: off
import kernel_tools  # noqa: F401 - before any kernel is decorated

# isort: on
import cases
import numpy as np
import pytest
import reference_rules
import torch
from reference import EIGHT
from scipy import ndimage

from hmg_gpu.masks.regions import Squares, fill_holes, find_regions, number_components, touched


@pytest.fixture(params=["scipy", "torch", "triton"], autouse=True)
def backend(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    monkeypatch.setenv("HMG_BACKEND", request.param)
    monkeypatch.setattr("hmg_gpu.masks.regions.ROOM", 128)
    return request.param


@pytest.fixture(scope="module")
def masks() -> list[np.ndarray]:
    rng = np.random.default_rng(0)
    few = [cases.random_mask(rng, cases.random_shape(rng, 24)) for _ in range(6)]
    return [*cases.ADVERSARIAL_MASKS.values(), *few]


def test_regions(masks: list[np.ndarray]) -> None:
    batch, sizes = cases.pad(masks, fill=1)  # foreground in the padding, which is no region's
    found = find_regions(batch, sizes, 2)
    real = found.rows(found.area > 0)
    rows = [
        (index, area, y, x, height, width)
        for index, mask in enumerate(masks)
        for area, y, x, (height, width) in reference_rules.regions(mask * np.uint8(255))
    ]
    sides = real.box[:, 2:] - real.box[:, :2]
    ours = torch.cat((torch.stack((real.image, real.area), 1), real.centre, sides), 1)
    assert ours.tolist() == [list(row) for row in rows]
    for image, (y0, x0, y1, x1) in zip(real.image.tolist(), real.box.tolist(), strict=True):
        part = masks[image][y0:y1, x0:x1]
        assert part[0].any() and part[-1].any() and part[:, 0].any() and part[:, -1].any()


def test_the_table_leaves_out_what_it_has_no_room_for(backend: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("hmg_gpu.masks.regions.ROOM", 3)
    batch = torch.zeros(2, 9, 9, dtype=torch.bool)
    batch[:, ::2, ::2] = True  # 25 regions each
    found = find_regions(batch, torch.tensor([[9, 9], [9, 9]]), 1)
    assert int((found.area > 0).sum()) == (8 if backend == "triton" else 50)
    assert len(find_regions(batch[:0], torch.zeros(0, 2, dtype=torch.int64), 1)) == 0


def test_components_that_touch(masks: list[np.ndarray]) -> None:
    batch, _ = cases.pad(masks)
    rng = np.random.default_rng(1)
    seeds = torch.from_numpy(rng.random(batch.shape) < 0.02)
    labels, counts = number_components(batch)
    for single in (False, True):
        found = touched(batch, seeds, single=single)
        for index, mask in enumerate(batch.numpy()):
            wanted = reference_rules.keep_touching(mask, seeds[index].numpy(), single=single)
            assert np.array_equal(found[index].numpy(), wanted)
    for index, mask in enumerate(batch.numpy()):
        numbered, count = ndimage.label(mask, EIGHT)
        assert np.array_equal(labels[index].numpy(), numbered) and int(counts[index]) == count


def test_holes_are_filled_as_outer_contours_are(masks: list[np.ndarray]) -> None:
    batch, sizes = cases.pad(masks)
    found = fill_holes(batch)
    for index, (ours, mask) in enumerate(zip(cases.cut(found, sizes), masks, strict=True)):
        # SciPy takes the image's border for one: foreground there closes nothing.
        wanted = ndimage.binary_fill_holes(np.pad(mask, 1))[1:-1, 1:-1]
        assert np.array_equal(ours, wanted), index
    assert any(not torch.equal(one, other) for one, other in zip(found, batch, strict=True))


def test_squares_are_cut_at_the_image() -> None:
    mask = torch.zeros(2, 7, 9, dtype=torch.bool)
    mask[0, 0, 0] = mask[1, 3, 4] = True
    sizes = torch.tensor([[7, 9], [4, 6]])
    plane = torch.arange(2 * 7 * 9).view(2, 7, 9)
    found = find_regions(mask, sizes, 1)
    found = found.rows(found.area > 0)
    squares = Squares.around(found, 2, mask.shape, sizes)
    for row, (y, x) in enumerate(((0, 0), (3, 4))):
        inside = reference_rules.square(tuple(sizes[row].tolist()), y, x, 2)
        assert sorted(squares.take(plane)[row][squares.inside[row]].tolist()) == sorted(
            plane[row, : sizes[row, 0], : sizes[row, 1]].numpy()[inside].tolist()
        )
    assert not squares.take(plane)[~squares.inside].any()
