"""What the gateway's process writes is said as the worker's own."""

from __future__ import annotations

import json

import pytest
from support.log_records import logged

from trio_worker.supervisor.gateway_log import relay


def test_a_line_has_its_level_and_what_was_bound_to_it() -> None:
    with logged("DEBUG") as records:
        relay(json.dumps({"time": "…", "level": "debug", "message": "{x}", "request_id": "r1"}))
    (record,) = records
    assert (record["level"].name, record["message"]) == ("DEBUG", "gateway: {x}")
    assert record["extra"] == {"request_id": "r1"}


def test_a_traceback_comes_below_its_line() -> None:
    with logged("DEBUG") as records:
        relay(json.dumps({"level": "critical", "message": "broken", "exception": "Trace\n  x\n"}))
    (record,) = records
    assert record["level"].name == "CRITICAL"
    assert record["message"] == "gateway: broken\nTrace\n  x"


@pytest.mark.parametrize("line", ["ImportError: no <x> {here}", "[1]", "{", '"text"'])
def test_what_is_none_of_ours_is_a_warning(line: str) -> None:
    with logged("DEBUG") as records:
        relay(f"{line}\r")
        relay("  ")
    (record,) = records
    assert (record["level"].name, record["message"]) == ("WARNING", f"gateway: {line}")


def test_a_level_that_is_none_is_a_warning() -> None:
    with logged("DEBUG") as records:
        relay('{"level": "loud", "message": "x"}')
    assert records[0]["level"].name == "WARNING"
