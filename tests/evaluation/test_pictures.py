"""Sheets of pictures: which images, which part of them, and that enlarging changes no pixel."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from hmg_gpu.data import ImageSet
from hmg_gpu.evaluation.pictures import COLOURS, GAP, PANEL, TITLE, draw_sheet, pick_examples

BLUE, YELLOW = COLOURS["initial"], COLOURS["ground truth"]


def small_set(masks: bool = True) -> ImageSet:
    """Three images of 60 x 60 with a gradient and a target of 4 x 4, the third padded from 40 x 50."""
    images = torch.zeros(3, 60, 60, dtype=torch.uint8)
    images[:] = torch.arange(60, dtype=torch.uint8) * 4
    truth = torch.zeros(3, 60, 60, dtype=torch.bool)
    truth[:, 10:14, 20:24] = True
    points = torch.tensor([(index, 11, 21) for index in range(3)])
    sizes = torch.tensor([(60, 60), (60, 60), (40, 50)])
    return ImageSet(["a", "b", "c"], images, sizes, points, truth if masks else None)


def panels(path: Path) -> list[list[np.ndarray]]:
    """The pictures of a sheet, row by row, without titles and gaps."""
    sheet = np.asarray(Image.open(path))
    rows = (sheet.shape[0] - GAP) // (PANEL + TITLE + GAP)
    columns = (sheet.shape[1] - GAP) // (PANEL + GAP)
    assert sheet.shape == (GAP + rows * (PANEL + TITLE + GAP), GAP + columns * (PANEL + GAP), 3)
    return [
        [
            sheet[GAP + TITLE + r * (PANEL + TITLE + GAP) :][:PANEL, GAP + c * (PANEL + GAP) :][:, :PANEL]
            for c in range(columns)
        ]
        for r in range(rows)
    ]


def is_colour(panel: np.ndarray, colour: tuple[int, int, int]) -> np.ndarray:
    return (panel == colour).all(2)


def test_panels_and_outlines(tmp_path: Path) -> None:
    data = small_set()
    mask = data.masks.clone()
    mask[0] = torch.roll(mask[0], 4, 1)  # right of the target, in one image
    draw_sheet(tmp_path / "s.png", data, {"initial": mask}, [1, 0], zoom=30, whole=False)
    (_, right_truth, right), (_, wrong_truth, wrong) = panels(tmp_path / "s.png")
    # Enlarged 8 times; the window of 30 pixels is centred on target and mask: rows -3..27 held at 0, columns from 7.
    for panel, colour, rows, columns in (
        (right_truth, YELLOW, (80, 112), (104, 136)),
        (right, BLUE, (80, 112), (104, 136)),  # the mask's outline covers that of an equal truth
        (wrong_truth, YELLOW, (80, 112), (88, 120)),
        (wrong, YELLOW, (80, 112), (88, 120)),
        (wrong, BLUE, (80, 112), (120, 152)),
    ):
        ys, xs = np.nonzero(is_colour(panel, colour))
        assert (ys.min(), ys.max() + 1, xs.min(), xs.max() + 1) == (*rows, *columns)
    assert not is_colour(right, YELLOW).any()


def test_enlarging_repeats_pixels(tmp_path: Path) -> None:
    data = small_set(masks=False)
    rng = np.random.default_rng(0)
    data.images = torch.from_numpy(rng.integers(0, 255, (3, 60, 60), dtype=np.uint8))
    data.points = data.points[:0]
    draw_sheet(
        tmp_path / "s.png", data, {"initial": torch.zeros(3, 60, 60, dtype=torch.bool)}, [0], zoom=24, whole=False
    )
    panel = panels(tmp_path / "s.png")[0][1]
    blocks = panel.reshape(24, 10, 24, 10, 3)
    assert (blocks == blocks[:, :1, :, :1]).all()
    values = blocks[:, 0, :, 0, 0].astype(int)
    window = data.images[0, 18:42, 18:42].numpy().astype(int)  # the middle, as nothing else is there
    order = np.argsort(window.ravel(), kind="stable")
    assert (np.diff(values.ravel()[order]) >= 0).all() and len(np.unique(values)) > 100


def test_whole_images_and_padding(tmp_path: Path) -> None:
    data = small_set()
    draw_sheet(tmp_path / "s.png", data, {"initial": data.masks}, [2], zoom=24)
    image, truth, mask, *enlarged = panels(tmp_path / "s.png")[0]
    assert len(enlarged) == 2
    background = (24, 24, 28)
    assert is_colour(image[192:], background).all()  # 40 x 50 pixels, 4.8 times: 192 rows
    assert not is_colour(image[:192], background).all(1).any()
    assert is_colour(truth, YELLOW).any() and is_colour(mask, BLUE).any()


def test_window_surrounds_the_worst_target(tmp_path: Path) -> None:
    """Two targets, the second one missed: that is enlarged. Far false alarms do not draw the window away."""
    data = small_set()
    data.masks[0, 50:54, 50:54] = True
    mask = data.masks.clone()
    mask[0, 50:54, 50:54] = False
    mask[0, 30:40, 0:10] = True
    draw_sheet(tmp_path / "s.png", data, {"initial": mask}, [0], zoom=20, whole=False)
    truth = panels(tmp_path / "s.png")[0][1]
    ys, xs = np.nonzero(is_colour(truth, YELLOW))  # the window is rows and columns 40..59, 12 times
    assert (ys.min(), ys.max() + 1, xs.min(), xs.max() + 1) == (120, 168, 120, 168)


def test_old_sheet_is_replaced_and_failures_leave_it(tmp_path: Path) -> None:
    data = small_set()
    draw_sheet(tmp_path / "s.png", data, {"initial": data.masks}, [0])
    before = (tmp_path / "s.png").read_bytes()
    with pytest.raises(IndexError):
        draw_sheet(tmp_path / "s.png", data, {"initial": data.masks}, [7])
    assert (tmp_path / "s.png").read_bytes() == before and [path.name for path in tmp_path.iterdir()] == ["s.png"]


def test_which_examples() -> None:
    masks = torch.zeros(6, 4, 4, dtype=torch.bool)
    truth = torch.zeros(6, 4, 4, dtype=torch.bool)
    truth[:5, 0] = True
    for index, pixels in enumerate((2, 4, 1, 3, 0)):  # IoU 0.5, 1, 0.25, 0.75, 0; the sixth has nothing at all
        masks[index, 0, :pixels] = True
    data = ImageSet(list("abcdef"), truth.byte(), torch.full((6, 2), 4), torch.zeros(0, 3, dtype=torch.int64), truth)
    assert pick_examples(data, masks, 2, "worst") == [4, 2]
    assert pick_examples(data, masks, 3, "best") == [1, 5, 3]
    assert pick_examples(data, masks, 3) == [4, 0, 5]
    assert pick_examples(data, masks, 9) == [0, 1, 2, 3, 4, 5]
    data.masks = None
    assert pick_examples(data, masks, 3) == [0, 2, 5]
