"""SAM as a maker: with predictors that draw discs, and with tiny random networks of all three generations."""

from __future__ import annotations

import json
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from refusal import refused
from tiny import SIZES, tiny_set
from tiny_sam import GENERATIONS, save_tiny_sam

from hmg_gpu import MaskUpdater
from hmg_gpu.data import ImageSet
from hmg_gpu.masks import Sam, make_maker
from hmg_gpu.masks import sam as models_sam


class Discs:
    """A predictor like that of the package sam2: discs of radius 4, 2 and 0 around a prompt; the second scores best."""

    def __init__(self) -> None:
        self.images: list[np.ndarray] = []
        self.calls: list[int] = []

    def set_image(self, image: np.ndarray) -> None:
        assert image.dtype == np.uint8 and image.ndim == 3 and image.shape[2] == 3
        self.images.append(image)

    def predict(self, point_coords: Any, point_labels: Any, multimask_output: bool) -> tuple[np.ndarray, ...]:
        assert point_coords.shape[1:] == (1, 2) and (point_labels == 1).all() and len(point_coords) == len(point_labels)
        self.calls.append(len(point_coords))
        y, x = np.mgrid[: self.images[-1].shape[0], : self.images[-1].shape[1]] + 0.5  # middles of pixels
        radii = np.array([4, 2, 0] if multimask_output else [3])
        px, py = point_coords[:, 0].T[:, :, None, None, None]
        masks = (y - py) ** 2 + (x - px) ** 2 <= radii[:, None, None] ** 2
        scores = np.tile(np.array([0.2, 0.9, 0.1])[: len(radii)], (len(masks), 1))
        return (masks[0], scores[0], None) if len(masks) == 1 else (masks, scores, None)  # as sam2 does for one


class TorchDiscs(Discs):
    """The same with the face of the package segment-anything: coordinates go through its transform first."""

    transform = SimpleNamespace(apply_coords_torch=lambda points, size: points * 10)

    def predict_torch(self, coordinates: Any, labels: Any, multimask_output: bool) -> tuple[Any, ...]:
        masks, scores, _ = Discs.predict(self, (coordinates / 10).numpy(), labels.numpy(), multimask_output)
        shape = (len(coordinates), -1, *masks.shape[-2:])
        return torch.from_numpy(masks).view(shape), torch.from_numpy(scores).view(shape[:2]), None


def disc(size: tuple[int, int], point: tuple[int, int], radius: int) -> np.ndarray:
    y, x = np.mgrid[: size[0], : size[1]]
    return (y - point[0]) ** 2 + (x - point[1]) ** 2 <= radius**2


def crowded() -> ImageSet:
    """The tiny set with a point in a corner, two that are neighbours, and an image without any."""
    data = tiny_set()
    more = torch.tensor([[0, 0, 0], [1, 20, 10], [1, 20, 11]])
    points = torch.cat((data.points[data.points[:, 0] != 3], more)).unique(dim=0)
    return replace(data, points=points)


# ---- any predictor --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", [Discs, TorchDiscs])
@pytest.mark.parametrize("crop", [0, 8, 64])
@pytest.mark.parametrize(("select", "radius"), [("score", 2), ("smallest", 0), ("single", 3)])
def test_one_prompt_a_target(select: str, radius: int, crop: int, kind: type[Discs]) -> None:
    data, predictor = crowded(), kind()
    masks = Sam(select=select, crop=crop, predictor=predictor).masks(data)
    wanted = torch.zeros_like(masks)
    for image, *point in data.points.tolist():
        height, width = SIZES[image]
        found = disc((height, width), tuple(point), radius)
        if crop:
            found[: max(point[0] - crop // 2, 0)] = found[point[0] + crop // 2 :] = False
            found[:, : max(point[1] - crop // 2, 0)] = found[:, point[1] + crop // 2 :] = False
        wanted[image, :height, :width] |= torch.from_numpy(found)
    assert torch.equal(masks, wanted) and masks.any() and not masks[3].any()
    counts = data.points[:, 0].bincount()
    images = counts[counts > 0].tolist()  # one embedding for each image that has points, or for each point
    assert predictor.calls == ([1] * len(data.points) if crop else images)
    assert len(predictor.images) == len(predictor.calls)
    sizes = {image.shape[:2] for image in predictor.images}
    assert sizes <= set(SIZES) if crop != 8 else all(min(size) >= 4 and max(size) <= 8 for size in sizes)


def test_images_come_as_8_bit_grey() -> None:
    """As they are, or stretched between percentiles."""
    deep = torch.arange(4000.0).view(1, 40, 100) * 16
    deep[0, 0, 0], deep[0, 0, 1] = -9e4, 9e5  # a dead and a hot pixel
    data = ImageSet(["a"], deep, torch.tensor([[40, 100]]), torch.tensor([[0, 4, 4]]))
    predictor = Discs()
    Sam(predictor=predictor).masks(data)
    (image,) = predictor.images
    assert (
        (image == image[:, :, :1]).all() and image[0, 0, 0] == 0 and image[0, 2].max() < 10 and image[-1, -1, 0] == 255
    )
    assert abs(int(image[20, 0, 0]) - 127) <= 2
    for flat in (torch.full((1, 6, 7), 300.0), torch.zeros(1, 6, 7)):
        Sam(predictor=predictor).masks(replace(data, images=flat, sizes=torch.tensor([[6, 7]])))
        assert not predictor.images[-1].any()
    byte = tiny_set()
    Sam(predictor=predictor).masks(byte)
    assert np.array_equal(predictor.images[-1][:, :, 0], byte.images[5, : SIZES[5][0], : SIZES[5][1]].numpy())


def test_order_does_not_matter_and_no_point_is_no_mask() -> None:
    data, maker = crowded(), Sam(predictor=Discs())
    assert torch.equal(maker.masks(replace(data, points=data.points.flip(0))), maker.masks(data))
    none = replace(data, points=data.points[:0])
    assert not maker.masks(none).any() and maker.fit(data).predictor.calls[-1] > 0
    assert torch.equal(maker.probabilities(data), maker.masks(data).float())


# ---- transformers ---------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def transformers() -> Any:
    return pytest.importorskip("transformers", reason="transformers is not installed")


@pytest.fixture(scope="module")
def folders(transformers: Any, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    place = tmp_path_factory.mktemp("sam")
    return {name: save_tiny_sam(transformers, name, place / name) for name in GENERATIONS}


@pytest.mark.parametrize("name", GENERATIONS)
def test_every_generation_gives_masks(name: str, folders: dict[str, Path], monkeypatch: pytest.MonkeyPatch) -> None:
    data = crowded()
    areas = {}
    for select in ("score", "smallest", "single"):
        for crop in (0, 16):
            maker = Sam(str(folders[name]), select, crop).fit(data)
            masks = maker.masks(data)
            assert masks.shape == data.images.shape and masks.any() and not masks[3].any()
            for index, (height, width) in enumerate(SIZES):
                assert not masks[index, height:].any() and not masks[index, :, width:].any()
            assert torch.equal(Sam(str(folders[name]), select, crop).masks(data), masks)  # also unfitted
            areas[select, crop] = int(masks.sum())
    assert areas["smallest", 0] <= areas["score", 0] and len(set(areas.values())) > 2
    found = Sam(str(folders[name])).masks(data)
    monkeypatch.setattr(models_sam, "PROMPTS", 1)  # prompts one by one: the same masks but for rounding
    assert int((Sam(str(folders[name])).masks(data) ^ found).sum()) <= 0.005 * int(found.sum())


def test_sam_sees_what_transformers_own_processor_gives(transformers: Any, folders: dict[str, Path]) -> None:
    """Sizes, padding, coordinates and the way back; the processors resize a little differently."""
    if not hasattr(transformers, "SamImageProcessorPil"):
        pytest.skip("this transformers has no image processor without torchvision")
    segmenter = models_sam.load_sam(folders["sam"])
    processor = transformers.SamImageProcessorPil(
        size={"longest_edge": 64}, pad_size={"height": 64, "width": 64}, mask_size={"longest_edge": 16}
    )
    image = tiny_set().images[1, :40, :33]
    points = torch.tensor([[12.5, 30.5], [20.5, 8.5]])
    inputs = processor(image[:, :, None].expand(-1, -1, 3).numpy(), return_tensors="pt")
    pixels, size = segmenter._prepare(image)
    assert tuple(inputs["reshaped_input_sizes"][0].tolist()) == size == (64, 53)
    assert (pixels - inputs["pixel_values"]).abs().max() < 0.1
    scale = torch.tensor([size[1] / 33, size[0] / 40])
    with torch.no_grad():
        found = segmenter.model(pixel_values=inputs["pixel_values"], input_points=(points * scale)[None, :, None])
    (theirs,) = processor.post_process_masks(
        found.pred_masks, inputs["original_sizes"], inputs["reshaped_input_sizes"], pad_size={"height": 64, "width": 64}
    )
    masks, scores = segmenter.segment(image, points, True)
    assert masks.shape == theirs.shape == (2, 3, 40, 33) and torch.allclose(scores, found.iou_scores[0], atol=1e-3)
    assert int((masks ^ theirs).sum()) <= 0.01 * masks.numel() and masks.any() and not masks.all()


@pytest.mark.parametrize("name", GENERATIONS)
def test_weights_that_do_not_fit_are_refused(name: str, folders: dict[str, Path], tmp_path: Path) -> None:
    other = {"sam": "sam2", "sam2": "sam3_tracker", "sam3_tracker": "sam"}[name]
    wrong = tmp_path / "wrong"
    wrong.mkdir()
    (wrong / "config.json").write_bytes((folders[name] / "config.json").read_bytes())
    weights = wrong / "model.safetensors"
    refused(lambda: Sam(str(wrong)).fit(tiny_set()), str(wrong), "cannot be read as")
    weights.write_bytes((folders[other] / "model.safetensors").read_bytes())
    refused(lambda: Sam(str(wrong)).fit(tiny_set()), str(wrong), "do not fit")
    weights.write_bytes(b"no weights")
    refused(lambda: Sam(str(wrong)).fit(tiny_set()), str(wrong), "cannot be read as")


def test_through_the_updater(folders: dict[str, Path]) -> None:
    data = tiny_set()
    maker = make_maker(f"sam:{folders['sam']},select=smallest,crop=16")
    updater = MaskUpdater(data, maker)
    assert torch.equal(updater.initial, maker.masks(data)) and updater.initial.any()
    assert updater.maker.about() == maker.about()


# ---- what is refused ------------------------------------------------------------------------------------------------


def test_text_and_about() -> None:
    for text, maker in {
        "sam:a": Sam("a"),
        "sam:a,b=c/d": Sam("a,b=c/d"),
        "sam:a,select=single": Sam("a", "single"),
        "sam:a,b,crop=64, select = smallest ": Sam("a,b", "smallest", 64),
    }.items():
        made = make_maker(text, seed=3)
        assert made == maker and json.loads(json.dumps(made.about())) == made.about()
    assert Sam("a", crop=8).about() == {"maker": "sam", "path": "a", "select": "score", "crop": 8}
    assert Sam(predictor=Discs()).about()["predictor"] == "Discs" and "Discs" in str(Sam(predictor=Discs()))
    assert Sam("a").change("crop", 9) == Sam("a", crop=9) and "\n" not in str(Sam("a"))


def test_bad_text_is_refused_on_one_line() -> None:
    for text, parts in {
        "sam": ("sam:PATH",),
        "sam:": ("sam:PATH",),
        "sam:crop=64": ("sam:PATH",),
        "sam:a,select=best": ("select = 'best'", "score, smallest, single"),
        "sam:a,crop=x": ("crop = 'x'", "a whole number"),
        "sam:a,crop=-1": ("crop = -1", "at least 0"),
        "sam:a,crop=3": ("crop = 3", "0 or at least 8"),
    }.items():
        refused(lambda text=text: make_maker(text), *parts)
    refused(lambda: Sam(predictor=object()).fit(tiny_set()), "set_image", "object has not")
    refused(lambda: Sam(predictor=SimpleNamespace(set_image=None)).fit(tiny_set()), "predict_torch")


def test_bad_folders_are_refused_on_one_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    data = tiny_set()
    refused(lambda: Sam(str(tmp_path / "none")).fit(data), "none: no such folder")
    refused(lambda: Sam(str(tmp_path)).fit(data), "config.json", "no model_type")
    for text, parts in {
        "{": ("no model_type",),
        "[]": ("no model_type",),
        "{}": ("no model_type",),
        '{"model_type": "bert"}': ("model_type 'bert'", "sam2_video"),
    }.items():
        (tmp_path / "config.json").write_text(text)
        refused(lambda: Sam(str(tmp_path)).fit(data), str(tmp_path), *parts)
    (tmp_path / "config.json").write_text('{"model_type": "sam"}')
    monkeypatch.setitem(sys.modules, "transformers", None)
    refused(lambda: Sam(str(tmp_path)).fit(data), "transformers is missing", "hmg-gpu[sam]")
    monkeypatch.setitem(sys.modules, "transformers", SimpleNamespace(__version__="1.0"))
    refused(lambda: Sam(str(tmp_path)).fit(data), "transformers 1.0 has no SamModel")


def test_transformers_is_not_imported_with_the_library() -> None:
    code = "import sys, hmg_gpu, hmg_gpu.masks, hmg_gpu.commands.main; sys.exit('transformers' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
