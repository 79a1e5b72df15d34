"""Rules of label evolution: against the loops of tests/reference_rules.py bit for bit, and each item by eye."""

from __future__ import annotations

# isort: off
import kernel_tools  # noqa: F401 - before any kernel is decorated

# isort: on
from collections.abc import Callable

import cases
import numpy as np
import pytest
import reference_rules
import torch
from numpy.typing import NDArray
from torch import Tensor

from hmg_gpu.masks import RULES, Evidence, Lesps, State, to_masks
from hmg_gpu.masks.rules.evolving import Evolving

EVOLVING = sorted(name for name, rule in RULES.items() if rule.evolves)


@pytest.fixture(params=["scipy", "torch"], autouse=True)
def backend(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    monkeypatch.setenv("HMG_BACKEND", request.param)
    return request.param


def evidence_of(
    labels: Tensor,
    probability: Tensor,
    sizes: Tensor | None = None,
    points: Tensor | None = None,
    *,
    active: Tensor | None = None,
    at: tuple[int, int] = (0, 1),
) -> Evidence:
    """What a rule is given for labels uint8 [B, H, W] and probabilities float32 [B, H, W]."""
    sizes = torch.tensor(labels.shape[1:]).expand(len(labels), 2).contiguous() if sizes is None else sizes
    points = torch.zeros(0, 3, dtype=torch.int64) if points is None else points
    active = torch.ones(len(labels), dtype=torch.bool) if active is None else active
    masks = to_masks(labels)
    state = State(labels, active)
    return Evidence(probability > 0.5, points, sizes, masks, masks, probability, None, 0.5, state, at)


def evolve(rule: Evolving, label: NDArray, probability: NDArray) -> NDArray:
    """The labels of one image after an update."""
    given = (torch.from_numpy(label)[None], torch.from_numpy(probability.astype(np.float32))[None])
    return rule.evolve(evidence_of(*given)).labels[0].numpy()


def point_label(shape: tuple[int, int], *points: tuple[int, int]) -> NDArray:
    label = np.zeros(shape, dtype=np.uint8)
    for point in points:
        label[point] = 255
    return label


def random_label(rng: np.random.Generator, shape: tuple[int, int]) -> NDArray:
    """Grey blobs, points, or noise; some of it exactly 1, some at the edge of a half."""
    label = np.zeros(shape, dtype=np.uint8)
    for _ in range(int(rng.integers(0, 6))):
        y, x = int(rng.integers(0, shape[0])), int(rng.integers(0, shape[1]))
        part = label[y : y + int(rng.integers(1, 8)), x : x + int(rng.integers(1, 8))]
        part[:] = rng.choice([255, 254, 128, 127, 60, 200, 1], part.shape)
    if rng.random() < 0.2:
        label[rng.random(shape) < 0.03] = 255
    return label


def random_probability(rng: np.random.Generator, shape: tuple[int, int]) -> NDArray:
    """Smooth hills, noise, few levels with many ties, nothing, or everything; float32."""
    noise = rng.random(shape, dtype=np.float32)
    match rng.integers(7):
        case 0:
            return noise
        case 1:
            return noise**8
        case 2:
            return (noise * 4).round().astype(np.float32) / 4
        case 3:
            return np.zeros(shape, np.float32)
        case 4:
            return np.ones(shape, np.float32)
        case _:
            hills = cases.blobs(rng, shape, count=int(rng.integers(1, 8)), largest=9)
            return (hills * rng.uniform(0.3, 1) + noise * rng.uniform(0, 0.4)).clip(0, 1).astype(np.float32)


def assert_equals(rule: Evolving, theirs: Callable[[NDArray, NDArray], NDArray], rng: np.random.Generator) -> None:
    """A padded batch of random images of several sizes, its padding full of label and probability."""
    shapes = [cases.random_shape(rng, 60) for _ in range(4)]
    given = [random_label(rng, shape) for shape in shapes]
    probabilities = [random_probability(rng, shape) for shape in shapes]
    labels, sizes = cases.pad(given)
    probability, _ = cases.pad(probabilities, fill=1)
    found = rule.evolve(evidence_of(labels, probability, sizes)).labels
    assert found.dtype == torch.uint8 and torch.equal(labels, cases.pad(given)[0])  # the old ones are left alone
    for index, ours in enumerate(cases.cut(found, sizes)):
        wanted = theirs(given[index], probabilities[index])
        np.testing.assert_array_equal(ours, wanted, err_msg=f"image {index} of {shapes}")
        found[index, : shapes[index][0], : shapes[index][1]] = 0
    assert not found.any()  # nothing in the padding


# ---- LESPS ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("seed", cases.sweep(range(60), fast=12))
def test_lesps_equals_the_loop(seed: int) -> None:
    rng = np.random.default_rng(seed)
    assert_equals(Lesps(), reference_rules.lesps, rng)
    base, slope, share, reach = (
        rng.uniform(0.1, 0.9),
        rng.uniform(0, 1),
        rng.uniform(0.001, 0.2),
        int(rng.integers(1, 9)),
    )
    settings = {"base": base, "slope": slope, "share": share, "reach": reach}
    assert_equals(Lesps(**settings), lambda label, p: reference_rules.lesps(label, p, **settings), rng)


def test_lesps_threshold_grows_with_the_region() -> None:
    """In 40 x 50 px, h w r is 3 px: a region of one pixel has T = (1/2 + 1/12) max P, one of three has 3/4 max P."""
    probability = np.zeros((40, 50), np.float32)
    probability[10, 10:14] = 0.8, 0.59 * 0.8, 0.58 * 0.8, 0.8
    found = evolve(Lesps(), point_label((40, 50), (10, 10)), probability)
    assert found[10, 10:14].tolist() == [255, 0.59 * 0.8 * 255 // 2, 0, 0]  # the last is cut off from the core
    label = point_label((40, 50), (10, 9), (10, 10), (10, 11))
    probability[10, 9:14] = 0.8, 0.8, 0.8, 0.61, 0.59
    assert evolve(Lesps(), label, probability)[10, 9:14].tolist() == [255, 255, 255, 0.61 * 255 // 2, 0]


def test_lesps_drops_components_away_from_the_core_but_keeps_a_single_one() -> None:
    label = point_label((40, 40), (20, 20))
    far = np.zeros((40, 40), np.float32)
    far[28:30, 28:30] = 0.9
    alone = evolve(Lesps(), label, far)
    assert (alone[28:30, 28:30] == 114).all() and alone[20, 20] == 255 and np.count_nonzero(alone) == 5
    far[21, 21] = 0.9  # a second component, which touches the core at its corner
    both = evolve(Lesps(), label, far)
    assert both[21, 21] == 114 and np.count_nonzero(both) == 2
    far[21, 21], far[22, 22] = 0, 0.9  # just beyond the core: two components, neither of which touches it
    assert np.count_nonzero(evolve(Lesps(), label, far)) == 1


def test_lesps_looks_at_33_pixels() -> None:
    for step, reached in ((16, 127), (17, 0)):
        probability = np.zeros((60, 60), np.float32)
        probability[30, 20 + step] = 1
        found = evolve(Lesps(), point_label((60, 60), (30, 20)), probability)
        assert found[30, 20 + step] == reached and found[30, 20] == 255


def test_lesps_averages_twice_where_squares_overlap() -> None:
    """Two regions see the same bright block, which touches both cores: 3/4 of the prediction after one update."""
    label = point_label((40, 60), (20, 20), (20, 24))
    probability = np.zeros((40, 60), np.float32)
    probability[20, 20:25] = 1
    found = evolve(Lesps(), label, probability)
    assert found[20, 20:25].tolist() == [255, 191, 191, 191, 255]  # 255 * 3 / 4 = 191.25
    assert evolve(Lesps(), label[:, :22].copy(), probability[:, :22].copy())[20, 21] == 127
    assert np.array_equal(found, reference_rules.lesps(label, probability))


def test_lesps_truncates_and_locks() -> None:
    label = np.zeros((40, 40), np.uint8)
    label[20, 20:24] = 255, 254, 128, 0
    probability = np.zeros((40, 40), np.float32)
    probability[20, 20:24] = 1
    found = evolve(Lesps(share=0.1), label, probability)
    assert found[20, 20:24].tolist() == [255, 254, 191, 127]  # 254.5, 191.5 and 127.5
    again = evolve(Lesps(share=0.1), label, probability * 0.75)
    assert again[20, 20:24].tolist() == [255, 222, 159, 95]  # 222.6, 159.6 and 95.6: only what was exactly 1 stays


def test_many_regions_in_one_square() -> None:
    """Every second pixel is a region of its own: a pixel is averaged by up to 64 of them."""
    label = point_label((30, 30))
    label[::2, ::2] = 200
    probability = np.full((30, 30), 0.875, np.float32)
    found = evolve(Lesps(reach=8), label, probability)
    assert np.array_equal(found, reference_rules.lesps(label, probability, reach=8))
    assert found[15, 15] == 223  # 0.875 * 255 = 223.125


# ---- every rule -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", EVOLVING)
def test_results_do_not_depend_on_the_batch_or_its_parts(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    rng = np.random.default_rng(7)
    labels = torch.from_numpy(np.stack([random_label(rng, (50, 40)) for _ in range(6)]))
    probability = torch.from_numpy(np.stack([random_probability(rng, (50, 40)) for _ in range(6)]))
    rule = RULES[name]()
    together = rule.evolve(evidence_of(labels, probability)).labels
    one = [rule.evolve(evidence_of(labels[i : i + 1], probability[i : i + 1])).labels for i in range(6)]
    assert torch.equal(torch.cat(one), together) and not torch.equal(together, labels)
    monkeypatch.setattr("hmg_gpu.masks.rules.evolving.PIXELS", 1)  # one region at a time
    assert torch.equal(rule.evolve(evidence_of(labels, probability)).labels, together)


@pytest.mark.parametrize("name", EVOLVING)
def test_nothing_to_evolve_from(name: str) -> None:
    """No region, no image, predictions that are not finite, a single pixel."""
    rule = RULES[name]()
    empty = torch.zeros(2, 20, 20, dtype=torch.uint8)
    assert not rule.evolve(evidence_of(empty, torch.rand(2, 20, 20))).labels.any()
    assert rule.evolve(evidence_of(empty[:0], torch.rand(0, 20, 20))).labels.shape == (0, 20, 20)
    labels = empty.clone()
    labels[:, 10, 10] = 255
    probability = torch.full((2, 20, 20), torch.nan)
    probability[1] = torch.inf
    probability[1, 0, 0] = -torch.inf
    found = rule.evolve(evidence_of(labels, probability)).labels
    assert torch.equal(found[0], labels[0]) and (found[:, 10, 10] == 255).all() and found[1, 0, 0] == 0
    one = torch.full((1, 1, 1), 255, dtype=torch.uint8)
    assert rule.evolve(evidence_of(one, torch.ones(1, 1, 1))).labels.item() == 255


@pytest.mark.parametrize("name", EVOLVING)
def test_the_kernels_give_the_same(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """On CUDA the regions stand in a table of fixed size, most of whose rows are empty."""
    rng = np.random.default_rng(3)
    labels = torch.from_numpy(np.stack([random_label(rng, (40, 33)) for _ in range(2)]))
    probability = torch.from_numpy(np.stack([random_probability(rng, (40, 33)) for _ in range(2)]))
    given = evidence_of(labels, probability)
    wanted = RULES[name]().evolve(given).labels
    assert not torch.equal(wanted, labels)
    monkeypatch.setenv("HMG_BACKEND", "triton")
    monkeypatch.setattr("hmg_gpu.masks.regions.ROOM", 128)
    assert torch.equal(RULES[name]().evolve(given).labels, wanted)
