"""The page to talk to the model in a real Chromium, before a server that a test scripts."""

from __future__ import annotations

import contextlib
from collections.abc import AsyncIterator, Iterator
from dataclasses import dataclass

import pytest
from selenium import webdriver

from support.browser import Browser, start_browser
from support.ports import free_port
from support.scripted_openai import Exchange, ScriptedOpenAI, scripted_openai

LAST = ".answer:last-child"


@pytest.fixture(name="window", scope="module")
def window_fixture(tmp_path_factory: pytest.TempPathFactory) -> Iterator[webdriver.Chrome]:
    """One browser for a module: each test has a port, so an origin and its storage, of its own."""
    driver = start_browser(tmp_path_factory.mktemp("browser"))
    yield driver
    driver.quit()


@dataclass
class Talk:
    browser: Browser
    server: ScriptedOpenAI

    async def write(self, text: str) -> None:
        await self.browser.click("#prompt")
        await self.browser.write(text)

    async def ask(self, text: str) -> Exchange:
        await self.write(text)
        await self.browser.press("Enter")
        return await self.server.asked()

    async def ask_and_hear(self, text: str, *answer: str) -> Exchange:
        """A question with a whole answer."""
        exchange = await self.ask(text)
        await exchange.answer(*answer)
        await self.until_idle()
        return exchange

    async def until_idle(self) -> None:
        await self.browser.until("document.getElementById('stop').hidden")

    async def until_shows(self, text: str, selector: str = f"{LAST} > .prose") -> None:
        node = f"document.querySelector({selector!r})"
        await self.browser.until(f"{node} && {node}.innerText.includes({text!r})")

    async def text(self, selector: str) -> str:
        """What is seen there; nothing where there is nothing."""
        script = "return document.querySelector(arguments[0])?.innerText ?? ''"
        return str(await self.browser.run(script, selector))

    async def texts(self, selector: str) -> list[str]:
        script = "return [...document.querySelectorAll(arguments[0])].map((n) => n.innerText)"
        found: list[str] = await self.browser.run(script, selector)
        return found

    async def state(self) -> str:
        """Of the last answer."""
        script = f"return document.querySelector('{LAST}').dataset.state"
        return str(await self.browser.run(script))

    async def press(self, label: str, within: str = "body") -> None:
        """The button with this label, and the last one if there are several."""
        script = (
            "[...document.querySelectorAll(`${arguments[1]} button`)]"
            ".filter((each) => each.innerText === arguments[0]).at(-1).click()"
        )
        await self.browser.run(script, label, within)

    async def reload(self) -> None:
        await self.browser.open(self.server.url)
        await self.until_loaded()

    async def until_loaded(self) -> None:
        """Until it has heard of the models, or why not."""
        await self.browser.until(
            "document.getElementById('model').value"
            " || !document.getElementById('key-form').hidden"
            " || document.getElementById('model').innerText === 'no model is served'"
        )


@contextlib.asynccontextmanager
async def talking(window: webdriver.Chrome, *, key: str | None = None) -> AsyncIterator[Talk]:
    """The page on a desktop's screen; what its console says of us is an error."""
    browser = Browser(window)
    async with scripted_openai(free_port()) as server:
        server.key = key
        await browser.emulate("setEmulatedMedia", features=[])
        await browser.resize(1280, 800)
        await browser.open(server.url)
        await browser.complaints()
        talk = Talk(browser, server)
        await talk.until_loaded()
        yield talk
        # A status that a test has scripted is written there, too.
        said = [
            line for line in await browser.complaints() if "responded with a status" not in line
        ]
        assert said == []
        assert server.strangers == []
        script = "return performance.getEntriesByType('resource').map((each) => each.name)"
        assert all(each.startswith(server.url) for each in await browser.run(script))
