"""A trained network and how it is run."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from hmg_gpu.common.errors import InputError
from hmg_gpu.data import NORMALISATION, ImageSet
from hmg_gpu.models.predict import predict
from hmg_gpu.models.views import Views
from hmg_gpu.models.weights import load_model


@dataclass
class Network:
    """A trained network and how it is run."""

    model: nn.Module
    inference: dict[str, Any]  # mean, std, padding: arguments of predict_logits
    threshold: float
    path: str
    trained: dict[str, Any]  # what its checkpoint says about itself; empty for published weights

    def predict(self, data: ImageSet, progress: Callable[[int], None] | None = None) -> Tensor:
        """Masks of a set: bool [N, H, W]."""
        return predict(self.model, data, threshold=self.threshold, progress=progress, **self.inference)

    def predict_probabilities(self, data: ImageSet, progress: Callable[[int], None] | None = None) -> Tensor:
        """Probabilities of a set: float32 [N, H, W], 0 in the padding."""
        return predict(self.model, data, soft=True, progress=progress, **self.inference)

    @property
    def normalisation(self) -> tuple[float, float]:
        """(mean, std) of the images that it was trained on."""
        return self.inference["mean"], self.inference["std"]

    @property
    def title(self) -> str:
        """The class of the network itself."""
        return type(self.model.model if isinstance(self.model, Views) else self.model).__name__

    @property
    def views(self) -> int:
        """Over how many views of an image predictions are averaged."""
        return self.model.count if isinstance(self.model, Views) else 1

    def about(self) -> dict[str, Any]:
        """What a result says about the network that it comes from."""
        trained = {key: self.trained.get(key) for key in ("dataset", "settings", "stage", "epoch", "versions")}
        return {
            "checkpoint": self.path,
            "model": self.title,
            "views": self.views,
            "threshold": self.threshold,
            "normalisation": list(self.normalisation),
            "padding": self.inference["padding"],
            "trained": trained if self.trained else "not stated in the file",
        }


def load_network(
    path: str | Path,
    own: Callable[[], tuple[float, float]],
    *,
    normalisation: str = "auto",
    padding: str = "least",
    threshold: float = 0.5,
    device: str | torch.device = "cpu",
    model: str | None = None,
    views: int = 1,
) -> Network:
    """A network from a weights file, ready to run.

    Args:
        path: our checkpoint or published weights.
        own: gives (mean, std) of the images, asked for only where the checkpoint has none.
        normalisation: "auto", the name of a data set, or "MEAN,STD".
        padding: "least", or "lesps" for weights trained with LESPS.
        threshold: probability above which a pixel is target.
        model: the network's name; None: as the file says, see :func:`hmg_gpu.models.weights.load_model`.
        views: mirrored views over which predictions are averaged, see :class:`hmg_gpu.models.views.Views`.
    """
    if not 0 < threshold < 1:
        raise InputError(f"threshold {threshold}: expected a probability between 0 and 1")
    network, description = load_model(path, model)
    mean, std = choose_normalisation(normalisation, description, own)
    inference = {"mean": mean, "std": std, "padding": padding}
    network = Views(network, views) if views != 1 else network
    return Network(network.to(device), inference, threshold, str(path), description)


def choose_normalisation(
    choice: str, description: Mapping[str, Any], own: Callable[[], tuple[float, float]]
) -> tuple[float, float]:
    """(mean, std) for a network: "auto": the checkpoint's, else the images' own; others by name or "MEAN,STD"."""
    if choice == "auto":
        mean, std = description.get("normalisation") or own()
        return float(mean), float(std)
    if choice in NORMALISATION:
        return NORMALISATION[choice]
    try:
        mean, std = map(float, choice.split(","))
        if math.isfinite(mean) and math.isfinite(std) and std > 0:
            return mean, std
    except ValueError:
        pass
    raise InputError(f"--normalisation {choice}: expected auto, {', '.join(NORMALISATION)}, or MEAN,STD such as 100,30")
