"""The bench: every case builds and its rows agree; what is wrong shows no time; the fits, the tables, the plots."""

from __future__ import annotations

import io
import json
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from types import ModuleType

import pytest
import torch
from rich.console import Console
from tiny import write_folder

from bench import drawn, extent, folds, loops, makers, mixed, peers, review, rules, student, threads
from bench.__main__ import main
from bench.cases import CASES
from bench.measure import Case, Problem, Row, difference, exponents, faults, run_case
from bench.scenes import blob_scene, blobs_for, in_one_line, points_scene, training_set
from bench.show import case_table, goal_table, write_plots
from bench.timer import time_together
from hmg_gpu import point_to_mask
from hmg_gpu.data import load_folder
from hmg_gpu.evaluation.metrics import measure
from hmg_gpu.evaluation.runs import read_run
from hmg_gpu.masks import Pmg, make_maker
from hmg_gpu.masks.student.student import StudentSettings
from hmg_gpu.masks.student.train import train_student

ROOT = Path(__file__).resolve().parents[2]


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_every_case_builds_and_its_rows_agree(case: Case) -> None:
    figures = run_case(case, seconds=0, toy=True)
    assert not [figure["state"] for figure in figures if figure["state"].startswith("wrong")]
    assert figures[0]["state"] == "timed"  # the reference
    for figure in figures:
        absent = ("not measured: no GPU", "not installed")
        assert figure["state"] == "timed" or figure["state"].endswith(absent), figure["state"]
    rows = {figure["row"] for figure in figures}
    assert set(case.goals) <= rows
    timed_ours = [figure for figure in figures if figure["ours"] and figure["state"] == "timed"]
    assert timed_ours and all(figure["median"] > 0 and "ratio" in figure for figure in timed_ours)
    assert all("goal" in figure for figure in figures if figure["row"] in case.goals)


@pytest.mark.gpu
@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_rows_agree_on_a_gpu(case: Case) -> None:
    figures = run_case(case, seconds=0, toy=True, gpu="cuda")
    assert not [figure["state"] for figure in figures if figure["state"].startswith("wrong")]
    assert any(figure["device"] == "cuda" and figure["state"] == "timed" for figure in figures) or case.name == "store"


def made_up(values: tuple[int, ...] = (), **rows: torch.Tensor | None) -> Case:
    def build(size: int = 1, gpu: str | None = None) -> Problem:
        made = [
            Row(name, (lambda: None) if found is None else (lambda found=found: found), ours=name != "peer")
            for name, found in rows.items()
        ]
        return Problem([replace(row, read=lambda found: found) for row in made], bytes_per_unit=8.0)

    return Case("made-up", "nothing", "things", build, {}, goals={"right": 1e-9}, axis="size" if values else "",
                values=values, axis_label="size")  # fmt: skip


def test_a_wrong_row_shows_no_time_and_fails_the_run() -> None:
    right, wrong = torch.tensor([1, 2, 3]), torch.tensor([1, 2, 4])
    case = made_up(reference=right, right=right, wrong=wrong, peer=wrong)
    figures = run_case(case, seconds=0)
    states = {figure["row"]: figure["state"] for figure in figures}
    assert states["reference"] == states["right"] == "timed"
    assert states["wrong"] == states["peer"] == "wrong: 1 of 3 values differ"
    assert all("median" not in figure for figure in figures if figure["row"] in ("wrong", "peer"))
    assert faults(figures) == ["made-up, wrong: wrong: 1 of 3 values differ"]  # a peer's is its own affair

    console = Console(width=200, record=True, file=io.StringIO())
    console.print(case_table(case, figures, []))
    console.print(goal_table(figures))
    text = console.export_text()
    line = next(line for line in text.splitlines() if "│ wrong" in line)
    assert "1 of 3 values differ" in line and not any(map(str.isdigit, line.split("differ")[1]))


def test_results_are_compared_by_shape_type_and_value() -> None:
    ones = torch.ones(4)
    assert difference(ones, ones.clone()) == ""
    assert difference(ones, ones[:2]) == ""  # a loop that did a part of the work
    assert "instead of" in difference(ones, ones[:0])
    assert "instead of" in difference(ones, ones.double())
    assert difference(ones, ones * 1.001) and not difference(ones, ones * 1.001, 2e-3)
    mask = torch.ones(1000, dtype=torch.bool)
    other = mask.clone()
    other[0] = False
    assert difference(mask, other) == "1 of 1000 values differ" and not difference(mask, other, 1e-3)


def test_the_exponent_of_a_known_cost() -> None:
    def figure(value: int, cost: float, units: int) -> dict:
        return {"case": "c", "row": "r", "axis": "a", "value": value, "work": value, "units": units, "state": "timed",
                "median": cost}  # fmt: skip

    for power in (0.5, 1.0, 2.0):
        (fit,) = exponents([figure(n, 1e-3 * n**power, 1) for n in (1, 10, 100, 1000)])
        assert fit["overall"] == pytest.approx(power) and fit["tail"] == pytest.approx(power)
    # A loop that does 10 units at every size costs as much as if it did them all.
    whole = [figure(n, 1.0, n) | {"row": "all"} for n in (10, 100, 1000)]
    fits = exponents([*whole, *(figure(n, 1.0, 10) for n in (10, 100, 1000))])
    assert {fit["row"]: round(fit["tail"], 6) for fit in fits} == {"all": 0.0, "r": 1.0}


def test_scenes_hold_what_they_say() -> None:
    for points in (1, 3, 50):
        data, _ = points_scene(points, "NUDT-SIRST", 64)
        assert len(data.points) == points and int(data.points[-1, 0]) == len(data) - 1
        assert ((data.points[:, 1:] >= 0) & (data.points[:, 1:] < data.sizes[data.points[:, 0]])).all()
    for density in (0.01, 0.3):
        prediction, initial, points = blob_scene(8, 128, blobs_for(density, 128))
        assert float(prediction.double().mean()) == pytest.approx(density, rel=0.25)
        assert prediction[points[::2, 0], points[::2, 1], points[::2, 2]].all()  # every other point is on a target
        assert initial[points[:, 0], points[:, 1], points[:, 2]].all()


def test_a_peer_that_is_absent_says_so() -> None:
    row = peers.peer("cat's whiskers", lambda: pytest.fail("imported"), "no_such_package_here")
    assert row.call is None and row.why == "no_such_package_here not installed"


def test_rows_take_turns() -> None:
    order: list[str] = []
    names = {name: lambda name=name: order.append(name) or sum(range(300_000)) for name in "AB"}
    timings = time_together(names, seconds=0, least=3)
    assert all(timing.low <= timing.median <= timing.high and timing.runs >= 3 for timing in timings.values())
    assert "".join(dict.fromkeys(order)) == "AB" and order.index("B") < len(order) - order[::-1].index("A")


def test_the_command(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    with pytest.raises(SystemExit):
        main(["no-such-case"])
    assert "choose from" in capsys.readouterr().err


def test_plots_of_sweeps(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    from PIL import Image

    case = made_up((1, 10, 100), reference=torch.ones(1), right=torch.ones(1))
    figures = run_case(case, seconds=0)
    (path,) = write_plots(tmp_path, [case], {"figures": figures, "exponents": exponents(figures)})
    assert path.name == "throughput-made-up.png" and Image.open(path).size[0] > 800


def test_one_thread_and_several_are_timed_quiet_and_busy(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    before = torch.get_num_threads()
    path = tmp_path / "threads.json"
    common = ["--size", "64", "--seconds", "0", "--busy", "1", "--only", "update", "--json", str(path)]
    monkeypatch.setattr(threads, "FRACTION", 1e9)
    assert threads.main(common) == 0 and torch.get_num_threads() == before
    rows = json.loads(path.read_text())["rows"]
    assert [(row["work"], row["busy"]) for row in rows] == [
        (f"update, {n} images", busy) for n in (8, 64) for busy in (0, 1)
    ]
    assert all(row["pairs"] == 5 and row["one"][0] <= row["one"][1] <= row["one"][2] for row in rows)
    monkeypatch.setattr(threads, "FRACTION", 0)
    assert threads.main(common) == 1
    assert "2 threads are slower than one: update, 8 images" in capsys.readouterr().out


def test_host_time_runs_no_kernel_and_says_where_it_failed(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "bench.host_time", "--images", "2", "--side", "32"]
    once = subprocess.run([*command, "--once"], cwd=ROOT, capture_output=True, text=True, check=True)
    assert 1 < float(once.stdout) < 50_000  # interpreted kernels take a hundred times as long
    failed = subprocess.run([*command, "--beside", str(tmp_path)], cwd=ROOT, capture_output=True, text=True)
    assert failed.returncode == 1 and str(tmp_path) in failed.stderr


def test_rules_of_evolution_are_timed_where_they_agree(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    threads = torch.get_num_threads()
    try:
        arguments = [
            "--sets",
            "--scenes",
            "3",
            "--batch",
            "8",
            "--seconds",
            "0",
            "--json",
            str(tmp_path / "rules.json"),
        ]
        assert rules.main(arguments) == 0
    finally:
        torch.set_num_threads(threads)
    rows = json.loads((tmp_path / "rules.json").read_text())["rows"]
    assert [row["rule"] for row in rows] == rules.EVOLVING and "3 targets" in capsys.readouterr().out
    for row in rows:
        assert row["ratio"] == pytest.approx(row["loop"] / row["ours"]) and 16 <= row["regions"] <= 48


def test_a_rule_that_differs_from_its_loop_shows_no_time(monkeypatch: pytest.MonkeyPatch) -> None:
    plain = rules.reference_rules.lesps
    monkeypatch.setattr(rules.reference_rules, "lesps", lambda label, probability: plain(label, probability) ^ 1)
    row = rules.compare(rules.crowd(2), "lesps", 8, 0)
    assert "ratio" not in row and "ours" not in row


@pytest.mark.slow
def test_the_review_of_many_images_is_measured(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    points = review.make_images(tmp_path, 4, 64)
    review.measure(tmp_path, points, asked=3)
    shown = capsys.readouterr().out
    assert "address after" in shown and shown.count("memory") == 2


# ---- students -------------------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_students_are_measured_once_and_shown(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Trainings of one step on a tiny set: what is written is what students make; a second run trains nothing."""
    root = write_folder(tmp_path / "tiny")
    shutil.copytree(root / "masks_centroid", root / "masks_coarse")
    monkeypatch.setenv("HMG_DATA", str(root.parent))
    monkeypatch.setenv("COLUMNS", "200")
    path = tmp_path / "student.json"
    arguments = ["--sets", root.name, "--seeds", "0", "--steps", "1", "--threads", "1", "--json", str(path)]
    threads = torch.get_num_threads()
    try:
        assert student.main(arguments) == 0
        found = json.loads(path.read_text())
        assert list(found) == [f"{root.name} {points} seed 0" for points in student.POINTS]
        data = load_folder(root, "train")
        known = train_student(data, settings=StudentSettings(steps=1))
        for case in found.values():
            (last,) = case["rounds"]
            assert last["sets"][root.name]["iou"] == measure(known.masks(data, Pmg()), data)["iou"]
            more = case["more"][root.name]
            assert more["levels"]["0.15"] == last["sets"][root.name]["iou"]
            teacher = point_to_mask(data.images, data.points, sizes=data.sizes)
            assert more["teacher"]["iou"] == measure(teacher, data)["iou"]
            assert more["moved"]["4"]["teacher"] < more["teacher"]["iou"]
        monkeypatch.setattr(student, "train_student", None)
        assert student.main(arguments) == 0
        shown = capsys.readouterr().out
        assert shown.count("...") == 2 and "students by seed" in shown and "masks_coarse" in shown
    finally:
        torch.set_num_threads(threads)


def test_masks_drawn_by_hand_move_a_threshold_where_they_ask_for_it() -> None:
    """Two targets in images 0 and 1, one in image 2; the second level is better in images 0 and 2, worse in 1."""
    images = torch.tensor([0, 1, 2])
    hit = torch.ones(len(drawn.LEVELS), 3, dtype=torch.float64)
    union = torch.full_like(hit, 4.0)
    union[1] = torch.tensor([2.0, 5.0, 2.0])
    arguments = (images, hit, union, hit, union, 0)
    assert drawn.gain({0}, "best", *arguments) == pytest.approx(2 / 7 - 2 / 8)  # of images 1 and 2
    assert drawn.gain({1}, "best", *arguments) is None  # image 1 asks for what there is
    assert drawn.gain({0, 2}, "sure", *arguments) == pytest.approx(1 / 5 - 1 / 4)
    assert drawn.gain({0, 1}, "sure", *arguments) is None  # they do not agree
    assert drawn.gain({0}, "sure", *arguments) is None  # one tells nothing
    for count in (1, 2, 3):
        assert len(drawn.pick_images(images, count, seed=0)) == count
    assert drawn.pick_images(torch.tensor([0, 0, 0]), 2, seed=1) == {0}


def test_what_masks_drawn_by_hand_are_worth(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    root = write_folder(tmp_path / "tiny")
    settings = StudentSettings(crop=16, steps=3, members=1, batch_size=4)
    student = train_student(load_folder(root, "train", masks=False), Pmg(8), settings=settings)
    student.save(tmp_path / "student.safetensors")
    argv = ["--set", str(root), str(tmp_path / "student.safetensors"), "--drawn", "1", "2", "--draws", "2"]
    assert drawn.main(argv) == 0
    assert [line.split()[3:7:2] for line in capsys.readouterr().out.splitlines() if "tiny" in line] == [
        [number, way] for number in ("1", "2") for way in drawn.WAYS
    ]


def test_moved_points_lie_so_far_away_and_in_the_image() -> None:
    data = training_set("no such set", images=4, size=64)
    for pixels in (1, 4):
        moved = student.move_points(data, pixels)
        step = (moved - data.points)[:, 1:].double().norm(dim=1)
        inner = ((data.points[:, 1:] >= pixels) & (data.points[:, 1:] < 64 - pixels)).all(1)
        assert bool(inner.any()) and bool(((step[inner] - pixels).abs() <= 0.75).all())
        assert bool((moved[:, 1:] >= 0).all()) and bool((moved[:, 1:] < 64).all())


def test_loops_over_targets_give_the_masks_of_their_makers() -> None:
    data = training_set("synthetic", 2, 64)
    for name in ("lelcm", "com, the same computation"):
        race = makers.RACES[name]
        masks = race.loop(data)
        assert masks.any() and (masks ^ make_maker(race.maker).masks(data)).sum() <= 0.01 * masks.sum()


def test_settings_are_compared_on_folds(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Each training image is held out once; its points and masks are in no run of its fold."""
    root, out = write_folder(tmp_path / "tiny"), tmp_path / "folds"
    common = ["--data", str(root), "--out", str(out), "--epochs", "1", "--json", str(tmp_path / "found.json"), "--"]
    more = [
        "--model",
        "unet:widths=2-4",
        "--patch-size",
        "32",
        "--batch-size",
        "2",
        "--device",
        "cpu",
        "--threads",
        "1",
    ]
    assert folds.main([*common, *more]) == 0
    held = [load_folder(out / f"fold{fold}" / "tiny", "test") for fold in range(3)]
    names = [f"train{number}" for number in range(6)]
    assert sorted(name for part in held for name in part.names) == names
    for fold, part in enumerate(held):
        used = load_folder(out / f"fold{fold}" / "tiny", "train").names
        assert sorted([*used, *part.names]) == names
    found = json.loads((tmp_path / "found.json").read_text())
    assert [counts["targets"] for counts in found["folds"]] == [len(part.points) for part in held]
    for name, value in found["together"].items():
        assert value == sum(counts[name] for counts in found["folds"])
    assert found["settings"]["epochs"] == [1, 0] and found["options"] == more
    assert "together" in capsys.readouterr().out
    for wrong, said in (
        (["--folds", "1"], "expected 2 to 6"),
        (["--folds", "7"], "expected 2 to 6"),
        (["--take", "0"], "take 0: expected at least 1"),
    ):
        assert folds.main([*wrong, *common, *more]) == 2
        assert said in capsys.readouterr().err
    assert folds.main([*common, *more]) == 2  # the runs are there already
    assert "train.py did not end" in capsys.readouterr().err

    common[3] = str(tmp_path / "both")
    assert folds.main(["--stages", "2", "--take", "1", *common, *more, "--positive", "0.5", "0"]) == 0
    both = json.loads((tmp_path / "found.json").read_text())
    results = read_run(tmp_path / "both" / "fold0" / "run")["results"]
    assert both["settings"]["epochs"] == [1, 1] and both["settings"]["positive"] == [0.5, 0]
    assert both["together"]["union"] == results["stage 2"]["union"]


def test_makers_race_their_loops(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    pytest.importorskip("skimage", reason="scikit-image is not installed")
    monkeypatch.setattr(loops, "REPEATS", 2)
    monkeypatch.setitem(makers.RACES, "mclc", replace(makers.RACES["mclc"], maker="mclc:repeats=2"))
    root = write_folder(tmp_path / "tiny")
    common = ["--data", str(root), "--json", str(tmp_path / "found.json")]
    assert makers.main(["--maker", "mclc", "--images", "2", "--rounds", "1", *common]) == 0
    (row,) = json.loads((tmp_path / "found.json").read_text())["rows"]
    assert row["maker"]["points"] == 6 and row["loop"]["points"] == 2 and row["settings"]["repeats"] == 2
    assert row["ratio"] == pytest.approx(row["maker"]["points_per_second"] / row["loop"]["points_per_second"])
    assert min(row["maker"]["iou"], row["loop"]["iou"]) > 0.3  # both find the blobs
    assert "makers against loops" in capsys.readouterr().out


@pytest.mark.parametrize("command", [extent, mixed, rules, student])
def test_a_command_of_real_sets_says_in_one_line_that_it_has_none(
    command: ModuleType, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture, tmp_path: Path
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("HMG_DATA", raising=False)
    assert in_one_line(lambda: command.main([])) == 2
    assert (
        capsys.readouterr().err
        == "error: HMG_DATA is not set; name the folder that holds NUAA-SIRST/ and NUDT-SIRST/\n"
    )
    monkeypatch.setenv("HMG_DATA", str(tmp_path))
    assert in_one_line(lambda: command.main([])) == 2
    assert capsys.readouterr().err.startswith(f"error: {tmp_path / 'NUAA-SIRST'}: no such folder")
