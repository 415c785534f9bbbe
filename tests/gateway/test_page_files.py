"""The files of the page to talk to the model: complete, of one piece, and nothing from elsewhere.

How it behaves in a browser is tests/gateway/test_page_talking.py's matter, which needs one.
"""

from __future__ import annotations

import re

import pytest

from trio_worker.gateway.page import HEADERS, page_files

FILES = {path: content.decode() for path, (_, content) in page_files().items()}
HTML = FILES["/"]
SCRIPTS = {path: text for path, text in FILES.items() if path.endswith(".js")}
CODE = "\n".join(SCRIPTS.values())
STYLE = FILES["/page/chat.css"]


def test_every_file_has_its_address_and_its_type() -> None:
    types = {path: content_type for path, (content_type, _) in page_files().items()}
    assert types["/"] == "text/html; charset=utf-8"
    assert types["/page/chat.css"] == "text/css; charset=utf-8"
    assert types["/page/icon.svg"] == "image/svg+xml"
    assert {types[path] for path in SCRIPTS} == {"text/javascript; charset=utf-8"}
    assert not any("__init__" in path for path in types)


def test_every_file_that_is_named_is_there_and_every_one_is_named() -> None:
    named = {f"/{path}" for path in re.findall(r'(?:href|src)="([^"#]+)"', HTML)}
    named |= {f"/page/{name}" for name in re.findall(r'from "\./([\w.]+)"', CODE)}
    assert named == FILES.keys() - {"/"}


def test_nothing_comes_from_elsewhere() -> None:
    """Addresses of others are only those that name a language."""
    for text in FILES.values():
        found = re.findall(r"(?:https?:)?//[a-z][\w.-]+\.[a-z]{2,}", text)
        assert set(found) <= {"http://www.w3.org"}
    assert set(re.findall(r'reach\("([^"]+)"', CODE)) == {"v1/models", "v1/chat/completions"}
    assert CODE.count("fetch(") == 1


@pytest.mark.parametrize("form", [r"<style", r"\sstyle=", r"\son\w+=", r"<script(?![^>]* src=)"])
def test_nothing_is_inline(form: str) -> None:
    assert not re.search(form, HTML)


def test_no_text_can_become_markup() -> None:
    assert not re.search(r"innerHTML|outerHTML|insertAdjacentHTML|document\.write|\beval\b", CODE)


@pytest.mark.parametrize(
    "directive",
    [
        "default-src 'none'",
        "script-src 'self'",
        "style-src 'self'",
        "connect-src 'self'",
        "img-src 'self' data:",
        "base-uri 'none'",
        "form-action 'none'",
        "frame-ancestors 'none'",
        "require-trusted-types-for 'script'",
        "trusted-types 'none'",
    ],
)
def test_the_browser_is_told_to_allow_nothing_else(directive: str) -> None:
    assert directive in HEADERS["Content-Security-Policy"].split("; ")
    assert "unsafe" not in HEADERS["Content-Security-Policy"]


def test_every_element_of_the_script_is_on_the_page_and_has_one_name() -> None:
    ids = re.findall(r'\bid="([\w-]+)"', HTML)
    assert len(ids) == len(set(ids))
    used = set(re.findall(r'\bat\("([\w-]+)"\)', CODE))
    (sampling,) = re.findall(r"const SAMPLING = \[([^\]]*)\]", CODE)
    used |= set(re.findall(r'"(\w+)"', sampling))
    assert len(used) > 25
    assert used <= set(ids)
    for attribute in ("for", "popovertarget", "aria-labelledby", "aria-describedby"):
        assert set(re.findall(rf'\b{attribute}="([\w-]+)"', HTML)) <= set(ids)


def test_every_colour_that_is_used_is_defined_for_light_and_dark() -> None:
    defined = set(re.findall(r"(--[\w-]+):", STYLE))
    assert set(re.findall(r"var\((--[\w-]+)\)", STYLE)) <= defined
    colours = re.findall(r"#[0-9a-f]{6}\b", STYLE)
    assert len(colours) == 2 * STYLE.count("light-dark(")
