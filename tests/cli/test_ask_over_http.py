"""What is said about HTTP after the hello; that it works as printed is tested with a worker."""

from __future__ import annotations

from support.worker_rig import make_config

from trio_worker.cli.ask_over_http import how_to_ask_over_http


def test_where_the_port_is_taken_one_line_says_how_to_choose_another() -> None:
    said = how_to_ask_over_http(make_config("gateway.port=8000"), None)
    assert said.splitlines() == [
        "Port 8000 is taken; OpenAI's API on another one: uv run just run --set gateway.port=8001"
    ]


def test_a_key_is_asked_for_only_where_there_are_keys() -> None:
    address = "http://127.0.0.1:8000"
    without = how_to_ask_over_http(make_config("gateway.port=8000"), address)
    assert "KEY" not in without
    assert "The key" not in without
    with_keys = make_config("gateway.port=8000", "gateway.keys_file=/etc/keys")
    said = how_to_ask_over_http(with_keys, address)
    assert '-H "Authorization: Bearer $KEY"' in said
    assert "/etc/keys" in said
