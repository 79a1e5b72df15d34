"""hmg-gpu: pixel masks from images and one click per target; a page to click on; packing and checking a data set.

Exit code: 0 all well, 1 hmg-gpu check found something, 2 an error (said in one line), 130 stopped by Ctrl-C.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

import torch
from rich.console import Console

from hmg_gpu.commands.check import check
from hmg_gpu.commands.coco import FORMS
from hmg_gpu.commands.masks import masks
from hmg_gpu.commands.options import add_machine_options, add_mask_options, add_network_options, at_least_one
from hmg_gpu.commands.pack import pack
from hmg_gpu.commands.review import review
from hmg_gpu.common.console import tell_error
from hmg_gpu.common.errors import HMGError
from hmg_gpu.data.points.formats import READERS


def main(arguments: list[str] | None = None) -> int:
    """Run a command; ``arguments`` as on the command line, by default the program's own. Returns the exit code."""
    options = parse(arguments)
    console = Console()
    try:
        if options.threads:
            torch.set_num_threads(options.threads)
        return options.command(options, console)
    except HMGError as error:
        return tell_error(error)
    except KeyboardInterrupt:
        more = "; --resume goes on from here" if options.command is masks else ""
        Console(stderr=True).print(f"stopped; files that were written are whole{more}", soft_wrap=True)
        return 130


def parse(arguments: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        "hmg-gpu", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    commands = parser.add_subparsers(required=True, metavar="COMMAND")

    def add(command: Any, example: str) -> argparse.ArgumentParser:
        sub = commands.add_parser(
            command.__name__,
            help=command.__doc__,
            description=command.__doc__,
            epilog=f"example: hmg-gpu {command.__name__} {example}",
        )
        sub.set_defaults(command=command, seed=0)
        return sub

    sub = add(masks, "--images frames --points clicks.csv --out frames_masks")
    sub.add_argument("--images", type=Path, required=True, metavar="PATH", help="folder of images, or a packed .h5")
    sub.add_argument("--split", help="of a packed .h5 (default: train, or the only one), or of a data set's images/")
    sub.add_argument("--list", type=Path, metavar="FILE", help="only these images of a folder: one stem a line")
    text = f"file or folder: {', '.join(READERS)}; of a packed .h5 also a name such as masks_centroid"
    sub.add_argument("--points", type=Path, required=True, metavar="PATH", help=text)
    sub.add_argument("--format", choices=READERS, help="of the points (default: by their content)")
    sub.add_argument("--out", type=Path, required=True, metavar="DIR", help="NAME.png for each image, 0 and 255")
    sub.add_argument("--resume", action="store_true", help="go on with the unfinished run in --out, or begin one")
    sub.add_argument("--coco", choices=FORMS, help="also write coco.json")
    sub.add_argument("--overlays", action="store_true", help="also draw the masks over the images, in overlays/")
    add_mask_options(sub, extent="auto")
    add_network_options(sub)
    sub.add_argument("--batch", type=at_least_one, default=16, help="images held at a time (default: %(default)s)")
    add_machine_options(sub)

    sub = add(review, "--images frames --points clicks.csv")
    sub.add_argument("--images", type=Path, required=True, metavar="PATH", help="folder of images, or a packed .h5")
    sub.add_argument("--split", help="as of hmg-gpu masks")
    sub.add_argument("--list", type=Path, metavar="FILE", help="only these images of a folder: one stem a line")
    text = "to begin with, as of hmg-gpu masks; a CSV is also where they are saved, and may be new"
    sub.add_argument("--points", type=Path, metavar="PATH", help=text)
    text = "where points are saved (default: --points where it is a CSV, else NAME_clicks.csv)"
    sub.add_argument("--save", type=Path, metavar="FILE", help=text)
    sub.add_argument("--truth", type=Path, metavar="DIR", help="ground truth NAME.png (default: masks/ beside images/)")
    add_mask_options(sub, rule=False)
    sub.add_argument("--port", type=int, default=0, help="of 127.0.0.1 (default: any that is free)")
    sub.add_argument("--no-browser", dest="browser", action="store_false", help="only print the address")
    add_machine_options(sub, device=False)

    sub = add(pack, "data/NUAA-SIRST NUAA.h5")
    sub.add_argument("data", type=Path, help="folder with images/, img_idx/ and, where there are, masks/ and points")
    sub.add_argument("out", type=Path, help="the .h5 file")
    sub.add_argument("--points", nargs="+", default=["masks_centroid", "masks_coarse"], help="kinds to take along")
    sub.add_argument("--dataset", help="the data set's name (default: the folder's)")
    sub.add_argument("--overwrite", action="store_true", help="replace a file of that name")
    add_machine_options(sub, device=False)

    sub = add(check, "data/NUAA-SIRST")
    sub.add_argument("data", type=Path, help="a data set's folder, a folder of images, or a .safetensors file")
    sub.add_argument("--points", default="masks_centroid", help="in the folder, or a path (default: %(default)s)")
    add_machine_options(sub, device=False)
    return parser.parse_args(arguments)
