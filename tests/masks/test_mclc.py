"""MCLC stage by stage against tests/reference_mclc.py and scikit-image, and what its makers promise.

Where floats decide, assignments are equal but for pixels between two centres: those are counted, and few.
"""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import reference
import reference_mclc as slow
import torch
from numpy.typing import NDArray
from refusal import refused
from tiny import SIZES, tiny_set
from torch import Tensor

from hmg_gpu.data import ImageSet
from hmg_gpu.evaluation.metrics import measure
from hmg_gpu.masks import Mclc, P2bMclc, Pmg, make_maker
from hmg_gpu.masks.clustering import full_scale
from hmg_gpu.masks.makers.mclc import prior_crops
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


def noisy_set(*, points: int = 3) -> ImageSet:
    """The tiny set with more points: in corners, two side by side, and in every image."""
    data = tiny_set()
    rng = np.random.default_rng(points)
    more = [(i, int(rng.integers(h)), int(rng.integers(w))) for i, (h, w) in enumerate(SIZES) for _ in range(points)]
    corners = [(0, 0, 0), (1, 39, 32), (2, 0, 44), (3, 31, 0), (4, 10, 10), (4, 10, 11)]
    every = torch.cat((data.points, torch.tensor(more + corners)))
    return replace(data, points=every.unique(dim=0))


MAKERS_TRIED = [
    Mclc(crop=9, repeats=4),
    Mclc(crop=15, repeats=3, final="threshold", threshold=0.5),
    Mclc(crop="prior", repeats=3),
    Mclc(crop=11, repeats=3, overlap="overwrite"),
    P2bMclc(extent=8, repeats=4),
    P2bMclc(extent=8, repeats=4, margin=0, cut=True),
]


@pytest.mark.parametrize("maker", MAKERS_TRIED, ids=str)
def test_masks_hang_on_nothing_else(maker: Mclc | P2bMclc, monkeypatch: pytest.MonkeyPatch) -> None:
    """Batches of one crop, an image alone, images in another order, and padding: the same bits."""
    data = noisy_set()
    wanted = maker.masks(data)
    assert wanted.dtype == torch.bool and wanted.shape == data.images.shape and wanted.any()
    assert torch.equal(wanted, maker.masks(data))
    order = [4, 0, 5, 2, 3, 1]
    other = data.subset(order)
    height, width = other.images.shape[1:]
    assert torch.equal(maker.masks(other), wanted[order, :height, :width])
    for index, (height, width) in enumerate(SIZES):
        assert not wanted[index, height:].any() and not wanted[index, :, width:].any()
        assert torch.equal(maker.masks(data.subset([index]))[0], wanted[index, :height, :width])
    monkeypatch.setattr(mclc, "_CELLS", {"cpu": 1})
    monkeypatch.setattr(crf, "PAIRS", {"cpu": 1})
    assert (maker.masks(data) != wanted).sum() <= 2  # by rows the CRF sums in another order


@pytest.mark.parametrize("maker", [MAKERS_TRIED[0], MAKERS_TRIED[1], MAKERS_TRIED[4]], ids=str)
def test_no_point_changes_the_mask_of_another(maker: Mclc | P2bMclc) -> None:
    data = noisy_set()
    united = torch.zeros(data.images.shape, dtype=torch.bool)
    for row in range(len(data.points)):
        united |= maker.masks(replace(data, points=data.points[row : row + 1]))
    assert torch.equal(maker.masks(data), united)


def test_a_later_crop_erases_where_it_is_asked_to() -> None:
    maker = Mclc(crop=11, repeats=3, overlap="overwrite")
    data = noisy_set()
    wanted = torch.zeros(data.images.shape, dtype=torch.bool)
    for row in range(len(data.points)):
        image, y, x = data.points[row].tolist()
        window = np.s_[image, max(y - 5, 0) : y + 6, max(x - 5, 0) : x + 6]
        wanted[window] = maker.masks(replace(data, points=data.points[row : row + 1]))[window]
    found = maker.masks(data)
    assert torch.equal(found, wanted) and not torch.equal(found, replace(maker, overlap="union").masks(data))


def test_seeds() -> None:
    data = noisy_set()
    for maker in (Mclc(crop=15, repeats=2), P2bMclc(extent=8, repeats=2)):
        masks = [replace(maker, seed=seed).masks(data) for seed in (0, 1, 2**32, 0)]
        assert torch.equal(masks[0], masks[3])
        assert not any(torch.equal(masks[0], other) for other in masks[1:3])
    renamed = replace(data, names=[f"other{index}" for index in range(len(data))])
    assert not torch.equal(Mclc(crop=15, repeats=2).masks(renamed), Mclc(crop=15, repeats=2).masks(data))


def reference_mask(data: ImageSet, row: int, box: tuple[int, int, int, int], maker: Mclc | P2bMclc) -> NDArray:
    """The mask of one point in its crop, and whether the CRF's energy is clear: bool [h, w] both."""
    image, y, x = data.points[row].tolist()
    y0, x0, y1, x1 = box
    crop = data.images[image, y0:y1, x0:x1].numpy().astype(np.float64)
    salts = [
        slow.salt_of(crop.shape, maker.seed, data.names[image], (y, x), copy, maker.salt)
        for copy in range(maker.repeats)
    ]
    share = slow.probability_of(crop / 255, (y - y0, x - x0), salts, rescale=maker.rescale)
    energy = slow.mean_field(share, crop)
    return energy > 0


@pytest.mark.parametrize("kind", ["mclc", "p2b-mclc"])
def test_masks_are_those_of_the_reference(kind: str) -> None:
    """With the same salt: a pixel between two centres may tip, so all but 1 % of the pixels of the crops."""
    data = tiny_set()
    sizes = data.sizes[data.points[:, 0]].tolist()
    if kind == "mclc":
        maker = Mclc(crop=15, repeats=5, seed=3)
        boxes = [(y - 7, x - 7, y + 8, x + 8) for _, y, x in data.points.tolist()]
    else:
        maker = P2bMclc(extent=8, repeats=5, margin=2)
        boxes = []
        for image, y, x in data.points.tolist():
            height, width = SIZES[image]
            plane = data.images[image, :height, :width].numpy()
            y0, x0, y1, x1 = reference.point_to_box(plane, (y, x), 8, 4)
            boxes.append((y0 - 2, x0 - 2, y1 + 2, x1 + 2))
    differ = total = 0
    found = maker.masks(data)
    for row, ((y0, x0, y1, x1), (height, width)) in enumerate(zip(boxes, sizes, strict=True)):
        box = max(y0, 0), max(x0, 0), min(y1, height), min(x1, width)
        wanted = reference_mask(data, row, box, maker)
        own = found[data.points[row, 0], box[0] : box[2], box[1] : box[3]].numpy()
        differ, total = differ + int((own != wanted).sum()), total + wanted.size
        assert found[data.points[row, 0]].sum() == own.sum()  # one point an image: nothing outside its crop
    assert differ <= 0.01 * total


# ---- crops ----------------------------------------------------------------------------------------------------------


def test_crops_around_points_and_in_boxes() -> None:
    data = noisy_set()
    limits = data.sizes[data.points[:, 0]].numpy()
    points = data.points[:, 1:].numpy()
    made = Mclc(crop=21).crops(data)
    assert np.array_equal(made.boxes[:, :2], (points - 10).clip(0)) and made.side == 21 and made.kept is None
    assert np.array_equal(made.boxes[:, 2:], np.minimum(points + 11, limits))
    wide, bare = P2bMclc(extent=8, margin=3, cut=True).crops(data), P2bMclc(extent=8, margin=0).crops(data)
    assert np.array_equal(wide.kept, bare.boxes) and wide.side == bare.side == 0
    assert np.array_equal(wide.boxes[:, :2], (bare.boxes[:, :2] - 3).clip(0))
    assert np.array_equal(wide.boxes[:, 2:], np.minimum(bare.boxes[:, 2:] + 3, limits))
    rows = np.concatenate([rows for rows, *_ in wide.alike()])
    assert sorted(rows.tolist()) == list(range(len(points)))  # each in one group


def areas_set() -> ImageSet:
    """Squares of 4, 25 and 121 pixels, one an image, their points a little aside."""
    images, masks = torch.full((4, 96, 96), 50, dtype=torch.uint8), torch.zeros((4, 96, 96), dtype=torch.bool)
    for index, side in enumerate((2, 5, 11)):
        masks[index, 40 : 40 + side, 50 : 50 + side] = True
    images[masks] = 200
    points = torch.tensor([[0, 40, 50], [1, 41, 52], [2, 44, 54], [3, 0, 95]])
    return ImageSet(list("abcd"), images, torch.full((4, 2), 96), points, masks)


def test_the_size_prior_takes_its_crops_from_the_ground_truth() -> None:
    data = areas_set()
    seen: list[set[int]] = [set() for _ in range(3)]
    for seed in range(40):
        made = prior_crops(data, seed)
        assert made.points[:3].tolist() == [[40, 50], [42, 52], [45, 55]]  # int() of the centroids
        for kind, middle in enumerate(((40.5, 50.5), (42.0, 52.0), (45.0, 55.0))):
            y0, x0, y1, x1 = made.boxes[kind].tolist()
            low, high = ((3, 5), (10, 11), (15, 25))[kind]
            assert int(middle[0] - high) <= y0 <= int(middle[0] - low)
            assert int(middle[0] + low) <= y1 <= int(middle[0] + high)
            assert int(middle[1] - high) <= x0 <= int(middle[1] - low)
            assert x1 == int(middle[1] + 3) if kind == 0 else int(middle[1] + low) <= x1 <= int(middle[1] + high)
            seen[kind].add(y0)
        y0, x0, y1, x1 = made.boxes[3].tolist()  # no target there, and a corner: the last row and column are left out
        assert (y0, x1) == (0, 95) and 3 <= y1 <= 5 and 90 <= x0 <= 92 and made.points[3].tolist() == [0, 94]
    assert [len(ends) for ends in seen] == [3, 2, 11]  # every offset of each class was drawn
    assert Mclc(crop="prior", repeats=2).about()["ground_truth"] is True
    assert "ground_truth" not in Mclc().about() and "ground truth" in str(Mclc(crop="prior"))
    bare = replace(data, masks=None)
    for call in (lambda: Mclc(crop="prior").masks(bare), lambda: Mclc(crop="prior").fit(bare)):
        refused(call, "mclc: crop=prior", "ground truth", "this set has none")


# ---- bad luck -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("maker", [*MAKERS_TRIED, Mclc(crop=101, repeats=2)], ids=str)
def test_bad_input_gives_masks(maker: Mclc | P2bMclc) -> None:
    """Flat, black and white images, a target beyond the crop, one row, one pixel, NaN, 16 bits, no point."""
    rows, columns = torch.meshgrid(torch.arange(30), torch.arange(30), indexing="ij")
    large = (((rows - 15) ** 2 + (columns - 15) ** 2) < 180).float() * 150 + 50
    broken = large.clone()
    broken[10:12, 10:12], broken[3, 3], broken[4, 4] = torch.nan, torch.inf, -5.0
    planes = [large * 0, large * 0 + 255, large * 0 + 77, large, broken, large * 200, large * 1e-3]
    images = torch.stack(planes)
    sizes = torch.tensor([[30, 30]] * 5 + [[1, 30], [1, 1]])
    places = torch.tensor([(15, 15), (0, 0), (29, 29), (0, 29)])
    points = [(i, min(y, h - 1), min(x, w - 1)) for i, (h, w) in enumerate(sizes.tolist()) for y, x in places.tolist()]
    names = [f"image {index}" for index in range(len(images))]
    data = ImageSet(names, images, sizes, torch.tensor(points).unique(dim=0), images > 100)
    masks = maker.masks(data)
    assert masks.dtype == torch.bool and masks.shape == images.shape
    assert not maker.masks(replace(data, points=data.points[:0])).any()
    twice = replace(data, points=data.points.repeat_interleave(2, 0))  # two points in one pixel
    assert torch.equal(maker.masks(twice), masks)


def test_only_contrast_counts_in_images_of_more_than_8_bits() -> None:
    data = tiny_set()
    eight = replace(data, images=data.images.float())
    maker = Mclc(crop=15, repeats=3)
    assert torch.equal(maker.masks(eight), maker.masks(data))
    inside = torch.zeros(data.images.shape, dtype=torch.bool)
    for index, (height, width) in enumerate(SIZES):
        inside[index, :height, :width] = True
    top = data.images.masked_fill(~inside, 0).amax((1, 2), keepdim=True).float()
    sixteen = replace(data, images=data.images.float() / top * 60000)
    assert torch.allclose(full_scale(sixteen), torch.tensor(60000.0)) and torch.equal(
        full_scale(data), full_scale(eight)
    )
    found = maker.masks(sixteen)
    assert found.any() and measure(found, data)["iou"] > 0.4


# ---- settings -------------------------------------------------------------------------------------------------------


def test_text_and_what_it_becomes() -> None:
    for text, maker in {
        "mclc": Mclc(),
        "mclc:crop=23,repeats=20": Mclc(crop=23, repeats=20),
        "mclc:crop=prior,rescale=false": Mclc(crop="prior", rescale=False),
        "mclc:final=threshold,threshold=0.6,seed=4": Mclc(final="threshold", threshold=0.6, seed=4),
        "p2b-mclc": P2bMclc(),
        "p2b-mclc:margin=0,cut=true,extent=10": P2bMclc(margin=0, cut=True, extent=10),
        "p2b-mclc:extent=auto,half-width=2": P2bMclc(extent="auto", half_width=2),
    }.items():
        assert make_maker(text) == maker
    given = {"pmg": Pmg(9, 3, 0.4), "seed": 5}
    assert make_maker("mclc", **given) == Mclc(seed=5)
    assert make_maker("p2b-mclc", **given) == P2bMclc(extent=9, half_width=3, seed=5)
    assert make_maker("p2b-mclc:extent=6,seed=1", **given) == P2bMclc(extent=6, half_width=3, seed=1)
    assert Mclc().crop == 21 and P2bMclc().margin == 4 and Mclc().repeats == 50 and Mclc().salt == 0.05


@pytest.mark.parametrize(
    ("text", "parts"),
    [
        ("mclc:crop=20", ("crop = 20", "odd")),
        ("mclc:crop=1", ("crop = 1", "at least 3")),
        ("mclc:crop=auto", ("crop = 'auto'", "a whole number or prior")),
        ("mclc:repeats=0", ("repeats = 0", "at least 1")),
        ("mclc:salt=1", ("salt = 1", "below 1")),
        ("mclc:final=lattice", ("final = 'lattice'", "one of crf, threshold")),
        ("mclc:overlap=no", ("overlap = 'no'", "one of union, overwrite")),
        ("mclc:margin=3", ("NAME=VALUE of repeats",)),
        ("p2b-mclc:margin=-1", ("margin = -1", "at least 0")),
        ("p2b-mclc:extent=0", ("extent = 0", "at least 1")),
        ("p2b-mclc:crop=9", ("NAME=VALUE of repeats",)),
    ],
)
def test_bad_settings_are_refused_on_one_line(text: str, parts: tuple[str, ...]) -> None:
    refused(lambda: make_maker(text), *parts)


def test_the_extent_is_settled_as_pmgs(monkeypatch: pytest.MonkeyPatch) -> None:
    data = tiny_set()
    fitted = P2bMclc().fit(data)
    assert fitted.extent == Pmg().fit(data).extent == 25 and fitted.about()["extent"] == 25
    assert P2bMclc().fit(replace(data, dataset="NUDT-SIRST")).extent == 10
    for_one = P2bMclc(extent=12, by_size=((32, 32, 3),), repeats=2)
    masks = for_one.masks(data)
    for index, extent in ((0, 3), (1, 12)):
        plain = P2bMclc(extent=extent, repeats=2).masks(data.subset([index]))[0]
        assert torch.equal(masks[index, : plain.shape[0], : plain.shape[1]], plain)
    assert for_one.about()["by_size"] == [[32, 32, 3]]
    assert for_one.change("extent", 5) == P2bMclc(extent=5, repeats=2)
