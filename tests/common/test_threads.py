"""Groups on threads: the order, the setting, the errors, and the same bits whatever the number of threads."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from functools import partial

import numpy as np
import pytest
import torch
from cases import scene

import hmg_gpu
from hmg_gpu.common.threads import MANY, map_groups
from hmg_gpu.plain import pmg as plain_pmg

HERE = torch.zeros(1)


@pytest.fixture(autouse=True)
def threads() -> Iterator[None]:
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


def test_groups_run_whole_on_one_thread_each_and_come_back_in_order() -> None:
    torch.set_num_threads(3)
    meeting = threading.Barrier(3, timeout=60)

    def work(group: int) -> tuple[int, int, int, bool]:
        if group < 3:
            meeting.wait()  # three groups at a time
        return group, torch.get_num_threads(), threading.get_ident(), torch.is_grad_enabled()

    found = map_groups(work, range(MANY), HERE)
    assert [row[0] for row in found] == list(range(MANY)) and {row[1] for row in found} == {1}
    assert len({row[2] for row in found}) == 3 and not any(row[3] for row in found)
    later: list[int] = []
    thread = threading.Thread(target=lambda: later.append(torch.get_num_threads()))
    thread.start()
    thread.join()
    assert torch.get_num_threads() == 3 and later == [3]


def test_one_thread_few_groups_and_other_tensors_stay_where_they_are() -> None:
    here = threading.get_ident()
    torch.set_num_threads(1)
    assert set(map_groups(lambda _: threading.get_ident(), range(MANY), HERE)) == {here}
    torch.set_num_threads(2)
    few = map_groups(lambda _: (threading.get_ident(), torch.get_num_threads()), range(MANY - 1), HERE)
    assert set(few) == {(here, 1)} and torch.get_num_threads() == 2
    assert len(set(map_groups(lambda _: threading.get_ident(), range(9), HERE, many=2)) - {here}) > 0
    meta = torch.zeros(1, device="meta")
    assert set(map_groups(lambda _: threading.get_ident(), range(MANY), meta)) == {here}


@pytest.mark.parametrize("groups", [4, MANY])
def test_an_error_comes_back_and_the_setting_too(groups: int) -> None:
    torch.set_num_threads(2)
    with pytest.raises(ZeroDivisionError):
        map_groups(lambda group: 1 // group, range(groups), HERE)
    assert torch.get_num_threads() == 2


@pytest.mark.parametrize("kind", ["bytes", "signed"])
def test_masks_have_the_same_bits_with_any_number_of_threads(
    kind: str, rng: np.random.Generator, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(plain_pmg, "map_groups", partial(map_groups, many=2))
    images = torch.from_numpy(np.stack([scene(rng, (90, 100), kind) for _ in range(3)]))
    points = torch.from_numpy(rng.integers(0, [3, 90, 100], (400, 3)))
    results = []
    for count in (1, 2, 5):
        torch.set_num_threads(count)
        results.append((hmg_gpu.point_to_mask(images, points), hmg_gpu.point_to_probability(images, points)))
    assert results[0][0].any()
    for masks, probabilities in results[1:]:
        assert masks.equal(results[0][0]) and probabilities.equal(results[0][1])
