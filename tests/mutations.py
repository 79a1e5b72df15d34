"""Does the suite notice? Plants one bug at a time into a copy of the checkout and runs the tests that should catch it.

    python -m tests.mutations             every bug
    python -m tests.mutations kernels/    those whose name or file holds one of the words

A bug is caught when a named test fails with it and passes without. The published data and weights are not used. The
exit code is 1 when a bug survives, or when a replacement does not match exactly once.
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).parents[1]


class Bug(NamedTuple):
    """A text in a file, what replaces it, and the test files that should fail then (space between them)."""

    name: str
    file: str
    old: str
    new: str
    tests: str


PMG, UPDATE, COMPONENTS = "tests/test_pmg.py", "tests/test_update.py", "tests/test_components.py"
BUGS = (
    # ---- point to mask ----
    Bug(
        "search strip one pixel short on one side",
        "hmg_gpu/pmg.py",
        "torch.arange(-half_width, half_width + 1, device",
        "torch.arange(-half_width, half_width, device",
        PMG,
    ),
    Bug(
        "boundary: < for <=",
        "hmg_gpu/pmg.py",
        "torch.where((vsum <= threshold) & (steps <= reach)",
        "torch.where((vsum < threshold) & (steps <= reach)",
        PMG,
    ),
    Bug(
        "transition: D >= mean for D > mean",
        "hmg_gpu/pmg.py",
        "difference * reach.to(total.dtype) > total",
        "difference * reach.to(total.dtype) >= total",
        PMG,
    ),
    Bug(
        "box with its axes swapped",
        "hmg_gpu/pmg.py",
        "torch.stack((y - up, x - left, y + down + 1, x + right + 1), dim=1)",
        "torch.stack((y - left, x - up, y + right + 1, x + down + 1), dim=1)",
        PMG,
    ),
    Bug(
        "box one pixel short at the right",
        "hmg_gpu/pmg.py",
        "y + down + 1, x + right + 1), dim=1)",
        "y + down + 1, torch.maximum(x + right, x + 1)), dim=1)",
        PMG,
    ),
    Bug(
        "alpha swapped in sigma",
        "hmg_gpu/pmg.py",
        "alpha * centre + (1 - alpha) * mean",
        "(1 - alpha) * centre + alpha * mean",
        PMG,
    ),
    Bug(
        "sigma from the window's mean, not the part's",
        "hmg_gpu/pmg.py",
        "sums.sum(1) / (counted.sum(1) * other.sum(1))",
        "sums.sum(1) / float(counted.shape[1] * other.shape[1])",
        PMG,
    ),
    Bug(
        "mask: P > 0.5 for P >= 0.5",
        "hmg_gpu/pmg.py",
        "torch.where(inside & (score >= 0), position",
        "torch.where(inside & (score > 0), position",
        PMG,
    ),
    Bug(
        "the point's row belongs to the part above only",
        "hmg_gpu/pmg.py",
        "result[:, radius] = 0.5 * (first + second)",
        "result[:, radius] = first",
        PMG,
    ),
    Bug(
        "NaN in the search region is not looked for",
        "hmg_gpu/pmg.py",
        "flat |= ~vsum.sum(-1, keepdim=True).isfinite()",
        "flat |= flat",
        "tests/test_numerics.py",
    ),
    # ---- updating ----
    Bug(
        "components joined by edges and one diagonal only",
        "hmg_gpu/components.py",
        "above + start - 1, side",
        "above + start, side",
        COMPONENTS,
    ),
    Bug(
        "radius measured as the crow flies",
        "hmg_gpu/update.py",
        "distance = (components.sum_y[component] - area * y).abs() + (components.sum_x[component] - area * x).abs()",
        "distance = torch.hypot((components.sum_y[component] - area * y).double(), "
        "(components.sum_x[component] - area * x).double())",
        UPDATE,
    ),
    Bug("radius: < for <=", "hmg_gpu/update.py", "distance <= radius * area", "distance < radius * area", UPDATE),
    Bug("no MDR", "hmg_gpu/update.py", "return initial | filtered", "return filtered", UPDATE),
    Bug(
        "initial mask united with the prediction, not the filtered one",
        "hmg_gpu/update.py",
        "retrieve_missed(initial, false_alarm_filter(prediction, points, radius=radius, sizes=sizes))",
        "retrieve_missed(initial, prediction)",
        UPDATE,
    ),
    Bug(
        "an even chance counts as foreground",
        "hmg_gpu/updater.py",
        "prediction = (values > level) & inside",
        "prediction = (values >= level) & inside",
        "tests/test_updater.py tests/test_numerics.py",
    ),
    # ---- metrics, loss, data, training ----
    Bug(
        "Pd: <= for <",
        "hmg_gpu/metrics.py",
        "offset_x.double() ** 2 < (distance",
        "offset_x.double() ** 2 <= (distance",
        "tests/test_metrics.py",
    ),
    Bug(
        "Pd: a prediction may match twice",
        "hmg_gpu/metrics.py",
        "if match[target] < 0 and candidate not in taken:",
        "if match[target] < 0:",
        "tests/test_metrics.py",
    ),
    Bug(
        "soft-IoU: the intersection counted twice in the union",
        "hmg_gpu/losses.py",
        "target.sum(axes) - intersection",
        "target.sum(axes)",
        "tests/test_losses.py",
    ),
    Bug(
        "crop: the mask not flipped with its image",
        "hmg_gpu/data/batches.py",
        "(masks.view(-1)[index] & valid)[:, None]",
        "(masks.view(-1)[(image * height + (top + down).clamp(max=height - 1)) * width "
        "+ (left + across).clamp(max=width - 1)] & valid)[:, None]",
        "tests/test_batches.py",
    ),
    Bug(
        "crop: never at the last position",
        "hmg_gpu/data/batches.py",
        "dtype=torch.float64) * (slack + 1)",
        "dtype=torch.float64) * slack",
        "tests/test_batches.py",
    ),
    Bug(
        "cosine schedule that ends at half of its way",
        "hmg_gpu/training.py",
        "math.cos(math.pi * self.epoch",
        "math.cos(0.5 * math.pi * self.epoch",
        "tests/test_training.py",
    ),
    # ---- kernels ----
    Bug(
        "kernel, PMG: boundary < for <=",
        "kernels/pmg.py",
        "tl.where((vsum <= threshold) & (k <= reach)",
        "tl.where((vsum < threshold) & (k <= reach)",
        "tests/test_kernels_pmg.py",
    ),
    Bug(
        "kernel, PMG: alpha swapped in sigma",
        "kernels/pmg.py",
        "(alpha * centre.to(tl.float64) + (1.0 - alpha) * mean)",
        "((1.0 - alpha) * centre.to(tl.float64) + alpha * mean)",
        "tests/test_kernels_pmg.py",
    ),
    Bug(
        "kernel, FAF: radius < for <=",
        "kernels/update.py",
        "tl.abs(sum_x - area * x) <= reach",
        "tl.abs(sum_x - area * x) < reach",
        "tests/test_kernels_update.py",
    ),
    Bug(
        "kernel, MDR: initial mask forgotten where nothing is kept",
        "kernels/update.py",
        "tl.store(at, (old & 1) | (keep & ((old & 4) == 0)).to(tl.uint8), mask=where)",
        "tl.store(at, (keep & ((old & 4) == 0)).to(tl.uint8), mask=where)",
        "tests/test_kernels_update.py",
    ),
    Bug(
        "kernel, soft fusion: FAF brings back inside a box what the average took away",
        "kernels/update.py",
        "(keep & ((old & 4) == 0))",
        "keep",
        "tests/test_kernels_update.py",
    ),
    Bug(
        "student: parts of a target joined at the threshold itself",
        "hmg_gpu/crops.py",
        "connected_components(probabilities >= link * threshold)",
        "connected_components(probabilities >= threshold)",
        "tests/test_student.py",
    ),
    Bug(
        "extent: the longest hold for the first",
        "hmg_gpu/extent.py",
        "if hold[1] - hold[0] >= LEAST)",
        "if hold[1] - hold[0] >= 99 * LEAST)",
        "tests/test_extent.py",
    ),
    Bug(
        "student: both networks of a pair learn from the same half",
        "hmg_gpu/teaching.py",
        "(order[1::2] if len(order) > 1 else order)",
        "order[::2]",
        "tests/test_student.py",
    ),
    Bug(
        "student: networks of one extent for all sets",
        "hmg_gpu/student.py",
        "networks, radius = self.networks[self.nearest(extent)],",
        "networks, radius = self.networks[max(self.networks)],",
        "tests/test_student.py",
    ),
    Bug(
        "student: further rounds forget the extent of a set",
        "hmg_gpu/teaching.py",
        "masks_around(moved, radius, extent=extent,",
        "masks_around(moved, radius, extent=25,",
        "tests/test_student.py",
    ),
    Bug(
        "kernel, labels: the diagonal to the upper right does not join",
        "kernels/blocks.py",
        "ne = foreground(plane, y - 1, x + 2, height, width, in_ne)",
        "ne = foreground(plane, y - 1, x + 2, height, width, in_ne) & False",
        "tests/test_kernels_components.py",
    ),
    Bug(
        "kernel, Pd: <= for <",
        "kernels/components.py",
        "dy * dy + dx * dx < reach * reach",
        "dy * dy + dx * dx <= reach * reach",
        "tests/test_kernels_components.py",
    ),
)


def plant(bug: Bug, folder: Path) -> None:
    """Apply the replacement in a copy of the checkout.

    Raises:
        ValueError: the text is not there exactly once; bring ``BUGS`` up to date.
    """
    path = folder / bug.file
    text = path.read_text(encoding="utf-8")
    if text.count(bug.old) != 1:
        raise ValueError(f"{bug.name}: expected the text once in {bug.file}, found it {text.count(bug.old)} times")
    path.write_text(text.replace(bug.old, bug.new), encoding="utf-8")


def copy_checkout(folder: Path) -> Path:
    """A copy without what git, runs and tools leave behind."""
    ignored = shutil.ignore_patterns(".*", "__pycache__", "runs", "build", "dist", "*.egg-info", "results")
    return Path(shutil.copytree(ROOT, folder, ignore=ignored))


def first_failure(folder: Path, tests: list[str]) -> str | None:
    """The first test that fails there; None where all pass.

    Raises:
        RuntimeError: pytest ran no test to its end, for example because a test file cannot be imported.
    """
    # Without bytecode: a replacement of the same length within the same second would not be compiled anew.
    environment = os.environ | {"PYTHONDONTWRITEBYTECODE": "1"}
    for name in ("HMG_DATA", "HMG_CHECKPOINTS", "PYTEST_ADDOPTS"):
        environment.pop(name, None)
    command = [sys.executable, "-m", "pytest", "-x", "-q", "-p", "no:cacheprovider", "--tb=no", "-rfE", *tests]
    done = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, check=False)
    if done.returncode == 0:
        return None
    failed = re.search(r"^FAILED (.+?)(?: - |$)", done.stdout, flags=re.MULTILINE)
    if done.returncode != 1 or failed is None:
        raise RuntimeError(f"pytest {' '.join(tests)} ended with {done.returncode}:\n{done.stdout}{done.stderr}")
    return failed[1]


def main(words: list[str]) -> int:
    bugs = [bug for bug in BUGS if not words or any(word in bug.name or word in bug.file for word in words)]
    caught = []
    with tempfile.TemporaryDirectory(prefix="mutations-") as temporary:
        clean, planted = copy_checkout(Path(temporary) / "clean"), Path(temporary) / "planted"
        try:
            for bug in bugs:
                shutil.copytree(clean, planted)
                plant(bug, planted)
                test = first_failure(planted, bug.tests.split())
                shutil.rmtree(planted)
                caught += [test] if test else []
                outcome = f"caught by {test}" if test else f"SURVIVED {bug.tests}"
                print(f"{bug.file}: {bug.name}: {outcome}", flush=True)
            fails_anyway = first_failure(clean, sorted(set(caught))) if caught else None
        except (ValueError, RuntimeError) as error:
            print(f"mutations: {error}", file=sys.stderr)
            return 1
    if fails_anyway:
        print(f"mutations: {fails_anyway} fails without a bug as well", file=sys.stderr)
        return 1
    print(f"{len(caught)} of {len(bugs)} planted bugs caught; without them the same tests pass")
    return int(len(caught) < len(bugs) or not bugs)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
