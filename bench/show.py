"""Figures as tables and plots."""

from __future__ import annotations

import io
import os
import textwrap
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from rich.table import Table

from bench.measure import Case, Figure
from hmg_gpu.common.files import write_bytes
from hmg_gpu.evaluation.plots import require_matplotlib

HEADINGS = ("row", "median ms", "quartiles ms", "a second", "ratio", "asked", "peak MB", "x roof")
COLOURS = ("tab:blue", "tab:orange", "tab:green", "tab:red", "tab:purple", "tab:brown", "tab:pink", "tab:olive")


def case_table(case: Case, figures: Sequence[Figure], fits: Sequence[Figure]) -> Table:
    """One case: a line for each row, of a sweep for each size and row."""
    title = f"[bold]{case.name}[/bold]: {case.what}"
    inputs = dict.fromkeys(figure["inputs"] for figure in figures)
    if len(inputs) == 1:
        title += f"\n{next(iter(inputs))}"
    table = Table(title=title, title_justify="left", title_style="")
    if case.axis:
        table.add_column(case.axis, justify="right")
    for heading in HEADINGS:
        table.add_column(heading, justify="left" if heading == "row" else "right")
    before = None
    for figure in figures:
        start = [] if not case.axis else ["" if figure["value"] == before else f"{figure['value']:,}"]
        if case.axis and figure["value"] != before and before is not None:
            table.add_section()
        before = figure.get("value")
        table.add_row(*start, *_cells(case, figure))
    if fits:
        lines = [f"{fit['row']}: {fit['overall']:.2f}, last three {fit['tail']:.2f}" for fit in fits]
        table.caption = f"cost grows as {_work(case.axis)} to the power of\n" + "\n".join(lines)
        table.caption_justify = "left"
    return table


def _cells(case: Case, figure: Figure) -> tuple[str, ...]:
    if figure["state"] != "timed":
        return f"{figure['row']}: {figure['state']}", "", "", "", "", "", "", ""
    ratio, goal = figure.get("ratio"), figure.get("goal")
    asked = "" if goal is None else (f"<= {100 * goal:g} %" if case.share else f">= {goal:g} x")
    if goal is not None and not figure["met"]:
        asked += " missed"
    peak, floor = figure.get("peak_bytes"), figure.get("times_floor")
    return (
        figure["row"],
        _short(1e3 * figure["median"]),
        f"{_short(1e3 * figure['low'])} to {_short(1e3 * figure['high'])}",
        f"{_short(figure['per_second'])} {figure['unit']}",
        "" if ratio is None else (f"{100 * ratio:.1f} %" if case.share else f"{ratio:.2f} x"),
        asked,
        "" if peak is None else f"{peak / 1e6:.1f}",
        "" if floor is None else f"{floor:.1f}",
    )


def _short(number: float) -> str:
    """Three digits that count, and no exponent."""
    return f"{number:,.0f}" if number >= 100 else f"{number:.3g}"


def _work(axis: str) -> str:
    """What the cost of a sweep should be linear in."""
    return "pixels" if axis == "side" else axis


def goal_table(figures: Sequence[Figure]) -> Table:
    """Every ratio that was asked for."""
    table = Table("case", "row", "measured", "asked", "", title="Ratios asked for", title_justify="left")
    for figure in figures:
        if "goal" not in figure:
            continue
        show = "{:.1%}".format if figure["share"] else "{:.2f} x".format
        table.add_row(
            figure["case"],
            figure["row"],
            show(figure["ratio"]),
            show(figure["goal"]),
            "" if figure["met"] else "missed",
        )
    return table


def plot_sweep(path: str | os.PathLike, case: Case, figures: Sequence[Figure], fits: Sequence[Figure]) -> None:
    """Throughput over the axis of a sweep, quartiles shaded; the legend has the cost's exponent over the last three."""
    require_matplotlib()
    from matplotlib.figure import Figure as Sheet  # without pyplot: no display, no global state

    sheet = Sheet(figsize=(9, 6), dpi=110, layout="constrained")
    axes = sheet.subplots()
    tails = {fit["row"]: fit["tail"] for fit in fits}
    timed = [figure for figure in figures if figure["state"] == "timed"]
    for colour, row in zip(COLOURS, dict.fromkeys(figure["row"] for figure in timed), strict=False):
        row_figures = [figure for figure in timed if figure["row"] == row]
        x = [figure["value"] for figure in row_figures]
        label = row if row not in tails else f"{row} (cost ~ {_work(case.axis)}^{tails[row]:.2f})"
        ours = row_figures[0]["ours"]
        axes.plot(x, [f["per_second"] for f in row_figures], "-o" if ours else "--s", color=colour, ms=4, label=label)
        low, high = ([f["units"] / f[name] for f in row_figures] for name in ("high", "low"))
        axes.fill_between(x, low, high, color=colour, alpha=0.2, lw=0)
    axes.set_xscale("log")
    axes.set_yscale("log")
    axes.set_xlabel(case.axis_label)
    axes.set_ylabel(f"throughput ({case.unit} a second)")
    values = sorted({figure["value"] for figure in timed})
    axes.set_xticks(values, [f"{value:,}" for value in values])
    axes.minorticks_off()
    axes.set_title("\n".join(textwrap.wrap(case.what, 100)), fontsize=10, loc="left")
    axes.grid(alpha=0.3)
    sheet.legend(
        *axes.get_legend_handles_labels(), loc="outside lower left", ncols=2, frameon=False, fontsize=8, columnspacing=1
    )
    content = io.BytesIO()
    sheet.savefig(content, format="png")
    write_bytes(path, content.getbuffer())


def write_plots(folder: str | os.PathLike, cases: Sequence[Case], report: Mapping[str, Any]) -> list[Path]:
    """One PNG for each sweep with at least two sizes: FOLDER/throughput-CASE.png."""
    written = []
    for case in cases:
        case_figures = [figure for figure in report["figures"] if figure["case"] == case.name]
        if case.axis and len({figure["value"] for figure in case_figures if figure["state"] == "timed"}) > 1:
            path = Path(folder) / f"throughput-{case.name}.png"
            plot_sweep(path, case, case_figures, [fit for fit in report["exponents"] if fit["case"] == case.name])
            written.append(path)
    return written
