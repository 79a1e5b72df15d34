"""The page in a real Chromium: what hands do, what is drawn, what is saved, and what the console says."""

from __future__ import annotations

import itertools
import os
import re
import statistics
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from command_tools import run
from PIL import Image
from tiny import write_folder

from hmg_gpu import point_to_mask
from hmg_gpu.commands.main import parse
from hmg_gpu.commands.review import _Export
from hmg_gpu.data import read_image, read_mask
from hmg_gpu.masks import Pmg
from hmg_gpu.review.saving import read_rows
from tests.review.browser import Browser, find_browser, open_browser, read_until
from tests.review.served import EXTENT, Client, served

pytestmark = [pytest.mark.slow, pytest.mark.browser]

# Pixels of the marks' canvas away from the axes of points and the edges of boxes: alpha > 0 is mask.
DRAWN = """
const [height, width, scale, left, top] = arguments;
const canvas = document.getElementById("marks");
const data = canvas.getContext("2d").getImageData(0, 0, canvas.width, canvas.height).data;
const rows = [];
for (let y = 0; y < height; y += 1) {
  let row = "";
  for (let x = 0; x < width; x += 1) {
    const at = [Math.round(left + (x + 0.3) * scale), Math.round(top + (y + 0.3) * scale)];
    row += data[4 * (at[1] * canvas.width + at[0]) + 3] ? "#" : ".";
  }
  rows.push(row);
}
return rows;
"""


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    found = find_browser()
    if found is None:
        pytest.skip("no Chromium with chromedriver on this system (apt-get install chromium chromium-driver)")
    with open_browser(found) as browser:
        yield browser


@pytest.fixture
def root(tmp_path: Path, rng: np.random.Generator) -> Path:
    """Eight images of the tiny set, a ninth of 16 bits."""
    root = write_folder(tmp_path / "tiny")
    deep = rng.normal(30000, 40, (40, 50))
    deep[20:24, 30:35] += 600
    Image.fromarray(deep.astype(np.uint16)).save(root / "images" / "z16.png")
    return root


READS = "willReadFrequently"  # the console's advice about what DRAWN does


class Page:
    """The page of a session, and where its image lies on the screen when it fits."""

    def __init__(self, browser: Browser, client: Client, images: Path):
        self.browser, self.client, self.files = browser, client, sorted(images.iterdir())

    def open(self, row: int = 0) -> None:
        self.browser.open("about:blank")
        self.browser.log()
        self.browser.open(self.client.address)
        self.show(row)

    def show(self, row: int) -> None:
        self.browser.wait("document.getElementById('name').textContent !== 'hmg-gpu review'")
        self.browser.run("location.hash = arguments[0]; location.reload()", f"#{row}")
        self.browser.wait(f"document.getElementById('facts').textContent.startsWith('{row + 1} of')")
        self.image = read_image(self.files[row])
        self.place_image()

    def place_image(self) -> None:
        box = self.browser.run("const b = document.getElementById('stage').getBoundingClientRect();"
                               "return [b.left, b.top, b.width, b.height]")  # fmt: skip
        height, width = self.image.shape
        self.corner = box[:2]
        self.scale = min(64, 0.96 * min(box[2] / width, box[3] / height))
        self.left, self.top = (box[2] - self.scale * width) / 2, (box[3] - self.scale * height) / 2

    def at(self, y: int, x: int) -> tuple[float, float]:
        """The middle of a pixel on the screen."""
        return (self.corner[0] + self.left + (x + 0.5) * self.scale, self.corner[1] + self.top + (y + 0.5) * self.scale)

    def click(self, y: int, x: int, button: int = 0) -> None:
        self.browser.mouse(("to", *self.at(y, x)), ("down", button), ("up", button))

    def points(self, count: int) -> list[tuple[int, int]]:
        """The points that the page lists, when they are so many."""
        self.browser.wait(f"document.querySelectorAll('.point').length === {count}")
        texts = self.browser.run("return [...document.querySelectorAll('.point .where')].map(e => e.textContent)")
        return [tuple(map(int, text.split(", "))) for text in texts]

    def wait_for(self, *points: tuple[int, int]) -> None:
        texts = "; ".join(f"{y}, {x}" for y, x in points)
        self.browser.wait(
            f"[...document.querySelectorAll('.point .where')].map(e => e.textContent).join('; ') === '{texts}'"
        )

    def drawn(self) -> np.ndarray:
        """The mask on the screen, the masks filled."""
        height, width = self.image.shape
        rows = self.browser.run(DRAWN, height, width, self.scale, self.left, self.top)
        return np.array([[cell == "#" for cell in row] for row in rows])

    def wanted(self, *points: tuple[int, int], extent: int = EXTENT) -> np.ndarray:
        image = torch.from_numpy(self.image if self.image.dtype == np.uint8 else self.image.astype(np.float32))[None]
        rows = torch.tensor([[0, *point] for point in points], dtype=torch.int64).reshape(-1, 3)
        return point_to_mask(image, rows, extent=extent)[0].numpy()

    def saved(self) -> dict[str, list]:
        self.client.session.saver.write()
        return read_rows(self.client.session.save)


@pytest.fixture
def page(browser: Browser, root: Path, tmp_path: Path) -> Iterator[Page]:
    export = _Export(parse(["review", "--images", str(root / "images")]), Pmg(extent=EXTENT))
    with served(root, tmp_path / "out" / "p.csv", export=export) as client:
        page = Page(browser, client, root / "images")
        page.open()
        yield page
        assert [line for line in browser.log() if READS not in line] == []
        browser.open("about:blank")


def test_the_token_leaves_the_address(page: Page) -> None:
    assert page.client.token not in page.browser.address() and page.browser.address().endswith("/#0")
    assert page.client.token not in page.browser.run("return document.cookie")


def test_click_drag_remove_undo_reload(page: Page) -> None:
    browser = page.browser
    browser.press("m")  # filled
    page.click(9, 12)
    page.wait_for((9, 12))
    assert np.array_equal(page.drawn(), page.wanted((9, 12)))
    page.click(20, 6)
    page.wait_for((9, 12), (20, 6))
    assert np.array_equal(page.drawn(), page.wanted((9, 12), (20, 6)))

    browser.mouse(("to", *page.at(9, 12)), ("down",), ("to", *page.at(10, 14)), ("pause", 100),
                  ("to", *page.at(12, 15)), ("pause", 200), ("up",))  # fmt: skip
    page.wait_for((12, 15), (20, 6))
    assert np.array_equal(page.drawn(), page.wanted((12, 15), (20, 6)))

    page.click(20, 6, button=2)
    page.wait_for((12, 15))
    assert np.array_equal(page.drawn(), page.wanted((12, 15)))
    browser.press("Control+z")
    page.wait_for((12, 15), (20, 6))
    browser.press("u")
    page.wait_for((9, 12), (20, 6))
    browser.press("Control+y")
    page.wait_for((12, 15), (20, 6))

    browser.reload()  # undo is the server's
    page.points(2)
    browser.press("m", "u")
    page.wait_for((9, 12), (20, 6))
    browser.wait("document.getElementById('said').textContent.startsWith('undo')")
    assert np.array_equal(page.drawn(), page.wanted((9, 12), (20, 6)))
    assert page.saved() == {"test0": [(9, 12, None), (20, 6, None)]}


def test_a_press_shows_the_mask_before_the_button_is_up(page: Page) -> None:
    page.browser.press("m")
    page.browser.mouse(("to", *page.at(9, 12)), ("down",))
    page.wait_for((9, 12))
    assert np.array_equal(page.drawn(), page.wanted((9, 12)))
    page.browser.mouse(("to", *page.at(11, 16)), ("pause", 300))
    assert np.array_equal(page.drawn(), page.wanted((11, 16)))  # shown, not saved
    assert page.saved() == {"test0": [(9, 12, None)]}
    page.browser.mouse(("up",))
    page.wait_for((11, 16))


def test_the_wheel_changes_an_extent_and_zooms(page: Page) -> None:
    page.browser.press("m")
    page.click(9, 12)
    page.wait_for((9, 12))
    for _ in range(4):
        page.browser.wheel(*page.at(9, 12), 100, keys="Shift")
    page.browser.wait("document.querySelector('.point .own')?.textContent === '4'")
    assert np.array_equal(page.drawn(), page.wanted((9, 12), extent=4))
    assert page.saved() == {"test0": [(9, 12, 4)]}
    assert len(page.client.session.history.steps) == 2  # turns of the wheel are one step
    page.browser.run("document.querySelector('.point .own').click()")
    page.browser.wait("!document.querySelector('.point .own')")
    assert page.saved() == {"test0": [(9, 12, None)]}
    # Zoom at the pointer: the pixel under it stays there.
    for turn in (-200, -200, 200, -200):
        page.browser.wheel(*page.at(9, 12), turn)
        page.browser.mouse(("to", page.at(9, 12)[0] + 1, page.at(9, 12)[1] + 1), ("to", *page.at(9, 12)))
        assert page.browser.run("return document.getElementById('where').textContent").startswith("row 9, column 12:")
    page.browser.press("0")
    assert np.array_equal(page.drawn(), page.wanted((9, 12)))


def test_sixteen_bits(page: Page) -> None:
    page.show(8)
    assert page.image.dtype == np.uint16
    page.browser.press("m")
    page.click(21, 32)
    page.wait_for((21, 32))
    assert page.wanted((21, 32)).sum() == 20 and np.array_equal(page.drawn(), page.wanted((21, 32)))
    page.browser.mouse(("to", *page.at(22, 33)))
    text = page.browser.run("return document.getElementById('where').textContent")
    assert text == f"row 22, column 33: {page.image[22, 33]}"

    def grey() -> np.ndarray:
        height, width = page.image.shape
        script = DRAWN.replace('"marks"', '"picture"').replace('+ 3] ? "#" : "."', "] + ' '")
        rows = page.browser.run(script, height, width, page.scale, page.left, page.top)
        return np.array([row.split() for row in rows], int)

    def stretched(low: float, high: float) -> np.ndarray:
        return (255 * ((page.image - float(low)) / (float(high) - low)).clip(0, 1)).round()

    values = np.sort(page.image.ravel())
    low, high = values[int(0.005 * (len(values) - 1))], values[int(0.995 * (len(values) - 1))]
    assert np.abs(grey() - stretched(low, high)).max() <= 1
    page.browser.press("a", "a")  # 2 %, then from the minimum to the maximum
    page.browser.wait("document.getElementById('stretch').value === '0'")
    page.browser.wait("new Promise(done => requestAnimationFrame(() => requestAnimationFrame(() => done(true))))")
    assert np.abs(grey() - stretched(values[0], values[-1])).max() <= 1
    straight = grey()
    page.browser.press("l")
    page.browser.wait("document.getElementById('log').checked")
    page.browser.wait("new Promise(done => requestAnimationFrame(() => requestAnimationFrame(() => done(true))))")
    assert (grey() >= straight).all() and (grey() > straight).mean() > 0.5
    page.browser.mouse(("to", *page.at(5, 5)), ("down", 2), ("to", *page.at(5, 9)), ("to", *page.at(9, 9)), ("up", 2))
    page.browser.wait("document.getElementById('stretch').value === 'own'")
    assert page.points(1) == [(21, 32)]  # a drag of the right button removes nothing


def test_keyboard_only(page: Page) -> None:
    browser, (height, width) = page.browser, page.image.shape
    browser.press("m", "ArrowUp", "Enter")
    start = (height // 2 - 1, width // 2)
    page.wait_for(start)
    assert np.array_equal(page.drawn(), page.wanted(start))
    browser.press("Alt+ArrowLeft")
    moved = (start[0], start[1] - 1)
    page.wait_for(moved)
    browser.press("[", "[")
    browser.wait("document.querySelector('.point .own')?.textContent === '6'")
    browser.press("Shift+ArrowDown", "Enter")
    second = (min(height - 1, moved[0] + 10), moved[1])
    page.wait_for(moved, second)
    browser.press("s", "Delete")  # the first, after the last
    page.wait_for(second)
    browser.press("u")
    page.wait_for(moved, second)
    browser.press("r", "n")
    browser.wait("document.getElementById('facts').textContent.startsWith('2 of')")
    page.points(0)
    browser.press("u")  # leads back to the image
    browser.wait("document.getElementById('facts').textContent.startsWith('1 of')")
    page.wait_for(moved, second)
    browser.press("?")
    browser.wait("document.getElementById('help').open")
    browser.press("\ue00c")  # Escape
    browser.wait("!document.getElementById('help').open")
    assert page.saved() == {"test0": [(*moved, 6), (*second, None)]}


def test_fingers(page: Page) -> None:
    browser = page.browser
    browser.press("m")
    browser.mouse(("to", *page.at(9, 12)), ("down",), ("up",), kind="touch")
    page.wait_for((9, 12))
    assert np.array_equal(page.drawn(), page.wanted((9, 12)))
    browser.mouse(("to", *page.at(9, 12)), ("down",), ("to", *page.at(12, 14)), ("pause", 100), ("up",), kind="touch")
    page.wait_for((12, 14))
    browser.mouse(("to", *page.at(25, 25)), ("down",), ("to", *page.at(20, 20)), ("up",), kind="touch")
    assert page.points(1) == [(12, 14)]  # moved the image
    browser.press("0")
    browser.mouse(("to", *page.at(12, 14)), ("down",), ("pause", 900), ("up",), kind="touch")
    page.points(0)


def test_two_tabs(page: Page) -> None:
    browser, first = page.browser, page.browser.tab()
    page.click(9, 12)
    page.wait_for((9, 12))
    second = browser.new_tab()
    browser.switch(second)
    browser.open(f"http://{page.client.host}:{page.client.port}/#0")  # the cookie is enough
    page.points(1)
    page.place_image()
    page.click(9, 12)  # the tab looks for changes when it gets the focus
    browser.wait("document.querySelector('.point.chosen')")
    # Meanwhile somebody else changes the image; neither change is lost.
    page.client.edit(0, "add", y=3, x=4)
    page.click(20, 6)
    browser.wait("document.getElementById('said').textContent.includes('another tab')")
    page.wait_for((9, 12), (3, 4))
    page.click(20, 6)
    page.wait_for((9, 12), (3, 4), (20, 6))
    log = browser.log()
    assert all("409" in line for line in log)  # the browser itself notes the refusal
    browser._ask("/window", method="DELETE")
    browser.switch(first)
    browser.run("window.dispatchEvent(new Event('focus'))")
    page.wait_for((9, 12), (3, 4), (20, 6))


def test_export(page: Page, tmp_path: Path) -> None:
    page.click(9, 12)
    page.wait_for((9, 12))
    page.browser.press("]")
    page.browser.wait("document.querySelector('.point .own')?.textContent === '9'")
    page.browser.press("n")
    page.browser.wait("document.getElementById('facts').textContent.startsWith('2 of')")
    page.image = read_image(page.files[1])
    page.place_image()
    page.click(7, 7)
    page.wait_for((7, 7))
    page.browser.run("document.querySelector('[data-do=exportMasks]').click()")
    page.browser.wait("!document.getElementById('export-command').hidden", seconds=60)
    command = page.browser.run("return document.getElementById('export-command').textContent")
    out = tmp_path / "out" / "p_masks"
    assert str(out) in command and (out / "changes.csv").read_text().count("\n") == 3
    save = page.client.session.save
    page.saved()
    again = ["masks", "--images", page.files[0].parent, "--points", save, "--out", tmp_path / "again"]
    assert run(*again, "--extent", EXTENT, "--coco", "rle", "--device", "cpu") == 0
    for path in (*out.glob("*.png"), out / "coco.json"):
        assert path.read_bytes() == (tmp_path / "again" / path.name).read_bytes()
    page.image = read_image(page.files[0])
    assert np.array_equal(read_mask(out / "test0.png"), page.wanted((9, 12), extent=9))


def test_reasons_under_the_mouse(page: Page) -> None:
    page.click(9, 12)
    page.wait_for((9, 12))
    page.browser.mouse(("to", *page.at(28, 2)), ("to", *page.at(9, 12)))
    page.browser.wait("document.getElementById('why-point').textContent === 'at 9, 12'")
    text = page.browser.run("return document.getElementById('why-numbers').textContent")
    y0, x0, y1, x1 = page.client.get("/api/images/0")["points"][0]["box"]
    assert f"{y1 - y0} x {x1 - x0} px, rows {y0} to {y1 - 1}" in text
    page.browser.press("t")
    assert page.browser.run("return document.getElementById('truth-mode').getAttribute('aria-pressed')") == "true"
    iou = page.client.get("/api/images/0")["iou"]
    assert page.browser.run("return document.getElementById('iou').textContent") == f"IoU {100 * iou:.1f} %"


def test_an_image_that_cannot_be_read(page: Page) -> None:
    page.files[3].write_bytes(b"no image")  # not read ahead yet
    for number in (2, 3):
        page.browser.press("n")
        page.browser.wait(f"document.getElementById('facts').textContent.startsWith('{number} of')")
    page.browser.press("n")
    page.browser.wait("document.getElementById('message').textContent.includes('cannot be read')")
    page.click(9, 12)  # changes nothing, least of all the image before
    page.browser.press("Enter", "Delete", "u", "]", "0", "+", "l", "s", "ArrowUp")
    page.browser.press("n")
    page.browser.wait("document.getElementById('facts').textContent.startsWith('5 of')")
    assert not page.client.session.history.steps
    assert page.browser.run("return document.getElementById('message').hidden")
    assert all("400" in line for line in page.browser.log())


def test_a_server_that_is_gone(browser: Browser, root: Path, tmp_path: Path) -> None:
    with served(root, tmp_path / "p.csv") as client:
        page = Page(browser, client, root / "images")
        page.open()
    page.click(9, 12)
    browser.wait("document.getElementById('message').textContent.includes('does not answer')")
    browser.open("about:blank")
    browser.log()


def test_ten_thousand_images(browser: Browser, root: Path, tmp_path: Path) -> None:
    many = tmp_path / "many" / "images"
    many.mkdir(parents=True)
    source = next((root / "images").iterdir())
    for number in range(10_000):
        os.link(source, many / f"{number:05d}.png")
    with served(many.parent, tmp_path / "p.csv") as client:
        page = Page(browser, client, many)
        page.open()
        assert browser.run("return document.querySelectorAll('.row').length") < 40
        browser.run("document.getElementById('list').scrollTop = 5000 * 64")
        browser.wait("document.getElementById('image-5001')")
        browser.wait("document.querySelector('#image-5001 img').naturalWidth > 0")
        assert browser.run("return document.querySelectorAll('.row').length") < 40
        browser.run(
            "const f = document.getElementById('filter'); f.value = '0999'; f.dispatchEvent(new Event('input'))"
        )
        browser.wait("document.querySelectorAll('.row').length === 11")
        assert browser.log() == []


def test_a_large_image_of_16_bits(browser: Browser, tmp_path: Path, rng: np.random.Generator) -> None:
    (tmp_path / "large" / "images").mkdir(parents=True)
    pixels = rng.integers(9000, 9100, (4096, 4096)).astype(np.uint16)
    pixels[2000:2006, 3000:3008] += 900
    Image.fromarray(pixels).save(tmp_path / "large" / "images" / "a.png", compress_level=0)
    with served(tmp_path / "large", tmp_path / "p.csv") as client:
        page = Page(browser, client, tmp_path / "large" / "images")
        page.open()
        place = page.at(2002, 3004)
        for _ in range(14):
            browser.wheel(*place, -200)
        browser.mouse(("to", *place), ("down",), ("up",))
        page.points(1)
        ((_, x0, x1), *_) = runs = client.get("/api/images/0")["points"][0]["runs"]
        assert (runs[0][0], len(runs), x0, x1) == (2000, 6, 3000, 3008)
        assert browser.log() == []


@pytest.fixture
def scene(tmp_path: Path, rng: np.random.Generator) -> tuple[Path, list[tuple[int, int]]]:
    """512 x 512 pixels with forty targets."""
    (tmp_path / "scene").mkdir()
    pixels = rng.normal(90, 6, (512, 512))
    places = [(60 + 55 * row, 40 + 60 * column) for row, column in itertools.product(range(5), range(8))]
    rows, columns = np.mgrid[:512, :512]
    for y, x in places:
        pixels += 90 * np.exp(-((rows - y) ** 2 + (columns - x) ** 2) / 8)
    Image.fromarray(pixels.clip(0, 255).astype(np.uint8)).save(tmp_path / "scene" / "a.png")
    return tmp_path / "scene", places


def test_a_mask_is_there_within_50_ms(browser: Browser, scene: tuple[Path, list], tmp_path: Path) -> None:
    """By the command in a process of its own: from the press to the frame with the mask, as the page measures it."""
    folder, places = scene
    command = [sys.executable, "-u", "-m", "hmg_gpu", "review", "--no-browser", "--images", folder]
    command += ["--save", tmp_path / "p.csv"]
    process = subprocess.Popen(list(map(str, command)), stdout=subprocess.PIPE, text=True)
    try:
        address = read_until(process, lambda line: re.search(r"open (\S+)", line))
        page = Page(browser, Client(address), folder)
        page.open()
        for number, place in enumerate(places, 1):
            page.click(*place)
            page.points(number)
        times = browser.run("return performance.getEntriesByName('click to mask').map(e => e.duration)")
        median = statistics.median(times)
        load = os.getloadavg()[0]
        print(f"click to mask: median {median:.1f} ms, {min(times):.1f} to {max(times):.1f}, load {load:.1f}")
        assert len(times) == len(places) and median < 50
        assert browser.log() == []
    finally:
        process.kill()
        process.wait(10)
        process.stdout.close()
