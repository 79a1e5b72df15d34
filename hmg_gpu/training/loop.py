"""The two-stage loop (HMG Sec. 4): train on initial masks, correct them with the network's predictions, train again.

Every crop is a pure function of (seed, stage, epoch, step) and the state is saved whole, so a run that stopped anywhere
goes on to the same bits on the same machine. Inside an epoch nothing is read from the device.

Several processes (a :class:`~hmg_gpu.common.parallel.Team`) make the same calls; each trains on its rows of a batch.
"""

from __future__ import annotations

import copy
import math
import time
from collections.abc import Callable
from pathlib import Path
from shlex import quote
from typing import Any

import torch
from torch import Tensor, nn

from hmg_gpu.common.errors import HMGError, InputError
from hmg_gpu.common.parallel import ALONE, Team
from hmg_gpu.common.tensors import to_device
from hmg_gpu.data.batches import draw_epoch, mix_seed
from hmg_gpu.data.record import record_of
from hmg_gpu.data.sets import ImageSet
from hmg_gpu.evaluation.metrics import measure
from hmg_gpu.masks import Maker
from hmg_gpu.masks.update import corrections
from hmg_gpu.models import build_model
from hmg_gpu.models.predict import predict
from hmg_gpu.training.saving import describe, take_up, write
from hmg_gpu.training.settings import Settings
from hmg_gpu.training.step import TrainingStep, centres, check_step, in_channels_last, synchronised
from hmg_gpu.training.watch import diagnose, watch_labels
from hmg_gpu.updater import MaskUpdater
from hmg_gpu.updater.report import MaskChanges

STAGES = ("stage 1", "stage 2")


class StopRequest(HMGError):
    """The run was asked to stop; its state is saved.

    Example:
        >>> raise StopRequest("stopped and saved")
        Traceback (most recent call last):
        hmg_gpu.training.loop.StopRequest: stopped and saved
    """


class Training:
    """One run: its data, masks, network and position. ``run`` carries it to the end.

    Args:
        settings: decides the result.
        train: training images with points, and ground truth where there is any, on the device to train on.
        test: test images with ground truth on the same device, or None.
        folder: where checkpoints go.
        report: called with every event as a dict with the key ``event``: "step" (position only), "epoch" (a row of the
            log), "student" (its position), "message" and "note" (plain words), "masks" (table of the stage border),
            "test" (metrics on the test set).
        team: the processes that share the work. Every rank holds the whole set and reports every event; rank 0 alone
            writes files. Weights, masks and numbers are the same on all ranks, but not those of another number of
            ranks: on the CPU batch norm sees a rank's own rows only, and dropout is drawn by every rank for itself.

    Example:
        >>> import tempfile, pathlib
        >>> from hmg_gpu.data.synthetic import make_split
        >>> scenes = make_split("train", count=4, size=64)
        >>> settings = Settings(epochs=(1, 0), batch_size=2, patch_size=32, extent=10)
        >>> training = Training(settings, scenes, None, pathlib.Path(tempfile.mkdtemp()), lambda event: None)
        >>> sorted(training.run()["masks"])  # initial masks, stage 1, correction
        ['filtered', 'hybrid', 'initial', 'prediction']
    """

    def __init__(
        self,
        settings: Settings,
        train: ImageSet,
        test: ImageSet | None,
        folder: Path,
        report: Callable[[dict[str, Any]], None],
        team: Team = ALONE,
    ):
        self.settings, self.train, self.test, self.folder, self.report = settings, train, test, folder, report
        self.device, self.team = train.images.device, team
        if len(train) == 0:
            raise InputError(f"{train.dataset} {train.split}: no image to train on; check the split file")
        if settings.supervision == "full" and train.masks is None:
            raise InputError(f"{train.dataset}: full supervision needs ground-truth masks; use --supervision points")
        if settings.supervision == "points" and len(train.points) == 0:
            raise InputError(f"{train.dataset} {train.split}: no point label in the whole set; check --points")
        if settings.batch_size % team.ranks or settings.batch_size < 2 * team.ranks:
            raise InputError(
                f"batch_size = {settings.batch_size}: expected a multiple of the {team.ranks} processes, "
                "with at least 2 images for each"
            )
        check_step(settings.step, self.device, team)
        self.stop = False
        self.stage, self.epoch, self.step = 0, 0, 0
        self.over = False  # whether stage 1 ends before its epochs do, see Settings.start
        self.results: dict[str, Any] = {}
        self.warned: list[str] = []
        self.data_changed: list[str] = []  # since the run began, in words
        self.updater: MaskUpdater | None = None
        if settings.supervision == "points":
            self.updater = MaskUpdater(train, self._maker(), settings.correction(), guard=None)
            team.same([self.updater.initial.view(torch.uint8), self.updater.settled.view(torch.uint8)])
            self.updater.restart()
            self._tell_pool("images whose masks the maker trusts start in the pool")
        self._points = train.points.cpu() if self.updater else centres(train)
        self._wants_corrected = settings.hard_examples > 0 and settings.epochs[1] > 0
        self.corrected = self._points[:0]  # where stage 2 sees hard examples: int64 [A, 3] on the CPU
        self.record = record_of(train, self.masks)
        self._new_network()

    def _maker(self) -> Maker:
        """What makes the initial masks, fitted to the training set by one rank; a student is kept in ``folder``."""
        maker = self.settings.maker()

        def report(done: int, total: int) -> None:
            self.report({"event": "student", "step": done, "of": total})

        def fit() -> None:
            maker.fit(self.train, folder=self.folder, progress=report)

        self.team.first(fit)
        fitted = maker.fit(self.train, folder=self.folder)
        self.report({"event": "note", "text": f"initial masks: {fitted}"})
        return fitted

    @property
    def masks(self) -> Tensor:
        """The masks now: bool [N, H, W]."""
        return self.train.masks if self.updater is None else self.updater.masks

    @property
    def targets(self) -> Tensor:
        """What is trained on now: ``masks``, or uint8 [N, H, W] soft labels where the rule says so."""
        return self.train.masks if self.updater is None else self.updater.targets

    @property
    def totals(self) -> Tensor:
        """What was counted since the epoch began, see ``hmg_gpu.training.step.COUNTS``; this rank's part of the sum."""
        return self.training_step.totals

    # --- the loop ---

    def run(self) -> dict[str, Any]:
        """Train from the present position to the end.

        Returns:
            The results: ``masks`` (table of the stage border) and ``stage 1``, ``stage 2`` (test metrics).

        Raises:
            StopRequest: ``stop`` was set; the state is saved at the exact step.
            HMGError: the loss is no longer finite; the last good checkpoint is kept.
        """
        self.train_stage(1)
        self.correct()
        self.train_stage(2)
        return self.results

    def train_stage(self, number: int) -> None:
        """Train stage 1 or 2 from the present position to its end; nothing where it lies behind.

        Raises:
            StopRequest, HMGError: as :meth:`run`.
        """
        settings = self.settings
        if self.stage != number - 1:
            return
        epochs, every = settings.epochs[self.stage], settings.update_every if number == 2 else 0
        while self.epoch < epochs and not self.over:
            loss = self.train_epoch()
            self.epoch, self.step = self.epoch + 1, 0
            self.totals.zero_()
            self.over = number == 1 and settings.start == "loss" and loss < settings.loss_below
            last = self.over or self.epoch == epochs
            if self.epoch % settings.eval_every == 0 and not last:
                self._evaluate(final=False)
            if every and self.epoch % every == 0 and not last:
                self._update_masks()
            stop = self.team.any(self.stop)
            if stop or (self.epoch % settings.save_every == 0 and not last):
                self.save()
            if stop:
                self._leave()
        self._evaluate(final=True)
        if number == 2:
            self._close_stage()

    def correct(self) -> None:
        """Between the stages: correct the masks by the network of stage 1 (HMG Sec. 3.2); nothing in stage 2."""
        if self.stage != 0:
            return
        if self.updater is not None:
            changes = self._update_masks()
            kinds = {"initial": self.updater.initial, "prediction": changes.prediction, "filtered": changes.filtered}
            kinds["hybrid"] = self.updater.masks
            if self.train.masks is not None:
                self.results["masks"] = {name: measure(masks, self.train) for name, masks in kinds.items()}
            position = {"stage": self.stage + 1, "epoch": self.epoch}
            self.report({"event": "masks", **position, "masks": kinds, "metrics": self.results.get("masks")})
        elif self._wants_corrected:
            self._find_corrected(self._predict(self.train))
        self._close_stage()

    def train_epoch(self) -> float:
        """Train an epoch from the present step to its end; its mean loss."""
        settings, team = self.settings, self.team
        pool = None if self.updater is None else self.updater.pool
        seed = mix_seed(settings.seed, self.stage)
        plan = draw_epoch(
            self.train.host_sizes,
            settings.batch_size,
            settings.patch_size,
            seed=seed,
            epoch=self.epoch,
            positive=settings.positive[self.stage],
            points=self._points,
            images=pool,
            jitter=settings.jitter,
            margin=settings.margin,
            places=self.corrected,
            hard_examples=settings.hard_examples,
        ).tensor_split(team.ranks, dim=1)[team.rank]
        plan = to_device(plan.contiguous(), self.device)  # [steps, B / ranks, 8]
        rate = 0.5 * settings.learning_rate * (1 + math.cos(math.pi * self.epoch / settings.epochs[self.stage]))
        self.training_step.set_rate(rate)
        self.model.train()
        rank_seed = (team.rank,) if team.rank else ()
        start, first = time.perf_counter(), self.step
        while self.step < len(plan):
            # Dropout is a function of the position, too.
            torch.manual_seed(mix_seed(seed, self.epoch, self.step, *rank_seed))
            self.training_step(self.targets, plan[self.step])
            self.step += 1
            self.report({"event": "step", "stage": self.stage, "epoch": self.epoch, "step": self.step, "of": len(plan)})
            # After the last step, the epoch is brought to its end first.
            if self.step < len(plan) and team.any(self.stop):
                self.save()
                self._leave()

        loss, intersection, union, foreground, pixels = team.add(self.totals.clone()).tolist()
        seconds = time.perf_counter() - start
        row = {
            "event": "epoch",
            "stage": self.stage + 1,
            "epoch": self.epoch + 1,
            "loss": loss / len(plan),
            "iou": intersection / union if union else float("nan"),
            "foreground": foreground / pixels,
            "learning_rate": rate,
            "images_per_second": (len(plan) - first) * settings.batch_size / seconds,
            "seconds": seconds,
        }
        if self.updater is not None and self.updater.rule.pools:
            row["pool"] = len(self.train if pool is None else pool)
        self.report(row)
        if not math.isfinite(loss):
            last = self.folder / "last.safetensors"
            kept = f"{last} keeps the last good state" if last.exists() else "no checkpoint had been written yet"
            raise HMGError(
                f"the loss is no longer finite in {STAGES[self.stage]}, epoch {self.epoch + 1}; {kept}; "
                "try a lower --learning-rate or leave out --bf16"
            )
        self._diagnose(row)
        return row["loss"]

    def _leave(self) -> None:
        raise StopRequest(f"stopped and saved; go on with: python train.py --resume {quote(str(self.folder))}")

    def _close_stage(self) -> None:
        self.stage, self.epoch, self.step, self.over = self.stage + 1, 0, 0, False
        self.totals.zero_()
        self.save(f"stage{self.stage}.safetensors", weights_only=True)
        if self.settings.epochs[1] == 0:
            self.stage = 2  # there is no stage 2: its network and results would be nobody's
        elif self.stage == 1 and self.settings.stage2 == "scratch":
            self._new_network()
        elif self.stage == 1:
            self._new_optimizer()
        self.save()

    def _update_masks(self) -> MaskChanges:
        """The masks by the rule and the network's present predictions (HMG Sec. 3.2)."""
        self._share_statistics()
        at = (self.epoch if self.stage else 0, max(1, self.settings.epochs[1]))
        how = {"head": -1, "autocast": self.settings.bf16, "at": at, "check": False}
        before = self.masks
        changes = self.updater.update(self.network, "logits", **how)
        line, warning = watch_labels(self.train, before, self.masks)
        position = {"stage": self.stage + 1, "epoch": self.epoch}
        self.report({"event": "note", "text": f"{STAGES[self.stage]}, epoch {self.epoch}: {line}"})
        if warning:
            self.report({"event": "message", **position, "text": f"{STAGES[self.stage]}: {warning}"})
        self._tell_pool("images are trained on from now on")
        if self._wants_corrected:
            self._find_corrected(changes.prediction)
        return changes

    def _find_corrected(self, prediction: Tensor) -> None:
        """Hard examples: where FAF and MDR correct a prediction of the training images (HMG Sec. 3.2)."""
        initial = self.train.masks if self.updater is None else self.updater.initial
        where = {"radius": self.settings.radius, "sizes": self.train.sizes}
        found = corrections(prediction, initial, self._points.to(self.device), **where)
        self.corrected = torch.cat(found).cpu()
        images = len(self.corrected[:, 0].unique())
        words = "{} false alarms and {} missed targets".format(*map(len, found))
        text = f"{STAGES[self.stage]}: {words} in {images} training images" + (" are shown again" if images else "")
        self.report({"event": "note", "text": text})

    def _tell_pool(self, words: str) -> None:
        """Say how many images are trained on, where a rule lets some wait."""
        if self.updater.rule.pools:
            pool = self.updater.pool
            count = len(self.train if pool is None else pool)
            self.report({"event": "note", "text": f"{count} of {len(self.train)} {words}"})

    def _predict(self, data: ImageSet) -> Tensor:
        self._share_statistics()
        # The statistics of the training set belong to the network and are used on the test set, too.
        normalisation = {"mean": self.train.mean, "std": self.train.std}
        return predict(self.network, data, autocast=self.settings.bf16, team=self.team, **normalisation)

    def _share_statistics(self) -> None:
        """The running statistics of batch norm are rank 0's on all ranks; while training, nothing depends on them."""
        self.team.same(self.model.buffers())
        if self.averaged is not None:
            self.team.same(self.averaged.buffers())

    def _evaluate(self, *, final: bool) -> None:
        if self.test is None or self.test.masks is None or len(self.test) == 0:
            return
        prediction = self._predict(self.test)
        metrics = measure(prediction, self.test)
        if final:
            self.results[STAGES[self.stage]] = metrics
        self.report(
            {"event": "test", "stage": self.stage + 1, "epoch": self.epoch, "final": final, **metrics}
            | ({"prediction": prediction} if final else {})
        )

    def _diagnose(self, row: dict[str, Any]) -> None:
        """Say in plain words, once per stage and kind, that a network does not learn."""
        if row["epoch"] < max(1, self.settings.epochs[self.stage] // 10):
            return
        for kind, words in diagnose(row).items():
            key = f"{self.stage} {kind}"
            if key not in self.warned:
                self.warned.append(key)
                text = f"{STAGES[self.stage]}: {words}"
                self.report({"event": "message", "stage": row["stage"], "epoch": row["epoch"], "text": text})

    # --- state ---

    @property
    def network(self) -> nn.Module:
        """The network that predicts: the trained one, or the moving average of its weights."""
        return self.model if self.averaged is None else self.averaged

    def _new_network(self) -> None:
        torch.manual_seed(mix_seed(self.settings.seed, 1000 + self.stage))
        bias = self.settings.output_bias
        model = build_model(self.settings.model, output_bias=bias).to(self.device)
        model = synchronised(model, self.device, self.team)
        channels_last = in_channels_last(self.device, self.settings.bf16)
        self.model: nn.Module = model.to(memory_format=torch.channels_last) if channels_last else model
        with torch.no_grad():
            self.team.same(self.model.state_dict().values())
        self.averaged = copy.deepcopy(self.model).requires_grad_(False).eval() if self.settings.average else None
        self._new_optimizer()

    def _new_optimizer(self) -> None:
        settings = self.settings
        self.training_step = TrainingStep(
            self.model,
            self.train,
            patch_size=settings.patch_size,
            learning_rate=settings.learning_rate,
            loss=settings.loss,
            bf16=settings.bf16,
            way=settings.step,
            team=self.team,
            averaged=self.averaged,
            keep=settings.average,
        )
        self.optimizer = self.training_step.optimizer

    def describe(self) -> dict[str, Any]:
        """What a checkpoint says about itself: JSON values."""
        return describe(self)

    def save(self, name: str = "last.safetensors", *, weights_only: bool = False) -> None:
        """Write the state to ``folder``; a state that is not finite is refused, so the last good one stays."""
        self._share_statistics()
        totals = self.team.add(self.totals.clone())
        self.team.first(lambda: write(self, self.folder / name, None if weights_only else totals))

    def resume(self, *, changed_data: bool = False) -> None:
        """Take up the state that ``save`` wrote; it may have been another number of processes.

        Args:
            changed_data: go on where points, pixels or initial masks are others than those that the run began with;
                results say so.

        Raises:
            InputError: there is none, or it belongs to other data or settings.
        """
        take_up(self, self.folder / "last.safetensors", changed_data=changed_data)
