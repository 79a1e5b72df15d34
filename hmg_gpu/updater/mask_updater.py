"""MaskUpdater: what another trainer plugs in to train on points. It keeps the masks; the maths lives elsewhere.

updater = MaskUpdater.from_folder("NUAA-SIRST", "train")   # points -> initial masks, on the device
for images, masks in updater.loader(8, 256): ...           # or export() / as_list() for one's own data loader
updater.update(net)                                        # prediction -> hybrid masks, whenever one likes
"""

from __future__ import annotations

import math
import os
import warnings
from collections.abc import Callable, Sequence
from contextlib import closing
from functools import cached_property
from typing import Any

import numpy as np
import torch
from torch import Tensor, distributed, nn

from hmg_gpu.common.errors import InputError
from hmg_gpu.common.parallel import meet
from hmg_gpu.data.folder import load_folder
from hmg_gpu.data.record import Record, record_of
from hmg_gpu.data.sets import ImageSet
from hmg_gpu.data.store import load_store
from hmg_gpu.masks import AUTO, Evidence, Maker, Rule, State, Union, make_maker, make_rule, to_masks
from hmg_gpu.models.foreign import Head, Output, level_of, require_module, single, undisturbed, without_ddp
from hmg_gpu.models.predict import predict_logits, share
from hmg_gpu.updater.export import list_masks, write_masks
from hmg_gpu.updater.fused import can_fuse, correct_fused
from hmg_gpu.updater.loader import MaskLoader
from hmg_gpu.updater.report import ACTIVE, COLUMNS, ENTERED, HYBRID, PREDICTION, MaskChanges, fault_of, is_fault, judge
from hmg_gpu.updater.selection import Key, Selection
from hmg_gpu.updater.state import make_state, take_state

GUARD = 0.05


class MaskUpdater:
    """Points, initial masks and current masks of one set, on its device (HMG Sec. 3).

    Nothing of the caller is changed: random state, train/eval mode of every module, gradients, buffers, autocast and
    its cache stay as they are. Under ``torch.distributed`` every rank holds the whole set and makes the same calls.

    Args:
        data: images with points; on the device where everything happens.
        masks: what makes the initial masks: a name or a maker of :data:`hmg_gpu.masks.MAKERS`, such as "pmg" (the
            paper), "pmg:extent=10", "learned" (minutes on a CPU), "learned:FILE", "folder:PATH",
            or ``Pmg(extent="auto")``.
        rule: what corrects them: a name or a rule of :data:`hmg_gpu.masks.RULES`: "union" (the paper's MDR), "soft"
            (the maker's probabilities are kept beside the masks, 4 bytes a pixel; a bool prediction counts as 0 and
            1), or ``Union(radius=20)``. Rules of label evolution ("lesps", "pal", "lelcm") go on from what the update
            before left, so they want many updates. "auto": "soft" over learned masks, else "union".
        guard: a share of the image; a prediction with more foreground is not applied, the image's mask stays as it is,
            and a warning says so. The default is ten times what targets cover at most in NUAA-SIRST and NUDT-SIRST.
            None (the paper): no limit, so an all-foreground prediction can turn a whole image into foreground.

    Attributes:
        data: the set. maker, rule: as given, with all that depends on the data settled.
        settled: bool [N], the images whose masks the maker trusts.
        initial, masks: bool [N, H, W], False in the padding; ``initial`` never changes.
        labels: uint8 [N, H, W], the soft labels of a rule of label evolution, 255 is 1; ``masks`` is where they are
            above 0.5. None for other rules.
        active: bool [N], the images that such a rule lets be trained on; None for other rules.
        data_changed: what differs from the data of the states that were loaded, in words.

    Raises:
        InputError: no point in the whole set, or a setting out of range.

    Example:
        >>> from hmg_gpu.data.synthetic import make_split
        >>> scenes = make_split("train", count=4, size=64)
        >>> updater = MaskUpdater(scenes, masks="pmg:extent=10", guard=None)  # an untrained network
        >>> _ = updater.update(torch.nn.Conv2d(1, 1, 3, padding=1), "logits")
        >>> bool((updater.masks & updater.initial == updater.initial).all())
        True
    """

    def __init__(
        self,
        data: ImageSet,
        masks: str | Maker = "pmg",
        rule: str | Rule = AUTO,
        *,
        guard: float | None = GUARD,
    ):
        maker = make_maker(masks)
        self.rule = make_rule(rule, maker=maker)
        if maker.needs_points and len(data.points) == 0:
            raise InputError(f"{data.dataset} {data.split}: no point label in the whole set; check the points")
        if guard is not None and not 0 < guard <= 1:
            raise InputError(f"guard = {guard}: expected a share of the image above 0 and up to 1, or None")
        self.data, self.guard, self.data_changed = data, guard, []
        with torch.inference_mode(False):
            self.maker = maker.fit(data)
            self.initial, self._soft = self.maker.masks_and(data, soft=self.rule.soft)
            everyone = torch.ones(len(data), dtype=torch.bool, device=self.device)
            self.settled = self.maker.settled(data) if self.rule.pools else everyone
            self.restart()
            self._fault = torch.zeros(1, dtype=torch.bool, device=self.device)
            self._fault_seen = torch.zeros(1, dtype=torch.bool, pin_memory=self.device.type == "cuda")
        self._selection = Selection(data)
        self._promised: Output = "logits"  # of the last update

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

    @property
    def targets(self) -> Tensor:
        """What is trained on: ``labels`` where the rule says so (LESPS, LELCM), else ``masks``."""
        return self.labels if self.rule.soft_targets else self.masks

    @property
    def pool(self) -> Tensor | None:
        """The images to train on: int64 [n] on the CPU, read from the device; None: all.

        Raises:
            InputError: none is.
        """
        if not self.rule.pools:
            return None
        active = self.active.cpu()
        if len(active) and not bool(active.any()):
            raise InputError(f"rule {self.rule.name}: masks {self.maker.name} trust no image to start with; use others")
        return None if bool(active.all()) else active.nonzero()[:, 0]

    # --- updating ---

    def restart(self) -> None:
        """Masks, labels and pool as before the first update."""
        self.masks, self.labels, self.active = self.initial.clone(), None, None
        if self.rule.evolves:
            self.labels, self.active = self.rule.start(self.initial, self.settled)

    def update(
        self,
        net: nn.Module,
        output: Output,
        *,
        head: int | None = None,
        channels: int = 1,
        threshold: float = 0.5,
        batch_size: int = 8,
        padding: str = "least",
        autocast: bool = False,
        check: bool = True,
        at: tuple[int, int] = (0, 1),
        progress: Callable[[int], None] | None = None,
    ) -> MaskChanges:
        """Predict the whole set and correct every mask: initial OR FAF(prediction) (HMG Sec. 3.2), or as the rule says.

        Args:
            net: takes normalised [b, channels, h, w] in the dtype of its weights, h and w multiples of 32; may be
                wrapped by DistributedDataParallel or torch.compile. It runs in eval mode.
            output: what the network returns: "logits", "probabilities" (after a sigmoid), or a function that makes
                probabilities (or bool masks) of whatever it returns. A result larger than its input (padding) is
                cropped at the bottom and the right.
            head: which of several heads that the network returns in eval mode.
            channels: of the network's input; the image is repeated in each.
            threshold: probability above which a pixel is foreground.
            batch_size, padding, autocast: as :func:`hmg_gpu.models.predict.predict_logits`.
            check: look at the values before returning, which waits for the device; False: at the next call, or when
                the result is read.
            at: how many epochs after the first update lie behind, and how many there are in all; PAL's pool follows it.
            progress: called with the number of images of each batch.

        Returns:
            What changed; read from the device only when asked.

        Raises:
            InputError: the network is no module, is on another device, takes other channels, returns several heads and
                nobody says which, or something of another shape; or its values contradict ``output``: probabilities
                outside 0 to 1, logits that all lie within. No mask is changed then.
            HMGError: another rank does not make the same call.

        Under torch.distributed each rank predicts and corrects its share of the batches, with rank 0's buffers, and all
        ranks end with the same bits as a single process.
        """
        self._raise_fault()
        level = level_of(output, threshold)
        require_module(net)
        rank, ranks = meet("update")
        rows = share(self.data.host_sizes, rank, ranks, batch_size=batch_size, padding=padding)
        net = without_ddp(net)
        settings = {"batch_size": batch_size, "padding": padding, "autocast": autocast, "channels": channels}
        with undisturbed(net, self.device, ranks):
            planes = torch.zeros(self.masks.shape, dtype=torch.uint8, device=self.device)
            counts = torch.zeros(len(self), COLUMNS, dtype=torch.int64, device=self.device)
            labels = None if self.labels is None else torch.zeros_like(self.labels)
            with closing(predict_logits(Head(net, output, head), self.data, rows=rows, **settings)) as parts:
                for index, values in parts:
                    there = self._selection.on_device(index)
                    planes[there], counts[there], evolved = self._correct(index, values, level, output, at)
                    if labels is not None:
                        labels[there] = evolved
                    if progress is not None:
                        progress(len(index))
            if ranks > 1:  # every row was written by one rank, the others hold zeros there
                for part in (planes, counts) if labels is None else (planes, counts, labels):
                    distributed.all_reduce(part)
            before, fault = self.masks, is_fault(counts, output)
            self.masks = torch.where(fault, before, planes & HYBRID > 0)
            if labels is not None:
                self.labels = torch.where(fault, self.labels, labels)
                self.active = torch.where(fault, self.active, counts[:, ACTIVE] > 0)
            changes = self._changes(self.data, self.initial, before, self.masks, planes, counts, output)
        if check:
            self._look(changes, len(self))
        return changes

    def update_one(
        self,
        key: Key,
        prediction: Tensor | np.ndarray | Sequence[Tensor],
        output: Output,
        *,
        head: int | None = None,
        threshold: float = 0.5,
        check: bool = True,
        at: tuple[int, int] = (0, 1),
    ) -> MaskChanges:
        """Correct the masks of one image or of a batch by a prediction that the caller made.

        Args:
            key: an image's name (a path or file name is cut to its stem), its index, or a list, tuple or tensor of
                them, one for each image of the prediction.
            prediction: float, or bool after a threshold: [h, w], [b, h, w] or [b, 1, h, w], from the image's top left
                corner and at least of its size; up to 64 pixels of padding are cut off.
            output: as :meth:`update`; a function is called with ``prediction``.
            head, threshold, check, at: as :meth:`update`.

        Returns:
            What changed; its ``masks`` are the new masks in the shape of the prediction. Local to this process: under
            torch.distributed every rank must make the same calls.
        """
        self._raise_fault()
        level = level_of(output, threshold)
        index = self._selection.rows(key)
        with torch.inference_mode(False), torch.no_grad():
            if isinstance(prediction, np.ndarray):
                prediction = torch.from_numpy(np.array(prediction, order="C"))  # a view may be read-only or flipped
            values = single(prediction, output, head)
            shape = values.shape
            values = self._selection.planes(index, values.detach())
            planes, counts, labels = self._correct(index, values, level, output, at)
            there = self._selection.on_device(index)
            before, fault = self.masks[there], is_fault(counts, output)
            after = torch.where(fault, before, planes & HYBRID > 0)
            self.masks[there] = after
            if labels is not None:
                self.labels[there] = torch.where(fault, self.labels[there], labels)
                self.active[there] = torch.where(fault, self.active[there], counts[:, ACTIVE] > 0)
            part = ImageSet([], self.data.images[:0], self.data.sizes[there], self._selection.points(index))
            changes = self._changes(part, self.initial[there], before, after, planes, counts, output)
            like = torch.zeros(len(index), *shape[-2:], device=self.device)
            height, width = min(shape[-2], after.shape[1]), min(shape[-1], after.shape[2])
            like[:, :height, :width] = after[:, :height, :width].float()
            changes.masks = like.view(shape)
        if check:
            self._look(changes, len(index))
        return changes

    def _correct(
        self, index: list[int], values: Tensor, level: float, output: Output, at: tuple[int, int]
    ) -> tuple[Tensor, Tensor, Tensor | None]:
        """Of some images: planes uint8 [b, H, W] (bits HYBRID and PREDICTION), counts int64 [b, COLUMNS], and the
        labels uint8 [b, H, W] of a rule that evolves."""
        there = self._selection.on_device(index)
        size = self.data.sizes[there]  # [b, 2]
        if type(self.rule) is Union and can_fuse(values):
            points = self._selection.points(index), self._selection.offsets(index)
            settings = (*points, size, self.rule.radius, level, output, self.guard)
            return *correct_fused(values, self.initial[there], self.masks[there], *settings), None
        prediction, ignored, counts = judge(values, size, level, output, self.guard)
        probability, threshold = None, level
        if self.rule.by_probability:
            plain = output != "logits" or values.dtype == torch.bool
            probability = values.float() if plain else values.sigmoid()
            threshold = level if plain else 1 / (1 + math.exp(-level))
        current = self.masks[there]
        state = None if self.labels is None else State(self.labels[there], self.active[there])
        evidence = Evidence(
            prediction,
            self._selection.points(index),
            size,
            self.initial[there],
            current,
            probability,
            None if self._soft is None else self._soft[there],
            threshold,
            state,
            at,
        )
        kept = ignored[:, None, None]
        if state is None:
            labels = None
            hybrid = torch.where(kept, current, self.rule.correct(evidence))
        else:
            labels, active = self.rule.evolve(evidence)
            labels, active = torch.where(kept, state.labels, labels), torch.where(ignored, state.active, active)
            counts[:, ACTIVE], counts[:, ENTERED] = active, active & ~state.active
            hybrid = to_masks(labels)
        planes = hybrid.to(torch.uint8) * HYBRID + prediction.to(torch.uint8) * PREDICTION
        return planes, counts, labels

    def _changes(
        self,
        data: ImageSet,
        initial: Tensor,
        before: Tensor,
        after: Tensor,
        planes: Tensor,
        counts: Tensor,
        output: Output,
    ) -> MaskChanges:
        self._promised = output
        self._fault |= is_fault(counts, output)
        self._fault_seen.copy_(self._fault, non_blocking=True)  # arrives some time before it is looked at
        changed = (before ^ after).sum()
        settings = (data.points, data.sizes, self.rule, initial, planes, counts, changed)
        return MaskChanges(lambda: self._refuse(output), is_fault(counts, output), *settings)

    def _look(self, changes: MaskChanges, images: int) -> None:
        """Raise the fault of an update, and say in words what the guard held back."""
        self._check_fault()
        if self.guard is not None and changes.ignored:
            warnings.warn(
                f"update: the predictions of {changes.ignored} of {images} images cover more than "
                f"{100 * self.guard:g} % of the image and were not applied; the network may need more epochs first "
                "(guard=None applies them all the same)",
                stacklevel=3,
            )

    def _raise_fault(self) -> None:
        if bool(self._fault_seen):  # host memory: no synchronisation
            self._refuse(self._promised)

    def _refuse(self, output: Output) -> None:
        self._fault.zero_()  # told once; the next call may be right
        self._fault_seen.copy_(self._fault)  # waits: a copy still on its way would set it again
        raise fault_of(output)

    # --- masks for other loops ---

    def loader(self, batch_size: int, patch_size: int, *, seed: int = 0, **crops: float) -> MaskLoader:
        """Batches of (image, mask) on the device, with random crops, flips and transposes; see :class:`MaskLoader`.

        Args:
            crops: ``positive``, ``jitter`` and ``margin``, all of them 0 where not given, and ``hard_examples``.
        """
        return MaskLoader(self, batch_size, patch_size, seed, **crops)

    def export(self, folder: str | os.PathLike | list) -> None:
        """Write the current masks as ``folder/NAME.png`` (0 and 255), each beside the old file and renamed.

        A data loader's worker that reads at the same time sees the old file or the new one. A list is filled in place
        by :meth:`as_list` instead (LESPS with ``--cache True``). Under torch.distributed rank 0 writes and the others
        wait.
        """
        self._check_fault()
        if isinstance(folder, list):
            if len(folder) not in (0, len(self)):
                raise InputError(f"export: the list holds {len(folder)} masks, the set {len(self)} images")
            folder[:] = self.as_list()
            return
        if not isinstance(folder, (str, os.PathLike)):
            raise InputError(f"export: expected a folder or a list to fill, got {type(folder).__name__}")
        rank, ranks = meet("export")
        if rank == 0:
            write_masks(folder, self.data, self.masks)
        if ranks > 1:
            distributed.barrier()

    def as_list(self) -> list[np.ndarray]:
        """The current masks as float32 [h, w] of 0 and 1, one array an image, in the order of the set."""
        self._check_fault()
        return list_masks(self.data, self.masks)

    # --- state ---

    def state_dict(self) -> dict[str, Any]:
        """Everything an update depends on, copied, with a checksum; loads with ``weights_only=True``."""
        self._check_fault()
        return make_state(self._settings(), self._record, self._tensors(), self.data_changed)

    def load_state_dict(self, state: dict[str, Any], *, changed_data: bool = False) -> None:
        """Take up what :meth:`state_dict` gave.

        Args:
            changed_data: go on where points or pixels are others than those of the state; ``data_changed`` says so.

        Raises:
            InputError: it belongs to other data (the text says what differs), another maker, rule or settings, or is no
                such state; nothing is changed then.
        """
        own = (self._settings(), self._record, self._tensors())
        taken, self.data_changed = take_state(state, *own, changed_data=changed_data)
        self.initial, self.masks, self._soft = taken["initial"], taken["masks"], taken.get("soft")
        self.labels, self.active = taken.get("labels"), taken.get("active")

    @cached_property
    def _record(self) -> Record:
        return record_of(self.data)

    def _tensors(self) -> dict[str, Tensor]:
        names = {"initial": self.initial, "masks": self.masks, "soft": self._soft}
        names |= {"labels": self.labels, "active": self.active}
        return {name: value for name, value in names.items() if value is not None}

    def _settings(self) -> dict[str, Any]:
        return {"masks": self.maker.about(), "rule": self.rule.about(), "guard": self.guard}

    # --- helpers ---

    def _check_fault(self) -> None:
        """As ``_raise_fault``, for calls that read the device anyway."""
        self._fault_seen.copy_(self._fault)
        self._raise_fault()


def _device(name: str | torch.device | None) -> torch.device:
    return torch.device(name or ("cuda" if torch.cuda.is_available() else "cpu"))
