"""What every maker and rule can be asked, how text becomes one, and that one of somebody's own is taken everywhere."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import pytest
import reference
import torch
from refusal import refused
from tiny import POISON, SIZES, tiny_set
from torch import Tensor

from hmg_gpu import HMGError, MaskUpdater
from hmg_gpu.data import ImageSet, write_mask
from hmg_gpu.masks import (
    MAKERS,
    RULES,
    ByHand,
    Folder,
    Learned,
    Lelcm,
    Lesps,
    Maker,
    Pal,
    PalMaker,
    Pmg,
    Points,
    Rule,
    Soft,
    Union,
    make_maker,
    make_rule,
)
from hmg_gpu.masks.makers import learned as learned_maker
from hmg_gpu.masks.makers import pmg as pmg_maker
from hmg_gpu.masks.student import Student, StudentSettings, train_student

QUICK = StudentSettings(crop=24, shift=2, steps=16, batch_size=4, learning_rate=1e-2, averaging=0.0, members=1)


@pytest.fixture(scope="module")
def student() -> Student:
    return train_student(tiny_set(), Pmg(8), settings=QUICK)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Random masks of the tiny set, as another system may have written them."""
    rng = np.random.default_rng(3)
    for index, size in enumerate(SIZES):
        write_mask(tmp_path / "theirs" / f"train{index}.png", rng.random(size) < 0.3)
    return tmp_path / "theirs"


@dataclass(frozen=True)
class Squares(Maker):
    """The least that a maker needs: a name and masks."""

    name = "squares"

    def masks(self, data: ImageSet) -> Tensor:
        found = torch.zeros(data.images.shape, dtype=torch.bool)
        for (image, y, x), (height, width) in zip(data.points, data.sizes[data.points[:, 0]], strict=True):
            found[image, max(y - 2, 0) : min(y + 3, height), max(x - 2, 0) : min(x + 3, width)] = True
        return found


# ---- from text ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "parts"),
    [
        ("magic", ("masks 'magic'", f"one of {', '.join(MAKERS)}", "NAME:ARGUMENT")),
        ("", ("masks ''", f"one of {', '.join(MAKERS)}")),
        ("PMG", ("masks 'PMG'",)),
        ("magic:extent=8", ("masks 'magic:extent=8'",)),
        ("mag\nic", ("masks 'mag\\nic'",)),
        ("pmg:extent=0", ("extent = 0", "at least 1")),
        ("pmg:extent=-3", ("extent = '-3'", "a whole number or auto")),
        ("pmg:extent=8.5", ("extent = '8.5'", "a whole number or auto")),
        ("pmg:extent=", ("extent = ''", "a whole number or auto")),
        ("pmg:extent=None", ("extent = 'None'", "a whole number or auto")),
        ("pmg:half_width=-1", ("half_width = -1", "at least 0")),
        ("pmg:half-width=x", ("half_width = 'x'", "a whole number")),
        ("pmg:alpha=2", ("alpha = 2", "a number from 0 to 1")),
        ("pmg:alpha=nan", ("alpha = nan", "a number from 0 to 1")),
        ("pmg:alpha=much", ("alpha = 'much'", "a number")),
        ("pmg:directional=no", ("directional = 'no'", "true or false")),
        ("pmg:foo=1", ("pmg:foo=1", "NAME=VALUE of extent, half_width, alpha, directional")),
        ("pmg:why=1", ("pmg:why=1", "NAME=VALUE of extent, half_width, alpha, directional")),
        ("pmg:extent", ("pmg:extent", "NAME=VALUE of extent, half_width, alpha, directional")),
        ("pmg:extent=8;alpha=0.1", ("extent = '8;alpha=0.1'", "a whole number or auto")),
        ("pmg:alpha=0.1,extent", ("pmg:alpha=0.1,extent", "NAME=VALUE of")),
        ("pmg:fo\no=1", ("masks 'pmg:fo\\no=1'", "NAME=VALUE of")),
        ("folder:", ("folder:PATH",)),
        ("folder", ("folder:PATH",)),
    ],
)
def test_bad_text_is_refused_on_one_line(text: str, parts: tuple[str, ...]) -> None:
    refused(lambda: make_maker(text), *parts)
    refused(lambda: MaskUpdater(tiny_set(), text), *parts)


def test_what_only_the_data_shows_is_refused_when_it_is_fitted(tmp_path: Path) -> None:
    data = tiny_set()
    missing, other = tmp_path / "missing.safetensors", tmp_path / "other.safetensors"
    other.write_bytes(b"no student")
    for text, parts in (
        ("folder:/nonexistent", ("/nonexistent: no such folder",)),
        (f"folder:{other}", (f"{other}: no such folder",)),
        (f"learned:{missing}", (str(missing), "no such checkpoint")),
        (f"learned:{other}", (str(other),)),
    ):
        maker = make_maker(text)
        refused(lambda maker=maker: maker.fit(data), *parts)
        refused(lambda maker=maker: MaskUpdater(data, maker), *parts)


def test_bad_rules_are_refused_on_one_line() -> None:
    for text in ("hard", "", "Union", "soft:weight=0.5", "un\nion"):
        refused(lambda text=text: make_rule(text), f"rule {text!r}", "one of auto, union, soft")
    for rule in RULES:
        refused(lambda rule=rule: make_rule(rule, radius=-1), "radius = -1", "at least 0")
        refused(lambda rule=rule: make_rule(rule, radius=2.5), "radius = 2.5", "int")
    refused(lambda: Soft(weight=1.5), "weight = 1.5", "a number from 0 to 1")
    refused(lambda: Soft(weight="0.5"), "weight = '0.5'", "float")


def test_text_and_what_it_becomes() -> None:
    for text, maker in {
        "pmg": Pmg(),
        "pmg:": Pmg(),
        "pmg:extent=10": Pmg(10),
        "pmg:extent=auto": Pmg("auto"),
        "pmg:extent=10,alpha=0.2": Pmg(10, alpha=0.2),
        "pmg: half-width = 3 ,directional=false": Pmg(half_width=3, directional=False),
        "learned": Learned(),
        "learned:": Learned(),
        "learned:a,b=c.safetensors": Learned("a,b=c.safetensors"),
        "folder:a:b/c=d,e": Folder("a:b/c=d,e"),
    }.items():
        made = make_maker(text)
        assert made == maker and type(made) is type(maker) and made.name == text.partition(":")[0], text
        assert made == MAKERS[made.name].from_text(text.partition(":")[2])
    assert make_rule("auto") == Union(30) and make_rule("auto", radius=5, maker=make_maker("learned")) == Soft(radius=5)
    by_hand = ByHand(make_maker("learned"), Pmg(), {})
    assert make_rule("auto", maker=by_hand) == Soft() and make_rule("auto", maker=Pmg()) == Union()
    assert make_rule("union", maker=by_hand) == Union()
    assert make_rule("union") == Union(30) and make_rule("soft", radius=5) == Soft(radius=5, weight=0.7)
    for one in (Pmg(3), Learned(), Folder("a"), Squares()):
        assert make_maker(one) is one
    for one in (Union(3), Soft(weight=0.2)):
        assert make_rule(one, radius=9) is one


def test_a_pmg_that_says_what_it_is_comes_back_from_its_text() -> None:
    for maker in (Pmg(7, 2, 0.3, False), Pmg("auto"), Pmg(1, 0, 0.0), Pmg(40, 9, 1.0)):
        text = ",".join(f"{name}={str(value).lower()}" for name, value in maker.settings().items())
        assert make_maker(f"pmg:{text}") == maker


def test_values_from_elsewhere_stand_behind_those_of_the_text() -> None:
    """--extent and its like give the defaults; what the text says counts more."""
    given = {"pmg": Pmg(9, 3, 0.4), "seed": 5}
    assert make_maker("pmg", **given) == Pmg(9, 3, 0.4)
    assert make_maker("pmg:alpha=0.1", **given) == Pmg(9, 3, 0.1)
    assert make_maker("pmg:half_width=1", extent=6, seed=5) == Pmg(6, 1)
    assert make_maker("learned", **given) == Learned(pmg=Pmg(9, 3, 0.4), seed=5)
    assert make_maker("learned:a", **given) == Learned("a", Pmg(9, 3, 0.4), 5)
    assert make_maker("folder:a", **given) == Folder("a")


# ---- what makers and rules say of themselves ------------------------------------------------------------------------


def test_about_is_json_and_equal_for_equal_makers(student: Student) -> None:
    copy = Student(student.networks, student.settings, student.threshold)
    makers: list[Callable[[], Maker | Rule]] = [
        lambda: Pmg(8),
        lambda: Pmg(9),
        lambda: Pmg(8, alpha=0.2),
        lambda: Pmg(8, directional=False),
        lambda: Learned(student=copy, pmg=Pmg(8)),
        lambda: Learned(student=student, pmg=Pmg(9)),
        lambda: Learned(pmg=Pmg(8)),
        lambda: Folder("a"),
        lambda: Folder("b"),
        Points,
        PalMaker,
        lambda: PalMaker(low=30),
        Squares,
        lambda: Union(30),
        lambda: Union(20),
        lambda: Soft(),
        lambda: Soft(weight=0.6),
        lambda: Lesps(),
        lambda: Lesps(base=0.4),
        lambda: Pal(),
        lambda: Pal(decay=0.9),
        lambda: Lelcm(),
        lambda: Lelcm(contrast=0.4),
    ]
    seen = []
    for make in makers:
        first, second = make(), make()
        assert first == second and hash(first) == hash(second) and first.about() == second.about()
        assert json.loads(json.dumps(first.about())) == first.about()
        assert first.about()["rule" if isinstance(first, Rule) else "maker"] == first.name
        assert first.about() not in seen and "\n" not in str(first)
        seen.append(first.about())
    assert replace(Pmg(8), why="found in a book") == Pmg(8)  # where a length comes from decides nothing
    assert Learned("a.safetensors", Pmg(8), student=student).about() == Learned(student=copy, pmg=Pmg(8)).about()
    assert Learned(student=student).about()["student"] == student.digest()
    assert Pmg(8).about() == {"maker": "pmg", "extent": 8, "half_width": 4, "alpha": 0.15, "directional": True}
    assert Folder("a").about() == {"maker": "folder", "path": "a"} and Squares().about() == {"maker": "squares"}


def test_settings_can_be_listed_and_changed(student: Student) -> None:
    assert Pmg(8).settings() == {"extent": 8, "half_width": 4, "alpha": 0.15, "directional": True}
    changed = Pmg(8).change("extent", 9).change("alpha", 1)
    assert changed == Pmg(9, alpha=1.0) and type(changed.alpha) is float
    assert Soft().settings() == {"radius": 30, "weight": 0.7} and Union(4).settings() == {"radius": 4}
    assert Soft().change("weight", 0.2) == Soft(weight=0.2) and Union().change("radius", 5) == Union(5)
    learned = Learned("a.safetensors", Pmg(8), 3, student)
    assert learned.settings() == Pmg(8).settings()
    assert learned.change("half_width", 2) == Learned("a.safetensors", Pmg(8, 2), 3)
    assert learned.change("half_width", 2).student is student
    assert Folder("a").settings() == Squares().settings() == {}
    refused(lambda: Pmg().change("radius", 3), "pmg has no setting radius", "extent, half_width, alpha, directional")
    refused(lambda: Pmg().change("why", "so"), "pmg has no setting why")
    refused(lambda: Pmg().change("alpha", 2), "alpha = 2", "a number from 0 to 1")
    refused(lambda: Learned().change("seed", 3), "pmg has no setting seed")
    refused(lambda: Folder("a").change("path", "b"), "folder has no setting path", "it has none")
    refused(lambda: Union().change("weight", 1), "union has no setting weight; it has radius")
    refused(lambda: Soft().change("radius", -1), "radius = -1")


def test_labels_of_tables() -> None:
    assert [one.label for one in (Pmg(), Learned(), Folder("some/masks_com"), Squares())] == [
        *("pmg", "learned", "masks_com", "squares")
    ]
    assert Pmg(8).ablations() == {"P_g only": Pmg(8, directional=False)}
    assert Pmg(8, directional=False).ablations() == Learned().ablations() == Squares().ablations() == {}


# ---- masks ----------------------------------------------------------------------------------------------------------


def crowded() -> ImageSet:
    """The tiny set with more points, some at the border and some so near each other that their boxes overlap."""
    data = tiny_set()
    more = [(i, y, x) for i, (h, w) in enumerate(SIZES) for y, x in ((0, 0), (h - 1, w - 1), (h // 2, 0), (9, 11))]
    points = torch.cat((data.points, (data.points + torch.tensor([0, 2, -1])).clamp(min=0), torch.tensor(more)))
    return replace(data, points=points.unique(dim=0))


@pytest.mark.parametrize(("extent", "half_width", "alpha"), [(5, 4, 0.15), (12, 2, 0.3), (2, 6, 0.0), (25, 4, 1.0)])
def test_p_g_alone_is_the_threshold_of_the_global_map(
    extent: int, half_width: int, alpha: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    data = crowded()
    wanted = torch.zeros(data.images.shape, dtype=torch.bool)
    for image, y, x in data.points.tolist():
        height, width = SIZES[image]
        pixels = data.images[image, :height, :width].numpy()
        y0, x0, y1, x1 = reference.point_to_box(pixels, (y, x), extent, half_width)
        inside = pixels[y0:y1, x0:x1].astype(np.float64)
        found = reference.part_probability(inside, float(pixels[y, x]), alpha) >= 0.5
        wanted[image, y0:y1, x0:x1] |= torch.from_numpy(found)
    maker = Pmg(extent, half_width, alpha, directional=False)
    assert torch.equal(maker.masks(data), wanted) and wanted.any()
    assert torch.equal(maker.probabilities(data), wanted.float())
    monkeypatch.setattr(pmg_maker, "GROUP_PIXELS", 1)
    assert torch.equal(maker.masks(data), wanted)
    assert not maker.masks(replace(data, points=data.points[:0])).any()


@pytest.mark.parametrize("kind", ["pmg", "p_g only", "learned", "folder", "squares"])
def test_masks_are_where_the_probabilities_reach_one_half(kind: str, student: Student, folder: Path) -> None:
    data = crowded()
    makers = {
        "pmg": Pmg(8),
        "p_g only": Pmg(8, directional=False),
        "learned": Learned(student=student, pmg=Pmg(8)),
        "folder": Folder(str(folder)),
        "squares": Squares(),
    }
    maker = makers[kind].fit(data)
    masks, probabilities = maker.masks(data), maker.probabilities(data)
    assert masks.dtype == torch.bool and masks.shape == data.images.shape and masks.any()
    assert probabilities.dtype == torch.float32 and 0 <= float(probabilities.min()) <= float(probabilities.max()) <= 1
    assert torch.equal(probabilities >= 0.5, masks)
    soft = bool(((probabilities > 0) & (probabilities < 0.5)).any())
    assert soft == (kind in ("pmg", "learned"))
    for index, (height, width) in enumerate(SIZES):
        masks[index, :height, :width] = False
        probabilities[index, :height, :width] = 0
    assert not masks.any() and not probabilities.any()  # nothing in the padding


@pytest.mark.parametrize("directional", [True, False])
def test_the_masks_of_each_point_unite_to_the_masks(directional: bool) -> None:
    data, maker = crowded(), Pmg(8, directional=directional)
    canvas, seen = torch.zeros(data.images.shape, dtype=torch.bool), []
    for points, position, own in maker.each(data, data.points):
        seen.append(points)
        for (image, *_), where, mask in zip(points.tolist(), position, own, strict=True):
            canvas[image].view(-1)[where[mask]] = True
    assert torch.equal(torch.cat(seen), data.points) and torch.equal(canvas, maker.masks(data))
    for maker in (Squares(), Folder("a")):
        assert not maker.knows_each(data)
        with pytest.raises(HMGError, match=f"{maker.name}: masks of single points are not known"):
            maker.each(data, data.points)


def test_folder_reads_what_was_written(folder: Path) -> None:
    data = tiny_set()
    maker = make_maker(f"folder:{folder}")
    assert maker.fit(data) is maker
    masks = maker.masks(data)
    rng = np.random.default_rng(3)
    for index, (height, width) in enumerate(SIZES):
        wanted = torch.zeros(data.images.shape[1:], dtype=torch.bool)
        wanted[:height, :width] = torch.from_numpy(rng.random((height, width)) < 0.3)
        assert torch.equal(masks[index], wanted)
    part = data.subset([4, 1])
    assert torch.equal(maker.masks(part), masks[[4, 1], : part.images.shape[1], : part.images.shape[2]])
    updater = MaskUpdater(replace(data, points=data.points[:0]), maker)  # masks of another system need no points
    assert torch.equal(updater.initial, masks)
    (folder / "train3.png").unlink()
    refused(lambda: maker.masks(data), "train3.png")
    write_mask(folder / "train3.png", np.zeros((5, 6), bool))
    refused(lambda: maker.masks(data), "train3.png", "5 x 6", "32 x 48")
    (folder / "train3.png").write_bytes(b"no image")
    refused(lambda: maker.masks(data), "train3.png")


def test_learned_masks_need_a_student_first(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(learned_maker, "StudentSettings", lambda *, seed: replace(QUICK, seed=seed))
    data, maker = tiny_set(), Learned(pmg=Pmg("auto"), seed=2)
    for call in (maker.masks, maker.probabilities):
        with pytest.raises(HMGError, match="no student yet") as caught:
            call(data)
        assert "\n" not in str(caught.value)
    fitted = maker.fit(data)
    assert maker.student is None and maker.about()["student"] is None
    assert fitted.pmg == Pmg(25) and "too few" in fitted.pmg.why  # its teacher's length is settled, too
    wanted = train_student(data, Pmg(25), settings=replace(QUICK, seed=2))
    assert fitted.student.digest() == wanted.digest() and fitted.file is None
    steps = []
    kept = maker.fit(data, folder=tmp_path, progress=lambda *place: steps.append(place))
    assert steps[-1] == (16, 16) and kept.file == str(tmp_path / "student.safetensors")
    assert kept.about() == fitted.about()
    again = Learned(kept.file, pmg=Pmg(25)).fit(data)
    assert torch.equal(again.masks(data), wanted.masks(data, Pmg(25)))
    assert again.fit(data).student is again.student  # fitted once, it stays


# ---- one's own ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("rule", ["union", "soft"])
def test_a_maker_of_ones_own(rule: str, monkeypatch: pytest.MonkeyPatch) -> None:
    data = tiny_set()
    updater = MaskUpdater(data, Squares(), rule, guard=None)
    squares = Squares().masks(data)
    assert torch.equal(updater.initial, squares) and 0 < int(squares.sum()) <= 25 * len(SIZES)
    target = torch.full(data.images.shape, -9.0)
    target[data.points[:, 0], data.points[:, 1], data.points[:, 2]] = 9.0
    changes = updater.update_one(range(len(data)), target, "logits")
    assert torch.equal(changes.prediction, target > 0) and torch.equal(updater.masks, squares)
    everything = torch.full(data.images.shape, 9.0)
    updater.update_one(range(len(data)), everything, "logits")
    assert (updater.masks & ~squares).any() and not (squares & ~updater.masks).any()
    assert updater.state_dict()["settings"]["masks"] == {"maker": "squares"}
    other = MaskUpdater(data, Squares(), rule, guard=None)
    other.load_state_dict(updater.state_dict())
    assert torch.equal(other.masks, updater.masks)
    refused(lambda: make_maker("squares"), "masks 'squares'")
    monkeypatch.setitem(MAKERS, "squares", Squares)
    assert make_maker("squares", pmg=Pmg(8), seed=3) == Squares() and isinstance(make_maker("squares"), Squares)
    refused(lambda: make_maker("squares:side=5"), "squares:side=5", "NAME=VALUE of no setting")
    assert torch.equal(MaskUpdater(data, "squares", rule).initial, squares)
    assert int((data.images == POISON).sum()) > 0  # padding there is
