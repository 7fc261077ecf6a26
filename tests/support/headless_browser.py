"""A headless Chromium, driven by the W3C's WebDriver protocol through Debian's chromedriver."""

import base64
import json
import os
import re
import subprocess
import tempfile
import time
import urllib.error
import urllib.request
from pathlib import Path
from typing import Any

from support.points import HANG_S

ELEMENT = "element-6066-11e4-a52e-4f735466cecf"  # the protocol's key of a reference to an element


class Browser:
    """A browser that resolves no names, with a profile of its own that is removed with it."""

    def __init__(self, size: tuple[int, int] = (1150, 1000)):
        self._profile = tempfile.TemporaryDirectory(prefix="ibq-chromium-", ignore_cleanup_errors=True)
        # Chromium keeps its crash reports and settings below these.
        environment = os.environ | {"HOME": self._profile.name, "XDG_CONFIG_HOME": self._profile.name}
        self._driver = subprocess.Popen(
            ["chromedriver", "--port=0"],
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            text=True,
            env=environment,
        )
        self._session = ""
        try:
            self._base = f"http://127.0.0.1:{self._port()}/session"
            self._session = (
                "/" + self._send("POST", "", {"capabilities": {"alwaysMatch": self._options(size)}})["sessionId"]
            )
        except BaseException:
            self.close()
            raise

    def _port(self) -> int:
        for line in self._driver.stdout:
            if found := re.search(r"successfully on port (\d+)", line):
                return int(found[1])
        raise RuntimeError("chromedriver did not start")

    def _options(self, size: tuple[int, int]) -> dict:
        flags = ["--headless=new", "--disable-gpu", "--no-sandbox", "--disable-dev-shm-usage", "--no-first-run"]
        flags += ["--disable-background-networking", "--disable-component-update", "--disable-sync"]
        flags += [f"--window-size={size[0]},{size[1]}", f"--user-data-dir={self._profile.name}/profile"]
        flags += ["--host-resolver-rules=MAP * ~NOTFOUND , EXCLUDE 127.0.0.1"]
        return {"goog:chromeOptions": {"args": flags}, "goog:loggingPrefs": {"performance": "ALL", "browser": "ALL"}}

    def _send(self, method: str, path: str, body: dict | None = None, timeout: float = HANG_S) -> Any:
        data = None if body is None else json.dumps(body).encode()
        request = urllib.request.Request(self._base + self._session + path, data, method=method)
        try:
            with urllib.request.urlopen(request, timeout=timeout) as answer:
                return json.load(answer)["value"]
        except urllib.error.HTTPError as error:
            problem = json.load(error)["value"]
            raise RuntimeError(f"{problem['error']}: {problem['message'].splitlines()[0]}") from None

    def open(self, url: str) -> None:
        self._send("POST", "/url", {"url": url})

    def script(self, code: str, *arguments: Any) -> Any:
        """What the JavaScript function body `code` returns."""
        return self._send("POST", "/execute/sync", {"script": code, "args": list(arguments)})

    def fetch(self, address: str) -> bytes:
        """A file as the page gets it."""
        code = """
            const done = arguments[1];
            fetch(arguments[0]).then(answer => answer.blob()).then(blob => {
                const reader = new FileReader();
                reader.onload = () => done(reader.result.split(',')[1]);
                reader.readAsDataURL(blob);
            });"""
        return base64.b64decode(self._send("POST", "/execute/async", {"script": code, "args": [address]}))

    def find(self, selector: str) -> str:
        return self._send("POST", "/element", {"using": "css selector", "value": selector})[ELEMENT]

    def click(self, selector: str) -> None:
        """Click as a user does: the element must be there to be clicked on."""
        self.wait(lambda: self._clicked(selector), f"{selector} to be clickable")

    def _clicked(self, selector: str) -> bool:
        try:
            self._send("POST", f"/element/{self.find(selector)}/click", {})
            return True
        except RuntimeError:
            return False

    def keys(self, selector: str, text: str) -> None:
        """Type into an input; into one for files, their paths."""
        self._send("POST", f"/element/{self.find(selector)}/value", {"text": text})

    def text(self, selector: str) -> str:
        """The text below all elements that match."""
        return self.script(
            "return [...document.querySelectorAll(arguments[0])].map(e => e.innerText).join('\\n')", selector
        )

    def wait(self, condition, what: str, timeout: float = HANG_S) -> Any:
        """The first true value of condition()."""
        deadline = time.monotonic() + timeout
        while not (value := condition()):
            assert time.monotonic() < deadline, f"waited {timeout} s for {what}; the page says:\n{self.text('body')}"
            time.sleep(0.05)
        return value

    def requests(self) -> list[str]:
        """The addresses that the page has asked for since the last call."""
        entries = self._send("POST", "/se/log", {"type": "performance"})
        messages = [json.loads(entry["message"])["message"] for entry in entries]
        return [m["params"]["request"]["url"] for m in messages if m["method"] == "Network.requestWillBeSent"]

    def complaints(self) -> list[str]:
        """What stands in the console, since the last call."""
        return [entry["message"] for entry in self._send("POST", "/se/log", {"type": "browser"})]

    def screenshot(self, path: Path) -> None:
        path.write_bytes(base64.b64decode(self._send("GET", "/screenshot")))

    def close(self) -> None:
        """End the browser, and chromedriver with it."""
        try:
            if self._session:
                self._send("DELETE", "", timeout=60)
        except (OSError, RuntimeError):
            pass
        finally:
            self._driver.terminate()
            self._driver.wait(60)
            self._driver.stdout.close()
            self._profile.cleanup()

    def __enter__(self) -> "Browser":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()
