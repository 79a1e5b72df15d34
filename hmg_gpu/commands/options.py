"""Options that commands share, and what they stand for."""

from __future__ import annotations

import argparse
from collections.abc import Callable
from pathlib import Path

import torch

from hmg_gpu.common.options import add_options
from hmg_gpu.masks import AUTO, MASKS_HELP, RULES, RULES_HELP, Maker, Pmg, Rule, Union, make_maker, make_rule
from hmg_gpu.models import MODEL_HELP
from hmg_gpu.models.network import Network, load_network
from hmg_gpu.models.predict import PADDINGS
from hmg_gpu.models.views import VIEWS


def add_mask_options(
    parser: argparse.ArgumentParser, *, several: bool = False, extent: str | None = None, rule: bool = True
) -> None:
    """--masks, --rule, and the settings of PMG and FAF.

    Args:
        several: --masks takes more than one.
        extent: its default; None: the paper's for the data set.
        rule: whether predictions are corrected: --rule and the settings of FAF.
    """
    more = {"nargs": "+"} if several else {}
    text = f"initial masks by {MASKS_HELP} (default: pmg)"
    parser.add_argument("--masks", default=["pmg"] if several else "pmg", metavar="MAKER", help=text, **more)
    add_options(parser, Pmg, "extent", "half_width", "alpha", defaults={"extent": extent})
    if rule:
        text = f"{RULES_HELP} (default: %(default)s)"
        parser.add_argument("--rule", choices=(AUTO, *RULES), default=AUTO, help=text)
        add_options(parser, Union, "radius")


def add_network_options(parser: argparse.ArgumentParser, *, required: bool = False) -> None:
    """--checkpoint and how its network is run."""
    text = "our .safetensors, or published weights (.pth, .pth.tar)"
    parser.add_argument("--checkpoint", type=Path, required=required, help=text)
    parser.add_argument("--model", help=f"its network, where the file does not say: {MODEL_HELP}")
    text = "auto (the checkpoint's, else the data's), a data set's name such as SIRST3, or MEAN,STD"
    parser.add_argument("--normalisation", default="auto", help=text)
    parser.add_argument("--padding", default="least", choices=PADDINGS, help="lesps for published LESPS weights")
    text = "average predictions over so many mirrored views; takes as many times as long (default: %(default)s)"
    parser.add_argument("--views", type=int, choices=VIEWS, default=1, help=text)
    text = "probability above which a pixel is target (default: %(default)s)"
    parser.add_argument("--threshold", type=float, default=0.5, help=text)


def add_machine_options(parser: argparse.ArgumentParser, *, device: bool = True) -> None:
    """--device and --threads."""
    if device:
        default = "cuda" if torch.cuda.is_available() else "cpu"
        parser.add_argument("--device", default=default, help="default: %(default)s")
    parser.add_argument("--threads", type=int, help="CPU threads (default: PyTorch's)")


def make_makers(options: argparse.Namespace, seed: int | None = None) -> list[Maker]:
    """The makers that --masks names, not yet fitted to the data; ``seed`` stands in the place of --seed."""
    pmg = Pmg(extent=options.extent, half_width=options.half_width, alpha=options.alpha)
    names = [options.masks] if isinstance(options.masks, str) else options.masks
    return [make_maker(name, pmg=pmg, seed=options.seed if seed is None else seed) for name in names]


def make_correction(options: argparse.Namespace, maker: Maker | None) -> Rule:
    """The rule that --rule names, of the masks of a maker."""
    return make_rule(options.rule, radius=options.radius, maker=maker)


def make_network(
    options: argparse.Namespace, own: Callable[[], tuple[float, float]], device: str | torch.device
) -> Network | None:
    """The network of --checkpoint, or None; ``own`` gives the images' normalisation where nothing else does."""
    if options.checkpoint is None:
        return None
    names = ("normalisation", "padding", "threshold", "model", "views")
    settings = {name: getattr(options, name) for name in names}
    return load_network(options.checkpoint, own, device=device, **settings)


def at_least_one(text: str) -> int:
    """A whole number of at least 1, for argparse."""
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"expected a whole number of at least 1, got {text!r}")
    return int(text)
