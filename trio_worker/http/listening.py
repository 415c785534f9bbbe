"""Opening the port of a server, with errors that name the keys which say where it is."""

from __future__ import annotations

import errno
import socket
from collections.abc import Sequence

import trio

from trio_worker.errors import ConfigError


class PortTaken(ConfigError):
    """Somebody else listens there, now."""


async def open_listeners(host: str, port: int, *, section: str) -> list[trio.SocketListener]:
    """Listen on every address of `host`; on one alone if `port` is 0, which is any free port.

    `section` is where the configuration has the two, such as `cluster.worker.monitoring`.

    Raises:
        PortTaken: if somebody else listens there.
        ConfigError: if the address cannot be listened on for another reason.
    """
    try:
        listeners = await trio.open_tcp_listeners(port, host=host)
    except (socket.gaierror, UnicodeError) as error:
        raise ConfigError(f"{section}.host: {host!r} is not the name of an address") from error
    except OSError as error:
        reasons = {
            errno.EADDRINUSE: f"{port} is taken on {host}",
            errno.EACCES: f"{port} needs rights that this process does not have",
        }
        # Trio wraps the errors of several addresses into one without a number.
        number = error.errno or getattr(error.__cause__, "errno", None)
        if number in reasons:
            kind = PortTaken if number == errno.EADDRINUSE else ConfigError
            raise kind(
                f"{section}.port: {reasons[number]}; "
                "choose another one, 0 for any free one, or null for none"
            ) from error
        raise ConfigError(
            f"{section}.host: cannot listen on {host!r}: {error.strerror or error}"
        ) from error
    # A name with two addresses would get two different ports.
    if port == 0:
        for listener in listeners[1:]:
            listener.socket.close()
        del listeners[1:]
    return listeners


def address_of(host: str, listeners: Sequence[trio.SocketListener]) -> str:
    """The address to call a server at that listens on `host`, such as http://127.0.0.1:8000."""
    port: int = listeners[0].socket.getsockname()[1]
    # What stands for every address of a machine is none to call.
    callable_host = {"0.0.0.0": "127.0.0.1", "::": "::1"}.get(host, host)  # noqa: S104 - named
    return f"http://{f'[{callable_host}]' if ':' in callable_host else callable_host}:{port}"
