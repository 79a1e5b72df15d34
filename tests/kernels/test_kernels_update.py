"""kernels/update.py (FAF + MDR) interpreted, against tests/reference.py: exact, whatever order the programs run in."""

from __future__ import annotations

# isort: off
from kernel_tools import DEVICE, poisoned_memory, program_at, shuffled_programs  # before any kernel is decorated

# isort: on
import numpy as np
import pytest
import reference
import torch
import torch.nn.functional as F
from cases import (
    ADVERSARIAL_MASKS,
    SEEDS,
    cut,
    pad,
    point_rows,
    random_mask,
    random_points,
    random_shape,
    spiral,
    sweep,
)
from scipy import ndimage

from hmg_gpu.common.tensors import valid_area
from hmg_gpu.kernels import blocks, stream, tiles
from hmg_gpu.kernels import update as kernels
from hmg_gpu.masks.update import false_alarm_filter
from hmg_gpu.plain.update import fuse
from hmg_gpu.updater.fused import correct_fused
from hmg_gpu.updater.report import HYBRID, NON_FINITE, PREDICTION, is_fault, judge


@pytest.fixture
def small_tiles(monkeypatch) -> None:
    """Tiles of 8 x 16 pixels, so that a small image has many tile borders; one warp has them all."""
    for name, value in (("TILE_H", 8), ("TILE_W", 16), ("NUM_WARPS", 1)):
        monkeypatch.setattr(blocks, name, value)
    for name in ("CHUNK", "CHUNK_PIXELS"):
        monkeypatch.setattr(stream, name, 1024)


def run(prediction, initial, points, *, radius=30, sizes=None, threshold=0.0, seed=0, weight=None):
    """Launch the kernels on poisoned memory with their programs in a random order."""
    tensors = [None if t is None else t.to(DEVICE) for t in (prediction, initial, points, sizes)]
    prediction, initial, points, sizes = tensors
    points, offsets = kernels.group_points(points, len(prediction))
    with poisoned_memory(), shuffled_programs(seed):
        return kernels.launch(prediction, initial, points, offsets, sizes, radius, threshold, weight).cpu()


def check(masks, initials, points_of_images, *, radius, seed=0, packed=False):
    """One batch of images of any size against the reference, image by image; the padding keeps its initial mask."""
    prediction, sizes = pad(masks, fill=1)
    initial, _ = pad(initials, fill=0)
    same_size = len({mask.shape for mask in masks}) == 1
    if packed:
        more = -prediction.shape[2] % 16
        same_size = same_size and not more
        prediction, initial = F.pad(prediction, (0, more), value=1), F.pad(initial, (0, more))
    limits = None if same_size else sizes
    out = run(prediction, initial, point_rows(points_of_images), radius=radius, sizes=limits, seed=seed)
    for k, found in enumerate(cut(out, sizes)):
        expected = reference.update(masks[k], initials[k], points_of_images[k], radius)
        assert np.array_equal(found, expected), f"image {k}"
        height, width = masks[k].shape
        assert not out[k, height:].any() and not out[k, :, width:].any()


@pytest.mark.parametrize("seed", sweep(range(SEEDS)))
def test_random_masks(seed: int) -> None:
    """1,000 images, eight to a launch, of one size or of several, in words or in bytes."""
    rng = np.random.default_rng(seed)
    for case in range(5) if seed else (1, 4):
        shapes = [random_shape(rng, 24 if case else 40)] * 8
        if case % 2:
            shapes = [random_shape(rng, 24) for _ in shapes]
        masks, initials = ([random_mask(rng, shape) for shape in shapes] for _ in range(2))
        points = [random_points(rng, shape) for shape in shapes]
        check(masks, initials, points, radius=int(rng.choice([0, 1, 4, 10, 30])), seed=case, packed=case > 2)


@pytest.mark.parametrize("name", ADVERSARIAL_MASKS)
def test_adversarial_masks(name: str) -> None:
    mask = ADVERSARIAL_MASKS[name]
    initial = np.zeros_like(mask)
    initial[0, 0] = True
    point = (mask.shape[0] // 3, mask.shape[1] // 2)
    for packed in (False, True):
        check([mask], [initial], [[point]], radius=max(mask.shape) // 4, packed=packed)


@pytest.mark.parametrize("packed", [False, True])
def test_groups_of_images_share_one_workspace(packed: bool, monkeypatch, rng) -> None:
    """Seven images of different size, two at a time, by three programs: nothing leaks from image to image."""
    monkeypatch.setattr(tiles, "WORKSPACE_BYTES", 2 * tiles.plane_bytes(24, 32))
    monkeypatch.setattr(tiles, "PROGRAMS", 3)
    tiles.programs_of.cache_clear()
    shapes = [(24, 24), *(random_shape(rng, 24) for _ in range(6))]
    assert tiles.group_size(7, 24, 32) == 2
    masks = [random_mask(rng, shape) for shape in shapes]
    initials = [random_mask(rng, shape) for shape in shapes]
    check(masks, initials, [random_points(rng, shape) for shape in shapes], radius=6, packed=packed)
    tiles.programs_of.cache_clear()


@pytest.mark.parametrize("name", sweep(["random", "spiral", "borders", "dense", "full"], fast=2))
def test_many_tiles(name: str, small_tiles, rng) -> None:
    mask = {
        "random": rng.random((29, 50)) < 0.3,
        "dense": rng.random((29, 50)) < 0.6,
        "borders": np.add.outer(np.arange(29) % 8 % 7 == 0, np.arange(50) % 16 % 15 == 0),
        "spiral": spiral(33),
        "full": np.ones((24, 48), dtype=bool),
    }[name]
    points = [(3, 4), (20, 30)]
    check([mask], [np.zeros_like(mask)], [points], radius=9)


@pytest.mark.parametrize("pixels", [1, 2, 3])
def test_components_that_touch_only_across_a_tile_corner(pixels: int, small_tiles) -> None:
    """Two diagonal lines that meet at the corner of four tiles, in both directions."""
    falling = np.zeros((16, 32), dtype=bool)
    for k in range(-pixels, pixels):
        falling[8 + k, 16 + k] = True
    # With both halves joined the centroid lies between the middle pixels, 1 pixel (L1) from either.
    for mask, point in ((falling, (8, 16)), (falling[:, ::-1].copy(), (8, 15))):
        check([mask], [np.zeros_like(mask)], [[point]], radius=1)
        out = run(torch.from_numpy(mask)[None], None, point_rows([[point]]), radius=1)
        assert out[0].equal(torch.from_numpy(mask))


def test_distance_exactly_r_and_one_area_unit_past() -> None:
    """Sums (1, 2) over 3 pixels lie exactly 3 * 9 from the point (5, 5); sums (1, 1) one unit further."""
    exact = torch.zeros(1, 8, 8, dtype=torch.bool)
    past = exact.clone()
    exact[0, 0, 0] = exact[0, 0, 1] = exact[0, 1, 1] = True
    past[0, 0, 0] = past[0, 0, 1] = past[0, 1, 0] = True
    points = torch.tensor([[0, 5, 5]])
    assert run(exact, None, points, radius=9).equal(exact)
    assert not run(past, None, points, radius=9).any()
    assert run(past, None, points, radius=10).equal(past)


@pytest.mark.slow
def test_flips_transposes_and_permutations(rng) -> None:
    mask = torch.from_numpy(np.stack([random_mask(rng, (21, 30)) for _ in range(3)]))
    points = point_rows([[(4, 7)], [(11, 20), (2, 2)], [(18, 3)]])
    plain = run(mask, None, points, radius=8)
    image, y, x = points.unbind(1)
    flipped = run(mask.flip(1), None, torch.stack((image, 20 - y, x), 1), radius=8)
    assert flipped.flip(1).equal(plain)
    turned = run(mask.mT.contiguous(), None, torch.stack((image, x, y), 1), radius=8)
    assert turned.mT.equal(plain)
    order = torch.tensor([2, 0, 1])
    permuted = run(mask[order], None, torch.stack((order.argsort()[image], y, x), 1), radius=8)
    assert permuted.equal(plain[order])


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_logits_are_thresholded_like_torch(dtype: torch.dtype) -> None:
    logits = torch.randn(2, 15, 20).to(dtype)
    logits[0, 0, :4] = torch.tensor([torch.nan, torch.inf, -torch.inf, 0.3])
    logits[0, 1, 3] = torch.tensor(0.3, dtype=dtype)  # equals the threshold once that is rounded: not foreground
    points = torch.tensor([[0, 5, 5], [1, 7, 3]])
    bools = run(logits > 0.3, None, points, radius=6)
    assert run(logits, None, points, radius=6, threshold=0.3).equal(bools)
    assert bools.any()


def test_points_outside_their_image_and_no_points() -> None:
    mask = torch.ones(2, 10, 10, dtype=torch.bool)
    sizes = torch.tensor([[6, 6], [10, 10]])
    outside = torch.tensor([[0, 6, 2], [0, -1, 2], [1, 3, 10], [5, 2, 2], [-1, 2, 2]])
    assert not run(mask, None, outside, sizes=sizes).any()
    assert not run(mask, None, outside[:0]).any()
    inside = torch.cat((outside, torch.tensor([[0, 5, 2]])))
    found = run(mask, None, inside, sizes=sizes)
    assert int(found.sum()) == 36 and bool(found[0, :6, :6].all())


def test_one_image_over_many_full_size_tiles() -> None:
    """512 x 512: 32 x 4 tiles; targets on tile borders, one long line through a row of tiles, one isolated blob."""
    mask = np.zeros((512, 512), dtype=bool)
    mask[30:35, 126:131] = True  # meets at the corner of four tiles
    mask[300, 100:400] = True
    mask[450:455, 200:205] = True
    initial = np.zeros_like(mask)
    initial[100:103, 100:103] = True
    points = [(33, 140), (296, 250), (101, 101)]
    check([mask], [initial], [points], radius=30)
    assert ndimage.label(reference.update(mask, initial, points))[1] == 3


def test_wide_sums_give_the_same(monkeypatch, rng) -> None:
    """int64 sums, which images too large for int32 use."""
    mask = torch.from_numpy(random_mask(rng, (25, 33)))[None]
    points = torch.tensor([[0, 12, 12]])
    narrow = run(mask, None, points, radius=7)
    monkeypatch.setattr(tiles, "sum_dtype", lambda _height, _width: torch.int64)
    assert run(mask, None, points, radius=7).equal(narrow)


@pytest.mark.parametrize("shape", [(1, 1), (1, 65536), (65537, 1), (1600, 1600), (2048, 2048), (100, 8000)])
def test_int32_sums_are_proved_to_fit(shape: tuple[int, int]) -> None:
    height, width = shape
    largest = max(width * (height * (height - 1) // 2), height * (width * (width - 1) // 2))  # a full image
    if tiles.sum_dtype(height, width) == torch.int32:
        assert largest < 2**31
    else:
        assert 2 * largest >= 2**31


def test_workspace_is_bounded() -> None:
    for images, height, width in ((4096, 512, 512), (128, 2048, 2048), (3, 30000, 30000)):
        group = tiles.group_size(images, height, width)
        assert group == 1 or group * tiles.plane_bytes(height, width) <= 2**30
    assert tiles.group_size(8, 512, 512) == 8
    assert tiles.group_size(4096, 512, 512) >= 1000


@pytest.mark.parametrize("width", [32, 31])
def test_bytes_that_are_not_one_count_as_foreground(width: int) -> None:
    """A bool tensor may be a view of an 8-bit mask."""
    mask = torch.zeros(2, 9, width, dtype=torch.uint8)
    mask[0, 3, 4:9] = torch.tensor([255, 2, 128, 1, 16])
    mask[1, 8, width - 2 :] = 255
    initial = torch.zeros_like(mask)
    initial[0, 0, 0] = 255
    initial[1, 8, width - 1] = 64
    points = torch.tensor([[0, 3, 6], [1, 0, 0]])
    for sizes in (None, torch.tensor([[9, 8], [9, width]])):
        out = run(mask.view(torch.bool), initial.view(torch.bool), points, radius=3, sizes=sizes)
        last = 9 if sizes is None else 8
        expected = initial > 0
        expected[0, 3, 4:last] = True
        assert out.view(torch.uint8).equal(expected.byte())  # 0 and 1 alone


@pytest.mark.cpu_only  # runs one interpreted program on memory that is never touched
def test_offsets_past_two_to_the_31_pixels() -> None:
    """The last image of a batch of 2**31 + 8192 pixels; what belongs to other images is reserved, never touched."""
    images, height, width = 2**19 + 2, 32, 128
    last = images - 1
    prediction = torch.empty((images, height, width), dtype=torch.uint8)
    out = torch.empty_like(prediction)
    offsets = torch.zeros(images + 1, dtype=torch.int64)
    offsets[-1] = 1
    points = torch.tensor([[last, 20, 100]])
    prediction[last] = 0
    prediction[last, 2:4, 3:6] = 1
    prediction[last, 20:22, 99:101] = 1
    space, listed_n = tiles.make_space(images, height, width, torch.device("cpu")), torch.zeros(4, dtype=torch.int32)
    words = [plane.view(torch.int32) for plane in (prediction, prediction, out)]
    tile = {"TILE_H": 16, "TILE_W": 128}
    flags = {"HAS_INITIAL": False, "HAS_SIZES": False, "LOGITS": False, "SOFT": False, "JUDGE": False}
    with program_at(last):
        stream.stream_kernel[(1,)](
            *words, offsets, space.listed, listed_n, listed_n, 0, height, width, 0.0, 0.0, 0.0, 0.0, 0.0,
            **flags, PACKED=True, CHUNK_H=32, CHUNK_W=128, **tile,
        )  # fmt: skip
    assert space.listed[: int(listed_n[0])].tolist() == [2 * last, 2 * last + 1]
    flags = {"PAIR": False, "HAS_SIZES": False, "BITS": 2, **tile}
    where = (0, height, width)
    head, tail = (out, out, offsets, space.listed, listed_n), (space.parents, space.areas, space.sums, space.first)
    with program_at(0):
        tiles.link_kernel[(1,)](*head, *tail, *where, FIRST=False, **flags)
        tiles.border_kernel[(1,)](*head, space.parents, *where, **flags)
        tiles.sum_kernel[(1,)](*head, *tail, space.roots, listed_n, *where, FIRST=False, ROOTS=False, **flags)
        arguments = (out, points, offsets, offsets, space.listed, listed_n, *tail[:3], *where, 30)
        kernels.decide_kernel[(1,)](*arguments, HAS_SIZES=False, KEPT=1, **tile)
    assert out[last].nonzero().tolist() == [[20, 99], [20, 100], [21, 99], [21, 100]]


@pytest.mark.parametrize("seed", sweep((1, 0, *range(2, 10))))
def test_soft_fusion_equals_the_plain_path_and_the_reference(seed: int, small_tiles: None) -> None:
    """100 batches with padding: half in steps of 1/64, where sums meet 0.5 exactly, half with NaN and infinity."""
    rng = np.random.default_rng(seed)
    for case in range(10):
        shape = random_shape(rng)
        masks = [random_mask(rng, shape) for _ in range(2)]
        values = np.stack([mask * rng.integers(20, 65, shape) / 64 for mask in masks]).astype(np.float32)
        initial = np.stack([random_mask(rng, shape) * rng.integers(1, 65, shape) / 64 for _ in masks])
        weight, threshold = float(rng.choice([0.0, 0.25, 0.5, 0.75, 1.0])), float(rng.choice([0.25, 0.5, 0.75]))
        if case % 2:
            weight, threshold = float(rng.random()), float(rng.random())
            odd = rng.random(values.shape)
            values = np.where(odd < 0.03, np.nan, np.where(odd > 0.98, np.inf, values * rng.random(values.shape)))
        points = point_rows([random_points(rng, shape) for _ in masks])
        sizes = torch.tensor([shape, (max(1, shape[0] - 3), max(1, shape[1] - 2))])
        height, width = sizes[1].tolist()
        initial[1, height:] = initial[1, :, width:] = 0
        inside = (points[:, 0] == 0) | ((points[:, 1:] < sizes[1]).all(1))
        probability, first = torch.from_numpy(values).float(), torch.from_numpy(initial).float()
        radius = int(rng.choice([0, 1, 4, 30]))
        settings = {"radius": radius, "threshold": threshold, "weight": weight}
        found = run(
            probability, first, points[inside], sizes=sizes, seed=case, **settings,
        )  # fmt: skip
        filtered = false_alarm_filter(probability > threshold, points[inside], radius=radius, sizes=sizes)
        assert torch.equal(found, fuse(probability, first, filtered, weight))
        for index, (rows, columns) in enumerate(sizes.tolist() if case % 2 == 0 else []):
            own = points[inside][points[inside][:, 0] == index, 1:].tolist()
            planes = (plane[index, :rows, :columns].astype(np.float64) for plane in (values, initial))
            wanted = reference.soft_update(*planes, own, radius, weight, threshold)
            assert np.array_equal(found[index, :rows, :columns].numpy(), wanted)


@pytest.mark.parametrize("seed", sweep((1, 0, *range(2, 10))))
def test_the_updater_s_correction_equals_its_plain_steps(seed: int, small_tiles: None) -> None:
    """What :func:`judge` counts, its guard, and the union: logits of each kind, probabilities, masks, broken values."""
    rng = np.random.default_rng(seed)
    for case in range(6):
        shape, sizes = (int(rng.integers(2, 30)), int(rng.choice([7, 16, 32]))), []
        masks = np.stack([random_mask(rng, shape) for _ in range(3)])
        initial, current = (torch.from_numpy(np.stack([random_mask(rng, shape) for _ in range(3)])) for _ in range(2))
        sizes = torch.tensor([shape, *([int(rng.integers(1, side + 1)) for side in shape] for _ in range(2))])
        inside = valid_area(sizes, initial)
        initial, current = initial & inside, current & inside
        output = "logits" if case % 2 else "probabilities"
        values = torch.from_numpy(np.where(masks, rng.uniform(0.5, 1.0, masks.shape), rng.uniform(0, 0.5, masks.shape)))
        level = 0.4999
        if output == "logits":
            values, level = 6 * values - 3, -0.2
        values = values.to((torch.float32, torch.float16, torch.bfloat16)[case % 3])
        if case >= 2:
            odd = torch.from_numpy(rng.random(masks.shape))
            broken = torch.tensor(rng.choice([np.nan, np.inf, -np.inf, 1.005, -0.005, 1.02]), dtype=values.dtype)
            values = torch.where(odd < 0.02, broken, values)
        if case == 5:
            values, level = torch.from_numpy(masks), 0.0
        points = point_rows([random_points(rng, shape) for _ in range(3)])
        points = points[(points[:, 1:] < sizes[points[:, 0]]).all(1)]
        guard = (None, 0.05, 0.4)[case % 3]
        prediction, ignored, wanted = judge(values, sizes, level, output, guard)
        hybrid = false_alarm_filter(prediction, points, radius=5, sizes=sizes) | initial
        hybrid = torch.where(ignored[:, None, None], current, hybrid)
        with poisoned_memory(), shuffled_programs(case):
            arguments = (t.to(DEVICE) for t in (values, initial, current, *kernels.group_points(points, 3), sizes))
            planes, counts = (t.cpu() for t in correct_fused(*arguments, 5, level, output, guard))
        assert (planes & HYBRID > 0).equal(hybrid)
        assert (planes & PREDICTION > 0).equal(prediction) and int(planes.max()) <= 3
        assert (counts > 0).equal(wanted > 0) and counts[:, NON_FINITE].equal(wanted[:, NON_FINITE])
        assert is_fault(counts, output).equal(is_fault(wanted, output))


def test_empty_batches() -> None:
    points = torch.zeros((0, 3), dtype=torch.int64, device=DEVICE)
    for shape in ((0, 4, 4), (2, 0, 4)):
        empty = torch.zeros(shape, dtype=torch.bool, device=DEVICE)
        assert kernels.update(empty, empty, points).shape == shape


def test_errors_name_what_came() -> None:
    mask = torch.zeros(2, 4, 4, dtype=torch.bool)
    points = torch.zeros((1, 3), dtype=torch.int64)
    with pytest.raises(TypeError, match=r"prediction: expected bool or float32 .* got torch.uint8"):
        kernels.update(mask.byte(), mask, points)
    with pytest.raises(ValueError, match=r"prediction: expected \[B, H, W\], got \[2, 1, 4, 4\]"):
        kernels.update(mask[:, None], mask, points)
    with pytest.raises(ValueError, match=r"initial: expected \[2, 4, 4\]"):
        kernels.update(mask, mask[:1], points)
    with pytest.raises(ValueError, match=r"points: expected int64 \[P, 3\]"):
        kernels.update(mask, mask, points.float())
    with pytest.raises(ValueError, match=r"sizes: expected int64 \[2, 2\]"):
        kernels.update(mask, mask, points, sizes=points)
    with pytest.raises(ValueError, match="radius: expected an integer"):
        kernels.update(mask, mask, points, radius=1.5)
    with pytest.raises(ValueError, match=r"offsets: expected int64 \[3\]"):
        kernels.update(mask, mask, points, offsets=torch.zeros(2, dtype=torch.int64))
    with pytest.raises(ValueError, match=r"of more than 2147418112 pixels"):
        kernels.update(torch.empty((1, 2**16, 2**15), dtype=torch.bool, device="meta"), None, points)


@pytest.mark.gpu
@pytest.mark.skipif(DEVICE != "cuda", reason="needs a CUDA device: interpreted programs never race")
@pytest.mark.parametrize("density", [0.01, 0.3, 0.6, 1.0])
def test_a_hundred_repeats_are_identical(density: float) -> None:
    mask = torch.rand(64, 300, 500) < density
    points = torch.stack((torch.arange(64), torch.full((64,), 150), torch.full((64,), 250)), 1)
    first = run(mask, None, points)
    assert all(run(mask, None, points).equal(first) for _ in range(100))
