"""From which page a call comes: what keeps other people's pages from asking in a user's name.

A page that a user looks at can send requests to this machine. It is kept from it by three things: a
request must be JSON, which a browser sends to another origin only after having asked; the answer to
that question is no unless the origin is listed; and a name that somebody points at this machine
(DNS rebinding) is none that this machine is called by. Names of headers are in lower case.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from trio_worker.config.hosts import is_loopback
from trio_worker.gateway.errors import Refusal, Refused

ANY_ORIGIN = "*"
EXPOSED = (
    *("x-request-id", "x-worker-id", "x-ignored-fields"),
    *("retry-after", "retry-after-ms", "x-should-retry"),
)
"""The headers of replies that a page may read."""
_ASKED_AGAIN_AFTER_S = 600
"""How long a browser may remember what it may do."""
_NAME_IN_CONTAINERS = "host.docker.internal"
"""What containers call this machine; like localhost, nobody can point it elsewhere."""


def require_own_name(headers: Mapping[str, str]) -> None:
    """For a server on a loopback address. Raises `Refused` if it is called by another name."""
    name = _without_port(headers.get("host", ""))
    if name.lower() != _NAME_IN_CONTAINERS and not is_loopback(name):
        raise Refused(
            Refusal.HOST_NOT_ALLOWED,
            "this server listens on this machine alone, and is called by another name; "
            "use localhost, or let it listen on the address that you mean, with keys",
        )


def require_json(headers: Mapping[str, str]) -> None:
    """Raises `Refused` if the body is not said to be JSON."""
    content_type = headers.get("content-type", "").partition(";")[0].strip().lower()
    if content_type != "application/json":
        raise Refused(
            Refusal.UNSUPPORTED_MEDIA_TYPE,
            "the body is taken as Content-Type: application/json only",
        )


def require_own_page(headers: Mapping[str, str], *, origins: Sequence[str]) -> None:
    """For calls that a browser lets any page make, such as with a form. Raises `Refused`.

    Programs say no origin, and a page of this very server may.
    """
    origin = headers.get("origin")
    if origin is None or origin.partition("://")[2] == headers.get("host"):
        return
    if _allowed_origin(headers, origins) is None:
        raise Refused(
            Refusal.HOST_NOT_ALLOWED,
            "pages of this origin may not call here; list it in gateway.cors_origins",
        )


def cors_headers(headers: Mapping[str, str], *, origins: Sequence[str]) -> dict[str, str]:
    """What lets a page of one of `origins` read the reply; nothing for a call from elsewhere."""
    if not origins:
        return {}
    allowed = _allowed_origin(headers, origins)
    if allowed is None:
        return {"vary": "Origin"}
    return {
        "access-control-allow-origin": allowed,
        "access-control-expose-headers": ", ".join(EXPOSED),
        "vary": "Origin",
    }


def preflight_headers(headers: Mapping[str, str], *, origins: Sequence[str]) -> dict[str, str]:
    """The answer to a browser that asks what a page may send; without permission if nothing.

    The headers asked for are echoed, since `*` does not cover Authorization.
    """
    granted = cors_headers(headers, origins=origins)
    if "access-control-allow-origin" not in granted:
        return granted
    granted["access-control-allow-methods"] = "GET, POST, DELETE"
    granted["access-control-max-age"] = str(_ASKED_AGAIN_AFTER_S)
    granted["vary"] = "Origin, Access-Control-Request-Headers"
    if asked := headers.get("access-control-request-headers"):
        granted["access-control-allow-headers"] = asked
    if headers.get("access-control-request-private-network") == "true":
        granted["access-control-allow-private-network"] = "true"
    return granted


def _allowed_origin(headers: Mapping[str, str], origins: Sequence[str]) -> str | None:
    origin = headers.get("origin")
    if origin is None:
        return None
    if ANY_ORIGIN in origins:
        return ANY_ORIGIN
    return origin if origin.lower() in {each.lower().rstrip("/") for each in origins} else None


def _without_port(host: str) -> str:
    if host.startswith("["):
        return host.partition("]")[0].removeprefix("[")
    return host.partition(":")[0]
