"""Crops and augmentation against a slow NumPy twin, and the plan of an epoch."""

from __future__ import annotations

from collections import Counter
from itertools import product

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from refusal import refused
from tiny import POISON, SIZES, tiny_set

from hmg_gpu.data import ImageSet
from hmg_gpu.data import batches as module
from hmg_gpu.data.batches import ONE, PLAN, batches, cut_crops, draw_epoch, mix_seed, to_targets


@pytest.fixture(autouse=True, params=["slices", "gather"])
def path(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """The way of host memory, and that of a device whose values are never read."""
    if request.param == "gather":
        monkeypatch.setattr(module, "can_read", lambda tensor: False)


WAYS = list(product((0, 1), repeat=3))  # flip_rows, flip_columns, transpose
PLAIN = (ONE, 0)  # gain, offset of a crop that keeps its intensities
LIGHTS = (PLAIN, (1_250_000, 0), (777_777, -430_001))


def crop(values: NDArray, row: list[int], side: int) -> NDArray:
    """One crop the slow way: cut, pad with zero, flip rows, flip columns, transpose."""
    _, top, left, flip_rows, flip_columns, transpose, gain, offset = row
    out = np.zeros((side, side), values.dtype)
    part = values[top : top + side, left : left + side]
    if part.dtype == np.float32:
        part = part * np.float32(gain / ONE) + np.float32(offset / ONE)
    out[: part.shape[0], : part.shape[1]] = part
    if flip_rows:
        out = out[::-1]
    if flip_columns:
        out = out[:, ::-1]
    return out.T if transpose else out


def every_crop(side: int) -> torch.Tensor:
    """Each image at its extreme corners in all eight orientations, some brightened: int64 [P, 8]."""
    rows = []
    for index, size in enumerate(SIZES):
        down, across = (max(length - side, 0) for length in size)
        rows += [(index, top, left, *way) for top in {0, down} for left in {0, across} for way in WAYS]
    return torch.tensor([(*row, *LIGHTS[place % 3]) for place, row in enumerate(rows)])


@pytest.mark.parametrize("side", [20, 32, 64])  # inside every image; larger than some; larger than the padded batch
@pytest.mark.parametrize("dtype", [torch.uint8, torch.float32])
def test_crops_equal_the_slow_ones(side: int, dtype: torch.dtype) -> None:
    data = tiny_set()
    data.images = data.images.to(dtype)
    plan = every_crop(side)
    images, masks = cut_crops(data, data.masks, plan, side)
    assert images.dtype == torch.float32 and masks.dtype == torch.bool
    assert images.shape == masks.shape == (len(plan), 1, side, side)
    for image, mask, row in zip(images[:, 0].numpy(), masks[:, 0].numpy(), plan.tolist(), strict=True):
        height, width = SIZES[row[0]]
        pixels = data.images[row[0], :height, :width].numpy().astype(np.float32)
        expected = crop((pixels - np.float32(data.mean)) / np.float32(data.std), row, side)
        np.testing.assert_allclose(image, expected, rtol=1e-5, atol=1e-6)
        assert np.array_equal(image == 0, expected == 0)  # the padding is exactly zero
        assert np.array_equal(mask, crop(data.masks[row[0], :height, :width].numpy(), row, side))


def test_hand_made() -> None:
    values = torch.tensor([[[1, 2, 3], [4, 5, 6]]] * 2, dtype=torch.float32)
    data = ImageSet(["a", "b"], values, torch.tensor([[2, 3]] * 2), torch.zeros(0, 3, dtype=torch.int64), values > 4)
    #       image, top, left, flip_rows, flip_columns, transpose
    ways = ((0, 0, 0, 0, 0, 0), (0, 0, 1, 1, 0, 0), (0, 0, 1, 0, 1, 0), (1, 0, 1, 1, 0, 1))
    plan = torch.tensor([(*way, *PLAIN) for way in ways])
    images, masks = cut_crops(data, data.masks, plan, 2)
    assert images[:, 0].tolist() == [[[1, 2], [4, 5]], [[5, 6], [2, 3]], [[3, 2], [6, 5]], [[5, 2], [6, 3]]]
    assert torch.equal(masks, images > 4)
    wide, _ = cut_crops(data, data.masks, torch.tensor([[0, 0, 0, 1, 0, 0, *PLAIN]]), 4)
    assert wide[0, 0].tolist() == [[0, 0, 0, 0], [0, 0, 0, 0], [4, 5, 6, 0], [1, 2, 3, 0]]  # padded, then flipped
    bright, same = cut_crops(data, data.masks, torch.tensor([[0, 0, 0, 1, 0, 0, 2 * ONE, ONE // 2]]), 4)
    assert bright[0, 0].tolist() == [[0, 0, 0, 0], [0, 0, 0, 0], [8.5, 10.5, 12.5, 0], [2.5, 4.5, 6.5, 0]]
    assert torch.equal(same, wide[:, :] > 4)


def test_padding_is_never_read() -> None:
    """NaN in the images' padding and foreground in the masks' leave no trace."""
    data = tiny_set()
    plan = draw_epoch(data.sizes, 6, 48, seed=3, epoch=0)[0]
    expected = cut_crops(data, data.masks, plan, 48)
    inside = torch.zeros_like(data.masks)
    for index, (height, width) in enumerate(SIZES):
        inside[index, :height, :width] = True
    assert (data.images[~inside] == POISON).all()
    data.images = torch.where(inside, data.images.float(), torch.nan)
    for found, wanted in zip(cut_crops(data, data.masks | ~inside, plan, 48), expected, strict=True):
        assert torch.equal(found, wanted)


def test_both_paths_give_the_same_bits(monkeypatch: pytest.MonkeyPatch) -> None:
    data = tiny_set()
    for side in (20, 32, 64):
        plan = every_crop(side)
        found = cut_crops(data, data.masks, plan, side)
        monkeypatch.setattr(module, "can_read", lambda tensor: False)
        assert all(map(torch.equal, found, cut_crops(data, data.masks, plan, side)))
        monkeypatch.undo()


def test_crops_of_a_subset() -> None:
    data = tiny_set()
    part = data.subset([4, 1])
    plan = torch.tensor([[0, 5, 0, 1, 0, 1, *LIGHTS[1]], [1, 3, 1, 0, 1, 0, *LIGHTS[2]]])
    whole = plan.clone()
    whole[:, 0] = torch.tensor([4, 1])
    expected = cut_crops(data, data.masks, whole, 32)
    assert all(map(torch.equal, cut_crops(part, part.masks, plan, 32), expected))


def test_plan_is_a_function_of_seed_and_epoch() -> None:
    sizes = torch.tensor(SIZES)

    def draw(seed: int, epoch: int) -> torch.Tensor:
        return draw_epoch(sizes, 4, 32, seed=seed, epoch=epoch)

    first = draw(5, 7)
    torch.manual_seed(99)
    torch.rand(10)
    draw(5, 8)
    assert torch.equal(draw(5, 7), first)
    others = [draw(5, 8), draw(6, 7), draw(7, 5), draw(5, 0)]
    assert not any(torch.equal(first, other) for other in others)
    state = torch.get_rng_state()
    draw(0, 0)
    assert torch.equal(torch.get_rng_state(), state)  # the global generator is left alone


@pytest.mark.parametrize(("count", "batch"), [(6, 2), (6, 4), (7, 3), (3, 8), (1, 2), (5, 5)])
def test_each_image_once_and_a_wrapped_tail(count: int, batch: int) -> None:
    plan = draw_epoch(torch.full((count, 2), 40), batch, 32, seed=0, epoch=1)
    steps = -(-count // batch)
    assert plan.shape == (steps, batch, len(PLAN)) and plan.dtype == torch.int64
    order = plan[:, :, 0].flatten().tolist()
    assert sorted(order[:count]) == list(range(count))
    assert order == [order[place % count] for place in range(steps * batch)]  # the tail starts the order again


def test_corners_are_uniform_and_flips_fair() -> None:
    sizes = torch.tensor([[37, 32]]).repeat(6000, 1)  # six tops, one left
    plan = draw_epoch(sizes, 6000, 32, seed=0, epoch=0)[0]
    tops = Counter(plan[:, 1].tolist())
    assert set(tops) == set(range(6))  # both extremes are drawn
    assert all(abs(count - 1000) < 5 * 29 for count in tops.values())  # five standard deviations
    assert (plan[:, 2] == 0).all()
    ways = Counter(map(tuple, plan[:, 3:6].tolist()))
    assert set(ways) == set(WAYS)
    assert all(abs(count - 750) < 5 * 26 for count in ways.values())
    pairs = Counter(zip(plan[:, 1].tolist(), plan[:, 3].tolist(), strict=True))
    assert all(abs(count - 500) < 5 * 22 for count in pairs.values())  # corner and flip are independent


def test_an_image_smaller_than_the_crop_starts_at_its_corner() -> None:
    plan = draw_epoch(torch.tensor([[20, 90]] * 50), 50, 32, seed=0, epoch=0)[0]
    assert (plan[:, 1] == 0).all()
    assert 0 <= int(plan[:, 2].min()) < int(plan[:, 2].max()) <= 58


def test_jitter() -> None:
    """Gain exp(J u) and offset J v, both uniform; nothing else changes, and without it every crop keeps its values."""
    sizes, settings = torch.tensor([[37, 33]]).repeat(6000, 1), {"seed": 2, "epoch": 1}
    plain, plan = (draw_epoch(sizes, 6000, 32, **settings, jitter=jitter)[0] for jitter in (0.0, 0.3))
    assert torch.equal(plan[:, :6], plain[:, :6]) and (plain[:, 6:] == torch.tensor(PLAIN)).all()
    for drawn in ((plan[:, 6].double() / ONE).log() / 0.3, plan[:, 7].double() / ONE / 0.3):
        tenths = Counter((drawn * 5).floor().long().tolist())
        assert set(tenths) == set(range(-5, 5)) and all(abs(count - 600) < 5 * 24 for count in tenths.values())
    assert abs(torch.corrcoef(plan[:, 6:].T.double())[0, 1]) < 0.06
    assert torch.equal(draw_epoch(sizes, 6000, 32, **settings, jitter=0.3)[0], plan)
    assert not torch.equal(draw_epoch(sizes, 6000, 32, seed=2, epoch=2, jitter=0.3)[0, :, 6:], plan[:, 6:])


def test_crops_with_a_margin() -> None:
    """Uniform from a margin before the first corner, which is clamped, to a margin beyond the last one."""
    side, margin, count = 32, 6, 20000
    sizes = torch.tensor([[52, 40]]).repeat(count, 1)
    plan = draw_epoch(sizes, count, side, seed=0, epoch=0, margin=margin)[0]
    for axis, slack in ((1, 20), (2, 8)):
        places = Counter(plan[:, axis].tolist())
        each = count / (slack + 2 * margin + 1)
        assert set(places) == set(range(slack + margin + 1))
        for place, number in places.items():
            wanted = each * (margin + 1 if place == 0 else 1)
            assert abs(number - wanted) < 5 * wanted**0.5
    data = tiny_set()
    small = torch.tensor([[5, 70], [1, 1], [64, 64]])
    (rows,) = draw_epoch(small.repeat(2000, 1), 6000, side, seed=1, epoch=0, margin=side)
    assert int(rows[rows[:, 0] % 3 == 2, 1].max()) == 64 - side // 2  # never beyond by more than half
    assert (rows[:, 1:3] < small.repeat(2000, 1)[rows[:, 0]]).all()  # a crop holds some of its image
    (rows,) = draw_epoch(data.sizes, 6, 32, seed=1, epoch=0, margin=99)
    images, masks = cut_crops(data, data.masks, rows, 32)
    for image, mask, row in zip(images[:, 0].numpy(), masks[:, 0].numpy(), rows.tolist(), strict=True):
        height, width = SIZES[row[0]]
        pixels = data.images[row[0], :height, :width].numpy().astype(np.float32)
        np.testing.assert_allclose(
            image, crop((pixels - np.float32(data.mean)) / np.float32(data.std), row, 32), 1e-5, 1e-6
        )
        assert np.array_equal(mask, crop(data.masks[row[0], :height, :width].numpy(), row, 32))
    (rows,) = draw_epoch(data.sizes, 6, 20, seed=0, epoch=0, positive=1.0, points=data.points, margin=99)
    _, marks = cut_crops(data, marked_points(data), rows, 20)
    assert marks.flatten(1).any(1).all()


# ---- crops around points --------------------------------------------------------------------------------------------


def holds(plan: torch.Tensor, points: torch.Tensor, side: int) -> torch.Tensor:
    """Which points lie in which crop of their own image: bool [C, P]."""
    image, corner = plan[:, :1], plan[:, 1:3, None]  # [C, 1], [C, 2, 1]
    place = points[:, 1:].T
    return ((place >= corner) & (place < corner + side)).all(1) & (points[:, 0] == image)


def around(sizes: torch.Tensor, points: torch.Tensor | None, side: int, positive: float, **more: int) -> torch.Tensor:
    settings = {"batch_size": len(sizes), "seed": 3, "epoch": 5} | more
    return draw_epoch(sizes, settings.pop("batch_size"), side, **settings, positive=positive, points=points).flatten(
        0, 1
    )


def test_without_a_share_the_plan_is_the_old_one() -> None:
    sizes, points = torch.tensor(SIZES), tiny_set().points
    plain = draw_epoch(sizes, 4, 20, seed=3, epoch=5)
    for positive, given in ((0.0, points), (0.0, None), (1.0, None), (1.0, points[:0])):
        assert torch.equal(draw_epoch(sizes, 4, 20, seed=3, epoch=5, positive=positive, points=given), plain)
    moved = draw_epoch(sizes, 4, 20, seed=3, epoch=5, positive=1.0, points=points)
    assert not torch.equal(moved, plain)
    others = [PLAN.index(name) for name in ("image", "flip_rows", "flip_columns", "transpose")]
    assert torch.equal(moved[..., others], plain[..., others])  # only the corners move


def test_every_crop_holds_a_point_of_its_image() -> None:
    """Points in corners and on borders, several an image, some twice; an image without any is cut as ever."""
    sizes = torch.tensor([(64, 50), (90, 41), (33, 32), (70, 70), (200, 36)])
    points = torch.tensor(
        [
            (0, 0, 0),
            (0, 63, 49),
            (0, 63, 0),
            (1, 0, 40),
            (1, 45, 20),
            (1, 45, 20),
            (2, 16, 31),
            (4, 199, 0),
            (4, 100, 35),
        ]
    )
    plain = torch.cat([around(sizes, points, 32, 0.0, epoch=epoch) for epoch in range(400)])
    plan = torch.cat([around(sizes, points, 32, 1.0, epoch=epoch) for epoch in range(400)])
    inside = holds(plan, points, 32)
    marked = plan[:, 0] != 3
    assert inside[marked].any(1).all()
    assert torch.equal(plan[~marked], plain[~marked])  # uniform, see above
    assert inside.any(0).all()  # every point is drawn
    slack = (sizes[plan[:, 0]] - 32).clamp(min=0)
    assert ((plan[:, 1:3] >= 0) & (plan[:, 1:3] <= slack)).all()  # a crop never leaves its image


@pytest.mark.parametrize("positive", [0.2, 0.8, 1.0])
def test_the_share_of_crops_around_points(positive: float) -> None:
    """In images so large that a crop anywhere holds the point once in thousands."""
    count, side = 4000, 32
    sizes = torch.full((count, 2), 3000)
    points = torch.cat((torch.arange(count)[:, None], torch.full((count, 2), 1500)), dim=1)
    plan, plain = (around(sizes, points, side, share) for share in (positive, 0.0))
    hit = holds(plan, points, side).any(1)
    deviation = (positive * (1 - positive) / count) ** 0.5
    assert abs(float(hit.double().mean()) - positive) <= 5 * deviation + 1 / 1000
    assert torch.equal(plan[~hit], plain[~hit])  # the others lie where they would lie without
    # The crops around a point lie anywhere that holds it, in each direction by itself.
    offsets = 1500 - plan[hit][:, 1:3]
    for axis in (0, 1):
        seen = Counter(offsets[:, axis].tolist())
        wanted = int(hit.sum()) / side
        assert set(seen) == set(range(side))
        assert all(abs(number - wanted) < 5 * wanted**0.5 for number in seen.values())
    quarters, wanted = Counter(map(tuple, (offsets // 16).tolist())), int(hit.sum()) / 4
    assert len(quarters) == 4 and all(abs(number - wanted) < 5 * wanted**0.5 for number in quarters.values())


def test_crops_more_hold_a_place() -> None:
    """So many more as the share says, mixed with the others, which lie where they would lie without."""
    sizes, points = torch.tensor(SIZES), tiny_set().points
    places = torch.tensor([(0, 0, 0), (0, 9, 30), (3, 20, 5), (5, 31, 31)])
    places[:, 1:] = torch.minimum(places[:, 1:], sizes[places[:, 0]] - 1)
    named = {"seed": 3, "positive": 0.5, "points": points, "jitter": 0.6, "margin": 4}
    plain = draw_epoch(sizes, 2, 20, epoch=5, **named)
    for given, share in ((places, 0.0), (places[:0], 0.5), (None, 0.5)):
        assert torch.equal(draw_epoch(sizes, 2, 20, epoch=5, places=given, hard_examples=share, **named), plain)
    seen, steps = Counter(), Counter()
    for epoch in range(300):
        plan = draw_epoch(sizes, 1, 20, epoch=epoch, places=places, hard_examples=0.4, **named)
        again = draw_epoch(sizes, 1, 20, epoch=epoch, places=places, hard_examples=0.4, **named)
        assert torch.equal(plan, again) and plan.shape == (len(sizes) + 3, 1, 8)  # 0.4 of 6, rounded up
        images = Counter(plan[:, 0, 0].tolist())
        assert all(images[image] >= 1 for image in range(len(sizes)))
        more = images - Counter(range(len(sizes)))
        assert set(more) <= {0, 3, 5}
        seen += more
        steps[int((plan[:, 0, 0] == 3).nonzero()[0])] += 1
    assert all(abs(seen[image] / 900 - share) < 0.08 for image, share in ((0, 0.5), (3, 0.25), (5, 0.25)))
    assert len(steps) > 6  # anywhere in the epoch
    last = (sizes + 4 - 20).clamp(min=0)
    assert (plan[:, 0, 1:3] <= torch.minimum(last, sizes - 1)[plan[:, 0, 0]]).all()


def test_a_crop_around_a_place_lies_anywhere_that_holds_it() -> None:
    """One image so large that another crop holds the place once in thousands."""
    side = 32
    sizes, places = torch.tensor([(3000, 3000)]), torch.tensor([(0, 1500, 700)])
    plan = torch.cat(
        [draw_epoch(sizes, 2, side, seed=1, epoch=epoch, places=places, hard_examples=1.0)[0] for epoch in range(2000)]
    )
    offsets = places[0, 1:] - plan[:, 1:3]
    held = ((offsets >= 0) & (offsets < side)).all(1)
    assert abs(int(held.sum()) - 2000) < 5
    for axis in (0, 1):
        seen = Counter(offsets[held][:, axis].tolist())
        assert set(seen) == set(range(side)) and all(abs(n - 62.5) < 5 * 62.5**0.5 for n in seen.values())


def test_the_points_of_an_image_are_drawn_alike() -> None:
    """Seven points so far apart that no crop holds two: each in one seventh of the crops."""
    count, side = 3500, 32
    sizes = torch.full((count, 2), 700)
    places = torch.tensor([(0, 0), (0, 699), (100, 300), (300, 50), (350, 350), (699, 0), (699, 699)])
    points = torch.cat((torch.arange(count).repeat_interleave(7)[:, None], places.repeat(count, 1)), dim=1)
    plan = around(sizes, points, side, 1.0)
    local = places.T - plan[:, 1:3, None]  # [C, 2, 7]
    inside = ((local >= 0) & (local < side)).all(1)
    assert (inside.sum(1) == 1).all()
    assert all(abs(number - 500) < 5 * 22 for number in inside.sum(0).tolist())


def test_an_image_smaller_than_the_crop_holds_its_points_anyhow() -> None:
    sizes = torch.tensor([[20, 90]] * 50)
    points = torch.tensor([(index, 19, 89 * (index % 2)) for index in range(50)])
    plan = around(sizes, points, 32, 1.0)
    assert holds(plan, points, 32).any(1).all()
    assert (plan[:, 1] == 0).all() and (plan[:, 2] <= 58).all()
    data = tiny_set()
    for side in (20, 32, 64):  # some images smaller, all images smaller
        (rows,) = draw_epoch(data.sizes, 6, side, seed=0, epoch=0, positive=1.0, points=data.points)
        _, marks = cut_crops(data, marked_points(data), rows, side)
        assert marks.flatten(1).any(1).all()


def marked_points(data: ImageSet) -> torch.Tensor:
    marks = torch.zeros_like(data.masks)
    marks[tuple(data.points.T)] = True
    return marks


def test_crops_around_points_are_a_function_of_seed_and_epoch() -> None:
    sizes, points = torch.tensor(SIZES), tiny_set().points

    def draw(seed: int, epoch: int, positive: float = 0.5) -> torch.Tensor:
        return draw_epoch(sizes, 4, 20, seed=seed, epoch=epoch, positive=positive, points=points)

    state = torch.get_rng_state()
    first = draw(5, 7)
    assert torch.equal(torch.get_rng_state(), state)
    torch.rand(9)
    draw(5, 8)
    assert torch.equal(draw(5, 7), first)
    assert not any(torch.equal(first, other) for other in (draw(5, 8), draw(6, 7), draw(5, 7, 1.0)))
    before = points.clone()
    draw(1, 1, 1.0)
    assert torch.equal(points, before)


def test_some_images_alone_are_drawn() -> None:
    """Each once an epoch; all of them in their order are drawn as if nobody had said so."""
    sizes, points = torch.tensor(SIZES), tiny_set().points
    settings = {"seed": 3, "positive": 0.5, "points": points}
    for images in ([0, 2, 5], [4], [1, 3, 2, 0]):
        plan = draw_epoch(sizes, 3, 20, epoch=1, images=torch.tensor(images), **settings)
        drawn = plan[:, :, 0].flatten().tolist()
        assert len(plan) == -(-len(images) // 3) and sorted(drawn[: len(images)]) == sorted(images)
        assert ((plan[:, :, 1:3] >= 0) & (plan[:, :, 1:3] <= (sizes[plan[:, :, 0]] - 20).clamp(min=0))).all()
        other = draw_epoch(sizes, 3, 20, epoch=1, images=torch.tensor(images), **settings | {"seed": 4})
        assert not torch.equal(plan, other)
    every = torch.arange(len(sizes))
    for epoch in range(3):
        whole = draw_epoch(sizes, 4, 20, epoch=epoch, **settings)
        assert torch.equal(draw_epoch(sizes, 4, 20, epoch=epoch, images=every, **settings), whole)


@pytest.mark.parametrize("device", ["cpu", "gathered"])
def test_soft_labels_are_cut_as_masks_are(device: str, monkeypatch: pytest.MonkeyPatch) -> None:
    data = tiny_set()
    if device == "gathered":  # the path of an accelerator
        monkeypatch.setattr("hmg_gpu.data.batches.can_read", lambda _: False)
    plan = draw_epoch(data.sizes, 6, 40, seed=1, epoch=0)[0]
    labels = data.masks.to(torch.uint8) * 7
    images, cut = cut_crops(data, labels, plan, 40)
    expected, masks = cut_crops(data, data.masks, plan, 40)
    assert torch.equal(images, expected) and cut.dtype == torch.uint8 and torch.equal(cut, masks * 7)
    assert torch.equal(to_targets(cut), masks * torch.tensor(7 / 255)) and torch.equal(to_targets(masks), masks.float())


def test_mix_seed() -> None:
    seeds = {mix_seed(a, b, c) for a in range(8) for b in range(8) for c in range(8)}
    assert len(seeds) == 512 and all(0 <= seed < 2**63 for seed in seeds)
    assert mix_seed(1, 2) != mix_seed(2, 1) and mix_seed(-1) != mix_seed(0)


def test_batches_walk_the_plan_and_resume() -> None:
    data = tiny_set()
    arguments = {"batch_size": 4, "patch_size": 32, "seed": 2, "epoch": 3}
    whole = list(batches(data, data.masks, **arguments))
    assert len(whole) == 2 and [len(images) for images, _ in whole] == [4, 4]
    later = list(batches(data, data.masks, **arguments, start=1))
    assert len(later) == 1 and all(torch.equal(a, b) for a, b in zip(later[0], whole[1], strict=True))
    refused(lambda: next(batches(data.subset([]), data.masks, **arguments)), "tiny train", "no image", "split file")
