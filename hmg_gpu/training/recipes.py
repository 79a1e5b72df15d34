"""What train.py trains with where nothing else is given; the defaults of :class:`Settings` are the paper's."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from hmg_gpu.training.settings import Settings

MODEL = "unet"  # on a data set; there it made the best masks for its time on a CPU (bench/results/unet.md)
SYNTHETIC = {"model": "acm", "epochs": (60, 40), "patch_size": 128, "eval_every": 20}  # two minutes on embedded scenes
RECIPES: dict[str, dict[str, Any]] = {  # by network; the others: the paper's schedule
    "unet": {
        "epochs": (80, 80),
        "batch_size": 16,
        "patch_size": 128,
        "loss": "batch",
        "jitter": 0.6,
        "margin": 32,
        "positive": 0.5,
        "hard_examples": 0.25,
        "eval_every": 20,
    },
}


def recipe(model: str) -> dict[str, Any]:
    """The settings that a network asks for, by name of a field; a network's options change nothing in them.

    Example:
        >>> recipe("unet:widths=16-32-64-128")["epochs"], recipe("acm")
        ((80, 80), {})
    """
    return RECIPES.get(model.partition(":")[0], {})


def complete(given: Mapping[str, Any]) -> Settings:
    """The settings of a run of which some are given, by name of a field.

    Example:
        >>> complete({"data": "NUAA-SIRST"}).model, complete({"data": "NUAA-SIRST", "model": "acm"}).epochs
        ('unet', (250, 1250))
    """
    defaults = SYNTHETIC if given.get("data", "synthetic") == "synthetic" else {"model": MODEL}
    chosen = defaults | dict(given)
    return Settings(**(recipe(chosen["model"]) | chosen))


def in_words() -> str:
    """The defaults that are not the paper's, for --help."""

    def spelled(defaults: Mapping[str, Any]) -> str:
        texts = (" ".join(map(str, value)) if isinstance(value, tuple) else value for value in defaults.values())
        return " ".join(f"--{name.replace('_', '-')} {text}" for name, text in zip(defaults, texts, strict=True))

    return (
        f"The defaults above are the paper's. On a data set the default is --model {MODEL}, with\n"
        f"  {spelled(recipe(MODEL))}\nand on the embedded scenes it is\n  {spelled(SYNTHETIC)}"
    )
