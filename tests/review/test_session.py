"""What the page can ask for: masks equal the library's, steps are kept, and two writers never mix silently."""

from __future__ import annotations

import csv
import json
import os
import threading
from pathlib import Path

import numpy as np
import pytest
import torch
from command_tools import run
from PIL import Image
from refusal import refused
from scipy import ndimage
from tiny import write_folder

from hmg_gpu import point_to_box, point_to_mask
from hmg_gpu.commands.main import parse
from hmg_gpu.commands.review import _Export, review
from hmg_gpu.common.errors import HMGError
from hmg_gpu.data import load_folder, read_image, read_mask, read_points, write_store
from hmg_gpu.data.store import load_store
from hmg_gpu.masks import ByHand, Learned, Pmg, make_maker
from hmg_gpu.masks.student import StudentSettings, train_student
from hmg_gpu.masks.student.network import CropNet
from hmg_gpu.masks.student.student import Student
from hmg_gpu.review.gallery import FolderGallery, open_store
from hmg_gpu.review.history import Click, History
from hmg_gpu.review.point_masks import PointMasks, mask_runs
from hmg_gpu.review.saving import as_csv, digest, read_rows
from hmg_gpu.review.session import Conflict, Session, open_session
from tests.review.served import EXTENT


@pytest.fixture
def root(tmp_path: Path) -> Path:
    return write_folder(tmp_path / "tiny")


def gallery_of(root: Path) -> FolderGallery:
    return FolderGallery(sorted((root / "images").iterdir()), root / "masks")


def opened(root: Path, save: Path, points=None, maker=None, export=None):
    return open_session(gallery_of(root), maker or Pmg(extent=EXTENT), save, export, points)


def united(state: dict) -> np.ndarray:
    mask = np.zeros((state["height"], state["width"]), bool)
    for point in state["points"]:
        for y, x0, x1 in point["runs"]:
            mask[y, x0:x1] = True
    return mask


def change(session: Session, row: int, what: str, **values) -> dict:
    return session.edit(row, session.state(row)["revision"], what, **values)


# ---- masks


@pytest.mark.parametrize("kind", ["8 bits", "16 bits", "float"])
@pytest.mark.parametrize("extent", [None, 3, 20, 300])
def test_a_points_mask_is_the_librarys(kind: str, extent: int | None, rng: np.random.Generator) -> None:
    """Anywhere, the corners of an image larger than what is cut out of it included."""
    pixels = rng.normal(100, 10, (400, 380))
    for y, x in ((0, 0), (399, 379), (200, 150), (3, 377)):
        pixels[max(0, y - 3) : y + 4, max(0, x - 5) : x + 6] += 60
    pixels = {"8 bits": pixels.round().astype(np.uint8), "16 bits": (pixels * 100).astype(np.uint16)}.get(
        kind, pixels.astype(np.float32)
    )
    image = torch.from_numpy(pixels if kind == "8 bits" else pixels.astype(np.float32))[None]
    masks = PointMasks(Pmg(extent=EXTENT))
    for y, x in ((0, 0), (399, 379), (200, 150), (3, 377), (398, 0), (10, 10)):
        found = masks.make(pixels, y, x, extent)
        points = torch.tensor([[0, y, x]])
        wanted = point_to_mask(image, points, extent=extent or EXTENT)[0].numpy()
        mask = np.zeros_like(wanted)
        for row, x0, x1 in found.runs():
            mask[row, x0:x1] = True
        assert np.array_equal(mask, wanted)
        assert list(found.box) == point_to_box(image, points, extent=extent or EXTENT)[0].tolist()


def test_runs_are_the_mask(rng: np.random.Generator) -> None:
    mask = rng.random((20, 31)) < 0.4
    again = np.zeros_like(mask)
    for y, x0, x1 in mask_runs(mask):
        assert x0 < x1 and not again[y, x0:x1].any()
        again[y, x0:x1] = True
    assert np.array_equal(mask, again)
    assert mask_runs(np.zeros((0, 0), bool)) == []


def test_reasons_are_those_of_pmg(root: Path) -> None:
    data = load_folder(root, "train")
    image, y, x = data.points[0].tolist()
    height, width = data.sizes[image].tolist()
    pixels = data.images[image, :height, :width].numpy()
    found = PointMasks(Pmg(extent=EXTENT)).explain(pixels, y, x, None)
    y0, x0, y1, x1 = found["box"]
    assert found["box"] == tuple(
        point_to_box(torch.from_numpy(pixels)[None], torch.tensor([[0, y, x]]), extent=EXTENT)[0]
    )
    right = found["directions"]["right"]
    reach = min(EXTENT, width - 1 - x)
    rows = slice(max(0, y - 4), y + 5)
    assert right["vmax"] == pixels[rows, x : x + reach + 1].max(0).tolist()
    assert right["vavg"] == pytest.approx(pixels[rows, x : x + reach + 1].mean(0))
    assert right["boundary"] == x1 - 1 - x and right["threshold"] == right["vavg"][right["border"]]
    assert right["vavg"][right["boundary"]] <= right["threshold"]
    assert found["sigma"] == pytest.approx(0.15 * pixels[y, x] + 0.85 * pixels[y0:y1, x0:x1].mean())
    first, row = found["row"]
    mask = point_to_mask(torch.from_numpy(pixels)[None], torch.tensor([[0, y, x]]), extent=EXTENT)[0].numpy()
    assert first == x0 and np.array_equal(np.array(row) >= 0.5, mask[y, x0:x1])


def test_doubt_is_the_change_when_the_click_moves(root: Path) -> None:
    pixels = np.zeros((40, 40), np.uint8)
    pixels[10:20, 10:20] = 100
    masks = PointMasks(Pmg(extent=EXTENT))
    assert masks.doubt(pixels, 15, 15, None) == 0
    pixels[15, 16:] = 100  # a line: whoever clicks on it gets other masks
    assert 0 < masks.doubt(pixels, 14, 15, None) <= 1
    one = masks.doubt(np.full((1, 1), 9, np.uint8), 0, 0, None)
    assert one == 0


def test_learned_points_are_the_students_and_by_hand_pmgs(root: Path, tmp_path: Path) -> None:
    data = load_folder(root, "train")
    settings = StudentSettings(crop=24, shift=2, steps=2, batch_size=4, members=1)
    train_student(data, Pmg(extent=EXTENT), settings=settings).save(tmp_path / "s.safetensors")
    maker = make_maker(f"learned:{tmp_path / 's.safetensors'}", pmg=Pmg(extent=EXTENT)).fit(data)
    rows = {name: [] for name in data.names}
    for image, y, x in data.points.tolist():
        rows[data.names[image]].append((y, x, None))
    extents = {data.names[0]: {tuple(data.points[0, 1:].tolist()): 5}}
    with opened(root, tmp_path / "p.csv", rows, maker) as session:
        first = session.gallery.row_of[data.names[0]]
        change(session, first, "extent", id=session.state(first)["points"][0]["id"], extent=5)
        wanted = ByHand(maker, maker.pmg, extents).masks(data)
        for image, name in enumerate(data.names):
            height, width = data.sizes[image].tolist()
            found = united(session.state(session.gallery.row_of[name]))
            assert np.array_equal(found, wanted[image, :height, :width].numpy())
        assert session.explain(first, session.state(first)["points"][0]["id"])["by"] == "pmg"
    assert isinstance(maker, Learned)


def test_learned_masks_of_neighbours_are_taken_apart_as_the_library_does(
    root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    data = load_folder(root, "train")
    student = Student({EXTENT: [CropNet()]}, StudentSettings(crop=24, members=1))
    offset = torch.arange(-11, 12).float()
    disc = (1 - torch.hypot(offset[:, None], offset) / 8).clamp(min=0)
    monkeypatch.setattr(Student, "probabilities", lambda self, images, points, **_: disc.expand(len(points), -1, -1))
    maker = Learned(pmg=Pmg(extent=EXTENT).fit(data), student=student)
    name = data.names[0]
    with opened(root, tmp_path / "p.csv", {name: [(12, 15, None)]}, maker) as session:
        row = session.gallery.row_of[name]
        alone = united(session.state(row))
        change(session, row, "add", y=10, x=10, extent=None)
        change(session, row, "add", y=1, x=9, extent=None)  # its window reaches beyond the image
        shown = session.state(row)
        data.points = torch.tensor([[0, point["y"], point["x"]] for point in sorted(shown["points"], key=place)])
        height, width = data.sizes[0].tolist()
        assert np.array_equal(united(shown), maker.masks(data)[0, :height, :width].numpy())
        assert ndimage.label(united(shown), np.ones((3, 3)))[1] == 3
        for number in (1, 2):
            change(session, row, "remove", id=shown["points"][number]["id"])
        assert np.array_equal(united(session.state(row)), alone)


def place(point: dict) -> tuple[int, int]:
    return point["y"], point["x"]


# ---- changes


def test_add_move_extent_remove_undo_redo(root: Path, tmp_path: Path) -> None:
    save = tmp_path / "p.csv"
    pixels = torch.from_numpy(read_image(root / "images" / "test0.png"))[None]

    def wanted(*points: tuple[int, int], extent: int = EXTENT) -> np.ndarray:
        rows = torch.tensor([[0, *point] for point in points], dtype=torch.int64).reshape(-1, 3)
        return point_to_mask(pixels, rows, extent=extent)[0].numpy()

    with opened(root, save) as session:
        state = change(session, 0, "add", y=9, x=12)
        assert np.array_equal(united(state), wanted((9, 12)))
        number = state["points"][0]["id"]
        state = change(session, 0, "move", id=number, y=11, x=13)
        assert np.array_equal(united(state), wanted((11, 13))) and state["points"][0]["id"] == number
        state = change(session, 0, "extent", id=number, extent=4)
        assert np.array_equal(united(state), wanted((11, 13), extent=4)) and state["points"][0]["extent"] == 4
        state = change(session, 0, "remove", id=number)
        assert state["points"] == [] and state["redo"] is None
        steps = [united(state := session.undo(state["undo"]["number"])) for _ in range(4)]
        expected = [wanted((11, 13), extent=4), wanted((11, 13)), wanted((9, 12)), wanted()]
        assert all(np.array_equal(one, other) for one, other in zip(steps, expected, strict=True))
        assert state["undo"] is None
        state = session.redo(state["redo"]["number"])
        state = session.redo(state["redo"]["number"])
        assert np.array_equal(united(state), wanted((11, 13)))
    assert read_rows(save) == {"test0": [(11, 13, None)]}
    with opened(root, save) as session:  # undo survives
        state = session.undo(session.state(0)["undo"]["number"])
        assert np.array_equal(united(state), wanted((9, 12)))
        change(session, 0, "extent", id=number, extent=6)
        assert session.state(0)["redo"] is None  # another way was taken
        assert list(session.history.changes()) == [
            {"image": "test0", "what": "added", "y": 9, "x": 12, "extent": 6}
            | {"before_y": None, "before_x": None, "before_extent": None}
        ]
    assert read_rows(save) == {"test0": [(9, 12, 6)]}
    assert read_points(save)["test0"].tolist() == [[9, 12]]  # as every reader takes it


def test_what_is_refused_changes_nothing(root: Path, tmp_path: Path) -> None:
    with opened(root, tmp_path / "p.csv") as session:
        state = change(session, 0, "add", y=5, x=6)
        number = state["points"][0]["id"]
        for what, values, words in [
            ("add", {"y": 5, "x": 6}, "there is a point at (y=5, x=6) already"),
            ("add", {"y": -1, "x": 0}, "whole pixels inside"),
            ("add", {"y": 5, "x": 10**9}, "whole pixels inside"),
            ("add", {}, "whole pixels inside"),
            ("add", {"y": 1, "x": 1, "extent": 0}, "from 1 to 4096"),
            ("move", {"id": number + 1, "y": 1, "x": 1}, "there is no point"),
            ("extent", {"id": number, "extent": 4097}, "from 1 to 4096"),
            ("grow", {"id": number}, "expected add, move, extent or remove"),
        ]:
            refused(lambda: change(session, 0, what, **values), words)  # noqa: B023
        refused(lambda: session.state(8), "image 8: expected 0 to 7")
        with pytest.raises(Conflict):
            session.edit(0, 0, "add", y=8, x=8)
        with pytest.raises(Conflict):
            session.undo(7)
        assert len(session.history.steps) == 1 and session.state(0)["points"] == state["points"]


def test_a_csv_edited_elsewhere_counts_and_can_be_undone(root: Path, tmp_path: Path) -> None:
    save = tmp_path / "p.csv"
    with opened(root, save, {"test0": [(9, 12, None)], "elsewhere": [(1, 2, 3)]}) as session:
        number = session.state(0)["points"][0]["id"]
    assert "elsewhere,1,2,3" in save.read_text()  # of an image that is not here
    save.write_text("image,y,x\ntest0.png,9,12\ntest0.png,4,5\nelsewhere,1,2\n")
    with opened(root, save) as session:
        points = session.state(0)["points"]
        assert [(point["y"], point["x"]) for point in points] == [(9, 12), (4, 5)] and points[0]["id"] == number
        assert {step.what for step in session.history.steps} == {"edited outside"}
        session.undo(session.history.steps[-1].number)
        assert len(session.state(0)["points"]) == 1
    with opened(root, save) as session:  # our own CSV is no edit
        assert len(session.history.steps) == 1


def test_the_first_csv_is_kept(root: Path, tmp_path: Path) -> None:
    save = tmp_path / "p.csv"
    text = "x,y,image,who\n12.7,9.2,test0.png,me\n"
    save.write_text(text)
    with opened(root, save) as session:
        assert session.state(0)["points"][0]["y"] == 9
    assert (tmp_path / "p.review" / "original.csv").read_text() == text
    assert save.read_text() == "image,y,x,extent\ntest0.png,9,12,\n"


def test_points_outside_can_be_seen_and_removed(root: Path, tmp_path: Path) -> None:
    with opened(root, tmp_path / "p.csv", {"test0": [(900, 1, None)]}) as session:
        (point,) = session.state(0)["points"]
        assert point["area"] == 0
        assert change(session, 0, "remove", id=point["id"])["points"] == []


def test_one_server_at_a_time(root: Path, tmp_path: Path) -> None:
    with opened(root, tmp_path / "p.csv"):
        refused(lambda: opened(root, tmp_path / "p.csv").__enter__(), "is writing there", str(os.getpid()))
    with opened(root, tmp_path / "p.csv"):
        pass


# ---- journal


def test_a_journal_that_was_cut_off_goes_on(tmp_path: Path) -> None:
    path = tmp_path / "journal.jsonl"
    history = History.begin(path, {"a": [(1, 2, None)]})
    history.do("add", "a", (*history.points["a"], Click(1, 3, 4)))
    history.do("add", "b", (Click(2, 5, 6, 7),))
    history.undo()
    whole = path.read_bytes()
    states = {}
    for length in range(len(whole) + 1):
        path.write_bytes(whole[:length])
        if length <= whole.index(b"\n"):
            refused(lambda: History.resume(path), "line 1: no journal of hmg-gpu review")
            continue
        again = History.resume(path)
        states[tuple(sorted(again.points.items()))] = None
        assert path.read_bytes().endswith(b"\n")
        again.do("add", "c", ())
        assert History.resume(path).points == again.points
    assert len(states) == 4  # before, one step, two steps, one taken back


def test_forged_journals_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "journal.jsonl"
    good = '{"hmg_gpu review": 1, "points": {}}\n'
    for text in (
        "", "\n", "[]\n", "{}\n", '{"hmg_gpu review": 2, "points": {}}\n', '{"hmg_gpu review": 1}\n',
        good + "x\n", good + '{"undo": 1}\n', good + '{"redo": 1}\n', good + "7\n", good + "{}\n",
        good + '{"do": 1, "what": "add", "image": "a", "before": [], "after": [[0, "1", 2, null]]}\n',
        good + '{"do": 1, "what": "add", "image": "a", "before": [], "after": [[0, 1]]}\n',
    ):  # fmt: skip
        path.write_text(text)
        refused(lambda: History.resume(path), "journal.jsonl")


def test_a_step_that_was_not_written_leaves_no_trace(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    history = History.begin(tmp_path / "journal.jsonl", {})
    before = history.path.read_bytes()

    def broken(handle: int) -> None:
        raise OSError(5, "Input/output error")

    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", broken)
        with pytest.raises(HMGError, match="Input/output error"):
            history.do("add", "a", (Click(0, 1, 2),))
    assert history.path.read_bytes() == before and history.points == {}
    history.path.write_bytes(before + b'{"do": 1}\n')
    refused(lambda: History.resume(history.path), "line 2: no journal")


def test_what_others_write_meanwhile_is_kept(root: Path, tmp_path: Path) -> None:
    save = tmp_path / "p.csv"
    with opened(root, save) as session:
        save.write_text("image,y,x\ntest0.png,4,5\n")
        session.saver.write()
        (kept,) = (tmp_path / "p.review").glob("edited_*.csv")
        assert kept.read_text() == "image,y,x\ntest0.png,4,5\n" and str(kept) in session.state(0)["saving"]


@pytest.mark.parametrize("name", ["a\u2028b", "a\x0bb", " a", "a\udcff"])
def test_names_that_a_csv_does_not_keep_are_refused(tmp_path: Path, name: str) -> None:
    refused(lambda: FolderGallery([tmp_path / "good.png", tmp_path / f"{name}.png"]), "a name that a CSV does not keep")


def test_a_move_to_the_same_place_is_no_step(root: Path, tmp_path: Path) -> None:
    with opened(root, tmp_path / "p.csv") as session:
        (point,) = change(session, 0, "add", y=5, x=6)["points"]
        change(session, 0, "move", id=point["id"], y=5, x=6)
        assert len(session.history.steps) == 1


def test_a_full_disk_keeps_the_csv_and_is_told(root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    save = tmp_path / "p.csv"
    with opened(root, save) as session:
        change(session, 0, "add", y=5, x=6)
        session.saver.write()
        before = save.read_bytes()

        def full(path: Path, content: bytes) -> None:
            raise HMGError(f"{path}: cannot be written (No space left on device)")

        with monkeypatch.context() as patch:
            patch.setattr("hmg_gpu.review.saving.write_bytes", full)
            change(session, 0, "add", y=9, x=9)
            with pytest.raises(HMGError):
                session.saver.write()
            assert save.read_bytes() == before
            assert "No space left" in session.state(0)["saving"]
            for _ in range(2):
                with pytest.raises(HMGError):
                    session.saver.write()
            assert digest(before) in History.resume(session.history.path).saved  # a restart knows it as ours
        change(session, 0, "add", y=11, x=11)
        session.saver.write()
        assert session.state(0)["saving"] == "" and save.read_text().count("\n") == 4


def test_csv_text_is_read_back(tmp_path: Path) -> None:
    names = ['quote"d', "with, comma", "plain"]
    points = {name: (Click(number, number, 7, number or None),) for number, name in enumerate(names)}
    (tmp_path / "p.csv").write_text(as_csv(points, {}))
    assert read_rows(tmp_path / "p.csv") == {
        name: [(number, 7, number or None)] for number, name in sorted(enumerate(names), key=lambda pair: pair[1])
    }


# ---- the command and its export


@pytest.fixture
def exporting(root: Path, tmp_path: Path):
    def make(*more: object) -> _Export:
        options = parse(["review", "--images", str(root / "images"), *map(str, more)])
        return _Export(options, Pmg(extent=EXTENT))

    return make


def test_export_is_what_hmg_gpu_masks_makes(root: Path, tmp_path: Path, exporting) -> None:
    save = tmp_path / "p.csv"
    with opened(root, save, {"test0": [(9, 12, None)], "train1": [(9, 9, None)]}, export=exporting()) as session:
        number = session.state(0)["points"][0]["id"]
        change(session, 0, "extent", id=number, extent=4)
        change(session, 0, "add", y=20, x=20, extent=None)
        change(session, 3, "remove", id=session.state(3)["points"][0]["id"])
        change(session, 5, "add", y=8, x=30, extent=None)
        session.export.run()
        found = session.export.state()
        assert found["state"] == "done" and found["changes"] == 4, found
        shown = {name: united(session.state(row)) for row, name in enumerate(session.gallery.names)}
    out = Path(found["folder"])
    assert out == tmp_path / "p_masks"
    for name, mask in shown.items():
        assert np.array_equal(read_mask(out / f"{name}.png"), mask)
    with open(out / "changes.csv", newline="") as handle:
        rows = list(csv.DictReader(handle))
    assert [(row["image"], row["what"]) for row in rows] == [
        ("test0", "extent changed"), ("test0", "added"), ("train1", "removed"), ("train3", "added"),
    ]  # fmt: skip
    assert json.loads((out / "coco.json").read_text())["annotations"]
    # The saved CSV and the printed command make the same bits.
    command = found["command"].split()
    assert command[:2] == ["hmg-gpu", "masks"] and f"--extent {EXTENT}" in found["command"]
    again = [*command[1:]]
    again[again.index("--points") + 1] = str(save)
    again[again.index("--out") + 1] = str(tmp_path / "again")
    assert run(*again) == 0
    for name in (*(f"{name}.png" for name in shown), "coco.json"):
        assert (out / name).read_bytes() == (tmp_path / "again" / name).read_bytes()
    about = json.loads((out / "hmg.json").read_text())["settings"]["masks"]
    assert about["by_hand"]["points"] == 1 and about["extent"] == EXTENT


def test_an_export_that_fails_says_why(root: Path, tmp_path: Path, exporting) -> None:
    with opened(root, tmp_path / "p.csv", export=exporting()) as session:
        session.export.run()
        assert session.export.state()["state"] == "failed" and "no point in any" in session.export.state()["error"]

        def broken(points: Path, out: Path) -> str:
            raise RuntimeError("planted")

        session.export._write = broken
        session.export.run()
        assert session.export.state()["error"] == "RuntimeError: planted"


def test_a_packed_store(root: Path, tmp_path: Path) -> None:
    data = load_folder(root, "train")
    write_store(tmp_path / "t.h5", [data])
    again = load_store(tmp_path / "t.h5", "train")
    with (
        open_store(tmp_path / "t.h5", "train") as gallery,
        open_session(gallery, Pmg(extent=EXTENT), tmp_path / "p.csv", None) as session,
    ):
        for row in range(len(data)):
            height, width = data.sizes[row].tolist()
            assert np.array_equal(gallery.pixels(row), again.images[row, :height, :width].numpy())
        state = change(session, 1, "add", y=9, x=9)
        assert np.array_equal(gallery.truth(1), data.masks[1, :40, :33].numpy()) and state["iou"] is not None
        assert gallery.thumbnail(0).startswith(b"\x89PNG")


@pytest.mark.parametrize(
    ("more", "words"),
    [
        (("--points", "none.json"), "none.json: no such file or folder of points"),
        (("--save", "points.txt"), "expected a name that ends in .csv"),
        (("--masks", "folder:x"), "makes no mask of a single point"),
        (("--masks", "learned"), "learns from points, and there are none yet"),
        (("--truth", "nowhere"), "nowhere: no such folder of masks"),
        (("--split", "best"), "no lists for the split"),
    ],
)
def test_mistakes_of_the_command(root: Path, tmp_path: Path, more, words: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    options = parse(["review", "--images", str(root / "images"), "--no-browser", *more])
    refused(lambda: review(options, None), words)
    assert not list(tmp_path.glob("*.csv"))


def test_images_that_cannot_be_read_are_told_one_by_one(root: Path, tmp_path: Path) -> None:
    (root / "images" / "test0.png").write_bytes(b"no image")
    Image.fromarray(np.zeros((9, 9), np.uint8)).save(root / "masks" / "test1.png")
    with opened(root, tmp_path / "p.csv", {"test0": [(1, 1, None)], "test1": [(1, 1, None)]}) as session:
        refused(lambda: session.state(0), "test0.png: cannot be read")
        assert session.state(1)["iou"] is None and len(session.state(1)["points"]) == 1
        assert "test1.png: the mask is 9 x 9" in session.truth(1)["error"] and session.truth(1)["runs"] == []
        assert session.state(2)["points"] == []


def test_doubts_come_by_themselves(root: Path, tmp_path: Path) -> None:
    with opened(root, tmp_path / "p.csv", {"test0": [(9, 12, None)], "train0": [(9, 9, None)]}) as session:
        done = threading.Event()
        for _ in range(500):
            if session.doubts.since(0)["count"] == 2:
                break
            done.wait(0.02)
        found = dict(session.doubts.since(0)["found"])
        pixels = session.gallery.pixels(0)
        assert found.keys() == {0, 2} and found[0] == session.masks.doubt(pixels, 9, 12, None)
        change(session, 0, "remove", id=session.state(0)["points"][0]["id"])
        for _ in range(500):
            if session.doubts.since(2)["count"] == 3:
                break
            done.wait(0.02)
        assert session.doubts.since(2)["found"] == [(0, None)]
