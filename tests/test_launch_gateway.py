"""From the configuration to a gateway: what its process is told, and what a stop means when."""

from __future__ import annotations

from pathlib import Path

import msgspec
import pytest
import trio
from support.worker_rig import make_config

from trio_worker.errors import ConfigError
from trio_worker.launch_gateway import Hello, _Course, gateway_beside

EVERYTHING = (
    *("gateway.port=0", "gateway.cors_origins=[https://chat.example]", "gateway.attempts=3"),
    *("nats.user=u", "nats.password=a-secret", "nats.tls.ca_file=ca.pem"),
    *("worker.simulated.turn_ms=0.5", "worker.request_queue.aging_ms=null"),
)


def test_the_process_beside_a_worker_is_told_the_whole_configuration_in_one_line() -> None:
    """As it was checked: nothing is read again, and so nothing is found to be different."""
    config = make_config(*EVERYTHING)
    gateway = gateway_beside(config, log_level="debug")
    assert gateway is not None
    line = gateway._settings.hello
    assert line.count(b"\n") == 1
    assert msgspec.json.decode(line, type=Hello) == Hello(config=config, log_level="debug")


def test_without_a_port_there_is_no_gateway_beside_a_worker() -> None:
    assert gateway_beside(make_config("gateway.keys_file=nowhere"), log_level="info") is None


def test_a_wrong_file_of_keys_is_found_before_anything_is_started(tmp_path: Path) -> None:
    keys = tmp_path / "keys"
    keys.write_text("app a-key-and-no-hash\n")
    config = make_config("gateway.port=0", f"gateway.keys_file={keys}")
    with pytest.raises(ConfigError, match="line 1"):
        gateway_beside(config, log_level="info")


async def test_a_stop_before_anybody_can_connect_ends_the_run() -> None:
    course = _Course()
    with course.run:
        course.stop()
        await trio.sleep_forever()
    assert course.run.cancelled_caught
    assert not course.drain.is_begun


async def test_the_first_stop_begins_the_drain_and_the_second_one_ends_it() -> None:
    course = _Course(is_serving=True)
    with course.run:
        course.stop()
        assert course.drain.is_begun
        await trio.lowlevel.checkpoint()
        course.stop()
        await trio.sleep_forever()
    assert course.run.cancelled_caught
