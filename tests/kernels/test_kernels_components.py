"""kernels/components.py interpreted, against SciPy and tests/reference.py: exact."""

from __future__ import annotations

# isort: off
from kernel_tools import DEVICE, poisoned_memory, program_at, shuffled_programs  # before any kernel is decorated

# isort: on
import os
import subprocess
import sys

import numpy as np
import pytest
import reference
import torch
from cases import ADVERSARIAL_MASKS, SEEDS, cut, pad, random_mask, random_shape, spiral, sweep
from scipy import ndimage

from hmg_gpu.data import ImageSet
from hmg_gpu.evaluation.losses import lost_pixels
from hmg_gpu.evaluation.targets import compared, describe_targets
from hmg_gpu.kernels import blocks, stream, tiles
from hmg_gpu.kernels import components as kernels
from hmg_gpu.kernels import counts as counting
from hmg_gpu.masks.components import connected_components
from hmg_gpu.masks.update import corrections
from hmg_gpu.plain import components as plain


def expected_table(mask):
    """Labels as SciPy numbers them, and rows (area, sum_y, sum_x, y0, x0, y1, x1)."""
    labels, count = ndimage.label(mask, reference.EIGHT)
    rows = []
    for label in range(1, count + 1):
        y, x = np.nonzero(labels == label)
        rows.append([len(y), y.sum(), x.sum(), y.min(), x.min(), y.max() + 1, x.max() + 1])
    return labels, np.array(rows, dtype=np.int64).reshape(-1, 7)


def check(masks, *, capacity=None, seed=0):
    batch, sizes = pad(masks, fill=1)
    same_size = len({mask.shape for mask in masks}) == 1
    with poisoned_memory(), shuffled_programs(seed):
        labels, counts, table = (
            t.cpu()
            for t in kernels.components(
                batch.to(DEVICE), sizes=None if same_size else sizes.to(DEVICE), capacity=capacity
            )
        )
    for k, found in enumerate(cut(labels, sizes)):
        wanted, rows = expected_table(masks[k])
        assert np.array_equal(found, wanted), f"image {k}"
        assert int(labels[k].count_nonzero()) == np.count_nonzero(wanted)  # the padding is background
        assert int(counts[k]) == len(rows)
        held = min(len(rows), table.shape[1])
        assert np.array_equal(table[k, :held].numpy(), rows[:held])
        assert not table[k, held:].any()


@pytest.mark.parametrize("seed", sweep(range(10)))
def test_random_masks(seed: int) -> None:
    rng = np.random.default_rng(100 + seed)
    for case in range(20):
        check([random_mask(rng, random_shape(rng))], seed=case)


@pytest.mark.parametrize("name", ADVERSARIAL_MASKS)
def test_adversarial_masks(name: str) -> None:
    check([ADVERSARIAL_MASKS[name]])


def test_numbering_follows_the_first_pixel_not_the_block() -> None:
    """The component on the left begins a row later inside the same row of 2 x 2 blocks."""
    mask = np.zeros((4, 12), dtype=bool)
    mask[1, 0] = mask[0, 8] = True
    labels, _, _ = kernels.components(torch.from_numpy(mask)[None].to(DEVICE))
    assert int(labels[0, 0, 8]) == 1 and int(labels[0, 1, 0]) == 2


def test_images_of_different_size(rng) -> None:
    check([random_mask(rng, random_shape(rng, 24)) for _ in range(6)])


@pytest.mark.parametrize("capacity", [1, 3])
def test_components_past_the_capacity_keep_their_label(capacity: int) -> None:
    check([ADVERSARIAL_MASKS["isolated pixels"], ADVERSARIAL_MASKS["frame and dot"]], capacity=capacity)


@pytest.mark.parametrize("name", ["random", "borders", "spiral"])
def test_many_tiles(name: str, monkeypatch, rng) -> None:
    monkeypatch.setattr(kernels, "CHUNK", 256)  # several chunks of the ranking
    for setting, value in (("TILE_H", 8), ("TILE_W", 16), ("NUM_WARPS", 1)):
        monkeypatch.setattr(blocks, setting, value)
    monkeypatch.setattr(stream, "CHUNK", 1024)
    monkeypatch.setattr(stream, "CHUNK_PIXELS", 1024)
    mask = {
        "random": rng.random((21, 40)) < 0.25,
        "borders": np.add.outer(np.arange(21) % 8 % 7 == 0, np.arange(40) % 16 % 15 == 0),
        "spiral": spiral(33),
    }[name]
    check([mask])


def test_one_image_over_many_full_size_tiles() -> None:
    mask = np.zeros((512, 512), dtype=bool)
    mask[30:35, 126:131] = True
    mask[300, 100:400] = True
    mask[450:455, 200:205] = True
    mask[511, 511] = True
    check([mask])


def test_flips_and_transposes_move_the_moments(rng) -> None:
    mask = torch.from_numpy(random_mask(rng, (18, 26)))[None].to(DEVICE)
    _, counts, table = kernels.components(mask)
    _, turned_counts, turned = kernels.components(mask.mT.contiguous())
    assert counts.equal(turned_counts)
    swapped = turned[..., [0, 2, 1, 4, 3, 6, 5]][0, : int(counts[0])].tolist()
    assert sorted(swapped) == sorted(table[0, : int(counts[0])].tolist())


@pytest.mark.parametrize("sized", [False, True])
def test_the_library_takes_the_kernels_where_it_should(sized: bool, monkeypatch, rng) -> None:
    """The same components, in the same order, as SciPy gives: what reports and size classes are made of."""
    mask = torch.from_numpy(np.stack([random_mask(rng, (20, 33)) for _ in range(3)] + [np.zeros((20, 33), bool)]))
    sizes = torch.tensor([[20, 33], [11, 20], [20, 5], [20, 33]]) if sized else None
    wanted = connected_components(mask, sizes)
    monkeypatch.setenv("HMG_BACKEND", "triton")
    monkeypatch.setattr(plain, "connected_components", lambda *_: pytest.fail("not by the kernels"))
    found = connected_components(mask.to(DEVICE), None if sizes is None else sizes.to(DEVICE))
    assert len(found) == len(wanted) > 3 and found.shape == wanted.shape
    for name in ("pixels", "component", "image", "area", "sum_y", "sum_x"):
        assert getattr(found, name).cpu().equal(getattr(wanted, name)), name


@pytest.mark.parametrize("what", ["corrections", "lost pixels", "targets"])
def test_reports_take_the_kernels_too(what: str, monkeypatch, rng) -> None:
    """A GPU machine need not have kornia."""
    mask, other = (torch.from_numpy(np.stack([random_mask(rng, (40, 33)) for _ in range(2)])) for _ in range(2))
    points = torch.tensor([[0, 3, 3], [1, 20, 20]])
    data = ImageSet(["a", "b"], torch.rand(2, 40, 33), torch.tensor([[40, 33], [31, 33]]), points, masks=mask)

    def result() -> list[torch.Tensor]:
        own, there = data.to(DEVICE), other.to(DEVICE)
        if what == "corrections":
            return [*corrections(there, own.masks, own.points, radius=5, sizes=own.sizes)]
        if what == "lost pixels":
            return [lost_pixels(there, own.masks, own.sizes)]
        return [*compared(there, own, describe_targets(own))]

    wanted = result()
    monkeypatch.setenv("HMG_BACKEND", "triton")
    for name in ("_label_runs", "_label_union_find"):
        monkeypatch.setattr(plain, name, lambda *_: pytest.fail("not by the kernels"))
    assert all(torch.equal(one, same) for one, same in zip(result(), wanted, strict=True))


# ---- Pd and Fa ------------------------------------------------------------------------------------------------------


def counts_of(predictions, targets, *, distance=3.0, seed=0):
    prediction, sizes = pad(predictions, fill=1)
    target, _ = pad(targets, fill=1)
    with poisoned_memory(), shuffled_programs(seed):
        return counting.detection_counts(
            prediction.to(DEVICE), target.to(DEVICE), sizes=sizes.to(DEVICE), distance=distance
        ).cpu()


def expected_counts(prediction, target, distance):
    wanted = reference.detection_metrics([(prediction, target)], distance)
    names = ("intersection", "union", "matched", "targets", "false_alarm_pixels")
    return [wanted[name] for name in names] + [int((prediction & ~target).sum()), target.size]


@pytest.mark.parametrize("seed", sweep(range(SEEDS)))
def test_random_detections(seed: int) -> None:
    """1,000 pairs, eight to a launch."""
    rng = np.random.default_rng(seed)
    for case in range(5) if seed else (1,):
        largest = 40 if case == 0 else 16  # a program takes the interpreter long, and a large image takes many
        targets = [random_mask(rng, random_shape(rng, largest)) for _ in range(8)]
        # The same targets, shifted, split and joined.
        predictions = [target ^ (rng.random(target.shape) < 0.05) for target in targets]
        distance = float(rng.choice([0.8, 2.7, 5.3]))
        found = counts_of(predictions, targets, distance=distance, seed=case)
        pairs = zip(predictions, targets, strict=True)
        assert found.tolist() == [expected_counts(*pair, distance) for pair in pairs]


def test_detections_of_images_of_different_size(rng) -> None:
    shapes = [random_shape(rng, 20) for _ in range(4)]
    pairs = [(random_mask(rng, shape), random_mask(rng, shape)) for shape in shapes]
    found = counts_of(*zip(*pairs, strict=True), distance=2.7)
    assert found.tolist() == [expected_counts(*pair, 2.7) for pair in pairs]


def test_matching_is_greedy_in_raster_order_and_strict(monkeypatch) -> None:
    """Two predictions lie 2 px from the first target; the first in the raster is taken although both are as close."""
    monkeypatch.setattr(counting, "MATCH_LANES", 1)  # also: one candidate a step
    target, prediction = np.zeros((12, 30), dtype=bool), np.zeros((12, 30), dtype=bool)
    target[5, 5] = target[5, 9] = True
    prediction[5, 3] = prediction[5, 7] = prediction[0, 20] = True
    # Target (5, 5) takes (5, 3), target (5, 9) takes (5, 7); (0, 20) is a false alarm.
    assert counts_of([prediction], [target])[0].tolist() == [0, 5, 2, 2, 1, 3, 360]
    # Exactly at the distance is no match.
    assert counts_of([prediction], [target], distance=2.0)[0].tolist() == [0, 5, 0, 2, 3, 3, 360]


def test_a_full_table_takes_nothing_from_the_next_image() -> None:
    """Isolated pixels fill the first image's table; a target that none is close to must leave the next image alone."""
    prediction, target = (torch.zeros(2, 8, 8, dtype=torch.bool) for _ in range(2))
    prediction[0, ::2, ::2] = target[0, 1, 1] = True
    prediction[1, 3, 3] = target[1, 3, 3] = True
    with poisoned_memory():
        counts = counting.detection_counts(prediction.to(DEVICE), target.to(DEVICE), distance=0.5).cpu()
    assert counts[:, 2].tolist() == [0, 1]  # matched
    assert counts[:, 4].tolist() == [16, 0]  # pixels of unmatched components


def test_empty_masks() -> None:
    empty = np.zeros((5, 6), dtype=bool)
    assert counts_of([empty], [empty])[0].tolist() == [0, 0, 0, 0, 0, 0, 30]


@pytest.mark.cpu_only  # runs one interpreted program on memory that is never touched
def test_offsets_past_two_to_the_31_pixels() -> None:
    """Ranks and moments of the last image of a batch; the phases before are those of the update."""
    images, height, width = 2**19 + 2, 32, 128
    last = images - 1
    plane = torch.empty((images, height, width), dtype=torch.uint8)
    labels = torch.empty(plane.shape, dtype=torch.int32)
    plane[last] = 0
    plane[last, 30:, 120:] = 2
    plane[last, 3, 4] = 2
    counts, listed_n = torch.empty(images, dtype=torch.int32), torch.tensor([2, 0, 0, 0], dtype=torch.int32)
    table = torch.empty((images, 2, 7), dtype=torch.int64)
    space = tiles.make_space(images, height, width, torch.device("cpu"), first=True, roots=True)
    space.listed[:2] = torch.tensor([2 * last, 2 * last + 1])
    _, tile = tiles.label_tiles(plane, None, None, space, listed_n, 0, images, first=True)
    where = (0, height, width, 2)
    with program_at(last):
        kernels.rank_kernel[(1,)](
            plane, space.parents, space.first, space.roots, counts, table, *where, COLUMNS=7, CHUNK=1024
        )
    kernels.moments_kernel[(1,)](
        plane, space.listed, listed_n, space.parents, space.areas, space.sums, space.roots, labels, table, *where,
        COLUMNS=7, **tile,
    )  # fmt: skip
    assert int(counts[last]) == 2
    assert table[last].tolist() == [[1, 3, 4, 3, 4, 4, 5], [16, 488, 1976, 30, 120, 32, 128]]
    assert int(labels[last].count_nonzero()) == 17


def test_errors_name_what_came() -> None:
    mask = torch.zeros(2, 4, 4, dtype=torch.bool)
    with pytest.raises(TypeError, match=r"mask: expected bool, got torch\.float32"):
        kernels.components(mask.float())
    with pytest.raises(ValueError, match="capacity: expected at least 1, got 0"):
        kernels.components(mask, capacity=0)
    with pytest.raises(ValueError, match="prediction and target: expected one shape and device"):
        counting.detection_counts(mask, mask[:1])


@pytest.mark.gpu
@pytest.mark.skipif(DEVICE != "cuda", reason="needs a CUDA device: interpreted programs never race")
@pytest.mark.parametrize("density", [0.01, 0.3, 0.6])
def test_a_hundred_repeats_are_identical(density: float) -> None:
    mask = (torch.rand(16, 300, 500) < density).cuda()
    first = kernels.components(mask)
    for _ in range(100):
        assert all(a.equal(b) for a, b in zip(kernels.components(mask), first, strict=True))


RENAMED = """
import torch, triton.language as tl
tl.barrier = tl.debug_barrier
del tl.debug_barrier
from hmg_gpu.kernels.components import components
labels, counts, table = components(torch.eye(40, dtype=torch.bool)[None])
print(int(counts), int(labels.sum()), table[0, 0, 0].item())
"""


@pytest.mark.cpu_only
def test_a_triton_that_calls_the_barrier_by_its_new_name() -> None:
    environment = {**os.environ, "TRITON_INTERPRET": "1"}
    found = subprocess.run([sys.executable, "-c", RENAMED], env=environment, capture_output=True, text=True, check=True)
    assert found.stdout.split() == ["1", "40", "40"]
