"""MCLC stage by stage against tests/reference_mclc.py and scikit-image.

Where floats decide, assignments are equal but for pixels between two centres: those are counted, and few.
"""

from __future__ import annotations

import numpy as np
import pytest
import reference_mclc as slow
import torch
from numpy.typing import NDArray
from torch import Tensor

from hmg_gpu.plain import crf, mclc, regions
from hmg_gpu.plain.noise import chance, name_words, stream, uniform
from hmg_gpu.plain.slic import grid_of, salted_lab, slic

SHAPES = (  # of crops, and why
    (21, 21),  # the default: nine centres, the middle one on the point
    (24, 24),  # an even step: pixels halfway between two centres
    (11, 21),  # cut by the image's border
    (40, 33),
    (4, 30),  # thin: more centres than nine, in one row
    (30, 3),
    (3, 3),  # each pixel a centre
    (2, 4),
    (1, 1),
    (5, 7),
)


def noisy_crop(shape: tuple[int, int], seed: int) -> tuple[NDArray, NDArray]:
    """A crop of 0 to 1 with a blob in its middle, and salt [h, w, 3]."""
    rng = np.random.default_rng(seed)
    rows, columns = np.mgrid[: shape[0], : shape[1]]
    blob = np.exp(-((rows - shape[0] // 2) ** 2 + (columns - shape[1] // 2) ** 2) / rng.uniform(4, 20))
    grey = np.round(60 + 100 * blob + rng.normal(0, 4, shape)).clip(0, 255) / 255
    return grey, rng.random((*shape, 3)) < 0.05


def planes(*crops: NDArray) -> Tensor:
    return torch.from_numpy(np.stack([crop.reshape(-1) for crop in crops])).float()


def channels(salt: NDArray) -> Tensor:
    """[h, w, 3] as [1, 3, M]."""
    return torch.from_numpy(salt.reshape(-1, 3).T.copy()).float()[None]


def labels_of(grey: NDArray, salt: NDArray, rescale: bool = True) -> NDArray:
    valid = torch.ones((1, grey.size), dtype=torch.bool)
    lab = salted_lab(planes(grey), channels(salt), valid, rescale=rescale)
    return slic(lab, valid, grey.shape[1], grid_of(*grey.shape))[0].int().numpy().reshape(grey.shape)


# ---- random numbers -------------------------------------------------------------------------------------------------


def test_the_hash_is_the_same_in_whole_numbers_of_python() -> None:
    words = [(0, 0, 5), (2**32 - 1, 7, 0), (123456789, 2**31, 40), (1, 2, 3)]
    names = stream(*torch.tensor(words).unbind(1))
    positions = stream(torch.arange(50), torch.tensor(3))
    found = chance(names, positions, 0.3)
    for row, word in enumerate(words):
        assert int(names[row]) % 2**32 == slow.stream(*word)
        wanted = [slow.drawn(slow.stream(*word), slow.stream(n, 3), 0.3) for n in range(50)]
        assert found[row].tolist() == wanted


@pytest.mark.parametrize("share", [0.0, 0.05, 0.5, 0.999])
def test_salt_has_its_share_and_no_pattern(share: float) -> None:
    side = 64
    places = torch.arange(side)
    positions = stream(places[:, None], places).reshape(-1)
    found = chance(stream(torch.arange(200), torch.tensor(9)), positions, share).view(200, side, side).double()
    spread = 5 * (share * (1 - share) / found.numel()) ** 0.5
    assert abs(float(found.mean()) - share) <= spread
    if 0 < share < 0.9:
        by_position = found.mean(0)  # five sigma of one position, over all of them
        assert float((by_position - share).abs().max()) < 5 * (share * (1 - share) / 200) ** 0.5 + 1e-9
        centred = found - share
        for other in (centred.roll(1, 0), centred.roll(1, 1), centred.roll(1, 2), centred.roll(7, 2)):
            correlation = float((centred * other).mean()) / (share * (1 - share))
            assert abs(correlation) < 5 / found.numel() ** 0.5


def test_uniform_numbers_and_names() -> None:
    drawn = uniform(stream(torch.arange(20000)))
    assert abs(float(drawn.mean()) - 0.5) < 0.02 and abs(float(drawn.var()) - 1 / 12) < 0.005
    assert name_words(["a", "b", "über"]).tolist() == [slow.name_word(name) for name in ("a", "b", "über")]
    assert chance(stream(torch.arange(3)), stream(torch.arange(4)), 0.0).sum() == 0


# ---- SLIC -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("height", [1, 2, 3, 4, 7, 12, 21, 24, 51])
def test_the_grid_is_that_of_the_reference(height: int) -> None:
    for width in (*range(1, 30), 40, 51, 60):
        places, step, reach = slow.grid(height, width)
        grid = grid_of(height, width)
        assert [(y, x) for y in grid.rows for x in grid.columns] == places and (grid.step, [*grid.reach]) == (
            step,
            reach,
        )
        assert len(grid) == len(places) >= 1
        assert all(0 <= y < height and 0 <= x < width for y, x in places)


def test_the_grid_is_that_of_scikit_image() -> None:
    util = pytest.importorskip("skimage.util", reason="scikit-image is not installed")
    for height in range(1, 40):
        for width in range(1, 40):
            _, rows, columns = util.regular_grid((1, height, width), 9)
            grid = grid_of(height, width)
            assert grid.rows == tuple(range(height))[rows] and grid.columns == tuple(range(width))[columns]
            assert grid.step == max(rows.step or 1, columns.step or 1)


@pytest.mark.parametrize("rescale", [True, False])
def test_lab_is_that_of_the_reference(rescale: bool) -> None:
    grey, salt = noisy_crop((9, 12), 1)
    salt[0, 0], salt[0, 1] = True, (True, True, False)
    for crop, own in ((grey, salt), (grey, salt & False), (np.zeros_like(grey), salt & False), (grey, salt | True)):
        valid = torch.ones((1, grey.size), dtype=torch.bool)
        found = salted_lab(planes(crop), channels(own), valid, rescale=rescale)[0]
        wanted = slow.lab_of(np.where(own, 1.0, crop[:, :, None]), rescale)
        assert np.abs(found.numpy().T.reshape(wanted.shape) - wanted).max() < 2e-4  # of 0 to 100


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("rescale", [True, False])
def test_slic_is_that_of_the_reference(shape: tuple[int, int], rescale: bool) -> None:
    differ = total = 0
    for seed in range(4):
        grey, salt = noisy_crop(shape, seed)
        found = labels_of(grey, salt, rescale)
        wanted = slow.slic(slow.lab_of(np.where(salt, 1.0, grey[:, :, None]), rescale))
        differ, total = differ + int((found != wanted).sum()), total + grey.size
    assert differ <= 0.002 * total


def test_slic_is_that_of_scikit_image() -> None:
    """Labels of noisy crops before small pieces are joined: all but one in a thousand pixels."""
    segmentation = pytest.importorskip("skimage.segmentation", reason="scikit-image is not installed")
    differ = total = 0
    for seed in range(40):
        grey, salt = noisy_crop(((21, 21), (23, 23), (15, 21), (40, 31))[seed % 4], seed)
        noisy = np.where(salt, 1.0, grey[:, :, None])
        options = {"n_segments": 9, "compactness": 20, "start_label": 0}
        wanted = segmentation.slic(noisy, enforce_connectivity=False, **options)
        differ, total = differ + int((labels_of(grey, salt) != wanted).sum()), total + grey.size
    assert differ <= 1e-3 * total


def test_the_region_under_the_point_is_that_of_scikit_image() -> None:
    """With the sequential rule for small pieces: 57 of 60 noisy crops or more."""
    segmentation = pytest.importorskip("skimage.segmentation", reason="scikit-image is not installed")
    alike = 0
    for seed in range(60):
        grey, salt = noisy_crop((21, 21), seed)
        wanted = segmentation.slic(np.where(salt, 1.0, grey[:, :, None]), n_segments=9, compactness=20)
        found = slow.merge_in_order(labels_of(grey, salt), 9)
        alike += np.array_equal(found == found[10, 10], wanted == wanted[10, 10])
    assert alike >= 57


def test_a_flat_crop_is_cut_by_place_alone() -> None:
    labels = labels_of(np.full((21, 21), 0.4), np.zeros((21, 21, 3), dtype=bool))
    rows = np.repeat([0, 1, 2], 7)
    assert np.array_equal(labels, 3 * rows[:, None] + rows)
    even = labels_of(np.full((24, 24), 0.4), np.zeros((24, 24, 3), dtype=bool))
    assert np.array_equal(even, slow.slic(np.zeros((24, 24, 3))))  # the lowest centre takes what lies between


# ---- regions --------------------------------------------------------------------------------------------------------


def winding(side: int) -> NDArray:
    """A path of one pixel's width that goes back and forth, in another label's background."""
    plane = np.zeros((side, side), dtype=int)
    plane[::2] = 1
    plane[1::4, -1] = plane[3::4, 0] = 1
    return plane


def comb(side: int) -> NDArray:
    """Long teeth that meet in the last row alone: the first pixel of each tooth learns last."""
    plane = np.zeros((side, side), dtype=int)
    plane[:, ::2] = 1
    plane[-1] = 1
    return plane


def spiral(side: int) -> NDArray:
    plane = np.zeros((side, side), dtype=int)
    y, x, dy, dx = 0, 0, 0, 1
    plane[0, 0] = 1
    for length in [side - 1, *(n for n in range(side - 1, 1, -2) for _ in (0, 1))]:
        for _ in range(length):
            y, x = y + dy, x + dx
            plane[y, x] = 1
        dy, dx = dx, -dy
    return plane


@pytest.mark.parametrize("reads", [True, False], ids=["until nothing changes", "a fixed number of rounds"])
@pytest.mark.parametrize("side", [1, 2, 9, 22, 41])
def test_components_are_those_of_the_reference(side: int, reads: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(regions, "can_read", lambda tensor: reads)
    rng = np.random.default_rng(side)
    found = [rng.integers(0, n, (side, side)) for n in (1, 2, 3, 9)]
    found += [winding(side), winding(side).T, comb(side), comb(side)[::-1].copy()]
    found += [one[::-1].copy() for one in found[-4:]] + (
        [spiral(side), spiral(side)[::-1, ::-1].copy()] if side > 2 else []
    )
    labels = torch.from_numpy(np.stack(found)).flatten(1)
    roots = regions.components(labels, torch.ones_like(labels, dtype=torch.bool), side)
    for own, plane in zip(roots, found, strict=True):
        assert np.array_equal(own.numpy().reshape(plane.shape), slow.components(plane))


@pytest.mark.parametrize("reads", [True, False])
@pytest.mark.parametrize("shape", [(21, 21), (12, 30), (7, 5), (1, 9), (9, 1), (1, 1)], ids=str)
def test_small_pieces_join_as_in_the_reference(
    shape: tuple[int, int], reads: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(regions, "can_read", lambda tensor: reads)
    rng = np.random.default_rng(5)
    found = [labels_of(*noisy_crop(shape, seed)) for seed in range(12)]
    found += [rng.integers(0, n, shape) for n in (1, 2, 4, 9)]  # crumbs that touch only crumbs
    labels = torch.from_numpy(np.stack(found)).flatten(1)
    points = torch.from_numpy(rng.integers(0, labels.shape[1], len(found)))
    valid = torch.ones_like(labels, dtype=torch.bool)
    made = regions.point_regions(labels, valid, shape[1], points, 9)
    for own, plane, point in zip(made.numpy(), found, points.tolist(), strict=True):
        wanted = slow.merge_by_border(plane, 9).reshape(-1)
        assert np.array_equal(own, wanted == wanted[point])


def test_a_region_by_hand() -> None:
    labels = torch.tensor([[0, 0, 0, 1, 1], [0, 2, 0, 1, 1], [0, 3, 3, 1, 1], [0, 0, 0, 1, 1]])
    # 20 pixels in 2: small below 5. The 2 joins the 0 around it; the 3s border it 4 times, the 1s once.
    found = regions.point_regions(labels.view(1, -1), torch.ones(1, 20).bool(), 5, torch.tensor([0]), 2)
    assert found.view(4, 5).int().tolist() == [[1, 1, 1, 0, 0]] * 4


# ---- CRF ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("shape", [(21, 21), (7, 12), (1, 5), (1, 1)], ids=str)
@pytest.mark.parametrize("pairs", [1 << 18, 300], ids=["whole", "by rows"])
def test_the_crf_is_that_of_the_reference(shape: tuple[int, int], pairs: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(crf, "PAIRS", {"cpu": pairs})
    shares, greys, energies = [], [], []
    for seed in range(3):
        grey, _ = noisy_crop(shape, seed)
        share = np.random.default_rng(seed).integers(0, 51, shape) / 50 * (grey > 0.4)
        shares.append(share)
        greys.append(grey * 255)
        energies.append(slow.mean_field(share, grey * 255))
    valid = torch.ones((3, shares[0].size), dtype=torch.bool)
    found = crf.mean_field(planes(*shares), planes(*greys), valid, shape[1]).numpy()
    wanted = np.stack(energies).reshape(3, -1)
    sure = np.abs(wanted) > 1e-3
    assert sure.mean() > 0.99 and np.array_equal(found[sure], wanted[sure] > 0)


# ---- padding, batches, order ----------------------------------------------------------------------------------------


def test_padding_changes_nothing() -> None:
    """A crop of 15 x 18 in room for 24 x 20, whose other pixels are poison."""
    shape, room = (15, 18), (24, 20)
    grey, _ = noisy_crop(shape, 3)
    wide = np.full(room, 0.9)
    wide[: shape[0], : shape[1]] = grey
    valid = np.zeros(room, dtype=bool)
    valid[: shape[0], : shape[1]] = True
    names = stream(torch.tensor([77]))

    def run(crop: NDArray, inside: NDArray) -> NDArray:
        point = torch.tensor([7 * crop.shape[1] + 9])
        found = torch.from_numpy(inside.reshape(1, -1))
        share = mclc.target_probability(planes(crop), found, crop.shape[1], point, grid_of(*shape), names, repeats=12)
        mask = crf.mean_field(share, planes(crop) * 255, found, crop.shape[1])
        assert not share[~found].any() and not mask[~found].any()
        return np.stack([part.numpy().reshape(crop.shape)[: shape[0], : shape[1]] for part in (share, mask)])

    bare, padded = run(grey, np.ones(shape, dtype=bool)), run(wide, valid)
    assert np.abs(bare[0] - padded[0]).max() <= 1 / 12 + 1e-6  # at most one copy of a pixel between two centres
    assert (bare[0] != padded[0]).mean() < 0.01 and (bare[1] != padded[1]).mean() < 0.01
