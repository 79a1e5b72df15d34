"""What the commands of eval.py share: their options, what they open, and what every result says."""

from __future__ import annotations

import argparse
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich.console import Console

from hmg_gpu.commands.options import (
    add_machine_options,
    add_mask_options,
    add_network_options,
    make_correction,
    make_makers,
    make_network,
)
from hmg_gpu.common.console import hold, say, steps
from hmg_gpu.common.errors import InputError
from hmg_gpu.common.files import write_json
from hmg_gpu.common.provenance import provenance
from hmg_gpu.data import ImageSet
from hmg_gpu.data.source import SYNTHETIC
from hmg_gpu.evaluation.masks import load_set
from hmg_gpu.masks import Maker, Rule
from hmg_gpu.masks.makers.maker import Sampled
from hmg_gpu.models.network import Network


@dataclass
class Inputs:
    """What a command works on.

    Attributes:
        data: the split, on its device. makers: of --masks, fitted to it; none where it has no points.
        rule: of --rule. network: of --checkpoint, or None. folder: for the results.
    """

    options: argparse.Namespace
    data: ImageSet
    makers: list[Maker]
    rule: Rule
    network: Network | None
    folder: Path

    @property
    def title(self) -> str:
        return f"{self.data.dataset} {self.data.split}"

    @property
    def maker(self) -> Maker:
        """The last one, of the masks that are corrected.

        Raises:
            InputError: the set has no points for one.
        """
        if not self.makers:
            raise InputError(f"{self.title}: no point label in the whole set; check --points")
        return self.makers[-1]

    def save(self, file: str, console: Console, **results: Any) -> None:
        """Write results with all that says how they came to be."""
        data = self.data
        source = {"data": self.options.data, "dataset": data.dataset, "split": data.split, "images": len(data)}
        about = settings_of(self.options, self.network, self.makers, self.rule)
        write_json(self.folder / file, source | about | results)
        say(console, f"numbers: {self.folder / file}")


def open_inputs(options: argparse.Namespace, console: Console, *, makers: bool = True) -> Inputs:
    """Read the split, fit the makers of --masks to it and load the network of --checkpoint.

    Args:
        makers: whether masks of the points are needed at all.
    """
    with console.status(f"reading {options.data}"):
        names = {"points": options.points, "seed": options.seed, "device": options.device}
        data = load_set(options.data, options.split, **names)
    network = make_network(options, lambda: (data.mean, data.std), options.device)
    folder = options.out or Path("runs") / f"{options.name}-{data.dataset}-{data.split}"
    hold(options.held, folder, console)
    fitted = fit_makers(options, console, data, folder) if makers else []
    return Inputs(
        options, data, fitted, make_correction(options, (fitted or make_makers(options))[-1]), network, folder
    )


def fit_makers(options: argparse.Namespace, console: Console, data: Sampled, folder: Path) -> list[Maker]:
    """The makers of --masks with all that depends on the data settled; those that need points only where there are."""
    makers = make_makers(options)
    if isinstance(data, ImageSet) and not len(data.points):
        makers = [maker for maker in makers if not maker.needs_points]
    with steps(console, "preparing") as advance:
        makers = [maker.fit(data, folder=folder, progress=advance) for maker in makers]
    for maker in makers:
        say(console, f"masks: {maker}")
    return makers


def settings_of(
    options: argparse.Namespace, network: Network | None, makers: Sequence[Maker], rule: Rule
) -> dict[str, Any]:
    """What every result says about how it came to be."""
    return {
        "command": options.name,
        "points": options.points,
        "masks": [maker.about() for maker in makers],
        "rule": rule.about(),
        "network": network and network.about(),
        "seed": options.seed,
        "device": options.device,
        "versions": provenance(),
    }


def add_command(
    commands: Any,
    command: Callable,
    example: str,
    *,
    split: str | None = None,
    settings: bool = True,
    several: bool = False,
    plots: bool = False,
) -> Callable[..., Any]:
    """Add a command with the options that commands share; what it returns adds its own.

    Args:
        split: the default of --split; None: it reads no data set.
        settings: it makes masks or runs a network. several: --masks takes more than one. plots: it draws curves.
    """
    name, text = command.__name__, command.__doc__
    example = f"example: python eval.py {name} {example}"  # raw, so that it stays on one line
    raw = argparse.RawDescriptionHelpFormatter
    parser = commands.add_parser(name, help=text, description=text, epilog=example, formatter_class=raw)
    parser.set_defaults(command=command, name=name)
    option = parser.add_argument
    if split:
        option("--data", default=SYNTHETIC, help="a data set's folder, a packed .h5, or synthetic (the default)")
        option("--split", default=split, help="train, test or another list (default: %(default)s)")
        option("--points", default="masks_centroid", help="masks_centroid (the default), masks_coarse, or a path")
    if settings:
        add_mask_options(parser, several=several)
        add_network_options(parser, required=name == "detector")
    if plots:
        option("--no-plots", dest="plots", action="store_false", help="no curves, so no matplotlib")
    option("--out", type=Path, metavar="FOLDER", help="for the results (default: runs/COMMAND-DATASET-SPLIT)")
    option("--seed", type=int, default=0, help="of the synthetic scenes and of students (default: %(default)s)")
    add_machine_options(parser)
    return option
