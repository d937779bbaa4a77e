"""A headless Chromium driven through its DevTools protocol over two pipes: no driver, no port, no package.

Run by tests that open pages; `find()` gives None where there is no browser.
"""
from __future__ import annotations

import base64
import json
import os
import shutil
import subprocess
from pathlib import Path
from typing import Any

NAMES = ("chromium", "chromium-browser", "google-chrome")
FLAGS = ("--headless", "--no-sandbox", "--disable-gpu", "--remote-debugging-pipe", "--no-first-run", "--hide-scrollbars",
         "--disable-background-networking", "--disable-component-update", "--host-resolver-rules=MAP * ~NOTFOUND")


def find() -> str | None:
    return next(filter(None, map(shutil.which, NAMES)), None)


class Browser:
    """One page. `events` holds everything that the browser reported, oldest first. A context manager."""

    def __init__(self, program: str, profile: Path) -> None:
        self.events: list[dict[str, Any]] = []
        self.number, self.session = 0, ""
        (its_in, our_out), (our_in, its_out) = os.pipe(), os.pipe()
        self.process = subprocess.Popen(     # the protocol wants descriptors 3 (commands) and 4 (answers)
            ["bash", "-c", f'exec "$@" 3<&{its_in} 4>&{its_out}', "bash", program, *FLAGS, f"--user-data-dir={profile}",
             "about:blank"], pass_fds=(its_in, its_out), stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        os.close(its_in)
        os.close(its_out)
        self.commands, self.answers, self.pending = os.fdopen(our_out, "wb", buffering=0), our_in, b""
        targets = self.call("Target.getTargets")["targetInfos"]
        page = next(target["targetId"] for target in targets if target["type"] == "page")
        self.session = self.call("Target.attachToTarget", targetId=page, flatten=True)["sessionId"]
        for domain in ("Page", "Runtime", "Log", "Network"):
            self.call(f"{domain}.enable")

    def __enter__(self) -> Browser:
        return self

    def __exit__(self, *_: object) -> None:
        self.commands.close()
        os.close(self.answers)
        self.process.kill()
        self.process.wait()

    def message(self) -> dict[str, Any]:
        """The next that arrives; they end with a zero byte."""
        while b"\0" not in self.pending:
            more = os.read(self.answers, 1 << 20)
            assert more, "the browser went away"
            self.pending += more
        text, _, self.pending = self.pending.partition(b"\0")
        return json.loads(text)

    def call(self, method: str, **params: Any) -> dict[str, Any]:
        self.number += 1
        call: dict[str, Any] = {"id": self.number, "method": method, "params": params}
        if self.session:
            call["sessionId"] = self.session
        self.commands.write(json.dumps(call).encode() + b"\0")
        while (found := self.message()).get("id") != self.number:
            self.events.append(found)
        assert "error" not in found, found
        return found["result"]

    def open(self, path: Path) -> None:
        """Loads a file and waits until it is drawn."""
        self.call("Page.navigate", url=path.as_uri())
        while not any(event["method"] == "Page.loadEventFired" for event in self.events):
            self.events.append(self.message())

    def evaluate(self, script: str) -> Any:
        """The value of an expression of the page."""
        found = self.call("Runtime.evaluate", expression=script, returnByValue=True)
        assert "exceptionDetails" not in found, found["exceptionDetails"]
        return found["result"].get("value")

    def look(self, width_px: int, scheme: str) -> None:
        """A screen of this width, scheme light or dark."""
        self.call("Emulation.setDeviceMetricsOverride", width=width_px, height=900, deviceScaleFactor=1, mobile=True)
        self.call("Emulation.setEmulatedMedia", features=[{"name": "prefers-color-scheme", "value": scheme}])

    def screenshot(self, path: Path) -> None:
        """All of the page, as PNG."""
        data = self.call("Page.captureScreenshot", captureBeyondViewport=True)["data"]
        path.write_bytes(base64.b64decode(data))

    def heard(self, method: str) -> list[dict[str, Any]]:
        return [event["params"] for event in self.events if event["method"] == method]
