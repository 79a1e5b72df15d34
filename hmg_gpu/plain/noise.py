"""Random numbers by counter: each is a whole-number hash of what it is for, so that no order of work changes it.

A stream is named by words such as (seed, hash of the image's name, y, x, repeat); its numbers by a position. All is
arithmetic of 32 bits that wraps around, the same on every device.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence

import torch
from torch import Tensor

_FIRST, _SECOND, _STEP = 0x7FEB352D, 0x846CA68B, 0x9E3779B9  # odd; the first two of a published 32-bit mixer


def _signed(value: int) -> int:
    """The same 32 bits as a signed number."""
    return (value + 2**31) % 2**32 - 2**31


def mix_(state: Tensor) -> Tensor:
    """Scatter the bits of int32 numbers in place: a bijection whose upper bits are well mixed."""
    shifted = torch.bitwise_right_shift(state, 16).bitwise_and_(0xFFFF)  # without the sign
    state.bitwise_xor_(shifted).mul_(_FIRST)
    torch.bitwise_right_shift(state, 15, out=shifted).bitwise_and_(0x1FFFF)
    return state.bitwise_xor_(shifted).mul_(_signed(_SECOND))


def stream(*words: Tensor) -> Tensor:
    """Name streams by words.

    Args:
        words: integer tensors that broadcast; their lower 32 bits count.

    Returns:
        int32, of their common shape.

    Example:
        >>> import torch
        >>> from hmg_gpu.plain.noise import stream
        >>> stream(torch.arange(3), torch.tensor(7)).unique().numel()
        3
    """
    state = torch.zeros((), dtype=torch.int32, device=words[0].device)
    for word in words:
        low = word.long().remainder(2**32)
        low = torch.where(low >= 2**31, low - 2**32, low).int()
        state = mix_((state ^ low).add_(_signed(_STEP)))
        state = state ^ (torch.bitwise_right_shift(state, 16) & 0xFFFF)  # low bits take part in the next round
    return state


def chance(streams: Tensor, positions: Tensor, probability: float) -> Tensor:
    """Whether each position of each stream is drawn.

    Args:
        streams: int32 [N] from :func:`stream`.
        positions: int32 [M] from :func:`stream`; made once, used for all.
        probability: 0 to 1, kept to 32 bits.

    Returns:
        bool [N, M].

    Example:
        >>> import torch
        >>> from hmg_gpu.plain.noise import chance, stream
        >>> drawn = chance(stream(torch.arange(4)), stream(torch.arange(10000)), 0.05)
        >>> drawn.shape, round(float(drawn.float().mean()), 2)
        (torch.Size([4, 10000]), 0.05)
    """
    limit = min(round(probability * 2**32), 2**32 - 1) - 2**31
    return mix_(streams[:, None] ^ positions) < limit


def uniform(streams: Tensor) -> Tensor:
    """The streams as float64 numbers of 0 to 1, 1 excluded.

    Example:
        >>> import torch
        >>> from hmg_gpu.plain.noise import stream, uniform
        >>> drawn = uniform(stream(torch.arange(1000)))
        >>> bool((drawn >= 0).all() and (drawn < 1).all()), round(float(drawn.mean()), 1)
        (True, 0.5)
    """
    return (streams.double() + 2**31) / 2**32


def name_words(names: Sequence[str]) -> Tensor:
    """The names of images as words: int64 [N], on the CPU.

    Example:
        >>> from hmg_gpu.plain.noise import name_words
        >>> name_words(["a", "b", "a"]).unique().numel()
        2
    """
    digests = (hashlib.blake2b(name.encode("utf-8", "surrogatepass"), digest_size=4).digest() for name in names)
    return torch.tensor([int.from_bytes(digest, "big") for digest in digests], dtype=torch.int64)
