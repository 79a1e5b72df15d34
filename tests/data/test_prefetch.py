"""Reading ahead: the order, how far ahead, errors, and that nothing is left behind."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator

import pytest

from hmg_gpu.data.prefetch import prefetch


def threads() -> int:
    return sum(thread.name == "prefetch" for thread in threading.enumerate())


def wait_for(condition) -> None:
    end = time.monotonic() + 5
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.005)


def test_every_part_in_order() -> None:
    assert list(prefetch(iter(range(50)))) == list(range(50))
    assert list(prefetch([])) == []
    assert threads() == 0


@pytest.mark.parametrize("ahead", [1, 3])
def test_reads_so_far_ahead_and_no_further(ahead: int) -> None:
    made = []

    def parts() -> Iterator[int]:
        for number in range(20):
            made.append(number)
            yield number

    reading = prefetch(parts(), ahead)
    assert next(reading) == 0
    wait_for(lambda: len(made) == ahead + 2)  # the one given, those that wait, the one in the reader's hands
    time.sleep(0.05)
    assert len(made) == ahead + 2
    reading.close()
    assert threads() == 0


def test_an_error_comes_where_its_part_would_have() -> None:
    def parts() -> Iterator[int]:
        yield 1
        raise OSError("disk gone")

    reading = prefetch(parts())
    assert next(reading) == 1
    with pytest.raises(OSError, match="disk gone"):
        next(reading)
    assert threads() == 0


def test_a_consumer_that_fails_ends_the_reader() -> None:
    with pytest.raises(KeyError):
        for _ in prefetch(iter(range(1000))):
            raise KeyError
    wait_for(lambda: threads() == 0)
