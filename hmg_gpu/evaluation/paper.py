"""The paper's numbers (paper.json, with their sources) and ours beside them: every table and figure in one report."""

from __future__ import annotations

import json
import math
import shlex
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import cache
from pathlib import Path
from typing import Any

from hmg_gpu.common.errors import InputError
from hmg_gpu.common.files import write_text
from hmg_gpu.common.provenance import provenance
from hmg_gpu.data import ImageSet
from hmg_gpu.data.source import default_extent
from hmg_gpu.evaluation import masks as evaluation
from hmg_gpu.evaluation.detector import measure_detector
from hmg_gpu.evaluation.metrics import measure
from hmg_gpu.evaluation.pictures import draw_sheet
from hmg_gpu.evaluation.plots import plot_sweep
from hmg_gpu.evaluation.tables import DEFINITION, sweep_csv
from hmg_gpu.masks import Evidence, Maker, Pmg, Union
from hmg_gpu.models.checkpoints import read_description
from hmg_gpu.models.custom import is_custom
from hmg_gpu.models.network import Network, load_network

DEFAULTS = {"half_width": 4, "alpha": 0.15, "radius": 30}  # the paper's, besides L_ep by data set


@cache
def paper_numbers() -> dict[str, Any]:
    """The content of paper.json: IoU and Pd in percent, Fa in 1e-6."""
    return json.loads(Path(__file__).with_name("paper.json").read_text(encoding="utf-8"))


def paper_row(table: str, row: str, model: str | None = None) -> dict[str, Any]:
    """One row of a table of the paper: a list of numbers for each data set."""
    rows = next(record["rows"] for record in paper_numbers()["tables"] if record["table"] == table)
    return next(record for record in rows if record["row"] == row and model in (None, record.get("model")))


def paper_points(setting: str, dataset: str, split: str) -> list[dict[str, Any]]:
    """What the paper says about a sweep on a training set, as points to draw: value, iou (percent), curve, source.

    The tables give the value at the default; the text around Fig. 5 the mean gain over the three sets, taken off
    there; Fig. 4(b) two points that Sec. 4.5.2 spells out.
    """
    numbers = paper_numbers()
    points = [
        {key: point[key] for key in ("value", "iou", "curve", "source")}
        for point in numbers["curves"]
        if (point["setting"], point["dataset"]) == (setting, dataset)
    ]
    if setting == "radius":
        known = [("Table 4", "prediction", 1000), ("Table 4", "filtered", 30)]
    else:
        default = default_extent(dataset) if setting == "extent" else DEFAULTS[setting]
        known = [("Tables 2 and 3", "PMG", default)]
    for table, row, value in known:
        if dataset in numbers["sets"]:
            iou = paper_row(table, row)[dataset][0]
            points.append({"value": value, "iou": iou, "curve": "all targets", "source": f"{table}, {row}"})
    for gain in numbers["gains"]:
        if gain["setting"] == setting != "radius" and dataset in numbers["sets"]:
            source = f"less the gain of {gain['source']}"
            start = points[-1]["iou"] - gain["gain"]
            points.append({"value": gain["from"], "iou": start, "curve": "all targets", "source": source})
    return points if split == "train" else []


# --- the report ------------------------------------------------------------------------------------------------------


COARSE_STAGE_1 = "stage 1, coarse points"  # the paper has no such row


@dataclass
class Checkpoint:
    """A weights file and the row of the paper that it stands for."""

    path: str
    row: str  # "HMG", "coarse points", "full", "LESPS" ...: a row of Tables 1 and 5; "stage 1": Table 4; COARSE_STAGE_1
    dataset: str | None  # that it was trained on; None: any (published weights)
    options: dict[str, str]  # normalisation, padding, a model of one's own

    @property
    def arguments(self) -> list[str]:
        return [*(f"--{name}={value}" for name, value in self.options.items()), "--checkpoint", self.path]


def sort_checkpoints(
    files: Sequence[str], normalisation: str, padding: str, model: str | None = None
) -> list[Checkpoint]:
    """Find the row of each weights file: our own say what they are, others are given as ROW=FILE.

    Args:
        files: ``FILE`` or ``ROW=FILE``.
        normalisation, padding: how published weights are run.
        model: FILE.py:Class of the checkpoints that were trained with a network of one's own.

    Raises:
        InputError: a file that does not exist, says nothing about itself, or holds a run that is not finished.
    """
    rows = {row["row"] for table in paper_numbers()["tables"] for row in table["rows"]}
    result = []
    for file in files:
        row, _, path = file.rpartition("=")
        if row and row not in rows:
            raise InputError(f"{file}: the paper has no row {row}; expected one of {', '.join(sorted(rows))}")
        if not Path(path).exists():
            raise InputError(f"{path}: no such checkpoint; check the path")
        about = read_description(path)
        if about is None:
            if not row:
                raise InputError(f"{path}: does not say what it is; give it as ROW=FILE, for example full={path}")
            result.append(Checkpoint(path, row, None, {"normalisation": normalisation, "padding": padding}))
            continue
        settings, stage = about["settings"], about["stage"]
        last = 2 if settings["epochs"][1] else 1
        if stage not in (1, 2) or about.get("epoch"):
            raise InputError(
                f"{path}: the run is in the middle of a stage; give stage1.safetensors or stage2.safetensors"
            )
        rival = _rival(settings)
        if settings["supervision"] == "full":
            deduced = "full" if stage == last else None
        elif rival is not None:
            deduced = rival if stage == last and settings["points"] != "masks_coarse" else None
        elif settings["points"] == "masks_coarse":
            deduced = COARSE_STAGE_1 if stage == 1 else "coarse points"
        else:
            deduced = "stage 1" if stage == 1 else "HMG"
        if row or deduced:
            own = {"model": model} if model and is_custom(settings["model"]) else {}
            result.append(Checkpoint(path, row or deduced, about["dataset"], own))
    return result


def _rival(settings: Mapping[str, Any]) -> str | None:
    """The row of a run on another system's masks or with its rule; "" where the paper has none; None: HMG's own."""
    rule = settings.get("rule", "union")  # older runs had PMG and the union alone
    if rule in ("lesps", "lelcm", "pal"):
        return {"lesps": "LESPS", "lelcm": "LELCM"}.get(rule, "")
    maker = settings.get("masks", "pmg").partition(":")[0]
    if maker in ("pmg", "learned"):
        return None
    return {"mclc": "MCLC", "com": "COM"}.get(maker, "")


@dataclass
class Entry:
    """One row of the report. ``ours`` and ``paper`` are in the paper's units, in the order of ``columns``."""

    table: str
    row: str
    dataset: str
    columns: list[str]
    paper: list[float] | None
    paper_model: str | None = None
    ours: list[float] | None = None
    our_model: str | None = None
    command: str = ""
    needs: str = ""
    settings: dict[str, Any] | None = None
    split: str = "train"


class Report:
    """Measures what there is, set by set, and lists what is missing.

    Args:
        folder: for the pictures.
        checkpoints: from :func:`sort_checkpoints`.
        device: where to measure.
        plots: draw the sweeps (needs matplotlib).
        say: called with a line of text before each step.
        makers: by what stands behind --masks: other systems' rows of Tables 2 and 3.
    """

    def __init__(
        self,
        folder: Path,
        checkpoints: Sequence[Checkpoint],
        device: str,
        plots: bool,
        say: Callable[[str], None],
        makers: Mapping[str, Maker] | None = None,
    ):
        self.makers = dict(makers or {})
        self.folder, self.checkpoints, self.device, self.plots, self.say = folder, checkpoints, device, plots, say
        self.entries: list[Entry] = []
        self.sweeps: dict[str, dict[str, list[dict[str, Any]]]] = {}  # data set -> setting -> rows
        self.pictures: list[tuple[str, str]] = []  # (file, what it shows)
        self.paths: dict[str, str] = {}

    # --- one data set ---

    def add_set(self, path: str) -> None:
        """Measure everything on one data set: its masks on the training split, the detectors on the test split."""
        train = evaluation.load_set(path, "train", device=self.device)
        evaluation.require_truth(train)
        dataset = train.dataset
        if dataset in self.paths:
            raise InputError(f"{path}: {dataset} was given already ({self.paths[dataset]}); give each data set once")
        self.paths[dataset] = path
        pmg = Pmg(half_width=DEFAULTS["half_width"], alpha=DEFAULTS["alpha"]).fit(train)
        self.say(f"{dataset}: masks of {len(train)} training images")
        initial = {pmg.label: pmg.masks(train)}
        rows = evaluation.measure_masks(train, initial, [pmg])
        command = self._command("masks", path)
        self._add("Tables 2 and 3", "PMG", dataset, rows["pmg"], command, settings=pmg.about())
        self._add("Table 4", "initial", dataset, rows["pmg"], command, our_model="PMG", settings=pmg.about())
        for name, maker in self.makers.items():
            self._add_maker(path, train, name, maker)
        self._add("Ablations", "P_g only", dataset, rows["P_g only"], command, columns=["iou"], settings=pmg.about())
        self._add_coarse(path, dataset, pmg)
        self._add_sweeps(path, train, pmg)
        self._draw(path, train, initial, "pmg")
        for checkpoint in self._of("stage 1", dataset):
            self._add_updating(path, train, pmg, checkpoint)
        early = ("stage 1", COARSE_STAGE_1)
        finals = [
            checkpoint
            for checkpoint in self.checkpoints
            if checkpoint.row not in early and checkpoint.dataset in (None, dataset)
        ]
        if finals:
            test = evaluation.load_set(path, "test", device=self.device)
            for checkpoint in finals:
                self._add_detector(path, test, pmg, checkpoint)

    def _add_maker(self, path: str, train: ImageSet, name: str, maker: Maker) -> None:
        self.say(f"{train.dataset}: masks by {name}")
        fitted = maker.fit(train, folder=self.folder / f"{train.dataset}-{name.replace('/', '_')}")
        metrics = measure(fitted.masks(train), train)
        command = self._command("masks", path, "--masks", name)
        row = fitted.paper_row or name
        self._add("Tables 2 and 3", row, train.dataset, metrics, command, our_model=name, settings=fitted.about())

    def _add_coarse(self, path: str, dataset: str, pmg: Pmg) -> None:
        try:
            coarse = evaluation.load_set(path, "train", points="masks_coarse", device=self.device)
        except InputError:  # a set of one's own need not have them
            return
        command = self._command("masks", path, "--points", "masks_coarse")
        metrics = measure(pmg.masks(coarse), coarse)
        self._add("Ablations", "PMG, coarse points", dataset, metrics, command, columns=["iou"], settings=pmg.about())
        for checkpoint in self._of(COARSE_STAGE_1, dataset):
            self.say(f"{dataset}: updating with {checkpoint.path}")
            network = self._network(checkpoint, coarse)
            masks = evaluation.collect_masks(coarse, [pmg], network)
            command = self._command("masks", path, "--points", "masks_coarse", *checkpoint.arguments)
            for name in ("prediction", "filtered", "hybrid"):
                row, metrics = f"{name}, coarse points", measure(masks[name], coarse)
                self._add(
                    "Ablations", row, dataset, metrics, command, columns=["iou"], network=network, settings=pmg.about()
                )

    def _add_sweeps(self, path: str, train: ImageSet, pmg: Pmg) -> None:
        for name in ("extent", "half_width", "alpha"):
            self.say(f"{train.dataset}: sweep over {name}")
            rows = evaluation.sweep_maker(train, name, evaluation.SWEEPS[name], pmg)
            self._keep_sweep(path, train, name, rows, [])

    def _keep_sweep(self, path: str, train: ImageSet, name: str, rows: list[dict[str, Any]], more: list[str]) -> None:
        dataset = train.dataset
        self.sweeps.setdefault(dataset, {})[name] = rows
        file = f"{dataset}-{name}.png"
        write_text(self.folder / f"{dataset}-{name}.csv", sweep_csv(name, rows))
        command = self._command("sweep", name.replace("_", "-"), path, *more)
        if self.plots:
            title = f"{'Filtered predictions' if more else 'PMG'} on {dataset} train"
            plot_sweep(self.folder / file, name, rows, title, paper_points(name, dataset, "train"))
            figure = {"extent": "Fig. 4(b)", "half_width": "Fig. 5(a)", "alpha": "Fig. 5(b)", "radius": "Fig. 5(c)"}[
                name
            ]
            self.pictures.append((file, f"{figure}: {dataset}, {name}; `{command}`"))
        for point in paper_numbers()["curves"]:
            if (point["setting"], point["dataset"]) == (name, dataset):
                row = next(candidate for candidate in rows if candidate[name] == point["value"])
                label = f"{point['curve']} targets, {name} {point['value']}"
                ours = [100 * row["sizes"][point["curve"]]["iou"]]
                self.entries.append(
                    Entry("Fig. 4(b)", label, dataset, ["iou"], [point["iou"]], "PMG", ours, "PMG", command)
                )

    def _add_updating(self, path: str, train: ImageSet, pmg: Pmg, checkpoint: Checkpoint) -> None:
        self.say(f"{train.dataset}: updating with {checkpoint.path}")
        network = self._network(checkpoint, train)
        masks = evaluation.collect_masks(train, [pmg], network)
        command = self._command("masks", path, *checkpoint.arguments)
        for name in ("prediction", "filtered", "hybrid"):
            metrics = measure(masks[name], train)
            self._add("Table 4", name, train.dataset, metrics, command, network=network, settings=pmg.about())
        initial = masks[pmg.label]
        evidence = Evidence(masks["prediction"], train.points, train.sizes, initial, initial)
        rows = evaluation.sweep_rule(train, "radius", evaluation.SWEEPS["radius"], Union(), evidence)
        self._keep_sweep(path, train, "radius", rows, checkpoint.arguments)
        self._draw(path, train, masks, "hybrid", *checkpoint.arguments)

    def _add_detector(self, path: str, test: ImageSet, pmg: Pmg, checkpoint: Checkpoint) -> None:
        self.say(f"{test.dataset}: {checkpoint.row} ({checkpoint.path}) on {len(test)} test images")
        network = self._network(checkpoint, test)
        command = self._command("detector", path, *checkpoint.arguments)
        metrics = measure_detector(network, test, [network.threshold])[0]
        if checkpoint.row == "coarse points":
            self._add("Table 5", checkpoint.row, test.dataset, metrics, command, network=network)
            return
        self._add("Table 1", checkpoint.row, test.dataset, metrics, command, network=network)
        if checkpoint.row == "HMG":
            self._add("Table 5", "HMG", test.dataset, metrics, command, network=network)
            metrics = measure_detector(network, test, [network.threshold], maker=pmg)[0]
            command = self._command("detector", path, "--point-prompt", *checkpoint.arguments)
            self._add("Table 5", "point prompt", test.dataset, metrics, command, network=network, settings=pmg.about())

    def _draw(self, path: str, data: ImageSet, masks: Mapping[str, Any], by: str, *more: str) -> None:
        for pick, figure in (("spread", "Figs. 1, 6, 7"), ("joined", "Fig. 9")):
            try:
                chosen = evaluation.choose_images(data, masks[by], pick, 4, None)
            except InputError:  # no joined targets
                continue
            file = f"{data.dataset}-{by}-{pick}.png"
            draw_sheet(self.folder / file, data, masks, chosen, whole=False)
            command = self._command("show", path, "--pick", pick, "--count", "4", *more)
            self.pictures.append((file, f"{figure}: {data.dataset}, {by} masks, {pick}; `{command}`"))

    # --- rows ---

    def _of(self, row: str, dataset: str) -> list[Checkpoint]:
        return [
            checkpoint
            for checkpoint in self.checkpoints
            if checkpoint.row == row and checkpoint.dataset in (None, dataset)
        ]

    def _network(self, checkpoint: Checkpoint, data: ImageSet) -> Network:
        return load_network(checkpoint.path, lambda: (data.mean, data.std), device=self.device, **checkpoint.options)

    def _command(self, name: str, *arguments: str) -> str:
        path = next(argument for argument in arguments if argument in self.paths.values())
        rest = [argument for argument in arguments if argument != path]
        positional = [rest.pop(0)] if name == "sweep" else []
        return shlex.join(["python", "eval.py", name, *positional, "--data", path, *rest])

    def _add(
        self,
        table: str,
        row: str,
        dataset: str,
        metrics: Mapping[str, float],
        command: str,
        *,
        columns: list[str] | None = None,
        our_model: str | None = None,
        network: Network | None = None,
        settings: Mapping[str, Any] | None = None,
    ) -> None:
        """One measured row beside the paper's: that of the same network where there is one, else of another."""
        known = next((record for record in paper_numbers()["tables"] if record["table"] == table), None)
        columns = columns or known["columns"]
        model = network.title if network else our_model
        theirs = (
            [] if known is None else [record for record in known["rows"] if record["row"] == row and dataset in record]
        )
        theirs.sort(key=lambda record: record.get("model") != model)
        scale = {"iou": 100, "pd": 100, "fa": 1e6}
        self.entries.append(
            Entry(
                table,
                row,
                dataset,
                columns,
                theirs[0][dataset] if theirs else None,
                theirs[0].get("model") if theirs else None,
                [scale[column] * metrics[column] for column in columns],
                model,
                command,
                settings=dict(settings or {}) | (network.about() if network else {}),
                split=known["split"] if known else "train",
            )
        )

    def finish(self) -> dict[str, Any]:
        """Add the gains of Fig. 5 and every row of the paper that was not measured; everything as JSON values."""
        for gain in paper_numbers()["gains"]:
            name, measured = gain["setting"], {}
            for dataset, sweeps in self.sweeps.items():
                shares = {row[name]: 100 * row["iou"] for row in sweeps.get(name, ())}
                if gain["from"] in shares and gain["to"] in shares:
                    measured[dataset] = shares[gain["to"]] - shares[gain["from"]]
            label = f"gain of {name} {gain['to']} over {gain['from']}"
            where = f"mean of {', '.join(measured)}" if measured else gain["over"]
            ours = [math.fsum(measured.values()) / len(measured)] if measured else None
            needs = "" if measured else "a stage 1 checkpoint of train.py" if name == "radius" else "--data FOLDER"
            self.entries.append(Entry(gain["source"], label, where, ["iou"], [gain["gain"]], None, ours, needs=needs))
        for point in paper_numbers()["curves"]:
            if point["dataset"] not in self.paths:
                label = f"{point['curve']} targets, {point['setting']} {point['value']}"
                needs = f"--data {point['dataset']}"
                self.entries.append(
                    Entry("Fig. 4(b)", label, point["dataset"], ["iou"], [point["iou"]], "PMG", needs=needs)
                )
        for table in paper_numbers()["tables"]:
            for row in table["rows"]:
                for dataset in paper_numbers()["sets"]:
                    self._add_missing(table, row, dataset)
        return {
            "entries": [asdict(entry) for entry in self.entries],
            "sweeps": self.sweeps,
            "pictures": [file for file, _ in self.pictures],
        }

    def _add_missing(self, table: dict[str, Any], row: dict[str, Any], dataset: str) -> None:
        model = row.get("model")
        for entry in self.entries:
            # Tables 4 and 5 have one network; with another one the row counts as measured, and says so.
            same = table["table"] != "Table 1" or entry.our_model == model
            if (entry.table, entry.row, entry.dataset) == (table["table"], row["row"], dataset) and same:
                return
        data = [] if dataset in self.paths else ["the set with --data"]
        points = " --points masks_coarse" if row["row"] == "coarse points" else ""
        train = "train.py --data SET" + (f" --model {model.lower()}" if model else "")
        if row["row"] in ("HMG", "coarse points", "point prompt", "prediction", "filtered", "hybrid"):
            data.append(f"stage{1 if table['table'] == 'Table 4' else 2}.safetensors of: {train}{points}")
        elif row["row"] == "full":
            data.append(f"full=FILE, or the last checkpoint of: {train} --supervision full")
        elif table["table"] == "Table 1":
            data.append(f"{row['row']}=FILE with {model} weights trained that way")
        elif row["row"] not in ("PMG", "initial"):
            why = paper_numbers()["unpublished"].get(row["row"])
            data.append(why or "--masks with its maker, such as com, mclc, p2b-mclc, sam:PATH or folder:PATH")
        needs = "; ".join(data)
        self.entries.append(
            Entry(
                table["table"],
                row["row"],
                dataset,
                table["columns"],
                row[dataset],
                model,
                needs=needs,
                split=table["split"],
            )
        )

    # --- as text ---

    def markdown(self) -> str:
        """The report, after :meth:`finish`."""
        versions = ", ".join(f"{name} {version}" for name, version in provenance().items())
        lines = ["# The paper's numbers and ours", "", f"{paper_numbers()['paper']}.", "", f"Measured with {versions}."]
        lines += ["", f"{DEFINITION}. IoU and Pd in percent, Fa in 1e-6."]
        titles = {table["table"]: table["title"] for table in paper_numbers()["tables"]}
        measured = [entry for entry in self.entries if entry.ours is not None]
        order = [*titles, *dict.fromkeys(entry.table for entry in measured if entry.table not in titles)]
        for table in order:
            rows = [entry for entry in measured if entry.table == table]
            if not rows:
                continue
            lines += ["", f"## {table}" + (f": {titles[table]}" if table in titles else ""), ""]
            lines += ["| row | data | network | measure | ours | paper | difference | command |"]
            lines += ["|---|---|---|---|---|---|---|---|"]
            lines += [_markdown_row(entry) for entry in rows]
        if self.pictures:
            lines += ["", "## Pictures"]
            for file, text in self.pictures:
                lines += ["", text, "", f"![{file}]({file})"]
        missing = [entry for entry in self.entries if entry.ours is None]
        if missing:
            lines += ["", "## Not measured", "", "| table | row | network | data: the paper's numbers | supply |"]
            lines += ["|---|---|---|---|---|"]
            groups: dict[tuple[str, ...], list[str]] = {}
            for entry in missing:
                values = " / ".join(f"{value:.2f}" for value in entry.paper)
                key = (entry.table, entry.row, entry.paper_model or "", entry.needs)
                groups.setdefault(key, []).append(f"{entry.dataset}: {values}")
            for (table, row, model, needs), values in groups.items():
                lines.append(f"| {table} | {row} | {model} | {'; '.join(values)} | {needs} |")
        return "\n".join(lines) + "\n"


def _markdown_row(entry: Entry) -> str:
    ours = " / ".join(f"{value:.2f}" for value in entry.ours)
    theirs, difference = "", ""
    if entry.paper is not None:
        theirs = " / ".join(f"{value:.2f}" for value in entry.paper)
        difference = " / ".join(f"{our - their:+.2f}" for our, their in zip(entry.ours, entry.paper, strict=True))
    network = entry.our_model or ""
    if entry.paper_model and entry.paper_model != entry.our_model:
        network += f" (paper: {entry.paper_model})"
    measure = " / ".join({"iou": "IoU", "pd": "Pd", "fa": "Fa"}[column] for column in entry.columns)
    command = f"`{entry.command}`" if entry.command else ""
    return f"| {entry.row} | {entry.dataset} | {network} | {measure} | {ours} | {theirs} | {difference} | {command} |"
