"""The makers of MCLC: what their masks hang on, their crops, bad input and settings."""

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

from hmg_gpu.common.tensors import byte_range
from hmg_gpu.data import ImageSet
from hmg_gpu.evaluation.metrics import measure
from hmg_gpu.masks import Mclc, P2bMclc, Pmg, make_maker
from hmg_gpu.masks.makers.mclc import prior_crops
from hmg_gpu.plain import crf, mclc


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
    """The mask of one point in its crop: bool [h, w]."""
    image, y, x = data.points[row].tolist()
    y0, x0, y1, x1 = box
    crop = data.images[image, y0:y1, x0:x1].numpy().astype(np.float64)
    salts = [
        slow.salt_of(crop.shape, maker.seed, data.names[image], (y, x), copy, maker.salt)
        for copy in range(maker.repeats)
    ]
    share = slow.probability_of(crop / 255, (y - y0, x - x0), salts, rescale=maker.rescale)
    return slow.mean_field(share, crop) > 0


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


@pytest.mark.parametrize("maker", [*MAKERS_TRIED, Mclc(crop=71, repeats=2)], ids=str)
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
    low, high = byte_range(sixteen.images, sixteen.sizes)
    assert torch.allclose(high, torch.tensor(60000.0)) and (low > 0).all()
    for ours, theirs in zip(byte_range(data.images, data.sizes), byte_range(eight.images, eight.sizes), strict=True):
        assert torch.equal(ours, theirs)
    for other in (sixteen, replace(data, images=data.images / 255), replace(data, images=data.images / 255 - 3)):
        found = maker.masks(other)
        assert found.any() and measure(found, data)["iou"] > 0.4
    flat = replace(data, images=torch.full(data.images.shape, 0.3))
    assert maker.masks(flat).shape == data.images.shape


def test_crops_that_need_too_much_memory_are_refused() -> None:
    refused(lambda: Mclc(crop=73), "crop = 73")
    ramp = torch.arange(200.0).expand(1, 200, 200).contiguous()
    wide = replace(tiny_set(), names=["a"], images=ramp, sizes=torch.tensor([[200, 200]]), masks=None)
    wide = replace(wide, points=torch.tensor([[0, 100, 199]]))
    refused(lambda: P2bMclc(extent=90, margin=40, repeats=2).masks(wide), "p2b-mclc: a box of", "--extent")


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
        ("mclc:crop=1", ("crop = 1", "from 3 to 71")),
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


def test_the_extent_is_settled_as_pmgs() -> None:
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
