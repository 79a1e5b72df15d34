"""Everything that decides a run's result."""

from __future__ import annotations

from dataclasses import dataclass, fields
from typing import Any

from hmg_gpu.common.errors import InputError
from hmg_gpu.common.options import check_settings, like, setting
from hmg_gpu.masks import AUTO, MASKS_HELP, RULES, RULES_HELP, Maker, Pmg, Rule, Union, make_maker, make_rule
from hmg_gpu.models import MODEL_HELP, check_model
from hmg_gpu.training.step import WAYS


@dataclass
class Settings:
    """Everything that decides a run's result; saved with it. Lengths in pixels.

    Raises:
        InputError: a value of another type or out of its range; the text names it.

    Example:
        >>> settings = Settings(epochs=(2, 1), masks="pmg", extent=10)
        >>> print(settings.maker())
        PMG, extent 10 (as given), half width 4, alpha 0.15
    """

    data: str = setting(
        "synthetic", "a data set's folder (images/, masks_centroid/, img_idx/), a packed .h5, or embedded scenes"
    )
    points: str = setting("masks_centroid", "point labels inside the data set: masks_centroid, masks_coarse, or a file")
    supervision: str = setting(
        "points", "points (HMG), or full: ground truth, the upper bound", choices=("points", "full")
    )
    masks: str = setting("pmg", f"initial masks: {MASKS_HELP}")
    extent: int | str | None = like(Pmg, "extent")
    half_width: int = like(Pmg, "half_width")
    alpha: float = like(Pmg, "alpha")
    rule: str = setting(AUTO, RULES_HELP, choices=(AUTO, *RULES))
    radius: int = like(Union, "radius")
    model: str = setting("acm", MODEL_HELP)
    output_bias: float = setting(
        -4.0, "logit that the output layer starts from (-4: 2 % foreground); 0 for an even start"
    )
    loss: str = setting(
        "image", "soft-IoU averaged over the images, or summed over the batch", choices=("image", "batch")
    )
    epochs: tuple[int, int] = setting(
        (250, 1250), "epochs of stage 1 and of stage 2 (0: none)", names=("STAGE1", "STAGE2")
    )
    stage2: str = setting(  # the paper says "retrain"
        "continue", "stage 2 goes on with stage 1's weights, or starts from scratch", choices=("continue", "scratch")
    )
    update_every: int = setting(
        0, "0: correct the masks once, after stage 1 (the paper); N: also every N epochs of stage 2", least=0
    )
    start: str = setting(
        "epoch",
        "what ends stage 1, and so decides the first update: its epochs; or loss: the first epoch whose mean loss is "
        "below --loss-below, its epochs at the latest",
        choices=("epoch", "loss"),
    )
    loss_below: float = setting(0.5, "soft-IoU loss that ends stage 1 where --start is loss", above=0, most=1)
    batch_size: int = setting(8, "images in a batch", least=2)
    patch_size: int = setting(256, "side of a crop, pixels; a multiple of 32", least=32)
    positive: tuple[float, float] = setting(
        (0.0, 0.0),
        "share of the crops that hold a point (full supervision: a target), of both stages or of each; the others lie "
        "anywhere (the paper: 0)",
        least=0,
        most=1,
        names=("STAGE1", "STAGE2"),
    )
    hard_examples: float = setting(
        0.0,
        "crops more in each epoch of stage 2, as a share of the images: each holds a place that the correction of the "
        "predictions changed, a false alarm that FAF erased or a missed target that MDR brought back (the paper: 0)",
        least=0,
        most=1,
    )
    margin: int = setting(
        0,
        "crops may reach so many pixels, at most half of a crop, beyond the bottom and right border, where whole "
        "images are padded (the paper: 0)",
        least=0,
    )
    jitter: float = setting(
        0.0,
        "J: normalised intensities of a crop are multiplied by exp(J u), then J v is added; u, v random in -1 to 1 "
        "(the paper: 0)",
        least=0,
        most=2,
    )
    learning_rate: float = setting(1e-3, "of Adam, annealed by a cosine to 0 over each stage", above=0)
    average: float = setting(
        0.0,
        "exponential moving average of the weights: the share kept at each step, such as 0.99; the averaged network "
        "corrects the masks, is tested and saved (the paper: 0, none)",
        least=0,
        below=1,
    )
    bf16: bool = setting(False, "autocast to bfloat16")
    step: str = setting("eager", "eager, compile (torch.compile) or graph (CUDA graph)", choices=WAYS)
    seed: int = setting(0, "of weights, crops and students")
    eval_every: int = setting(50, "epochs between looks at the test set; the last network is the result", least=1)
    save_every: int = setting(5, "epochs between checkpoints", least=1)

    def __post_init__(self) -> None:
        if isinstance(self.epochs, list):  # what JSON makes of a tuple
            self.epochs = tuple(self.epochs)
        check_settings(self)
        check_model(self.model)
        if self.patch_size % 32:
            raise InputError(f"patch_size = {self.patch_size}: expected a multiple of 32, as the networks halve it")
        numbers = len(self.epochs) == 2 and all(type(value) is int for value in self.epochs)
        if not numbers or self.epochs[0] < 1 or self.epochs[1] < 0:
            raise InputError(
                f"epochs = {self.epochs}: expected two whole numbers, at least 1 for stage 1 and 0 for stage 2"
            )
        if self.supervision == "full" and self.update_every:
            raise InputError(
                f"update_every = {self.update_every}: full supervision has no masks to correct; leave it at 0"
            )
        maker = self.maker()
        if self.rule == AUTO:
            self.rule = maker.rule
        if RULES[self.rule].evolves and self.supervision == "points" and not self.update_every:
            raise InputError(
                f"rule = {self.rule}: its labels evolve over many updates, and one changes next to nothing; give "
                "--update-every (LESPS and PAL: 5)"
            )

    def maker(self) -> Maker:
        """What makes the initial masks, not yet fitted to the data."""
        pmg = Pmg(extent=self.extent, half_width=self.half_width, alpha=self.alpha)
        return make_maker(self.masks, pmg=pmg, seed=self.seed)

    def correction(self) -> Rule:
        """What corrects them."""
        return make_rule(self.rule, radius=self.radius)

    @classmethod
    def from_dict(cls, values: Any) -> Settings:
        """Settings read from a file; unknown and missing names are refused."""
        if not isinstance(values, dict):
            raise InputError(f"settings: expected an object of names and values, got {type(values).__name__}")
        if "fusion" in values or "initial" in values:
            raise InputError(
                "settings: the run is of an older version, whose masks this one does not take up; train it anew (its "
                "weights still work: eval.py detector --checkpoint)"
            )
        known = {field.name for field in fields(cls)}
        if values.keys() != known:
            raise InputError(
                f"settings: {', '.join(sorted(values.keys() ^ known))} unknown or missing; "
                "the checkpoint comes from another version"
            )
        return cls(**values)
