"""PAL: its first pool against OpenCV and the published counts, its update and its entries against the loops."""

from __future__ import annotations

# isort: off
import kernel_tools  # noqa: F401 - before any kernel is decorated

# isort: on
from dataclasses import replace
from pathlib import Path

import cases
import numpy as np
import pytest
import reference_rules
import torch
from numpy.typing import NDArray
from test_rules import assert_equals, evidence_of, evolve, point_label
from tiny import tiny_set

from hmg_gpu.data import ImageSet, load_folder
from hmg_gpu.data.synthetic import make_split
from hmg_gpu.masks import Pal, PalMaker, Pmg, Points
from hmg_gpu.masks.edges import canny, close, high_pass, to_bytes
from hmg_gpu.masks.makers import pal as pal_maker


@pytest.fixture(params=["scipy", "torch"], autouse=True)
def backend(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    monkeypatch.setenv("HMG_BACKEND", request.param)
    return request.param


# ---- the first pool -------------------------------------------------------------------------------------------------


def crops(rng: np.random.Generator, count: int) -> list[NDArray]:
    """Blobs in noise, steps, few levels with many ties, flat ones, all of sizes up to 20 x 20."""
    result = []
    for _ in range(count):
        height, width = (int(side) for side in rng.integers(1, 21, 2)) if rng.random() < 0.5 else (20, 20)
        rows, columns = np.mgrid[:height, :width]
        image = rng.normal(rng.uniform(20, 200), rng.choice([0, 1, 4, 20]), (height, width))
        for _ in range(int(rng.integers(0, 4))):
            y, x, size = rng.uniform(0, height), rng.uniform(0, width), rng.uniform(0.5, 3)
            image += rng.uniform(-200, 200) * np.exp(-((rows - y) ** 2 + (columns - x) ** 2) / (2 * size**2))
        if rng.random() < 0.3:
            image = image // 40 * 40
        result.append(image.round().clip(0, 255).astype(np.uint8))
    return result


def batch_of(arrays: list[NDArray]) -> tuple[torch.Tensor, torch.Tensor]:
    """As [P, 20, 20], the rest full of something, and the sizes."""
    batch = np.full((len(arrays), 20, 20), 77, np.int32)
    for row, array in zip(batch, arrays, strict=True):
        row[: array.shape[0], : array.shape[1]] = array
    return torch.from_numpy(batch), torch.tensor([array.shape for array in arrays])


@pytest.mark.parametrize("seed", cases.sweep(range(4)))
def test_each_step_equals_opencv(seed: int) -> None:
    cv2 = pytest.importorskip("cv2", reason="opencv-python-headless is not installed: PAL's steps are not compared")
    rng = np.random.default_rng(seed)
    arrays = crops(rng, 300)
    batch, sizes = batch_of(arrays)
    passed = high_pass(batch, sizes)
    kernel = np.ones((3, 3), np.uint8)
    for index, (ours, image) in enumerate(zip(cases.cut(passed, sizes), arrays, strict=True)):
        assert np.array_equal(ours, cv2.subtract(image, cv2.GaussianBlur(image, (3, 3), 0))), index
    edges = canny(passed, sizes, 20, 40)
    steep = canny(batch, sizes, 60, 200)  # of the crops themselves, whose gradients reach 8 x 255
    closed = close(edges, sizes)
    some = 0
    for index, image in enumerate(cases.cut(passed, sizes)):
        image = image.astype(np.uint8)
        wanted = cv2.Canny(image, 20, 40)
        height, width = image.shape
        assert np.array_equal(edges[index, :height, :width].numpy(), wanted > 0), index
        assert np.array_equal(steep[index, :height, :width].numpy(), cv2.Canny(arrays[index], 60, 200) > 0), index
        grown = cv2.erode(cv2.dilate(wanted, kernel), kernel)
        assert np.array_equal(closed[index, :height, :width].numpy(), grown > 0), index
        some += bool(wanted.any())
    assert some > 100


def theirs(cv2, image: NDArray, point: tuple[int, int]) -> NDArray | None:
    """The contour of a point by OpenCV, or None."""
    y, x = point
    rows, columns = slice(max(y - 10, 0), y + 10), slice(max(x - 10, 0), x + 10)
    crop = image[rows, columns].copy()
    edges = cv2.Canny(cv2.subtract(crop, cv2.GaussianBlur(crop, (3, 3), 0)), 20, 40)
    kernel = np.ones((3, 3), np.uint8)
    canvas = np.zeros_like(image)
    canvas[rows, columns] = cv2.erode(cv2.dilate(edges, kernel), kernel)
    found, _ = cv2.findContours(canvas, cv2.RETR_EXTERNAL, cv2.CHAIN_APPROX_SIMPLE)
    for contour in found:
        filled = np.zeros_like(image)
        cv2.drawContours(filled, [contour], -1, 255, thickness=-1)
        if filled[y, x]:
            return filled > 0 if cv2.contourArea(contour) <= 50 else None
    return None


def test_contours_equal_opencv() -> None:
    cv2 = pytest.importorskip("cv2", reason="opencv-python-headless is not installed: PAL's contours are not compared")
    rng = np.random.default_rng(5)
    images = [np.pad(one, 8, mode="wrap")[:36, :30] for one in crops(rng, 60)]
    points = []
    for image in images:  # two of the brightest pixels, and one anywhere
        bright = np.argsort(image.ravel())[[-1, -9]]
        places = (*bright, rng.integers(image.size))
        points.append([tuple(map(int, np.unravel_index(place, image.shape))) for place in places])
    batch, sizes = cases.pad(images)
    rows = cases.point_rows([sorted(set(some)) for some in points])
    data = ImageSet([str(i) for i in range(len(images))], batch, sizes, rows)
    masks, settled = PalMaker().masks(data), PalMaker().settled(data)
    number = 0
    for index, (ours, image) in enumerate(zip(cases.cut(masks, sizes), images, strict=True)):
        own = sorted(set(points[index]))
        found = [theirs(cv2, image, point) for point in own]
        wanted = np.zeros(image.shape, dtype=bool)
        for point, mask in zip(own, found, strict=True):
            wanted[point] = True
            wanted |= False if mask is None else mask
        assert np.array_equal(ours, wanted), index
        hits = sum(mask is not None for mask in found)
        assert bool(settled[index]) == (hits / len(own) >= 0.8)
        number += hits
    assert 10 < number < 100, number


@pytest.mark.parametrize(
    ("name", "counts"),
    [("NUAA-SIRST", (127, 156, 2469, 3938, 2790, 9762)), ("NUDT-SIRST", (312, 439, 6970, 9828, 8983, 31665))],
)
def test_the_first_pool_of_the_real_sets(name: str, counts: tuple[int, ...], data_root: Path, backend: str) -> None:
    """Images and points in the pool, its intersection and union, and those of all images: as measured with OpenCV."""
    if backend == "torch":
        monkey = load_folder(data_root / name, "train").subset(range(12))
        assert PalMaker().masks(monkey).any()
        return
    data = load_folder(data_root / name, "train")
    settled, masks = PalMaker().settled(data), PalMaker().masks(data)
    shared, either = ((masks & data.masks).sum((1, 2)), (masks | data.masks).sum((1, 2)))
    found = (settled.sum(), settled[data.points[:, 0]].sum(), shared[settled].sum(), either[settled].sum())
    assert tuple(map(int, (*found, shared.sum(), either.sum()))) == counts


def test_a_target_too_large_fails() -> None:
    """Disks: the polygon through the outermost pixels of a small one holds less than 50 square pixels."""
    for radius, good in ((2.5, True), (4.5, False)):
        rows, columns = np.mgrid[:40, :40]
        image = np.where((rows - 20) ** 2 + (columns - 20) ** 2 <= radius**2, 200, 50).astype(np.float32)
        data = ImageSet(["a"], torch.from_numpy(image)[None], torch.tensor([[40, 40]]), torch.tensor([[0, 20, 20]]))
        masks = PalMaker().masks(data)
        assert bool(PalMaker().settled(data)) is good and bool(masks[0, 20, 20])
        assert (int(masks.sum()) > 9) is good and (int(masks.sum()) == 1) is not good
        assert PalMaker(largest=200).settled(data).item()


def test_images_of_more_bits_and_odd_images(monkeypatch: pytest.MonkeyPatch) -> None:
    data = make_split("train", count=6, size=64)
    eight = replace(data, images=to_bytes(data.images, data.sizes))
    wanted = PalMaker().masks(eight)
    deep = eight.images.float()
    low, high = deep.amin((1, 2), keepdim=True), deep.amax((1, 2), keepdim=True)
    stretched = ((deep - low) / (high - low) * 255).round()
    assert torch.equal(to_bytes(deep, data.sizes), eight.images)  # whole numbers of 8 bits stay
    assert torch.equal(to_bytes(stretched * 257, data.sizes), stretched.to(torch.uint8))
    assert torch.equal(
        PalMaker().masks(replace(eight, images=stretched * 257)), PalMaker().masks(replace(eight, images=stretched))
    )
    odd = torch.full((3, 30, 30), 5.5)
    odd[1, 0, 0] = torch.nan
    odd[2] = torch.inf
    points = torch.tensor([[0, 0, 0], [0, 29, 29], [1, 15, 15], [2, 3, 0]])
    flat = ImageSet(list("abc"), odd, torch.tensor([[30, 30]] * 3), points)
    assert torch.equal(PalMaker().masks(flat), Points().masks(flat)) and not PalMaker().settled(flat).any()
    none = replace(flat, points=points[:0])
    assert PalMaker().settled(none).all() and not PalMaker().masks(none).any()
    monkeypatch.setattr(pal_maker, "GROUP", 1)
    assert torch.equal(PalMaker().masks(eight), wanted)


def test_makers_know_each_point() -> None:
    data = tiny_set()
    for maker in (PalMaker(), Points()):
        assert maker.knows_each(data)
        canvas = torch.zeros(data.images.shape, dtype=torch.bool).flatten(1)
        for points, position, masks in maker.each(data, data.points):
            for point, at, mask in zip(points, position, masks, strict=True):
                canvas[point[0], at[mask]] = True
        assert torch.equal(canvas.view(data.images.shape), maker.masks(data))
    assert Pmg(8).settled(data).all()


# ---- the update -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("seed", cases.sweep(range(60), fast=12))
def test_pal_equals_the_loop(seed: int) -> None:
    rng = np.random.default_rng(100 + seed)
    assert_equals(Pal(), reference_rules.pal, rng)
    base, share, reach, decay = rng.uniform(0.1, 0.9), rng.uniform(0.001, 0.2), int(rng.integers(1, 9)), rng.random()
    settings = {"base": base, "share": share, "reach": reach, "decay": decay}
    assert_equals(Pal(**settings), lambda label, p: reference_rules.pal(label, p, **settings), rng)


def test_pal_drops_a_single_component_away_from_the_core() -> None:
    label, far = point_label((40, 40), (20, 20)), np.zeros((40, 40), np.float32)
    far[28:30, 28:30] = 0.9
    assert np.array_equal(evolve(Pal(), label, far), label)
    far[21:29, 21:29] = 0.9
    assert evolve(Pal(), label, far)[29, 29] == 115  # 114.75


def test_pal_averages_once_and_decays_elsewhere() -> None:
    label = point_label((40, 60), (20, 20), (20, 24))
    label[5, 5:8], label[20, 40] = (200, 50, 1), 254
    probability = np.zeros((40, 60), np.float32)
    probability[20, 20:25] = 1
    found = evolve(Pal(share=0.1), label, probability)
    assert found[20, 20:25].tolist() == [255, 128, 128, 128, 255]  # 127.5 to the even number; both squares hold them
    assert found[5, 5:8].tolist() == [194, 48, 1] and found[20, 40] == 246  # 48.5 to the even number; 246.38
    for count in range(1, 23):  # a label of 0.9 falls under a half after 20 updates
        label = evolve(Pal(), np.full((1, 1), 230, np.uint8) if count == 1 else label, np.zeros((1, 1)))
        assert (label[0, 0] > 127) == (count < 20), count


# ---- entries --------------------------------------------------------------------------------------------------------


def test_rho_rises_over_the_phase() -> None:
    """Epochs 81 to 320 of PAL's 400 are the first 240 of the 319 that follow the epochs without updates."""
    for epoch in (85, 100, 320):
        assert Pal().allowance((epoch - 81, 319)) == pytest.approx(0.2 + 0.8 * (epoch - 80 + 1) / 240)
    assert Pal().allowance((240, 319)) is None and Pal(enhance=0.0).allowance((0, 10)) is None
    assert Pal(enhance=1.0).allowance((9, 10)) == pytest.approx(0.2 + 0.8 * 1.1)


@pytest.mark.parametrize("seed", cases.sweep(range(40), fast=8))
def test_entries_equal_the_loop(seed: int) -> None:
    rng = np.random.default_rng(seed)
    shapes = [cases.random_shape(rng, 40) for _ in range(6)]
    predictions = [cases.random_mask(rng, shape) for shape in shapes]
    points = [sorted(set(cases.random_points(rng, shape))) for shape in shapes]
    for mask, some in zip(predictions, points, strict=True):
        for point in some:
            mask[point] |= rng.random() < 0.5
    probability, sizes = cases.pad([mask.astype(np.float32) for mask in predictions])
    labels = torch.zeros(probability.shape, dtype=torch.uint8)
    labels[tuple(cases.point_rows(points).T)] = 255
    active = torch.from_numpy(rng.random(6) < 0.3)
    rule = Pal(spurious=float(rng.choice([0, 1, 5])), base=9.0, slope=0.0)  # no candidates: labels of the pool stay
    behind = int(rng.integers(0, 12))
    given = evidence_of(labels, probability, sizes, cases.point_rows(points), active=active, at=(behind, 16))
    found = rule.evolve(given)
    assert torch.equal(given.state.active, active)
    entered = 0
    for index, mask in enumerate(predictions):
        rho = 0.2 + 0.8 * (behind + 2) / 12
        enters, wanted = reference_rules.pal_entry(mask, points[index], rho, rule.spurious)
        enters &= not active[index]
        assert bool(found.active[index]) == (bool(active[index]) or enters)
        ours = found.labels[index, : shapes[index][0], : shapes[index][1]].numpy()
        old = labels[index, : shapes[index][0], : shapes[index][1]].numpy()
        np.testing.assert_array_equal(ours, wanted if enters else old)
        entered += enters
    refined = rule.evolve(replace(given, at=(12, 16)))
    assert torch.equal(refined.active, active) and torch.equal(refined.labels, labels)
    assert entered or seed not in range(8)


def test_an_entry_by_eye() -> None:
    """Two points that touch and one alone; a ring around the pair, two spurious pixels."""
    prediction = torch.zeros(1, 20, 30)
    prediction[0, 3:8, 3:8] = 1
    prediction[0, 4:7, 4:7] = 0  # a hole, which the pair lies in
    prediction[0, 15, 5] = prediction[0, 15, 9] = 1
    points = torch.tensor([[0, 5, 5], [0, 6, 6], [0, 10, 20]])
    labels = torch.zeros(1, 20, 30, dtype=torch.uint8)
    labels[tuple(points.T)] = 255
    active = torch.zeros(1, dtype=torch.bool)

    def entered(rule: Pal, behind: int) -> bool:
        """One of two is missed, two of three contours are spurious."""
        given = evidence_of(labels, prediction, None, points, active=active, at=(behind, 100))
        state = rule.evolve(given)
        if state.active.item():
            assert int((state.labels == 255).sum()) == 26 and state.labels[0, 10, 20] == 255
        else:
            assert torch.equal(state.labels, labels)
        return bool(state.active)

    assert not entered(Pal(enhance=0.8), 27) and entered(Pal(enhance=0.8), 28)  # rho = 0.2 + 0.8 * 30 / 80 = 1/2
    assert not entered(Pal(spurious=0.9), 60) and entered(Pal(spurious=1.0), 60)


def test_images_that_wait_keep_their_labels(backend: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Also where the device does not say which wait: on an accelerator all are looked at."""
    rng = np.random.default_rng(2)
    labels = torch.from_numpy(rng.integers(0, 256, (5, 30, 30), dtype=np.uint8))
    probability = torch.from_numpy(rng.random((5, 30, 30), dtype=np.float32))
    points = torch.tensor([[i, 10, 10 + i] for i in range(4)])
    active = torch.tensor([True, False, False, True, False])
    given = evidence_of(labels, probability, None, points, active=active)
    found = Pal().evolve(given)
    assert found.active.tolist()[4] and found.active[:1].all()  # the last has no point: it enters at once
    late = Pal().evolve(replace(given, at=(99, 100)))
    assert torch.equal(late.labels[~active], labels[~active]) and torch.equal(late.labels[active], found.labels[active])
    monkeypatch.setattr("hmg_gpu.masks.rules.pal.can_read", lambda _: False)
    everyone = Pal().evolve(given)
    assert torch.equal(everyone.labels, found.labels) and torch.equal(everyone.active, found.active)
