"""The student: geometry of its crops by hand and against the reference, and what it may and may not look at."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import reference
import torch
from refusal import refused
from tiny import SIZES, tiny_set, write_folder

import eval as script
from hmg_gpu import MaskUpdater
from hmg_gpu.commands.main import main
from hmg_gpu.data import ImageSet, load_folder, load_images, read_mask
from hmg_gpu.masks import Learned, Pmg
from hmg_gpu.masks.makers import learned as learned_maker
from hmg_gpu.masks.makers import pmg as pmg_maker
from hmg_gpu.masks.student import student as module
from hmg_gpu.masks.student import train as teaching
from hmg_gpu.masks.student.crops import choose, gather, normalise, own_pixels, paste, stretch, unturn
from hmg_gpu.masks.student.lessons import lesson_masks
from hmg_gpu.masks.student.network import CropNet, sibling
from hmg_gpu.masks.student.student import Student, StudentSettings
from hmg_gpu.masks.student.train import Course, train_student
from hmg_gpu.masks.windows import masks_around
from hmg_gpu.models.checkpoints import read_description, read_tensors, save_checkpoint
from hmg_gpu.models.losses import soft_iou_loss
from hmg_gpu.training.loop import Training
from hmg_gpu.training.settings import Settings

QUICK = StudentSettings(crop=24, shift=2, steps=3, batch_size=4, members=2)
DRAWS = {"steps": 16, "averaging": 0.0, "learning_rate": 1e-2, "threshold": 0.15}  # enough for masks of its own
TAUGHT = replace(QUICK, members=1, **DRAWS)


def test_the_point_stays_where_it_is_in_every_view() -> None:
    """A crop of each view, brought back, shows the pixels around the point in the image's own directions."""
    image = torch.arange(40 * 50.0).view(1, 40, 50)
    points = torch.tensor([[0, 20, 17], [0, 14, 30]])
    sizes = torch.tensor([[40, 50]])
    for view in range(8):
        turn = torch.tensor([view & 1, view >> 1 & 1, view >> 2]).expand(2, 3)
        crops = gather(image, points, sizes, 16, turn)
        assert crops.shape == (2, 16, 16) and torch.equal(crops[:, 8, 8], image[0, points[:, 1], points[:, 2]])
        for crop, (_, y, x) in zip(unturn(crops, view, 7), points.tolist(), strict=True):
            assert torch.equal(crop, image[0, y - 7 : y + 8, x - 7 : x + 8])


@pytest.mark.parametrize("flips", [True, False])
def test_every_view_counts_for_the_pixels_that_it_shows(
    flips: bool, monkeypatch: pytest.MonkeyPatch, rng: np.random.Generator
) -> None:
    """A network that only says how bright its crop is: the mean of the views is the image itself, border repeated."""
    image = torch.from_numpy(rng.random((1, 30, 30))).float()
    monkeypatch.setattr(module, "normalise", lambda crops: crops[:, None])
    echo = torch.nn.Module()
    echo.forward = torch.logit
    learned = Student({25: [echo]}, StudentSettings(crop=24, flips=flips))
    points = torch.tensor([[0, 15, 14], [0, 0, 29]])
    padded = np.pad(image[0].numpy(), 11, mode="edge")
    for found, (_, y, x) in zip(learned.probabilities(image, points), points.tolist(), strict=True):
        assert found.shape == (23, 23)
        torch.testing.assert_close(found, torch.from_numpy(padded[y : y + 23, x : x + 23]))


def test_beyond_the_image_its_border_repeats_and_padding_is_never_read() -> None:
    image = torch.full((1, 9, 9), 99.0)
    image[0, :4, :5] = torch.arange(20.0).view(4, 5)
    crop = gather(image, torch.tensor([[0, 3, 0]]), torch.tensor([[4, 5]]), 16, torch.zeros(1, 3))[0]
    wanted = np.pad(np.arange(20.0).reshape(4, 5), ((5, 4), (8, 3)), mode="edge")  # rows -5 .. 7, columns -8 .. 7
    assert torch.equal(crop[8 - 8 :], torch.from_numpy(np.pad(wanted, ((0, 3), (0, 0)), mode="edge"))[:16].float())


@pytest.mark.parametrize(("extent", "half_width"), [(5, 4), (12, 2), (2, 6)])
def test_the_teacher_is_pmg_of_each_point_alone(extent: int, half_width: int, rng: np.random.Generator) -> None:
    """Points in the corners and on the borders of images of different sizes, the window cut off and not."""
    data = tiny_set()
    points = torch.tensor(
        [(i, y, x) for i, (h, w) in enumerate(SIZES) for y, x in ((0, 0), (h - 1, w - 1), (h // 2, 0), (9, 11))]
    )
    for radius in (4, 14):
        found = masks_around(replace(data, points=points), radius, Pmg(extent, half_width, 0.3))
        for own, (image, y, x) in zip(found.numpy(), points.tolist(), strict=True):
            height, width = SIZES[image]
            pixels = data.images[image, :height, :width].numpy()
            wanted = reference.point_to_mask(pixels, [(y, x)], extent, half_width, 0.3)
            wanted = np.pad(wanted, radius)[y : y + 2 * radius + 1, x : x + 2 * radius + 1]
            assert np.array_equal(own, wanted)
    assert masks_around(replace(data, points=points[:0]), 5, Pmg(9)).shape == (0, 11, 11)


@pytest.mark.parametrize("pixels", [1 << 22, 1])  # all points at a time, and one
def test_windows_may_lie_around_other_pixels_than_the_points(pixels: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pmg_maker, "GROUP_PIXELS", pixels)
    data = tiny_set()
    centres = (data.points[:, 1:] + torch.tensor([[2, -3]])).clamp(min=0)
    radius = 9
    plain = masks_around(data, 30, Pmg(8))
    moved = masks_around(data, radius, Pmg(8), centres=centres)
    for wide, window, (y, x) in zip(plain, moved, (centres - data.points[:, 1:]).tolist(), strict=True):
        assert torch.equal(window, wide[30 + y - radius : 31 + y + radius, 30 + x - radius : 31 + x + radius])


def test_members_of_a_pair_share_the_points_in_halves() -> None:
    def shares(members: int, *counts: int) -> list[list[torch.Tensor]]:
        courses = [course(torch.zeros(count, 3, dtype=torch.int64)) for count in counts]
        return teaching._shares(courses, replace(QUICK, members=members), 0)

    four = shares(4, 11, 6)
    assert [[len(own) for own in member] for member in four] == [[6, 3], [5, 3], [6, 3], [5, 3]]
    for first, second in (four[:2], four[2:]):
        for own, other, count in zip(first, second, (11, 6), strict=True):
            assert sorted(own.tolist() + other.tolist()) == list(range(count))
    assert not torch.equal(four[0][0], four[2][0])
    assert [len(own) for (own,) in shares(3, 11)] == [6, 5, 6]
    assert [own.tolist() for (own,) in shares(1, 3)] == [[0, 1, 2]]
    for lone, other in shares(2, 1, 2):
        assert lone.tolist() == [0] and len(other) == 1  # one point is for both


def test_no_point_comes_again_before_all_have_come() -> None:
    data = tiny_set()
    settings = replace(QUICK, steps=5)
    share = torch.tensor([0, 2, 3])
    rows, turn, noise, _ = teaching._draw(course(data.points), share, 5, 4, settings, torch.Generator().manual_seed(1))
    drawn = torch.cat(rows).tolist()
    assert [len(step) for step in rows] == [4] * 5
    assert all(sorted(drawn[start : start + 3]) == [0, 2, 3] for start in range(0, 18, 3))
    assert turn[0].shape == (4, 3) and noise[0].shape == (4, 25)


def course(points: torch.Tensor) -> Course:
    """Points to learn from of which nothing else matters."""
    return Course(replace(tiny_set(), points=points), Pmg(8), torch.zeros(len(points), 1, 1))


@pytest.mark.parametrize("steps", range(1, 8))
def test_any_number_of_steps_trains(steps: int) -> None:
    """Of 5 steps torch's OneCycleLR would divide by 0.2 * 5 - 1."""
    settings = replace(QUICK, steps=steps, members=1)
    seen = []
    train_student(tiny_set(), Pmg(8), settings=settings, progress=lambda *place: seen.append(place))
    assert seen == [(step, steps) for step in range(1, steps + 1)]


def test_a_set_without_points_is_left_out() -> None:
    data = tiny_set()
    empty = replace(data, points=data.points[:0])
    seen = []
    learned = train_student(
        [empty, data, empty],
        [Pmg(extent) for extent in (5, 8, 9)],
        settings=QUICK,
        progress=lambda *place: seen.append(place),
    )
    assert list(learned.networks) == [8] and seen[-1] == (6, 6)
    alone = train_student(data, Pmg(8), settings=QUICK)
    assert torch.equal(*(one.probabilities(data.images, data.points, extent=8) for one in (learned, alone)))


def test_threshold_where_halves_agree_best_by_hand(monkeypatch: pytest.MonkeyPatch) -> None:
    """Two networks find 10 pixels each at 0.1, half of them common, and the common ones alone at 0.3."""
    data = tiny_set()
    left, right = CropNet(), CropNet()

    def by_member(
        self: Student, images: torch.Tensor, points: torch.Tensor, extent: int, sizes: torch.Tensor
    ) -> list[torch.Tensor]:
        assert extent == 9
        found = torch.zeros(len(self.networks[9]), len(points), 23, 23)
        found[:, :, 5, 5:10] = 0.32
        for own, network in zip(found, self.networks[9], strict=True):
            own[:, 8 if network is left else 9, 5:10] = 0.12
            own[:, 12, 5] = 0.6 if network is left else 0.4  # at 0.45 one of them has it alone
        return [found]

    monkeypatch.setattr(Student, "by_member", by_member)
    pair = Student({9: [left, right]}, QUICK)
    found = teaching.agreement(pair, [data, data], [9, 9], levels=(0.1, 0.15, 0.35, 0.45, 0.9))
    assert found == pytest.approx([6 / 16, 1, 1, 0, 1])
    lessons = [Course(data, Pmg(9), torch.zeros(0))]
    assert teaching._best_level(pair, lessons) == 0.15
    assert teaching._best_level(Student({9: [left]}, replace(QUICK, members=1)), lessons) == 0.5


def test_a_target_joined_by_a_link_does_not_move_the_point(monkeypatch: pytest.MonkeyPatch) -> None:
    """Further rounds start from the part of a mask at the point: 0.15 leads from there to a larger target."""
    data = tiny_set()
    centres = []

    def probabilities(
        self: Student, images: torch.Tensor, points: torch.Tensor, *, extent: int, sizes: torch.Tensor
    ) -> torch.Tensor:
        assert extent == 8
        found = torch.zeros(len(points), 23, 23)
        found[:, 11, 11] = found[:, 9:14, 18:21] = 0.9
        found[:, 11, 12:18] = 0.15
        return found

    monkeypatch.setattr(Student, "probabilities", probabilities)
    monkeypatch.setattr(teaching, "_recentred", lambda one, own: centres.append(own) or one)
    learned = train_student(data, Pmg(8), settings=replace(QUICK, steps=1, rounds=2, members=1))
    (own,) = centres
    assert own.shape == (len(data.points), 23, 23) and bool((own.sum((1, 2)) == 1).all())
    assert bool((learned.each(data, Pmg(8)).sum((1, 2)) == 16).all())  # in the result the parts stay together


def test_points_move_to_the_centroids_of_their_masks_and_stay_in_the_image() -> None:
    data = ImageSet(["a"], torch.zeros(1, 20, 30), torch.tensor([[20, 30]]), torch.tensor([[0, 5, 6], [0, 19, 0]]))
    own = torch.zeros(2, 9, 9, dtype=torch.bool)
    own[0, 4:7, 2] = own[0, 6, 2:5] = True  # (dy, dx) = (0, -2), (1, -2), (2, -2), (2, -1), (2, 0): mean (1.4, -1.4)
    own[1, 8, 0] = True  # beyond the corner
    assert teaching._recentred(data, own).points.tolist() == [[0, 6, 5], [0, 19, 0]]
    assert torch.equal(teaching._recentred(data, own & False).points, data.points)


def test_stretched_probabilities_keep_their_order_and_their_masks() -> None:
    values = torch.linspace(0, 1, 10001)
    for threshold in (0.1, 0.2, 0.5, 0.7):
        stretched = stretch(values, threshold)
        assert torch.equal(stretched >= 0.5, values >= threshold) and bool((stretched.diff() >= 0).all())
        assert float(stretched[0]) == 0 and float(stretched[-1]) == 1
    assert torch.equal(stretch(values, 0.5), values)


def test_gain_and_offset_do_not_matter_and_nothing_is_ever_nan(rng: np.random.Generator) -> None:
    crops = torch.from_numpy(rng.integers(0, 200, (3, 16, 16))).float()
    crops[0, 8, 8] = 255
    assert torch.equal(normalise(crops), normalise(crops * 4 + 1024))
    seen = normalise(crops)
    assert seen.shape == (3, 3, 16, 16) and float(seen[0, 0, 8, 8]) == 1 and float(seen[0, 0].median()) == 0
    dark = crops.clone()
    dark[:, 6:11, 6:11] = 0  # a point no brighter than its surroundings
    for odd in (dark, torch.zeros(1, 16, 16), torch.full((1, 16, 16), 65535.0)):
        assert bool(normalise(odd).isfinite().all())


def test_which_mask_a_point_gets_by_hand() -> None:
    """Around the centre of 9 x 9: nothing; a blob at the point; one beside it only; one that reaches the edge."""
    probabilities = torch.zeros(4, 9, 9)
    probabilities[1, 3:6, 4] = 0.9
    probabilities[1, 0:2, 0] = 0.9  # another target: not this point's
    probabilities[2, 0:2, 6:8] = 0.9
    probabilities[3, 4, 4:] = 0.9
    fallback = torch.zeros(4, 9, 9, dtype=torch.bool)
    fallback[:, 4, 4] = True
    own = choose(probabilities, fallback)
    assert own[1].nonzero().tolist() == [[3, 4], [4, 4], [5, 4]]
    for row in (0, 2, 3):
        assert torch.equal(own[row], fallback[row])
    assert torch.equal(choose(probabilities, fallback, link=0.2), own)
    probabilities[2] = 0
    probabilities[2, 1:3, 6:8] = 0.9
    probabilities[2, 3, 5] = 0.1  # links another target to the point, where nothing passes the threshold
    probabilities[1, 6, 4] = 0.1  # a fifth of the threshold links the pixel below to the rest
    probabilities[1, 7, 4] = 0.5
    probabilities[3, 4, 8] = 0.4  # the edge is reached by a link, not by the mask
    own = choose(probabilities, fallback, link=0.2)
    assert torch.equal(own[2], fallback[2])
    assert own[1].nonzero().tolist() == [[3, 4], [4, 4], [5, 4], [7, 4]]
    assert own[3].nonzero().tolist() == [[4, 4], [4, 5], [4, 6], [4, 7]]


def test_the_threshold_of_a_large_target_falls_with_its_area_by_hand() -> None:
    """A square of 160 pixels, four times as many as LARGE, and one of 40; each has a fringe below the threshold."""
    probabilities = torch.zeros(2, 31, 31)
    probabilities[0, 10:20, 8:24] = probabilities[1, 13:18, 12:20] = 0.9
    probabilities[:, 15, 24:27] = 0.05
    probabilities[:, 14, 24:27] = 0.03
    probabilities[1, 15, 20:24] = 0.05
    own, usable, level = own_pixels(probabilities, 0.15, 0.2)
    assert level.flatten().tolist() == pytest.approx([0.15 / 4, 0.15]) and bool(usable.all())
    assert own.sum((1, 2)).tolist() == [163, 40] and bool(own[0, 15, 24:27].all())
    assert torch.equal(choose(probabilities, own & False, 0.15, 0.2), own)
    assert torch.equal(stretch(probabilities, level) >= 0.5, probabilities >= level)


def test_masks_are_united_within_their_images_only() -> None:
    own = torch.ones(3, 3, 3, dtype=torch.bool)
    own[2] = False
    points = torch.tensor([[0, 0, 0], [1, 2, 3], [1, 1, 1]])
    found = paste(own, points, (2, 5, 6), torch.tensor([[5, 6], [3, 4]]))
    wanted = torch.zeros(2, 5, 6, dtype=torch.bool)
    wanted[0, :2, :2] = wanted[1, 1:3, 2:4] = True  # the second image's valid area ends at (3, 4)
    assert torch.equal(found, wanted)


def test_a_lesson_shows_the_teachers_mask_where_the_crop_shows_the_target() -> None:
    """Image and mask hold the same values, so crop and target agree pixel by pixel, however shifted and turned."""
    generator = torch.Generator().manual_seed(0)
    settings = StudentSettings(crop=16, shift=3)
    reach = settings.radius + settings.shift
    image = (torch.rand(1, 60, 60, generator=generator) < 0.5).float()
    points = torch.tensor([[0, 25, 31], [0, 30, 22]]).repeat(8, 1)
    data = ImageSet(["a"], image, torch.tensor([[60, 60]]), points)
    teacher = torch.stack([image[0, y - reach : y + reach + 1, x - reach : x + reach + 1] for _, y, x in points]) > 0
    turn = torch.tensor([[v & 1, v >> 1 & 1, v >> 2] for v in range(8)]).repeat_interleave(2, 0)
    noise = torch.rand(16, 49, generator=generator)
    crop, target = teaching._lesson(data, teacher, settings, torch.arange(16), turn, noise)
    # One row and one column of an even crop may lie beyond the teacher's window.
    assert torch.equal(crop[:, 1:-1, 1:-1], target[:, 1:-1, 1:-1].float())
    centres = crop[:, 8, 8]
    at_point = image[0, points[:, 1], points[:, 2]]
    assert bool(((centres == 1) | (at_point == 0)).all())  # the centre moved within the mask
    flat = StudentSettings(crop=16, shift=0)
    crop, _ = teaching._lesson(data, teacher[:, 3:-3, 3:-3], flat, torch.arange(16), turn, noise[:, :1])
    assert torch.equal(crop[:, 8, 8], at_point)


def test_the_student_outgrows_a_teacher_that_errs_at_random() -> None:
    """A quarter of the pixels in and around every target wrong in the teacher's masks: the student smooths that out."""
    data = tiny_set(tuple((40, 44) for _ in range(40)), seed=5)
    truth = data.masks
    settings = StudentSettings(crop=24, shift=2, steps=60, batch_size=20, members=1)
    reach = settings.radius + settings.shift
    offset = torch.arange(-reach, reach + 1) + reach
    padded = torch.nn.functional.pad(truth, (reach,) * 4)
    rows, columns = data.points[:, 1, None] + offset, data.points[:, 2, None] + offset
    exact = padded[data.points[:, 0, None, None], rows[:, :, None], columns[:, None, :]]
    around = torch.nn.functional.max_pool2d(exact[:, None].float(), 3, 1, 1)[:, 0] > 0
    wrong = torch.rand(exact.shape, generator=torch.Generator().manual_seed(0)) < 0.25
    teacher = exact ^ (wrong & around)
    data.masks = None
    learned = train_student(data, settings=settings, teachers=[teacher])
    fallback = teacher[:, 2:-2, 2:-2]

    def iou(own: torch.Tensor) -> float:
        mask = paste(own, data.points, data.images.shape, data.sizes)
        return float((mask & truth).sum() / (mask | truth).sum())

    before, after = iou(fallback), iou(choose(learned.probabilities(data.images, data.points), fallback))
    assert before < 0.75 and after > before + 0.05, (before, after)


def test_the_same_seed_gives_the_same_bits_and_leaves_the_random_state_alone() -> None:
    data = tiny_set()
    torch.manual_seed(3)
    state = torch.random.get_rng_state()
    first, second = (train_student(data, Pmg(8), settings=QUICK) for _ in range(2))
    assert torch.equal(torch.random.get_rng_state(), state)
    other = train_student(data, Pmg(8), settings=replace(QUICK, seed=1))
    assert first.digest() == second.digest() != other.digest()
    probabilities = [one.probabilities(data.images, data.points, sizes=data.sizes) for one in (first, second, other)]
    assert torch.equal(probabilities[0], probabilities[1]) and not torch.equal(probabilities[0], probabilities[2])


def test_batches_of_points_do_not_matter(monkeypatch: pytest.MonkeyPatch) -> None:
    data = tiny_set()
    learned = train_student(data, Pmg(8), settings=QUICK)
    whole = learned.probabilities(data.images, data.points, sizes=data.sizes)
    fallback = masks_around(data, QUICK.radius, Pmg(8))
    masks = learned.masks(data, Pmg(8))
    monkeypatch.setattr(module, "NETS", 2)
    monkeypatch.setattr(module, "GROUP", 2)
    monkeypatch.setattr(pmg_maker, "GROUP_PIXELS", 1)
    torch.testing.assert_close(learned.probabilities(data.images, data.points, sizes=data.sizes), whole)
    again = masks_around(data, QUICK.radius, Pmg(8))
    assert torch.equal(again, fallback) and torch.equal(learned.masks(data, Pmg(8)), masks)


def test_soft_masks_lie_behind_the_masks() -> None:
    data = tiny_set()
    learned = train_student(data, Pmg(8), settings=replace(QUICK, steps=40))
    soft = learned.soft_masks(data, Pmg(8))
    assert soft.dtype == torch.float32 and float(soft.min()) >= 0 and float(soft.max()) <= 1
    assert torch.equal(soft >= 0.5, learned.masks(data, Pmg(8)))
    assert bool(((soft > 0) & (soft < 0.5)).any())
    updater = MaskUpdater(data, Learned(student=learned, pmg=Pmg(8)), "soft")
    assert torch.equal(updater._soft, soft) and torch.equal(updater.initial, soft >= 0.5)


def test_masks_do_not_depend_on_a_callers_autocast() -> None:
    data = tiny_set()
    learned = train_student(data, Pmg(8), settings=replace(QUICK, members=2))
    plain, threads = learned.soft_masks(data, Pmg(8)), torch.get_num_threads()
    try:
        for count in (1, 2):
            torch.set_num_threads(count)
            with torch.autocast("cpu", torch.bfloat16):
                assert torch.equal(learned.soft_masks(data, Pmg(8)), plain)
    finally:
        torch.set_num_threads(threads)


def test_rounds_members_and_several_sets() -> None:
    settings = replace(QUICK, rounds=2, members=2)
    seen = []
    sets = [tiny_set(), tiny_set(((30, 31), (33, 40)), seed=9)]
    rounds = []
    learned = train_student(
        sets, [Pmg(8), Pmg(5)], settings=settings, progress=lambda *place: seen.append(place), on_round=rounds.append
    )
    assert len(rounds) == 2 and rounds[1] is learned and rounds[0].networks[8][0] is not learned.networks[8][0]
    assert seen == [(step, 24) for step in range(1, 25)]  # 3 of 2 networks for 2 sets, twice
    assert {extent: len(found) for extent, found in learned.networks.items()} == {5: 2, 8: 2}
    assert 0 < learned.threshold <= 0.5
    found = learned.masks(sets[0], Pmg(8))
    assert found.shape == sets[0].images.shape
    assert bool(found[sets[0].points[:, 0], sets[0].points[:, 1], sets[0].points[:, 2]].any())


def test_sets_of_two_extents_share_convolutions_alone() -> None:
    """Each extent has a normalisation and last layers of its own, and an extent between takes the nearest."""
    sets = [tiny_set(), tiny_set(((30, 31), (33, 40)), seed=9)]
    learned = train_student(sets, [Pmg(25), Pmg(8)], settings=QUICK)
    assert list(learned.networks) == [8, 25]
    for narrow, wide in zip(learned.networks[8], learned.networks[25], strict=True):
        both = zip(narrow.named_parameters(), wide.parameters(), strict=True)
        same = {name for (name, one), other in both if one is other}
        layers = ("stem", "fine", "down1", "middle")
        weights = [name for name, value in narrow.named_parameters() if value.ndim == 4]
        assert same == {name for name in weights if name.split(".")[0] in layers} and len(same) == 6
        statistics = zip(narrow.named_buffers(), wide.buffers(), strict=True)
        assert not any(torch.equal(one, other) for (name, one), other in statistics if "running" in name)
    assert [learned.nearest(extent) for extent in (1, 8, 16, 17, 99)] == [8, 8, 8, 25, 25]
    place = (sets[0].images, sets[0].points)
    found = {extent: learned.probabilities(*place, extent=extent) for extent in (8, 16, 17, 25)}
    assert torch.equal(found[8], found[16]) and torch.equal(found[17], found[25])
    assert not torch.equal(found[8], found[25])
    alone = learned.member(1)
    assert alone.networks[25] == learned.networks[25][1:] and alone.settings.members == 1


def test_sets_of_one_extent_are_taught_together_by_its_own_network(monkeypatch: pytest.MonkeyPatch) -> None:
    seen = []
    forward = CropNet.forward

    def watched(self: CropNet, crops: torch.Tensor) -> torch.Tensor:
        seen.append((self, self.training, len(crops)))
        return forward(self, crops)

    monkeypatch.setattr(CropNet, "forward", watched)
    data = tiny_set()
    settings = replace(QUICK, steps=2, batch_size=5, members=1, flips=False)
    learned = train_student([data, data, data], [Pmg(25), Pmg(8), Pmg(8)], settings=settings)
    (narrow,), (wide,) = learned.networks.values()
    assert [one for one in seen if one[1]] == [(narrow, True, 3), (wide, True, 2)] * 6  # of 5 crops 2, 2 and 1
    for extent, network in ((8, narrow), (25, wide)):
        seen.clear()
        assert learned.each(data, Pmg(extent)).shape == (len(data.points), 23, 23)
        assert seen == [(network, False, len(data.points))]


def test_what_is_shared_learns_from_both_and_the_rest_from_its_own_alone() -> None:
    """Gradients of one step, against those of each set's loss by itself: weighed by crops, nothing crosses over."""
    torch.manual_seed(0)
    first = CropNet()
    networks = {8: first, 25: sibling(first)}
    data, settings = tiny_set(), QUICK
    courses, drawn, wanted = [], [], {extent: dict[str, torch.Tensor]() for extent in networks}
    for extent, rows in ((25, [0, 1]), (8, [1, 2, 3]), (8, [0, 2, 3])):
        teacher = masks_around(data, settings.radius + settings.shift, Pmg(extent))
        courses.append(Course(data, Pmg(extent), teacher))
        parts = torch.ones(len(rows), 4)  # none
        drawn.append((torch.tensor(rows), torch.zeros(len(rows), 3), torch.rand(len(rows), 25), parts))
    for extent, weight in ((25, 2 / 8), (8, 6 / 8)):
        lessons = [
            teaching._lesson(one.data, one.teacher, settings, *values)
            for one, (*values, _) in zip(courses, drawn, strict=True)
            if one.extent == extent
        ]
        crops, targets = (torch.cat(values) for values in zip(*lessons, strict=True))
        logits, target = networks[extent](normalise(crops)), targets[:, None].float()
        entropy = torch.nn.functional.binary_cross_entropy_with_logits(logits, target)
        loss = soft_iou_loss(logits, target) + settings.cross_entropy * entropy
        names, values = zip(*networks[extent].named_parameters(), strict=True)
        wanted[extent] = dict(zip(names, torch.autograd.grad(weight * loss, values), strict=True))
    teaching._loss(networks, courses, settings, drawn).backward()
    shared = 0
    for extent, other in ((8, 25), (25, 8)):
        for name, value in networks[extent].named_parameters():
            both = value is networks[other].get_parameter(name)
            shared += both
            total = wanted[extent][name] + (wanted[other][name] if both else 0)
            torch.testing.assert_close(value.grad, total, atol=1e-6, rtol=1e-4)
    assert shared == 2 * 6


def test_further_rounds_keep_the_extents_of_their_sets(monkeypatch: pytest.MonkeyPatch) -> None:
    """What PMG is asked for, and around which points: in the second round from where the masks of the first lie."""
    asked = []

    def watched(data: ImageSet, radius: int, pmg: Pmg, **more: object) -> torch.Tensor:
        asked.append((pmg.extent, radius, data.points, more.get("centres")))
        return lesson_masks(data, radius, pmg, **more)

    monkeypatch.setattr(teaching, "lesson_masks", watched)
    sets = [tiny_set(), tiny_set(((30, 31), (33, 40)), seed=9)]
    rounds = []
    settings = replace(QUICK, rounds=2, threshold=0.0)
    train_student(sets, [Pmg(25), Pmg(8)], settings=settings, on_round=rounds.append)
    assert [(extent, radius) for extent, radius, *_ in asked] == [(25, 13), (8, 13)] * 2
    unlinked = Student(rounds[0].networks, replace(settings, link=1.0), rounds[0].threshold)
    for one, (extent, _, points, centres) in zip(sets, asked[2:], strict=True):
        assert torch.equal(centres, one.points[:, 1:])
        assert torch.equal(points, teaching._recentred(one, unlinked.each(one, Pmg(extent))).points)


def test_no_mask_file_is_opened(tmp_path: Path) -> None:
    """Every mask of the folder is damaged, and none may be read: the way from a folder to a student's masks."""
    root = write_folder(tmp_path / "tiny")
    for mask in (root / "masks").iterdir():
        mask.write_bytes(b"no image")
    data = load_folder(root, "train", masks=False)
    assert data.masks is None
    train_student(data, Pmg(8), settings=QUICK)


def test_ground_truth_in_memory_does_not_matter() -> None:
    with_truth, without = tiny_set(), tiny_set()
    without.masks = None
    with_truth.masks = ~with_truth.masks
    first, second = (train_student(data, Pmg(8), settings=QUICK) for data in (with_truth, without))
    for a, b in zip(first.networks[8][0].parameters(), second.networks[8][0].parameters(), strict=True):
        assert torch.equal(a, b)


def test_a_saved_student_makes_the_same_masks(tmp_path: Path) -> None:
    data = tiny_set()
    learned = train_student([data, data], [Pmg(8), Pmg(25)], settings=QUICK)
    learned.save(tmp_path / "student.safetensors", {"about": "test"})
    again = Student.load(tmp_path / "student.safetensors")
    assert again.settings == learned.settings and again.threshold == learned.threshold
    assert again.digest() == learned.digest() and len(again.digest()) == 64
    assert Student(learned.networks, learned.settings, 0.35).digest() != learned.digest()
    assert Student(learned.networks, replace(learned.settings, link=0.5)).digest() != learned.digest()
    assert Student({8: learned.networks[8]}, learned.settings).digest() != learned.digest()
    assert again.to("cpu") is again
    for extent in (8, 25):
        assert torch.equal(*(one.masks(data, Pmg(extent)) for one in (learned, again)))
        arguments = {"extent": extent, "sizes": data.sizes}
        assert torch.equal(*(one.probabilities(data.images, data.points, **arguments) for one in (learned, again)))


def test_refusals(tmp_path: Path) -> None:
    refused(lambda: StudentSettings(crop=30), "crop = 30", "multiple of 4")
    refused(lambda: StudentSettings(crop=2**20), "crop = 1048576", "at most 256")
    refused(lambda: StudentSettings(members=101), "members = 101", "at most 100")
    refused(lambda: StudentSettings(steps=0), "steps = 0", "at least 1")
    refused(lambda: StudentSettings(averaging=1.0), "averaging = 1.0")
    refused(lambda: StudentSettings(parts=-0.1), "parts = -0.1")
    empty = tiny_set()
    empty.points = empty.points[:0]
    refused(lambda: train_student(empty), "no point label")
    refused(lambda: train_student([]), "no point label")
    refused(lambda: train_student([tiny_set()] * 5, settings=QUICK), "batch_size = 4", "5 sets")
    for extents in ([8], [8, 8, 25]):
        makers = [Pmg(extent) for extent in extents]
        refused(
            lambda makers=makers: train_student([tiny_set()] * 2, makers),
            *("pmg: ", "for all 2 sets", f"got {len(makers)}"),
        )
    for extent in (0, 8.0, 8.5, "8"):
        refused(lambda extent=extent: train_student([tiny_set()] * 2, Pmg(extent)), f"extent = {extent!r}")
    many = [tiny_set()] * 65
    refused(lambda: train_student(many, [*map(Pmg, range(1, 66))]), "65 different extents", "at most 64")
    teacher = torch.zeros(4, 27, 27)
    refused(lambda: train_student(tiny_set(), teachers=[teacher]), "teachers of shape [(4, 27, 27)]", "53, 53")
    for link in (0.0, 1.5):
        refused(lambda link=link: StudentSettings(link=link), f"link = {link}")
    refused(lambda: Student.load(tmp_path / "no.safetensors"), "no such checkpoint")
    path = tmp_path / "student.safetensors"
    learned = train_student(tiny_set(), Pmg(8), settings=QUICK)
    learned.save(path, {"student": {"crop": 24}})
    refused(lambda: Student.load(path), str(path), "holds no student of this version")
    learned.save(path, {"threshold": float("nan")})
    refused(lambda: Student.load(path), str(path), "its threshold is nan")
    for extents in ([], [0], [8.0], ["8"], [True], [8, 8], [9, 8], [8, None], [10**400], list(range(1, 66))):
        learned.save(path, {"extents": extents})
        refused(lambda: Student.load(path), str(path), f"its extents are {str(extents)[:40]}", "64 rising lengths")
    learned.save(path, {"extents": {"8": 24}})
    refused(lambda: Student.load(path), str(path), "holds no student of this version")
    learned.save(path, {"extents": [8, 9], "placements": [[], []], "centrings": [None, None]})
    refused(lambda: Student.load(path), str(path), "weights of member 0 for extent 9", "copy the file again")
    learned.networks[8][1].head.bias.data = learned.networks[8][1].head.bias.data.double()
    learned.save(path)
    refused(lambda: Student.load(path), str(path), "weights of member 1 for extent 8")
    learned.networks[8][0].head.bias.data.fill_(float("nan"))
    learned.save(path)
    refused(lambda: Student.load(path), str(path), "weights of member 0 for extent 8")


# ---- where initial masks are made -----------------------------------------------------------------------------------


@pytest.fixture
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    """Every student of the commands as small as the tests'."""
    monkeypatch.setattr(learned_maker, "StudentSettings", lambda *, seed: replace(TAUGHT, seed=seed))


def learned_masks(data: ImageSet, pmg: Pmg, *, seed: int = 0) -> torch.Tensor:
    data.masks = None
    found = train_student(data, pmg, settings=replace(TAUGHT, seed=seed)).masks(data, pmg)
    assert not torch.equal(found, pmg.masks(data))
    return found


def test_updater_starts_from_learned_masks(quick: None, tmp_path: Path) -> None:
    data = tiny_set()
    wanted = learned_masks(data, Pmg(8))
    updater = MaskUpdater(data, Learned(pmg=Pmg(8)))
    assert torch.equal(updater.initial, wanted)
    student = train_student(data, Pmg(8), settings=TAUGHT)
    assert torch.equal(MaskUpdater(data, Learned(student=student, pmg=Pmg(8))).initial, wanted)
    assert torch.equal(MaskUpdater(data, "learned").initial, learned_masks(data, Pmg(25)))
    student.save(tmp_path / "student.safetensors")
    saved = MaskUpdater(data, f"learned:{tmp_path / 'student.safetensors'}")
    assert torch.equal(saved.initial, student.masks(data, Pmg(25)))
    refused(lambda: MaskUpdater(data, "magic"), "masks 'magic'", "pmg, learned")


def test_training_keeps_its_student_and_resumes_with_it(
    quick: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    data = tiny_set()
    settings = Settings(masks="learned", epochs=(1, 0), batch_size=3, patch_size=32, extent=8, seed=4)
    events = []
    training = Training(settings, data, None, tmp_path, events.append)
    assert [event["step"] for event in events if event["event"] == "student"] == [*range(1, 17)]
    assert torch.equal(training.updater.initial, learned_masks(tiny_set(), Pmg(8), seed=4))
    assert torch.equal(training.masks, training.updater.initial)
    training.save()

    def never(*arguments: object, **more: object) -> None:
        raise AssertionError("the student is there already")

    monkeypatch.setattr(teaching, "train_student", never)
    monkeypatch.setattr(learned_maker, "train_student", never)
    again = Training(settings, data, None, tmp_path, events.append)
    again.resume()
    assert torch.equal(again.updater.initial, training.updater.initial)
    assert torch.equal(again.masks, training.masks)
    path, other = tmp_path / "student.safetensors", replace(TAUGHT, seed=4, steps=9)
    refused(
        lambda: teaching.learned_student(data, path, Pmg(8), settings=other),
        *(str(path), "with other settings", "remove it"),
    )
    earlier = {name: value for name, value in read_description(path).items() if name != "extents"}
    save_checkpoint(path, read_tensors(path), earlier)
    refused(
        lambda: teaching.learned_student(data, path, Pmg(8), settings=replace(TAUGHT, seed=4)),
        *(str(path), "of another version", "remove it"),
    )
    save_checkpoint(path, {"model.weight": torch.zeros(2)}, {"stage": 1})
    refused(lambda: Training(settings, data, None, tmp_path, events.append), str(path), "holds no student", "move it")


def test_command_makes_learned_masks_and_applies_a_saved_student(quick: None, tmp_path: Path) -> None:
    root = write_folder(tmp_path / "tiny")
    images = ("--images", root / "images", "--points", root / "masks_centroid", "--extent", "8", "--batch", "3")
    data = load_images(root / "images", points=root / "masks_centroid")
    wanted = learned_masks(data, Pmg(8))
    assert main(list(map(str, ("masks", *images, "--masks", "learned", "--out", tmp_path / "a")))) == 0
    student = f"learned:{tmp_path / 'a' / 'student.safetensors'}"
    assert main(list(map(str, ("masks", *images, "--masks", student, "--out", tmp_path / "b")))) == 0
    for index, (name, (height, width)) in enumerate(zip(data.names, data.sizes.tolist(), strict=True)):
        for folder in ("a", "b"):
            found = read_mask(tmp_path / folder / f"{name}.png", (height, width))
            assert np.array_equal(found, wanted[index, :height, :width].numpy())


def test_measured_beside_pmg(quick: None, tmp_path: Path) -> None:
    root = write_folder(tmp_path / "tiny")
    arguments = ["masks", "--data", str(root), "--masks", "pmg", "learned", "--out", str(tmp_path / "out")]
    assert script.main(arguments) == 0
    first = json.loads((tmp_path / "out" / "masks.json").read_text())
    rows = first["rows"]
    assert list(rows) == ["pmg", "P_g only", "learned"]
    data = load_folder(root, "train")
    truth = data.masks
    masks = learned_masks(data, Pmg(25))
    assert rows["learned"]["iou"] == pytest.approx(float((masks & truth).sum() / (masks | truth).sum()))
    student = tmp_path / "out" / "student.safetensors"
    arguments = ["masks", "--data", str(root), "--masks", f"learned:{student}", "--out", str(tmp_path / "again")]
    assert script.main(arguments) == 0
    again = json.loads((tmp_path / "again" / "masks.json").read_text())
    about = {"maker": "learned", "pmg": Pmg(25).about(), "student": Student.load(student).digest()}
    assert again["rows"] == {"learned": rows["learned"]} and again["masks"] == [about] == first["masks"][1:]
