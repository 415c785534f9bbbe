# ruff: noqa: INP001 - not a package: mkdocs loads this file
"""What mkdocs is to look at in every page that it builds; a warning ends a strict build."""

from __future__ import annotations

import logging
import re

LOG = logging.getLogger("mkdocs.hooks.site")

LOADED = re.compile(
    r"<(?:script|link|img|iframe|source)\b[^>]*?\b(?:src|href)=[\"']?((?:https?:)?//[^\"'\s>]+)"
)
"""What a browser fetches to show a page; links that a reader may follow are not among it."""


def foreign(html: str) -> list[str]:
    """What a page loads from elsewhere when it is read."""
    return LOADED.findall(html)


def on_post_page(output: str, *, page: object, config: object) -> str:  # noqa: ARG001
    """Called by mkdocs with each page as it will be written."""
    for address in foreign(output):
        LOG.warning("%s loads %s when it is read", page, address)
    return output
