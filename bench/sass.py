"""Read a compiled kernel's machine code for NVIDIA: how many instructions its shortest and its longest way hold.

Counted, not measured: an instruction is one, whether it waits for memory or not. ``shortest`` is the way from the entry
to an exit with the fewest instructions: what a program does that finds nothing to do. ``all`` counts every instruction
once: what it does where everything is to be done, with each loop gone through once.
"""

from __future__ import annotations

import heapq
import re
import subprocess
import tempfile
from pathlib import Path
from typing import NamedTuple

LABEL = re.compile(r"^(\.L_x_\d+):")
INSTRUCTION = re.compile(r"^\s+/\*[0-9a-f]+\*/\s+(?:(@!?U?P[T\d]+)\s+)?([A-Z][\w.]*)\s*(.*?)\s*;?\s*$")
TARGET = re.compile(r"`\((\.L_x_\d+)\)")
ENDS = ("EXIT", "RET", "BRA", "BRX", "JMP")


class Block(NamedTuple):
    """Instructions that follow one another: how many, and the numbers of the blocks that may come next; -1: the end."""

    size: int
    following: tuple[int, ...]


def read_blocks(listing: str, kernel: str) -> list[Block]:
    """Basic blocks of one kernel in the listing of ``nvdisasm -c``, the entry first.

    Example:
        >>> from bench.sass import read_blocks
        >>> listing = '''
        ... .text.k:
        ...         /*0000*/                   S2R R0, SR_TID.X ;
        ...         /*0010*/               @P0 EXIT ;
        ...         /*0020*/                   IADD3 R0, R0, 1, RZ ;
        ...         /*0030*/                   EXIT ;
        ... '''
        >>> read_blocks(listing, "k")
        [Block(size=2, following=(-1, 1)), Block(size=2, following=(-1,))]
    """
    _, found, body = listing.partition(f".text.{kernel}:\n")
    if not found:
        raise ValueError(f"no kernel {kernel} in the listing")
    names: dict[str, int] = {}
    sizes: list[int] = [0]
    ends: list[tuple[list[str], bool, bool]] = [([], False, True)]  # labels it may go to, may end, may go on

    def begin() -> None:
        if sizes[-1]:
            sizes.append(0)
            ends.append(([], False, True))

    for line in body.splitlines():
        if line.startswith(("\t.section", ".text.", "//----")):
            break
        if label := LABEL.match(line):
            begin()
            names[label[1]] = len(sizes) - 1
        elif instruction := INSTRUCTION.match(line):
            predicate, name, operands = instruction.groups()
            kind = name.partition(".")[0]
            if kind == "NOP":
                continue
            sizes[-1] += 1
            if kind in ENDS:
                always = predicate in (None, "@PT") and not operands.startswith(("UP", "!UP", "P", "!P")) and (
                    name not in ("BRA.DIV", "BRA.CONV")
                )  # fmt: skip
                targets = TARGET.findall(operands) if kind in ("BRA", "BRX", "JMP") else []
                ends[-1] = (targets, kind in ("EXIT", "RET"), not always)
                begin()
    blocks = []
    for number, (size, (targets, may_end, goes_on)) in enumerate(zip(sizes, ends, strict=True)):
        following = [names[target] for target in targets if target in names]
        if may_end:
            following.append(-1)
        if goes_on:
            following.append(number + 1 if number + 1 < len(sizes) else -1)
        blocks.append(Block(size, tuple(dict.fromkeys(following))))
    return blocks


def shortest(blocks: list[Block]) -> int:
    """Instructions of the way from the first block to an end that has the fewest.

    Example:
        >>> from bench.sass import Block, shortest
        >>> shortest([Block(3, (2, 1)), Block(9, (2,)), Block(1, (-1,))])
        4
    """
    least = {0: blocks[0].size}
    waiting = [(blocks[0].size, 0)]
    while waiting:
        cost, number = heapq.heappop(waiting)
        for other in blocks[number].following:
            if other == -1:
                return cost
            total = cost + blocks[other].size
            if total < least.get(other, total + 1):
                least[other] = total
                heapq.heappush(waiting, (total, other))
    raise ValueError("no way out of the kernel")


def count_instructions(cubin: bytes, kernel: str, nvdisasm: Path) -> dict[str, int]:
    """``shortest`` and ``all`` of one compiled kernel, by Triton's own nvdisasm."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "kernel.cubin"
        path.write_bytes(cubin)
        listing = subprocess.run([nvdisasm, "-c", path], capture_output=True, text=True, check=True).stdout
    blocks = read_blocks(listing, kernel)
    return {"shortest": shortest(blocks), "all": sum(block.size for block in blocks)}
