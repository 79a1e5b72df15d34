"""Test-time flips: each view is turned back, and their mean is what is predicted."""

from __future__ import annotations

import pytest
import torch
from refusal import refused
from torch import nn

from hmg_gpu.models.views import VIEWS, Views


def views_of(images: torch.Tensor) -> list[torch.Tensor]:
    flat = [images, images.flip(-1), images.flip(-2), images.flip(-1, -2)]
    return flat + [view.transpose(-1, -2) for view in flat]


@pytest.mark.parametrize("count", VIEWS)
def test_mean_of_the_views(count: int) -> None:
    """A network whose logit is a filter that knows left from right and up from down."""
    torch.manual_seed(3)
    network = nn.Conv2d(1, 1, 5, padding=2)
    images = torch.randn(2, 1, 32, 64)
    probabilities = [network(view).sigmoid() for view in views_of(images)]
    back = [view.transpose(-1, -2) if number >= 4 else view for number, view in enumerate(probabilities)]
    back = [view.flip([axis for axis, bit in ((-1, 1), (-2, 2)) if number & bit]) for number, view in enumerate(back)]
    wanted = torch.stack(back[:count]).mean(0)
    assert torch.allclose(Views(network, count)(images).sigmoid(), wanted, atol=1e-6)
    if count > 1:
        assert not torch.allclose(wanted, back[0], atol=1e-3)


def test_a_blind_network_and_one_that_is_sure() -> None:
    sure = nn.Conv2d(1, 1, 1)
    nn.init.constant_(sure.weight, 0)
    nn.init.constant_(sure.bias, 200)
    logits = Views(sure, 8)(torch.zeros(1, 1, 32, 32))
    assert logits.isfinite().all() and (logits > 10).all()
    nn.init.constant_(sure.bias, 0)
    assert (Views(sure, 8)(torch.zeros(1, 1, 32, 32)) == 0).all()


def test_heads_and_counts() -> None:
    class Heads(nn.Module):
        def forward(self, images: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
            return images * 0, images

    images = torch.randn(1, 1, 32, 32).clamp(-5, 5)
    assert torch.allclose(Views(Heads(), 4)(images), images, atol=1e-4)
    refused(lambda: Views(nn.Identity(), 3), "views = 3", "1, 2, 4, 8")
