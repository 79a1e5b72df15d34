"""Plots of sweeps and detectors as PNG, with matplotlib (the extra ``plots``)."""

from __future__ import annotations

import importlib.util
import io
import os
from collections.abc import Mapping, Sequence
from typing import Any

from hmg_gpu.common.errors import HMGError
from hmg_gpu.common.files import write_bytes

COLOURS = {"all targets": "black", "Point": "tab:blue", "Spot": "tab:orange", "Extended": "tab:green"}
LABELS = {
    "extent": "search length L_ep (pixels)",
    "half_width": "half width of the search region L_dp (pixels)",
    "alpha": "weight of the point's intensity, alpha",
    "radius": "radius of the false alarm filter r (pixels, L1)",
}


def require_matplotlib() -> None:
    """Refuse before the work, not after it.

    Raises:
        HMGError: matplotlib is not installed.
    """
    if importlib.util.find_spec("matplotlib") is None:
        raise HMGError('plots need matplotlib: pip install "hmg-gpu[plots]", or leave them out with --no-plots')


def plot_sweep(
    path: str | os.PathLike,
    name: str,
    rows: Sequence[Mapping[str, Any]],
    title: str,
    paper: Sequence[Mapping[str, Any]] = (),
) -> None:
    """IoU over one setting, of all targets and by target size, with the paper's points (HMG Figs. 4b, 5).

    Args:
        path: the PNG, replaced in one step.
        name: the setting: extent, half_width, alpha or radius.
        rows: as the sweeps of :mod:`hmg_gpu.evaluation` give them, in ascending order.
        paper: points with ``value`` and ``iou`` (percent), ``curve`` (a size class, or "all targets") and ``source``.
    """
    figure, axes = _new_figure(1)
    axes = axes[0]
    values = [row[name] for row in rows]
    axes.plot(values, [100 * row["iou"] for row in rows], "-o", color="black", ms=4, label="all targets")
    for kind, part in rows[0]["sizes"].items():
        if part["targets"]:
            shares = [100 * row["sizes"][kind]["iou"] for row in rows]
            label = f"{kind} ({part['targets']} targets)"
            axes.plot(values, shares, "-o", color=COLOURS[kind], ms=3, lw=1, label=label)
    if "hybrid" in rows[0]:
        hybrid = [100 * row["hybrid"]["iou"] for row in rows]
        axes.plot(values, hybrid, "--o", color="tab:red", ms=4, label="all targets, hybrid masks")
    for marker, source in zip("*DsPX", dict.fromkeys(point["source"] for point in paper), strict=False):
        for curve in dict.fromkeys(point["curve"] for point in paper if point["source"] == source):
            chosen = [point for point in paper if (point["source"], point["curve"]) == (source, curve)]
            x, y = [point["value"] for point in chosen], [point["iou"] for point in chosen]
            label = f"paper, {curve}: {source}"
            size = 14 if marker == "*" else 8
            axes.plot(x, y, marker, color=COLOURS[curve], ms=size, mec="white", label=label, zorder=5)
    if name == "radius" and max(values) > 100:
        axes.set_xscale("symlog", linthresh=10)
    axes.set_xlabel(LABELS.get(name, name))
    axes.set_ylabel("IoU (%)")
    axes.set_title(title)
    axes.grid(alpha=0.3)
    axes.legend(loc="upper left", bbox_to_anchor=(1.01, 1), frameon=False, fontsize=9)
    _save(figure, path)


def plot_sides(path: str | os.PathLike, makers: Mapping[str, Sequence[Mapping[str, Any]]], title: str) -> None:
    """IoU over the side of what a maker looks at, a panel for each maker (HMG Figs. 4a and 4b).

    Args:
        path: the PNG, replaced in one step.
        makers: name -> rows of :func:`hmg_gpu.evaluation.compare.over_sides`.
    """
    figure, panels = _new_figure(len(makers))
    for axes, (name, rows) in zip(panels, makers.items(), strict=True):
        sides = [row["side"] for row in rows]
        axes.plot(sides, [100 * row["iou"] for row in rows], "-o", color="black", ms=4, label="all targets")
        for kind, part in rows[0]["sizes"].items():
            if part["targets"]:
                shares = [100 * row["sizes"][kind]["iou"] for row in rows]
                axes.plot(sides, shares, "-o", color=COLOURS[kind], ms=3, lw=1, label=kind)
        axes.set_title(name)
        axes.set_xlabel("side of the crop (pixels)")
        axes.set_ylim(0, 100)
        axes.grid(alpha=0.3)
    panels[0].set_ylabel("IoU (%)")
    panels[0].legend(loc="lower right", fontsize=9)
    figure.suptitle(title)
    _save(figure, path)


def plot_detector(path: str | os.PathLike, curve: Sequence[Mapping[str, float]], threshold: float, title: str) -> None:
    """Precision over recall (pixels) and Pd over Fa (components), the point at ``threshold`` marked.

    Args:
        path: the PNG, replaced in one step.
        curve: as ``measure_detector`` gives it, over several thresholds.
        threshold: the one of the tables.
        title: above both panels.
    """
    figure, (left, right) = _new_figure(2)
    marked = next(row for row in curve if row["threshold"] == threshold)
    for axes, x, y, scale_x in ((left, "recall", "precision", 100), (right, "fa", "pd", 1e6)):
        xs, ys = [scale_x * row[x] for row in curve], [100 * row[y] for row in curve]
        axes.plot(
            xs,
            ys,
            "-o",
            color="tab:blue",
            ms=3,
            label=f"thresholds {curve[0]['threshold']:g} to {curve[-1]['threshold']:g}",
        )
        label = f"threshold {threshold:g}: IoU {100 * marked['iou']:.2f} %"
        axes.plot(scale_x * marked[x], 100 * marked[y], "o", color="tab:red", ms=8, label=label, zorder=5)
        axes.grid(alpha=0.3)
        axes.legend(loc="lower left" if axes is left else "lower right", fontsize=9)
    right.set_xscale("symlog", linthresh=1)  # Fa begins at 0 and spans four decades
    right.set_xlim(left=0)
    left.set_xlabel("recall of target pixels (%)")
    left.set_ylabel("precision of predicted pixels (%)")
    right.set_xlabel("Fa, pixels of unmatched components (1e-6 of all pixels)")
    right.set_ylabel("Pd, targets found (%)")
    figure.suptitle(title)
    _save(figure, path)


def _new_figure(panels: int):
    require_matplotlib()
    from matplotlib.figure import Figure  # without pyplot: no display, no global state

    figure = Figure(figsize=(9.5, 4.4) if panels == 1 else (max(11, 4.2 * panels), 4.6), dpi=110, layout="constrained")
    return figure, figure.subplots(1, panels, squeeze=False)[0]


def _save(figure: Any, path: str | os.PathLike) -> None:
    content = io.BytesIO()
    figure.savefig(content, format="png")
    write_bytes(path, content.getbuffer())
