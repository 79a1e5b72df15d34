"""What every kernel costs on every target, without a GPU: counted in the compiled code, not measured.

    python -m bench.compile_report            a table
    python -m bench.compile_report --json     the same as JSON, one object a kernel and target
    python -m bench.compile_report --ops      launches and bytes a pixel of the ops, counted in Triton's interpreter
    python -m bench.compile_report --write    keep the counts as bounds in bench/costs.txt

Registers, spills, shared memory, binary size; on NVIDIA also how many programs a multiprocessor holds, and warp
instructions a pixel (a point, of PMG): on the shortest way through the kernel, which is that of a program that finds no
foreground, and with every instruction once, which is that of a program that finds all, each loop gone through once.

Ends with exit code 1 where a kernel spills, takes more registers a thread on CUDA than its launcher allows, or costs
more than bench/costs.txt holds. On AMD the vector registers of a wave of 64 are counted, whose limit is 512;
``.vgpr_spill_count`` must be 0.
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

from bench.sass import count_instructions
from hmg_gpu.kernels import blocks, components, counts, pmg, stream

TARGETS = {
    "sm_80": ("cuda", 80, 32),
    "sm_86": ("cuda", 86, 32),
    "sm_90": ("cuda", 90, 32),
    "sm_100": ("cuda", 100, 32),
    "gfx942": ("hip", "gfx942", 64),
}
COSTS = Path(__file__).with_name("costs.txt")
COUNTED = ("registers", "shortest", "all")
SLACK = 1.1  # another release of Triton may take so many times the counts that are kept
# A multiprocessor of each NVIDIA target: warps, programs and bytes of shared memory; it has 65,536 registers.
LIMITS = {
    "sm_80": (64, 32, 164 * 1024), "sm_86": (48, 16, 100 * 1024), "sm_90": (64, 32, 228 * 1024),
    "sm_100": (64, 32, 228 * 1024),
}  # fmt: skip
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
    ("bf16 logits, judged", "stream", "stream_kernel", LOGITS | JUDGED, WORDS | {"prediction": "*bf16"}, 8),
    ("fp16 logits, judged, any width", "stream", "stream_kernel", LOGITS | JUDGED | BYTES, {"prediction": "*fp16"}, 8),
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
    if "CHUNK_W" in constants and "maxnreg" in options:
        judged = constants.get("LOGITS", False) and constants.get("JUDGE", False)
        options["maxnreg"] = stream.registers(constants["PACKED"], judged)
    options["enable_fp_fusion"] = name not in ("pmg_kernel", "match_kernel") and not constants.get("SOFT")
    compiled = triton.compile(source, target=GPUTarget(*TARGETS[target]), options=options)
    row = {"kernel": name, "variant": variant, "target": target, "shared": compiled.metadata.shared}
    if TARGETS[target][0] == "cuda":
        binary, tools = compiled.asm["cubin"], Path(triton.__file__).parent / "backends" / "nvidia" / "bin"
        row |= cuda_usage(binary, tools / "cuobjdump") | count_instructions(binary, name, tools / "nvdisasm")
        row["programs"] = resident_programs(target, warps, row["registers"], row["shared"])
        for count in ("shortest", "all"):
            row[f"{count} each"] = round(row[count] * warps / units_of(constants), 4)
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


def units_of(constants: dict) -> int:
    """Pixels that one program looks at, in each round of its loop where it has one; 1 for a point of PMG."""
    if "CHUNK_H" in constants:
        return constants["CHUNK_H"] * constants["CHUNK_W"]
    if "TILE_H" in constants:
        return constants["TILE_H"] * constants["TILE_W"]
    return constants.get("CHUNK", 1)


def resident_programs(target: str, warps: int, registers: int, shared: int) -> int:
    """How many programs of a kernel a multiprocessor holds at a time.

    Example:
        >>> from bench.compile_report import resident_programs
        >>> resident_programs("sm_90", 8, 60, 512), resident_programs("sm_90", 8, 121, 512)
        (4, 2)
    """
    most_warps, most_programs, bytes_shared = LIMITS[target]
    by_registers = 65536 // (-(-registers // 8) * 8 * 32 * warps)
    return min(most_warps // warps, most_programs, by_registers, bytes_shared // (shared + 1024))


def read_costs(text: str) -> dict[tuple[str, str, str], dict[str, int]]:
    """Bounds by kernel, variant and target, from the lines of costs.txt.

    Example:
        >>> from bench.compile_report import read_costs
        >>> read_costs("# a remark\\nlink_kernel | pair | sm_90 | 40 | 12 | 900\\n")
        {('link_kernel', 'pair', 'sm_90'): {'registers': 40, 'shortest': 12, 'all': 900}}
    """
    costs = {}
    for line in text.splitlines():
        if line and not line.startswith("#"):
            kernel, variant, target, *numbers = (part.strip() for part in line.split("|"))
            costs[kernel, variant, target] = dict(zip(COUNTED, map(int, numbers), strict=True))
    return costs


def write_costs(rows: list[dict]) -> str:
    """The lines of costs.txt."""
    import triton

    lines = [
        f"# Counted, not measured, with Triton {triton.__version__}: python -m bench.compile_report --write",
        f"# A kernel that costs more than {SLACK} times as much fails the report.",
        f"# {'kernel':14} | {'variant':26} | {'target':6} | registers | shortest |   all",
    ]
    for row in rows:
        if "all" in row:
            name = f"{row['kernel']:16} | {row['variant']:26} | {row['target']:6}"
            lines.append(f"{name} | {row['registers']:9} | {row['shortest']:8} | {row['all']:5}")
    return "\n".join(lines) + "\n"


def report(targets: list[str], jobs: int) -> list[dict]:
    tasks = [(number, target) for number in range(len(KERNELS)) for target in targets]
    with ProcessPoolExecutor(jobs) as pool:
        return list(pool.map(compile_kernel, *zip(*tasks, strict=True)))


def faults(row: dict, costs: dict[tuple[str, str, str], dict[str, int]]) -> list[str]:
    """Why a row is not acceptable; empty where it is."""
    problems = [f"spills {row['spills']}"] if row["spills"] else []
    if row["target"].startswith("sm_") and row["registers"] > row["limit"]:
        problems.append(f"{row['registers']} registers")
    if row["target"] in LIMITS:
        kept = costs.get((row["kernel"], row["variant"], row["target"]))
        if kept is None:
            return [*problems, "has no line in bench/costs.txt; --write makes it"]
        problems += [
            f"{name}: {row[name]}, {kept[name]} are kept" for name in COUNTED if row[name] > SLACK * kept[name]
        ]
    return problems


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m bench.compile_report", description=__doc__.splitlines()[0])
    parser.add_argument("--target", action="append", choices=list(TARGETS), help="only this target; may be repeated")
    parser.add_argument("--json", action="store_true", help="print JSON instead of a table")
    parser.add_argument("--ops", action="store_true", help="launches and bytes a pixel of the ops; compiles nothing")
    parser.add_argument("--write", action="store_true", help="keep the counts as bounds in bench/costs.txt")
    parser.add_argument("--jobs", type=int, default=os.cpu_count(), help="compilations at a time")
    options = parser.parse_args(arguments)
    if os.environ.get("TRITON_INTERPRET") == "1":
        print("TRITON_INTERPRET=1: interpreted kernels cannot be compiled; unset it", file=sys.stderr)
        return 2
    if options.ops:  # whether kernels are interpreted is decided when they are imported
        environment = os.environ | {"TRITON_INTERPRET": "1"}
        command = [sys.executable, "-m", "bench.traffic", *(["--json"] if options.json else [])]
        return subprocess.run(command, env=environment, check=False).returncode
    if options.write and options.target:
        parser.error("--write keeps the counts of all targets: leave out --target")
    rows = report(options.target or list(TARGETS), options.jobs)
    if options.write:
        COSTS.write_text(write_costs(rows), "utf-8")
    costs = read_costs(COSTS.read_text("utf-8"))
    bad = [(row, why) for row in rows if (why := faults(row, costs))]
    if options.json:
        print(json.dumps(rows, indent=1))
    else:
        from rich.console import Console
        from rich.table import Table

        columns = ("registers", "spills", "programs", "shared", "binary", "shortest", "all")
        table = Table("kernel", "variant", "target", title="Compiled without a GPU: counted, not measured")
        for column in (*columns[:5], "shortest way", "a pixel", "all instructions", "a pixel"):
            table.add_column(column, justify="right")
        for row in rows:
            figures = [str(row.get(column, "")) for column in columns[:5]]
            for column in columns[5:]:
                figures += [str(row.get(column, "")), f"{row[f'{column} each']:.3g}" if column in row else ""]
            table.add_row(row["kernel"], row["variant"], row["target"], *figures)
        Console(width=150).print(table)
        print(
            "a pixel: warp instructions; a pixel of a listed tile, where a kernel goes through tiles; a point, of PMG"
        )
        for row, why in bad:
            print(f"{row['kernel']} ({row['variant']}) on {row['target']}: {', '.join(why)}")
    return 1 if bad else 0


if __name__ == "__main__":
    sys.exit(main())
