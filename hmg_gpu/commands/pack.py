"""hmg-gpu pack."""

from __future__ import annotations

import argparse

from rich.console import Console
from rich.markup import escape
from rich.table import Table
from rich.text import Text

from hmg_gpu.common.console import say
from hmg_gpu.common.errors import InputError
from hmg_gpu.common.locks import one_writer
from hmg_gpu.data import store_splits
from hmg_gpu.data.store import iterate_store, pack_folder


def pack(options: argparse.Namespace, console: Console) -> int:
    """A data set's folder (all its splits, with masks and every kind of points) to one HDF5 file."""
    if options.out.suffix != ".h5":
        raise InputError(f"{options.out}: expected a name that ends in .h5; the other commands know a store by it")
    with (
        one_writer(options.out, lambda text: say(console, text), file=True),
        console.status(f"packing {escape(str(options.data))}"),
    ):
        if options.out.exists() and not options.overwrite:  # another process may have packed it just now
            raise InputError(f"{options.out}: exists already; choose another name or pass --overwrite")
        pack_folder(options.data, options.out, points=options.points, dataset=options.dataset)
    table = Table(title=Text(f"{options.out}, {options.out.stat().st_size / 1e6:.1f} MB"))
    for heading in ("split", "images", "ground truth", "points"):
        table.add_column(heading)
    for split, kinds in store_splits(options.out).items():
        count, truth = 0, "no"
        for part in iterate_store(options.out, split, points=None):  # all of it is read back
            count, truth = count + len(part), "no" if part.masks is None else "yes"
        table.add_row(split, str(count), truth, ", ".join(kinds) or "none")
    console.print(table)
    return 0
