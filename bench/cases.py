"""What is timed: CASES is plain data; each builder makes the rows of one case at one size.

The first row of a problem is the reference (tests/reference.py, or the plain way to do it): the others must give its
result before any of them is timed.
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from bench import peers
from bench.measure import Case, Problem, Row, forced
from bench.scenes import blob_scene, blobs_for, describe, points_scene, predicted_scene, training_set
from hmg_gpu import false_alarm_filter, point_to_mask, update
from hmg_gpu.common.errors import InputError
from hmg_gpu.data import ImageSet, iterate_store, read_mask, write_mask, write_store
from hmg_gpu.data.batches import ONE, PLAN, cut_crops, draw_epoch
from hmg_gpu.data.images import map_files
from hmg_gpu.evaluation.metrics import detection_counts
from hmg_gpu.models import build_model
from hmg_gpu.models.losses import soft_iou_loss
from hmg_gpu.plain.components import connected_components
from hmg_gpu.training.step import TrainingStep, in_channels_last

WAYS = {  # settings of TrainingStep, and how far the first loss may lie from the bare step's, as a share
    "eager": ({}, 1e-6),
    "eager bf16": ({"bf16": True}, 2e-2),
    "compile": ({"way": "compile"}, 1e-4),
    "compile bf16": ({"way": "compile", "bf16": True}, 2e-2),
    "graph": ({"way": "graph"}, 1e-6),
    "graph bf16": ({"way": "graph", "bf16": True}, 2e-2),
}
NO_GPU = "not measured: no GPU"
LOOP_POINTS = 1000  # what a loop over points does of a larger problem; throughput is compared
LOOP_IMAGES = 64  # likewise for loops over images
GPU_TOLERANCE = 1e-3  # sums of floats in another order: masks may differ where P_f is 0.5 within rounding

SCIPY, TORCH, TRITON = "hmg_gpu, SciPy", "hmg_gpu, torch", "hmg_gpu, Triton"
REGIONPROPS = "scikit-image regionprops, a loop"
OPENCV = "OpenCV connectedComponentsWithStats, a loop"
NUMPY = "NumPy reference"
KORNIA = "hmg_gpu on kornia's union-find"
PLAIN_STEP, STEP = "bare ACM step, resident tensors", "ACM training step"
CROPS, OWN_UPDATE = "hmg_gpu, batch on the device", "update of these 8 images"


def ours(make: Callable[[str], Callable[[], Any]], gpu: str | None, **settings: Any) -> list[Row]:
    """Our ways to label: runs on SciPy, kornia's union-find, and the kernels; ``make`` binds the inputs to a device."""
    rows = [
        Row(SCIPY, forced("scipy", make("cpu")), ours=True, **settings),
        Row(KORNIA, forced("torch", make("cpu")), ours=True, **settings),
    ]
    if gpu is None:
        return [*rows, Row(TRITON, None, why=NO_GPU)]
    on_gpu = make(gpu)
    rows.append(Row(f"{KORNIA}, GPU", forced("torch", on_gpu), device=gpu, ours=True, **settings))
    return [*rows, Row(TRITON, forced("triton", on_gpu), device=gpu, ours=True, **settings)]


# ---- PMG ------------------------------------------------------------------------------------------------------------


def build_pmg(*, points: int, extent: int, data: str, size: int | None = None, gpu: str | None) -> Problem:
    scene, said = points_scene(points, data, size)
    some, calls = _first_points(scene, LOOP_POINTS), _first_points(scene, LOOP_POINTS // 5)

    def make(device: str, data: ImageSet = scene) -> Callable[[], Tensor]:
        data = data.to(device)
        return lambda: point_to_mask(data.images, data.points, extent=extent, sizes=data.sizes)

    def one_by_one() -> Tensor:
        masks = torch.zeros(calls.images.shape, dtype=torch.bool)
        for image, y, x in calls.points.tolist():
            point, height, width = torch.tensor([[0, y, x]]), *calls.sizes[image].tolist()
            plane = calls.images[image : image + 1, :height, :width].contiguous()
            masks[image, :height, :width] |= point_to_mask(plane, point, extent=extent)[0]
        return masks

    rows = [
        Row(NUMPY, lambda: peers.reference_masks(some, extent), len(some.points)),
        Row("hmg_gpu, torch, a call for each point", one_by_one, len(calls.points), ours=True),
        Row(TORCH, forced("torch", make("cpu")), points, ours=True),
        Row(TRITON, None, why=NO_GPU),
    ]
    if gpu is not None:
        on_gpu = make(gpu)
        rows[3:] = [
            Row(f"{TORCH}, GPU", forced("torch", on_gpu), points, device=gpu, ours=True, tolerance=GPU_TOLERANCE),
            Row(TRITON, forced("triton", on_gpu), points, device=gpu, ours=True, tolerance=GPU_TOLERANCE),
        ]
    window = (2 * extent + 1) ** 2 * scene.images.element_size()
    return Problem(rows, bytes_per_unit=window + scene.images.numel() / points, inputs=f"{said}, extent {extent}")


def _first_points(data: ImageSet, count: int) -> ImageSet:
    """The first images with all their points, as many as reach ``count`` points."""
    if len(data.points) <= count:
        return data
    images = int(data.points[count - 1, 0]) + 1
    points = data.points[: int(torch.searchsorted(data.points[:, 0].contiguous(), images))]
    return ImageSet(data.names[:images], data.images[:images], data.sizes[:images], points, dataset=data.dataset)


# ---- labelling, FAF, update, metrics --------------------------------------------------------------------------------


def build_labels(*, images: int, side: int, blobs: int, gpu: str | None) -> Problem:
    masks, _, _ = blob_scene(images, side, blobs)
    array, planes = masks.numpy(), masks[:, None]

    def make(device: str) -> Callable[[], Any]:
        if device == "cpu":
            return lambda: connected_components(masks)
        moved = masks.to(device)

        def on_gpu() -> Any:
            from hmg_gpu.kernels.components import components

            return components(moved)

        return on_gpu

    def kornia(name: str) -> Callable[[], Callable[[], Tensor]]:
        def bind() -> Callable[[], Tensor]:
            from kornia import contrib

            call = getattr(contrib, name)
            return lambda: call(planes if name.endswith("find") else planes.float())[:, 0]

        return bind

    def as_table(output: Any) -> Tensor:
        if isinstance(output, tuple):  # of the kernels: labels first
            output = output[0]
        if isinstance(output, Tensor):
            return peers.table_of_labels(output)
        columns = (output.image, output.area, output.sum_y, output.sum_x)
        return peers.sorted_rows(torch.stack([column.cpu() for column in columns], dim=1))

    def cupy() -> Callable[[], Any]:
        import cupy
        from cupyx.scipy.ndimage import label

        arrays = [cupy.from_dlpack(plane.byte().cuda()) for plane in masks]
        return lambda: [label(plane, cupy.ones((3, 3)))[0] for plane in arrays]

    def cupy_table(labels: list[Any]) -> Tensor:
        return peers.table_of_labels(torch.stack([torch.from_dlpack(plane) for plane in labels]))

    sort = peers.sorted_rows
    rows = [
        Row(NUMPY, lambda: peers.scipy_labels(array), images, sort),
        peers.peer(REGIONPROPS, lambda: lambda: peers.regionprops_labels(array), "skimage", units=images, read=sort),
        peers.peer(OPENCV, lambda: lambda: peers.opencv_labels(array), "cv2", units=images, read=sort),
        Row("kornia connected_components, labels alone", kornia("connected_components")(), images, as_table),
        Row("kornia union-find, labels alone", kornia("connected_components_union_find")(), images, as_table),
        Row(SCIPY, forced("scipy", make("cpu")), images, as_table, ours=True),
        Row(KORNIA, forced("torch", make("cpu")), images, as_table, ours=True),
    ]
    if gpu is None:
        rows += [Row("CuPy label, a loop", None, why=NO_GPU), Row(TRITON, None, why=NO_GPU)]
    else:
        settings = {"units": images, "device": gpu}
        rows.append(peers.peer("CuPy label, a loop", cupy, "cupy", "cupyx", read=cupy_table, **settings))
        rows.append(Row(TRITON, forced("triton", make(gpu)), read=as_table, ours=True, **settings))
    return Problem(rows, REGIONPROPS, side * side, describe(masks, "discs of radius 1 to 4 px"))


def build_filter(*, images: int, side: int, blobs: int, gpu: str | None) -> Problem:
    """FAF alone: the update with empty initial masks, for the loops."""
    prediction, _, points = blob_scene(images, side, blobs)
    return _corrections(prediction, None, points, describe(prediction, "discs of radius 1 to 4 px"), gpu)


def build_update(
    *,
    images: int,
    side: int,
    blobs: int | None = None,
    density: float | None = None,
    loops: int = LOOP_IMAGES,
    gpu: str | None,
) -> Problem:
    """FAF and MDR on discs: so many an image, or so much foreground, or as dense as 20 in 256 x 256 pixels."""
    if density is not None:
        blobs = blobs_for(density, side)
    elif blobs is None:
        blobs = max(1, 20 * side * side // 256**2)
    prediction, initial, points = blob_scene(images, side, blobs)
    return _corrections(prediction, initial, points, describe(prediction, "discs of radius 1 to 4 px"), gpu, loops)


def build_real_update(*, images: int, weights: str, data: str, size: int | None = None, gpu: str | None) -> Problem:
    prediction, initial, points, said = predicted_scene(images, weights, data, size)
    return _corrections(prediction, initial, points, describe(prediction, said), gpu)


def _corrections(
    prediction: Tensor, initial: Tensor | None, points: Tensor, inputs: str, gpu: str | None, loops: int = LOOP_IMAGES
) -> Problem:
    """FAF (``initial`` None) or FAF and MDR by everybody; loops take at most ``loops`` images."""
    images, height, width = prediction.shape
    some = min(images, loops)
    before = torch.zeros_like(prediction) if initial is None else initial
    arrays = (prediction[:some].numpy(), before[:some].numpy(), peers.split_points(points, images)[:some])

    def make(device: str) -> Callable[[], Tensor]:
        where, mask = points.to(device), prediction.to(device)
        if initial is None:
            return lambda: false_alarm_filter(mask, where, radius=peers.RADIUS)
        first = initial.to(device)
        return lambda: update(mask, first, where, radius=peers.RADIUS)

    rows = [
        Row(NUMPY, lambda: peers.reference_update(*arrays), some, torch.from_numpy),
        peers.peer(
            REGIONPROPS, lambda: lambda: peers.regionprops_update(*arrays), "skimage", units=some, read=torch.from_numpy
        ),
        peers.peer(OPENCV, lambda: lambda: peers.opencv_update(*arrays), "cv2", units=some, read=torch.from_numpy),
        *ours(make, gpu, units=images),
    ]
    planes = 2 if initial is None else 3  # read the prediction, read the initial mask, write: one byte a pixel each
    return Problem(rows, REGIONPROPS, planes * height * width, inputs)


def build_metrics(*, images: int, side: int, blobs: int, gpu: str | None) -> Problem:
    prediction, _, _ = blob_scene(images, side, blobs)
    target = torch.roll(prediction, (1, 1), (1, 2))
    pair = prediction.numpy(), target.numpy()

    def make(device: str) -> Callable[[], Tensor]:
        predicted, truth = prediction.to(device), target.to(device)
        return lambda: detection_counts(predicted, truth, distance=peers.DISTANCE).sum(0)

    def counts(totals: Tensor) -> Tensor:
        return totals.cpu()[[0, 1, 2, 4]]  # as peers.COUNTED

    rows = [
        Row(NUMPY, lambda: peers.reference_metrics(*pair), images),
        peers.peer(REGIONPROPS, lambda: lambda: peers.regionprops_metrics(*pair), "skimage", units=images),
        *ours(make, gpu, units=images, read=counts),
    ]
    return Problem(rows, REGIONPROPS, 2 * side * side, describe(prediction, "against itself moved by a pixel"))


# ---- batches and training -------------------------------------------------------------------------------------------


def _trainer(data: ImageSet, masks: Tensor, patch: int, device: str, **settings: Any) -> Callable[[Tensor], Tensor]:
    """One ACM training step a call, always with the same dropout; gives the counts so far. ``.step`` is what runs."""
    torch.manual_seed(0)
    where = torch.device(device)
    layout = torch.channels_last if in_channels_last(where, settings.get("bf16", False)) else torch.contiguous_format
    model = build_model("acm", output_bias=-4.0).to(where, memory_format=layout).train()
    step = TrainingStep(model, data.to(device), patch_size=patch, learning_rate=1e-3, **settings)
    labels = masks.to(device)

    def run(plan: Tensor) -> Tensor:
        torch.manual_seed(0)
        step(labels, plan)
        return step.totals

    run.step = step
    return run


def _bare_trainer(data: ImageSet, masks: Tensor, patch: int, plan: Tensor, device: str) -> Callable[[], Tensor]:
    """Forward, backward and optimiser on crops made beforehand; nothing is cut, counted or read. Gives the loss."""
    run = _trainer(data, masks, patch, device)
    images, labels = cut_crops(run.step.data, masks.to(device), plan.to(device), patch)
    if in_channels_last(run.step.device, False):
        images = images.contiguous(memory_format=torch.channels_last)

    def bare() -> Tensor:
        torch.manual_seed(0)
        loss = soft_iou_loss(run.step.model(images), labels)
        run.step.optimizer.zero_grad(set_to_none=True)
        loss.backward()
        run.step.optimizer.step()
        return loss

    bare.step = run.step
    return bare


def _state(step: TrainingStep) -> Tensor:
    """float32 [n]: the parameters after the calls so far, equal only where every step was; on a GPU the gradients.

    Adam's first step is the gradient's sign, so there the least change in a sum would show at full size.
    """
    values = step.model.parameters()
    if step.device.type != "cpu":
        values = (value.grad for value in values)
    return torch.cat([value.detach().flatten().cpu() for value in values])


def build_loader(*, batch: int, patch: int, data: str, size: int | None = None, gpu: str | None) -> Problem:
    train_set = training_set(data, None if size is None else 2 * batch, size)
    plan = draw_epoch(train_set.sizes, batch, patch, seed=0, epoch=0)[0]
    masks = point_to_mask(train_set.images, train_set.points, sizes=train_set.sizes)
    device = gpu or "cpu"
    moved, labels, rows = train_set.to(device), masks.to(device), plan.to(device)
    training, bare = _trainer(train_set, masks, patch, device), _bare_trainer(train_set, masks, patch, plan, device)

    def joined(pair: tuple[Tensor, Tensor]) -> Tensor:
        return torch.cat((pair[0].cpu(), pair[1].cpu().float()), dim=1)

    def expected() -> Tensor:
        bare()
        return _state(bare.step)

    common = {"device": device, "tolerance": GPU_TOLERANCE if gpu else 0.0, "ours": True}
    step_row = Row(STEP, lambda: training(rows), batch, lambda _: _state(training.step), expected, **common)
    table_rows = [
        Row("NumPy, image by image", lambda: peers.loop_crops(train_set, masks, plan, patch), batch, joined),
        Row(CROPS, lambda: cut_crops(moved, labels, rows, patch), batch, joined, **common),
        step_row,
    ]
    least = 2 * patch * patch + 5 * patch * patch  # read a byte of image and of mask, write float32 and bool
    return Problem(table_rows, STEP, least, f"{len(train_set)} images of {train_set.dataset} in memory")


def whole_images(batch: int) -> Tensor:
    """A plan whose crops begin in the corner of images 0 to ``batch`` - 1 and change nothing: int64 [B, 8]."""
    plan = torch.zeros((batch, len(PLAN)), dtype=torch.int64)
    plan[:, PLAN.index("image")], plan[:, PLAN.index("gain")] = torch.arange(batch), ONE
    return plan


def build_step(*, batch: int, data: str, weights: str, size: int | None = None, gpu: str | None) -> Problem:
    """Crops that are whole images, not flipped, so that points and initial masks fit the step's predictions."""
    device = gpu or "cpu"
    prediction, initial, points, said = predicted_scene(batch, weights, data, size)
    moved = [tensor.to(device) for tensor in (prediction, initial, points)]
    train_set, side = training_set(data, batch, size), prediction.shape[-1]
    plan = whole_images(batch)
    rows = plan.to(device)
    bare = _bare_trainer(train_set, initial, side, plan, device)
    alone, both = (_trainer(train_set, initial, side, device) for _ in range(2))

    def with_update() -> Tensor:
        both(rows)
        return update(*moved, radius=peers.RADIUS)

    def by_hand() -> Tensor:
        arrays = prediction.numpy(), initial.numpy(), peers.split_points(points, batch)
        return torch.from_numpy(peers.reference_update(*arrays))

    common = {"units": batch, "device": device, "tolerance": GPU_TOLERANCE if gpu else 0.0}
    table_rows = [
        Row(PLAIN_STEP, bare, read=lambda _: _state(bare.step), **common),
        Row(STEP, lambda: alone(rows), read=lambda _: _state(alone.step), ours=True, **common),
        Row("ACM training step, then the update", with_update, read=lambda _: _state(both.step), ours=True, **common),
        Row(OWN_UPDATE, lambda: update(*moved, radius=peers.RADIUS), expected=by_hand, ours=True, **common),
    ]
    return Problem(table_rows, STEP, None, describe(prediction, said))


def build_ways(*, batch: int, data: str, ways: Sequence[str], size: int | None = None, gpu: str | None) -> Problem:
    """The ways to run a step; all start from the same weights, so their first loss is compared."""
    device = gpu or "cpu"
    train_set = training_set(data, batch, size)
    masks = point_to_mask(train_set.images, train_set.points, sizes=train_set.sizes)
    plan = whole_images(batch)
    rows, patch = plan.to(device), 64 if size else 256
    bare = _bare_trainer(train_set, masks, patch, plan, device)
    table_rows = [Row(PLAIN_STEP, bare, batch, lambda loss: loss.detach().cpu()[None], device=device)]
    for way in ways:
        settings, tolerance = WAYS[way]
        try:
            run = _trainer(train_set, masks, patch, device, **settings)
        except InputError as error:
            table_rows.append(Row(f"ACM step, {way}", None, why=f"not measured: {error}"))
            continue
        common = {"device": device, "ours": True, "tolerance": tolerance}
        table_rows.append(Row(f"ACM step, {way}", lambda run=run: run(rows)[:1].float(), batch, **common))
    return Problem(table_rows, None, None, f"{batch} images of {train_set.dataset}")


# ---- masks from a store ---------------------------------------------------------------------------------------------


def build_store(*, images: int, data: str, size: int | None = None, gpu: str | None) -> Problem:
    train_set = training_set(data, images, size)
    extent = 10
    folder = tempfile.TemporaryDirectory(prefix="hmg_bench_")  # goes when the rows that hold it go
    store = Path(folder.name) / "set.h5"
    write_store(store, [train_set])

    def loop() -> Tensor:
        parts = [peers.reference_masks(image_set, extent) for image_set in iterate_store(store, "train", 1)]
        return torch.cat(parts)

    def batched(device: str, files: bool) -> Callable[[], Tensor]:
        def run() -> Tensor:
            parts = []
            for part in iterate_store(store, "train", 64):
                part = part.to(device)
                masks = point_to_mask(part.images, part.points, extent=extent, sizes=part.sizes).cpu()
                parts.append(masks)
                if files:
                    jobs = [(Path(folder.name) / f"{n}.png", mask) for n, mask in zip(part.names, masks, strict=True)]
                    for _ in map_files(lambda job: write_mask(*job), jobs):
                        pass
            return torch.cat(parts)

        return run

    def from_files(_: Tensor) -> Tensor:
        return torch.stack([torch.from_numpy(read_mask(Path(folder.name) / f"{name}.png")) for name in train_set.names])

    count = len(train_set)
    rows = [
        Row("NumPy reference, image by image", loop, count),
        Row(TORCH, batched("cpu", files=False), count, ours=True),
        Row("hmg_gpu, torch, and PNG files", batched("cpu", files=True), count, from_files, ours=True),
        Row(TRITON, None, why=NO_GPU),
        Row("hmg_gpu, Triton, and PNG files", None, why=NO_GPU),
    ]
    if gpu is not None:
        rows[3:] = [
            Row(TRITON, batched(gpu, files=False), count, ours=True),
            Row("hmg_gpu, Triton, and PNG files", batched(gpu, files=True), count, from_files, ours=True),
        ]
    side = train_set.images[0].numel()
    inputs = f"{count} images of {train_set.dataset}, {store.stat().st_size / 1e6:.1f} MB in the store"
    return Problem(rows, None, 2 * side, inputs)


# ---- the table ------------------------------------------------------------------------------------------------------

TOY = {"images": 3, "side": 48, "blobs": 2}
TOY_SET = {"size": 64}  # synthetic scenes of this side instead of the real set
TOY_BATCH = {"batch": 2, "size": 64}
COUNTS = (1, 10, 100, 1000, 10_000, 100_000)
NUDT, NUAA = "NUDT-SIRST", "NUAA-SIRST"
ACM_FULL, ACM_LESPS = "ACM_full.pth.tar", "ACM_LESPS_centroid.pth.tar"
REPEATED = "real targets in real images, the set repeated and clicked again where it has too few"

CASES = (
    # ---- one size, side by side
    Case("pmg-10", f"initial masks of 1,000 points, extent 10 (NUDT's): {REPEATED}", "points", build_pmg,
         {"points": 1000, "extent": 10, "data": NUDT}, {"points": 5} | TOY_SET, {TORCH: 6}),
    Case("pmg-25", f"initial masks of 1,000 points, extent 25 (the other sets'): {REPEATED}", "points", build_pmg,
         {"points": 1000, "extent": 25, "data": NUAA}, {"points": 5} | TOY_SET, {TORCH: 4}),
    Case("pmg-40", f"initial masks of 1,000 points, extent 40 (beyond the paper's): {REPEATED}", "points", build_pmg,
         {"points": 1000, "extent": 40, "data": NUAA}, {"points": 5} | TOY_SET),
    Case("labels", "components of 64 predictions, discs as an early network scatters them: 20 false alarms an image",
         "images", build_labels, {"images": 64, "side": 256, "blobs": 20}, TOY),
    Case("faf", "false alarm filter alone, 64 predictions with 20 false alarms an image, as early in training",
         "images", build_filter, {"images": 64, "side": 256, "blobs": 20}, TOY),
    Case("update-real", "whole update of 64 real training images, predicted by a finished network: one pass of stage 2",
         "images", build_real_update, {"images": 64, "weights": ACM_FULL, "data": NUDT}, {"images": 3} | TOY_SET,
         {SCIPY: 2}),
    Case("update-lesps", "the same from a network with more false alarms, trained on points",
         "images", build_real_update, {"images": 64, "weights": ACM_LESPS, "data": NUDT}, {"images": 3} | TOY_SET,
         {SCIPY: 2}),
    Case("update-20", "whole update of 64 predictions with 20 false alarms an image, as early in training",
         "images", build_update, {"images": 64, "side": 256, "blobs": 20}, TOY, {SCIPY: 6}),
    Case("metrics", "IoU, Pd and Fa of 64 pairs with 6 targets each, more than real images hold",
         "images", build_metrics, {"images": 64, "side": 256, "blobs": 6}, TOY, {SCIPY: 5}),
    Case("loader", "8 crops of 256 x 256 with flips and transposes, normalised, against the step that they feed",
         "images", build_loader, {"batch": 8, "patch": 256, "data": NUAA}, {"patch": 64} | TOY_BATCH,
         {CROPS: 0.05}, share=True),
    Case("step", "a training step of ACM, batch 8, and the update of its 8 images after each, far more than needed",
         "images", build_step, {"batch": 8, "data": NUDT, "weights": ACM_FULL}, TOY_BATCH,
         {OWN_UPDATE: 0.03}, share=True),
    Case("store", "masks of a packed set, read in batches of 64 from one HDF5 file, checksum included",
         "images", build_store, {"images": 256, "data": NUDT}, {"images": 3} | TOY_SET),
    # ---- how cost grows
    *(
        Case(f"points-{extent}", f"initial masks from 1 to 100,000 points, extent {extent}: {REPEATED}", "points",
             build_pmg, {"extent": extent, "data": NUDT if extent == 10 else NUAA}, TOY_SET,
             axis="points", values=COUNTS, axis_label="points")
        for extent in (10, 25, 40)
    ),
    Case("batch", "whole update, 1 to 256 images of 256 x 256 with 20 false alarms each", "images", build_update,
         {"side": 256, "blobs": 20}, {"side": 48, "blobs": 2},
         axis="images", values=(1, 4, 16, 64, 256), axis_label="images in the batch"),
    Case("size", "whole update of 8 images, 64 to 1024 pixels a side, the same false alarms for each pixel", "images",
         build_update, {"images": 8, "loops": 1}, {"images": 2},
         axis="side", values=(64, 128, 256, 512, 1024), work=lambda side: side * side / 1e6,
         axis_label="side of the image (pixels)"),
    Case("density", "whole update of 16 images of 256 x 256, from real density to half foreground, as before training",
         "images", build_update, {"images": 16, "side": 256}, {"images": 2, "side": 48},
         axis="density", values=(0.001, 0.003, 0.01, 0.03, 0.1, 0.3, 0.5), axis_label="foreground (share of pixels)"),
    # ---- long: only by name
    Case("step-ways", "the ways to run a training step of ACM, batch 8 of 256 x 256", "images", build_ways,
         {"batch": 8, "data": NUDT, "ways": tuple(WAYS)}, {"ways": ("eager", "eager bf16")} | TOY_BATCH, long=True),
    Case("million", f"initial masks from 1,000,000 points in at most 2,048 images: {REPEATED}", "points", build_pmg,
         {"points": 1_000_000, "data": NUDT}, {"points": 50} | TOY_SET,
         axis="extent", values=(10, 25, 40), axis_label="extent (pixels)", long=True),
)  # fmt: skip
