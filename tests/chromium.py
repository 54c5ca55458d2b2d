"""A real browser for tests of pages: headless Chromium, spoken to by its DevTools protocol over two pipes."""

import base64
import contextlib
import json
import os
import shutil
import subprocess
import time
from pathlib import Path

NAMES = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable")
EXECUTABLE = next((path for path in map(shutil.which, NAMES) if path), None)
FLAGS = [
    "--headless",
    "--no-sandbox",
    "--disable-gpu",
    "--disable-quic",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
    "--disable-extensions",
    "--hide-scrollbars",
    "--remote-debugging-pipe",
]


class Browser:
    """
    A browser and the page that is open in it. What the page logs, throws or asks the network for is collected in
    `complaints` and `requests`.
    """

    def __init__(self, to_browser, from_browser):
        self._to, self._from = to_browser, from_browser
        self._next_id, self._buffer = 0, b""
        self._session = self._target = None
        self._loaded = False
        self.complaints, self.requests = [], []

    def call(self, method, **params):
        self._next_id += 1
        message = {"id": self._next_id, "method": method, "params": params}
        if self._session:
            message["sessionId"] = self._session
        os.write(self._to, json.dumps(message).encode() + b"\0")
        while True:
            answer = self._receive()
            if answer.get("id") == message["id"]:
                if "error" in answer:
                    raise RuntimeError(f"{method}: {answer['error']}")
                return answer["result"]

    def _receive(self):
        while b"\0" not in self._buffer:
            chunk = os.read(self._from, 1 << 20)
            if not chunk:
                raise RuntimeError("Chromium has gone away")
            self._buffer += chunk
        raw, self._buffer = self._buffer.split(b"\0", 1)
        message = json.loads(raw)
        method, params = message.get("method"), message.get("params", {})
        if method == "Page.loadEventFired":
            self._loaded = True
        elif method == "Network.requestWillBeSent":
            self.requests.append(params["request"]["url"])
        elif method == "Runtime.exceptionThrown":
            self.complaints.append(params["exceptionDetails"])
        elif method in ("Runtime.consoleAPICalled", "Log.entryAdded", "Page.javascriptDialogOpening"):
            self.complaints.append(params)
        return message

    def open(self, path):
        """Open a file in the place of the page before, with nothing of that left."""
        self._session, before = None, self._target
        self._target = self.call("Target.createTarget", url="about:blank")["targetId"]
        if before is not None:
            self.call("Target.closeTarget", targetId=before)
        self._session = self.call("Target.attachToTarget", targetId=self._target, flatten=True)["sessionId"]
        self.complaints, self.requests = [], []
        for domain in ("Page", "Runtime", "Log", "Network"):
            self.call(f"{domain}.enable")
        self.resize(1280, 900)
        self._loaded = False
        self.call("Page.navigate", url=Path(path).resolve().as_uri())
        while not self._loaded:
            self._receive()

    def evaluate(self, expression):
        """Value of a JavaScript expression in the page."""
        answer = self.call("Runtime.evaluate", expression=expression, returnByValue=True, awaitPromise=True)
        if "exceptionDetails" in answer:
            raise RuntimeError(answer["exceptionDetails"])
        return answer["result"].get("value")

    def place(self, selector, index=0):
        """Middle of an element, or of its first line, scrolled into view."""
        return self.evaluate(
            f"""(() => {{
                const element = document.querySelectorAll({json.dumps(selector)})[{index}];
                element.scrollIntoView({{ block: "center" }});
                const {{ x, y, width, height }} = element.getClientRects()[0];
                return [x + width / 2, y + height / 2];
            }})()"""
        )

    def hover(self, selector, index=0, fraction=0.5):
        x, y = self.place(selector, index)
        if fraction != 0.5:
            box = f"document.querySelectorAll({json.dumps(selector)})[{index}].getBoundingClientRect()"
            x = self.evaluate(f"{box}.x + {fraction} * {box}.width")
        self.call("Input.dispatchMouseEvent", type="mouseMoved", x=x, y=y)

    def click(self, selector, index=0):
        x, y = self.place(selector, index)
        for kind in ("mousePressed", "mouseReleased"):
            self.call("Input.dispatchMouseEvent", type=kind, x=x, y=y, button="left", clickCount=1)

    def press(self, key):
        for kind in ("keyDown", "keyUp"):
            self.call("Input.dispatchKeyEvent", type=kind, key=key, code=key)

    def resize(self, width, height):
        self.call(
            "Emulation.setDeviceMetricsOverride", width=width, height=height, deviceScaleFactor=1, mobile=width < 600
        )

    def prefer(self, scheme):
        features = [{"name": "prefers-color-scheme", "value": scheme}]
        self.call("Emulation.setEmulatedMedia", features=features)

    def picture(self):
        """The present view, as PNG."""
        return base64.b64decode(self.call("Page.captureScreenshot", format="png")["data"])


@contextlib.contextmanager
def browser(profile):
    """
    Start a browser.

    Args:
        profile (`str`): An empty folder for its files.
    """
    to_child, from_us = os.pipe()
    from_child, to_us = os.pipe()

    def connect():
        # Chromium reads commands from descriptor 3 and writes to 4; the copies first, because the originals may be 3 or 4
        read, write = os.dup(to_child), os.dup(to_us)
        os.dup2(read, 3)
        os.dup2(write, 4)

    with open(os.path.join(profile, "stderr"), "wb") as stderr:
        process = subprocess.Popen(
            [EXECUTABLE, *FLAGS, f"--user-data-dir={profile}"],
            preexec_fn=connect,
            close_fds=False,
            stdin=subprocess.DEVNULL,
            stdout=stderr,
            stderr=stderr,
        )
        os.close(to_child)
        os.close(to_us)
        started = Browser(from_us, from_child)
        try:
            yield started
        finally:
            with contextlib.suppress(RuntimeError, OSError):
                started._session = None
                started.call("Browser.close")
            deadline = time.monotonic() + 10
            while process.poll() is None and time.monotonic() < deadline:
                time.sleep(0.05)
            process.kill()
            process.wait()
            os.close(from_us)
            os.close(from_child)
