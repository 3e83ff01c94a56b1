"""A real headless browser, driven over the DevTools protocol: Qt's Chromium out of a wheel, or one of the system's."""

import asyncio
import base64
import contextlib
import importlib.util
import itertools
import json
import os
import shutil
import sys
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import aiohttp

from tests.gateway.fakes import free_port

# A window of QtWebEngine; everything else is asked of it over its DevTools port. It ends with whoever holds its stdin.
_QT = """
import os, sys, threading
from PySide6.QtCore import QUrl
from PySide6.QtWebEngineWidgets import QWebEngineView
from PySide6.QtWidgets import QApplication
application = QApplication(sys.argv)
view = QWebEngineView()
view.resize(1440, 900)
view.setUrl(QUrl("about:blank"))
view.show()
threading.Thread(target=lambda: (sys.stdin.read(), os._exit(0)), daemon=True).start()
application.exec()
"""
_FLAGS = ["--disable-gpu", "--disable-background-networking", "--disable-component-update", "--no-first-run"]
_START_S = 60


class NoBrowserError(Exception):
    """There is none, or it does not start here."""


class Browser:
    """One page of a browser."""

    def __init__(self, socket: aiohttp.ClientWebSocketResponse) -> None:
        self._socket = socket
        self._calls = itertools.count(1)
        self._answers: dict[int, asyncio.Future[dict[str, Any]]] = {}
        self.complaints: list[str] = []
        """Errors and warnings of the page since it was opened: exceptions, console, loading, security policy."""
        self.requested: list[str] = []
        """Every address that the page asked for."""

    async def listen(self) -> None:
        """Read what the browser says until it closes."""
        async for message in self._socket:
            told = json.loads(message.data)
            if "id" in told:
                self._answers.pop(told["id"]).set_result(told)
            elif told["method"] == "Runtime.exceptionThrown":
                self.complaints.append(str(told["params"]["exceptionDetails"]))
            elif told["method"] == "Log.entryAdded" and told["params"]["entry"]["level"] in {"error", "warning"}:
                self.complaints.append(str(told["params"]["entry"]))
            elif told["method"] == "Runtime.consoleAPICalled" and told["params"]["type"] in {"error", "warning"}:
                self.complaints.append(str(told["params"]["args"]))
            elif told["method"] == "Network.requestWillBeSent":
                self.requested.append(told["params"]["request"]["url"])

    async def call(self, method: str, **params: Any) -> dict[str, Any]:
        """Call a method of the DevTools protocol."""
        call = next(self._calls)
        answer = self._answers[call] = asyncio.get_running_loop().create_future()
        await self._socket.send_json({"id": call, "method": method, "params": params})
        async with asyncio.timeout(30):
            told = await answer
        assert "error" not in told, told
        return dict(told["result"])

    async def open(self, url: str, *, width: int = 1440, height: int = 900, phone: bool = False) -> None:
        """Load a page in a viewport of this size, as new: nothing stored, dark colour scheme."""
        await self.call("Page.navigate", url="about:blank")
        for domain in ("Page", "Runtime", "Log", "Network"):
            await self.call(f"{domain}.enable")
        await self.media("dark")
        await self.call(
            "Emulation.setDeviceMetricsOverride",
            width=width,
            height=height,
            deviceScaleFactor=2 if phone else 1,
            mobile=phone,
        )
        await self.call("Log.clear")
        self.complaints.clear()
        self.requested.clear()
        await self.call("Page.navigate", url=url)
        await self.until("document.readyState === 'complete' && location.href !== 'about:blank'")

    async def media(self, scheme: str) -> None:
        """Emulate a colour scheme."""
        await self.call("Emulation.setEmulatedMedia", features=[{"name": "prefers-color-scheme", "value": scheme}])

    async def evaluate(self, expression: str) -> Any:
        """Return the value of an expression (or of the promise that it is) in the page."""
        told = await self.call("Runtime.evaluate", expression=expression, awaitPromise=True, returnByValue=True)
        assert "exceptionDetails" not in told, told
        return told["result"].get("value")

    async def until(self, expression: str, timeout_s: float = 30) -> Any:
        """Wait until an expression is true in the page, and return its value."""
        value = None
        try:
            async with asyncio.timeout(timeout_s):
                while not (value := await self.evaluate(expression)):  # noqa: ASYNC110 - there is no event
                    await asyncio.sleep(0.05)
        except TimeoutError:
            text = await self.evaluate("document.body.innerText")
            raise AssertionError(f"never true: {expression}\n{self.complaints}\n{text[:2000]}") from None
        return value

    async def text(self, selector: str) -> str:
        """Return the text of an element."""
        return str(await self.evaluate(f"document.querySelector({json.dumps(selector)}).innerText"))

    async def type(self, text: str) -> None:
        """Type into what has the focus."""
        await self.call("Input.insertText", text=text)

    async def press(self, key: str, **more: Any) -> None:
        """Press and release a key."""
        text = {"text": key} if len(key) == 1 else {}
        await self.call("Input.dispatchKeyEvent", type="keyDown", key=key, **text, **more)
        await self.call("Input.dispatchKeyEvent", type="keyUp", key=key, **more)

    async def screenshot(self) -> bytes:
        """Return what the viewport shows, as PNG."""
        told = await self.call("Page.captureScreenshot", format="png")
        return base64.b64decode(told["data"])


def _command(port: int, folder: Path) -> tuple[list[str], dict[str, str]]:
    if importlib.util.find_spec("PySide6") and importlib.util.find_spec("PySide6.QtWebEngineWidgets"):
        settings = {
            "QT_QPA_PLATFORM": "offscreen",
            "QTWEBENGINE_DISABLE_SANDBOX": "1",  # which root cannot have
            "QTWEBENGINE_REMOTE_DEBUGGING": f"127.0.0.1:{port}",
            "QTWEBENGINE_CHROMIUM_FLAGS": " ".join(_FLAGS),
        }
        return [sys.executable, "-c", _QT], settings
    for name in ("chromium", "chromium-browser", "google-chrome"):
        if found := shutil.which(name):
            flags = [*_FLAGS, "--headless", "--no-sandbox", f"--user-data-dir={folder}", "about:blank"]
            return [found, f"--remote-debugging-port={port}", *flags], {}
    raise NoBrowserError("no browser: neither PySide6-WebEngine (the dev extra) nor a system Chromium is installed")


@contextlib.asynccontextmanager
async def browser(folder: Path) -> AsyncIterator[Browser]:
    """Start a browser, and end it with everything that it started.

    Raises
    ------
    NoBrowserError
        There is none, or it does not start.
    """
    port = free_port()
    command, settings = _command(port, folder)
    log = folder / "browser.log"
    with log.open("wb") as output:
        process = await asyncio.create_subprocess_exec(
            *command,
            env=os.environ | settings,
            stdin=asyncio.subprocess.PIPE,
            stdout=output,
            stderr=output,
            start_new_session=True,
        )
    try:
        async with aiohttp.ClientSession() as http:
            address = await _address(http, port, process, log)
            async with http.ws_connect(address, max_msg_size=0) as socket:
                page = Browser(socket)
                listener = asyncio.create_task(page.listen())
                yield page
                listener.cancel()
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, 9)
        await process.wait()


async def _address(http: aiohttp.ClientSession, port: int, process: Any, log: Path) -> str:
    with contextlib.suppress(TimeoutError):
        async with asyncio.timeout(_START_S):
            while process.returncode is None:
                with contextlib.suppress(aiohttp.ClientError):
                    async with http.get(f"http://127.0.0.1:{port}/json/list") as reply:
                        for target in await reply.json(content_type=None):
                            if target["type"] == "page":
                                return str(target["webSocketDebuggerUrl"])
                await asyncio.sleep(0.1)
    said = await asyncio.to_thread(log.read_text, errors="replace")
    raise NoBrowserError(f"the browser does not start: {said.strip()[-500:]}")
