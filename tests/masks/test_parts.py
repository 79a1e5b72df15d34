"""Second parts in a student's lessons, against one crop at a time in NumPy."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from tiny import tiny_set

from hmg_gpu.masks.student import StudentSettings, train_student
from hmg_gpu.masks.student.parts import BRIGHTEST, DIMMEST, DRAWS, add_parts


def one_at_a_time(crops: np.ndarray, masks: np.ndarray, draws: np.ndarray, share: float) -> tuple[np.ndarray, ...]:
    """As add_parts; pixel by pixel."""
    parts, joined = crops.copy(), masks.copy()
    side = crops.shape[1]
    for number, (use, bright, mine, theirs) in enumerate(draws):
        other = number - 1
        own, far = np.argwhere(masks[number]), np.argwhere(masks[other])
        if use >= share or not len(own) or not len(far):
            continue
        move = own[int(mine * len(own))] - far[int(theirs * len(far))]
        near = {(y + a, x + b) for y, x in far.tolist() for a in (-1, 0, 1) for b in (-1, 0, 1)}
        for y, x in near:
            to = (y + move[0], x + move[1])
            if not all(0 <= value < side for value in (*to, y, x)):
                continue
            inside = bool(masks[other, y, x])
            value = (DIMMEST + (BRIGHTEST - DIMMEST) * bright) * crops[other, y, x] * (1.0 if inside else 0.5)
            if value > 0:
                parts[number][to] = max(crops[number][to], value)
            joined[number][to] |= inside
    return parts, joined


@pytest.mark.parametrize("seed", range(8))
def test_equals_one_at_a_time(seed: int) -> None:
    rng = np.random.default_rng(seed)
    crops = rng.normal(0.2, 0.5, (9, 12, 12)).astype(np.float32)
    masks = rng.random(crops.shape) < np.array([0.02, 0.2, 0.0, 0.1, 0.01, 0.3, 0.0, 1.0, 0.05])[:, None, None]
    draws = rng.random((9, DRAWS)).astype(np.float32)
    wanted, joined = one_at_a_time(crops, masks, draws, 0.7)
    parts, both = add_parts(*map(torch.from_numpy, (crops, masks, draws)), 0.7)
    np.testing.assert_allclose(parts.numpy(), wanted, rtol=1e-6)
    assert np.array_equal(both.numpy(), joined) and (joined != masks).any()
    for high, low in ((1.0, 0.0), (0.75, 0.25)):  # soft masks have the same parts
        soft = torch.where(torch.from_numpy(masks), high, low)
        floats, same = add_parts(torch.from_numpy(crops), soft, torch.from_numpy(draws), 0.7)
        assert torch.equal(same > 0.5, both) and (low > 0 or torch.equal(floats, parts))


def test_a_part_touches_and_no_share_changes_nothing() -> None:
    generator = torch.Generator().manual_seed(0)
    masks = torch.zeros(40, 24, 24, dtype=torch.bool)
    masks[:, 11:14, 10:15] = True
    crops, draws = masks.float(), torch.rand(40, DRAWS, generator=generator)
    same = add_parts(crops, masks, draws, 0.0)
    assert torch.equal(same[0], crops) and torch.equal(same[1], masks)
    parts, joined = add_parts(crops, masks, draws, 1.0)
    assert bool((joined.sum((1, 2)) <= 30).all()) and bool((joined >= masks).all())  # they share a pixel at least
    grown = (joined & ~masks).flatten(1).any(1)
    assert grown.float().mean() > 0.8
    dim = parts[joined & ~masks]
    assert float(dim.min()) >= DIMMEST - 1e-6 and float(dim.max()) <= BRIGHTEST + 1e-6
    assert torch.equal(parts[masks], crops[masks])  # the crop's own target is brighter


def test_every_pixel_of_a_mask_is_chosen() -> None:
    masks = torch.zeros(2, 8, 8, dtype=torch.bool)
    masks[0, 1, 1] = masks[0, 6, 2] = masks[0, 3, 7] = masks[1, 4, 4] = True
    seen = set()
    for draw in (0.0, 0.3, 0.34, 0.66, 0.67, 0.999999):
        draws = torch.tensor([[0.0, 1.0, draw, 0.0], [1.0, 0.0, 0.0, 0.0]])
        crops = torch.stack((torch.zeros(8, 8), masks[1].float()))
        parts, _ = add_parts(crops, masks, draws, 0.5)  # the second's pixel on a dark first crop
        seen.add(tuple((parts[0] > 0).nonzero()[0].tolist()))
    assert seen == {(1, 1), (6, 2), (3, 7)}


def test_the_share_decides_what_is_learned() -> None:
    few, again, many = (
        train_student(tiny_set(), settings=StudentSettings(crop=24, steps=2, batch_size=4, members=1, parts=share))
        for share in (0.0, 0.0, 0.9)
    )
    weights = [one.networks[25][0].head.weight for one in (few, again, many)]
    assert torch.equal(weights[0], weights[1]) and not torch.equal(weights[0], weights[2])
