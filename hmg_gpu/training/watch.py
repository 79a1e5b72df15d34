"""What a run says in plain words while it goes on: a network that does not learn, labels that go wrong."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from hmg_gpu.data.sets import ImageSet
from hmg_gpu.training.settings import Settings

LARGE = 0.05  # share of an image; targets cover at most a tenth of it in NUAA-SIRST and NUDT-SIRST
LOST = 0.1  # share of the points from which on labels are said to collapse
EVEN = 0.5  # points of IoU below which masks that got worse are called even
CURE = "train longer, or try --output-bias -4, --loss image, a lower --learning-rate; look at the sheets"


def diagnose(row: Mapping[str, Any]) -> dict[str, str]:
    """Why a network does not seem to learn, by a row of the log: kind -> words."""
    findings = {
        "flat": (row["loss"] > 0.97, f"the loss is still {row['loss']:.3f} after a tenth of the epochs"),
        "empty": (row["foreground"] == 0, "the network predicts background everywhere"),
        "full": (row["foreground"] > 0.5, "the network predicts foreground nearly everywhere"),
    }
    return {kind: f"{words}. If it stays so: {CURE}." for kind, (applies, words) in findings.items() if applies}


def watch_labels(data: ImageSet, before: Tensor, after: Tensor) -> tuple[str, str | None]:
    """What an update of the labels did, and a warning where it looks wrong.

    Args:
        data: the set.
        before, after: bool [N, H, W], the masks.

    Returns:
        A line for every update: pixels that changed, points that lost their mask, images whose mask covers more than
        5 %; and a warning, or None.

    Example:
        >>> from hmg_gpu.data.synthetic import make_split
        >>> scenes = make_split("train", count=2, size=64)
        >>> watch_labels(scenes, scenes.masks, scenes.masks)
        ('0 pixels of the masks changed, 0 points lost their mask, 0 images are covered by more than 5 %', None)
    """
    image, y, x = data.points.unbind(1)
    lost = before[image, y, x] & ~after[image, y, x]
    area = data.sizes.prod(1)
    share = after.sum((1, 2)) / area
    grown = (share > LARGE) & (before.sum((1, 2)) <= LARGE * area)
    counts = torch.stack([(before ^ after).sum(), lost.sum(), (share > LARGE).sum(), grown.sum()]).tolist()
    changed, lost_points, large, newly = counts
    line = f"{changed} pixels of the masks changed, {lost_points} points lost their mask, "
    line += f"{large} images are covered by more than {100 * LARGE:g} %"
    warnings = []
    if lost_points > LOST * max(1, len(data.points)):
        warnings.append(f"{lost_points} of {len(data.points)} points lost their mask in one update")
    if newly:
        name = data.names[int(grown.nonzero()[0, 0])]
        warnings.append(f"the masks of {newly} images grew past {100 * LARGE:g} % of the image, first {name}")
    if not warnings:
        return line, None
    cure = "the network may not be ready to correct masks: give it more epochs before, or update less often"
    return line, f"{'; '.join(warnings)}. If it stays so, {cure}."


def verdict(results: Mapping[str, Any], settings: Settings) -> str | None:
    """What a finished run says of its masks where they are worse than those that it began with, and what may help."""
    masks = results.get("masks", {})
    if not masks or not masks["hybrid"]["iou"] < masks["initial"]["iou"]:
        return None
    first, last = (100 * masks[name]["iou"] for name in ("initial", "hybrid"))
    if first - last < EVEN:
        return f"the correction gained nothing here: IoU {last:.2f} % after {first:.2f} %"
    cures = [] if settings.rule == "soft" else ["--rule soft"]
    cures += [] if settings.model.startswith("unet") else ["--model unet"]
    cures.append("more epochs")
    return (
        f"the corrected masks are worse than the initial ones: IoU {last:.2f} % after {first:.2f} %; the network is "
        f"too coarse or too little trained to correct them: try {' or '.join(cures)}"
    )
