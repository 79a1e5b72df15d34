"""The cost report: machine code is read right, bounds are kept, bytes are counted, and nothing creeps up."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from bench import compile_report
from bench.compile_report import COSTS, COUNTED, KERNELS, LIMITS, faults, read_costs, units_of, write_costs
from bench.sass import Block, read_blocks, shortest

ROOT = Path(__file__).parents[2]

# A loop, a branch around a block, a predicated exit, a warp's own detour, padding.
LISTING = """
	.section	.text.other,"ax",@progbits
.text.other:
        /*0000*/                   EXIT ;
	.section	.text.some_kernel,"ax",@progbits
.text.some_kernel:
        /*0000*/                   S2R R0, SR_TID.X ;
        /*0010*/              @!P0 BRA `(.L_x_1) ;
.L_x_0:
        /*0020*/                   IADD3 R0, R0, 0x1, RZ ;
        /*0030*/                   BRA.DIV UR4, `(.L_x_2) ;
        /*0040*/               @P1 BRA `(.L_x_0) ;
.L_x_1:
        /*0050*/                   STG.E [R2.64], R0 ;
        /*0060*/               @P2 EXIT ;
        /*0070*/                   BAR.SYNC.DEFER_BLOCKING 0x0 ;
        /*0080*/                   EXIT ;
.L_x_2:
        /*0090*/                   WARPSYNC R1 ;
        /*00a0*/                   BRA `(.L_x_1) ;
.L_x_3:
        /*00b0*/                   BRA `(.L_x_3);
        /*00c0*/                   NOP ;
.L_x_4:
	.section	.text.third,"ax",@progbits
"""


def test_blocks_of_a_listing() -> None:
    blocks = read_blocks(LISTING, "some_kernel")
    assert blocks == [
        Block(2, (3, 1)),  # the branch, or on
        Block(2, (5, 2)),
        Block(1, (1, 3)),  # the loop
        Block(2, (-1, 4)),
        Block(2, (-1,)),
        Block(2, (3,)),
        Block(1, (6,)),  # what compilers put at the end
        Block(0, (-1,)),
    ]
    assert shortest(blocks) == 4
    with pytest.raises(ValueError, match="no kernel some"):
        read_blocks(LISTING, "some")
    with pytest.raises(ValueError, match="no way out"):
        shortest([Block(1, (1,)), Block(2, (0,))])


def test_a_row_beyond_its_bounds_fails() -> None:
    row = {"kernel": "k", "variant": "v", "target": "sm_90", "spills": 0, "registers": 60, "shortest": 100, "all": 900}
    row |= {"limit": 128}
    costs = read_costs(write_costs([row]))
    assert costs == {("k", "v", "sm_90"): {name: row[name] for name in COUNTED}}
    assert faults(row, costs) == [] and faults(row | {"shortest": 110}, costs) == []
    assert faults(row | {"shortest": 111}, costs) == ["shortest: 111, 100 are kept"]
    assert faults(row | {"spills": 8, "registers": 130}, costs) == [
        "spills 8", "130 registers", "registers: 130, 60 are kept",
    ]  # fmt: skip
    assert "no line in bench/costs.txt" in faults(row | {"variant": "new"}, costs)[0]
    assert faults({"kernel": "k", "variant": "v", "target": "gfx942", "spills": 0, "registers": 200}, {}) == []


def test_the_kept_bounds_hold_what_was_promised() -> None:
    """Every kernel and target has a line; the pass of the update is as cheap as README says."""
    costs = read_costs(COSTS.read_text("utf-8"))
    assert set(costs) == {(row[2], row[0], target) for row in KERNELS for target in LIMITS}
    (constants, warps) = next((row[3], row[5]) for row in KERNELS if (row[0], row[2]) == ("bool", "stream_kernel"))
    kept = costs["stream_kernel", "bool", "sm_90"]
    assert kept["shortest"] * warps / units_of(constants) <= 0.15
    for (kernel, variant, _), row in costs.items():
        if kernel in ("stream_kernel", "pair_kernel", "restore_kernel"):
            judged = "logits, judged" in variant
            assert row["registers"] <= (80 if judged and "any width" in variant else 72 if judged else 64)


def test_bytes_and_launches_are_counted(tmp_path: Path) -> None:
    environment = os.environ | {"TRITON_INTERPRET": "1", "CUDA_VISIBLE_DEVICES": ""}
    code = """
import torch, triton, triton.language as tl
from bench.traffic import counted
@triton.jit
def kernel(a, b, n):
    at = tl.arange(0, 8)
    value = tl.load(a + at // 2, mask=at < 6, other=0)  # 3 of int32
    tl.store(b + at, value, mask=at < n)
    tl.atomic_add(b + 9, 1)
a, b = torch.zeros(16, dtype=torch.int32), torch.zeros(16, dtype=torch.int64)
with counted() as traffic:
    kernel[(2,)](a, b, 5)
    kernel[(1,)](a, b, 5)
kernel[(1,)](a, b, 5)
print(traffic.launches, traffic.read, traffic.written)
"""
    file = tmp_path / "some_kernel.py"  # Triton reads a kernel's source from its file
    file.write_text(code)
    done = subprocess.run(
        [sys.executable, file], env=environment | {"PYTHONPATH": str(ROOT)}, cwd=ROOT, capture_output=True, text=True,
        check=False,
    )  # fmt: skip
    assert done.stdout.split("] ")[1].split() == [str(2 * (3 * 4 + 8)), str(2 * (5 * 8 + 8))], done.stderr
    assert done.stdout.startswith("['kernel', 'kernel']")


@pytest.mark.slow
def test_ops_move_few_bytes_in_few_launches() -> None:
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    done = subprocess.run(
        [sys.executable, "-m", "bench.compile_report", "--ops", "--json"],
        env=environment, cwd=ROOT, capture_output=True, text=True, check=False,
    )  # fmt: skip
    rows = {(row["op"], row["image"]): row for row in json.loads(done.stdout)}
    launches = {"update": 5, "update, float32 logits": 5, "soft_update": 5, "correct, bfloat16 logits": 6,
                "detection_counts": 5, "components": 6}  # fmt: skip
    assert {op: row["launches"] for (op, image), row in rows.items() if image == "empty"} == launches
    assert {op: row["launches"] for (op, image), row in rows.items() if image != "empty"} == launches
    # An empty update reads two planes of bytes and writes one; counts read two and write next to nothing.
    moved = {op: row["read"] + row["written"] for (op, image), row in rows.items() if image == "empty"}
    assert 3 <= moved["update"] < 3.02 and 2 <= moved["detection_counts"] < 2.02
    assert 6 <= moved["update, float32 logits"] < 6.02 and 9 <= moved["soft_update"] < 9.02


def test_the_report_needs_compiled_kernels(monkeypatch: pytest.MonkeyPatch, capsys) -> None:
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    assert compile_report.main([]) == 2 and "unset it" in capsys.readouterr().err
