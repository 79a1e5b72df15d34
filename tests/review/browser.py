"""A headless Chromium driven by chromedriver's HTTP (W3C WebDriver), as far as the tests of the page need it."""

from __future__ import annotations

import base64
import json
import os
import re
import shutil
import subprocess
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

KEYS = {
    "Enter": "\ue007", "Shift": "\ue008", "Control": "\ue009", "Alt": "\ue00a", "ArrowLeft": "\ue012",
    "ArrowUp": "\ue013", "ArrowRight": "\ue014", "ArrowDown": "\ue015", "Delete": "\ue017",
}  # fmt: skip
DIRECT = urllib.request.build_opener(urllib.request.ProxyHandler({}))


def find_browser() -> tuple[str, str] | None:
    """Chromium and its driver, where the system has both."""
    chromium = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
    driver = shutil.which("chromedriver")
    return (chromium, driver) if chromium and driver else None


class Browser:
    """One window.

    Args:
        place: the session's address at the driver.
    """

    def __init__(self, place: str):
        self.place = place

    def _ask(self, path: str, body: dict[str, Any] | None = None, method: str | None = None) -> Any:
        return ask(f"{self.place}{path}", body, method)

    def open(self, address: str) -> None:
        self._ask("/url", {"url": address})

    def reload(self) -> None:
        self._ask("/refresh", {})

    def address(self) -> str:
        return self._ask("/url")

    def run(self, script: str, *arguments: Any) -> Any:
        """The value of a function's body; a promise is waited for."""
        return self._ask("/execute/sync", {"script": script, "args": list(arguments)})

    def wait(self, script: str, *arguments: Any, seconds: float = 15) -> Any:
        """The first true value of an expression."""
        end = time.monotonic() + seconds
        while not (value := self.run(f"return {script}", *arguments)):
            if time.monotonic() > end:
                raise AssertionError(f"not within {seconds} s: {script}; {self.log()}")
            time.sleep(0.02)
        return value

    def picture(self, path: Path) -> None:
        path.write_bytes(base64.b64decode(self._ask("/screenshot")))

    def log(self) -> list[str]:
        """What the console said since the last call, warnings and errors."""
        entries = self._ask("/se/log", {"type": "browser"})
        return [entry["message"] for entry in entries if entry["level"] in ("WARNING", "SEVERE")]

    def resize(self, width: int, height: int) -> None:
        self._ask("/window/rect", {"width": width, "height": height})

    def tab(self) -> str:
        """The tab that is shown."""
        return self._ask("/window")

    def new_tab(self) -> str:
        return self._ask("/window/new", {"type": "tab"})["handle"]

    def switch(self, tab: str) -> None:
        self._ask("/window", {"handle": tab})

    # ---- hands

    def mouse(self, *steps: tuple, kind: str = "mouse", keys: str = "") -> None:
        """Steps of the pointer: ("to", x, y), ("down", button), ("up", button), ("pause", ms); ``keys`` are held."""
        actions = []
        for name, *values in steps:
            if name == "to":
                x, y = (round(value) for value in values)
                actions.append({"type": "pointerMove", "duration": 0, "x": x, "y": y, "origin": "viewport"})
            elif name == "pause":
                actions.append({"type": "pause", "duration": values[0]})
            else:
                actions.append({"type": f"pointer{name.capitalize()}", "button": values[0] if values else 0})
        pointer = {"type": "pointer", "id": kind, "parameters": {"pointerType": kind}, "actions": actions}
        self._hold(keys, pointer)

    def wheel(self, x: float, y: float, turn: int, keys: str = "") -> None:
        place = {"x": round(x), "y": round(y), "deltaX": 0, "deltaY": turn, "origin": "viewport", "duration": 0}
        self._hold(keys, {"type": "wheel", "id": "wheel", "actions": [{"type": "scroll"} | place]})

    def press(self, *keys: str) -> None:
        """Keys one after the other; "Control+z" holds the first."""
        actions = []
        for key in keys:
            names = key.split("+") if len(key) > 1 else [key]
            values = [KEYS.get(name, name) for name in names]
            actions += [{"type": "keyDown", "value": value} for value in values]
            actions += [{"type": "keyUp", "value": value} for value in reversed(values)]
        self._ask("/actions", {"actions": [{"type": "key", "id": "keys", "actions": actions}]})

    def _hold(self, keys: str, source: dict[str, Any]) -> None:
        held = [KEYS[key] for key in keys.split("+") if key]
        for kind, values in (("keyDown", held), (None, ()), ("keyUp", held)):
            if kind is None:
                self._ask("/actions", {"actions": [source]})
            elif held:
                actions = [{"type": kind, "value": value} for value in values]
                self._ask("/actions", {"actions": [{"type": "key", "id": "keys", "actions": actions}]})


def ask(address: str, body: dict[str, Any] | None = None, method: str | None = None) -> Any:
    data = None if body is None else json.dumps(body).encode()
    request = urllib.request.Request(address, data, {"Content-Type": "application/json"}, method=method)
    try:
        with DIRECT.open(request, timeout=120) as reply:
            return json.load(reply)["value"]
    except urllib.error.HTTPError as error:
        raise AssertionError(json.load(error)["value"]["message"]) from error


@contextmanager
def open_browser(found: tuple[str, str], width: int = 1440, height: int = 900) -> Iterator[Browser]:
    """A window of a new profile; ended, with its driver, at the end."""
    chromium, driver = found
    process = subprocess.Popen([driver, "--port=0"], stdout=subprocess.PIPE, text=True)
    try:
        port = read_until(process, lambda line: re.search(r"successfully on port (\d+)", line))
        arguments = ["--headless=new", "--no-sandbox", "--disable-gpu", "--no-first-run", "--disable-dev-shm-usage"]
        arguments += ["--force-device-scale-factor=1", f"--window-size={width},{height}", "--no-proxy-server"]
        wanted = {
            "browserName": "chrome",
            "goog:chromeOptions": {"binary": chromium, "args": arguments},
            "goog:loggingPrefs": {"browser": "ALL"},
        }
        base = f"http://127.0.0.1:{port}/session"
        place = f"{base}/{ask(base, {'capabilities': {'alwaysMatch': wanted}})['sessionId']}"
        try:
            yield Browser(place)
        finally:
            ask(place, method="DELETE")
    finally:
        process.terminate()
        process.wait(10)
        process.stdout.close()


def read_until(process: subprocess.Popen, search: Callable[[str], re.Match | None], seconds: float = 60) -> str:
    """The first group of the first line that matches."""
    os.set_blocking(process.stdout.fileno(), True)
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        line = process.stdout.readline()
        if match := search(line):
            return match[1]
        if not line:
            raise AssertionError(f"{process.args[0]} ended with {process.wait(10)}")
    raise AssertionError(f"{process.args[0]} said nothing")
