"""The page to talk to the model in a real Chromium, before a server that does what can go wrong."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import trio
from selenium import webdriver
from support.commands import until
from support.page_rig import LAST, Talk, talking, window_fixture  # noqa: F401 - a fixture
from support.scripted_openai import WRONG_KEY, Exchange, chunk

pytestmark = pytest.mark.browser

FIGURES = f"{LAST} .figures"
ERROR = f"{LAST} .error"
BACKGROUND = "return getComputedStyle(document.documentElement).backgroundColor"


# --- an answer -----------------------------------------------------------------------------


async def test_an_answer_is_seen_as_it_comes_and_its_figures_after_it(
    window: webdriver.Chrome,
) -> None:
    async with talking(window) as talk:
        exchange = await talk.ask("What is h11?")
        assert exchange.body == {
            "model": "tiny",
            "messages": [{"role": "user", "content": "What is h11?"}],
            "stream": True,
            "stream_options": {"include_usage": True},
        }
        assert "authorization" not in exchange.headers
        await exchange.begin()
        await exchange.event(chunk({"role": "assistant", "content": ""}))
        await talk.until_shows("waiting", FIGURES)
        await exchange.say("A **li", "brary**")
        await talk.until_shows("A library")
        assert await talk.state() == "answering"
        busy = f"return document.querySelector('{LAST} > .prose').getAttribute('aria-busy')"
        live = f"return document.querySelector('{LAST} > .prose').getAttribute('aria-live')"
        assert await talk.browser.run(busy) == "true"
        assert await talk.browser.run(live) == "polite"
        await exchange.say(" of HTTP")
        await exchange.finish(tokens=1234)
        await talk.until_idle()
        assert await talk.state() == "whole"
        assert await talk.browser.run(busy) == "false"
        assert await talk.text(f"{LAST} > .prose") == "A library of HTTP"
        figures = await talk.texts(f"{FIGURES} span")
        assert figures[0] == "1,234 tokens"
        assert figures[1].endswith(" tokens/s")
        assert figures[2].startswith("first after ")
        assert figures[3] == "tiny"
        second = await talk.ask("And h2?")
        assert second.body["messages"][1:] == [
            {"role": "assistant", "content": "A **library** of HTTP"},
            {"role": "user", "content": "And h2?"},
        ]
        await second.answer("Another.")
        await talk.until_idle()


async def test_comments_keep_alives_and_pieces_cut_anywhere_do_not_show(
    window: webdriver.Chrome,
) -> None:
    async with talking(window) as talk:
        exchange = await talk.ask("x")
        await exchange.begin()
        await exchange.write(": a comment\n\nid: 1\nevent: message\n\n")
        await exchange.event(chunk({}))
        text = json.dumps(chunk({"content": "Grüße 🙂"}), ensure_ascii=False)
        for byte in f"data:{text}\r\n\r\n".encode():
            await exchange.write(bytes([byte]))
        await exchange.finish()
        await talk.until_idle()
        assert await talk.state() == "whole"
        assert await talk.text(f"{LAST} > .prose") == "Grüße 🙂"


async def test_what_a_model_thinks_is_apart_and_not_sent_again(window: webdriver.Chrome) -> None:
    async with talking(window) as talk:
        exchange = await talk.ask("x")
        await exchange.begin()
        await exchange.event(chunk({"reasoning_content": "Hmm."}))
        await exchange.say("Yes.")
        await exchange.finish()
        await talk.until_idle()
        assert await talk.text(f"{LAST} > .prose") == "Yes."
        assert await talk.text(f"{LAST} summary") == "Thoughts"
        exchange = await talk.ask("y")
        assert "Hmm." not in json.dumps(exchange.body)
        await exchange.answer("z")
        await talk.until_idle()


async def test_what_a_model_calls_is_seen_as_it_comes_and_not_sent_again(
    window: webdriver.Chrome,
) -> None:
    def call(index: int, **function: str) -> dict[str, Any]:
        return chunk({"tool_calls": [{"index": index, "function": function}]})

    async with talking(window) as talk:
        exchange = await talk.ask("x")
        await exchange.begin()
        await exchange.event(call(0, name="look", arguments=""))
        await exchange.event(call(0, arguments='{"at":'))
        await talk.until_shows('look({"at":)', f"{LAST} > .calls")
        await exchange.event(call(0, arguments="1}"))
        await exchange.event(call(1, name="<b>", arguments="{}"))
        await exchange.finish("tool_calls")
        await talk.until_idle()
        assert await talk.text(f"{LAST} > .calls") == 'look({"at":1})\n<b>({})'
        assert "calls tools" in await talk.text(FIGURES)
        await talk.reload()
        await talk.until_shows('look({"at":1})', f"{LAST} > .calls")
        exchange = await talk.ask("y")
        assert exchange.body["messages"] == [{"role": "user", "content": "x\n\ny"}]
        await exchange.answer("z")
        await talk.until_idle()
        assert not await talk.text(f"{LAST} > .calls")


async def test_an_answer_at_its_limit_says_so(window: webdriver.Chrome) -> None:
    async with talking(window) as talk:
        exchange = await talk.ask("x")
        await exchange.begin()
        await exchange.say("and then")
        await exchange.finish("length")
        await talk.until_idle()
        assert "cut off at the token limit" in await talk.text(FIGURES)


# --- stopping ------------------------------------------------------------------------------


@pytest.mark.parametrize("how", ["Escape", "button", "before a word"])
async def test_an_answer_that_is_stopped_keeps_what_it_has(
    window: webdriver.Chrome, how: str
) -> None:
    async with talking(window) as talk:
        exchange = await talk.ask("x")
        if how != "before a word":
            await exchange.begin()
            await exchange.say("So far")
            await talk.until_shows("So far")
        if how == "button":
            await talk.browser.click("#stop")
        else:
            await talk.browser.press("Escape")
        await exchange.wait_gone()
        await talk.until_idle()
        assert await talk.state() == "stopped"
        assert (await talk.texts(f"{FIGURES} span"))[0] == "stopped"
        assert not await talk.text(ERROR)
        if how == "before a word":
            exchange = await talk.ask("Go on")
            assert exchange.body["messages"] == [{"role": "user", "content": "x\n\nGo on"}]
            await exchange.answer("on")
            await talk.until_idle()
            return
        assert await talk.text(f"{LAST} > .prose") == "So far"
        assert await talk.browser.run("return document.activeElement.id") == "prompt"
        exchange = await talk.ask("Go on")
        assert exchange.body["messages"][1] == {"role": "assistant", "content": "So far"}
        await exchange.answer("and on")
        await talk.until_idle()


# --- what goes wrong -----------------------------------------------------------------------


async def broken_by_an_error(exchange: Exchange) -> None:
    error = {"message": "The worker was lost.", "type": "server_error", "code": "engine_failed"}
    await exchange.event({"error": error})
    await exchange.end()


async def broken_by_its_end(exchange: Exchange) -> None:
    await exchange.end()


async def finished_without_done(exchange: Exchange) -> None:
    await exchange.event(chunk({}, "stop"))
    await exchange.end()


async def done_without_a_reason(exchange: Exchange) -> None:
    await exchange.write("data: [DONE]\n\n")
    await exchange.end()


async def broken_by_a_reset(exchange: Exchange) -> None:
    exchange.cut()


async def broken_by_nonsense(exchange: Exchange) -> None:
    await exchange.write("data: {nonsense\n\n")
    await exchange.end()


@pytest.mark.parametrize(
    ("breaks", "says", "code"),
    [
        (broken_by_an_error, "The worker was lost.", "engine_failed"),
        (broken_by_its_end, "The stream ended before the answer did.", "incomplete_stream"),
        (finished_without_done, "The stream ended before the answer did.", "incomplete_stream"),
        (done_without_a_reason, "The stream ended before the answer did.", "incomplete_stream"),
        (broken_by_a_reset, "The connection was lost", "connection_lost"),
        (broken_by_nonsense, "An event of the stream cannot be read.", "unreadable_event"),
    ],
)
async def test_a_broken_answer_never_looks_whole(
    window: webdriver.Chrome, breaks: Any, says: str, code: str
) -> None:
    async with talking(window) as talk:
        exchange = await talk.ask("x")
        await exchange.begin()
        await exchange.say("So far")
        await talk.until_shows("So far")
        await breaks(exchange)
        await talk.until_idle()
        assert await talk.state() == "broken"
        assert (await talk.texts(f"{FIGURES} span"))[0] == "broken off"
        assert await talk.text(f"{LAST} > .prose") == "So far"
        assert says in await talk.text(ERROR)
        assert code in await talk.text(ERROR)
        await talk.reload()
        assert await talk.state() == "broken"
        assert says in await talk.text(ERROR)


@pytest.mark.parametrize(
    ("status", "content", "headers", "says"),
    [
        (
            429,
            {"message": "The queue is full.", "type": "rate_limit_error", "code": "queue_full"},
            {"Retry_After": "3"},
            ["The queue is full.", "queue_full · status 429 · try again in 3 s"],
        ),
        (400, {"message": "No.", "type": "invalid_request_error", "code": None}, {}, ["No."]),
        (503, "<h1>no worker</h1>", {}, ["<h1>no worker</h1>", "status 503"]),
        (500, "", {}, ["The server answered with status 500."]),
        (200, "a page", {}, ["a page", "status 200"]),
    ],
)
async def test_a_refusal_is_shown_in_the_servers_own_words(
    window: webdriver.Chrome, status: int, content: Any, headers: dict[str, str], says: list[str]
) -> None:
    async with talking(window) as talk:
        exchange = await talk.ask("x")
        await exchange.refuse(status, content, **headers)
        await talk.until_idle()
        for words in says:
            assert words in await talk.text(ERROR)
        assert (await talk.texts(f"{FIGURES} span"))[0] == "failed"
        await talk.press("Retry", LAST)
        exchange = await talk.server.asked()
        assert exchange.body["messages"] == [{"role": "user", "content": "x"}]
        await exchange.answer("Now.")
        await talk.until_idle()
        assert not await talk.text(ERROR)
        assert await talk.state() == "whole"


async def test_a_model_that_is_gone_is_said_to_be_gone(window: webdriver.Chrome) -> None:
    async with talking(window) as talk:
        exchange = await talk.ask("x")
        talk.server.models = ["other"]
        await exchange.refuse(404, {"message": "Nobody serves tiny.", "code": "model_not_found"})
        await talk.until_shows("tiny (not served)", "#model")
        await talk.browser.run(
            "const model = document.getElementById('model'); model.value = 'other';"
            "model.dispatchEvent(new Event('change'))"
        )
        await talk.press("Retry", LAST)
        exchange = await talk.server.asked()
        assert exchange.body["model"] == "other"
        await exchange.answer("Yes.")
        await talk.until_idle()


# --- going back ----------------------------------------------------------------------------


async def test_an_earlier_message_is_edited_and_the_talk_goes_on_from_there(
    window: webdriver.Chrome,
) -> None:
    async with talking(window) as talk:
        await talk.ask_and_hear("one", "1")
        await talk.ask_and_hear("two", "2")
        await talk.browser.click(".question button")
        focused = "return document.activeElement.value"
        assert await talk.browser.run(focused) == "one"
        await talk.browser.press("Escape")
        assert await talk.texts(".question .text") == ["one", "two"]
        assert await talk.browser.run("return document.activeElement.innerText") == "Edit"
        await talk.browser.press("Enter")
        await talk.browser.write(" more")
        await talk.browser.press("Enter")
        exchange = await talk.server.asked()
        (message,) = exchange.body["messages"]
        assert sorted(message["content"].split()) == ["more", "one"]
        await exchange.answer("3")
        await talk.until_idle()
        assert len(await talk.texts(".question .text")) == 1
        assert await talk.texts(".answer > .prose") == ["3"]


async def test_an_answer_in_the_middle_is_tried_again(window: webdriver.Chrome) -> None:
    async with talking(window) as talk:
        await talk.ask_and_hear("one", "1")
        await talk.ask_and_hear("two", "2")
        await talk.press("Retry", ".answer:nth-child(2)")
        exchange = await talk.server.asked()
        assert exchange.body["messages"] == [{"role": "user", "content": "one"}]
        can = "return [...document.querySelectorAll('.asks')].some((each) => !each.disabled)"
        assert not await talk.browser.run(can)
        await exchange.answer("1, again")
        await talk.until_idle()
        assert await talk.texts(".answer > .prose") == ["1, again"]
        assert await talk.browser.run(can)


# --- conversations -------------------------------------------------------------------------


async def test_conversations_are_kept_and_one_goes_on_while_another_is_shown(
    window: webdriver.Chrome,
) -> None:
    titles = "#conversation-list .title"
    async with talking(window) as talk:
        exchange = await talk.ask("The first")
        await exchange.begin()
        await exchange.say("one")
        await talk.until_shows("one")
        await talk.browser.click("#new")
        assert await talk.texts("article") == []
        await talk.ask_and_hear("The second", "two")
        await exchange.say(" more")
        await exchange.finish()
        await talk.browser.until("!document.body.innerText.includes('answering')")
        assert sorted(await talk.texts(titles)) == ["The first", "The second"]
        await talk.reload()
        assert await talk.text(f"{LAST} > .prose") == "two"
        await talk.browser.run(
            "[...document.querySelectorAll('.conversation')]"
            ".find((each) => each.innerText.includes('The first')).click()"
        )
        assert await talk.text(f"{LAST} > .prose") == "one more"
        assert await talk.state() == "whole"

        await talk.browser.click("#settings-open")
        await talk.browser.click("#delete")
        assert await talk.texts(titles) == ["The second"]
        assert "“The first” was deleted." in await talk.text("#notice")
        await talk.browser.click("#notice-action")
        assert await talk.texts(titles) == ["The first", "The second"]
        assert await talk.text(f"{LAST} > .prose") == "one more"


async def test_what_is_deleted_during_its_answer_does_not_come_back(
    window: webdriver.Chrome,
) -> None:
    async with talking(window) as talk:
        exchange = await talk.ask("x")
        await exchange.begin()
        await exchange.say("a")
        await talk.until_shows("a")
        await talk.browser.click("#settings-open")
        await talk.browser.click("#delete")
        await exchange.wait_gone()
        await talk.browser.until(
            "document.getElementById('progress').innerText.startsWith('stopped')"
        )
        assert await talk.texts("#conversation-list .title") == []
        await talk.reload()
        assert await talk.texts("article") == []


async def test_what_another_tab_writes_is_seen(window: webdriver.Chrome) -> None:
    """As far as one window can tell: the browser's event is made by hand."""
    async with talking(window) as talk:
        await talk.ask_and_hear("here", "1")
        await talk.browser.run(OLD, 1, 1)
        await talk.browser.run(
            "const key = Object.keys(localStorage)"
            ".find((each) => localStorage[each].includes('here'));"
            "const other = JSON.parse(localStorage[key]); other.changed += 1;"
            "other.messages.push({ role: 'user', content: 'there' });"
            "localStorage[key] = JSON.stringify(other);"
            "window.dispatchEvent(new StorageEvent('storage', { key }))"
        )
        assert await talk.texts(".question .text") == ["here", "there"]
        assert await talk.texts("#conversation-list .title") == ["here", "old 0 x"]


async def test_an_answer_whose_page_was_left_is_not_whole(window: webdriver.Chrome) -> None:
    async with talking(window) as talk:
        exchange = await talk.ask("x")
        await exchange.begin()
        await exchange.say("So far")
        await talk.until_shows("So far")
        await talk.reload()
        await exchange.wait_gone()
        assert await talk.text(f"{LAST} > .prose") == "So far"
        assert await talk.state() == "broken"
        assert "The page was left during the answer." in await talk.text(ERROR)


async def test_a_conversation_is_exported(window: webdriver.Chrome, tmp_path: Path) -> None:
    async with talking(window) as talk:
        window.execute_cdp_cmd(
            "Browser.setDownloadBehavior", {"behavior": "allow", "downloadPath": str(tmp_path)}
        )
        await talk.ask_and_hear("Über: Trio?", "Yes.")
        await talk.browser.click("#settings-open")
        await talk.browser.click("#export")
        file = tmp_path / "über-trio.json"

        async def saved() -> bool:
            return file.exists()

        await until(saved, within_s=15)
        content = json.loads(file.read_text(encoding="utf-8"))
        question, answer = content["messages"]
        assert content["title"] == "Über: Trio?"
        assert question == {"role": "user", "content": "Über: Trio?"}
        assert (answer["role"], answer["content"], answer["state"]) == (
            "assistant",
            "Yes.",
            "whole",
        )
        assert answer["tokens"] == 7


OLD = """
for (let at = 0; at < arguments[0]; at += 1) {
  const messages = [{ role: "user", content: `old ${at} ` + "x".repeat(arguments[1]) }];
  localStorage.setItem(`trio-worker.conversation.${at}`,
    JSON.stringify({ id: String(at), changed: at, model: "", system: "", sampling: {}, messages }));
}
localStorage.setItem("trio-worker.conversation.odd", "{not ours");
"""


@pytest.mark.parametrize(("count", "chars", "gone"), [(100, 10, 1), (39, 101_000, 1)])
async def test_the_oldest_conversation_goes_with_a_word(
    window: webdriver.Chrome, count: int, chars: int, gone: int
) -> None:
    async with talking(window) as talk:
        await talk.browser.run(OLD, count, chars)
        await talk.reload()
        await talk.ask_and_hear("new", "y" * 100_000 if chars > 1000 else "y")
        assert "the oldest was forgotten: “old 0 x" in await talk.text("#notice")
        titles = await talk.texts("#conversation-list .title")
        assert len(titles) == count + 1 - gone
        assert titles[0] == "new"


async def test_a_browser_that_keeps_nothing_can_be_talked_in(window: webdriver.Chrome) -> None:
    refuse = "Object.defineProperty(window, 'localStorage', { get() { throw new Error('no'); } })"
    script = window.execute_cdp_cmd("Page.addScriptToEvaluateOnNewDocument", {"source": refuse})
    try:
        async with talking(window) as talk:
            await talk.ask_and_hear("x", "y")
            assert await talk.text(f"{LAST} > .prose") == "y"
            assert "cannot keep this conversation" in await talk.text("#notice")
    finally:
        window.execute_cdp_cmd("Page.removeScriptToEvaluateOnNewDocument", script)


# --- settings and the key ------------------------------------------------------------------


async def test_what_is_set_is_sent_and_what_is_not_is_left_to_the_server(
    window: webdriver.Chrome,
) -> None:
    async with talking(window) as talk:
        await talk.browser.click("#settings-open")
        for field, value in (("system", "Be brief."), ("temperature", "0.5"), ("seed", "42")):
            await talk.browser.click(f"#{field}")
            await talk.browser.write(value)
        await talk.browser.press("Escape")
        exchange = await talk.ask_and_hear("x", "y")
        assert exchange.body["messages"][0] == {"role": "system", "content": "Be brief."}
        assert (exchange.body["temperature"], exchange.body["seed"]) == (0.5, 42)
        assert not exchange.body.keys() & {"top_p", "max_tokens"}
        await talk.reload()
        assert await talk.browser.run("return document.getElementById('seed').value") == "42"

        await talk.browser.click("#settings-open")
        await talk.browser.click("#top_p")
        await talk.browser.write("7")
        await talk.browser.press("Escape")
        await talk.write("z")
        await talk.browser.press("Enter")
        assert await talk.browser.run("return document.activeElement.id") == "top_p"
        assert await talk.browser.run("return document.getElementById('prompt').value") == "z"
        assert talk.server.asked_nothing()


async def test_a_key_is_asked_for_where_one_is_needed_and_not_kept_for_long(
    window: webdriver.Chrome,
) -> None:
    async with talking(window, key="secret-key") as talk:
        assert WRONG_KEY["message"] in await talk.text("#key-why")
        for key in ("wrong", "secret-key"):
            await talk.browser.click("#key")
            await talk.browser.write(key)
            await talk.browser.press("Enter")
            if key == "wrong":
                await talk.browser.until("!document.getElementById('key-form').hidden")
                await talk.browser.until("!document.getElementById('key').value")
        await talk.browser.until("document.getElementById('model').value === 'tiny'")
        exchange = await talk.ask_and_hear("x", "y")
        assert exchange.headers["authorization"] == "Bearer secret-key"
        kept = (
            "return [JSON.stringify(localStorage), JSON.stringify(sessionStorage), location.href]"
        )
        lasting, passing, address = await talk.browser.run(kept)
        assert "secret-key" not in lasting + address
        assert "secret-key" in passing


async def test_a_question_that_was_refused_for_its_key_is_asked_again(
    window: webdriver.Chrome,
) -> None:
    async with talking(window) as talk:
        talk.server.key = "late"
        await talk.write("x")
        await talk.browser.press("Enter")
        await talk.browser.until("!document.getElementById('key-form').hidden")
        assert "invalid_api_key · status 401" in await talk.text(ERROR)
        await talk.browser.click("#key")
        await talk.browser.write("late")
        await talk.browser.press("Enter")
        exchange = await talk.server.asked()
        assert exchange.body["messages"] == [{"role": "user", "content": "x"}]
        await exchange.answer("y")
        await talk.until_idle()


# --- the page ------------------------------------------------------------------------------


async def test_the_keyboard_is_enough(window: webdriver.Chrome) -> None:
    focus = "return document.activeElement.id || document.activeElement.className"
    async with talking(window) as talk:
        await talk.browser.run("document.querySelector('.skip').focus()")
        visited = []
        for _ in range(5):
            await talk.browser.press("Tab")
            visited.append(await talk.browser.run(focus))
        assert visited == ["new", "model", "look", "settings-open", "prompt"]
        await talk.browser.write("one")
        await talk.browser.press("Enter", shift=True)
        await talk.browser.write("two")
        composing = (
            "document.activeElement.dispatchEvent(new KeyboardEvent('keydown',"
            "{ key: 'Enter', isComposing: true, bubbles: true, cancelable: true }))"
        )
        await talk.browser.run(composing)
        assert talk.server.asked_nothing()
        await talk.browser.press("Enter")
        exchange = await talk.server.asked()
        assert exchange.body["messages"] == [{"role": "user", "content": "one\ntwo"}]
        await exchange.begin()
        await exchange.say("a")
        await talk.until_shows("a")
        await talk.browser.run("document.getElementById('settings-open').focus()")
        await talk.browser.press("Enter")
        await talk.browser.until("document.querySelector('#settings:popover-open')")
        await talk.browser.press("Escape")
        await talk.browser.until("!document.querySelector('#settings:popover-open')")
        assert await talk.state() == "answering"
        outline = "return getComputedStyle(document.activeElement).outlineStyle"
        assert await talk.browser.run(outline) == "solid"
        await exchange.finish()
        await talk.until_idle()


async def test_the_page_follows_only_a_reader_at_the_end(window: webdriver.Chrome) -> None:
    away = (
        "const s = document.getElementById('scroller');"
        "return s.scrollHeight - s.scrollTop - s.clientHeight"
    )
    async with talking(window) as talk:
        exchange = await talk.ask("x")
        await exchange.begin()
        for line in range(80):
            await exchange.say(f"line {line}\n\n")
        await talk.until_shows("line 79")
        await talk.browser.until("document.getElementById('latest').hidden")
        assert await talk.browser.run(away) < 2
        await talk.browser.run("document.getElementById('scroller').scrollTop = 200")
        await talk.browser.until("!document.getElementById('latest').hidden")
        await exchange.say("\n\n".join(f"more {line}" for line in range(40)))
        await talk.until_shows("more 39")
        assert await talk.browser.run("return document.getElementById('scroller').scrollTop") == 200
        await talk.browser.click("#latest")
        await talk.browser.until("document.getElementById('latest').hidden")
        await exchange.say("\n\nthe end")
        await talk.until_shows("the end")
        assert await talk.browser.run(away) < 2
        await exchange.finish()
        await talk.until_idle()
        assert await talk.browser.run(away) < 2
        # Moved by its own growth, before that is known.
        await talk.browser.run(
            "document.getElementById('thread').style.minHeight = '9000px';"
            "document.getElementById('scroller').scrollTop -= 10"
        )
        await talk.browser.until(f"(() => {{ {away} }})() < 2")
        at_end = f"(() => {{ {away} }})() < 2"
        for width in (360, 1280, 700):
            await talk.browser.resize(width, 740)
            await talk.browser.until(f"innerWidth === {width} && {at_end}")
            assert await talk.browser.run("return document.getElementById('latest').hidden")


async def test_nothing_jumps_while_an_answer_comes(window: webdriver.Chrome) -> None:
    watch = (
        "window.jumps = []; new PerformanceObserver((list) => window.jumps.push("
        "...list.getEntries().map((each) => each.value))).observe({ type: 'layout-shift' })"
    )
    places = (
        "return ['composer', 'conversations', 'model'].map((id) => "
        "Object.values(document.getElementById(id).getBoundingClientRect().toJSON()))"
    )
    async with talking(window) as talk:
        exchange = await talk.ask("x")
        await exchange.begin()
        await exchange.say("One.\n\n")
        await talk.until_shows("One.")
        await talk.browser.run(watch)
        before = await talk.browser.run(places)
        text = "## Two\n\n- a\n- b\n\n```\ncode\n```\n\nAnd **so** on, `x`, and so forth.\n\n" * 4
        for start in range(0, len(text), 7):
            await exchange.say(text[start : start + 7])
        await exchange.finish()
        await talk.until_idle()
        assert await talk.browser.run(places) == before
        # Of the window: what is written is pushed up by what comes, and the line below it down.
        assert max([0, *await talk.browser.run("return window.jumps")]) < 0.1


@pytest.mark.parametrize("width", [360, 768, 1920])
async def test_nothing_is_wider_than_the_window(window: webdriver.Chrome, width: int) -> None:
    async with talking(window) as talk:
        await talk.browser.resize(width, 740)
        text = f"{'wide' * 200}\n\n```\n{'wide ' * 100}\n```\n\n|{'a|' * 40}\n|{'-|' * 40}\n"
        await talk.ask_and_hear("long" * 200, text)
        for scroller in ("documentElement", "querySelector('#scroller')"):
            wide = f"const n = document.{scroller}; return n.scrollWidth - n.clientWidth"
            assert await talk.browser.run(wide) <= 0
        await talk.browser.click("#settings-open")
        right = "return document.getElementById('settings').getBoundingClientRect().right"
        assert await talk.browser.run(right) <= width
        await talk.browser.press("Escape")
        shelf = "return document.getElementById('conversation-list').checkVisibility()"
        if width == 360:
            assert not await talk.browser.run(shelf)
            await talk.browser.click("header .narrow")
            assert await talk.browser.run(shelf)
            await talk.browser.click(".conversation")
            await talk.browser.until("!document.querySelector(':popover-open')")


async def test_it_is_dark_by_the_system_and_by_the_switch(window: webdriver.Chrome) -> None:
    async with talking(window) as talk:
        light = await talk.browser.run(BACKGROUND)
        await talk.browser.click("#look")
        dark = await talk.browser.run(BACKGROUND)
        assert dark != light
        await talk.reload()
        assert await talk.browser.run(BACKGROUND) == dark
        await talk.browser.click("#look")
        assert await talk.browser.run(BACKGROUND) == light
        await talk.browser.emulate(
            "setEmulatedMedia", features=[{"name": "prefers-color-scheme", "value": "dark"}]
        )
        await talk.browser.until("document.getElementById('look').ariaPressed === 'true'")
        assert await talk.browser.run(BACKGROUND) == dark
        await talk.browser.click("#look")
        assert await talk.browser.run(BACKGROUND) == light


async def test_code_is_copied(window: webdriver.Chrome) -> None:
    async with talking(window) as talk:
        await talk.ask_and_hear("x", "```py\na = 1\n\tb\n```")
        await talk.browser.click(".copy")
        await talk.browser.until("document.querySelector('.copy').innerText !== 'Copy'")
        assert await talk.text(".copy") == "Copied"
        await talk.browser.run("document.getElementById('prompt').focus()")
        assert await talk.text(".copy") == "Copy"


async def test_the_policy_holds(window: webdriver.Chrome) -> None:
    """A script or a style that got onto the page all the same would not run."""
    async with talking(window) as talk:
        tried = await talk.browser.run(
            "const tries = [() => { const s = document.createElement('script');"
            " s.textContent = 'window.hacked = 1'; document.body.append(s); },"
            " () => { document.body.innerHTML = '<b>x</b>'; }];"
            "return tries.map((each) => { try { each(); return 'done'; }"
            " catch { return 'refused'; } })"
        )
        assert tried == ["refused"] * 2
        assert await talk.browser.run("return window.hacked === undefined")
        assert await talk.browser.complaints() != []


async def test_no_server_is_said(window: webdriver.Chrome) -> None:
    async with talking(window) as talk:
        talk.server.gone = True
        await talk.write("x")
        await talk.browser.press("Enter")
        await talk.until_shows("The gateway cannot be reached.", ERROR)
        assert await talk.state() == "broken"
        talk.server.gone = False
        await talk.press("Retry", LAST)
        with trio.fail_after(15):
            await (await talk.server.asked()).answer("Here.")
        await talk.until_idle()
        assert await talk.text(f"{LAST} > .prose") == "Here."
