"""The two-stage loop (HMG Sec. 4): train on initial masks, correct them with the network's predictions, train again.

Every crop is a pure function of (seed, stage, epoch, step) and the state is saved whole, so a run that stopped anywhere
goes on to the same bits on the same machine. Inside an epoch nothing is read from the device.

Several processes (a :class:`~hmg_gpu.parallel.Team`) make the same calls; each trains on its rows of every batch.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from shlex import quote
from typing import Any

import torch
from torch import Tensor, nn

from .checkpoints import (
    MODEL_PREFIX,
    check_state,
    keep_previous,
    load_weights,
    read_description,
    read_tensors,
    save_checkpoint,
)
from .data.batches import draw_epoch, mix_seed
from .data.sets import ImageSet
from .errors import HMGError, InputError
from .inference import predict, to_device
from .metrics import DetectionMetrics
from .models import build_model
from .parallel import ALONE, Team
from .pmg import point_to_mask, point_to_probability
from .provenance import provenance
from .step import WAYS, TrainingStep, check_step, in_channels_last, synchronised
from .student import METHODS, Student, StudentSettings
from .teaching import learned_student
from .update import false_alarm_filter, retrieve_missed, soft_update, update

STAGES = ("stage 1", "stage 2")
STUDENT = "student.safetensors"  # in a run's folder, where its initial masks are learned
STATE = {"totals", "masks.current"}  # what a checkpoint needs besides weights so that a run can go on


@dataclass
class Settings:
    """Everything that decides a run's result; saved with it. Lengths in pixels."""

    data: str = "synthetic"  # a data set's folder, a packed .h5 store, or "synthetic" for the embedded scenes
    points: str = "masks_centroid"  # folder of point labels inside the data set: masks_centroid or masks_coarse
    supervision: str = "points"  # "points": HMG; "full": train on the ground truth, the upper bound
    initial: str = "pmg"  # initial masks: the paper's, or "learned": by a student that learned from PMG's masks
    extent: int = 25  # L_ep of P2B
    half_width: int = 4  # L_dp of P2B
    alpha: float = 0.15  # weight of the point's intensity in B2M
    radius: int = 30  # r of FAF
    fusion: str = "union"  # of initial mask and prediction: the paper's union (MDR), or "soft": by their probabilities
    model: str = "acm"  # acm or dnanet
    output_bias: float = -4.0  # foreground prior of the output layer as a logit; 0 for an even start
    loss: str = "image"  # soft-IoU averaged over images, or "batch": summed over the batch (BasicIRSTD)
    epochs: tuple[int, int] = (250, 1250)  # of stage 1 and stage 2; 0 skips stage 2
    stage2: str = "continue"  # stage 2 goes on with stage 1's weights, or starts from "scratch"; the paper: "retrain"
    update_every: int = 0  # 0: correct the masks once, after stage 1 (the paper); N: also every N epochs of stage 2
    batch_size: int = 8
    patch_size: int = 256
    learning_rate: float = 1e-3  # Adam, annealed by a cosine to 0 over each stage
    bf16: bool = False  # autocast to bfloat16
    step: str = "eager"  # or "compile" (torch.compile of the network), or "graph" (the whole step as one CUDA graph)
    seed: int = 0
    eval_every: int = 50  # epochs between looks at the test set; the reported network is always the last one
    save_every: int = 5  # epochs between checkpoints

    def __post_init__(self) -> None:
        if isinstance(self.epochs, list):  # what JSON makes of a tuple
            self.epochs = tuple(self.epochs)
        for field in fields(self):
            value, kind = getattr(self, field.name), type(field.default)
            if kind is float and type(value) is int:
                setattr(self, field.name, float(value))
            elif type(value) is not kind:
                raise InputError(f"{field.name} = {value!r}: expected {kind.__name__}, got {type(value).__name__}")
        choices = {
            "supervision": ("points", "full"),
            "initial": METHODS,
            "fusion": ("union", "soft"),
            "model": ("acm", "dnanet"),
            "loss": ("image", "batch"),
            "stage2": ("continue", "scratch"),
            "step": WAYS,
        }
        for name, allowed in choices.items():
            if getattr(self, name) not in allowed:
                raise InputError(f"{name} = {getattr(self, name)!r}: expected one of {', '.join(allowed)}")
        least = {"extent": 1, "half_width": 0, "radius": 0, "batch_size": 2, "patch_size": 32}
        least |= {"eval_every": 1, "save_every": 1, "update_every": 0}
        for name, bound in least.items():
            if getattr(self, name) < bound:
                raise InputError(f"{name} = {getattr(self, name)}: expected at least {bound}")
        if self.patch_size % 32:
            raise InputError(f"patch_size = {self.patch_size}: expected a multiple of 32, as both networks halve it")
        whole = len(self.epochs) == 2 and all(type(value) is int for value in self.epochs)
        if not whole or self.epochs[0] < 1 or self.epochs[1] < 0:
            raise InputError(
                f"epochs = {self.epochs}: expected two whole numbers, at least 1 for stage 1 and 0 for stage 2"
            )
        if not 0 <= self.alpha <= 1:
            raise InputError(f"alpha = {self.alpha}: expected a number from 0 to 1")
        if not 0 < self.learning_rate < math.inf:
            raise InputError(f"learning_rate = {self.learning_rate}: expected a positive number")
        if not math.isfinite(self.output_bias):
            raise InputError(f"output_bias = {self.output_bias}: expected a finite logit")
        if self.supervision == "full" and self.update_every:
            raise InputError(
                f"update_every = {self.update_every}: full supervision has no masks to correct; leave it at 0"
            )

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> Settings:
        """Settings read from a file; unknown and missing names are refused."""
        if not isinstance(values, dict):
            raise InputError(f"settings: expected an object of names and values, got {type(values).__name__}")
        values = {"step": "eager", "initial": "pmg", "fusion": "union"} | values  # a run from before there was a choice
        known = {field.name for field in fields(cls)}
        if values.keys() != known:
            raise InputError(
                f"settings: {', '.join(sorted(values.keys() ^ known))} unknown or missing; "
                "the checkpoint comes from another version"
            )
        return cls(**values)


class StopRequest(HMGError):
    """The run was asked to stop; its state is saved."""


class Training:
    """One run: its data, masks, network and position. ``run`` carries it to the end.

    Args:
        settings: decides the result.
        train: training images with points, and ground truth where there is any, on the device to train on.
        test: test images with ground truth on the same device, or None.
        folder: where checkpoints go.
        report: called with every event as a dict with the key ``event``: "step" (position only), "epoch" (a row of the
            log), "student" (its position), "message" (plain words), "masks" (table of the stage border), "test"
            (metrics on the test set).
        team: the processes that share the work. Every rank holds the whole set and reports every event; rank 0 alone
            writes files. Weights, masks and numbers are the same on all ranks, but not those of another number of
            ranks: on the CPU batch norm sees a rank's own rows only, and dropout is drawn by every rank for itself.
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
        check_step(settings.step, settings.loss, self.device, team)
        self.stop = False
        self.stage, self.epoch, self.step = 0, 0, 0
        self.results: dict[str, Any] = {}
        self.warned: list[str] = []
        if settings.supervision == "full":
            self.initial = train.masks
        else:
            self.initial = self._initial_masks()
            team.same([self.initial.view(torch.uint8)])
        self.masks = self.initial
        self._new_network()

    @property
    def _pmg(self) -> dict[str, float]:
        return {"extent": self.settings.extent, "half_width": self.settings.half_width, "alpha": self.settings.alpha}

    def _initial_masks(self) -> Tensor:
        """PMG's masks of the training points, or those of a student, which is kept in ``folder``."""
        train = self.train
        if self.settings.initial == "pmg":
            return point_to_mask(train.images, train.points, sizes=train.sizes, **self._pmg)
        start = time.perf_counter()

        def learn() -> None:
            def step(done: int, total: int) -> None:
                self.report({"event": "student", "step": done, "of": total})

            settings = StudentSettings(seed=self.settings.seed)
            learned_student(train, self.folder / STUDENT, settings=settings, progress=step, **self._pmg)

        self.team.first(learn)
        masks = Student.load(self.folder / STUDENT, self.device).masks(train, **self._pmg)
        self.report({"event": "message", "text": f"initial masks by a student, {time.perf_counter() - start:.0f} s"})
        return masks

    def _soft_initial(self) -> Tensor:
        """The probabilities behind the initial masks: float32 [N, H, W]."""
        train = self.train
        if self.settings.initial == "pmg":
            return point_to_probability(train.images, train.points, sizes=train.sizes, **self._pmg)
        return Student.load(self.folder / STUDENT, self.device).soft_masks(train, **self._pmg)

    @property
    def totals(self) -> Tensor:
        """What was counted since the epoch began, see ``hmg_gpu.step.COUNTS``; this rank's part of the sum."""
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
        while self.stage < 2:
            epochs = self.settings.epochs[self.stage]
            while self.epoch < epochs:
                self._train_epoch()
                self.epoch, self.step = self.epoch + 1, 0
                self.totals.zero_()
                if self.epoch % self.settings.eval_every == 0 and self.epoch < epochs:
                    self._evaluate(final=False)
                every = self.settings.update_every
                if self.stage == 1 and every and self.epoch % every == 0 and self.epoch < epochs:
                    self.masks = self._corrected()
                stop = self.team.any(self.stop)
                if stop or (self.epoch % self.settings.save_every == 0 and self.epoch < epochs):
                    self.save()
                if stop:
                    self._leave()
            self._end_stage()
        return self.results

    def _train_epoch(self) -> None:
        settings, team = self.settings, self.team
        seed = mix_seed(settings.seed, self.stage)
        plan = draw_epoch(
            self.train.host_sizes, settings.batch_size, settings.patch_size, seed=seed, epoch=self.epoch
        ).tensor_split(team.ranks, dim=1)[team.rank]
        plan = to_device(plan.contiguous(), self.device)  # [steps, B / ranks, 6]
        rate = 0.5 * settings.learning_rate * (1 + math.cos(math.pi * self.epoch / settings.epochs[self.stage]))
        self.training_step.set_rate(rate)
        self.model.train()
        own = (team.rank,) if team.rank else ()
        start, first = time.perf_counter(), self.step
        while self.step < len(plan):
            torch.manual_seed(mix_seed(seed, self.epoch, self.step, *own))  # dropout is a function of the position, too
            self.training_step(self.masks, plan[self.step])
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
        self.report(row)
        if not math.isfinite(loss):
            last = self.folder / "last.safetensors"
            kept = f"{last} keeps the last good state" if last.exists() else "no checkpoint had been written yet"
            raise HMGError(
                f"the loss is no longer finite in {STAGES[self.stage]}, epoch {self.epoch + 1}; {kept}; "
                "try a lower --learning-rate or leave out --bf16"
            )
        self._diagnose(row)

    def _leave(self) -> None:
        raise StopRequest(f"stopped and saved; go on with: python train.py --resume {quote(str(self.folder))}")

    def _end_stage(self) -> None:
        self._evaluate(final=True)
        if self.stage == 0 and self.settings.supervision == "points":
            self.masks = self._corrected(table=True)
        self.stage, self.epoch, self.step = self.stage + 1, 0, 0
        self.totals.zero_()
        self.save(f"stage{self.stage}.safetensors", weights_only=True)
        if self.settings.epochs[1] == 0:
            self.stage = 2  # there is no stage 2: its network and results would be nobody's
        elif self.stage == 1 and self.settings.stage2 == "scratch":
            self._new_network()
        elif self.stage == 1:
            self._new_optimizer()
        self.save()

    def _corrected(self, table: bool = False) -> Tensor:
        """The hybrid masks from the network's present predictions (HMG Sec. 3.2), always from the initial masks."""
        train, radius = self.train, self.settings.radius
        settings = {"radius": radius, "sizes": train.sizes}
        probability = self._predict(train, soft=True) if self.settings.fusion == "soft" else None
        prediction = self._predict(train) if probability is None else probability > 0.5
        if probability is not None:
            hybrid = soft_update(probability, self._soft_initial(), train.points, **settings)
        elif not table:
            hybrid = update(prediction, self.initial, train.points, **settings)
        if not table:
            return hybrid
        filtered = false_alarm_filter(prediction, train.points, **settings)
        if probability is None:
            hybrid = retrieve_missed(self.initial, filtered)
        kinds = {"initial": self.initial, "prediction": prediction, "filtered": filtered, "hybrid": hybrid}
        if train.masks is not None:
            self.results["masks"] = {name: measure(masks, train) for name, masks in kinds.items()}
        position = {"stage": self.stage + 1, "epoch": self.epoch}
        self.report({"event": "masks", **position, "masks": kinds, "metrics": self.results.get("masks")})
        return hybrid

    def _predict(self, data: ImageSet, *, soft: bool = False) -> Tensor:
        self._share_statistics()
        # The statistics of the training set belong to the network and are used on the test set, too.
        normalisation = {"mean": self.train.mean, "std": self.train.std}
        return predict(self.model, data, soft=soft, autocast=self.settings.bf16, team=self.team, **normalisation)

    def _share_statistics(self) -> None:
        """The running statistics of batch norm are rank 0's on all ranks; while training, nothing depends on them."""
        self.team.same(self.model.buffers())

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
        findings = {
            "flat": (row["loss"] > 0.97, f"the loss is still {row['loss']:.3f} after a tenth of the epochs"),
            "empty": (row["foreground"] == 0, "the network predicts background everywhere"),
            "full": (row["foreground"] > 0.5, "the network predicts foreground nearly everywhere"),
        }
        for kind, (found, words) in findings.items():
            key = f"{self.stage} {kind}"
            if found and key not in self.warned:
                self.warned.append(key)
                cure = (
                    "train longer, or try --output-bias -4, --loss image, a lower --learning-rate; look at the sheets"
                )
                text = f"{STAGES[self.stage]}: {words}. If it stays so: {cure}."
                self.report({"event": "message", "stage": row["stage"], "epoch": row["epoch"], "text": text})

    # --- state ---

    def _new_network(self) -> None:
        torch.manual_seed(mix_seed(self.settings.seed, 1000 + self.stage))
        bias = self.settings.output_bias
        model = build_model(self.settings.model, output_bias=bias).to(self.device)
        model = synchronised(model, self.device, self.team)
        channels_last = in_channels_last(self.device, self.settings.bf16)
        self.model: nn.Module = model.to(memory_format=torch.channels_last) if channels_last else model
        with torch.no_grad():
            self.team.same(self.model.state_dict().values())
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
        )
        self.optimizer = self.training_step.optimizer

    def describe(self) -> dict[str, Any]:
        """What a checkpoint says about itself: JSON values."""
        return {
            "settings": asdict(self.settings),
            "dataset": self.train.dataset,
            "normalisation": [self.train.mean, self.train.std],
            "stage": self.stage,
            "epoch": self.epoch,
            "step": self.step,
            "results": self.results,
            "warned": self.warned,
            "versions": provenance(),
        }

    def save(self, name: str = "last.safetensors", *, weights_only: bool = False) -> None:
        """Write the state to ``folder``; a state that is not finite is refused, so the last good one stays."""
        self._share_statistics()
        totals = self.team.add(self.totals.clone())
        self.team.first(lambda: self._write(name, None if weights_only else totals))

    def _write(self, name: str, totals: Tensor | None) -> None:
        tensors = {MODEL_PREFIX + key: value for key, value in self.model.state_dict().items()}
        if not all(bool(value.isfinite().all()) for value in tensors.values() if value.is_floating_point()):
            raise HMGError(f"the weights are no longer finite; {self.folder / name} keeps the last good ones")
        if totals is not None:
            for number, state in self.optimizer.state_dict()["state"].items():
                tensors |= {f"optimizer.{number}.{key}": value for key, value in state.items()}
            tensors["totals"] = totals
            tensors["masks.current"] = self.masks
        if totals is not None:
            keep_previous(self.folder / name)
        save_checkpoint(self.folder / name, tensors, self.describe())

    def resume(self) -> None:
        """Take up the state that ``save`` wrote; it may have been another number of processes.

        Raises:
            InputError: there is none, or it belongs to other data or settings.
        """
        path = self.folder / "last.safetensors"
        description = read_description(path)
        tensors = read_tensors(path)
        if description is None or not (self.describe().keys() <= description.keys() and tensors.keys() >= STATE):
            raise InputError(
                f"{path}: not the state of a run of train.py (bare weights cannot be resumed); give a run's folder"
            )
        theirs = asdict(Settings.from_dict(description["settings"]))
        for key, value, own in (
            ("settings", theirs, asdict(self.settings)),
            ("dataset", description["dataset"], self.train.dataset),
        ):
            if value != own:
                raise InputError(f"{path}: {_difference(key, value, own)}; resume with the run's own")
        if tensors["masks.current"].shape != self.masks.shape:
            raise InputError(
                f"{path}: holds masks {list(tensors['masks.current'].shape)}, but the data set gives "
                f"{list(self.masks.shape)}; the images have changed since the run began"
            )
        if description["stage"] == 0 and not torch.equal(tensors["masks.current"].to(self.device), self.masks):
            raise InputError(
                f"{path}: the initial masks are others than those that the run began with; resume with the same "
                "points, images and version of this program"
            )
        check_state(path, description, tensors, self.optimizer.param_groups[0]["params"])
        self.stage, self.epoch, self.step = (description[key] for key in ("stage", "epoch", "step"))
        self.results, self.warned = description["results"], description["warned"]
        load_weights(self.model, path)
        parameters = self.optimizer.param_groups[0]["params"]
        state: dict[int, dict[str, Tensor]] = {}
        for name, value in tensors.items():
            if name.startswith("optimizer."):
                _, number, key = name.split(".")
                if value.dim():  # in the parameter's memory layout: the fused optimiser walks both as they lie
                    value = torch.empty_like(parameters[int(number)]).copy_(value)
                state.setdefault(int(number), {})[key] = value
        groups = self.optimizer.state_dict()["param_groups"]
        self.optimizer.load_state_dict({"state": state, "param_groups": groups})
        self.totals.zero_()
        if self.team.rank == 0:  # the sum over the ranks, whose number may have changed
            self.totals.copy_(tensors["totals"])
        self.masks = tensors["masks.current"].to(self.device)


def _difference(key: str, theirs: Any, mine: Any) -> str:
    """The first place in which a checkpoint's description and this run differ, in words."""
    if isinstance(theirs, dict) and isinstance(mine, dict):
        name = next(name for name in (theirs | mine) if theirs.get(name) != mine.get(name))
        key, theirs, mine = name, theirs.get(name), mine.get(name)
    return f"its run had {key} = {theirs!r}, this one has {mine!r}"


def measure(masks: Tensor, data: ImageSet) -> dict[str, int | float]:
    """IoU, Pd, Fa and their counts of masks [N, H, W] against the ground truth of a set; see ``DetectionMetrics``."""
    metrics = DetectionMetrics()
    for rows in torch.arange(len(data), device=masks.device).split(256):
        metrics.update(masks[rows], data.masks[rows], data.sizes[rows])
    return metrics.compute()
