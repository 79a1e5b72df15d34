"""--extent auto on images of several kinds: a resolution that many points share has an extent of its own."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from tiny import tiny_set

from hmg_gpu import MaskUpdater, point_to_mask, point_to_probability
from hmg_gpu.common.errors import HMGError
from hmg_gpu.data import ImageSet
from hmg_gpu.evaluation import measure_masks
from hmg_gpu.masks import Learned, Pmg
from hmg_gpu.masks.makers import learned
from hmg_gpu.masks.makers import pmg as module
from hmg_gpu.masks.student import StudentSettings

SIZES = ((32, 32),) * 24 + tuple((33 + row, 40) for row in range(24))  # one resolution of many images, many of one


@pytest.fixture
def mixed(monkeypatch: pytest.MonkeyPatch) -> ImageSet:
    """A set whose images of 32 x 32 ask for an extent of 5, the others for 11."""

    def choose(data: ImageSet, **_: float) -> int:
        sizes = {tuple(size) for size in data.sizes.tolist()}
        return 5 if sizes == {(32, 32)} else 11 if (32, 32) not in sizes else 8

    monkeypatch.setattr(module, "choose_extent", choose)
    return tiny_set(SIZES)


def by_hand(data: ImageSet, function, combine) -> torch.Tensor:
    first = data.points[:, 0] < 24
    parts = [
        function(data.images, data.points[rows], extent=extent, sizes=data.sizes)
        for rows, extent in ((first, 5), (~first, 11))
    ]
    return combine(*parts)


def test_each_resolution_gets_its_own_and_says_so(mixed: ImageSet) -> None:
    maker = Pmg(extent="auto").fit(mixed)
    assert (maker.extent, maker.by_size) == (11, ((32, 32, 5),))
    assert "images disagree, chosen by resolution: 5 for 32 x 32 (24 points), 11 for the others (24 points)" in str(
        maker
    )
    assert maker.about()["by_size"] == [[32, 32, 5]]
    assert torch.equal(maker.masks(mixed), by_hand(mixed, point_to_mask, torch.logical_or))
    assert torch.equal(maker.probabilities(mixed), by_hand(mixed, point_to_probability, torch.maximum))
    part = mixed.subset([30, 3, 40])  # in any selection of the images
    for row, image in enumerate((30, 3, 40)):
        height, width = mixed.sizes[image].tolist()
        assert torch.equal(maker.masks(part)[row, :height, :width], maker.masks(mixed)[image, :height, :width])


def test_images_that_agree_keep_one_extent(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "choose_extent", lambda data, **_: 9 if len(data) == len(SIZES) else 10)
    maker = Pmg(extent="auto").fit(tiny_set(SIZES))
    assert (maker.extent, maker.by_size) == (9, ()) and "disagree" not in str(maker) and "by_size" not in maker.about()


def test_a_given_extent_is_for_all(mixed: ImageSet) -> None:
    maker = Pmg(extent="auto").fit(mixed)
    given = maker.change("extent", 8)
    assert given.by_size == () and given == Pmg(extent=8)
    assert torch.equal(given.masks(mixed), point_to_mask(mixed.images, mixed.points, extent=8, sizes=mixed.sizes))
    assert maker.change("alpha", 0.2).by_size == maker.by_size


def test_masks_of_single_points_and_tables(mixed: ImageSet) -> None:
    maker = Pmg(extent="auto").fit(mixed)
    assert not maker.knows_each(mixed)
    with pytest.raises(HMGError, match=r"take its parts by split\(data\)"):
        maker.each(mixed, mixed.points)
    rows = measure_masks(mixed, {"pmg": maker.masks(mixed)}, [maker])
    assert list(rows) == ["pmg", "P_g only"] and rows["pmg"]["sizes"]["Spot"]["targets"] > 0


def test_updater_and_student_take_it(mixed: ImageSet, monkeypatch: pytest.MonkeyPatch) -> None:
    updater = MaskUpdater(mixed, "pmg:extent=auto")
    assert torch.equal(updater.initial, by_hand(mixed, point_to_mask, torch.logical_or))
    quick = StudentSettings(crop=16, steps=2, batch_size=8, members=1)
    monkeypatch.setattr(learned, "StudentSettings", lambda seed: replace(quick, seed=seed))
    maker = Learned(pmg=Pmg(extent="auto")).fit(mixed)
    assert sorted(maker.student.networks) == [5, 11]  # a branch of its own for each
    parts = [maker.student.masks(part, pmg) for pmg, part in maker.pmg.split(mixed)]
    assert torch.equal(maker.masks(mixed), parts[0] | parts[1])
    assert maker.probabilities(mixed).shape == mixed.images.shape
