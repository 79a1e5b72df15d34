"""No two accesses of a kernel race but those listed here, every planted race is found, and no interleaving matters."""

from __future__ import annotations

# isort: off
from kernel_tools import DEVICE, poisoned_memory  # before any kernel is decorated

# isort: on
import os
from collections.abc import Callable, Iterator
from types import ModuleType, SimpleNamespace

import numpy as np
import planted
import pytest
import reference
import torch
import triton
import triton.language as tl
from cases import SEEDS, point_rows, random_mask, random_points, random_shape, scene, scene_points, spiral, sweep
from interleaving import Interleaved
from races import Harmless, Races, unlisted
from test_kernels_components import expected_counts, expected_table
from torch import Tensor
from watching import watched

from hmg_gpu.kernels import blocks, components, counts, pmg, stream, tiles, update
from hmg_gpu.plain import pmg as plain_pmg

pytestmark = pytest.mark.skipif(DEVICE != "cpu", reason="watches the interpreter")

# The argument of every entry is told where the union-find is described (kernels/blocks.py) or in its kernel.
ANCESTOR = "only ancestors of a block are ever stored as its parent, so an old value leads to the same root"
KEPT = "both store the same and nobody reads it before the next launch"
ATOMIC = 'tl.atomic_min(parents + high, low, mask=attempt, sem="relaxed")'
SCORED = "tl.store(mask + at, tl.full((ROWS, COLUMNS), 1, tl.uint8), mask=inside & (score >= 0))"
POINT = "tl.store(own, tl.full((), 1, tl.uint8), mask=~finite)"
TAKEN = "tl.store(taken, -tl.load(taken))"
CHOSEN = "the component was chosen by a minimum over all lanes, which waits for every one of these loads"
HARMLESS = (
    Harmless(
        "link_tile", "tl.load(parents + parent, mask=moving, other=0)",
        "tl.store(parents + block, parent, mask=moving)", ANCESTOR,
    ),
    Harmless("union", "tl.load(parents + a, mask=active, other=0)", ATOMIC, f"{ANCESTOR}; the atomic itself decides"),
    Harmless("union", "tl.load(parents + b, mask=active, other=0)", ATOMIC, f"{ANCESTOR}; the atomic itself decides"),
    Harmless(
        "find, sum_kernel", "tl.load(parents + root, mask=moving, other=0)",
        "tl.store(own + block, root, mask=some)", f"{ANCESTOR}; no union runs meanwhile, so the root stands",
    ),
    Harmless("judge_values", "tl.store(totals + 1, 1)", "tl.store(totals + 1, 1)", KEPT),
    Harmless("judge_values", "tl.store(totals + 2, 1)", "tl.store(totals + 2, 1)", KEPT),
    Harmless("match_kernel", "tl.load(areas + root, mask=lane < n, other=0)", TAKEN, CHOSEN, in_turn=True),
    Harmless(
        "match_kernel", "tl.load(taken)", TAKEN, "one thread stores; what the others have loaded goes nowhere",
        in_turn=True,
    ),
    Harmless("paint", SCORED, SCORED, KEPT),
    Harmless("paint", POINT, POINT, KEPT),
)  # fmt: skip
MODULES = (blocks, components, counts, pmg, stream, tiles, update)
SHIPPED = {module.__name__.rpartition(".")[2]: module for module in MODULES}


# ---- every op, on tiles so small that a small image has several ------------------------------------------------------


@pytest.fixture(autouse=True)
def small_tiles(monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[[dict[str, ModuleType]], None]]:
    """Tiles of 8 x 16 pixels, a block of 2 x 2 pixels for each thread of one warp; three programs for all tiles."""

    def shrink(modules: dict[str, ModuleType]) -> None:
        settings = {
            "blocks": {"TILE_H": 8, "TILE_W": 16, "NUM_WARPS": 1},
            "stream": {"CHUNK": 512, "CHUNK_PIXELS": 256},
            "tiles": {"PROGRAMS": 3},
            "components": {"CHUNK": 64, "NUM_WARPS": 1},
            "counts": {"MATCH_LANES": 128},  # four warps
        }
        for name, values in settings.items():
            for setting, value in values.items():
                monkeypatch.setattr(modules[name], setting, value)
        modules["tiles"].programs_of.cache_clear()

    shrink(SHIPPED)
    yield shrink
    tiles.programs_of.cache_clear()


def calls(modules: dict[str, ModuleType], seed: int = 0) -> list[tuple[str, Callable[[], object]]]:
    """Every kernel by its launcher, on masks whose components cross the borders of tiles; each with its module."""
    rng = np.random.default_rng(seed)
    noise = torch.from_numpy(rng.random((2, 18, 48)) < np.array([0.3, 0.55])[:, None, None])
    noise[0, :17, :17] |= torch.from_numpy(spiral(17))
    noise[1, 8:10, 4:44] = True  # a bar across tiles that hold nothing else
    noise[1, 11:, 20:] = noise[1, :7, :14] = False
    dots = torch.from_numpy(rng.random((2, 18, 48)) < 0.03)
    points = point_rows([[(3, 4), (9, 20), (9, 20), (9, 21)], [(17, 35)]])
    kernels = SimpleNamespace(**modules)
    grouped, offsets = kernels.update.group_points(points, 2)
    images = torch.from_numpy(np.stack([scene(rng, (18, 48), "bytes") for _ in range(2)]))
    images[0, 9, 20] = torch.nan
    sizes = torch.tensor([[18, 48], [17, 40]])
    values = torch.where(noise, 2.0, -1.0)
    values[0, 2, 3] = torch.nan
    narrow = noise[..., :37].contiguous()
    update, pmg = kernels.update, kernels.pmg
    return [
        ("update", lambda: update.launch(noise, dots, grouped, offsets, None, 9, 0.0)),
        ("components", lambda: kernels.components.launch(noise, sizes, 50)),
        ("counts", lambda: kernels.counts.launch(dots | (noise & dots.roll(1, 2)), dots, None, 3.0)),
        ("stream", lambda: update.launch_correct(values, dots, dots, grouped, offsets, sizes, 9, 0.0, 0.0, 1.0, 0.3)),
        ("update", lambda: update.launch(noise.float(), dots.float(), grouped, offsets, sizes, 9, 0.5, weight=0.6)),
        ("update", lambda: update.launch(narrow, None, grouped, offsets, None, 9, 0.0)),
        ("counts", lambda: kernels.counts.launch(narrow, narrow.roll(1, 2), sizes.clamp(max=37), 3.0)),
        ("pmg", lambda: pmg.point_to_probability(images, points, extent=6, half_width=2)),
        ("pmg", lambda: pmg.point_to_mask(images, points, extent=6, half_width=2)),
        ("pmg", lambda: pmg.point_to_mask(images[1:], torch.tensor([[0, 9, 9], [0, 10, 10], [0, 9, 9]]), extent=6)),
    ]


# ---- races ----------------------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_the_kernels_hold_no_race_but_the_listed_ones() -> None:
    with watched(races := Races()), poisoned_memory():
        for seed in range(2):
            for _, call in calls(SHIPPED, seed):
                call()
    assert not [str(conflict) for conflict in unlisted(races.conflicts, HARMLESS)]
    assert races.kernels == {name for module in SHIPPED.values() for name in vars(module) if name.endswith("_kernel")}
    met = [entry for entry in HARMLESS if any(entry.covers(conflict) for conflict in races.conflicts)]
    assert met == list(HARMLESS)  # an entry that nothing meets any more goes


@pytest.mark.slow
@pytest.mark.parametrize("fault", planted.all_faults(), ids=str)
def test_every_planted_race_is_found(fault: planted.Fault, tmp_path, small_tiles) -> None:
    folder = tmp_path / f"planted_{fault.file}_{fault.line}"
    folder.mkdir()
    modules = planted.plant(fault, folder)
    small_tiles(modules)
    for _, call in sorted(calls(modules), key=lambda row: row[0] != fault.file):  # its own module's come first
        with watched(races := Races()):
            call()
        if unlisted(races.conflicts, HARMLESS):
            return
    pytest.fail("no run showed it")


# ---- any interleaving -----------------------------------------------------------------------------------------------

SCHEDULES = int(os.environ.get("HMG_SCHEDULES", "5"))  # of each case
TRIES, APART = 50, 10**6  # schedules in place of one; between the seeds of two of them
CASES = sweep(range(SEEDS))


def agree(run: Callable[[], Tensor | tuple[Tensor, ...]], expected: list[np.ndarray], case: int) -> None:
    """The same result under every schedule; another takes the place of one in which no program waits for another."""
    for number in range(case * SCHEDULES, (case + 1) * SCHEDULES):
        for seed in range(number, number + TRIES * APART, APART):
            with watched(interleaved := Interleaved(seed)), poisoned_memory():
                found = run()
            for one, wanted in zip(found if isinstance(found, tuple) else (found,), expected, strict=True):
                assert np.array_equal(one.numpy(), wanted), f"schedule {seed}"
            if interleaved.switches:
                break
        else:
            pytest.fail(f"{TRIES} schedules, and no program ever waited for another")


def tiled_mask(rng: np.random.Generator) -> np.ndarray:
    """Four to nine tiles."""
    return random_mask(rng, (int(rng.integers(9, 20)), int(rng.integers(17, 36))))


@pytest.mark.parametrize("case", CASES)
def test_update_in_any_interleaving(case: int) -> None:
    rng = np.random.default_rng(case)
    mask = tiled_mask(rng)
    initial, rows = random_mask(rng, mask.shape), random_points(rng, mask.shape)
    radius = int(rng.choice([1, 4, 10]))
    points, offsets = update.group_points(point_rows([rows]), 1)
    planes = torch.from_numpy(mask)[None], torch.from_numpy(initial)[None]
    expected = [reference.update(mask, initial, rows, radius)[None]]
    agree(lambda: update.launch(*planes, points, offsets, None, radius, 0.0), expected, case)


@pytest.mark.parametrize("case", CASES)
def test_components_in_any_interleaving(case: int) -> None:
    mask = tiled_mask(np.random.default_rng(100 + case))
    labels, rows = expected_table(mask)
    table = np.zeros((blocks.block_count(*mask.shape), 7), dtype=np.int64)
    table[: len(rows)] = rows
    expected = [labels[None], np.array([len(rows)]), table[None]]
    agree(lambda: components.components(torch.from_numpy(mask)[None]), expected, case)


@pytest.mark.parametrize("case", CASES)
def test_detection_counts_in_any_interleaving(case: int) -> None:
    rng = np.random.default_rng(200 + case)
    target = tiled_mask(rng)
    prediction = target ^ (rng.random(target.shape) < 0.05)
    expected = [np.array([expected_counts(prediction, target, 2.7)])]
    planes = torch.from_numpy(prediction)[None], torch.from_numpy(target)[None]
    agree(lambda: counts.launch(*planes, None, 2.7), expected, case)


@pytest.mark.parametrize("case", CASES)
def test_pmg_in_any_interleaving(case: int) -> None:
    rng = np.random.default_rng(300 + case)
    shape = random_shape(rng, 30)
    images = torch.from_numpy(scene(rng, shape, "bytes"))[None]
    points = point_rows([scene_points(rng, shape, 3)[-5:]])
    boxes = plain_pmg.point_to_box(images, points, 8, 2, None)
    mask = plain_pmg.paint(images, points, boxes, 8, 0.15, soft=False)
    found = lambda: pmg.launch(images, points, None, None, 8, 2, 0.15, True)  # noqa: E731
    agree(found, [boxes.numpy(), mask.numpy()], case)


# ---- the tools themselves -------------------------------------------------------------------------------------------


@triton.jit
def shifted(memory, N: tl.constexpr, BARRIER: tl.constexpr):
    lane = tl.arange(0, N)
    tl.store(memory + lane, lane)
    if BARRIER:
        tl.debug_barrier()
    tl.store(memory + N + lane, tl.load(memory + (lane + 1) % N))


@triton.jit
def there_and_back(memory, N: tl.constexpr, BARRIER: tl.constexpr):
    lane = tl.arange(0, N)
    for _ in range(2):
        value = tl.load(memory + (lane + 1) % N)
        tl.store(memory + lane, value + 1)
        if BARRIER:
            tl.debug_barrier()


@triton.jit
def own_lane(memory, N: tl.constexpr):
    lane = tl.arange(0, N)
    tl.store(memory + lane, lane)
    tl.store(memory + lane, tl.load(memory + lane) + 1)


@triton.jit
def other_shape(memory, N: tl.constexpr):
    tl.store(memory + tl.arange(0, N), tl.arange(0, N))
    tl.load(memory + tl.reshape(tl.arange(0, N), (2, N // 2)))


@triton.jit
def scalar(memory, BARRIER: tl.constexpr):
    tl.store(memory, 5)
    if BARRIER:
        tl.debug_barrier()
    tl.store(memory + 1, tl.load(memory))


@triton.jit
def one_place(memory, N: tl.constexpr, SAME: tl.constexpr):
    lane = tl.arange(0, N)
    tl.store(memory + lane * 0, lane * 0 + 3 if SAME else lane)


@triton.jit
def count_plainly(memory):
    tl.store(memory, tl.load(memory) + 1)


@triton.jit
def count_atomically(memory, READ: tl.constexpr):
    tl.atomic_add(memory, 1, sem="relaxed")
    if READ:
        tl.store(memory + 1 + tl.program_id(0), tl.load(memory))


@pytest.mark.parametrize(
    ("kernel", "grid", "settings", "where"),
    [
        (shifted, 1, {"N": 128, "BARRIER": False}, {"threads"}),
        (shifted, 1, {"N": 128, "BARRIER": True}, set()),
        (own_lane, 1, {"N": 128}, set()),
        (own_lane, 1, {"N": 64}, {"threads"}),  # fewer lanes than threads: several threads load what one stores
        (own_lane, 2, {"N": 128}, {"programs"}),
        (other_shape, 1, {"N": 256}, {"threads"}),
        (scalar, 1, {"BARRIER": False}, {"threads"}),
        (scalar, 1, {"BARRIER": True}, set()),
        (one_place, 1, {"N": 128, "SAME": False}, {"lanes"}),
        (one_place, 1, {"N": 128, "SAME": True}, set()),
        (count_plainly, 2, {}, {"programs", "threads"}),
        (count_atomically, 2, {"READ": False}, set()),
        (count_atomically, 2, {"READ": True}, {"programs", "threads"}),
    ],
    ids=lambda value: getattr(value, "__name__", str(sorted(value) if isinstance(value, set) else value)),
)
def test_what_is_a_race(kernel, grid: int, settings: dict, where: set[str]) -> None:
    memory = torch.zeros(1024, dtype=torch.int32)
    with watched(races := Races()):
        kernel[(grid,)](memory, **settings)
    assert {conflict.where for conflict in races.conflicts} == where
    assert all(kernel.__name__ in str(conflict) for conflict in races.conflicts)


@pytest.mark.parametrize("barrier", [True, False])
def test_a_pair_that_is_harmless_in_turn_is_a_race_the_other_way_round(barrier: bool) -> None:
    with watched(races := Races()):
        there_and_back[(1,)](torch.zeros(128, dtype=torch.int32), N=128, BARRIER=barrier)
    pair = ("there_and_back", "tl.load(memory + (lane + 1) % N)", "tl.store(memory + lane, value + 1)", "said so")
    left = unlisted(races.conflicts, [Harmless(*pair, in_turn=True)])
    assert [conflict.first.kind for conflict in left] == ([] if barrier else ["store"])
    assert races.conflicts and not unlisted(races.conflicts, [Harmless(*pair)])


def test_an_interleaving_loses_plain_counts_and_no_atomic_ones() -> None:
    ends = {count_plainly: set(), count_atomically: set()}
    for seed in range(20):
        for kernel, seen in ends.items():
            memory = torch.zeros(8, dtype=torch.int32)
            with watched(Interleaved(seed)):
                kernel[(6,)](memory, **({"READ": False} if kernel is count_atomically else {}))
            seen.add(int(memory[0]))
    assert ends[count_atomically] == {6} and min(ends[count_plainly]) < 6


@triton.jit
def half_of_the_programs(memory):
    tl.store(memory + tl.program_id(0) * 2, tl.num_programs(0))
    tl.store(memory + tl.program_id(0) * 2 + 1, tl.program_id(0))


def test_programs_keep_their_number_and_the_interpreter_is_left_as_it_was() -> None:
    for _ in range(2):
        memory = torch.zeros(10, dtype=torch.int32)
        with watched(Interleaved(1)):
            half_of_the_programs[(5,)](memory)
        assert memory.tolist() == [5, 0, 5, 1, 5, 2, 5, 3, 5, 4]
    half_of_the_programs[(5,)](again := torch.zeros(10, dtype=torch.int32))
    assert again.equal(memory)


@triton.jit
def third_fails(memory):
    tl.store(memory + tl.program_id(0), 1)
    tl.static_assert(tl.load(memory + tl.program_id(0)) != tl.where(tl.program_id(0) == 2, 1, 0))


def test_a_program_that_fails_ends_the_launch() -> None:
    with pytest.raises(Exception, match="AssertionError"), watched(Interleaved(0)):
        third_fails[(5,)](torch.zeros(5, dtype=torch.int32))
