"""Where a server listens, and how it is called."""

from __future__ import annotations

import pytest
import trio

from trio_worker.errors import ConfigError
from trio_worker.http.listening import PortTaken, address_of, open_listeners


@pytest.mark.parametrize(
    ("host", "shown"),
    [
        ("127.0.0.1", "127.0.0.1"),
        ("localhost", "localhost"),
        ("0.0.0.0", "127.0.0.1"),
        ("::", "[::1]"),
        ("::1", "[::1]"),
    ],
)
async def test_an_address_can_be_called_as_it_is_shown(host: str, shown: str) -> None:
    (listener,) = await trio.open_tcp_listeners(0, host="127.0.0.1")
    async with listener:
        port = listener.socket.getsockname()[1]
        assert address_of(host, [listener]) == f"http://{shown}:{port}"


async def test_a_port_that_somebody_has_is_told_from_other_mistakes() -> None:
    """It may be free again; a host that is none stays one."""
    (listener,) = await trio.open_tcp_listeners(0, host="127.0.0.1")
    async with listener:
        with pytest.raises(PortTaken, match=r"x\.port: .* is taken"):
            await open_listeners("127.0.0.1", listener.socket.getsockname()[1], section="x")
    with pytest.raises(ConfigError) as error:
        await open_listeners("203.0.113.1", 0, section="x")
    assert not isinstance(error.value, PortTaken)
