"""How an error about a user's file is pinned: its type, one line, and what it says."""

from __future__ import annotations

from collections.abc import Callable

import pytest

from hmg_gpu.common.errors import InputError


def refused(call: Callable[[], object], *parts: str) -> None:
    """The call raises InputError, on one line that holds every part."""
    with pytest.raises(InputError) as caught:
        call()
    text = str(caught.value)
    assert "\n" not in text
    for part in parts:
        assert part in text, text
