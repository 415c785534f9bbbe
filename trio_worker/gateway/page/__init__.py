"""The page to talk to the model: its files, their addresses, and the headers they are sent with.

It is plain HTML, CSS and JavaScript modules, served as they lie here. It asks nothing but
`v1/models` and `v1/chat/completions` of its own origin, which the browser is told to enforce.
"""

from __future__ import annotations

from collections.abc import Mapping
from importlib import resources
from types import MappingProxyType

HEADERS: Mapping[str, str] = MappingProxyType(
    {
        "Cache-Control": "no-cache",
        "Content-Security-Policy": (
            "default-src 'none'; script-src 'self'; style-src 'self'; connect-src 'self'; "
            "img-src 'self' data:; base-uri 'none'; form-action 'none'; frame-ancestors 'none'; "
            "require-trusted-types-for 'script'; trusted-types 'none'"
        ),
        "Referrer-Policy": "no-referrer",
        "X-Content-Type-Options": "nosniff",
    }
)
"""Of every file. With no trusted type there is no way from a text to markup at all."""

_TYPES = {
    "html": "text/html; charset=utf-8",
    "js": "text/javascript; charset=utf-8",
    "css": "text/css; charset=utf-8",
    "svg": "image/svg+xml",
}


def page_files() -> Mapping[str, tuple[str, bytes]]:
    """Content type and content of each file, by its path: `/` is the page, the rest `/page/…`."""
    return {
        "/" if part.name == "index.html" else f"/page/{part.name}": (
            _TYPES[suffix],
            part.read_bytes(),
        )
        for part in resources.files(__name__).iterdir()
        if (suffix := part.name.rpartition(".")[2]) in _TYPES
    }
