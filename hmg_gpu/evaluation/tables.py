"""Numbers as people read them: tables of masks and metrics for the terminal, CSV, and progress."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from rich.markup import escape
from rich.table import Table

from hmg_gpu.evaluation.losses import LOSSES
from hmg_gpu.evaluation.targets import MEANING, describe_class

DEFINITION = "IoU over the set; Pd, Fa as LESPS: 8-connected, centroids closer than 3 px, Fa from unmatched components"
SIZE_DEFINITION = (
    "Point up to 9 px, Spot 10 to 81, Extended beyond; each target against the mask of its own point, "
    "of other masks against all components that touch it"
)


def mask_table(title: str, rows: Mapping[str, Mapping[str, float]], *, pixel_fa: bool = False) -> Table:
    """One row for each entry of name -> what ``DetectionMetrics.compute`` gives; percent and 1e-6.

    ``pixel_fa`` adds the share of all pixels predicted outside targets, a larger number that some papers call Fa.
    """
    table = Table(title=escape(title), caption=DEFINITION)
    table.add_column("")
    for heading in ("IoU %", "nIoU %", "Pd %", "Fa 1e-6", "targets found", *["pixel Fa 1e-6"][: int(pixel_fa)]):
        table.add_column(heading, justify="right")
    for name, metrics in rows.items():
        table.add_row(
            escape(name),
            f"{100 * metrics['iou']:.2f}",
            f"{100 * metrics['niou']:.2f}",
            f"{100 * metrics['pd']:.2f}",
            f"{1e6 * metrics['fa']:.2f}",
            f"{metrics['matched']} / {metrics['targets']}",
            *[f"{1e6 * metrics['pixel_fa']:.2f}"][: int(pixel_fa)],
        )
    return table


def lost_in_words(lost: Mapping[str, float]) -> str:
    """What ``measure_detector`` says is lost, in a line.

    Example:
        >>> lost_in_words({"missed": 0.04, "false": 0.03, "small": 0.1, "large": 0.08})
        'lost, % of the union: missed targets 4.0, false alarms 3.0, targets drawn too small 10.0, too large 8.0'
    """
    parts = (f"{text} {100 * lost[name]:.1f}" for name, text in LOSSES.items())
    return f"lost, % of the union: {', '.join(parts)}"


def size_table(rows: Mapping[str, Mapping[str, Any]]) -> Table:
    """IoU by target size, for rows whose ``sizes`` holds what ``evaluation.size_classes`` gives."""
    first = next(iter(rows.values()))["sizes"]
    table = Table(title="IoU % by target size", caption=SIZE_DEFINITION)
    table.add_column("")
    for name, metrics in first.items():
        table.add_column(f"{name} ({metrics['targets']})", justify="right")
    for name, metrics in rows.items():
        table.add_row(escape(name), *(f"{100 * part['iou']:.2f}" for part in metrics["sizes"].values()))
    return table


def target_tables(more: Mapping[str, Any]) -> Iterator[Table]:
    """Tables of what ``evaluation.masks.measure_targets`` gives."""
    for name, rows in more["by"].items():
        table = Table(title=f"The last mask's targets by {name}", caption=MEANING[name])
        for heading in ("", "targets", "IoU %", "missed %", "extra %", "part of all that is lost %"):
            table.add_column(heading, justify="right" if heading else "left")
        for row in rows:
            cells = (f"{100 * row[column]:.1f}" for column in ("iou", "missed", "extra", "lost"))
            table.add_row(describe_class(name, row["upto"]), str(row["targets"]), *cells)
        yield table
    if more["confidence"]:
        text = "over targets with a point of their own; each against all components of the mask that touch it"
        table = Table(title="How well the confidence tells good masks", caption=text)
        for heading in ("", "rank correlation with IoU", "IoU %", "IoU % of the surest 80 %"):
            table.add_column(heading, justify="right" if heading else "left")
        for name, row in more["confidence"].items():
            shares = (f"{100 * row[column]:.2f}" for column in ("iou", "iou_surest"))
            table.add_row(escape(name), f"{row['rank_correlation']:.3f}", *shares)
        yield table


def sweep_csv(name: str, rows: Sequence[Mapping[str, Any]]) -> str:
    """A sweep as CSV text: percent for IoU and Pd, 1e-6 for Fa; a class without targets is left empty."""
    kinds = list(rows[0]["sizes"])
    lines = [",".join((name, "iou_percent", "niou_percent", "pd_percent", "fa_1e-6", *(f"iou_{k}" for k in kinds)))]
    for row in rows:
        shares = [100 * row["iou"], 100 * row["niou"], 100 * row["pd"], 1e6 * row["fa"]]
        shares += [100 * row["sizes"][kind]["iou"] for kind in kinds]
        lines.append(",".join([f"{row[name]:g}", *("" if share != share else f"{share:.4f}" for share in shares)]))
    return "\n".join(lines) + "\n"


def metrics_line(metrics: Mapping[str, float]) -> str:
    """IoU / Pd / Fa in the paper's order and units."""
    return f"IoU {100 * metrics['iou']:.2f} %  Pd {100 * metrics['pd']:.2f} %  Fa {1e6 * metrics['fa']:.2f}e-6"
