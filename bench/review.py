"""hmg-gpu review with many images: how soon the page's address is there, and the memory of the server.

    python -m bench.review                    10,000 images of 512 x 512, one point each
    python -m bench.review --images 1000 --size 256

The images are made first, in a temporary folder (2.6 GB for the first). Linux: memory is read from /proc.
"""

from __future__ import annotations

import argparse
import os
import re
import subprocess
import sys
import tempfile
import time
import urllib.request
from concurrent.futures import ThreadPoolExecutor
from http.cookiejar import CookieJar
from pathlib import Path

import numpy as np
from PIL import Image


def make_images(folder: Path, count: int, size: int) -> Path:
    """Noise with one target each, and their points as CSV, whose path it returns."""
    (folder / "images").mkdir()
    rng = np.random.default_rng(0)
    noise = rng.normal(90, 8, (size + 64, size + 64))
    places = rng.integers(10, size - 10, (count, 2))

    def write(number: int) -> None:
        y, x = places[number]
        first = number % 64
        pixels = noise[first : first + size, first : first + size].copy()
        pixels[y - 1 : y + 2, x - 2 : x + 3] += 80
        picture = Image.fromarray(pixels.clip(0, 255).astype(np.uint8))
        picture.save(folder / "images" / f"{number:05d}.png", compress_level=0)

    with ThreadPoolExecutor() as pool:
        list(pool.map(write, range(count)))
    rows = (f"{number:05d}.png,{y},{x}\n" for number, (y, x) in enumerate(places.tolist()))
    (folder / "clicks.csv").write_text("image,y,x\n" + "".join(rows))
    return folder / "clicks.csv"


def memory(process: int) -> dict[str, float]:
    """Resident memory in MB, now and at most."""
    text = Path(f"/proc/{process}/status").read_text()
    return {
        name: int(re.search(rf"{key}:\s+(\d+)", text)[1]) / 1e3 for name, key in (("now", "VmRSS"), ("most", "VmHWM"))
    }


def seconds_of(command: list[str]) -> float:
    started = time.perf_counter()
    subprocess.run(command, check=True)
    return time.perf_counter() - started


def measure(folder: Path, points: Path, asked: int = 1000) -> None:
    """Start the command, ask for the list and so many images, and print what it took."""
    imports = min(seconds_of([sys.executable, "-c", "import hmg_gpu.commands.main"]) for _ in range(3))
    command = [sys.executable, "-u", "-m", "hmg_gpu", "review", "--no-browser"]
    command += ["--images", str(folder / "images"), "--points", str(points)]
    started = time.perf_counter()
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    try:
        address = next(match[1] for line in process.stdout if (match := re.search(r"open (\S+)", line)))
        ready = time.perf_counter() - started
        opener = urllib.request.build_opener(urllib.request.HTTPCookieProcessor(CookieJar()))
        opener.open(address).read()
        base = address.partition("?")[0]
        began = time.perf_counter()
        names = len(opener.open(f"{base}api/images").read())
        listed = time.perf_counter() - began
        print(
            f"imports {imports:.2f} s (best of 3), address after {ready:.2f} s, so {ready - imports:.2f} s of its own"
        )
        print(f"list of images {listed * 1e3:.0f} ms, {names / 1e3:.0f} kB; memory {memory(process.pid)} MB")
        for row in range(asked):
            opener.open(f"{base}api/images/{row}").read()
            opener.open(f"{base}api/images/{row}/thumbnail").read()
        print(f"after {asked} images and thumbnails: memory {memory(process.pid)} MB; load {os.getloadavg()[0]:.1f}")
    finally:
        process.kill()
        process.wait()
        process.stdout.close()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--images", type=int, default=10_000)
    parser.add_argument("--size", type=int, default=512, help="pixels a side")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as name:
        measure(Path(name), make_images(Path(name), options.images, options.size), min(1000, options.images))


if __name__ == "__main__":
    main()
