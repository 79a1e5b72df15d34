"""Sec. 3.1 against tests/reference.py: P2B, B2M and both together.

Boxes are compared exactly. Masks follow the rule for floats: probabilities within TOLERANCE of the reference, masks
equal except where the reference itself lies within TOLERANCE of 0.5, and such pixels are few.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import cases
import numpy as np
import pytest
import reference
import torch
from numpy.typing import NDArray
from torch import Tensor

import hmg_gpu
from hmg_gpu.plain import pmg

# Float32 arithmetic on P; 2e-7 was the largest difference met.
TOLERANCE = 2e-6

SETTINGS = (  # (extent, half_width): every half_width from 0 to 8, every extent of interest
    (1, 0),
    (1, 4),
    (2, 1),
    (5, 2),
    (10, 4),
    (13, 3),
    (25, 4),
    (25, 5),
    (25, 8),
    (40, 6),
    (40, 7),
)


@pytest.fixture(autouse=True)
def torch_path(monkeypatch: pytest.MonkeyPatch) -> None:
    """The kernels have tests of their own."""
    monkeypatch.setenv("HMG_BACKEND", "auto")


def random_scenes(kinds: Sequence[str]) -> tuple[list[NDArray], list[cases.Points]]:
    rng = np.random.default_rng(7)
    images = [cases.scene(rng, shape, kind) for kind in kinds for shape in cases.SCENE_SHAPES]
    return images, [cases.scene_points(rng, image.shape) for image in images]


def reference_boxes(images: Sequence[NDArray], points: Sequence[cases.Points], **settings: int) -> Tensor:
    boxes = [
        reference.point_to_box(image, point, **settings)
        for image, own in zip(images, points, strict=True)
        for point in own
    ]
    return torch.tensor(boxes, dtype=torch.int64).reshape(-1, 4)


def assert_close_masks(masks: Sequence[NDArray], soft: Sequence[NDArray], expected: Sequence[NDArray]) -> None:
    """The rule for floats, over a whole batch; `soft` and `expected` are probabilities."""
    near, inside = 0, 0
    for index, (mask, ours, theirs) in enumerate(zip(masks, soft, expected, strict=True)):
        np.testing.assert_allclose(ours, theirs, rtol=0, atol=TOLERANCE, err_msg=f"image {index}")
        # A part without contrast is exactly 0.5 in any arithmetic: not a doubtful pixel.
        doubtful = (np.abs(theirs - 0.5) <= TOLERANCE) & (theirs != 0.5)
        np.testing.assert_array_equal(mask[~doubtful], (theirs >= 0.5)[~doubtful], err_msg=f"image {index}")
        near, inside = near + int(doubtful.sum()), inside + int((theirs > 0).sum())
    assert near <= 1 + inside / 1000, f"{near} of {inside} pixels in doubt"


def assert_equals_reference(images: Sequence[NDArray], points: Sequence[cases.Points], **settings: float) -> None:
    """The whole chain on a padded batch whose padding is NaN."""
    batch, sizes = cases.pad(images, fill=np.nan)
    rows = cases.point_rows(points)
    search = {name: value for name, value in settings.items() if name != "alpha"}

    boxes = hmg_gpu.point_to_box(batch, rows, sizes=sizes, **search)
    wanted = reference_boxes(images, points, **search)
    wrong = (boxes != wanted).any(1).nonzero()[:, 0].tolist()
    assert not wrong, f"point {rows[wrong[0]].tolist()}: {boxes[wrong[0]].tolist()}, not {wanted[wrong[0]].tolist()}"

    masks = hmg_gpu.point_to_mask(batch, rows, sizes=sizes, **settings)
    soft = hmg_gpu.point_to_probability(batch, rows, sizes=sizes, **settings)
    assert not masks[~valid(sizes, masks)].any()
    assert not soft[~valid(sizes, masks)].any()
    expected = [
        reference.point_to_probability(image, own, **settings) for image, own in zip(images, points, strict=True)
    ]
    assert_close_masks(cases.cut(masks, sizes), cases.cut(soft, sizes), expected)


def valid(sizes: Tensor, batch: Tensor) -> Tensor:
    area = torch.zeros(batch.shape, dtype=torch.bool)
    for plane, (height, width) in zip(area, sizes.tolist(), strict=True):
        plane[:height, :width] = True
    return area


# ---- one case by eye ------------------------------------------------------------------------------------------------

PICTURE = """
    . . . . . . . . .
    . . . . . . . . .
    . . . # # + . . .
    . . . # # # . . .
    . . . # # # . . .
    . . . . . . . . .
    . . . . . . . . .
"""
LEVELS = {".": 10, "+": 40, "#": 100}


def picture() -> Tensor:
    return torch.tensor([[LEVELS[mark] for mark in line.split()] for line in PICTURE.strip().splitlines()]).float()


def test_one_case_by_eye() -> None:
    """A 3 x 3 target, its corner a third as bright.

    From its centre every profile reads 100 100 10 10: the one step in it is the border, the background begins two
    pixels out, and that pixel belongs to the box. sigma = 0.15 * 100 + 0.85 * 40 = 49 over the box of 25 pixels, so
    the corner has P_g = 0.5 * 30 / 39 and falls out; of the parts, none has a sigma below 40 either.
    """
    images, points = picture()[None], torch.tensor([[0, 3, 4]])
    boxes = hmg_gpu.point_to_box(images, points, extent=3, half_width=0)
    assert boxes.tolist() == [[1, 2, 6, 7]]
    mask = hmg_gpu.box_to_mask(images, points, boxes, extent=3)
    assert torch.equal(mask[0], picture() == 100)
    assert torch.equal(mask, hmg_gpu.point_to_mask(images, points, extent=3, half_width=0))

    soft = hmg_gpu.point_to_probability(images, points, extent=3, half_width=0)[0]
    assert soft[3, 4] == 1  # the maximum of every part
    assert soft[1, 2] == 0  # the minimum of every part
    assert soft[0].sum() == 0  # outside the box

    def share(bright: int, dim: int, dark: int) -> float:
        """P of the corner (40) in a part with so many pixels of 100, 40 and 10."""
        sigma = 0.15 * 100 + 0.85 * (100 * bright + 40 * dim + 10 * dark) / (bright + dim + dark)
        return 0.5 * 30 / (sigma - 10)

    # The corner lies in the whole box (8 bright, 1 dim, 16 dark pixels), in its upper 15 pixels, in its right 15.
    corner = (share(8, 1, 16) + share(5, 1, 9) + share(5, 1, 9)) / 3
    assert soft[2, 5].item() == pytest.approx(corner, abs=1e-6)


# ---- equal to the reference -----------------------------------------------------------------------------------------


@pytest.mark.parametrize(("extent", "half_width"), SETTINGS)
def test_integer_scenes_equal_reference(extent: int, half_width: int) -> None:
    images, points = random_scenes(cases.INTEGER_KINDS)
    assert_equals_reference(images, points, extent=extent, half_width=half_width)


@pytest.mark.parametrize(("extent", "half_width"), SETTINGS[::2])
def test_float_scenes_equal_reference(extent: int, half_width: int) -> None:
    images, points = random_scenes(cases.FLOAT_KINDS)
    assert_equals_reference(images, points, extent=extent, half_width=half_width)


@pytest.mark.parametrize("alpha", [0.0, 0.5, 1.0])  # at 1 sigma may be the maximum or the minimum of a part
def test_alpha_equals_reference(alpha: float) -> None:
    images, points = random_scenes(("bytes", "steps", "floats"))
    assert_equals_reference(images, points, extent=10, alpha=alpha)


def test_any_box_equals_reference(rng: np.random.Generator) -> None:
    """B2M alone, with boxes that P2B would not draw: from one pixel to the whole window, the point in any place."""
    extent, shape = 9, (30, 41)
    images = [cases.scene(rng, shape, kind) for kind in ("bytes", "steps", "floats")]
    points = [cases.scene_points(rng, shape, 30) for _ in images]
    rows = cases.point_rows(points)
    reach = torch.from_numpy(rng.integers(0, extent + 1, (len(rows), 4)))
    reach[::7] = 0
    reach[1::7] = extent
    centre = rows[:, 1:]
    low = (centre - reach[:, :2]).clamp(min=0)
    high = torch.minimum(centre + reach[:, 2:] + 1, torch.tensor(shape))
    boxes = torch.cat((low, high), dim=1)

    masks = hmg_gpu.box_to_mask(torch.from_numpy(np.stack(images)), rows, boxes, extent=extent)
    for index, image in enumerate(images):
        own = boxes[rows[:, 0] == index].tolist()
        expected = np.zeros(shape)
        for point, (y0, x0, y1, x1) in zip(points[index], own, strict=True):
            inside = expected[y0:y1, x0:x1]
            np.maximum(inside, reference.box_to_probability(image, point, (y0, x0, y1, x1)), out=inside)
        doubtful = (np.abs(expected - 0.5) <= TOLERANCE) & (expected != 0.5)
        assert doubtful.sum() <= 2
        np.testing.assert_array_equal(masks[index].numpy()[~doubtful], (expected >= 0.5)[~doubtful])
        np.testing.assert_array_equal(reference.box_to_mask(image, points[index], own), expected >= 0.5)


def test_bytes_are_taken_as_they_come(rng: np.random.Generator) -> None:
    image = cases.scene(rng, (40, 50), "bytes")
    rows = cases.point_rows([cases.scene_points(rng, image.shape)])
    single, byte = torch.from_numpy(image)[None], torch.from_numpy(image.astype(np.uint8))[None]
    assert torch.equal(hmg_gpu.point_to_box(single, rows), hmg_gpu.point_to_box(byte, rows))
    assert torch.equal(hmg_gpu.point_to_probability(single, rows), hmg_gpu.point_to_probability(byte, rows))


# ---- the real sets --------------------------------------------------------------------------------------------------

RealSet = tuple[list[NDArray], list[NDArray], list[cases.Points]]


@pytest.fixture(scope="module")
def real_set(request: pytest.FixtureRequest, data_root: Path) -> RealSet:
    name, labels = request.param
    images, masks, points = zip(*cases.read_training_set(data_root, name, labels), strict=True)
    return list(images), list(masks), list(points)


def initial_iou(real: RealSet, **settings: float) -> float:
    """Dataset IoU of the initial masks, in percent; images of like size share a batch."""
    images, masks, points = real
    intersection = union = 0
    order = sorted(range(len(images)), key=lambda index: images[index].shape)
    for start in range(0, len(order), 32):
        chosen = order[start : start + 32]
        batch, sizes = cases.pad([images[index] for index in chosen])
        target, _ = cases.pad([masks[index] for index in chosen])
        mask = hmg_gpu.point_to_mask(
            batch, cases.point_rows([points[index] for index in chosen]), sizes=sizes, **settings
        )
        intersection += int((mask & target).sum())
        union += int((mask | target).sum())
    return 100 * intersection / union


REAL_SETS = [  # (set, labels), extent, number of targets, IoU that the masks must reach
    (("NUAA-SIRST", "centroid"), 25, 270, 75.2),
    (("NUAA-SIRST", "coarse"), 25, 270, 72.2),
    (("NUDT-SIRST", "centroid"), 10, 918, 73.3),
    (("NUDT-SIRST", "coarse"), 10, 918, 66.3),
]


@pytest.mark.parametrize(
    ("real_set", "extent", "targets", "least"),
    REAL_SETS,
    indirect=["real_set"],
    ids=["-".join(row[0]) for row in REAL_SETS],
)
def test_real_sets(real_set: RealSet, extent: int, targets: int, least: float) -> None:
    images, _, points = real_set
    assert sum(map(len, points)) == targets
    for start in range(0, len(images), 64):
        part = slice(start, start + 64)
        assert_equals_reference(images[part], points[part], extent=extent)
    assert initial_iou(real_set, extent=extent) >= least


SWEEPS = [  # dataset IoU on NUAA's training set: the paper's Figs. 4(b), 5(a), 5(b)
    ("extent", (5, 10, 13, 17, 20, 25, 30, 40), (52.9, 70.3, 71.9, 74.1, 74.3, 75.3, 75.0, 74.9)),
    ("half_width", (0, 1, 2, 4, 6, 8), (74.5, 75.4, 76.0, 75.3, 75.3, 75.2)),
    ("alpha", (0.0, 0.05, 0.1, 0.15, 0.2, 0.3, 0.5), (73.9, 75.2, 75.7, 75.3, 74.6, 70.4, 58.7)),
]


@pytest.mark.parametrize("real_set", [("NUAA-SIRST", "centroid")], indirect=True, ids=["NUAA-SIRST-centroid"])
@pytest.mark.parametrize(("name", "values", "figures"), SWEEPS, ids=[row[0] for row in SWEEPS])
def test_sweeps(real_set: RealSet, name: str, values: tuple[float, ...], figures: tuple[float, ...]) -> None:
    measured = [initial_iou(real_set, **{name: value}) for value in values]
    assert measured == pytest.approx(figures, abs=0.3)


# ---- what must not change the result --------------------------------------------------------------------------------


@pytest.fixture
def byte_scenes(rng: np.random.Generator) -> tuple[list[NDArray], list[cases.Points]]:
    """Three scenes of one size, integer intensities."""
    images = [cases.scene(rng, (44, 52), kind) for kind in ("bytes", "steps", "bytes")]
    return images, [cases.scene_points(rng, image.shape, 25) for image in images]


@pytest.mark.parametrize("gain", [2.0**-9, 0.5, 4.0, 2.0**12])
def test_a_gain_changes_nothing(byte_scenes: tuple[list[NDArray], list[cases.Points]], gain: float) -> None:
    """A power of two only moves the exponent: every bit of P stays."""
    images, rows = torch.from_numpy(np.stack(byte_scenes[0])), cases.point_rows(byte_scenes[1])
    assert torch.equal(hmg_gpu.point_to_box(images * gain, rows), hmg_gpu.point_to_box(images, rows))
    assert torch.equal(hmg_gpu.point_to_probability(images * gain, rows), hmg_gpu.point_to_probability(images, rows))
    assert torch.equal(hmg_gpu.point_to_mask(images * gain, rows), hmg_gpu.point_to_mask(images, rows))


@pytest.mark.parametrize(("gain", "offset"), [(1, -128), (1, 1024), (0.25, 64), (8, -4096)])
def test_an_offset_changes_nothing(
    byte_scenes: tuple[list[NDArray], list[cases.Points]], gain: float, offset: float
) -> None:
    """Boxes stay; sigma is rounded on another grid, so P moves within the tolerance."""
    images, rows = torch.from_numpy(np.stack(byte_scenes[0])), cases.point_rows(byte_scenes[1])
    moved = images * gain + offset
    assert torch.equal((moved - offset) / gain, images), "the offset must be representable"
    assert torch.equal(hmg_gpu.point_to_box(moved, rows), hmg_gpu.point_to_box(images, rows))
    before, after = hmg_gpu.point_to_probability(images, rows), hmg_gpu.point_to_probability(moved, rows)
    # A few units of float32 at the offset, over the smallest contrast of a part, half a grey level.
    tolerance = 2 * (abs(offset) + 255 * gain) * torch.finfo(torch.float32).eps / (0.5 * gain)
    torch.testing.assert_close(after, before, rtol=0, atol=tolerance)
    doubtful = ((before - 0.5).abs() <= tolerance) & (before != 0.5)
    assert doubtful.sum() <= 20
    mask_before, mask_after = hmg_gpu.point_to_mask(images, rows), hmg_gpu.point_to_mask(moved, rows)
    assert torch.equal(mask_after[~doubtful], mask_before[~doubtful])


def flipped_rows(rows: Tensor, shape: tuple[int, int], turn: str) -> Tensor:
    image, y, x = rows.unbind(1)
    height, width = shape
    moved = {"vertical": (height - 1 - y, x), "horizontal": (y, width - 1 - x), "transpose": (x, y)}[turn]
    return torch.stack((image, *moved), dim=1)


TURNS = {
    "vertical": lambda batch: batch.flip(1),
    "horizontal": lambda batch: batch.flip(2),
    "transpose": lambda batch: batch.mT,
}


@pytest.mark.parametrize("turn", TURNS)
def test_flips_and_transposes_commute(byte_scenes: tuple[list[NDArray], list[cases.Points]], turn: str) -> None:
    """The four directions are treated alike. Transposing swaps two summands of P_f, which may move its last bit."""
    images, rows = torch.from_numpy(np.stack(byte_scenes[0])), cases.point_rows(byte_scenes[1])
    turned_rows = flipped_rows(rows, images.shape[1:], turn)
    turned = TURNS[turn](images)  # a view: neither stage may rely on contiguous memory

    y0, x0, y1, x1 = hmg_gpu.point_to_box(images, rows).unbind(1)
    height, width = images.shape[1:]
    wanted = {
        "vertical": (height - y1, x0, height - y0, x1),
        "horizontal": (y0, width - x1, y1, width - x0),
        "transpose": (x0, y0, x1, y1),
    }[turn]
    assert torch.equal(hmg_gpu.point_to_box(turned, turned_rows), torch.stack(wanted, dim=1))

    soft = TURNS[turn](hmg_gpu.point_to_probability(images, rows))
    torch.testing.assert_close(hmg_gpu.point_to_probability(turned, turned_rows), soft, rtol=0, atol=2e-7)
    clear = (soft - 0.5).abs() > 2e-7
    assert (~clear & (soft != 0.5)).sum() <= 2
    mask = TURNS[turn](hmg_gpu.point_to_mask(images, rows))
    assert torch.equal(hmg_gpu.point_to_mask(turned, turned_rows)[clear], mask[clear])


@pytest.mark.parametrize("poison", [np.nan, np.inf, -1e30, 1e30])
def test_padding_is_never_read(poison: float) -> None:
    """A batch of different sizes gives the bits of one image at a time, whatever its padding holds."""
    images, points = random_scenes(("bytes", "floats"))
    batch, sizes = cases.pad(images, fill=poison)
    rows = cases.point_rows(points)
    boxes = hmg_gpu.point_to_box(batch, rows, extent=12, sizes=sizes)
    soft = hmg_gpu.point_to_probability(batch, rows, extent=12, sizes=sizes)
    masks = hmg_gpu.point_to_mask(batch, rows, extent=12, sizes=sizes)
    again = hmg_gpu.box_to_mask(batch, rows, boxes, extent=12)
    assert torch.equal(again, masks)
    for index, (image, own) in enumerate(zip(images, points, strict=True)):
        alone, own_rows = torch.from_numpy(image)[None], cases.point_rows([own])
        height, width = image.shape
        assert torch.equal(boxes[rows[:, 0] == index], hmg_gpu.point_to_box(alone, own_rows, extent=12))
        assert torch.equal(soft[index, :height, :width], hmg_gpu.point_to_probability(alone, own_rows, extent=12)[0])
        assert torch.equal(masks[index, :height, :width], hmg_gpu.point_to_mask(alone, own_rows, extent=12)[0])
    outside = ~valid(sizes, masks)
    assert outside.any() and not masks[outside].any() and not soft[outside].any()


@pytest.mark.parametrize("pixels", [1, 997, 1 << 24])
def test_group_size_does_not_matter(
    byte_scenes: tuple[list[NDArray], list[cases.Points]], monkeypatch: pytest.MonkeyPatch, pixels: int
) -> None:
    """Points are worked on in groups that bound the memory: one point, a few, all."""
    images, rows = torch.from_numpy(np.stack(byte_scenes[0])), cases.point_rows(byte_scenes[1])
    boxes, soft = hmg_gpu.point_to_box(images, rows), hmg_gpu.point_to_probability(images, rows)
    mask = hmg_gpu.point_to_mask(images, rows)
    monkeypatch.setitem(pmg._GROUP_PIXELS, "cpu", pixels)
    assert torch.equal(hmg_gpu.point_to_box(images, rows), boxes)
    assert torch.equal(hmg_gpu.point_to_probability(images, rows), soft)
    assert torch.equal(hmg_gpu.point_to_mask(images, rows), mask)


def test_order_of_points_does_not_matter(byte_scenes: tuple[list[NDArray], list[cases.Points]]) -> None:
    images, rows = torch.from_numpy(np.stack(byte_scenes[0])), cases.point_rows(byte_scenes[1])
    order = torch.randperm(len(rows))
    assert torch.equal(hmg_gpu.point_to_box(images, rows[order]), hmg_gpu.point_to_box(images, rows)[order])
    assert torch.equal(hmg_gpu.point_to_probability(images, rows[order]), hmg_gpu.point_to_probability(images, rows))
    assert torch.equal(hmg_gpu.point_to_mask(images, rows[order]), hmg_gpu.point_to_mask(images, rows))


def test_arguments_are_left_alone(byte_scenes: tuple[list[NDArray], list[cases.Points]]) -> None:
    images, rows = torch.from_numpy(np.stack(byte_scenes[0])), cases.point_rows(byte_scenes[1])
    kept_images, kept_rows = images.clone(), rows.clone()
    hmg_gpu.point_to_probability(images, rows)
    hmg_gpu.point_to_mask(images, rows)
    assert torch.equal(images, kept_images) and torch.equal(rows, kept_rows)


def test_mask_is_probability_of_a_half(byte_scenes: tuple[list[NDArray], list[cases.Points]]) -> None:
    images, rows = torch.from_numpy(np.stack(byte_scenes[0])), cases.point_rows(byte_scenes[1])
    assert torch.equal(hmg_gpu.point_to_mask(images, rows), hmg_gpu.point_to_probability(images, rows) >= 0.5)


def test_a_flat_image_gives_the_points() -> None:
    """No contrast anywhere: away from the border a box is its point, and a part without contrast counts as target."""
    images, rows = torch.full((2, 30, 30), 0.1), torch.tensor([[0, 10, 12], [1, 9, 27], [1, 15, 4]])
    y, x = rows[:, 1], rows[:, 2]
    assert torch.equal(hmg_gpu.point_to_box(images, rows), torch.stack((y, x, y + 1, x + 1), dim=1))
    assert torch.equal(hmg_gpu.point_to_mask(images, rows).nonzero(), rows)


@pytest.mark.parametrize("batch", [0, 3])
def test_no_points(batch: int) -> None:
    images, none = torch.rand(batch, 9, 11), torch.zeros((0, 3), dtype=torch.int64)
    boxes = hmg_gpu.point_to_box(images, none)
    assert boxes.shape == (0, 4) and boxes.dtype == torch.int64
    masks = [hmg_gpu.point_to_mask(images, none), hmg_gpu.box_to_mask(images, none, boxes)]
    for mask in masks:
        assert mask.shape == images.shape and mask.dtype == torch.bool and not mask.any()
    soft = hmg_gpu.point_to_probability(images, none)
    assert soft.shape == images.shape and soft.dtype == torch.float32 and not soft.any()


# ---- errors ---------------------------------------------------------------------------------------------------------

STAGES = (hmg_gpu.point_to_box, hmg_gpu.point_to_mask, hmg_gpu.point_to_probability)


@pytest.mark.parametrize("stage", STAGES)
@pytest.mark.parametrize(
    ("row", "text"),
    [
        ([1, 8, 3], r"points row 2: \(y, x\) = \(8, 3\) lies outside image 1 of 8 x 9 pixels"),
        ([1, 3, 9], r"points row 2: \(y, x\) = \(3, 9\) lies outside image 1 of 8 x 9 pixels"),
        ([0, -1, 3], r"points row 2: \(y, x\) = \(-1, 3\) lies outside image 0 of 8 x 9 pixels"),
        ([2, 0, 0], r"points row 2: image 2 does not exist, the batch has 2"),
        ([-1, 0, 0], r"points row 2: image -1 does not exist, the batch has 2"),
    ],
)
def test_a_point_outside_is_named(stage, row: list[int], text: str) -> None:
    points = torch.tensor([[0, 0, 0], [1, 7, 8], row])
    with pytest.raises(ValueError, match=text):
        stage(torch.rand(2, 8, 9), points)


@pytest.mark.parametrize("stage", STAGES)
def test_a_point_in_the_padding_is_named(stage) -> None:
    sizes = torch.tensor([[8, 9], [5, 4]])
    with pytest.raises(ValueError, match=r"points row 1: \(y, x\) = \(2, 4\) lies outside image 1 of 5 x 4 pixels"):
        stage(torch.rand(2, 8, 9), torch.tensor([[0, 2, 4], [1, 2, 4]]), sizes=sizes)


IMAGES, POINTS = torch.rand(2, 8, 9), torch.tensor([[0, 3, 4], [1, 2, 2]])


@pytest.mark.parametrize("stage", STAGES)
@pytest.mark.parametrize(
    ("images", "points", "settings", "error", "text"),
    [
        (IMAGES.double(), POINTS, {}, TypeError, r"images: expected float32.*got torch.float64"),
        (IMAGES[0], POINTS, {}, ValueError, r"images: expected \[B, H, W\], got \[8, 9\]"),
        (IMAGES[:, None], POINTS, {}, ValueError, r"images: expected \[B, H, W\], got \[2, 1, 8, 9\]; .*squeeze"),
        (IMAGES[:, :0], POINTS, {}, ValueError, r"images: expected at least one pixel, got \[2, 0, 9\]"),
        (IMAGES, POINTS.int(), {}, ValueError, r"points: expected int64 \[P, 3\].*got torch.int32 \[2, 3\]"),
        (IMAGES, POINTS[:, 1:], {}, ValueError, r"points: expected int64 \[P, 3\].*got torch.int64 \[2, 2\]"),
        (IMAGES, POINTS[0], {}, ValueError, r"points: expected int64 \[P, 3\].*got torch.int64 \[3\]"),
        (IMAGES, POINTS, {"sizes": torch.tensor([[8, 9]])}, ValueError, r"sizes: expected int64 \[2, 2\].*\[1, 2\]"),
        (IMAGES, POINTS, {"sizes": torch.tensor([[8, 9], [9, 9]])}, ValueError, r"sizes row 1: \[9, 9\] does not fit"),
        (IMAGES, POINTS, {"sizes": torch.tensor([[0, 9], [8, 9]])}, ValueError, r"sizes row 0: \[0, 9\] does not fit"),
        (IMAGES, POINTS, {"extent": 0}, ValueError, r"extent: expected a whole number of pixels, at least 1, got 0"),
        (IMAGES, POINTS, {"extent": 2.5}, ValueError, r"extent: expected a whole number of pixels, .* got 2.5"),
        (IMAGES, POINTS, {"half_width": -1}, ValueError, r"half_width: expected a whole number .* at least 0, got -1"),
    ],
)
def test_wrong_arguments_are_named(stage, images: Tensor, points: Tensor, settings: dict, error, text: str) -> None:
    with pytest.raises(error, match=text):
        stage(images, points, **settings)


@pytest.mark.parametrize("stage", [hmg_gpu.point_to_mask, hmg_gpu.point_to_probability])
@pytest.mark.parametrize("alpha", [-0.1, 1.1, float("nan")])
def test_wrong_alpha_is_named(stage, alpha: float) -> None:
    with pytest.raises(ValueError, match=rf"alpha: expected a number from 0 to 1, got {alpha}"):
        stage(IMAGES, POINTS, alpha=alpha)


@pytest.mark.parametrize(
    ("boxes", "text"),
    [
        (torch.tensor([[2, 3, 5, 6]]), r"boxes: expected int64 \[2, 4\].*got torch.int64 \[1, 4\]"),
        (torch.tensor([[2, 3, 5, 6], [1, 1, 4, 4]]).float(), r"boxes: expected int64 \[2, 4\].*got torch.float32"),
        (torch.tensor([[2, 3, 5, 6], [1, 1, 9, 4]]), r"boxes row 1: \[1, 1, 9, 4\] must lie in the 8 x 9 image"),
        (torch.tensor([[2, 3, 3, 6], [1, 1, 4, 4]]), r"boxes row 0: \[2, 3, 3, 6\] must .* hold its point \[0, 3, 4\]"),
        (torch.tensor([[2, 0, 5, 6], [1, 1, 4, 4]]), r"boxes row 0: .* reach at most extent = 3 pixels from it"),
    ],
)
def test_wrong_boxes_are_named(boxes: Tensor, text: str) -> None:
    with pytest.raises(ValueError, match=text):
        hmg_gpu.box_to_mask(IMAGES, POINTS, boxes, extent=3)
