"""Sheets of pictures: images with the outlines of masks drawn over them, and the targets enlarged."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence

import numpy as np
import torch
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor

from .data.sets import ImageSet
from .files import write_beside

COLOURS = {
    "ground truth": (255, 221, 51),
    "initial": (64, 160, 255),
    "prediction": (255, 96, 96),
    "filtered": (255, 160, 64),
    "hybrid": (96, 232, 96),
}
OTHER_COLOUR = (240, 120, 240)
POINT_COLOUR = (255, 255, 255)
PANEL = 232  # side of a picture on the sheet, pixels
TITLE = 20
GAP = 6


def draw_sheet(
    path: str | os.PathLike,
    data: ImageSet,
    masks: Mapping[str, Tensor],
    indices: Sequence[int],
    *,
    zoom: int = 48,
) -> None:
    """Write one PNG: a row for each image, a column for the image and one for each mask, then the first target enlarged.

    Outlines are drawn over the image in one colour for each kind of mask; the title of a panel gives the mask's name
    and, where the set has ground truth, its IoU in that image. Enlargements repeat pixels (nearest), nothing is blurred.

    Args:
        path: the PNG, replaced in one step.
        data: the set; its points are drawn as crosses.
        masks: name -> bool [N, H, W]; the ground truth of the set comes first by itself.
        indices: the images to show, in this order.
        zoom: side of the enlarged part in pixels of the image.
    """
    kinds = {} if data.masks is None else {"ground truth": data.masks}
    kinds |= masks
    columns = 1 + 2 * len(kinds)
    sheet = Image.new("RGB", (columns * (PANEL + GAP) + GAP, len(indices) * (PANEL + TITLE + GAP) + GAP), (24, 24, 28))
    pen = ImageDraw.Draw(sheet)
    font = ImageFont.load_default(12)
    for row, index in enumerate(indices):
        height, width = data.sizes[index].tolist()
        picture = _grey(data.images[index, :height, :width])
        points = data.points[data.points[:, 0] == index, 1:].cpu().numpy()
        planes = {name: plane[index, :height, :width].cpu().numpy() for name, plane in kinds.items()}
        window = _window(points, planes, height, width, zoom)
        whole = (0, 0, height, width)
        panels = [(data.names[index], None, whole)]
        panels += [(name, name, whole) for name in planes] + [(f"{name}, enlarged", name, window) for name in planes]
        for column, (title, name, part) in enumerate(panels):
            left, top = GAP + column * (PANEL + GAP), GAP + row * (PANEL + TITLE + GAP)
            if name not in (None, "ground truth") and "ground truth" in planes and part == whole:
                title = f"{title}  IoU {_iou(planes[name], planes['ground truth']):.1f} %"
            pen.text((left, top + 2), title[:36], fill=(225, 225, 225), font=font)
            plane = None if name is None else planes[name]
            panel = _panel(picture, plane, points, part, COLOURS.get(name or "", OTHER_COLOUR))
            sheet.paste(panel, (left, top + TITLE))
    with write_beside(path) as temporary:
        sheet.save(temporary)


def pick_examples(data: ImageSet, masks: Tensor, count: int) -> list[int]:
    """Images for a sheet: with ground truth evenly from the worst to the best IoU, otherwise evenly over the set."""
    if data.masks is None or len(data) <= count:
        order = list(range(len(data)))
    else:
        union = (masks | data.masks).sum((1, 2))
        order = torch.argsort((masks & data.masks).sum((1, 2)) / union.clamp(min=1), stable=True).tolist()
    if len(order) <= count:
        return order
    return [order[round(step * (len(order) - 1) / max(count - 1, 1))] for step in range(count)]


def _grey(image: Tensor) -> np.ndarray:
    """uint8 [h, w]; the 0.5 and 99.8 percentiles become black and white, so that dim scenes are visible."""
    values = image.float().cpu().numpy()
    low, high = np.percentile(values, (0.5, 99.8))
    return (np.clip((values - low) / max(high - low, 1e-6), 0, 1) * 255).astype(np.uint8)


def _window(
    points: np.ndarray, planes: Mapping[str, np.ndarray], height: int, width: int, zoom: int
) -> tuple[int, int, int, int]:
    """The square to enlarge: around the first point, or the first foreground pixel, or the middle."""
    centre = (height // 2, width // 2)
    if len(points):
        centre = tuple(points[0])
    else:
        for plane in planes.values():
            found = np.argwhere(plane)
            if len(found):
                centre = tuple(found[0])
                break
    side = min(zoom, height, width)
    top = int(np.clip(centre[0] - side // 2, 0, height - side))
    left = int(np.clip(centre[1] - side // 2, 0, width - side))
    return top, left, top + side, left + side


def _panel(
    picture: np.ndarray,
    plane: np.ndarray | None,
    points: np.ndarray,
    part: tuple[int, int, int, int],
    colour: tuple[int, int, int],
) -> Image.Image:
    top, left, bottom, right = part
    scale = PANEL / max(bottom - top, right - left)
    size = (max(1, round((right - left) * scale)), max(1, round((bottom - top) * scale)))
    crop = Image.fromarray(picture[top:bottom, left:right]).resize(size, Image.Resampling.NEAREST)
    panel = Image.new("RGB", (PANEL, PANEL), (24, 24, 28))
    panel.paste(crop.convert("RGB"))
    if plane is not None:
        mask = Image.fromarray(plane[top:bottom, left:right].astype(np.uint8) * 255)
        enlarged = np.asarray(mask.resize(size, Image.Resampling.NEAREST)) > 0
        outline = Image.fromarray(_outline(enlarged).astype(np.uint8) * 255)
        panel.paste(colour, (0, 0), outline)
    pen = ImageDraw.Draw(panel)
    for y, x in points:
        if plane is None or not (top <= y < bottom and left <= x < right):
            continue
        row, column = (y - top + 0.5) * scale, (x - left + 0.5) * scale
        arm = max(2, scale / 3)
        pen.line((column - arm, row, column + arm, row), fill=POINT_COLOUR)
        pen.line((column, row - arm, column, row + arm), fill=POINT_COLOUR)
    return panel


def _outline(mask: np.ndarray) -> np.ndarray:
    """Pixels of the mask that touch background; those at the panel's edge too."""
    padded = np.pad(mask, 1)
    inner = padded[:-2, 1:-1] & padded[2:, 1:-1] & padded[1:-1, :-2] & padded[1:-1, 2:]
    return mask & ~inner


def _iou(mask: np.ndarray, truth: np.ndarray) -> float:
    union = (mask | truth).sum()
    return 100 * (mask & truth).sum() / union if union else float("nan")
