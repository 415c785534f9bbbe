"""Other people's pages do not ask in a user's name."""

from __future__ import annotations

import pytest

from trio_worker.config.hosts import is_loopback
from trio_worker.gateway.browsers import (
    cors_headers,
    preflight_headers,
    require_json,
    require_own_name,
)
from trio_worker.gateway.errors import Refusal, Refused

PAGE = "https://chat.example.org"


@pytest.mark.parametrize(
    ("host", "loopback"),
    [
        ("127.0.0.1", True),
        ("127.8.8.8", True),
        ("::1", True),
        ("[::1]", True),
        ("localhost", True),
        ("LocalHost", True),
        ("0.0.0.0", False),
        ("::", False),
        ("192.168.1.2", False),
        ("localhost.example.org", False),
        ("", False),
    ],
)
def test_what_nobody_else_reaches(host: str, *, loopback: bool) -> None:
    assert is_loopback(host) is loopback


@pytest.mark.parametrize(
    "host",
    [
        *("localhost", "localhost:8000", "LOCALHOST:8000", "127.0.0.1:8000", "[::1]:8000", "[::1]"),
        "host.docker.internal:8000",
    ],
)
def test_this_machine_is_called_by_its_own_names(host: str) -> None:
    require_own_name({"host": host})


@pytest.mark.parametrize(
    "host",
    [
        *("evil.example", "evil.example:8000", "localhost.evil.example", "127.0.0.1.evil.example"),
        *("192.168.1.2:8000", "0.0.0.0:8000", "", "[evil", "evil@localhost"),
    ],
)
def test_a_name_that_somebody_points_here_is_refused(host: str) -> None:
    with pytest.raises(Refused) as caught:
        require_own_name({"host": host})
    assert caught.value.code is Refusal.HOST_NOT_ALLOWED


def test_a_call_without_a_name_is_refused() -> None:
    with pytest.raises(Refused):
        require_own_name({})


@pytest.mark.parametrize(
    "content_type",
    [
        "application/json",
        "Application/JSON",
        "application/json; charset=utf-8",
        "application/json;",
    ],
)
def test_json_is_taken(content_type: str) -> None:
    require_json({"content-type": content_type})


@pytest.mark.parametrize(
    "headers",
    [
        {},
        {"content-type": ""},
        {"content-type": "text/plain"},
        {"content-type": "text/plain; x=application/json"},
        {"content-type": "application/x-www-form-urlencoded"},
        {"content-type": "multipart/form-data"},
        {"content-type": "application/jsonp"},
    ],
)
def test_what_any_page_may_send_unasked_is_not_taken(headers: dict[str, str]) -> None:
    with pytest.raises(Refused) as caught:
        require_json(headers)
    assert caught.value.code is Refusal.UNSUPPORTED_MEDIA_TYPE


def test_without_origins_no_page_is_allowed_anything() -> None:
    assert cors_headers({"origin": PAGE}, origins=()) == {}
    assert preflight_headers({"origin": PAGE}, origins=()) == {}


def test_a_listed_origin_may_read_the_reply() -> None:
    headers = cors_headers({"origin": PAGE}, origins=[f"{PAGE}/"])
    assert headers["access-control-allow-origin"] == PAGE
    assert headers["access-control-expose-headers"] == (
        "x-request-id, x-worker-id, x-ignored-fields, retry-after, retry-after-ms, x-should-retry"
    )
    assert headers["vary"] == "Origin"


@pytest.mark.parametrize("origin", ["https://evil.example", f"{PAGE}.evil.example", "null", ""])
def test_another_origin_may_not(origin: str) -> None:
    assert cors_headers({"origin": origin}, origins=[PAGE]) == {"vary": "Origin"}
    assert preflight_headers({"origin": origin}, origins=[PAGE]) == {"vary": "Origin"}
    assert cors_headers({}, origins=[PAGE]) == {"vary": "Origin"}


def test_the_star_lists_every_origin() -> None:
    headers = cors_headers({"origin": PAGE}, origins=["*"])
    assert headers["access-control-allow-origin"] == "*"


def test_what_a_page_asks_to_send_is_granted_by_name() -> None:
    asked = {
        "origin": PAGE,
        "access-control-request-method": "POST",
        "access-control-request-headers": "authorization, content-type, x-stainless-lang",
    }
    headers = preflight_headers(asked, origins=[PAGE])
    assert headers["access-control-allow-headers"] == asked["access-control-request-headers"]
    assert headers["access-control-allow-methods"] == "GET, POST, DELETE"
    assert headers["vary"] == "Origin, Access-Control-Request-Headers"
    assert headers["access-control-max-age"] == "600"
    assert "access-control-allow-private-network" not in headers
    plain = preflight_headers({"origin": PAGE}, origins=[PAGE])
    assert "access-control-allow-headers" not in plain
    asked["access-control-request-private-network"] = "true"
    headers = preflight_headers(asked, origins=[PAGE])
    assert headers["access-control-allow-private-network"] == "true"
