"""The soft-IoU loss: an example by hand, both reductions, heads, precision, gradients and refusals."""

from __future__ import annotations

import math

import pytest
import torch

from hmg_gpu.models.losses import soft_iou_loss

LOGIT_075 = math.log(3)  # sigmoid = 0.75


def example() -> tuple[torch.Tensor, torch.Tensor]:
    """Two images of 1 x 2: probabilities 0.75 0.5 against mask 1 0; 0.5 0.5 against an empty mask."""
    logits = torch.tensor([[[[LOGIT_075, 0.0]]], [[[0.0, 0.0]]]])
    target = torch.tensor([[[[True, False]]], [[[False, False]]]])
    return logits, target


def test_by_hand() -> None:
    logits, target = example()
    # image 1: I = 0.75, U = 1.25 + 1 - 0.75 = 1.5; image 2: I = 0, U = 1
    first, second = 1 - (0.75 + 1) / (1.5 + 1), 1 - (0 + 1) / (1 + 1)
    assert soft_iou_loss(logits, target).item() == pytest.approx((first + second) / 2, abs=1e-6)
    batch = 1 - (0.75 + 0 + 1) / (1.5 + 1 + 1)
    assert soft_iou_loss(logits, target, reduction="batch").item() == pytest.approx(batch, abs=1e-6)
    without = 1 - 0.75 / 2.5
    assert soft_iou_loss(logits, target, reduction="batch", smooth=0.0).item() == pytest.approx(without, abs=1e-6)


def test_target_forms_agree() -> None:
    logits, target = example()
    expected = soft_iou_loss(logits, target)
    assert torch.equal(soft_iou_loss(logits, target[:, 0]), expected)
    assert torch.equal(soft_iou_loss(logits, target.float()), expected)


def test_heads_give_the_mean() -> None:
    logits, target = example()
    other = logits.flip(3)
    mean = (soft_iou_loss(logits, target) + soft_iou_loss(other, target)) / 2
    torch.testing.assert_close(soft_iou_loss((logits, other), target), mean)
    torch.testing.assert_close(soft_iou_loss([logits, other], target), mean)
    assert torch.equal(soft_iou_loss((logits,), target), soft_iou_loss(logits, target))


@pytest.mark.parametrize("reduction", ["image", "batch"])
def test_limits(reduction: str) -> None:
    target = torch.zeros(2, 1, 16, 16, dtype=torch.bool)
    target[0, 0, 4:7, 4:7] = True
    signs = torch.where(target, 40.0, -40.0)
    assert soft_iou_loss(signs, target, reduction=reduction).item() < 1e-6
    assert soft_iou_loss(-signs, target, reduction=reduction).item() > 0.9
    assert soft_iou_loss(torch.full_like(signs, -40.0), target[1:].expand(2, -1, -1, -1), reduction=reduction) < 1e-6


@pytest.mark.parametrize("reduction", ["image", "batch"])
def test_gradient(reduction: str) -> None:
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(2, 1, 4, 5, generator=generator, dtype=torch.float64, requires_grad=True)
    target = torch.rand(2, 1, 4, 5, generator=generator) > 0.6
    assert torch.autograd.gradcheck(lambda x: soft_iou_loss(x, target, reduction=reduction), (logits,))
    soft_iou_loss(logits, target, reduction=reduction).backward()
    assert (logits.grad[target] < 0).all()  # descent raises targets ...
    assert (logits.grad[~target] > 0).all()  # ... and lowers the rest


def test_half_precision_is_summed_in_float32() -> None:
    # 512 x 512 probabilities of 0.5 sum to 131072: beyond fp16's largest number, and bf16 would stop counting at 256
    target = torch.ones(1, 1, 512, 512, dtype=torch.bool)
    for dtype in (torch.float16, torch.bfloat16):
        logits = torch.zeros(1, 1, 512, 512, dtype=dtype)
        with torch.autocast("cpu", dtype=torch.bfloat16):
            loss = soft_iou_loss(logits, target)
        assert loss.dtype == torch.float32
        assert loss.item() == pytest.approx(1 - (131072 + 1) / (262144 + 1), abs=1e-6)


def test_refusals() -> None:
    logits, target = example()
    with pytest.raises(ValueError, match=r'reduction must be "image" or "batch", got \'mean\''):
        soft_iou_loss(logits, target, reduction="mean")
    with pytest.raises(ValueError, match=r"at least one head, got an empty sequence"):
        soft_iou_loss([], target)
    with pytest.raises(TypeError, match=r"target must be bool or floating point in \[0, 1\], got torch\.uint8"):
        soft_iou_loss(logits, target.to(torch.uint8))
    with pytest.raises(TypeError, match=r"logits must be floating point, got torch\.bool"):
        soft_iou_loss(logits > 0, target)
    with pytest.raises(ValueError, match=r"got \[2, 1, 1, 2\] and \[1, 1, 1, 2\]"):
        soft_iou_loss(logits, target[:1])
    with pytest.raises(ValueError, match=r"got \[2, 1, 2\] and \[2, 1, 1, 2\]"):
        soft_iou_loss(logits[:, 0], target)
