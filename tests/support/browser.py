"""A real Chromium, driven by its own driver."""

from __future__ import annotations

import os
import shutil
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

import pytest
import trio
from selenium import webdriver
from selenium.webdriver.chrome.service import Service
from selenium.webdriver.common.by import By

from support.commands import until

T = TypeVar("T")

SEEN_S = 15
"""Generous: what is shown within two seconds on an idle machine."""
ARGUMENTS = (
    *("--headless=new", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run"),
    *("--disable-background-networking", "--disable-component-update", "--disable-sync"),
    "--disable-dev-shm-usage",
)


def program(*names: str) -> str:
    found = next(filter(None, map(shutil.which, names)), None)
    if found is None:
        pytest.fail(
            f"{names[0]} is not on this machine. These tests need Chromium and its driver: "
            "`apt-get install chromium chromium-driver` on Debian, "
            "`brew install --cask chromium chromedriver` on macOS"
        )
    return found


@dataclass
class Browser:
    """One window. Its calls wait for another process, so they run in threads."""

    driver: webdriver.Chrome

    async def run(self, script: str, *arguments: Any) -> Any:
        return await _in_thread(partial(self.driver.execute_script, script, *arguments))

    async def run_async(self, script: str, *arguments: Any) -> Any:
        """What the script returns, which may await; its arguments are `given`."""
        head = "const done = arguments[arguments.length - 1];"
        call = f"(async (...given) => {{{script}}})(...arguments)"
        whole = f"{head} {call}.then(done, (error) => done(String(error)))"
        return await _in_thread(partial(self.driver.execute_async_script, whole, *arguments))

    async def text(self, element: str) -> str:
        return str(await self.run(f"return document.getElementById('{element}').innerText"))

    async def tone(self, element: str) -> str:
        """Its colour's meaning: `good`, `warn`, `bad`, or nothing."""
        return str(await self.run(f"return document.getElementById('{element}').dataset.tone"))

    async def emulate(self, command: str, **arguments: Any) -> None:
        await _in_thread(
            partial(self.driver.execute_cdp_cmd, f"Emulation.{command}", dict(arguments))
        )

    async def resize(self, width: int, height: int) -> None:
        await self.emulate(
            "setDeviceMetricsOverride",
            width=width,
            height=height,
            deviceScaleFactor=1,
            mobile=width < 600,
        )

    async def press(self, key: str, *, shift: bool = False) -> None:
        codes = {"Tab": 9, "Enter": 13, "Escape": 27}
        for kind in ("keyDown", "keyUp"):
            event = {"type": kind, "key": key, "windowsVirtualKeyCode": codes[key]}
            if shift:
                event["modifiers"] = 8
            if kind == "keyDown" and key == "Enter":
                event["text"] = "\r"
            await _in_thread(partial(self.driver.execute_cdp_cmd, "Input.dispatchKeyEvent", event))

    async def write(self, text: str) -> None:
        """Into what has the focus, as if it was pasted."""
        await _in_thread(partial(self.driver.execute_cdp_cmd, "Input.insertText", {"text": text}))

    async def click(self, selector: str) -> None:
        """Where a pointer would: what is covered or out of sight is an error."""
        await _in_thread(lambda: self.driver.find_element(By.CSS_SELECTOR, selector).click())

    async def open(self, url: str) -> None:
        await _in_thread(partial(self.driver.get, url))

    async def screenshot(self, path: Path) -> None:
        await _in_thread(partial(self.driver.save_screenshot, str(path)))

    async def until(self, expression: str) -> None:
        """Until this expression of JavaScript is true on the page."""

        async def holds() -> bool:
            return bool(await self.run(f"return Boolean({expression})"))

        try:
            await until(holds, within_s=SEEN_S)
        except trio.TooSlowError:
            seen = await self.run("return document.body.innerText")
            pytest.fail(f"never true: {expression}\nthe page says: {seen}")

    async def until_says(self, element: str, holds: Callable[[str], bool]) -> None:
        async def as_wanted() -> bool:
            return holds(await self.text(element))

        await until(as_wanted, within_s=SEEN_S)

    async def complaints(self) -> list[str]:
        """What the console says, but for connections that we cut ourselves."""
        lines: list[dict[str, Any]] = await _in_thread(partial(self.driver.get_log, "browser"))
        return [line["message"] for line in lines if "net::ERR_" not in line["message"]]


async def _in_thread(call: Callable[[], T]) -> T:
    return await trio.to_thread.run_sync(call)


def start_browser(folder: Path) -> webdriver.Chrome:
    """Blocks until there is a window; whoever starts it ends it, by `quit`."""
    options = webdriver.ChromeOptions()
    options.binary_location = program("chromium", "chromium-browser", "google-chrome")
    for argument in (*ARGUMENTS, f"--user-data-dir={folder / 'profile'}"):
        options.add_argument(argument)
    options.set_capability("goog:loggingPrefs", {"browser": "ALL"})
    # With a named driver nothing is looked for, and nothing downloaded.
    service = Service(program("chromedriver"), env={**os.environ, "SE_OFFLINE": "true"})
    return webdriver.Chrome(options=options, service=service)


@asynccontextmanager
async def open_browser(tmp_path: Path, url: str) -> AsyncIterator[Browser]:
    driver = await _in_thread(partial(start_browser, tmp_path))
    try:
        browser = Browser(driver)
        await browser.resize(1280, 1000)
        await browser.open(url)
        yield browser
    finally:
        with trio.CancelScope(shield=True):
            await _in_thread(driver.quit)
