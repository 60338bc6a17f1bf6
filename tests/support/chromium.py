"""A headless Chromium, spoken to by its DevTools protocol; it comes with no package of Python's."""

from __future__ import annotations

import asyncio
import base64
import itertools
import json
import os
import shutil
import signal
import subprocess
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import aiohttp

NAMES = ("chromium", "chromium-browser", "google-chrome")
SILENT = ("--disable-background-networking", "--disable-component-update", "--disable-sync", "--no-first-run")
OPTIONS = ("--headless=new", "--no-sandbox", "--disable-gpu", "--remote-debugging-port=0", *SILENT)


def chromium() -> str | None:
    """The program, None where there is none."""
    return next((found for name in NAMES if (found := shutil.which(name))), None)


class Tab:
    """A page of a browser."""

    def __init__(self, socket: aiohttp.ClientWebSocketResponse) -> None:
        self._socket, self._numbers = socket, itertools.count(1)

    async def send(self, method: str, **parameters: Any) -> dict[str, Any]:
        """Give a command of the protocol; its result."""
        number = next(self._numbers)
        await self._socket.send_json({"id": number, "method": method, "params": parameters})
        while (found := json.loads((await self._socket.receive()).data)).get("id") != number:
            pass
        assert "result" in found, found
        return dict(found["result"])

    async def value(self, expression: str) -> Any:
        """What an expression of JavaScript comes to."""
        found = await self.send("Runtime.evaluate", expression=expression, returnByValue=True, awaitPromise=True)
        return found["result"].get("value")

    async def until(self, expression: str, timeout_s: float = 60) -> Any:
        """Wait until an expression is true; what it comes to. Where it never is, the text of the page is in the error."""
        try:
            return await _wait(lambda: self.value(expression), timeout_s)
        except AssertionError as error:
            shown = await self.value("document.location.href + '\\n' + document.body.innerText")
            raise AssertionError(f"{expression} never came true; there was {shown}") from error

    async def open(self, url: str) -> None:
        """Go to a page."""
        await self.send("Page.navigate", url=url)
        await self.until("document.readyState == 'complete'")

    async def shows(self, *texts: str) -> None:
        """Wait until the page shows all of some texts."""
        for text in texts:
            await self.until(f"document.body.innerText.includes({json.dumps(text)})")

    async def click(self, text: str, selector: str = "a, button, [role=tab], [role=menuitem], td, span, label") -> None:
        """Click the innermost element of a selector that shows a text, once there is one; some heed the press alone."""
        fits = (
            f"[...document.querySelectorAll({json.dumps(selector)})].filter(e => e.innerText?.trim() == {json.dumps(text)})"
        )
        press = "e.dispatchEvent(new MouseEvent('mousedown', {bubbles: true, button: 0}))"
        await self.until(f"(e => e && ({press}, e.click(), true))({fits}.filter(e => e.offsetWidth).at(-1))")

    async def picture(self, file: Path) -> None:
        """Keep what the screen shows."""
        shown = await self.send("Page.captureScreenshot")
        file.write_bytes(base64.b64decode(shown["data"]))

    async def middle(self, place: str) -> tuple[float, float]:
        """Where an element is."""
        await self.until(f"document.readyState == 'complete' && !!document.querySelector('{place}')")
        x, y = await self.value(
            f"(b => [b.x + b.width / 2, b.y + b.height / 2])(document.querySelector('{place}').getBoundingClientRect())"
        )
        return float(x), float(y)


@asynccontextmanager
async def browser(
    folder: Path, size: tuple[int, int] = (900, 700), headers: Mapping[str, str] | None = None
) -> AsyncIterator[Tab]:
    """A browser of its own, which keeps its files in `folder`.

    Args:
        headers: that it sends with each request, such as an account.
    """
    program = chromium()
    assert program
    folder.mkdir(exist_ok=True)
    (folder / "profile" / "DevToolsActivePort").unlink(missing_ok=True)  # of an earlier one
    with (folder / "chromium.log").open("wb") as log:
        command = [
            program,
            *OPTIONS,
            f"--window-size={size[0]},{size[1]}",
            f"--user-data-dir={folder}/profile",
            "about:blank",
        ]
        process = subprocess.Popen(command, stdout=log, stderr=log, start_new_session=True)
    try:
        port = await _wait(lambda: _port(folder / "profile" / "DevToolsActivePort"))
        async with aiohttp.ClientSession() as session:

            async def page() -> str | None:
                async with session.get(f"http://127.0.0.1:{port}/json") as answer:
                    return next((t["webSocketDebuggerUrl"] for t in await answer.json() if t["type"] == "page"), None)

            async with session.ws_connect(await _wait(page), max_msg_size=0) as socket:
                tab = Tab(socket)
                if headers:
                    await tab.send("Network.enable")
                    await tab.send("Network.setExtraHTTPHeaders", headers=dict(headers))
                yield tab
    finally:
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()


def drop_file(url: str, file: str, place: str, until: str, folder: Path) -> Any:
    """Open `url`, drop `file` on the element `place`, and wait until the expression `until` is true.

    Returns:
        What it came to; the screen is then in `folder/page.png`.
    """
    return asyncio.run(_drop(url, file, place, until, folder))


async def _drop(url: str, file: str, place: str, until: str, folder: Path) -> Any:
    async with browser(folder) as tab:
        await tab.open(url)
        x, y = await tab.middle(place)
        data = {"items": [], "files": [file], "dragOperationsMask": 1}
        for kind in ("dragEnter", "dragOver", "drop"):
            await tab.send("Input.dispatchDragEvent", type=kind, x=x, y=y, data=data)
        found = await tab.until(until)
        await tab.picture(folder / "page.png")
        return found


async def _port(file: Path) -> str | None:
    return file.read_text().splitlines()[0] if file.exists() and file.read_text() else None


async def _wait(condition: Callable[[], Awaitable[Any]], timeout_s: float = 60) -> Any:
    end = time.monotonic() + timeout_s
    while not (found := await condition()):
        assert time.monotonic() < end, f"it never came to that in {timeout_s:g} s"
        await asyncio.sleep(0.1)
    return found
