"""Predicting a set whose images pad to different sizes."""

from __future__ import annotations

import math

import pytest
import torch
from refusal import refused
from tiny import SIZES, tiny_set
from torch import Tensor, nn

from hmg_gpu.common.errors import HMGError
from hmg_gpu.data import ImageSet
from hmg_gpu.models import build_model
from hmg_gpu.models.predict import padded_side, predict, predict_logits


class Spy(nn.Module):
    """Gives back what it is fed, and remembers it; as several heads if asked."""

    def __init__(self, heads: int = 0) -> None:
        super().__init__()
        self.heads, self.seen, self.modes = heads, [], []

    def forward(self, images: Tensor) -> Tensor | tuple[Tensor, ...]:
        self.seen.append(images)
        self.modes.append((self.training, torch.is_grad_enabled()))
        return (*[-images] * (self.heads - 1), images) if self.heads else images


def normalised(data: ImageSet, index: int) -> Tensor:
    height, width = SIZES[index]
    return (data.images[index, :height, :width].float() - data.mean) / data.std


@pytest.mark.parametrize(
    ("side", "least", "lesps"), [(1, 32, 32), (31, 32, 32), (32, 32, 64), (33, 64, 64), (64, 64, 96), (256, 256, 288)]
)
def test_padded_side(side: int, least: int, lesps: int) -> None:
    assert (padded_side(side), padded_side(side, "lesps")) == (least, lesps)


@pytest.mark.parametrize("padding", ["least", "lesps"])
def test_what_the_network_sees(padding: str) -> None:
    """Own normalisation, zero padding whatever lies there, images of one padded size together, eval without grad."""
    data, spy = tiny_set(), Spy()
    found = {}
    for chunk, logits in predict_logits(spy, data, padding=padding, batch_size=2):
        batch = spy.seen[-1]
        assert 1 <= len(chunk) <= 2 and len(batch) == len(chunk) == len(logits)
        assert logits.shape[1:] == data.images.shape[1:] and logits.dtype == torch.float32
        for place, index in enumerate(chunk):
            height, width = SIZES[index]
            assert batch.shape[2:] == (padded_side(height, padding), padded_side(width, padding))
            expected = torch.zeros(batch.shape[2:])
            expected[:height, :width] = normalised(data, index)
            assert torch.equal(batch[place, 0], expected)
            found[index] = logits[place, :height, :width]
    assert sorted(found) == list(range(len(data)))
    assert all(torch.equal(logits, normalised(data, index)) for index, logits in found.items())
    assert set(spy.modes) == {(False, False)}
    shapes = [tuple(batch.shape) for batch in spy.seen]
    if padding == "least":
        assert sorted(shapes) == [(1, 1, 64, 32), (1, 1, 64, 64), (2, 1, 32, 32), (2, 1, 32, 64)]
    else:
        assert sorted(shapes) == [(1, 1, 32, 32), (1, 1, 32, 64), (2, 1, 64, 64), (2, 1, 64, 64)]


@pytest.mark.parametrize("padding", ["least", "lesps"])
def test_batches_equal_one_at_a_time(padding: str) -> None:
    """A network cannot tell who shares its batch; only the order of float32 sums may differ."""
    model = build_model("acm", output_bias=0.0)
    for module in model.modules():  # statistics of a trained network, so that images matter
        if isinstance(module, nn.BatchNorm2d):
            nn.init.uniform_(module.running_mean, -0.3, 0.3)
            nn.init.uniform_(module.running_var, 0.5, 1.5)
    data = tiny_set()
    together = torch.full(data.images.shape, torch.nan)
    for chunk, logits in predict_logits(model, data, padding=padding):
        together[chunk] = logits
    for index, (height, width) in enumerate(SIZES):
        (_, alone), *rest = predict_logits(model, data.subset([index]), padding=padding)
        assert not rest and alone.shape == (1, height, width)
        torch.testing.assert_close(together[index, :height, :width], alone[0], atol=1e-5, rtol=1e-5)
        assert alone.std() > 1e-3


def test_paddings_differ() -> None:
    """A side of 32 is padded to 64 by LESPS, and that reaches the prediction of a real network."""
    model, data = build_model("acm").eval(), tiny_set(((32, 32),))
    (_, least), (_, lesps) = (next(predict_logits(model, data, padding=padding)) for padding in ("least", "lesps"))
    assert least.shape == lesps.shape == (1, 32, 32) and not torch.equal(least, lesps)


def test_normalisation_of_the_training_set() -> None:
    data, spy = tiny_set(((32, 32),)), Spy()
    list(predict_logits(spy, data, mean=10.0, std=2.0))
    assert torch.equal(spy.seen[0][0, 0], (data.images[0].float() - 10) / 2)
    list(predict_logits(spy, data, mean=0.0, std=1.0))  # zero is a mean, not a default
    assert torch.equal(spy.seen[1][0, 0], data.images[0].float())


@pytest.mark.parametrize("threshold", [0.5, 0.45, 0.9])
def test_prediction_is_probability_over_threshold(threshold: float) -> None:
    data = tiny_set()
    prediction = predict(Spy(), data, threshold=threshold)
    assert prediction.dtype == torch.bool and prediction.shape == data.images.shape
    for index, (height, width) in enumerate(SIZES):
        expected = normalised(data, index).double().sigmoid() > threshold
        assert torch.equal(prediction[index, :height, :width], expected)
        assert 0 < expected.sum() < expected.numel()
    assert predict(Spy(), data, threshold=0.45).sum() > predict(Spy(), data, threshold=0.9).sum()


def test_even_odds_are_background() -> None:
    data = tiny_set(((32, 32),))
    data.images = torch.full_like(data.images, 63)  # the mean: every logit is 0
    assert not predict(Spy(), data).any()


def test_outside_an_image_is_false() -> None:
    class Everywhere(nn.Module):
        def forward(self, images: Tensor) -> Tensor:
            return torch.ones_like(images)

    data = tiny_set()
    prediction = predict(Everywhere(), data)
    assert prediction.sum((1, 2)).tolist() == [height * width for height, width in SIZES]
    assert all(prediction[index, :height, :width].all() for index, (height, width) in enumerate(SIZES))


def test_last_head_is_used() -> None:
    data = tiny_set()
    assert torch.equal(predict(Spy(heads=4), data), predict(Spy(), data))
    dnanet = build_model("dnanet", output_bias=0.0)  # in training mode, as the trainer hands it over
    _, logits = next(predict_logits(dnanet, data.subset([0])))
    with torch.no_grad():
        expected = dnanet.eval()(normalised(data, 0)[None, None])
    torch.testing.assert_close(logits, expected[:, 0], atol=1e-5, rtol=1e-5)


class Broken(nn.Module):
    def forward(self, images: Tensor) -> Tensor:
        raise RuntimeError("out of memory")


@pytest.mark.parametrize("training", [True, False])
def test_mode_is_restored(training: bool) -> None:
    data = tiny_set()
    model = Spy().train(training)
    predict(model, data)
    assert model.training is training and torch.is_grad_enabled()
    broken = Broken().train(training)
    with pytest.raises(RuntimeError, match="out of memory"):
        predict(broken, data)
    assert broken.training is training

    def fail(_: int) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt) as caught:
        predict(model, data, progress=fail)
    assert model.training is training  # while the traceback still holds the loop's frame
    del caught
    parts = predict_logits(model, data)
    next(parts)
    parts.close()
    assert model.training is training


# ---- out of memory --------------------------------------------------------------------------------------------------


class Limited(nn.Module):
    """Logits of a threshold, with memory for some images only."""

    def __init__(self, most: int) -> None:
        super().__init__()
        self.most, self.counts = most, []

    def forward(self, images: Tensor) -> Tensor:
        self.counts.append(len(images))
        if len(images) > self.most:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 GiB")
        return images


def test_a_batch_that_does_not_fit_is_halved() -> None:
    data = tiny_set(((32, 32),) * 9 + ((40, 40),) * 3)
    limited = Limited(3)
    with pytest.warns(UserWarning) as said:
        masks = predict(limited, data, batch_size=8)
    assert [str(one.message) for one in said] == ["cpu has no memory for 8 images of 32 x 32: predicting 2 at a time"]
    assert limited.counts == [8, 4, 2, 2, 2, 2, 1, 2, 1]  # and it stays at what fits
    assert torch.equal(masks, predict(Spy(), data)) and masks.any()
    seen = [index for chunk, _ in predict_logits(Limited(12), data, batch_size=5) for index in chunk]
    assert seen == list(range(12))


def test_an_image_that_does_not_fit() -> None:
    network = Limited(0).train()
    with pytest.raises(HMGError) as caught:
        predict(network, tiny_set(((40, 33),)))
    assert str(caught.value) == "cpu has no memory for one image of 64 x 64; free some, or use cpu"
    assert network.training


def test_progress_counts_images() -> None:
    counts: list[int] = []
    predict(Spy(), tiny_set(), batch_size=2, progress=counts.append)
    assert sum(counts) == len(SIZES) and max(counts) <= 2


def test_empty_set() -> None:
    data = tiny_set().subset([])
    assert predict(Spy(), data).shape[0] == 0


def test_refusals() -> None:
    data = tiny_set()
    for threshold in (0.0, 1.0, -1.0, math.nan):
        refused(lambda threshold=threshold: predict(Spy(), data, threshold=threshold), "threshold", str(threshold))
    refused(lambda: list(predict_logits(Spy(), data, padding="most")), "'most'", "least, lesps")
