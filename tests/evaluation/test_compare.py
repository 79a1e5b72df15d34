"""eval.py compare and eval.py runs: rows against the metrics of their masks; seeds; published values; bad input."""

from __future__ import annotations

import json
import shlex
from dataclasses import dataclass, replace
from pathlib import Path
from typing import ClassVar

import pytest
import torch
from refusal import refused
from tiny import tiny_set, write_folder

import eval as script
from hmg_gpu.common.checksums import read_sealed_json, write_sealed_json
from hmg_gpu.data import ImageSet
from hmg_gpu.evaluation.compare import compare_maker, compare_markdown, over_sides, published, unpublished
from hmg_gpu.evaluation.metrics import measure
from hmg_gpu.evaluation.runs import MASKS, read_run, runs_markdown, runs_rows
from hmg_gpu.masks import Maker, Pmg
from hmg_gpu.training.settings import Settings


@dataclass(frozen=True)
class Drawn(Maker):
    """The truth with a share of its pixels left out, drawn by the seed."""

    name: ClassVar[str] = "drawn"
    seed: int = 0

    def masks(self, data: ImageSet) -> torch.Tensor:
        generator = torch.Generator().manual_seed(self.seed)
        return data.masks & (torch.rand(data.masks.shape, generator=generator) < 0.9 - 0.1 * self.seed)


def test_each_seed_is_measured_where_masks_depend_on_it() -> None:
    data = tiny_set()
    told = []
    found = compare_maker(data, "drawn", {seed: Drawn(seed) for seed in (0, 1, 2)}, progress=told.append)
    rows = [measure(Drawn(seed).masks(data), data) for seed in (0, 1, 2)]
    assert found.seeds == [0, 1, 2] and [row["iou"] for row in found.rows] == [row["iou"] for row in rows]
    assert found.mean("iou") == pytest.approx(sum(row["iou"] for row in rows) / 3)
    assert found.spread == pytest.approx(max(r["iou"] for r in rows) - min(r["iou"] for r in rows)) and found.spread > 0
    assert torch.equal(found.mask, Drawn(0).masks(data)) and told == [1, 1, 1]
    about = found.about(len(data.points))
    assert about["points_per_second"] == pytest.approx(len(data.points) / about["seconds"])
    fixed = compare_maker(data, "pmg", {seed: Pmg(extent=8) for seed in (0, 1)}, progress=told.append)
    assert fixed.seeds == [0] and fixed.spread == 0 and told == [1] * 5
    text = compare_markdown("title", [found, fixed], data, "python eval.py compare")
    assert f"| drawn | {100 * found.mean('iou'):.2f} ± {50 * found.spread:.2f} |" in text
    assert f"| pmg | {100 * fixed.mean('iou'):.2f} |" in text and "    python eval.py compare\n" in text


def test_published_values_stand_beside_the_set_and_split_that_they_are_of() -> None:
    data = replace(tiny_set(), dataset="NUAA-SIRST")
    assert published(Pmg(), data) == 74.22 and published(Pmg(), replace(data, dataset="NUDT-SIRST")) == 70.98
    assert published(Pmg(directional=False), data) is None and published(Drawn(), data) is None
    assert published(Pmg(), replace(data, split="test")) is None and published(Pmg(), tiny_set()) is None
    ((name, iou, why),) = unpublished(data)
    assert (name, iou) == ("MCGC", 69.55) and "patent" in why
    assert unpublished(tiny_set()) == [] == unpublished(replace(data, split="test"))
    found = compare_maker(data, "pmg", {0: Pmg(extent=8)})
    assert "| MCGC |  |  |  | 69.55 |" in compare_markdown("", [found], data, "")


def test_sides_are_those_of_the_setting() -> None:
    data = tiny_set()
    rows = over_sides(data, Pmg(extent=8), [9, 17])
    assert [(row["side"], row["extent"]) for row in rows] == [(9, 4), (17, 8)]
    assert rows[1]["iou"] == measure(Pmg(extent=8).masks(data), data)["iou"] != rows[0]["iou"]
    assert over_sides(data, Drawn(), [9]) is None


def test_the_command(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    root, out = write_folder(tmp_path / "tiny"), tmp_path / "out"
    arguments = ["compare", "--data", str(root), "--masks", "pmg", f"folder:{root / 'masks'}", "--extent", "8"]
    arguments += ["--seeds", "0", "1", "--sides", "9", "17", "--count", "2", "--device", "cpu", "--out", str(out)]
    assert script.main(arguments) == 0
    found = json.loads((out / "compare.json").read_text())
    assert [row["name"] for row in found["rows"]] == ["pmg", f"folder:{root / 'masks'}"]
    assert found["rows"][1]["iou"] == 1 and [len(row["rows"]) for row in found["rows"]] == [1, 1]
    assert list(found["sides"]) == ["pmg"] and [row["side"] for row in found["sides"]["pmg"]] == [9, 17]
    assert (out / "compare.png").exists() and (out / "sides.png").exists()
    assert f"    {shlex.join(['python', 'eval.py', *arguments])}\n" in (out / "compare.md").read_text()
    assert script.main(["masks", "--data", str(root), "--extent", "8", "--device", "cpu", "--out", str(out)]) == 0
    assert json.loads((out / "masks.json").read_text())["rows"]["pmg"]["iou"] == found["rows"][0]["iou"]
    capsys.readouterr()
    bad = [*arguments[:4], "pmg", "nothing", "--out", str(tmp_path / "none")]
    assert script.main(bad) == 2 and not (tmp_path / "none").exists()
    assert "'nothing': expected one of pmg" in capsys.readouterr().err


# ---- runs -----------------------------------------------------------------------------------------------------------


def run(folder: Path, test: float, **settings: object) -> Path:
    """A finished run as train.py leaves it."""
    values = Settings(epochs=(2, 1), **settings).__dict__ | {"epochs": [2, 1]}
    masks = {name: {"iou": test + place / 10} for place, name in enumerate(MASKS)}
    results = {"stage 1": {"iou": 0.1, "pd": 0.5, "fa": 1e-5}, "stage 2": {"iou": test, "pd": 0.9, "fa": 2e-5}}
    results |= {} if values["supervision"] == "full" else {"masks": masks}
    folder.mkdir()
    content = {"settings": values, "dataset": "tiny", "results": results, "seconds": 3.0}
    write_sealed_json(folder / "results.json", content)
    return folder


@pytest.mark.parametrize("changed", [{"positive": 0.5}, {"hard_negatives": 0.0}])
def test_a_run_of_an_earlier_version_is_read(changed: dict[str, float], tmp_path: Path) -> None:
    """With one share for both stages, and no hard examples; it belongs to today's runs with the same settings."""
    old, today = (read_run(run(tmp_path / name, 0.3, positive=0.5)) for name in ("old", "today"))
    path = tmp_path / "old" / "results.json"
    del old["settings"]["hard_examples"]
    old["settings"] |= changed
    path.unlink()
    write_sealed_json(path, old)
    assert read_run(path.parent)["settings"] == today["settings"]
    assert len(runs_rows([read_run(path.parent), today])) == 1


def test_runs_that_differ_in_the_seed_share_a_row(tmp_path: Path) -> None:
    folders = [run(tmp_path / str(seed), 0.3 + 0.1 * seed, seed=seed) for seed in (1, 0)]
    folders.append(run(tmp_path / "full", 0.5, supervision="full", seed=7))
    folders.append(run(tmp_path / "other", 0.4, positive=0.5))  # another schedule: no upper bound beside it
    rows = runs_rows(map(read_run, folders))
    assert [(row["labels"], row["seeds"]) for row in rows] == [
        ("pmg, union", [0, 1]),
        ("ground truth", [7]),
        ("pmg, union", [0]),
    ]
    assert rows[0]["test"]["iou"] == pytest.approx(0.35) and rows[0]["masks"]["hybrid"] == pytest.approx(0.65)
    assert rows[0]["of_full"] == pytest.approx(0.7) and rows[1]["of_full"] == 1 and rows[2]["of_full"] is None
    assert rows[1]["masks"] == {}
    text = runs_markdown(rows)
    assert (
        "| pmg, union | acm, 2 + 1 | positive 0.0 0.0 | 0, 1 | 35.00 | 30.00 to 40.00 | 90.00 | 20.00 | 70.0 % |"
        in text
    )
    assert "| pmg, union | acm, 2 + 1 | positive 0.5 0.5 | 0 | 40.00 |  | 90.00 | 20.00 |  |" in text
    assert "| pmg, union | acm, 2 + 1 | positive 0.0 0.0 | 35.00 | 45.00 | 55.00 | 65.00 |" in text


def test_rows_say_what_differs_and_nothing_else(tmp_path: Path) -> None:
    folders = [run(tmp_path / "plain", 0.3), run(tmp_path / "full", 0.5, supervision="full", extent=9)]
    rows = runs_rows(map(read_run, folders))
    assert [row["differs"] for row in rows] == ["", ""] and "settings" not in runs_markdown(rows)
    folders += [run(tmp_path / "long", 0.4, extent=9), run(tmp_path / "bf16", 0.4, bf16=True, eval_every=3)]
    rows = runs_rows(map(read_run, folders))
    assert [row["differs"] for row in rows] == [
        "extent None, bf16 False",
        "bf16 False",  # ground truth has no extent
        "extent 9, bf16 False",
        "extent None, bf16 True",
    ]


def test_rows_of_two_sets_name_them(tmp_path: Path) -> None:
    folders = [run(tmp_path / "one", 0.3), run(tmp_path / "two", 0.4, jitter=0.5)]
    content = read_sealed_json(folders[1] / "results.json") | {"dataset": "other"}
    write_sealed_json(folders[1] / "results.json", content)
    text = runs_markdown(runs_rows(map(read_run, folders)))
    assert "| set | labels | network, epochs | seeds |" in text  # settings differ between sets alone: no column
    assert "| other | pmg, union | acm, 2 + 1 | 0 | 40.00 |" in text


def test_the_command_of_runs(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    folder, out = run(tmp_path / "run", 0.3), tmp_path / "out"
    assert script.main(["runs", str(folder), "--out", str(out)]) == 0
    assert json.loads((out / "runs.json").read_text())["rows"][0]["test"]["iou"] == 0.3
    assert "30.00" in (out / "runs.md").read_text() and "30.00" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("content", "parts"),
    [
        (None, ("no results.json", "finished run")),
        ("{", ("results.json", "JSON")),
        ({"settings": {}, "results": 3}, ("results.json", "finished run")),
        ({"settings": {"fusion": "union"}, "results": {}}, ("older version",)),
    ],
)
def test_what_is_no_run(content: str | dict | None, parts: tuple[str, ...], tmp_path: Path) -> None:
    if isinstance(content, str):
        (tmp_path / "results.json").write_text(content)
    elif content is not None:
        write_sealed_json(tmp_path / "results.json", content)
    refused(lambda: read_run(tmp_path), *parts)


@pytest.mark.parametrize(
    ("key", "value"),
    [("seed", "1"), ("epochs", ["2", 1]), ("epochs", 3), ("seconds", None), ("seconds", "3"), ("dataset", None)],
)
def test_forged_runs_are_refused(key: str, value: object, tmp_path: Path) -> None:
    folder = run(tmp_path / "run", 0.3)
    content = read_sealed_json(folder / "results.json")
    (content["settings"] if key in content["settings"] else content)[key] = value
    if value is None:
        del content[key]
    write_sealed_json(folder / "results.json", content)
    refused(lambda: read_run(folder), "results.json", "lacks what train.py writes")


def test_runs_of_versions_with_more_settings_stand_side_by_side(tmp_path: Path) -> None:
    folders = [run(tmp_path / "full", 0.5, supervision="full"), run(tmp_path / "points", 0.3)]
    content = read_sealed_json(folders[1] / "results.json")
    content["settings"]["new"] = 3
    write_sealed_json(folders[1] / "results.json", content)
    assert [row["of_full"] for row in runs_rows(map(read_run, folders))] == [1, None]


def test_runs_that_found_nothing_or_whose_test_set_has_no_target(tmp_path: Path) -> None:
    folders = [run(tmp_path / "full", 0.0, supervision="full"), run(tmp_path / "points", 0.3)]
    content = read_sealed_json(folders[1] / "results.json")
    content["results"]["stage 2"]["pd"] = None  # NaN in JSON
    write_sealed_json(folders[1] / "results.json", content)
    rows = runs_rows(map(read_run, folders))
    assert [row["of_full"] for row in rows] == [None, None]
    assert "| 30.00 |  | nan | 20.00 |" in runs_markdown(rows)


def test_sides_that_have_no_middle_are_refused() -> None:
    refused(lambda: over_sides(tiny_set(), Pmg(extent=8), [9, 10]), "sides: 10", "odd")
