"""What the page makes of Markdown, and of what only looks like it, in a real Chromium."""

from __future__ import annotations

import pytest
from selenium import webdriver
from support.page_rig import LAST, Talk, talking, window_fixture  # noqa: F401 - a fixture

pytestmark = pytest.mark.browser

DRAW = """
const { draw } = await import('/page/markdown.js');
const host = document.createElement('div');
"""


def link(address: str, label: str) -> str:
    kept = 'rel="noopener noreferrer nofollow" target="_blank"'
    return f'<a href="{address}" {kept} title="{address}">{label}</a>'


def code(language: str, text: str) -> str:
    copy = '<button class="copy" type="button">Copy</button>'
    bar = f'<div class="bar"><span class="language">{language}</span>{copy}</div>'
    pre = f'<pre tabindex="0"><code>{text}</code></pre>'
    return f'<div class="code" data-language="{language}">{bar}{pre}</div>'


def items(*contents: str, tag: str = "ul", how: str = ' class="tight"') -> str:
    name = tag.partition(" ")[0]
    return f"<{name}{how}>{''.join(f'<li>{each}</li>' for each in contents)}</{name}>"


TABLE = (
    '<div class="table" tabindex="0"><table>'
    '<thead><tr><th class="middle">a</th><th class="end">b</th></tr></thead>'
    '<tbody><tr><td class="middle"><code>x</code></td><td class="end">1</td></tr>'
    '<tr><td class="middle">only</td><td class="end"></td></tr></tbody></table></div>'
)
NESTED = items("<p>a</p>" + items("<p>b</p>" + items("<p>c</p>")), "<p>d</p>", tag="ol")
WRITTEN = [
    # Markdown, and the markup of what is drawn
    ("one\ntwo\n\nthree", "<p>one\ntwo</p><p>three</p>"),
    ("a *b* **c** ~~d~~", "<p>a <em>b</em> <strong>c</strong> <del>d</del></p>"),
    ("***a*** b", "<p><strong><em>a</em></strong> b</p>"),
    ("**a *b* c** and _d_", "<p><strong>a <em>b</em> c</strong> and <em>d</em></p>"),
    ("a snake_case_name", "<p>a snake_case_name</p>"),
    ("2 * 3 * 4, a * b, **open", "<p>2 * 3 * 4, a * b, **open</p>"),
    ("**open *and* this", "<p>**open <em>and</em> this</p>"),
    (r"\*plain\* \_too\_", "<p>*plain* _too_</p>"),
    ("`a *b*` ``c ` d`` `open", "<p><code>a *b*</code> <code>c ` d</code> `open</p>"),
    ("# One\n### Three ###", '<h3 class="h1">One</h3><h5 class="h3">Three</h5>'),
    ("####### seven", "<p>####### seven</p>"),
    ("a\n\n---\n\nb", "<p>a</p><hr><p>b</p>"),
    (
        "> a\n> > b\n\nc",
        "<blockquote><p>a</p><blockquote><p>b</p></blockquote></blockquote><p>c</p>",
    ),
    ("so:\n- a\n- b", "<p>so:</p>" + items("<p>a</p>", "<p>b</p>")),
    ("- a\n\n- b", items("<p>a</p>", "<p>b</p>", how="")),
    (
        "3. a\n   more\n4. b",
        items("<p>a\nmore</p>", "<p>b</p>", tag="ol", how=' class="tight" start="3"'),
    ),
    ("1. a\n  - b\n    - c\n2. d", NESTED),
    ("1. a\n   * b\n     * c\n2. d", NESTED),
    ("- a\n\tb\n\nend", items("<p>a\nb</p>") + "<p>end</p>"),
    ('[a *b*](https://x.org/p?q=1 "t").', f"<p>{link('https://x.org/p?q=1', 'a <em>b</em>')}.</p>"),
    (
        "(see https://x.org/a_b_c.)",
        f"<p>(see {link('https://x.org/a_b_c', 'https://x.org/a_b_c')}.)</p>",
    ),
    ("| a | b |\n|:-:|--:|\n| `x` | 1 |\n| only |\n\nend", f"{TABLE}<p>end</p>"),
    ("a | b\nno table", "<p>a | b\nno table</p>"),
]
FENCED = [
    ("```python\na = '*b*'\n\n\tc\n```\nend", code("python", "a = '*b*'\n\n\tc") + "<p>end</p>"),
    ("~~~\n```\n~~~", code("", "```")),
    ("````\n```\nstill\n````", code("", "```\nstill")),
    ("```\nnot closed", code("", "not closed")),
    ("- a\n  ```\n  b\n    c\n  ```", items("<p>a</p>" + code("", "b\n  c"))),
]
HOSTILE = [
    "<script>window.hacked = 1</script>",
    "<img src=x onerror='window.hacked = 1'>",
    "<svg onload=window.hacked=1><style>*{display:none}</style>",
    "<iframe srcdoc='<script>parent.hacked=1</script>'></iframe>",
    "<a href='javascript:window.hacked=1'>x</a>",
    "[x](javascript:window.hacked=1)",
    "[x](JaVaScRiPt:window.hacked=1)",
    "[x](data:text/html,<script>1</script>)",
    "[x](vbscript:x)",
    "[x](/v1/models)",
    "[x](\tjavascript:window.hacked=1)",
    "![x](file:///etc/passwd)",
    "```<script>\nx\n```",
    '```"><img/src=x/onerror=hacked=1>\n</code></pre><script>window.hacked=1</script>\n```',
    "| <b>a</b> | b |\n|-|-|\n| <i onclick=hacked=1>c</i> | d |",
    "&lt;script&gt; &amp; &#60;b&#62;",
    "<p style='position:fixed;inset:0'>over it all</p>",
]
LARGE = 100_000
PATHOLOGICAL = [
    *("*", "_", "~", "`", "[", "](", "<", ">", "> ", "#", "|", "-", "- ", "\\", "!", "\t", " "),
    *("*a ", "a* ", "**a *b ", "_a*b ", "`a ``b ", "[a](", "[a](b", "![", "https://", "http://)"),
    *("- a\n", "  - a\n", "> a\n", "1. a\n\n", "|a|b|\n|-|-|\n", "# a\n", "```\n", "---\n", "a\n"),
    *("|-", "|- ", ":-:|", "- - ", "x ", "h", "***", "*_", "* a\n\t* b\n"),
]


async def drawn(talk: Talk, text: str) -> str:
    script = DRAW + "draw(host, given[0]); return host.innerHTML"
    return str(await talk.browser.run_async(script, text))


async def test_markdown_is_drawn(window: webdriver.Chrome) -> None:
    async with talking(window) as talk:
        for text, markup in [*WRITTEN, *FENCED]:
            assert await drawn(talk, text) == markup, text


async def test_what_grows_comes_to_the_same_and_keeps_what_stands(window: webdriver.Chrome) -> None:
    script = (
        DRAW
        + """
    for (let end = 1; end <= given[0].length; end += 1) draw(host, given[0].slice(0, end));
    const first = host.firstChild;
    draw(host, given[0] + ' and more');
    return [host.firstChild === first, host.innerHTML];
    """
    )
    text = "\n\n".join(text for text, _ in [*WRITTEN, *FENCED[:3]])
    async with talking(window) as talk:
        kept, markup = await talk.browser.run_async(script, text)
        assert kept
        assert markup == await drawn(talk, text + " and more")


async def test_code_that_grows_stays_where_it_is(window: webdriver.Chrome) -> None:
    script = (
        DRAW
        + """
    draw(host, '```js\\na');
    const node = host.firstChild;
    draw(host, '```js\\na\\nb\\n```');
    return [host.firstChild === node, host.querySelector('code').textContent];
    """
    )
    async with talking(window) as talk:
        assert await talk.browser.run_async(script) == [True, "a\nb"]


async def test_a_hostile_answer_is_text(window: webdriver.Chrome) -> None:
    async with talking(window) as talk:
        answer = "\n\n".join(HOSTILE)
        await talk.ask_and_hear("x", answer, "\n\n![pixel](https://tracker.invalid/x.png?secret)")
        tags, attributes, addresses, hacked = await talk.browser.run(
            "const all = [...document.querySelectorAll('.answer .prose *')];"
            "return [all.map((each) => each.localName), "
            "all.flatMap((each) => each.getAttributeNames()), "
            "all.map((each) => each.href).filter(Boolean), 'hacked' in window]"
        )
        assert not hacked
        assert set(tags) <= {
            *("a", "button", "code", "div", "p", "pre", "span"),
            *("table", "tbody", "td", "th", "thead", "tr"),
        }
        assert set(attributes) <= {
            *("class", "data-language", "href", "rel", "tabindex", "target", "title", "type")
        }
        assert addresses == ["https://tracker.invalid/x.png?secret"]
        shown = await talk.text(f"{LAST} > .prose")
        for line in HOSTILE[:7]:
            assert line in shown
        assert HOSTILE[-2] in shown


@pytest.mark.parametrize("piece", PATHOLOGICAL)
async def test_no_text_takes_long(window: webdriver.Chrome, piece: str) -> None:
    script = (
        DRAW
        + """
    const begun = performance.now();
    draw(host, given[0]);
    return [performance.now() - begun, host.innerText.length];
    """
    )
    text = (piece * LARGE)[:LARGE]
    async with talking(window) as talk:
        took_ms, _ = await talk.browser.run_async(script, text)
        assert took_ms < 3000, took_ms
