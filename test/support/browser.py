"""A headless Chromium under test, driven over chromedriver's HTTP protocol
(https://www.w3.org/TR/webdriver2)."""

from __future__ import annotations

import base64
import os
import re
import shutil
import signal
import subprocess
import tempfile
import time
from pathlib import Path
from typing import Any

import httpx
import pytest
from crosspool.config.process import die_with_parent

PROGRAMS = ("chromium", "chromedriver")
_FLAGS = (
    *("--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run"),
    *("--disable-background-networking", "--disable-component-update", "--disable-sync"),
    *("--disable-dev-shm-usage", "--hide-scrollbars"),
    "--remote-debugging-pipe",  # Chromium ends when chromedriver does, however that ends
)
_ELEMENT = "element-6066-11e4-a52e-4f735466cecf"
"""The key of an element's id, by the standard."""
_START_SECONDS = 60.0


class Browser:
    """One window of a new profile. Skips the test where Chromium or chromedriver is missing."""

    def __init__(self) -> None:
        missing = [name for name in PROGRAMS if shutil.which(name) is None]
        if missing:
            pytest.skip(f"needs {' and '.join(missing)} (Debian: chromium, chromium-driver)")
        self._profile = tempfile.TemporaryDirectory(
            prefix="crosspool-chromium-", ignore_cleanup_errors=True
        )
        self._driver = subprocess.Popen(
            ["chromedriver", "--port=0"],
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            env={**os.environ, "HOME": self._profile.name},
            text=True,
            start_new_session=True,
            preexec_fn=die_with_parent,  # noqa: PLW1509
        )
        try:
            assert self._driver.stdout is not None
            ports = (re.search(r"successfully on port (\d+)", line) for line in self._driver.stdout)
            port = next(found[1] for found in ports if found)
            self._client = httpx.Client(base_url=f"http://127.0.0.1:{port}", timeout=_START_SECONDS)
            options = {
                "binary": shutil.which("chromium"),
                "args": [*_FLAGS, f"--user-data-dir={self._profile.name}"],
            }
            wanted = {"goog:chromeOptions": options, "goog:loggingPrefs": {"browser": "ALL"}}
            made = self._send("POST", "/session", capabilities={"alwaysMatch": wanted})
            self._session = f"/session/{made['sessionId']}"
        except BaseException:
            self._kill()
            raise

    def close(self) -> None:
        try:
            self._send("DELETE", self._session)
        finally:
            self._kill()

    def open(self, url: str) -> None:
        self._do("url", url=url)

    def run(self, script: str, *arguments: Any) -> Any:
        """What a function with this body returns; a promise is waited for."""
        return self._do("execute/sync", script=script, args=list(arguments))

    def wait_for(self, condition: str, *arguments: Any, timeout: float = 60.0) -> Any:
        """The value of an expression of JavaScript, once it is true."""
        deadline = time.monotonic() + timeout
        while not (value := self.run(f"return {condition}", *arguments)):
            assert time.monotonic() < deadline, (condition, arguments, self.messages())
            time.sleep(0.05)
        return value

    def click(self, selector: str) -> None:
        """Clicks as a user does: raises where the element is hidden or covered."""
        self._do(f"element/{self._find(selector)}/click")

    def type(self, selector: str, text: str) -> None:
        self._do(f"element/{self._find(selector)}/value", text=text)

    def look(self, width: int, height: int, theme: str) -> None:
        """Gives the page this size, in CSS pixels, and the system a ``light`` or ``dark`` theme."""
        size = {"width": width, "height": height, "deviceScaleFactor": 1, "mobile": width < 500}
        self._command("Emulation.setDeviceMetricsOverride", **size)
        feature = {"name": "prefers-color-scheme", "value": theme}
        self._command("Emulation.setEmulatedMedia", features=[feature])

    def photograph(self, file: Path) -> None:
        """Writes the whole page as a PNG."""
        shot = self._command("Page.captureScreenshot", captureBeyondViewport=True)
        file.write_bytes(base64.b64decode(shot["data"]))

    def messages(self) -> list[str]:
        """Warnings and errors of the console since the last call."""
        entries = self._do("se/log", type="browser")
        return [entry["message"] for entry in entries if entry["level"] in ("WARNING", "SEVERE")]

    def _find(self, selector: str) -> str:
        found = self._do("element", using="css selector", value=selector)
        return str(found[_ELEMENT])

    def _command(self, name: str, **parameters: Any) -> Any:
        """Sends a command of Chromium's own protocol."""
        return self._do("goog/cdp/execute", cmd=name, params=parameters)

    def _do(self, what: str, **body: Any) -> Any:
        return self._send("POST", f"{self._session}/{what}", **body)

    def _send(self, method: str, path: str, **body: Any) -> Any:
        sent = self._client.request(method, path, json=body if method == "POST" else None)
        value = sent.json()["value"]
        assert sent.is_success, (path, value)
        return value

    def _kill(self) -> None:
        os.killpg(self._driver.pid, signal.SIGKILL)
        self._driver.wait(30)
        self._profile.cleanup()
