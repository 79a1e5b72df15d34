"""eval.py: what it measures, against loops; that its results carry what they must; that bad input is refused."""

from __future__ import annotations

import importlib.util
import json
import math
import shlex
from collections.abc import Iterator
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import numpy as np
import pytest
import reference
import torch
from PIL import Image
from refusal import refused
from scipy import ndimage
from tiny import tiny_set
from torch import nn

import eval as script
from hmg_gpu import point_to_mask, point_to_probability, soft_update, update
from hmg_gpu.commands.inputs import open_images
from hmg_gpu.common.tensors import valid_area
from hmg_gpu.data import ImageSet, load_folder, read_mask, store, write_mask, write_store
from hmg_gpu.data.synthetic import make_split
from hmg_gpu.evaluation import masks as evaluation
from hmg_gpu.evaluation.detector import measure_detector
from hmg_gpu.evaluation.losses import lost_pixels
from hmg_gpu.evaluation.metrics import measure
from hmg_gpu.evaluation.paper import Report, paper_numbers, paper_points, sort_checkpoints
from hmg_gpu.evaluation.size_classes import joined_targets, size_classes, size_classes_of
from hmg_gpu.masks import MAKERS, Folder, Maker, Pmg, Soft, Union
from hmg_gpu.models import build_model
from hmg_gpu.models.checkpoints import save_checkpoint
from hmg_gpu.models.network import Network, choose_normalisation, load_network
from hmg_gpu.models.predict import predict
from hmg_gpu.training.settings import Settings

NUMBERS = (12, 3, 0.15)  # L_ep, L_dp, alpha
PMG = Pmg(*NUMBERS)
PAPER = Pmg(extent=25)
EIGHT = np.ones((3, 3))


class Brightness(nn.Module):
    """A detector without weights: its logit is the normalised intensity."""

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        return 3 * images - 2


def network(data: ImageSet, threshold: float = 0.5) -> Network:
    inference = {"mean": data.mean, "std": data.std, "padding": "least"}
    return Network(Brightness(), inference, threshold, "brightness", {})


def scenes(count: int = 24, points: str = "masks_centroid") -> ImageSet:
    """Synthetic scenes of 64 x 64, some padded (their last rows and columns are cut off), some with tiny targets."""
    data = make_split("train", points=points, count=count, size=64)
    sizes = data.sizes.clone()
    sizes[::3] = torch.tensor([50, 57])
    inside = (data.points[:, 1:] < sizes[data.points[:, 0]]).all(1)
    masks = data.masks.clone()
    masks[1::4] = False
    for image, y, x in data.points.tolist():
        if image % 4 == 1:  # Point targets of up to 9 pixels
            masks[image, max(y - 1, 0) : y + 2, max(x - 1, 0) : x + 2] = True
    for index, (height, width) in enumerate(sizes.tolist()):
        masks[index, height:] = False
        masks[index, :, width:] = False
    return ImageSet(
        data.names, data.images, sizes, data.points[inside], masks, data.mean, data.std, "scenes", data.split
    )


def each_image(data: ImageSet) -> Iterator[tuple[int, np.ndarray, np.ndarray, list[tuple[int, int]]]]:
    """Index, intensities, ground truth and points of one image after the other, without padding."""
    for index, (height, width) in enumerate(data.sizes.tolist()):
        points = [(y, x) for image, y, x in data.points.tolist() if image == index]
        yield index, data.images[index, :height, :width].numpy(), data.masks[index, :height, :width].numpy(), points


# ---- by target size -------------------------------------------------------------------------------------------------


def size_class(area: int) -> str:
    return "Point" if area <= 9 else "Spot" if area <= 81 else "Extended"


def loop_size_classes(data: ImageSet) -> dict[str, list[int]]:
    """The definition, target by target: [targets, intersection, union] of each class."""
    totals = {name: [0, 0, 0] for name in ("Point", "Spot", "Extended")}
    for _, image, truth, points in each_image(data):
        labels, count = ndimage.label(truth, EIGHT)
        centres = ndimage.center_of_mass(truth, labels, range(1, count + 1))
        owners: dict[int, list[tuple[float, tuple[int, int]]]] = {}
        for y, x in points:
            distances = [math.hypot(y - cy, x - cx) for cy, cx in centres]
            label = labels[y, x] or (1 + int(np.argmin(distances)) if count else 0)
            if label:
                owners.setdefault(label, []).append((distances[label - 1], (y, x)))
        for label in range(1, count + 1):
            target = labels == label
            mask = np.zeros_like(truth)
            if label in owners:
                mask = reference.point_to_mask(image.astype(np.float32), [min(owners[label])[1]], *NUMBERS)
            row = totals[size_class(int(target.sum()))]
            row[0] += 1
            row[1] += int((mask & target).sum())
            row[2] += int((mask | target).sum())
    return totals


@pytest.mark.parametrize("case", ["labels", "coarse", "off target", "two points", "no point", "at the border", "none"])
def test_size_classes(case: str) -> None:
    data = scenes(points="masks_coarse" if case == "coarse" else "masks_centroid")
    if case == "off target":  # the nearest target owns the point, in its own image only
        data.points[:, 1:] = (data.points[:, 1:] - 6).clamp(min=0)
    elif case == "two points":  # the one closer to the centroid counts
        data.points = torch.cat((data.points + torch.tensor([0, -1, 0]), data.points)).clamp(min=0)
    elif case == "no point":  # an empty mask
        data.points = data.points[1::2]
    elif case == "at the border":
        data.points[:, 1] = 0
    elif case == "none":
        data.points = data.points[:0]
    found = size_classes(data, PMG)
    expected = loop_size_classes(data)
    assert {k: [v["targets"], v["intersection"], v["union"]] for k, v in found.items()} == expected
    assert sum(row[0] for row in expected.values()) > 10 and expected["Point"][0] and expected["Spot"][0]
    for value in found.values():
        ratio = value["intersection"] / value["union"] if value["union"] else math.nan
        assert value["iou"] == pytest.approx(ratio, nan_ok=True)


def test_size_classes_of_any_mask() -> None:
    data = scenes()
    masks = PMG.masks(data) | (data.images > 170)
    totals = {name: [0, 0] for name in ("Point", "Spot", "Extended")}
    for index, image, truth, _ in each_image(data):
        mask = masks[index, : image.shape[0], : image.shape[1]].numpy()
        labels, _ = ndimage.label(truth, EIGHT)
        found, _ = ndimage.label(mask, EIGHT)
        for label in range(1, labels.max() + 1):
            target = labels == label
            touching = np.isin(found, np.unique(found[target & mask])) & mask
            row = totals[size_class(int(target.sum()))]
            row[0] += int((touching & target).sum())
            row[1] += int((touching | target).sum())
    result = size_classes_of(masks, data)
    assert {name: [part["intersection"], part["union"]] for name, part in result.items()} == totals


def test_joined_targets() -> None:
    """Two targets one pixel apart under one mask component; beside it the same targets under two."""
    truth = torch.zeros(3, 8, 8, dtype=torch.bool)
    truth[:, 2, 1], truth[:, 2, 4:6] = True, True
    masks = truth.clone()
    masks[1, 2, 1:6] = True
    data = ImageSet(list("abc"), truth.byte(), torch.full((3, 2), 8), torch.zeros(0, 3, dtype=torch.int64), truth)
    assert joined_targets(masks, data) == [1]
    assert joined_targets(torch.zeros_like(masks), data) == []


def test_global_mask_is_the_global_map_alone() -> None:
    data = scenes()
    result = PMG.ablations()["P_g only"].masks(data)
    for index, image, _, points in each_image(data):
        image = image.astype(np.float32)
        expected = np.zeros(image.shape, bool)
        for point in points:
            y0, x0, y1, x1 = reference.point_to_box(image, point, 12, 3)
            box = image[y0:y1, x0:x1]
            expected[y0:y1, x0:x1] |= reference.part_probability(box, float(image[point]), 0.15) >= 0.5
        assert np.array_equal(result[index, : image.shape[0], : image.shape[1]].numpy(), expected)
        assert not result[index, image.shape[0] :].any() and not result[index, :, image.shape[1] :].any()
    assert not torch.equal(result, PMG.masks(data))


# ---- networks, sweeps, detectors ------------------------------------------------------------------------------------


def test_updating_masks_are_the_process() -> None:
    data = scenes()
    masks = evaluation.collect_masks(data, [PMG], network(data), Union(radius=5))
    initial = point_to_mask(data.images, data.points, extent=12, half_width=3, alpha=0.15, sizes=data.sizes)
    assert list(masks) == ["pmg", "prediction", "filtered", "hybrid"]
    assert torch.equal(masks["pmg"], initial)
    assert torch.equal(masks["prediction"], predict(Brightness(), data))
    assert torch.equal(masks["hybrid"], update(masks["prediction"], initial, data.points, radius=5, sizes=data.sizes))
    assert masks["filtered"].sum() < masks["prediction"].sum()


def test_detector_at_every_threshold() -> None:
    data = scenes()
    initial = PMG.masks(data)
    thresholds = [0.2, 0.5, 0.9]
    for prompt in (None, PMG):
        curve = measure_detector(network(data), data, thresholds, maker=prompt, rule=Union(radius=8))
        for row, threshold in zip(curve, thresholds, strict=True):
            masks = predict(Brightness(), data, threshold=threshold)
            if prompt is not None:
                masks = update(masks, initial, data.points, radius=8, sizes=data.sizes)
            expected = measure(masks, data)
            assert row["threshold"] == threshold
            assert {key: row[key] for key in expected} == pytest.approx(expected, rel=1e-12)
            assert row["precision"] == pytest.approx(float((masks & data.masks).sum() / masks.sum()))
            assert row["recall"] == pytest.approx(float((masks & data.masks).sum() / data.masks.sum()))
            lost = lost_pixels(masks, data.masks, data.sizes) / expected["union"]
            assert [*row["lost"].values()] == pytest.approx(lost.tolist(), rel=1e-6)
            assert sum(row["lost"].values()) == pytest.approx(1 - row["iou"], rel=1e-12)
    refused(lambda: measure_detector(network(data), data, [0.5, 1.0]), "thresholds", "between 0 and 1")


@pytest.mark.parametrize("radius", [8, 30])
def test_the_soft_rule_at_every_threshold(radius: int) -> None:
    """The point prompt by probabilities, against the library's function on the whole set."""
    data = scenes()
    soft = point_to_probability(data.images, data.points, extent=12, half_width=3, alpha=0.15, sizes=data.sizes)
    probability = predict(Brightness(), data, soft=True)
    thresholds = [0.3, 0.5, 0.8]
    curve = measure_detector(network(data), data, thresholds, maker=PMG, rule=Soft(radius=radius, weight=0.6))
    for row, threshold in zip(curve, thresholds, strict=True):
        settings = {"radius": radius, "weight": 0.6, "threshold": threshold, "sizes": data.sizes}
        expected = measure(soft_update(probability, soft, data.points, **settings), data)
        assert {key: row[key] for key in expected} == pytest.approx(expected, rel=1e-12)


def test_sweep_rows_are_single_measurements() -> None:
    data = scenes()
    rows = evaluation.sweep_maker(data, "alpha", [0, 0.5], PMG)
    for row in rows:
        maker = replace(PMG, alpha=row["alpha"])
        assert row["iou"] == measure(maker.masks(data), data)["iou"]
        assert row["sizes"] == size_classes(data, maker)
    assert rows[0]["iou"] != rows[1]["iou"]
    prediction = predict(Brightness(), data)
    evidence = evaluation.evidence_of(network(data), data, PMG, Union())
    assert torch.equal(evidence.prediction, prediction) and torch.equal(evidence.initial, PMG.masks(data))
    rows = evaluation.sweep_rule(data, "radius", [0, 2, 1000], Union(), evidence)
    assert rows[2]["iou"] == measure(prediction, data)["iou"]  # nothing is that far away
    assert rows[0]["intersection"] < rows[1]["intersection"] < rows[2]["intersection"]
    assert rows[0]["hybrid"]["intersection"] >= measure(PMG.masks(data), data)["intersection"]
    for row in rows:
        hybrid = update(prediction, PMG.masks(data), data.points, radius=row["radius"], sizes=data.sizes)
        assert row["hybrid"] == measure(hybrid, data)


def test_a_sweep_over_a_setting_of_the_soft_rule() -> None:
    data = scenes()
    soft = point_to_probability(data.images, data.points, extent=12, half_width=3, alpha=0.15, sizes=data.sizes)
    probability = predict(Brightness(), data, soft=True)
    evidence = evaluation.evidence_of(network(data), data, PMG, Soft())
    assert torch.equal(evidence.probability, probability) and torch.equal(evidence.initial_probability, soft)
    rows = evaluation.sweep_rule(data, "weight", [0.2, 1], Soft(radius=8), evidence)
    for row in rows:
        settings = {"radius": 8, "weight": float(row["weight"]), "sizes": data.sizes}
        assert row["hybrid"] == measure(soft_update(probability, soft, data.points, **settings), data)
    assert rows[0]["hybrid"]["iou"] != rows[1]["hybrid"]["iou"] and rows[0]["iou"] == rows[1]["iou"]


def test_values_of_a_sweep() -> None:
    check = evaluation.check_values
    assert check(PMG, "extent", [10.0, 5, 10]) == [5, 10]
    assert all(type(value) is int for value in check(PMG, "extent", [10.0, 5, 10]))
    assert check(Soft(), "weight", [1, 0.5]) == [0.5, 1] and check(PMG, "alpha", [0, 0.5]) == [0, 0.5]
    refused(lambda: check(PMG, "extent", [0, 5]), "extent", "at least 1")
    refused(lambda: check(PMG, "half_width", [1.5]), "half_width", "expected int")
    refused(lambda: check(PMG, "alpha", [0, 1.5]), "alpha", "0 to 1")
    for value in (math.nan, math.inf, -math.inf):
        refused(lambda value=value: check(PMG, "alpha", [value]), "alpha", "0 to 1")
        refused(lambda value=value: check(PMG, "extent", [value]), "extent", "expected int")
    refused(lambda: check(PMG, "radius", [3]), "pmg has no setting radius", "extent, half_width, alpha")
    refused(lambda: check(Folder("masks"), "extent", [3]), "folder has no setting extent", "it has none")
    refused(lambda: check(Union(), "weight", [0.5]), "union has no setting weight", "it has radius")


def test_a_row_of_each_maker() -> None:
    """Labels, ablations and sizes: of its own points where a maker knows them, else of what touches the targets."""

    @dataclass(frozen=True)
    class Everything(Maker):
        name = "everything"

        def masks(self, data: ImageSet) -> torch.Tensor:
            return valid_area(data.sizes, data.images)

    data = scenes()
    makers = [PMG, Everything()]
    masks = evaluation.collect_masks(data, makers)
    rows = evaluation.measure_masks(data, masks, makers)
    assert list(rows) == ["pmg", "P_g only", "everything"]
    assert rows["pmg"]["sizes"] == size_classes(data, PMG)
    alone = PMG.ablations()["P_g only"]
    assert rows["P_g only"]["sizes"] == size_classes(data, alone)
    assert rows["P_g only"]["iou"] == measure(alone.masks(data), data)["iou"]
    assert rows["everything"]["sizes"] == size_classes_of(masks["everything"], data)
    last = evaluation.collect_masks(data, makers[::-1], network(data))  # corrections start from the last one
    assert list(last) == ["everything", "pmg", "prediction", "filtered", "hybrid"]
    assert torch.equal(last["hybrid"], update(last["prediction"], last["pmg"], data.points, sizes=data.sizes))
    pointless = replace(data, points=data.points[:0])
    assert list(evaluation.collect_masks(pointless, makers, network(data))) == ["prediction"]
    refused(lambda: evaluation.collect_masks(pointless, makers), "no mask to look at", "--points", "--checkpoint")


def test_normalisation() -> None:
    def own() -> tuple[float, float]:
        return 5.0, 2.0

    choose = choose_normalisation
    assert choose("auto", {"normalisation": [100, 30]}, own) == (100.0, 30.0)
    assert choose("auto", {}, own) == (5.0, 2.0)
    assert choose("SIRST3", {"normalisation": [100, 30]}, own) == (95.010, 41.511)
    assert choose("90.5,20", {}, own) == (90.5, 20.0)
    for wrong in ("SIRST4", "90", "90,0", "90,nan"):
        refused(lambda wrong=wrong: choose(wrong, {}, own), wrong, "MEAN,STD")


# ---- the commands ---------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A store of a few scenes under the name of a real set, and checkpoints of untrained networks on it."""
    root = tmp_path_factory.mktemp("eval")
    sets = [make_split(split, count=10, size=64) for split in ("train", "test")]
    for one in sets:
        one.dataset = "NUAA-SIRST"
    coarse = [make_split(split, count=10, size=64, points="masks_coarse").points for split in ("train", "test")]
    kinds = [{"masks_centroid": one.points, "masks_coarse": other} for one, other in zip(sets, coarse, strict=True)]
    store._write(root / "set.h5", zip(sets, kinds, strict=True))
    for name, stage, points in (
        ("stage1", 1, "centroid"),
        ("stage2", 2, "centroid"),
        ("coarse1", 1, "coarse"),
        ("coarse", 2, "coarse"),
    ):
        torch.manual_seed(stage)
        weights = build_model("acm", output_bias=-0.5).state_dict()
        settings = Settings(data="set.h5", points=f"masks_{points}")
        save_checkpoint(
            root / f"{name}.safetensors",
            {"model." + key: value for key, value in weights.items()},
            {
                "settings": vars(settings),
                "dataset": "NUAA-SIRST",
                "normalisation": [88.69, 11.91],
                "stage": stage,
                "epoch": 0,
                "step": 0,
                "results": {},
                "warned": [],
                "versions": {},
            },
        )
    return root


def run(*arguments: str | Path) -> int:
    return script.main([str(argument) for argument in arguments])


def result(path: Path) -> dict:
    content = json.loads(path.read_text())
    assert content["versions"]["hmg_gpu"] and content["versions"]["torch"] == torch.__version__
    assert content["seed"] == 0 and content["rule"] == Union().about()
    assert all(maker["maker"] in MAKERS for maker in content["masks"])
    return content


def test_masks_command(folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    checkpoint = ("--checkpoint", folder / "stage1.safetensors")
    assert run("masks", "--data", folder / "set.h5", *checkpoint, "--out", tmp_path) == 0
    found = result(tmp_path / "masks.json")
    assert list(found["rows"]) == ["pmg", "P_g only", "prediction", "filtered", "hybrid"]
    data = make_split("train", count=10, size=64)
    expected = measure(PAPER.masks(data), data)
    assert {key: found["rows"]["pmg"][key] for key in expected} == expected
    assert found["masks"] == [PAPER.about()] and PAPER.about()["alpha"] == 0.15
    assert found["network"]["normalisation"] == [88.69, 11.91] and found["network"]["trained"]["stage"] == 1
    assert (found["dataset"], found["split"], found["images"]) == ("NUAA-SIRST", "train", 10)
    assert f"{100 * expected['iou']:.2f}" in capsys.readouterr().out

    # masks made elsewhere
    for name, size, mask in zip(data.names, data.sizes.tolist(), data.masks, strict=True):
        write_mask(tmp_path / "mine" / f"{name}.png", mask[: size[0], : size[1]])
    assert (
        run("masks", "--data", folder / "set.h5", "--masks", "pmg", f"folder:{tmp_path / 'mine'}", "--out", tmp_path)
        == 0
    )
    found = result(tmp_path / "masks.json")
    assert list(found["rows"]) == ["pmg", "P_g only", "mine"] and found["rows"]["mine"]["iou"] == 1.0
    assert found["masks"] == [PAPER.about(), Folder(str(tmp_path / "mine")).about()]
    capsys.readouterr()
    missing = ("masks", "--data", folder / "set.h5", "--masks", f"folder:{tmp_path / 'none'}", "--out", tmp_path)
    assert run(*missing) == 2
    assert f"{tmp_path / 'none'}: no such folder" in capsys.readouterr().err
    (tmp_path / "mine" / f"{data.names[0]}.png").unlink()
    assert run("masks", "--data", folder / "set.h5", "--masks", f"folder:{tmp_path / 'mine'}", "--out", tmp_path) == 2
    assert f"{data.names[0]}.png" in capsys.readouterr().err


@pytest.mark.parametrize("prompt", [False, True])
def test_detector_command(folder: Path, tmp_path: Path, prompt: bool) -> None:
    more = ("--point-prompt",) if prompt else ()
    weights = folder / "stage2.safetensors"
    assert run("detector", "--data", folder / "set.h5", "--checkpoint", weights, *more, "--out", tmp_path) == 0
    found = result(tmp_path / "detector.json")
    data = make_split("test", count=10, size=64)
    model = load_network(weights, lambda: (0, 0)).model
    masks = predict(model, data, mean=88.69, std=11.91)
    if prompt:
        masks = update(masks, PAPER.masks(data), data.points)
    expected = measure(masks, data)
    assert {key: found["result"][key] for key in expected} == expected
    assert found["output"] == ("prompted" if prompt else "network") and len(found["curve"]) > 20
    assert Image.open(tmp_path / "detector.png").size[0] > 1000


def test_sweep_command(folder: Path, tmp_path: Path) -> None:
    assert run("sweep", "half-width", "--data", folder / "set.h5", "--values", 4, 0, "--out", tmp_path) == 0
    found = result(tmp_path / "half_width.json")
    rows = found["rows"]
    assert found["masks"] == [Pmg().about()]
    assert [row["maker"] for row in rows] == [replace(PAPER, half_width=width).about() for width in (0, 4)]
    header, *lines = (tmp_path / "half_width.csv").read_text().splitlines()
    assert header.split(",")[:2] == ["half_width", "iou_percent"] and [line[0] for line in lines] == ["0", "4"]
    assert float(lines[1].split(",")[1]) == pytest.approx(100 * rows[1]["iou"], abs=1e-4)
    assert Image.open(tmp_path / "half_width.png").size[0] > 900
    weights = ("--checkpoint", folder / "stage1.safetensors", "--no-plots")
    assert run("sweep", "radius", "--data", folder / "set.h5", *weights, "--out", tmp_path) == 0
    found = result(tmp_path / "radius.json")
    assert len(found["rows"]) == 11 and not (tmp_path / "radius.png").exists()
    assert found["masks"] == [PAPER.about()] and found["network"]["normalisation"] == [88.69, 11.91]


def test_show_command(folder: Path, tmp_path: Path) -> None:
    common = ("show", "--data", folder / "set.h5", "--out", tmp_path)
    assert run(*common, "--pick", "worst", "--count", 3, "--checkpoint", folder / "stage1.safetensors") == 0
    width, height = Image.open(tmp_path / "worst.png").size
    assert width == 6 * 248 + 8 and height == 3 * 270 + 8  # image, truth and four masks; three images
    assert run(*common, "--names", "train_0003", "train_0001") == 0
    assert Image.open(tmp_path / "names.png").size == (3 * 248 + 8, 2 * 270 + 8)


@pytest.mark.parametrize("batch", [1, 7, 64])
def test_predicted_masks_do_not_depend_on_the_batch(folder: Path, tmp_path: Path, batch: int) -> None:
    """Files in, files out: 8 and 16 bits, two sizes; the second run gives the first one's bytes."""
    data = tiny_set(((40, 48), (64, 33), (40, 48), (29, 30), (40, 48), (64, 33), (40, 48), (40, 48)))
    (tmp_path / "frames").mkdir()
    rows = ["image,y,x"]
    for index, (height, width) in enumerate(data.sizes.tolist()):
        pixels = data.images[index, :height, :width].numpy()
        deep = index % 2 == 1
        Image.fromarray(pixels.astype(np.uint16) * 256 if deep else pixels).save(
            tmp_path / "frames" / f"{data.names[index]}.{'tif' if deep else 'png'}"
        )
        rows += [f"{data.names[index]}.png,{y},{x}" for image, y, x in data.points.tolist() if image == index < 7]
    (tmp_path / "clicks.csv").write_text("\n".join(rows) + "\n")

    points = ("--points", tmp_path / "clicks.csv", "--batch", batch)
    weights = ("--checkpoint", folder / "stage1.safetensors")
    for out, more in (("points", points), ("both", (*points, *weights)), ("network", (*weights, "--batch", batch))):
        assert run("predict", tmp_path / "frames", *more, "--out", tmp_path / out) == 0
    assert result(tmp_path / "both/predict.json")["images_per_second"] > 0
    for index, (height, width) in enumerate(data.sizes.tolist()):
        one = data.subset([index])
        scale = 256 if index % 2 else 1
        images = one.images.float() * scale
        initial = point_to_mask(images, one.points if index < 7 else one.points[:0], sizes=one.sizes)
        one.images = images
        model = load_network(weights[1], lambda: (0, 0)).model
        alone = predict(model, one, mean=88.69, std=11.91)
        hybrid = update(alone, initial, one.points if index < 7 else one.points[:0], sizes=one.sizes)
        for out, expected in (("points", initial), ("both", hybrid), ("network", alone)):
            mask = read_mask(tmp_path / out / "masks" / f"{data.names[index]}.png")
            assert mask.shape == (height, width) and np.array_equal(mask, expected[0].numpy()), (out, index)
    assert read_mask(tmp_path / "points/masks/train0.png").any()
    assert not read_mask(tmp_path / "both/masks/train7.png").any()  # no point, no target


def test_predict_command_without_images(tmp_path: Path) -> None:
    assert run("predict", "--points", "masks_centroid", "--out", tmp_path) == 0
    assert len(list((tmp_path / "masks").glob("*.png"))) == 48


def test_predict_command_without_any_point(tmp_path: Path, capsys) -> None:
    """Points of which none is in these images: empty masks, and nothing for a student to learn from."""
    (tmp_path / "frames").mkdir()
    Image.fromarray(np.random.default_rng(0).integers(0, 99, (40, 50), np.uint8)).save(tmp_path / "frames" / "a.png")
    (tmp_path / "p.csv").write_text("image,y,x\na,,\n")
    common = ("predict", tmp_path / "frames", "--points", tmp_path / "p.csv", "--out")
    assert run(*common, tmp_path / "out", "--extent", "auto") == 0
    assert result(tmp_path / "out" / "predict.json")["masks"] == [PAPER.about()]
    assert not read_mask(tmp_path / "out" / "masks" / "a.png").any()
    capsys.readouterr()
    assert run(*common, tmp_path / "none", "--masks", "learned") == 2
    text = capsys.readouterr().err
    assert "no point label" in text and text.count("\n") == 1 and not (tmp_path / "none").exists()


def test_images_normalisation(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    for name in ("plain", "NUAA-SIRST"):
        (tmp_path / name / "images").mkdir(parents=True)
        pixels = [rng.integers(0, 255, (20, 30 + i), dtype=np.uint8) for i in range(3)]
        for i, image in enumerate(pixels):
            Image.fromarray(image).save(tmp_path / name / "images" / f"{i}.png")
        source = open_images([str(tmp_path / name)], None, 2)
        known = name != "plain"
        mean, std = (
            (101.06385040283203, 34.619606018066406) if known else np.mean([(p.mean(), p.std()) for p in pixels], 0)
        )
        assert source.dataset == name and source.normalisation() == pytest.approx((mean, std))


@pytest.mark.parametrize(
    ("arguments", "parts"),
    [
        (["predict"], ["--checkpoint", "--points"]),
        (["predict", "none.png", "--points", "masks_centroid"], ["masks_centroid"]),
        (["predict", "--checkpoint", "none.pth"], ["none.pth", "no such"]),
        (["masks", "--data", "nowhere"], ["nowhere", "no such data set"]),
        (["masks", "--masks", "gmp"], ["masks 'gmp'", ", ".join(MAKERS)]),
        (["masks", "--masks", "pmg:extent=0"], ["extent = 0", "at least 1"]),
        (["masks", "--masks", "folder:nowhere"], ["nowhere", "no such folder"]),
        (["show", "--masks", "pmg", "learned:none.safetensors"], ["none.safetensors", "no such"]),
        (["predict", "--points", "masks_centroid", "--masks", "folder"], ["folder:PATH"]),
        (["masks", "--device", "cuda:77"], ["cuda:77", "try cpu"]),
        (["masks", "--threads", "0"], ["threads 0"]),
        (["show", "--count", "0"], ["count 0"]),
        (["predict", "--points", "masks_centroid", "--batch", "0"], ["batch 0"]),
        (["detector", "--checkpoint", "none.pth"], ["none.pth"]),
        (["sweep", "radius"], ["--checkpoint"]),
        (["sweep", "alpha", "--values", "3"], ["alpha"]),
        (["sweep", "alpha", "--values", "nan"], ["alpha"]),
        (["sweep", "extent", "--values", "nan"], ["extent"]),
        (["sweep", "extent", "--values", "inf"], ["extent"]),
        (["sweep", "extent", "--values", "0"], ["extent", "at least 1"]),
        (["sweep", "extent", "--masks", "folder:nowhere"], ["folder has no setting extent", "it has none"]),
        (["sweep", "weight"], ["pmg has no setting weight", "extent"]),
        (["sweep", "colour"], ["colour", "--values"]),
        (["sweep", "colour", "--values", "1"], ["pmg has no setting colour", "extent"]),
        (["show", "--names", "nobody"], ["nobody"]),
        (["show", "--pick", "joined"], ["two targets"]),
        (["paper", "--checkpoint", "none.safetensors"], ["none.safetensors", "no such"]),
        (["paper", "--checkpoint", "best=none.pth"], ["no row best", "HMG"]),
    ],
    ids=lambda value: " ".join(value)[:40],
)
def test_bad_input_is_one_line(arguments: list[str], parts: list[str], tmp_path: Path, capsys) -> None:
    assert run(*arguments, "--out", tmp_path / "out") == 2
    text = capsys.readouterr().err
    assert text.startswith("error: ") and text.count("\n") == 1
    assert all(part in text for part in parts), text
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("arguments", "text"),
    [
        (["masks", "--extent", "0"], "argument --extent: expected at least 1, got '0'"),
        (["masks", "--extent", "far"], "argument --extent: expected a whole number or auto, got 'far'"),
        (["masks", "--alpha", "2"], "argument --alpha: expected a number from 0 to 1, got '2'"),
        (["masks", "--radius", "-1"], "argument --radius: expected at least 0, got '-1'"),
        (["masks", "--rule", "mean"], "argument --rule: invalid choice: 'mean'"),
        (["detector"], "the following arguments are required: --checkpoint"),
    ],
)
def test_an_option_out_of_its_range(arguments: list[str], text: str, tmp_path: Path, capsys) -> None:
    """The parser names the option, before anything is read."""
    with pytest.raises(SystemExit) as caught:
        run(*arguments, "--out", tmp_path / "out")
    assert caught.value.code == 2 and text in capsys.readouterr().err.splitlines()[-1]
    assert not (tmp_path / "out").exists()


def test_images_are_never_replaced(tmp_path: Path, capsys) -> None:
    Image.fromarray(np.zeros((20, 20), np.uint8)).save(tmp_path / "a.png")
    (tmp_path / "masks").mkdir()
    image = tmp_path / "masks" / "a.png"
    Image.fromarray(np.full((20, 20), 9, np.uint8)).save(image)
    (tmp_path / "p.csv").write_text("image,y,x\na,3,3\n")
    assert run("predict", image, "--points", tmp_path / "p.csv", "--out", tmp_path) == 2
    assert np.array(Image.open(image)).max() == 9
    assert run("predict", image, tmp_path / "a.png", "--points", tmp_path / "p.csv", "--out", tmp_path / "x") == 2
    assert "one stem" in capsys.readouterr().err


def test_brackets_in_names_are_printed(tmp_path: Path, capsys) -> None:
    assert run("masks", "--data", tmp_path / "set[red]", "--out", tmp_path) == 2
    assert "set[red]: no such" in capsys.readouterr().err
    assert run("masks", "--out", tmp_path / "a[bold]") == 0
    assert "a[bold]/masks.json" in capsys.readouterr().out


def test_no_ground_truth(tmp_path: Path, capsys) -> None:
    data = make_split("train", count=4, size=64)
    data.masks = None
    write_store(tmp_path / "set.h5", [data])
    assert run("masks", "--data", tmp_path / "set.h5", "--out", tmp_path / "out") == 2
    assert "no ground truth" in capsys.readouterr().err
    assert run("show", "--data", tmp_path / "set.h5", "--out", tmp_path / "out") == 0


def test_a_set_without_any_point(folder: Path, tmp_path: Path, capsys) -> None:
    """What the points are needed for is refused; the rest leaves their masks out."""
    data = make_split("train", count=4, size=64)
    data.points = data.points[:0]
    data.dataset = "pointless"
    write_store(tmp_path / "set.h5", [data])
    common = ("--data", tmp_path / "set.h5", "--split", "train", "--checkpoint", folder / "stage2.safetensors")
    out = ("--out", tmp_path / "out")
    for command in (("detector", "--point-prompt"), ("sweep", "radius", "--no-plots")):
        capsys.readouterr()
        assert run(*command, *common, *out) == 2
        text = capsys.readouterr().err
        assert text.startswith("error: pointless train: no point label in the whole set") and text.count("\n") == 1
    assert not (tmp_path / "out").exists()
    assert run("masks", *common, *out) == 0
    found = result(tmp_path / "out" / "masks.json")
    assert list(found["rows"]) == ["prediction"] and found["masks"] == []


def test_plots_without_matplotlib(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys) -> None:
    find = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == "matplotlib" else find(name))
    assert run("sweep", "alpha", "--values", "0.1", "--out", tmp_path) == 2
    text = capsys.readouterr().err
    assert 'pip install "hmg-gpu[plots]"' in text and "--no-plots" in text and text.count("\n") == 1
    assert run("sweep", "alpha", "--values", "0.1", "--no-plots", "--out", tmp_path) == 0


@pytest.mark.parametrize("command", ["masks", "sweep", "detector", "predict", "show", "paper"])
def test_help_has_an_example_that_parses(command: str, capsys: pytest.CaptureFixture) -> None:
    with pytest.raises(SystemExit):
        run(command, "--help")
    example = " ".join(capsys.readouterr().out.partition("example: python eval.py ")[2].split())
    assert script.parse(shlex.split(example)).name == command


# ---- the paper's report ---------------------------------------------------------------------------------------------


NAMES = {"PMG": "pmg", "hybrid, coarse points": "hybrid"}  # rows of the report -> of `eval.py masks`


def test_report(folder: Path, tmp_path: Path) -> None:
    files = [folder / f"{name}.safetensors" for name in ("stage1", "stage2", "coarse1", "coarse")]
    data = folder / "set.h5"
    assert run("paper", "--data", data, "--checkpoint", *files, "--no-plots", "--out", tmp_path) == 0
    content = json.loads((tmp_path / "paper.json").read_text())
    entries = content["entries"]
    measured = {(entry["table"], entry["row"]): entry for entry in entries if entry["ours"]}
    expected = {("Table 1", "HMG"), ("Tables 2 and 3", "PMG"), ("Ablations", "P_g only")}
    expected |= {("Table 4", row) for row in ("initial", "prediction", "filtered", "hybrid")}
    expected |= {("Table 5", row) for row in ("HMG", "coarse points", "point prompt")}
    expected |= {("Ablations", f"{kind}, coarse points") for kind in ("PMG", "prediction", "filtered", "hybrid")}
    expected |= {("Fig. 5(a)", "gain of half_width 4 over 0"), ("Fig. 5(c)", "gain of radius 30 over 1000")}
    assert expected <= set(measured)

    # every row of the paper is there, measured or with what it needs, and with the paper's numbers
    for table in paper_numbers()["tables"]:
        for row in table["rows"]:
            for name in paper_numbers()["sets"]:
                same = [
                    e for e in entries if (e["table"], e["row"], e["dataset"]) == (table["table"], row["row"], name)
                ]
                same = [e for e in same if table["table"] != "Table 1" or row["model"] in (e["paper_model"],)]
                assert len(same) == 1 and same[0]["paper"] == row[name]
                assert same[0]["ours"] or same[0]["needs"]

    # its command alone gives a row's numbers again
    coarse = ("Ablations", "hybrid, coarse points")
    for key in (("Table 4", "hybrid"), ("Table 5", "point prompt"), ("Tables 2 and 3", "PMG"), coarse):
        entry = measured[key]
        python, name, *arguments = shlex.split(entry["command"])
        assert (python, name) == ("python", "eval.py")
        plots = ("--no-plots",) if arguments[0] == "detector" else ()
        assert run(*arguments, *plots, "--out", tmp_path / "alone") == 0
        alone = json.loads((tmp_path / "alone" / f"{arguments[0]}.json").read_text())
        row = alone["result"] if arguments[0] == "detector" else alone["rows"][NAMES.get(key[1], key[1])]
        scale = {"iou": 100, "pd": 100, "fa": 1e6}
        assert entry["ours"] == pytest.approx([scale[column] * row[column] for column in entry["columns"]])

    text = (tmp_path / "paper.md").read_text()
    assert "## Not measured" in text and all(entry["command"] in text for entry in measured.values())
    for file in content["pictures"]:
        assert (tmp_path / file).exists() and f"({file})" in text


def test_roles_of_checkpoints(folder: Path, tmp_path: Path) -> None:
    files = [str(folder / f"{name}.safetensors") for name in ("stage1", "stage2", "coarse1", "coarse")]
    found = sort_checkpoints(files, "SIRST3", "lesps")
    assert [one.row for one in found] == ["stage 1", "HMG", "stage 1, coarse points", "coarse points"]
    assert {one.dataset for one in found} == {"NUAA-SIRST"}
    weights = tmp_path / "theirs.pth"
    torch.save(build_model("acm").state_dict(), weights)
    (one,) = sort_checkpoints([f"LESPS={weights}"], "SIRST3", "lesps")
    assert (one.row, one.dataset, one.options) == ("LESPS", None, {"normalisation": "SIRST3", "padding": "lesps"})
    refused(lambda: sort_checkpoints([str(weights)], "SIRST3", "lesps"), "theirs.pth", "ROW=FILE")


def test_report_fills_the_rows_of_other_systems(folder: Path, tmp_path: Path) -> None:
    data = folder / "set.h5"
    masks = ("mclc:crop=9,repeats=2", "lelcm")
    assert run("paper", "--data", data, "--masks", *masks, "--no-plots", "--out", tmp_path) == 0
    entries = json.loads((tmp_path / "paper.json").read_text())["entries"]
    rows = {entry["row"]: entry for entry in entries if entry["table"] == "Tables 2 and 3" and entry["ours"]}
    assert rows.keys() == {"PMG", "MCLC", "lelcm"} and rows["MCLC"]["paper"] == [70.59]
    assert run(*shlex.split(rows["MCLC"]["command"])[2:], "--out", tmp_path / "alone") == 0
    alone = json.loads((tmp_path / "alone" / "masks.json").read_text())["rows"]["mclc"]
    assert rows["MCLC"]["ours"] == pytest.approx([100 * alone["iou"]])
    text = (tmp_path / "paper.md").read_text()
    assert "patent application" in text and "such as com, mclc, p2b-mclc" in text


@pytest.mark.parametrize(
    ("changed", "row"),
    [
        ({"masks": "mclc:crop=23"}, "MCLC"),
        ({"masks": "com"}, "COM"),
        ({"masks": "points", "rule": "lesps", "update_every": 5}, "LESPS"),
        ({"masks": "lelcm", "rule": "lelcm", "update_every": 5}, "LELCM"),
        ({"masks": "pmg:extent=9"}, "HMG"),
        ({"masks": "learned"}, "HMG"),
        ({"masks": "pal", "rule": "pal", "update_every": 5}, None),
        ({"masks": "folder:somewhere"}, None),
        ({"masks": "com", "supervision": "full"}, "full"),
    ],
)
def test_rows_of_runs_on_other_systems_labels(changed: dict, row: str | None, tmp_path: Path) -> None:
    """A run on another system's labels is never taken for HMG's."""
    settings = asdict(Settings(epochs=(1, 1), **changed))
    about = {"settings": settings, "stage": 2, "epoch": 0, "dataset": "NUAA-SIRST", "normalisation": [1, 2]}
    save_checkpoint(tmp_path / "stage2.safetensors", {"model.x": torch.zeros(1)}, about)
    found = sort_checkpoints([str(tmp_path / "stage2.safetensors")], "SIRST3", "lesps")
    assert [one.row for one in found] == ([] if row is None else [row])


def test_older_runs_are_hmgs(tmp_path: Path) -> None:
    """Their settings knew PMG and the union alone."""
    settings = {
        "initial": "pmg",
        "fusion": "union",
        "supervision": "points",
        "points": "masks_centroid",
        "epochs": [1, 1],
    }
    about = {"settings": settings | {"model": "acm"}, "stage": 2, "dataset": "NUAA-SIRST", "normalisation": [1, 2]}
    save_checkpoint(tmp_path / "stage2.safetensors", {"model.x": torch.zeros(1)}, about)
    assert sort_checkpoints([str(tmp_path / "stage2.safetensors")], "SIRST3", "lesps")[0].row == "HMG"


def test_points_of_the_paper_on_a_sweep() -> None:
    points = paper_points("half_width", "NUAA-SIRST", "train")
    assert [(point["value"], point["iou"]) for point in points] == [(4, 74.22), (0, pytest.approx(71.72))]
    assert [point["value"] for point in paper_points("extent", "NUAA-SIRST", "train")] == [16, 17, 25]
    assert [point["value"] for point in paper_points("extent", "NUDT-SIRST", "train")] == [10]
    assert [point["iou"] for point in paper_points("radius", "NUDT-SIRST", "train")] == [73.35, 74.52]
    assert paper_points("alpha", "synthetic", "train") == paper_points("alpha", "NUAA-SIRST", "test") == []


def test_a_set_is_measured_once(folder: Path, tmp_path: Path) -> None:
    report = Report(tmp_path, [], "cpu", False, lambda _: None)
    report.add_set(str(folder / "set.h5"))
    refused(lambda: report.add_set(str(folder / "set.h5")), "NUAA-SIRST", "once")


# ---- the published weights on the real sets -------------------------------------------------------------------------

# IoU (%), Pd (%) and Fa (1e-6) of every mask of the updating process on the test split, by an independent prototype.
PUBLISHED = {
    ("ACM_full", "NUAA-SIRST"): {
        "pmg": (73.93, 98.48, 16.60),
        "prediction": (64.93, 90.87, 12.76),
        "filtered": (65.59, 90.87, 6.38),
        "hybrid": (75.03, 96.96, 19.48),
    },
    ("ACM_full", "NUDT-SIRST"): {
        "pmg": (73.71, 97.88, 22.04),
        "prediction": (57.42, 91.75, 39.73),
        "filtered": (59.01, 91.75, 18.87),
        "hybrid": (71.34, 98.84, 23.81),
    },
    ("ACM_LESPS_centroid", "NUAA-SIRST"): {
        "pmg": (73.93, 98.48, 16.60),
        "prediction": (49.29, 89.35, 40.68),
        "filtered": (50.11, 89.35, 27.71),
        "hybrid": (62.44, 94.30, 39.79),
    },
    ("ACM_LESPS_centroid", "NUDT-SIRST"): {
        "pmg": (73.71, 97.88, 22.04),
        "prediction": (42.10, 91.11, 38.74),
        "filtered": (43.33, 91.11, 10.00),
        "hybrid": (57.23, 98.73, 18.77),
    },
}


@pytest.mark.parametrize(("weights", "dataset"), PUBLISHED, ids=lambda value: value)
def test_published_weights(weights: str, dataset: str, data_root: Path, checkpoint_root: Path, tmp_path: Path) -> None:
    """LESPS's padding and normalisation, official centroid points, r = 30: IoU to 0.1, Pd exact, Fa to 10 px."""
    options = ("--split", "test", "--padding", "lesps", "--normalisation", "SIRST3", "--out", tmp_path)
    checkpoint = checkpoint_root / f"{weights}.pth.tar"
    assert run("masks", "--data", data_root / dataset, "--checkpoint", checkpoint, *options) == 0
    found = result(tmp_path / "masks.json")
    assert found["masks"] == [Pmg(extent=10 if dataset == "NUDT-SIRST" else 25).about()]
    for name, (iou, pd, fa) in PUBLISHED[weights, dataset].items():
        row = found["rows"][name]
        assert abs(100 * row["iou"] - iou) <= 0.1, name
        assert row["matched"] == round(pd / 100 * row["targets"]), name
        assert abs(row["false_alarm_pixels"] - fa * 1e-6 * row["pixels"]) <= 10, name
    counts = json.loads((checkpoint_root / "conformance.json").read_text())
    counts = counts["published_checkpoints"][weights][f"{dataset} test"]
    prediction = found["rows"]["prediction"]
    assert (prediction["targets"], prediction["pixels"]) == (counts["targets"], counts["all_px"])
    assert prediction["matched"] == counts["pd_n"]
    for name, count in (("intersection", "inter"), ("union", "union"), ("false_alarm_pixels", "fa_px")):
        assert abs(prediction[name] - counts[count]) <= 10, name


def test_masks_of_the_real_training_set_in_any_batch(data_root: Path) -> None:
    """The same bits on a second run and for batches of 1, 7 and 64, each padded to its own largest image."""
    data = load_folder(data_root / "NUAA-SIRST", "train")
    whole = PAPER.masks(data)
    for batch in (1, 7, 64, len(data)):
        for rows in torch.arange(len(data)).split(batch):
            part = data.subset(rows)
            masks = point_to_mask(part.images, part.points, sizes=part.sizes)
            assert torch.equal(masks, whole[rows, : masks.shape[1], : masks.shape[2]])


def test_the_soft_rule_is_measured(folder: Path, tmp_path: Path) -> None:
    data, weights = folder / "set.h5", folder / "stage1.safetensors"
    arguments = ("masks", "--data", data, "--checkpoint", weights, "--rule", "soft", "--out", tmp_path)
    assert run(*arguments) == 0
    content = json.loads((tmp_path / "masks.json").read_text())
    assert content["rule"] == Soft().about() and content["points"] == "masks_centroid"
    one = evaluation.load_set(str(data), "train")
    network = load_network(weights, lambda: (0.0, 1.0))
    soft = point_to_probability(one.images, one.points, extent=25, sizes=one.sizes)
    hybrid = soft_update(network.predict_probabilities(one), soft, one.points, sizes=one.sizes)
    assert content["rows"]["hybrid"]["iou"] == measure(hybrid, one)["iou"]
    assert not torch.equal(hybrid, update(network.predict(one), soft >= 0.5, one.points, sizes=one.sizes))


def test_settings_behind_the_name_of_a_maker(folder: Path, tmp_path: Path) -> None:
    """pmg:extent=5 over --extent; two of one kind are two rows."""
    data = evaluation.load_set(str(folder / "set.h5"), "train")
    arguments = ("masks", "--data", folder / "set.h5", "--out", tmp_path, "--extent", "8")
    assert run(*arguments, "--masks", "pmg:extent=5,half-width=2", "--alpha", "0.3") == 0
    found = json.loads((tmp_path / "masks.json").read_text())
    maker = Pmg(extent=5, half_width=2, alpha=0.3)
    assert found["masks"] == [maker.about()]
    assert found["rows"]["pmg"]["iou"] == measure(maker.masks(data), data)["iou"]
    assert run(*arguments[:-2], "--extent", "auto") == 0
    assert json.loads((tmp_path / "masks.json").read_text())["masks"][0]["extent"] == Pmg("auto").fit(data).extent

    write_mask_folders(data, tmp_path / "a" / "masks", tmp_path / "b" / "masks", tmp_path / "hybrid")
    kinds = ["pmg:extent=5", "pmg", *(f"folder:{tmp_path / name}" for name in ("a/masks", "b/masks", "hybrid"))]
    weights = ("--checkpoint", folder / "stage1.safetensors")
    assert run(*arguments, *weights, "--masks", *kinds) == 0
    found = json.loads((tmp_path / "masks.json").read_text())
    makers = [
        Pmg(extent=5),
        Pmg(extent=8),
        *(Folder(str(tmp_path / name)) for name in ("a/masks", "b/masks", "hybrid")),
    ]
    ablations = [replace(maker, directional=False) for maker in makers[:2]]
    wanted = [makers[0], ablations[0], makers[1], ablations[1], *makers[2:]]
    assert list(found["rows"]) == [*map(str, wanted), "prediction", "filtered", "hybrid"]
    for maker in wanted:
        assert found["rows"][str(maker)]["iou"] == measure(maker.masks(data), data)["iou"]


def write_mask_folders(data: ImageSet, *folders: Path) -> None:
    """Masks of a set in several folders: in the first all of the truth, in each further one an image less."""
    for less, folder in enumerate(folders):
        for index, (name, (height, width)) in enumerate(zip(data.names, data.sizes.tolist(), strict=True)):
            write_mask(folder / f"{name}.png", data.masks[index, :height, :width] & (index >= less))
