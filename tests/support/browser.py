"""A real Chromium for tests, over the pipe of its DevTools protocol: no driver, no port, no
package.

Where no Chromium is, a test is skipped; with RSB_CI=1, as in .ci/run, it fails instead.
Protocol: https://chromedevtools.github.io/devtools-protocol/
"""

import base64
import fcntl
import json
import os
import select
import shutil
import subprocess
import tempfile
import time
from pathlib import Path

import pytest

FLAGS = (
    "--headless --no-sandbox --disable-gpu --disable-quic --no-first-run"
    " --disable-background-networking --disable-component-update --disable-sync"
    " --disable-dev-shm-usage --remote-debugging-pipe --hide-scrollbars"
)
KEYS = {"Tab": ("Tab", 9, ""), "Enter": ("Enter", 13, "\r"), "Space": (" ", 32, " ")}
_MOST_S = 60  # until an answer is given up


def chromium() -> str:
    """The program; skips the test where there is none, or fails it with RSB_CI=1."""
    found = (
        shutil.which("chromium")
        or shutil.which("chromium-browser")
        or shutil.which("google-chrome")
    )
    if found is None:
        sentence = (
            "no Chromium here: apt-get install -y --no-install-recommends chromium, and the report"
            " is tested in it"
        )
        pytest.fail(sentence) if os.environ.get("RSB_CI") == "1" else pytest.skip(sentence)
    return found


class Browser:
    """One headless Chromium; a context."""

    def __init__(self) -> None:
        program = chromium()
        self.folder = tempfile.mkdtemp()
        theirs, self._to = _high(os.pipe())
        self._from, back = _high(os.pipe())

        def at_3_and_4():  # where Chromium looks for them
            os.dup2(theirs, 3)
            os.dup2(back, 4)

        words = [program, *FLAGS.split(), f"--user-data-dir={self.folder}"]
        out = subprocess.DEVNULL
        self._process = subprocess.Popen(
            words, preexec_fn=at_3_and_4, pass_fds=(3, 4), stdin=out, stdout=out, stderr=out
        )
        os.close(theirs), os.close(back)
        self._read, self._id = b"", 0
        self.events = []

    def __enter__(self):
        return self

    def __exit__(self, *exception):
        try:
            self.call("Browser.close")
        finally:
            for end in (self._to, self._from):
                os.close(end)
            try:
                self._process.wait(20)
            except subprocess.TimeoutExpired:
                self._process.kill()
                self._process.wait()
            shutil.rmtree(self.folder, ignore_errors=True)

    def call(self, method: str, session: str | None = None, **params):
        """One command's result; events that come meanwhile are kept."""
        self._id += 1
        message = {"id": self._id, "method": method, "params": params} | (
            {"sessionId": session} if session else {}
        )
        data = json.dumps(message).encode() + b"\0"
        while data:
            data = data[os.write(self._to, data) :]
        while True:
            answer = self._next()
            if answer.get("id") == self._id:
                assert "error" not in answer, f"{method}: {answer['error']}"
                return answer["result"]
            self.events.append(answer)

    def wait_for(self, method: str, session: str):
        """The next event of a kind; one kept already counts."""
        while True:
            for place, event in enumerate(self.events):
                if event.get("method") == method and event.get("sessionId") == session:
                    return self.events.pop(place)
            self.events.append(self._next())

    def _next(self) -> dict:
        until_s = time.monotonic() + _MOST_S
        while b"\0" not in self._read:
            assert select.select([self._from], [], [], max(0, until_s - time.monotonic()))[0], (
                "Chromium does not answer"
            )
            data = os.read(self._from, 1 << 20)
            assert data, "Chromium is gone"
            self._read += data
        message, _, self._read = self._read.partition(b"\0")
        return json.loads(message)

    def open(
        self, path: Path, width_px=1280, height_px=900, dark=False, script=True, print_media=False
    ) -> "Tab":
        """A recipe from disk in a new tab, once it has loaded."""
        return Tab(self, path, width_px, height_px, dark, script, print_media)


class Tab:
    """One recipe. requests: every address that it asked for. errors: what the console or an exception
    said.
    """

    def __init__(self, browser, path, width_px, height_px, dark, script, print_media) -> None:
        self.browser = browser
        self.target = browser.call("Target.createTarget", url="about:blank")["targetId"]
        self.session = browser.call("Target.attachToTarget", targetId=self.target, flatten=True)[
            "sessionId"
        ]
        for domain in ("Page", "Runtime", "Log", "Network"):
            self(f"{domain}.enable")
        self(
            "Emulation.setDeviceMetricsOverride",
            width=width_px,
            height=height_px,
            deviceScaleFactor=1,
            mobile=width_px < 600,
        )
        scheme = {"name": "prefers-color-scheme", "value": "dark" if dark else "light"}
        self("Emulation.setEmulatedMedia", media="print" if print_media else "", features=[scheme])
        self("Emulation.setScriptExecutionDisabled", value=not script)
        self("Page.navigate", url=path.resolve().as_uri())
        browser.wait_for("Page.loadEventFired", self.session)

    def __enter__(self):
        return self

    def __exit__(self, *exception):
        self.browser.call("Target.closeTarget", targetId=self.target)

    def __call__(self, method, **params):
        return self.browser.call(method, self.session, **params)

    def js(self, expression: str):
        """The value of an expression in the recipe."""
        found = self(
            "Runtime.evaluate", expression=expression, returnByValue=True, awaitPromise=True
        )
        assert "exceptionDetails" not in found, found["exceptionDetails"]
        return found["result"].get("value")

    def click(self, selector: str) -> None:
        """A real click on the middle of an element."""
        self.js(
            f"document.querySelector({json.dumps(selector)}).scrollIntoView({{block: 'center',"
            " inline: 'center', behavior: 'instant'})"
        )
        box = (
            "(() => { const b ="
            f" document.querySelector({json.dumps(selector)}).getBoundingClientRect(); return [b.x"
            " + b.width / 2, b.y + b.height / 2]; })()"
        )
        x, y = self.js(box)
        for kind in ("mouseMoved", "mousePressed", "mouseReleased"):
            self(
                "Input.dispatchMouseEvent",
                type=kind,
                x=x,
                y=y,
                button="none" if kind == "mouseMoved" else "left",
                clickCount=1,
            )

    def press(self, name: str) -> None:
        """A real key."""
        key, code, text = KEYS[name]
        self(
            "Input.dispatchKeyEvent",
            type="keyDown",
            key=key,
            code=name,
            windowsVirtualKeyCode=code,
            text=text,
        )
        self("Input.dispatchKeyEvent", type="keyUp", key=key, code=name, windowsVirtualKeyCode=code)

    def write(self, text: str) -> None:
        """Text into what has the focus."""
        self("Input.insertText", text=text)

    @property
    def requests(self) -> list[str]:
        return [
            event["params"]["request"]["url"] for event in self._events("Network.requestWillBeSent")
        ]

    @property
    def errors(self) -> list[str]:
        kinds = ("Runtime.exceptionThrown", "Runtime.consoleAPICalled", "Log.entryAdded")
        return [json.dumps(event["params"]) for kind in kinds for event in self._events(kind)]

    def _events(self, method):
        self.js("0")  # so that what was on its way is here
        return [
            event
            for event in self.browser.events
            if event.get("method") == method and event.get("sessionId") == self.session
        ]

    def picture(self, path: Path) -> None:
        """The whole recipe as a PNG."""
        size = self("Page.getLayoutMetrics")["cssContentSize"]
        clip = {
            "x": 0,
            "y": 0,
            "width": size["width"],
            "height": min(size["height"], 12000),
            "scale": 1,
        }
        path.write_bytes(
            base64.b64decode(
                self("Page.captureScreenshot", captureBeyondViewport=True, clip=clip)["data"]
            )
        )


def _high(ends):
    """File descriptors out of the way of 3 and 4."""
    moved = tuple(fcntl.fcntl(end, fcntl.F_DUPFD_CLOEXEC, 20) for end in ends)
    for end in ends:
        os.close(end)
    return moved
