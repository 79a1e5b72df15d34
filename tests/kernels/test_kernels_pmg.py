"""kernels/pmg.py (P2B + B2M) interpreted: equal to hmg_gpu.plain.pmg bit for bit, and to tests/reference.py."""

from __future__ import annotations

# isort: off
from kernel_tools import DEVICE, poisoned_memory, program_at, shuffled_programs  # before any kernel is decorated

# isort: on
import struct

import numpy as np
import pytest
import reference
import torch
import triton.language as tl
from cases import FLOAT_KINDS, INTEGER_KINDS, SCENE_SHAPES, cut, pad, point_rows, scene, scene_points, sweep

from hmg_gpu.kernels import pmg as kernels
from hmg_gpu.plain import pmg

SETTINGS = [
    {"extent": 25, "half_width": 4, "alpha": 0.15},  # the paper's
    {"extent": 10, "half_width": 4, "alpha": 0.15},  # NUDT-SIRST
    {"extent": 1, "half_width": 0, "alpha": 0.0},
    {"extent": 9, "half_width": 8, "alpha": 1.0},
    {"extent": 40, "half_width": 1, "alpha": 0.3},
]
# How far float32 may move a probability: pixels whose reference lies this close to 0.5 may fall on either side.
TOLERANCE = 1e-5


def run(images, points, *, sizes=None, boxes=None, extent=25, half_width=4, alpha=0.15, seed=0, soft=False):
    tensors = [None if t is None else t.to(DEVICE) for t in (images, points, boxes, sizes)]
    with poisoned_memory(), shuffled_programs(seed):
        found, mask = kernels.launch(*tensors, extent, half_width, alpha, True, soft)
    return found.cpu(), mask.cpu()


def check(images, points_of_images, *, integer: bool, seed=0, **settings):
    batch, sizes = pad(images, fill=255)
    same_size = len({image.shape for image in images}) == 1
    points = point_rows(points_of_images)
    limits = None if same_size else sizes
    boxes, mask = run(batch, points, sizes=limits, seed=seed, **settings)

    alpha = settings["alpha"]
    search = {name: settings[name] for name in ("extent", "half_width")}
    assert boxes.equal(pmg.point_to_box(batch, points, settings["extent"], settings["half_width"], limits))
    assert mask.equal(pmg.paint(batch, points, boxes, settings["extent"], alpha, soft=False))

    undecided = 0
    for k, found in enumerate(cut(mask, sizes)):
        rows = points_of_images[k]
        if integer:
            expected = [reference.point_to_box(images[k], point, **search) for point in rows]
            assert boxes[points[:, 0] == k].tolist() == [list(box) for box in expected]
        probability = np.zeros(images[k].shape)
        for point, (y0, x0, y1, x1) in zip(rows, boxes[points[:, 0] == k].tolist(), strict=True):
            inside = reference.box_to_probability(images[k], point, (y0, x0, y1, x1), alpha)
            np.maximum(probability[y0:y1, x0:x1], inside, out=probability[y0:y1, x0:x1])
        wrong = found != (probability >= 0.5)
        assert (abs(probability[wrong] - 0.5) <= TOLERANCE).all()
        undecided += int(wrong.sum())
        assert not mask[k, images[k].shape[0] :].any() and not mask[k, :, images[k].shape[1] :].any()
    assert undecided <= 1 + 0.01 * int(mask.sum())


@pytest.mark.parametrize("kind", sweep(INTEGER_KINDS, fast=3) + sweep(FLOAT_KINDS, fast=2))
def test_scenes(kind: str) -> None:
    """Ten kinds of scene over ten shapes, twice: 200 scenes in pairs of one shape or of two, 300 points."""
    for number, shape in enumerate(SCENE_SHAPES):
        rng = np.random.default_rng([number, len(kind)])
        shapes = (shape, shape if number % 3 else shape[::-1])
        images = [scene(rng, each, kind) for each in shapes]
        points = [scene_points(rng, each, 3) for each in shapes]
        kept = [[own[i] for i in rng.permutation(len(own))[:count]] for own, count in zip(points, (2, 1), strict=True)]
        check(images, kept, integer=kind in INTEGER_KINDS, seed=number, **SETTINGS[number % 2])


@pytest.mark.parametrize("settings", SETTINGS, ids=str)
def test_settings(settings: dict) -> None:
    rng = np.random.default_rng(5)
    check([scene(rng, (45, 60), "bytes")], [[(20, 30), (3, 50)]], integer=True, **settings)


def test_images_of_different_size_and_points_that_overlap(rng) -> None:
    images = [scene(rng, shape, "bytes") for shape in ((20, 31), (33, 12), (9, 9))]
    check(images, [[(5, 6), (6, 7)], [(30, 3)], []], integer=True, **SETTINGS[1])


def test_one_large_image(rng) -> None:
    image = scene(rng, (512, 512), "bytes")
    check([image], [[(0, 0), (511, 511), (256, 255), (100, 400)]], integer=True, **SETTINGS[0])


@pytest.mark.parametrize("values", [(np.nan,), (np.inf, -np.inf, np.nan)], ids=str)
@pytest.mark.parametrize("share", [0.002, 0.1])
def test_broken_pixels(values: tuple[float, ...], share: float, rng) -> None:
    """As hmg_gpu.plain.pmg: no box leaves its image, and no point loses its mask."""
    image = torch.from_numpy(np.stack([scene(rng, (40, 50), "bytes") for _ in range(3)]))
    broken = torch.from_numpy(rng.random((40, 50)) < share)
    image[1] = torch.where(broken, torch.from_numpy(rng.choice(np.float32(values), (40, 50))), image[1])
    image[1, 20, 25] = values[0]
    points = point_rows([[(20, 25)], [(20, 25), (0, 0), (20, 26), (33, 4)], [(20, 25)]])
    boxes, mask = run(image, points)
    assert boxes.equal(pmg.point_to_box(image, points, 25, 4, None))
    assert mask.equal(pmg.paint(image, points, boxes, 25, 0.15, soft=False))
    assert mask[1, 20, 25]


@pytest.mark.parametrize("kind", ["bytes", "steps", "floats", "broken"])
def test_probabilities(kind: str, rng) -> None:
    """The plain path's bits. Where boxes overlap the largest stays; a box with NaN is 0.5 at its point alone."""
    image = torch.from_numpy(np.stack([scene(rng, (40, 50), "bytes" if kind == "broken" else kind) for _ in range(2)]))
    if kind == "broken":
        image[1, 12, 25] = torch.nan
    image = image.byte() if kind == "steps" else image
    points = point_rows([[(20, 25), (22, 28), (1, 1)], [(20, 25), (39, 49)]])
    sizes = torch.tensor([[40, 50], [30, 40]])
    inside = (points[:, 1:] < sizes[points[:, 0]]).all(1)
    boxes, found = run(image, points[inside], sizes=sizes, soft=True)
    expected = pmg.paint(image, points[inside], boxes, 25, 0.15, soft=True)
    assert found.dtype == torch.float32 and found.equal(expected)
    assert (found >= 0.5).equal(run(image, points[inside], sizes=sizes)[1])


def test_bytes_equal_floats(rng) -> None:
    image = torch.from_numpy(scene(rng, (40, 50), "bytes"))[None]
    points = point_rows([[(20, 25), (1, 2)]])
    for first, second in zip(run(image, points), run(image.byte(), points), strict=True):
        assert first.equal(second)


def test_flips_and_transposes(rng) -> None:
    image = torch.from_numpy(scene(rng, (41, 53), "bytes"))[None]
    points = torch.tensor([[0, 17, 30], [0, 38, 2]])
    image_of, y, x = points.unbind(1)
    _, plain = run(image, points)
    _, flipped = run(image.flip(2).contiguous(), torch.stack((image_of, y, 52 - x), 1))
    assert flipped.flip(2).equal(plain)
    _, turned = run(image.mT.contiguous(), torch.stack((image_of, x, y), 1))
    assert turned.mT.equal(plain)


def test_points_outside_their_image_are_ignored(rng) -> None:
    image = torch.from_numpy(np.stack([scene(rng, (30, 30), "bytes")] * 2))
    sizes = torch.tensor([[20, 30], [30, 30]])
    inside = torch.tensor([[1, 25, 25]])
    outside = torch.tensor([[0, 20, 5], [0, -1, 5], [1, 5, 30], [2, 5, 5], [-1, 5, 5]])
    boxes, mask = run(image, torch.cat((outside, inside)), sizes=sizes)
    assert not boxes[:5].any()
    assert mask.equal(run(image, inside, sizes=sizes)[1])


def test_given_boxes_are_cut_to_the_window(rng) -> None:
    image = torch.from_numpy(scene(rng, (30, 40), "bytes"))[None]
    points = torch.tensor([[0, 10, 20], [0, 3, 3], [0, 8, 8]])
    boxes = torch.tensor([[5, 15, 18, 30], [0, 0, 9, 9], [0, 0, 4, 4]])  # the last misses its point
    whole = kernels.box_to_mask(image.to(DEVICE), points.to(DEVICE), boxes.to(DEVICE)).cpu()
    assert whole.equal(pmg.paint(image, points[:2], boxes[:2], 25, 0.15, soft=False))
    wide = torch.tensor([[-9, -9, 99, 99]])
    cut_box = torch.tensor([[6, 16, 15, 25]])
    narrow = kernels.box_to_mask(image.to(DEVICE), points[:1].to(DEVICE), wide.to(DEVICE), extent=4).cpu()
    assert narrow.equal(pmg.paint(image, points[:1], cut_box, 4, 0.15, soft=False))


def test_no_points() -> None:
    image = torch.zeros(2, 5, 5)
    nothing = torch.zeros((0, 3), dtype=torch.int64)
    boxes, mask = run(image, nothing)
    assert boxes.shape == (0, 4) and mask.shape == (2, 5, 5) and not mask.any()


@pytest.mark.cpu_only  # runs one interpreted program on memory that is never touched
def test_offsets_past_two_to_the_31_pixels(rng) -> None:
    images, height, width = 2**19 + 2, 32, 128
    last = images - 1
    batch = torch.empty((images, height, width), dtype=torch.uint8)
    mask = torch.empty_like(batch)
    batch[last] = torch.from_numpy(scene(rng, (height, width), "bytes"))
    mask[last] = 0
    points = torch.tensor([[last, 12, 77]])
    boxes = torch.empty((1, 4), dtype=torch.int64)
    (alpha_bits,) = struct.unpack("<q", struct.pack("<d", 0.15))
    with program_at(0):
        kernels.pmg_kernel[(1,)](
            batch, points, points, boxes, mask, images, height, width, 10, 4, alpha_bits,
            SEARCH=True, PAINT=True, SOFT=False, HAS_SIZES=False,
            ALONG=16, ACROSS=16, COLUMNS=32, ROWS=4, WIDE=tl.int32,
        )  # fmt: skip
    expected_boxes, expected = run(batch[last:], torch.tensor([[0, 12, 77]]), extent=10)
    assert boxes.equal(expected_boxes)
    assert mask[last].bool().equal(expected[0]) and expected.any()


def test_errors_name_what_came() -> None:
    image, points = torch.zeros(1, 5, 5), torch.zeros((1, 3), dtype=torch.int64)
    with pytest.raises(TypeError, match=r"images: expected float32 or uint8, got torch\.float64"):
        kernels.point_to_box(image.double(), points)
    with pytest.raises(ValueError, match=r"points: expected int64 \[P, 3\]"):
        kernels.point_to_mask(image, points[:, :2])
    with pytest.raises(ValueError, match="extent >= 1"):
        kernels.point_to_mask(image, points, extent=0)
    with pytest.raises(ValueError, match=r"boxes: expected int64 \[1, 4\]"):
        kernels.box_to_mask(image, points, points)


@pytest.mark.gpu
@pytest.mark.skipif(DEVICE != "cuda", reason="needs a CUDA device: interpreted programs never race")
def test_a_hundred_repeats_are_identical() -> None:
    images = torch.rand(64, 200, 300)
    points = torch.stack((torch.randint(64, (999,)), torch.randint(200, (999,)), torch.randint(300, (999,))), 1)
    first = run(images, points)
    for _ in range(100):
        assert all(a.equal(b) for a, b in zip(run(images, points), first, strict=True))
