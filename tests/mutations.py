"""Does the suite notice? Plants one bug at a time into a copy of the checkout and runs the tests that should catch it.

    python -m tests.mutations             every bug
    python -m tests.mutations kernels/    those whose name or file holds one of the words

A bug is caught when a named test fails with it and passes without. The published data and weights are not used. The
exit code is 1 when a bug survives, or when its place is not found exactly once.
"""

from __future__ import annotations

import ast
import os
import re
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).parents[1]
SOURCES = ("hmg_gpu", "kernels")
# Nodes that can be replaced as text: every expression, and every statement without a body of its own.
SIMPLE = (ast.expr, ast.Assign, ast.AugAssign, ast.AnnAssign, ast.Return, ast.Expr, ast.Raise, ast.Assert, ast.Delete)


class Bug(NamedTuple):
    """An expression or statement, what replaces it, and the test modules that should fail then (space between them).

    Code is compared by its meaning to Python, so its file, line breaks, quotes and comments do not matter. Both folders
    of sources are searched, or the function ``within`` alone. The code must stand there exactly once.
    """

    name: str
    old: str
    new: str
    tests: str
    within: str = ""


class Place(NamedTuple):
    """Where an expression or statement stands: bytes ``start`` to ``end`` of a file, in a function."""

    path: Path
    function: str
    line: int
    start: int
    end: int


PMG, UPDATE, COMPONENTS = "test_pmg.py", "test_update.py", "test_components.py"
KERNELS_PMG, KERNELS_UPDATE = "test_kernels_pmg.py", "test_kernels_update.py"
KERNELS_COMPONENTS = "test_kernels_components.py"
LOCKS, POINTS = "test_locks.py", "test_points.py"
BUGS = (
    # ---- point to mask ----
    Bug(
        "search strip one pixel short on one side",
        "torch.arange(-half_width, half_width + 1, device=points.device)",
        "torch.arange(-half_width, half_width, device=points.device)",
        PMG,
    ),
    Bug(
        "boundary: < for <=",
        "torch.where((vsum <= threshold) & (steps <= reach), steps, extent)",
        "torch.where((vsum < threshold) & (steps <= reach), steps, extent)",
        PMG,
    ),
    Bug(
        "transition: D >= mean for D > mean",
        "difference * reach.to(total.dtype) > total",
        "difference * reach.to(total.dtype) >= total",
        PMG,
    ),
    Bug(
        "box with its axes swapped",
        "torch.stack((y - up, x - left, y + down + 1, x + right + 1), dim=1)",
        "torch.stack((y - left, x - up, y + right + 1, x + down + 1), dim=1)",
        PMG,
    ),
    Bug(
        "box one pixel short at the right",
        "torch.stack((y - up, x - left, y + down + 1, x + right + 1), dim=1)",
        "torch.stack((y - up, x - left, y + down + 1, torch.maximum(x + right, x + 1)), dim=1)",
        PMG,
    ),
    Bug("alpha swapped in sigma", "alpha * centre + (1 - alpha) * mean", "(1 - alpha) * centre + alpha * mean", PMG),
    Bug(
        "sigma from the window's mean, not the part's",
        "sums.sum(1) / (counted.sum(1) * other.sum(1))",
        "sums.sum(1) / float(counted.shape[1] * other.shape[1])",
        PMG,
    ),
    Bug(
        "mask: P > 0.5 for P >= 0.5",
        "inside if soft else inside & (score >= 0)",
        "inside if soft else inside & (score > 0)",
        PMG,
    ),
    Bug(
        "the point's row belongs to the part above only",
        "result[:, radius] = 0.5 * (first + second)",
        "result[:, radius] = first",
        PMG,
    ),
    Bug(
        "NaN in the search region is not looked for",
        "flat |= ~vsum.sum(-1, keepdim=True).isfinite()",
        "flat |= flat",
        "test_numerics.py",
    ),
    # ---- updating ----
    Bug(
        "components joined by edges and one diagonal only",
        "np.searchsorted(row * spread + stop, above + start - 1, side='left')",
        "np.searchsorted(row * spread + stop, above + start, side='left')",
        COMPONENTS,
    ),
    Bug(
        "radius measured as the crow flies",
        "(sum_y - area * y).abs() + (sum_x - area * x).abs()",
        "torch.hypot((sum_y - area * y).double(), (sum_x - area * x).double())",
        UPDATE,
    ),
    Bug("radius: < for <=", "distance <= radius * area", "distance < radius * area", UPDATE),
    Bug("no MDR", "return initial | filtered", "return filtered", UPDATE),
    Bug("no MDR in host memory", "initial.numpy() | filtered.numpy()", "filtered.numpy()", UPDATE),
    Bug(
        "initial mask united with the prediction, not the filtered one",
        "retrieve_missed(initial, filtered)",
        "retrieve_missed(initial, prediction)",
        UPDATE,
    ),
    Bug(
        "an even chance counts as foreground",
        "(values > level) & inside",
        "(values >= level) & inside",
        "test_updater.py test_numerics.py",
    ),
    # ---- metrics, loss, data, training ----
    Bug(
        "Pd: <= for <",
        "offset_y.double() ** 2 + offset_x.double() ** 2 < (distance * (area * true_area).double()) ** 2",
        "offset_y.double() ** 2 + offset_x.double() ** 2 <= (distance * (area * true_area).double()) ** 2",
        "test_metrics.py",
    ),
    Bug(
        "Pd: a prediction may match twice",
        "match[target] < 0 and candidate not in taken",
        "match[target] < 0",
        "test_metrics.py",
    ),
    Bug(
        "soft-IoU: the intersection counted twice in the union",
        "probability.sum(axes) + target.sum(axes) - intersection",
        "probability.sum(axes) + target.sum(axes)",
        "test_losses.py",
    ),
    Bug(
        "crop: the mask not flipped with its image",
        "masks.view(-1)[index] * valid",
        "masks.view(-1)[(image * height + (top + down).clamp(max=height - 1)) * width "
        "+ (left + across).clamp(max=width - 1)] * valid",
        "test_batches.py",
    ),
    Bug(
        "crop: never at the last position",
        "torch.rand(len(order), 2, generator=generator, dtype=torch.float64) * (last + margin + 1)",
        "torch.rand(len(order), 2, generator=generator, dtype=torch.float64) * (last + margin)",
        "test_batches.py",
    ),
    Bug(
        "cosine schedule that ends at half of its way",
        "math.pi * self.epoch",
        "0.5 * math.pi * self.epoch",
        "test_training.py",
    ),
    # ---- kernels ----
    Bug(
        "kernel, PMG: boundary < for <=",
        "tl.where((vsum <= threshold) & (k <= reach), k, ALONG)",
        "tl.where((vsum < threshold) & (k <= reach), k, ALONG)",
        KERNELS_PMG,
    ),
    Bug(
        "kernel, PMG: alpha swapped in sigma",
        "alpha * centre.to(tl.float64) + (1.0 - alpha) * mean",
        "(1.0 - alpha) * centre.to(tl.float64) + alpha * mean",
        KERNELS_PMG,
    ),
    Bug(
        "kernel, FAF: radius < for <=",
        "tl.abs(sum_y - area * y) + tl.abs(sum_x - area * x) <= reach",
        "tl.abs(sum_y - area * y) + tl.abs(sum_x - area * x) < reach",
        KERNELS_UPDATE,
    ),
    Bug(
        "kernel, MDR: initial mask forgotten where nothing is kept",
        "(old & KEPT) | (keep & ((old & 4) == 0)).to(tl.uint8)",
        "(keep & ((old & 4) == 0)).to(tl.uint8)",
        KERNELS_UPDATE,
    ),
    Bug(
        "kernel, soft fusion: FAF brings back inside a box what the average took away",
        "keep & ((old & 4) == 0)",
        "keep",
        KERNELS_UPDATE,
    ),
    Bug(
        "student: parts of a target joined at the threshold itself",
        "linked = probabilities >= link * level",
        "linked = probabilities >= level",
        "test_student.py",
    ),
    Bug(
        "extent: the longest hold for the first",
        "hold[1] - hold[0] >= LEAST",
        "hold[1] - hold[0] >= 99 * LEAST",
        "test_extent.py",
    ),
    Bug(
        "student: both networks of a pair learn from the same half",
        "order[1::2] if len(order) > 1 else order",
        "order[::2]",
        "test_student.py",
    ),
    Bug(
        "student: networks of one extent for all sets",
        "self.networks[self.nearest(extent)]",
        "self.networks[max(self.networks)]",
        "test_student.py",
    ),
    Bug(
        "student: further rounds forget the extent of a set",
        "lesson_masks(moved, radius, course.pmg, centres=data.points[:, 1:])",
        "lesson_masks(moved, radius, replace(course.pmg, extent=25), centres=data.points[:, 1:])",
        "test_student.py",
    ),
    Bug(
        "student: annotations beside what images show are not followed",
        "return place(values, areas, placement, self.threshold)",
        "return values",
        "test_placement.py",
    ),
    Bug(
        "student: a target's threshold may not follow its point",
        "better = (usable | (step == 0)) & (cost < lowest)",
        "better = (usable | (step == 0)) & (cost < lowest) & (step == 0)",
        "test_centring.py",
    ),
    Bug(
        "student: every target's lesson searched as far as the set's",
        "WIDTHS * masks.sum((1, 2)).clamp(min=1).sqrt()",
        "99 * masks.sum((1, 2)).clamp(min=1).sqrt()",
        "test_lessons.py",
    ),
    Bug(
        "kernel, labels: the diagonal to the upper right does not join",
        "foreground(plane, y - 1, x + 2, rows, columns, width, in_ne, BITS)",
        "foreground(plane, y - 1, x + 2, rows, columns, width, in_ne, BITS) & False",
        KERNELS_COMPONENTS,
    ),
    Bug(
        "kernel, Pd: <= for <",
        "dy * dy + dx * dx < reach * reach",
        "dy * dy + dx * dx <= reach * reach",
        KERNELS_COMPONENTS,
    ),
    # ---- nothing wrong in silence ----
    Bug(
        "checksum: of a checkpoint not compared",
        "_taken(path, checksum) != checksum",
        "False",
        "test_checkpoints.py",
    ),
    Bug(
        "checksum: the JSON beside weights of another run goes by",
        "sidecar.read_bytes() != expected",
        "False",
        "test_checkpoints.py",
    ),
    Bug(
        "checksum: of a JSON file not compared",
        "value.pop(KEY) != checksum_of_json(value)",
        "value.pop(KEY) is None",
        "test_checkpoints.py",
    ),
    Bug(
        "checksum: of a store not compared",
        "block != _header(handle).ljust(_BLOCK, b'\\n')",
        "False",
        "test_store.py",
    ),
    Bug(
        "checksum: of an updater's state not compared",
        "state[KEY] == _checksum_of(state)",
        "True",
        "test_updater.py",
    ),
    Bug(
        "checksum: of a line of a journal not compared",
        "checksum != checksum_of(text.encode())",
        "False",
        "test_bulk.py",
    ),
    Bug("lock: every process has its own", "folder / f'{name}.lock'", "folder / f'{name}.{os.getpid()}.lock'", LOCKS),
    Bug("lock: hmg-gpu masks takes none", "hold(held, out, console)", "None", LOCKS),
    Bug("lock: a dead owner is named", "owner is not None and _lives(owner)", "owner", LOCKS),
    Bug(
        "record: pixels not compared",
        "((PIXELS, 'images'), (MASKS, 'initial masks'))",
        "((MASKS, 'initial masks'),)",
        "test_record.py",
    ),
    Bug(
        "record: a run goes on with other data",
        "(differences(theirs, mine), same_images(theirs, mine))",
        "([], True)",
        "test_training.py",
    ),
    Bug(
        "record: a student that is kept learned from other data",
        "differences(lessons[0], record)",
        "[]",
        "test_student_records.py",
    ),
    Bug(
        "record: an updater takes up a state of other data",
        "differences(theirs, record) if whole else []",
        "[]",
        "test_updater.py",
    ),
    Bug(
        "watch: the warning about labels is dropped",
        "(line, f\"{'; '.join(warnings)}. If it stays so, {cure}.\")",
        "(line, None)",
        "test_watch.py",
    ),
    Bug(
        "watch: a run that ends worse does not say so",
        "masks['hybrid']['iou'] < masks['initial']['iou']",
        "False",
        "test_watch.py",
    ),
    Bug(
        "check: an epoch that comes out otherwise is the same",
        "finite(rows[0][name]) != wanted.get(name)",
        "False",
        "test_watch.py",
    ),
    Bug("CSV: decimal comma read as thousands", "text.replace(',', '.')", "text.replace(',', '')", POINTS, "plain"),
    Bug("CSV: marks of thousands read as decimal", "self.thousands and not self.decimals", "False", POINTS),
    Bug("CSV: cells beyond the header are left alone", "any(cell.strip() for cell in cells[width:])", "False", POINTS),
    Bug("EXIF: an image that viewers turn is taken as it is", "orientation not in (0, 1)", "False", "test_images.py"),
    Bug("PNG: no checksum is compared", "kind != b'IEND'", "False", "test_images.py"),
    Bug("masks --resume: changed pixels go unseen", "then != now", "False", "test_bulk.py"),
)


# ---- places in the sources ------------------------------------------------------------------------------------------


def find(bug: Bug, folder: Path) -> Place:
    """Where the old code of a bug stands in a checkout.

    Raises:
        ValueError: it does not stand there exactly once; says where else it stands.
    """
    everywhere = places(folder).get(pattern(bug.old), [])
    found = [place for place in everywhere if not bug.within or place.function.split(".")[-1] == bug.within]
    if len(found) == 1:
        return found[0]
    asked = f" in {bug.within}()" if bug.within else ""
    stands = ", ".join(f"{place.path.relative_to(folder)}:{place.line}" for place in everywhere)
    raise ValueError(
        f"{bug.name}: expected the code once{asked}, found it {len(found)} times"
        f"{f' (it stands at {stands})' if stands else ''}; bring this bug in tests/mutations.py up to date: {bug.old}"
    )


@cache
def places(folder: Path) -> dict[str, list[Place]]:
    """Every expression and simple statement in the sources of a checkout, by what it means."""
    result: dict[str, list[Place]] = {}
    for path in sorted(path for source in SOURCES for path in (folder / source).rglob("*.py")):
        lines = path.read_bytes().splitlines(keepends=True)
        starts = [0]
        for line in lines:
            starts.append(starts[-1] + len(line))
        for node, function in walk(ast.parse(b"".join(lines))):
            start, end = starts[node.lineno - 1] + node.col_offset, starts[node.end_lineno - 1] + node.end_col_offset
            result.setdefault(ast.dump(node), []).append(Place(path, function, node.lineno, start, end))
    return result


def walk(node: ast.AST, function: str = "") -> Iterator[tuple[ast.AST, str]]:
    """The nodes below one that can be replaced, each with the dotted name of what it is defined in."""
    for child in ast.iter_child_nodes(node):
        if isinstance(child, SIMPLE):
            yield child, function
        if isinstance(child, (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef)):
            yield from walk(child, f"{function}.{child.name}".lstrip("."))
        else:
            yield from walk(child, function)


def pattern(code: str) -> str:
    """What an expression, or a single statement, means."""
    (statement,) = ast.parse(code).body
    return ast.dump(statement.value if isinstance(statement, ast.Expr) else statement)


def plant(bug: Bug, place: Place) -> None:
    """Put the new code of a bug where its old code stands."""
    text = place.path.read_bytes()
    new = bug.new.encode()
    if isinstance(ast.parse(bug.new).body[0], ast.Expr):
        new = b"(" + new + b")"
    place.path.write_bytes(text[: place.start] + new + text[place.end :])


def modules(bug: Bug, folder: Path) -> list[str]:
    """The test modules of a bug, wherever they lie under tests/.

    Raises:
        ValueError: there is none of such a name, or there are several.
    """
    result = []
    for name in bug.tests.split():
        found = [path.relative_to(folder).as_posix() for path in (folder / "tests").rglob(name)]
        if len(found) != 1:
            raise ValueError(f"{bug.name}: expected one {name} under tests/, found {len(found)}")
        result += found
    return result


# ---- running --------------------------------------------------------------------------------------------------------


def copy_checkout(folder: Path) -> Path:
    """A copy without what git, runs and tools leave behind."""
    ignored = shutil.ignore_patterns(".*", "__pycache__", "runs", "build", "dist", "*.egg-info", "results")
    return Path(shutil.copytree(ROOT, folder, ignore=ignored))


def first_failure(folder: Path, tests: list[str]) -> str | None:
    """The first test that fails there, slow ones included; None where all pass.

    Raises:
        RuntimeError: pytest ran no test to its end, for example because a test file cannot be imported.
    """
    # Without bytecode: a replacement of the same length within the same second would not be compiled anew.
    environment = os.environ | {"PYTHONDONTWRITEBYTECODE": "1"}
    for name in [name for name in environment if name.startswith(("HMG_DATA", "HMG_CHECKPOINTS", "PYTEST_"))]:
        environment.pop(name)
    options = ["-x", "-q", "-n", "0", "-m", "", "-p", "no:cacheprovider", "--tb=no", "-rfE"]
    command = [sys.executable, "-m", "pytest", *options, *tests]
    done = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, check=False)
    if done.returncode == 0:
        return None
    failed = re.search(r"^FAILED (.+?)(?: - |$)", done.stdout, flags=re.MULTILINE)
    if done.returncode != 1 or failed is None:
        raise RuntimeError(f"pytest {' '.join(tests)} ended with {done.returncode}:\n{done.stdout}{done.stderr}")
    return failed[1]


def main(words: list[str]) -> int:
    caught, tried = [], 0
    with tempfile.TemporaryDirectory(prefix="mutations-") as temporary:
        clean, planted = copy_checkout(Path(temporary) / "clean"), Path(temporary) / "planted"
        try:
            for bug in BUGS:
                place = find(bug, clean)
                file = place.path.relative_to(clean).as_posix()
                if words and not any(word in bug.name or word in file for word in words):
                    continue
                shutil.copytree(clean, planted)
                plant(bug, place._replace(path=planted / file))
                tests = modules(bug, clean)
                test = first_failure(planted, tests)
                shutil.rmtree(planted)
                tried += 1
                caught += [test] if test else []
                outcome = f"caught by {test}" if test else f"SURVIVED {' '.join(tests)}"
                print(f"{file}: {bug.name}: {outcome}", flush=True)
            fails_anyway = first_failure(clean, sorted(set(caught))) if caught else None
        except (ValueError, RuntimeError) as error:
            print(f"mutations: {error}", file=sys.stderr)
            return 1
    if fails_anyway:
        print(f"mutations: {fails_anyway} fails without a bug as well", file=sys.stderr)
        return 1
    print(f"{len(caught)} of {tried} planted bugs caught; without them the same tests pass")
    return int(len(caught) < tried or not tried)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
