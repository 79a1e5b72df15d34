"""Compile every kernel for every target without a GPU: registers, spills, shared memory, binary size.

    python -m bench.compile_report            a table
    python -m bench.compile_report --json     the same as JSON, one object a kernel and target

Ends with exit code 1 where a kernel spills or, on CUDA, takes more registers a thread than its launcher allows. On AMD
the vector registers of a wave of 64 are counted, whose limit is 512; ``.vgpr_spill_count`` must be 0.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import subprocess
import sys
import tempfile
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

import triton.language as tl

from hmg_gpu.kernels import blocks, components, counts, pmg, stream

TARGETS = {
    "sm_80": ("cuda", 80, 32),
    "sm_86": ("cuda", 86, 32),
    "sm_90": ("cuda", 90, 32),
    "sm_100": ("cuda", 100, 32),
    "gfx942": ("hip", "gfx942", 64),
}
# Argument types by name; every other pointer is int32 and every other number int32.
TYPES = {
    "prediction": "*u8", "initial": "*u8", "target": "*u8", "current": "*u8", "out": "*u8", "plane": "*u8",
    "other": "*u8", "mask": "*u8", "image": "*u8", "ignored": "*i1", "points": "*i64", "offsets": "*i64",
    "sizes": "*i64", "boxes": "*i64", "table": "*i64", "parents": "*i32", "areas": "*i32", "sums": "*i32",
    "listed": "*i32", "listed_n": "*i32", "totals": "*i32", "first": "*i32", "roots": "*i32", "roots_n": "*i32",
    "ranks": "*i32", "counts": "*i32", "labels": "*i32", "threshold": "fp32", "weight": "fp32", "rest": "fp32",
    "low": "fp32", "high": "fp32", "alpha_bits": "i64", "distance_bits": "i64",
}  # fmt: skip
WORDS = dict.fromkeys(("prediction", "initial", "target", "current", "out"), "*i32")  # planes of bytes, four at a time
TILE = {"TILE_H": blocks.TILE_H, "TILE_W": blocks.TILE_W}
CHUNK, BY_PIXEL, BYTES = (
    {name: value for name, value in stream.chunk_options(512, packed, by_pixel=by_pixel).items() if name.isupper()}
    for packed, by_pixel in ((True, False), (True, True), (False, True))
)
STREAM = {"HAS_INITIAL": True, "HAS_SIZES": False, "LOGITS": False, "SOFT": False, "JUDGE": False, **CHUNK}
LOGITS = STREAM | BY_PIXEL | {"LOGITS": True}
PLANE = {"HAS_SIZES": False, "PAIR": False, "BITS": 2, **TILE}
PAIR = {"HAS_SIZES": True, "PAIR": True, "BITS": 255, **TILE}
PMG = {"SEARCH": True, "PAINT": True, "SOFT": False, "HAS_SIZES": True}
PMG |= {"ALONG": 32, "ACROSS": 16, "COLUMNS": 64, "ROWS": pmg.ROWS}  # extent 25
NARROW = {"ALONG": 16, "COLUMNS": 32}  # extent 10

# (variant, file, kernel, constants, types that differ, warps); the paper's settings. No kernel is specialised in sizes:
# one binary serves all widths, but for PACKED those that are multiples of 16.
JUDGED, SOFT = {"HAS_SIZES": True, "JUDGE": True}, {"HAS_SIZES": True, "SOFT": True}
FLOATS = {"prediction": "*fp32"}
KERNELS = (
    ("bool", "stream", "stream_kernel", STREAM, WORDS, 8),
    ("bool, judged", "stream", "stream_kernel", STREAM | JUDGED, WORDS, 8),
    ("bool, any width", "stream", "stream_kernel", STREAM | BYTES, {}, 8),
    ("bf16 logits", "stream", "stream_kernel", LOGITS, WORDS | {"prediction": "*bf16"}, 8),
    ("logits, judged", "stream", "stream_kernel", LOGITS | JUDGED, WORDS | FLOATS, 8),
    ("logits, judged, any width", "stream", "stream_kernel", LOGITS | JUDGED | BYTES, FLOATS, 8),
    ("soft", "stream", "stream_kernel", LOGITS | SOFT, WORDS | FLOATS | {"initial": "*fp32"}, 8),
    ("soft, any width", "stream", "stream_kernel", LOGITS | SOFT | BYTES, FLOATS | {"initial": "*fp32"}, 8),
    ("", "counts", "pair_kernel", {"HAS_SIZES": True, **CHUNK}, WORDS, 8),
    ("any width", "counts", "pair_kernel", {"HAS_SIZES": True, **CHUNK, **BYTES}, {}, 8),
    ("", "update", "restore_kernel", CHUNK, WORDS, 8),
    ("any width", "update", "restore_kernel", CHUNK | BYTES, {}, 8),
    ("", "tiles", "link_kernel", PLANE | {"FIRST": False}, {}, 8),
    ("pair, wide sums", "tiles", "link_kernel", PAIR | {"FIRST": True}, {"sums": "*i64"}, 8),
    ("pair", "tiles", "border_kernel", PAIR, {}, 8),
    ("wide sums", "tiles", "sum_kernel", PLANE | {"FIRST": False, "ROOTS": False}, {"sums": "*i64"}, 8),
    ("pair", "tiles", "sum_kernel", PAIR | {"FIRST": True, "ROOTS": True}, {}, 8),
    ("wide sums", "update", "decide_kernel", {"HAS_SIZES": True, "KEPT": 1, **TILE}, {"sums": "*i64"}, 8),
    ("", "components", "rank_kernel", {"COLUMNS": 7, "CHUNK": components.CHUNK}, {}, 8),
    ("", "components", "moments_kernel", {"COLUMNS": 7, **TILE}, {}, 8),
    ("", "counts", "match_kernel", {"HAS_SIZES": True, "LANES": counts.MATCH_LANES}, {"out": "*i64"}, 4),
    ("bytes", "pmg", "pmg_kernel", PMG | {"WIDE": tl.int32}, {}, 2),
    ("floats", "pmg", "pmg_kernel", PMG | {"WIDE": tl.float64}, {"image": "*fp32"}, 2),
    ("bytes, extent 10", "pmg", "pmg_kernel", PMG | NARROW | {"WIDE": tl.int32}, {}, 1),
    ("floats, extent 10", "pmg", "pmg_kernel", PMG | NARROW | {"WIDE": tl.float64}, {"image": "*fp32"}, 1),
    ("probabilities", "pmg", "pmg_kernel", PMG | {"SOFT": True, "WIDE": tl.float64},
     {"image": "*fp32", "mask": "*i32"}, 2),
)  # fmt: skip


def compile_kernel(number: int, target: str) -> dict:
    """Compile one row of KERNELS for one target: name, target, registers, spills, shared and binary bytes."""
    import importlib

    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    variant, file, name, constants, changed, warps = KERNELS[number]
    kernel = getattr(importlib.import_module(f"hmg_gpu.kernels.{file}"), name)
    names = kernel.arg_names
    types = TYPES | changed | dict.fromkeys(constants, "constexpr")
    signature = {argument: types.get(argument, "i32") for argument in names}
    # What the launcher finds out by itself: pointers are multiples of 16.
    aligned = {
        (i,): [["tt.divisibility", 16]] for i, argument in enumerate(names) if signature[argument].startswith("*")
    }
    source = ASTSource(
        fn=kernel,
        signature=signature,
        constexprs={(names.index(argument),): value for argument, value in constants.items()},
        attrs=aligned,
    )
    options = blocks.launch_options(warps, TARGETS[target][0])
    if constants.get("CHUNK_W") == CHUNK["CHUNK_W"] and "maxnreg" in options:
        options["maxnreg"] = stream.REGISTERS
    options["enable_fp_fusion"] = name not in ("pmg_kernel", "match_kernel") and not constants.get("SOFT")
    compiled = triton.compile(source, target=GPUTarget(*TARGETS[target]), options=options)
    row = {"kernel": name, "variant": variant, "target": target, "shared": compiled.metadata.shared}
    if TARGETS[target][0] == "cuda":
        binary = compiled.asm["cubin"]
        row |= cuda_usage(binary, Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump")
    else:
        binary, text = compiled.asm["hsaco"], compiled.asm["amdgcn"]
        row["registers"] = int(re.search(r"\.vgpr_count:\s+(\d+)", text)[1])
        row["spills"] = int(re.search(r"\.vgpr_spill_count:\s+(\d+)", text)[1])
    return row | {"binary": len(binary), "limit": options.get("maxnreg")}


def cuda_usage(cubin: bytes, cuobjdump: Path) -> dict:
    """Registers a thread, and bytes of stack and local memory (what spills take), from Triton's own cuobjdump."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "kernel.cubin"
        path.write_bytes(cubin)
        text = subprocess.run([cuobjdump, "-res-usage", path], capture_output=True, text=True, check=True).stdout
    registers, stack, local = (int(re.search(rf"\b{word}:(\d+)", text)[1]) for word in ("REG", "STACK", "LOCAL"))
    return {"registers": registers, "spills": stack + local}


def report(targets: list[str], jobs: int) -> list[dict]:
    tasks = [(number, target) for number in range(len(KERNELS)) for target in targets]
    with ProcessPoolExecutor(jobs) as pool:
        return list(pool.map(compile_kernel, *zip(*tasks, strict=True)))


def faults(row: dict) -> list[str]:
    """Why a row is not acceptable; empty where it is."""
    problems = [f"spills {row['spills']}"] if row["spills"] else []
    if row["target"].startswith("sm_") and row["registers"] > row["limit"]:
        problems.append(f"{row['registers']} registers")
    return problems


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m bench.compile_report", description=__doc__.splitlines()[0])
    parser.add_argument("--target", action="append", choices=list(TARGETS), help="only this target; may be repeated")
    parser.add_argument("--json", action="store_true", help="print JSON instead of a table")
    parser.add_argument("--jobs", type=int, default=os.cpu_count(), help="compilations at a time")
    options = parser.parse_args(arguments)
    if os.environ.get("TRITON_INTERPRET") == "1":
        print("TRITON_INTERPRET=1: interpreted kernels cannot be compiled; unset it", file=sys.stderr)
        return 2
    rows = report(options.target or list(TARGETS), options.jobs)
    bad = [(row, why) for row in rows if (why := faults(row))]
    if options.json:
        print(json.dumps(rows, indent=1))
    else:
        from rich.console import Console
        from rich.table import Table

        table = Table("kernel", "variant", "target", title="Compiled without a GPU")
        for column in ("registers", "spills", "shared", "binary"):
            table.add_column(column, justify="right")
        for row in rows:
            numbers = (str(row[column]) for column in ("registers", "spills", "shared", "binary"))
            table.add_row(row["kernel"], row["variant"], row["target"], *numbers)
        Console(width=110).print(table)
        for row, why in bad:
            print(f"{row['kernel']} ({row['variant']}) on {row['target']}: {', '.join(why)}")
    return 1 if bad else 0


if __name__ == "__main__":
    sys.exit(main())
