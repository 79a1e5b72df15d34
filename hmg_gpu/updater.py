"""MaskUpdater: what another trainer plugs in to train on points. It keeps the masks; the maths lives elsewhere.

updater = MaskUpdater.from_folder("NUAA-SIRST", "train")   # points -> initial masks, on the device
for images, masks in updater.loader(8, 256): ...           # or export() / as_list() for one's own data loader
updater.update(net)                                        # prediction -> hybrid masks, whenever one likes
"""

from __future__ import annotations

import math
import operator
import os
from collections.abc import Callable, Iterable, Sequence
from contextlib import closing
from typing import Any

import numpy as np
import torch
from torch import Tensor, distributed, nn

from .changes import HYBRID, OUTSIDE, PREDICTION, MaskChanges
from .data.folder import load_folder
from .data.images import map_files, write_mask
from .data.points import image_stem
from .data.sets import ImageSet
from .data.source import default_extent
from .data.store import load_store
from .errors import InputError
from .extent import choose_extent
from .guests import Head, Output, level_of, single, undisturbed, without_ddp
from .inference import predict_logits, share, to_device
from .mask_loader import MaskLoader
from .parallel import position
from .pmg import point_to_mask, point_to_probability
from .student import METHODS, Student
from .teaching import train_student
from .update import soft_update, update

Key = str | os.PathLike | int | Tensor | Sequence

FUSIONS = ("union", "soft")


class MaskUpdater:
    """Points, initial masks and current masks of one set, on its device (HMG Sec. 3).

    Nothing of the caller is changed: random state, train/eval mode of every module, gradients, buffers, autocast and
    its cache stay as they are. Under ``torch.distributed`` every rank holds the whole set and makes the same calls.

    Args:
        data: images with points; on the device where everything happens.
        extent: L_ep in pixels; None: the paper's for the data set (10 for NUDT-SIRST, else 25); "auto": chosen from
            images and points, see :func:`hmg_gpu.extent.choose_extent`.
        initial: where the initial masks come from: "pmg" (the paper); "learned": a student is trained on PMG's masks
            first (minutes on a CPU); or a :class:`hmg_gpu.student.Student`, which makes them at once.
        half_width: L_dp in pixels.
        alpha: weight of the point's intensity in B2M.
        radius: r of FAF in pixels.
        fusion: "union" (the paper's MDR), or "soft": :func:`hmg_gpu.soft_update` with PMG's probabilities, which are
            kept beside the masks (4 bytes a pixel); a bool prediction then counts as 0 and 1.
        guard: a share of the image; a prediction with more foreground is ignored and the image's mask stays as it is.
            None (the paper): no such limit, so an all-foreground prediction can turn a whole image into foreground.

    Attributes:
        data: the set. initial, masks: bool [N, H, W], False in the padding; ``initial`` never changes.

    Raises:
        InputError: no point in the whole set, or a setting out of range.
    """

    def __init__(
        self,
        data: ImageSet,
        *,
        extent: int | str | None = None,
        initial: str | Student = "pmg",
        half_width: int = 4,
        alpha: float = 0.15,
        radius: int = 30,
        fusion: str = "union",
        guard: float | None = None,
    ):
        if fusion not in FUSIONS:
            raise InputError(f"fusion {fusion!r}: expected one of {', '.join(FUSIONS)}")
        if len(data.points) == 0:
            raise InputError(f"{data.dataset} {data.split}: no point label in the whole set; check the points")
        if guard is not None and not 0 < guard <= 1:
            raise InputError(f"guard = {guard}: expected a share of the image above 0 and up to 1, or None")
        if extent is None:
            extent = default_extent(data.dataset)
        elif extent == "auto":
            extent = choose_extent(data, half_width=half_width, alpha=alpha)
        if not isinstance(initial, Student) and initial not in METHODS:
            raise InputError(f"initial {initial!r}: expected {', '.join(METHODS)}, or a Student")
        self.data, self.radius, self.guard = data, radius, guard
        self.settings = {"extent": extent, "half_width": half_width, "alpha": alpha}
        with torch.inference_mode(False):
            if initial == "pmg":
                self.initial = point_to_mask(data.images, data.points, sizes=data.sizes, **self.settings)
            else:
                initial = train_student(data, **self.settings) if initial == "learned" else initial
                self.initial = initial.masks(data, **self.settings)
            self.soft = self._soft_initial(initial) if fusion == "soft" else None
            self.masks = self.initial.clone()
            self._fault = torch.zeros(1, dtype=torch.bool, device=self.device)
            self._fault_seen = torch.zeros(1, dtype=torch.bool, pin_memory=self.device.type == "cuda")
        self._offsets = data.offsets.tolist()  # read once, as are the sizes, so that updates never have to
        self._sizes = data.host_sizes.tolist()
        self._row = {name: row for row, name in enumerate(data.names)}

    def _soft_initial(self, maker: str | Student) -> Tensor:
        if isinstance(maker, Student):
            return maker.soft_masks(self.data, **self.settings)
        return point_to_probability(self.data.images, self.data.points, sizes=self.data.sizes, **self.settings)

    @classmethod
    def from_folder(
        cls,
        root: str | os.PathLike,
        split: str = "train",
        points: Any = "masks_centroid",
        *,
        device: str | torch.device | None = None,
        dataset: str | None = None,
        normalisation: tuple[float, float] | None = None,
        **settings: Any,
    ) -> MaskUpdater:
        """From a folder in the layout of LESPS and BasicIRSTD; ground truth is not needed and not read.

        Args:
            root, split, points, dataset, normalisation: as :func:`hmg_gpu.data.load_folder`.
            device: None: the GPU where there is one.
            settings: as :class:`MaskUpdater`.
        """
        data = load_folder(root, split, points=points, masks=False, dataset=dataset, normalisation=normalisation)
        return cls(data.to(_device(device)), **settings)

    @classmethod
    def from_store(
        cls,
        path: str | os.PathLike,
        split: str = "train",
        points: str = "masks_centroid",
        *,
        device: str | torch.device | None = None,
        **settings: Any,
    ) -> MaskUpdater:
        """From a packed store; ``path``, ``split`` and ``points`` as :func:`hmg_gpu.data.load_store`."""
        return cls(load_store(path, split, points=points, masks=False).to(_device(device)), **settings)

    @classmethod
    def from_tensors(
        cls,
        images: Tensor,
        points: Tensor,
        *,
        sizes: Tensor | None = None,
        names: Sequence[str] | None = None,
        mean: float = 0.0,
        std: float = 1.0,
        **settings: Any,
    ) -> MaskUpdater:
        """From tensors that are there already, on their device and without a copy.

        Args:
            images: float32 or uint8 [N, H, W] or [N, 1, H, W]; normalised or not: PMG does not depend on it.
            points: int64 [P, 3], rows (image, y, x); ``torch.nonzero(point_mask)`` of a bool [N, H, W] gives them.
            sizes: int64 [N, 2], valid (height, width) where images share a padded batch.
            names: N names for ``update_one`` and ``export``; by default "0", "1", ...
            mean, std: what the network expects of ``images``: (image - mean) / std. The default: images as they come.
            settings: as :class:`MaskUpdater`.
        """
        images = images.detach()
        images = images.squeeze(1) if images.dim() == 4 and images.shape[1] == 1 else images
        if images.dim() != 3:
            raise ValueError(f"images: expected [N, H, W] or [N, 1, H, W], got {list(images.shape)}")
        if sizes is None:
            sizes = torch.tensor(images.shape[1:], device=images.device).expand(len(images), 2).contiguous()
        names = [str(row) for row in range(len(images))] if names is None else list(names)
        if len(names) != len(images) or len(set(names)) < len(names):
            raise InputError(f"names: expected {len(images)} different names, got {len(names)}")
        points = points[points[:, 0].argsort(stable=True)] if points.dim() == 2 and len(points) else points
        return cls(ImageSet(names, images.contiguous(), sizes, points, mean=mean, std=std), **settings)

    def __len__(self) -> int:
        return len(self.data)

    @property
    def device(self) -> torch.device:
        return self.data.images.device

    # --- updating ---

    def update(
        self,
        net: nn.Module,
        output: Output = "logits",
        *,
        threshold: float = 0.5,
        batch_size: int = 8,
        padding: str = "least",
        autocast: bool = False,
        progress: Callable[[int], None] | None = None,
    ) -> MaskChanges:
        """Predict the whole set and correct every mask: initial OR FAF(prediction) (HMG Sec. 3.2).

        Args:
            net: takes normalised float32 [b, 1, h, w], h and w multiples of 32; may be wrapped by
                DistributedDataParallel or torch.compile. It runs in eval mode.
            output: what the network returns: "logits", "probabilities" (after a sigmoid), or a function that makes
                probabilities (or bool masks) of whatever it returns. Of a list or tuple of heads the last is used; a
                result larger than its input (padding) is cropped at the bottom and the right.
            threshold: probability above which a pixel is foreground.
            batch_size, padding, autocast: as :func:`hmg_gpu.inference.predict_logits`.
            progress: called with the number of images of each batch.

        Returns:
            What changed; read from the device only when asked. If probabilities were promised and some value lay
            outside [0, 1], no mask is changed, and reading the result (or a later call) raises.

        Under torch.distributed each rank predicts and corrects its share of the batches, with rank 0's buffers, and all
        ranks end with the same bits as a single process.
        """
        self._raise_fault()
        level = level_of(output, threshold)
        rank, ranks = position()
        rows = share(self.data.host_sizes, rank, ranks, batch_size=batch_size, padding=padding)
        net = without_ddp(net)
        settings = {"batch_size": batch_size, "padding": padding, "autocast": autocast}
        with undisturbed(net, self.device, ranks):
            planes = torch.zeros(self.masks.shape, dtype=torch.uint8, device=self.device)
            counts = torch.zeros(len(self), 3, dtype=torch.int64, device=self.device)
            with closing(predict_logits(Head(net, output), self.data, rows=rows, **settings)) as parts:
                for index, values in parts:
                    there = self._to_device(index)
                    planes[there], counts[there] = self._correct(index, values, level, output != "logits")
                    if progress is not None:
                        progress(len(index))
            if ranks > 1:  # every row was written by one rank, the others hold zeros there
                distributed.all_reduce(planes)
                distributed.all_reduce(counts)
            before = self.masks
            self.masks = torch.where((counts[:, OUTSIDE] > 0).any(), before, planes & HYBRID > 0)
            return self._changes(self.data, self.initial, before, self.masks, planes, counts)

    def update_one(
        self, key: Key, prediction: Tensor | Sequence[Tensor], output: Output = "logits", *, threshold: float = 0.5
    ) -> MaskChanges:
        """Correct the masks of one image or of a batch by a prediction that the caller made.

        Args:
            key: an image's name (a path or file name is cut to its stem), its index, or a list, tuple or tensor of
                them, one for each image of the prediction.
            prediction: float, or bool after a threshold: [h, w], [b, h, w] or [b, 1, h, w], from the image's top left
                corner and at least of its size; what lies beyond is cut off. Of a list of heads the last is used.
            output: as :meth:`update`; a function is called with ``prediction``.
            threshold: as :meth:`update`.

        Returns:
            What changed; its ``masks`` are the new masks in the shape of the prediction. Local to this process: under
            torch.distributed every rank must make the same calls.
        """
        self._raise_fault()
        level = level_of(output, threshold)
        index = self._index(key)
        with torch.inference_mode(False), torch.no_grad():
            values = single(prediction, output)
            shape = values.shape
            values = self._planes(index, values.detach())
            planes, counts = self._correct(index, values, level, output != "logits")
            there = self._to_device(index)
            before = self.masks[there]
            after = torch.where((counts[:, OUTSIDE] > 0).any(), before, planes & HYBRID > 0)
            self.masks[there] = after
            part = ImageSet([], self.data.images[:0], self.data.sizes[there], self._points(index))
            changes = self._changes(part, self.initial[there], before, after, planes, counts)
            like = torch.zeros(len(index), *shape[-2:], device=self.device)
            height, width = min(shape[-2], after.shape[1]), min(shape[-1], after.shape[2])
            like[:, :height, :width] = after[:, :height, :width].float()
            changes.masks = like.view(shape)
        return changes

    def _correct(self, index: list[int], values: Tensor, level: float, bounded: bool) -> tuple[Tensor, Tensor]:
        """Planes uint8 [b, H, W] (bits HYBRID and PREDICTION) and counts int64 [b, 3] of some images."""
        values = self._planes(index, values)
        there = self._to_device(index)
        size = self.data.sizes[there]  # [b, 2]
        rows = torch.arange(values.shape[1], device=self.device)[None, :, None] < size[:, 0, None, None]
        columns = torch.arange(values.shape[2], device=self.device)[None, None, :] < size[:, 1, None, None]
        inside = rows & columns
        if values.dtype == torch.bool:
            prediction = values & inside
            non_finite = outside = torch.zeros_like(size[:, 0])
        else:
            prediction = (values > level) & inside  # NaN is background
            non_finite = (~values.isfinite() & inside).sum((1, 2))
            outside = (((values < 0) | (values > 1)) & inside).sum((1, 2)) * int(bounded)
        ignored = torch.zeros_like(outside, dtype=torch.bool)
        if self.guard is not None:
            ignored = prediction.sum((1, 2)) > self.guard * size.prod(1)
            prediction = prediction & ~ignored[:, None, None]
        if self.soft is None:
            hybrid = update(prediction, self.initial[there], self._points(index), radius=self.radius, sizes=size)
        else:
            plain = bounded or values.dtype == torch.bool
            hybrid = soft_update(
                values.float() if plain else values.sigmoid(),
                self.soft[there],
                self._points(index),
                radius=self.radius,
                threshold=level if plain else 1 / (1 + math.exp(-level)),
                sizes=size,
            )
        hybrid = torch.where(ignored[:, None, None], self.masks[there], hybrid)
        planes = hybrid.to(torch.uint8) * HYBRID + prediction.to(torch.uint8) * PREDICTION
        return planes, torch.stack((non_finite, outside, ignored.long()), dim=1)

    def _changes(
        self, data: ImageSet, initial: Tensor, before: Tensor, after: Tensor, planes: Tensor, counts: Tensor
    ) -> MaskChanges:
        fault = (counts[:, OUTSIDE] > 0).any()
        self._fault |= fault
        self._fault_seen.copy_(self._fault, non_blocking=True)  # arrives some time before it is looked at
        changed = (before ^ after).sum()
        return MaskChanges(self._refuse, data.points, data.sizes, self.radius, initial, planes, counts, changed)

    def _raise_fault(self) -> None:
        if bool(self._fault_seen):  # host memory: no synchronisation
            self._refuse()

    def _refuse(self) -> None:
        self._fault.zero_()  # told once; the next call may be right
        self._fault_seen.zero_()
        raise InputError(
            "update: probabilities were promised but some values lie outside 0 to 1, so no mask was changed; "
            'pass output="logits", or a function that ends in a sigmoid'
        )

    # --- masks for other loops ---

    def loader(self, batch_size: int, patch_size: int, *, seed: int = 0) -> MaskLoader:
        """Batches of (image, mask) on the device, with random crops, flips and transposes; see :class:`MaskLoader`."""
        return MaskLoader(self, batch_size, patch_size, seed)

    def export(self, folder: str | os.PathLike) -> None:
        """Write the current masks as ``folder/NAME.png`` (0 and 255), each beside the old file and renamed.

        A data loader's worker that reads at the same time sees the old file or the new one. Under torch.distributed
        rank 0 writes and the others wait.
        """
        self._check_fault()
        rank, ranks = position()
        if rank == 0:
            masks = self.masks.cpu().numpy()
            sizes = self.data.host_sizes.tolist()

            def write(row: int) -> None:
                height, width = sizes[row]
                write_mask(os.path.join(folder, f"{self.data.names[row]}.png"), masks[row, :height, :width])

            for _ in map_files(write, range(len(self))):
                pass
        if ranks > 1:
            distributed.barrier()

    def as_list(self) -> list[np.ndarray]:
        """The current masks as float32 [h, w] of 0 and 1, one array an image, in the order of the set."""
        self._check_fault()
        masks = self.masks.cpu().numpy()
        sizes = self.data.host_sizes.tolist()
        return [masks[row, :height, :width].astype(np.float32) for row, (height, width) in enumerate(sizes)]

    # --- state ---

    def state_dict(self) -> dict[str, Any]:
        """Everything an update depends on; loads with ``weights_only=True``. As in torch, tensors are not copied."""
        self._check_fault()
        return {
            "names": list(self.data.names),
            "settings": self._all_settings(),
            "points": self.data.points,
            "initial": self.initial,
            "masks": self.masks,
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take up what :meth:`state_dict` gave.

        Raises:
            InputError: it belongs to other images, points or settings, or is no such state; nothing is changed then.
        """
        if not isinstance(state, dict) or state.keys() != {"names", "settings", "points", "initial", "masks"}:
            raise InputError("state: expected what MaskUpdater.state_dict() gives; the names in it are others")
        if state["settings"] != self._all_settings():
            raise InputError(
                f"state: its settings are {state['settings']}, this updater's {self._all_settings()}; use the same"
            )
        if state["names"] != self.data.names:
            raise InputError(
                f"state: belongs to {len(state['names'])} other images, this updater has {len(self)}; "
                "load the same split in the same order"
            )
        if not torch.equal(state["points"].to(self.device), self.data.points):
            raise InputError("state: the points are others; load the same point labels")
        for name in ("initial", "masks"):
            mask = state[name]
            if mask.dtype != torch.bool or mask.shape != self.masks.shape:
                raise InputError(
                    f"state: {name} is {mask.dtype} {list(mask.shape)}, expected bool {list(self.masks.shape)}; "
                    "the images have changed"
                )
        self.initial, self.masks = (
            state[name].to(self.device, copy=True, memory_format=torch.contiguous_format)
            for name in ("initial", "masks")
        )

    def _all_settings(self) -> dict[str, Any]:
        fusion = "union" if self.soft is None else "soft"
        return self.settings | {"radius": self.radius, "fusion": fusion, "guard": self.guard}

    # --- helpers ---

    def _check_fault(self) -> None:
        """As ``_raise_fault``, for calls that read the device anyway."""
        self._fault_seen.copy_(self._fault)
        self._raise_fault()

    def _index(self, key: Key) -> list[int]:
        if isinstance(key, Tensor):
            key = key.reshape(-1).tolist()
        elif isinstance(key, (str, os.PathLike)) or not isinstance(key, Iterable):
            key = [key]
        index = [self._find(one) for one in key]
        if len(set(index)) < len(index):
            raise InputError(f"update_one: {self.data.names[max(index, key=index.count)]} comes twice in one batch")
        return index

    def _find(self, key: str | os.PathLike | int | Tensor) -> int:
        if isinstance(key, (str, os.PathLike)):
            name = os.fspath(key)
            name = name if name in self._row else image_stem(name)
            if name not in self._row:
                raise InputError(f"update_one: no image {os.fspath(key)!r}; the set has {self.data.names[0]} ...")
            return self._row[name]
        try:
            row = operator.index(key)
        except TypeError:
            raise InputError(f"update_one: {key!r} is neither a name nor an index") from None
        if not 0 <= row < len(self):
            raise InputError(f"update_one: image {row} does not exist; the set has 0 to {len(self) - 1}")
        return row

    def _planes(self, index: list[int], values: Tensor) -> Tensor:
        """A prediction on the device, in the height and width of the set: [b, H, W], bool or float32."""
        values = values.squeeze(1) if values.dim() == 4 and values.shape[1] == 1 else values
        values = values[None] if values.dim() == 2 else values
        if values.dim() != 3 or len(values) != len(index):
            raise InputError(
                f"prediction: expected [{len(index)}, 1, h, w] for {len(index)} images, got {list(values.shape)}"
            )
        if values.dtype != torch.bool and not values.is_floating_point():
            raise InputError(f"prediction: expected floating point or bool, got {values.dtype}; do not round it")
        tall, wide = (max(self._sizes[row][axis] for row in index) if index else 0 for axis in (0, 1))
        height, width = values.shape[1:]
        if height < tall or width < wide:
            raise InputError(
                f"prediction: {height} x {width} is smaller than {self.data.names[index[0]]} and its batch "
                f"({tall} x {wide}, height x width); predictions are never resized: give the full size"
            )
        values = values.to(self.device)
        values = values if values.dtype == torch.bool else values.float()
        if values.shape[1:] == self.masks.shape[1:]:
            return values
        planes = values.new_zeros(len(index), *self.masks.shape[1:])
        height, width = min(height, planes.shape[1]), min(width, planes.shape[2])
        planes[:, :height, :width] = values[:, :height, :width]
        return planes

    def _points(self, index: list[int]) -> Tensor:
        """The points of some images, renumbered; their rows are worked out on the CPU."""
        spans = [(self._offsets[row], self._offsets[row + 1]) for row in index]
        rows = torch.tensor([row for first, last in spans for row in range(first, last)], dtype=torch.int64)
        image = torch.tensor([place for place, (first, last) in enumerate(spans) for _ in range(first, last)])
        there, image = to_device(rows, self.device), to_device(image.long(), self.device)
        return torch.cat((image[:, None], self.data.points[there, 1:]), dim=1)

    def _to_device(self, index: list[int]) -> Tensor:
        return to_device(torch.tensor(index, dtype=torch.int64), self.device)


def _device(name: str | torch.device | None) -> torch.device:
    return torch.device(name or ("cuda" if torch.cuda.is_available() else "cpu"))
