"""What IoU loses by each cause, against a count with SciPy, target by target."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from scipy import ndimage

from hmg_gpu.evaluation.losses import LOSSES, lost_pixels


def by_target(prediction: np.ndarray, target: np.ndarray) -> list[int]:
    """The slow way: every component by itself."""
    lost = dict.fromkeys(LOSSES, 0)
    for mask, other, alone, partly in (
        (target, prediction, "missed", "small"),
        (prediction, target, "false", "large"),
    ):
        for own, theirs in zip(mask, other, strict=True):
            labels, count = ndimage.label(own, np.ones((3, 3)))
            for number in range(1, count + 1):
                component = labels == number
                lost[partly if (component & theirs).any() else alone] += int((component & ~theirs).sum())
    return [*lost.values()]


@pytest.mark.parametrize("density", [0.02, 0.1, 0.4])
def test_lost_pixels(density: float) -> None:
    torch.manual_seed(int(100 * density))
    prediction, target = torch.rand(2, 5, 40, 33) < density
    lost = lost_pixels(prediction, target)
    assert lost.tolist() == by_target(prediction.numpy(), target.numpy())
    assert density != 0.1 or lost.min() > 0
    assert lost.sum() == (prediction ^ target).sum()


def test_padding_counts_nowhere() -> None:
    prediction, target = torch.rand(2, 3, 20, 24, generator=torch.Generator().manual_seed(0)) < 0.2
    sizes = torch.tensor([(20, 24), (13, 7), (1, 24)])
    parts = [
        by_target(prediction[row : row + 1, :height, :width].numpy(), target[row : row + 1, :height, :width].numpy())
        for row, (height, width) in enumerate(sizes.tolist())
    ]
    assert lost_pixels(prediction, target, sizes).tolist() == np.sum(parts, axis=0).tolist()


def test_nothing_and_bad_input() -> None:
    empty, full = torch.zeros(2, 6, 6, dtype=torch.bool), torch.ones(2, 6, 6, dtype=torch.bool)
    assert lost_pixels(empty, empty).tolist() == [0, 0, 0, 0]
    assert lost_pixels(empty, full).tolist() == [72, 0, 0, 0]
    assert lost_pixels(full, empty).tolist() == [0, 72, 0, 0]
    assert lost_pixels(empty[:0], full[:0]).tolist() == [0, 0, 0, 0]
    with pytest.raises(TypeError, match="prediction"):
        lost_pixels(empty.float(), full)
    with pytest.raises(ValueError, match="target"):
        lost_pixels(empty, full[:1])
