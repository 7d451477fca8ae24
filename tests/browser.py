"""Chromium without a screen, driven by its DevTools protocol: real key presses, and what the page shows."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from urllib.request import urlopen

import pytest
import websocket

NAMES = ("chromium", "chromium-browser", "google-chrome")
SECONDS = 60.0
# Of keys that are not letters or digits: what the browser is told of them beside their name.
CODES = {"ArrowLeft": 37, "ArrowRight": 39, "Backspace": 8, "Escape": 27, "Tab": 9, "Enter": 13}
SHIFT = 8


def find_chromium() -> str:
    """The program; skips the test where there is none, and fails it where everything must be there."""
    for name in NAMES:
        if found := shutil.which(name):
            return found
    assert not os.environ.get("REQUIRE_LAB"), "REQUIRE_LAB is set, but there is no Chromium: apt-get install chromium"
    pytest.skip("there is no Chromium: apt-get install chromium")


class Page:
    """One tab."""

    def __init__(self, address: str) -> None:
        self._socket = websocket.create_connection(address, timeout=SECONDS, suppress_origin=True)
        self._number = 0
        self.problems: list[str] = []  # uncaught errors, and what the page's policy or the network refused
        for domain in ("Page", "Runtime", "Log"):
            self(f"{domain}.enable")

    def __call__(self, method: str, **parameters: Any) -> dict[str, Any]:
        """Calls a method of the protocol and returns its result."""
        self._number += 1
        self._socket.send(json.dumps({"id": self._number, "method": method, "params": parameters}))
        while True:
            message = json.loads(self._socket.recv())
            if message.get("method") == "Runtime.exceptionThrown":
                self.problems.append(message["params"]["exceptionDetails"]["text"])
            elif message.get("method") == "Log.entryAdded" and message["params"]["entry"]["level"] == "error":
                self.problems.append(message["params"]["entry"]["text"])
            if message.get("id") == self._number:
                assert "error" not in message, message
                result: dict[str, Any] = message["result"]
                return result

    def open(self, url: str) -> None:
        """Goes to a page."""
        self("Page.navigate", url=url)

    def reload(self) -> None:
        """Loads the page again. What was there before is marked, so that `wait` cannot mistake it for the new one."""
        self.eval("window.isOld = true")
        self("Page.reload")
        self.wait("!window.isOld && document.readyState == 'complete'")

    def eval(self, expression: str) -> Any:
        """The value of a JavaScript expression."""
        result = self("Runtime.evaluate", expression=expression, returnByValue=True, awaitPromise=True)
        assert "exceptionDetails" not in result, result
        return result["result"].get("value")

    def wait(self, expression: str) -> None:
        """Returns once the expression holds."""
        deadline = time.monotonic() + SECONDS
        while not self.eval(f"Boolean({expression})"):
            assert time.monotonic() < deadline, f"never true: {expression}; problems: {self.problems}"
            time.sleep(0.01)

    def press(self, key: str, *, shift: bool = False) -> None:
        """A key, down and up, as a keyboard of the United States sends it; of Shift with a digit, `key` is the digit."""
        if key in CODES:
            code, number, text = key, CODES[key], ""
        elif key.isdigit():
            code, number, text = f"Digit{key}", ord(key), ")!@#$%^&*("[int(key)] if shift else key
        elif key.isalpha():
            code, number, text = f"Key{key.upper()}", ord(key.upper()), key
        else:
            code, number, text = {"=": ("Equal", 187, "="), "?": ("Slash", 191, "?")}[key]
        event = {"key": text or key, "code": code, "windowsVirtualKeyCode": number, "modifiers": SHIFT if shift or key == "?" else 0}
        self("Input.dispatchKeyEvent", type="keyDown" if text else "rawKeyDown", **event, **({"text": text} if text else {}))
        self("Input.dispatchKeyEvent", type="keyUp", **event)

    def close(self) -> None:
        """Lets go of the tab."""
        self._socket.close()


@contextmanager
def chromium(profile: Path) -> Iterator[Page]:
    """A browser with one empty tab and a profile of its own, ended afterwards."""
    command = [find_chromium(), "--headless", "--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage", "--no-first-run"]
    command += ["--disable-background-networking", "--remote-debugging-port=0", f"--user-data-dir={profile}", "about:blank"]
    browser = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    try:
        told = profile / "DevToolsActivePort"
        deadline = time.monotonic() + SECONDS
        while not (told.exists() and "\n" in told.read_text()):
            assert browser.poll() is None, f"Chromium ended with {browser.returncode}"
            assert time.monotonic() < deadline, "Chromium did not start"
            time.sleep(0.05)
        port = told.read_text().split("\n")[0]
        with urlopen(f"http://127.0.0.1:{port}/json/list", timeout=SECONDS) as response:
            tabs = [tab for tab in json.load(response) if tab["type"] == "page"]
        page = Page(tabs[0]["webSocketDebuggerUrl"])
        try:
            yield page
        finally:
            page.close()
    finally:
        browser.terminate()
        browser.wait(SECONDS)
