"""Numbers as people read them: tables of masks and metrics for the terminal."""

from __future__ import annotations

import resource
import sys
from collections.abc import Mapping

from rich.table import Table

DEFINITION = "IoU over the set; Pd, Fa as LESPS: 8-connected, centroids closer than 3 px, Fa from unmatched components"


def mask_table(title: str, rows: Mapping[str, Mapping[str, float]]) -> Table:
    """One row for each entry of name -> what ``DetectionMetrics.compute`` gives; percent and 1e-6."""
    table = Table(title=title, caption=DEFINITION)
    table.add_column("")
    for heading in ("IoU %", "nIoU %", "Pd %", "Fa 1e-6", "targets found"):
        table.add_column(heading, justify="right")
    for name, metrics in rows.items():
        table.add_row(
            name,
            f"{100 * metrics['iou']:.2f}",
            f"{100 * metrics['niou']:.2f}",
            f"{100 * metrics['pd']:.2f}",
            f"{1e6 * metrics['fa']:.2f}",
            f"{metrics['matched']} / {metrics['targets']}",
        )
    return table


def metrics_line(metrics: Mapping[str, float]) -> str:
    """IoU / Pd / Fa in the paper's order and units."""
    return f"IoU {100 * metrics['iou']:.2f} %  Pd {100 * metrics['pd']:.2f} %  Fa {1e6 * metrics['fa']:.2f}e-6"


def peak_memory_gb() -> float:
    """The largest resident memory of this process so far, in 1e9 bytes."""
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak * (1 if sys.platform == "darwin" else 1024) / 1e9
