"""Sheets of pictures: images with the outlines of masks drawn over them, and the targets enlarged."""

from __future__ import annotations

import io
import os
from collections.abc import Mapping, Sequence

import numpy as np
import torch
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor

from hmg_gpu.common.files import write_bytes
from hmg_gpu.data.sets import ImageSet
from hmg_gpu.masks.components import connected_components

TRUTH = "ground truth"
COLOURS = {
    TRUTH: (255, 221, 51),
    "initial": (64, 160, 255),
    "pmg": (64, 160, 255),
    "learned": (255, 160, 64),
    "prediction": (255, 96, 96),
    "filtered": (200, 130, 255),
    "hybrid": (96, 232, 96),
}
OTHER_COLOUR = (96, 224, 224)
POINT_COLOUR = (255, 255, 255)
PANEL = 240  # side of a picture on the sheet, pixels
TITLE = 22
GAP = 8
TEXT = (225, 225, 225)
BACKGROUND = (24, 24, 28)
PICKS = ("spread", "worst", "best")


def draw_sheet(
    path: str | os.PathLike,
    data: ImageSet,
    masks: Mapping[str, Tensor],
    indices: Sequence[int],
    *,
    zoom: int = 30,
    whole: bool = True,
) -> None:
    """Write one PNG: a row for each image, with the image, every mask over it, and every mask enlarged.

    Outlines are drawn over the image in one colour for each kind of mask, the colour of its title. The title gives the
    mask's name and, where the set has ground truth, its IoU in that image. The enlarged part is framed in the image: it
    surrounds the target where the last mask has most wrong pixels, or the first point where there is no ground truth.
    Enlargements repeat pixels (nearest); the ground truth's outline lies below that of the mask. Crosses on the
    ground truth (or, without it, on every mask) are points.

    Args:
        path: the PNG, replaced in one step.
        data: the set.
        masks: name -> bool [N, H, W]; the ground truth of the set comes first by itself.
        indices: the images to show, in this order.
        zoom: side of the enlarged part in pixels of the image; a divisor of 240 shows all pixels of one size.
        whole: draw the masks over the whole image, too.
    """
    kinds = {} if data.masks is None else {TRUTH: data.masks}
    kinds |= masks
    columns = 1 + (1 + whole) * len(kinds)
    sheet = Image.new("RGB", (columns * (PANEL + GAP) + GAP, len(indices) * (PANEL + TITLE + GAP) + GAP), BACKGROUND)
    pen = ImageDraw.Draw(sheet)
    font = ImageFont.load_default(13)
    for row, index in enumerate(indices):
        height, width = data.sizes[index].tolist()
        image = data.images[index, :height, :width].float().cpu().numpy()
        points = data.points[data.points[:, 0] == index, 1:].cpu().numpy()
        planes = {name: plane[index, :height, :width].cpu().numpy() for name, plane in kinds.items()}
        window, full = _window(points, planes, height, width, zoom), (0, 0, height, width)
        truth = planes.get(TRUTH)
        panels = [(data.names[index], None, full)]
        for part, suffix in [(full, ""), (window, ", enlarged")] if whole else [(window, "")]:
            for name, plane in planes.items():
                judged = truth is not None and name != TRUTH and not suffix
                iou = f"  IoU {_iou(plane, truth):.1f} %" if judged else ""
                panels.append((name + suffix + iou, name, part))
        for column, (title, name, part) in enumerate(panels):
            left, top = GAP + column * (PANEL + GAP), GAP + row * (PANEL + TITLE + GAP)
            colour = TEXT if name is None else COLOURS.get(name, OTHER_COLOUR)
            pen.text((left, top + 2), _fit(title, font), fill=colour, font=font)
            outlines = [] if name is None else [(planes[name], colour)]
            if part == window and name != TRUTH and truth is not None:
                outlines.insert(0, (truth, COLOURS[TRUTH]))
            pointed = name == TRUTH or (name is not None and truth is None)
            panel = _panel(image, outlines, points if pointed else points[:0], part)
            if name is None:
                _frame(panel, window, full)
            sheet.paste(panel, (left, top + TITLE))
    content = io.BytesIO()
    sheet.save(content, format="PNG")
    write_bytes(path, content.getbuffer())


def pick_examples(data: ImageSet, masks: Tensor, count: int, order: str = "spread") -> list[int]:
    """Images for a sheet by the IoU of a mask in them: the worst, the best, or a spread from the worst to the best.

    Args:
        masks: bool [N, H, W]. Without ground truth the images are spread evenly over the set.
        count: how many images.
        order: one of ``PICKS``.
    """
    ranked = list(range(len(data)))
    if data.masks is not None and (len(data) > count or order != "spread"):
        union = (masks | data.masks).sum((1, 2))
        # Nothing predicted where nothing is counts as right.
        iou = torch.where(union > 0, (masks & data.masks).sum((1, 2)) / union.clamp(min=1), 1)
        ranked = torch.argsort(iou, stable=True, descending=order == "best").tolist()
    if len(ranked) <= count or order != "spread":
        return ranked[:count]
    return [ranked[round(step * (len(ranked) - 1) / max(count - 1, 1))] for step in range(count)]


def _grey(values: np.ndarray) -> np.ndarray:
    """uint8 [h, w]; the 0.5 and 99.8 percentiles become black and white, so that dim scenes are visible."""
    low, high = np.percentile(values, (0.5, 99.8))
    return (np.clip((values - low) / max(high - low, 1e-6), 0, 1) * 255).astype(np.uint8)


def _window(
    points: np.ndarray, planes: Mapping[str, np.ndarray], height: int, width: int, zoom: int
) -> tuple[int, int, int, int]:
    """The square to enlarge: around the target with most errors, the first point, some foreground, or the middle."""
    centre = (height // 2, width // 2)
    masks = [plane for name, plane in planes.items() if name != TRUTH]
    if TRUTH in planes and planes[TRUTH].any():
        mask = masks[-1] if masks else planes[TRUTH]
        centre = _most_wrong(mask, planes[TRUTH])
    elif len(points):
        centre = tuple(points[0])
    else:
        for plane in reversed(masks):
            pixels = np.argwhere(plane)
            if len(pixels):
                centre = tuple(pixels[0])
                break
    side = min(zoom, height, width)
    top = int(np.clip(centre[0] - side // 2, 0, height - side))
    left = int(np.clip(centre[1] - side // 2, 0, width - side))
    return top, left, top + side, left + side


def _most_wrong(mask: np.ndarray, truth: np.ndarray) -> tuple[int, int]:
    """Centre of the component of mask and truth together that holds a target and the most wrong pixels."""
    joint = connected_components(torch.from_numpy(mask | truth)[None])
    pixels, component = joint.pixels.numpy(), joint.component.numpy()
    wrong = np.bincount(component, weights=(mask ^ truth).reshape(-1)[pixels])
    holds = np.bincount(component, weights=truth.reshape(-1)[pixels]) > 0
    y, x = joint.centroids[int(np.where(holds, wrong, -1).argmax())].tolist()
    return round(y), round(x)


def _panel(
    image: np.ndarray,
    outlines: Sequence[tuple[np.ndarray, tuple[int, int, int]]],
    points: np.ndarray,
    part: tuple[int, int, int, int],
) -> Image.Image:
    top, left, bottom, right = part
    scale = PANEL / max(bottom - top, right - left)
    size = (max(1, round((right - left) * scale)), max(1, round((bottom - top) * scale)))
    crop = Image.fromarray(_grey(image[top:bottom, left:right])).resize(size, Image.Resampling.NEAREST)
    panel = Image.new("RGB", (PANEL, PANEL), BACKGROUND)
    panel.paste(crop.convert("RGB"))
    for plane, colour in outlines:
        mask = Image.fromarray(plane[top:bottom, left:right].astype(np.uint8) * 255)
        enlarged = np.asarray(mask.resize(size, Image.Resampling.NEAREST)) > 0
        edge = _outline(enlarged)
        if scale > 3:
            edge |= _outline(enlarged & ~edge)  # two pixels wide where a pixel of the image is large
        panel.paste(colour, (0, 0), Image.fromarray(edge.astype(np.uint8) * 255))
    pen = ImageDraw.Draw(panel)
    for y, x in points:
        if top <= y < bottom and left <= x < right:
            row, column = (y - top + 0.5) * scale, (x - left + 0.5) * scale
            arm = max(3, scale / 2)
            for colour, line in ((BACKGROUND, 3), (POINT_COLOUR, 1)):  # dark edges: targets are bright
                pen.line((column - arm, row, column + arm, row), fill=colour, width=line)
                pen.line((column, row - arm, column, row + arm), fill=colour, width=line)
    return panel


def _frame(panel: Image.Image, window: tuple[int, int, int, int], full: tuple[int, int, int, int]) -> None:
    """Mark the enlarged part in the picture of the whole image."""
    scale = PANEL / max(full[2], full[3])
    top, left, bottom, right = (side * scale for side in window)
    pen = ImageDraw.Draw(panel)
    for margin, colour in ((1, BACKGROUND), (0, POINT_COLOUR)):  # dark around the light: backgrounds are both
        pen.rectangle((left - margin, top - margin, right - 1 + margin, bottom - 1 + margin), outline=colour)


def _fit(title: str, font: ImageFont.FreeTypeFont) -> str:
    """The title, cut where it would run into the next panel."""
    while font.getlength(title) > PANEL:
        title = title.removesuffix("...")[:-1] + "..."
    return title


def _outline(mask: np.ndarray) -> np.ndarray:
    """Pixels of the mask that touch background; those at the panel's edge too."""
    padded = np.pad(mask, 1)
    inner = padded[:-2, 1:-1] & padded[2:, 1:-1] & padded[1:-1, :-2] & padded[1:-1, 2:]
    return mask & ~inner


def _iou(mask: np.ndarray, truth: np.ndarray) -> float:
    union = (mask | truth).sum()
    return 100 * (mask & truth).sum() / union if union else float("nan")
