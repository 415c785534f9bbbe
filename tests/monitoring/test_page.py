"""The dashboard's script against what /events says: it names nothing that is not there.

How it looks in a browser is tests/monitoring/test_dashboard.py's matter, which needs one.
"""

from __future__ import annotations

import json
import re
from importlib import resources
from typing import Any

import pytest
import trio
from support.worker_rig import running_worker
from trio.testing import MockClock

from trio_worker.core.memory import DegradationStep, Pressure
from trio_worker.core.sequence import Stage
from trio_worker.monitoring.event_feed import EventFeed

PAGE = resources.files("trio_worker.monitoring").joinpath("page")
SCRIPT = PAGE.joinpath("dashboard.js").read_text(encoding="utf-8")
HTML = PAGE.joinpath("index.html").read_text(encoding="utf-8")
STYLE = PAGE.joinpath("style.css").read_text(encoding="utf-8")

Said = dict[str, Any]


async def told() -> tuple[Said, Said]:
    """The two events of a worker with requests in flight, as the page reads them."""
    async with running_worker() as rig, trio.open_nursery() as nursery:
        nursery.start_soon(lambda: rig.ask(prompt="x", max_tokens=1000))
        await trio.sleep(1)
        feed = EventFeed(rig.observed)
        feed.sample()
        events = (feed.history(), feed.event())
        nursery.cancel_scope.cancel()
    history, state = (
        json.loads(event.decode().split("\ndata: ")[1].removesuffix("\n\n")) for event in events
    )
    return history, state


def named_in(state: Said, history: Said) -> Said:
    """What each name of the script stands for."""
    snapshot = state["snapshot"]
    (request,) = state["in_flight"]
    percentiles = snapshot["requests"]["time_to_first_token_ms"]
    return {
        **snapshot,
        "snapshot": snapshot,
        "state": state,
        "history": history,
        "live": state["live"],
        "ready": state["ready"],
        "request": request,
        "member": state["fleet"][0],
        "a": request,
        "b": request,
        "first": percentiles,
        "gap": percentiles,
    }


async def test_every_field_that_the_script_reads_is_told(autojump_clock: MockClock) -> None:
    history, state = await told()
    named = named_in(state, history)
    read = re.findall(rf"(?<![\w.\"])({'|'.join(named)})((?:\.\w+)+)", SCRIPT)
    assert len(read) > 80
    for name, path in read:
        value = named[name]
        for field in path[1:].split("."):
            # A mapping or a list of values: what follows is the language's.
            if isinstance(value, dict) and value.keys() >= {field}:
                value = value[field]
            else:
                assert field in {"length", "map", "includes"}, f"{name}{path}"
                assert isinstance(value, dict | list), f"{name}{path}"
                break


async def test_every_name_that_the_script_takes_out_of_another_is_there(
    autojump_clock: MockClock,
) -> None:
    history, state = await told()
    named = named_in(state, history)
    named["resources.limits"] = state["snapshot"]["resources"]["limits"]
    taken = re.findall(r"const \{([^}]*)\} = ([\w.]+);", SCRIPT)
    taken += [(names, "state") for names in re.findall(r"function show\w+\(\{([^}]*)\}\)", SCRIPT)]
    assert len(taken) >= 9
    for names, source in taken:
        for name in names.split(","):
            assert name.partition(":")[0].strip() in named[source], f"{name} of {source}"


async def test_every_chart_draws_what_is_sampled(autojump_clock: MockClock) -> None:
    history, state = await told()
    keys = {
        key
        for keys in re.findall(r"keys: \[([^\]]*)\]", SCRIPT)
        for key in re.findall(r'"(\w+)"', keys)
    }
    assert len(keys) == 7
    assert keys | {"at"} <= state["sample"].keys()
    assert state["sample"].keys() == history["samples"][-1].keys()


@pytest.mark.parametrize(
    ("name", "values"),
    [
        ("STEPS", [step.value for step in DegradationStep]),
        (
            "STAGES",
            ["waiting", "tokenising", "queued", "prefill", "decode", "resuming", "ended"],
        ),
    ],
)
def test_the_script_knows_the_same_values_in_the_same_order(name: str, values: list[str]) -> None:
    (listed,) = re.findall(rf"const {name} = \[([^\]]*)\]", SCRIPT)
    assert re.findall(r'"([\w ]+)"', listed) == values


def test_the_script_knows_every_stage_pressure_and_state() -> None:
    (stages,) = re.findall(r"const STAGES = \[([^\]]*)\]", SCRIPT)
    assert set(re.findall(r'"([\w ]+)"', stages)) == set(Stage)
    (tones,) = re.findall(r"const tones = \{([^}]*)\}", SCRIPT)
    assert set(re.findall(r"(\w+):", tones)) == set(Pressure)
    (engine,) = re.findall(r"const ENGINE_TONES = \{([^}]*)\}", SCRIPT)
    assert set(re.findall(r"(\w+):", engine)) == {"ready", "loading", "restarting", "stopped"}


def test_every_element_and_colour_of_the_script_is_on_the_page() -> None:
    ids = set(re.findall(r'id="([\w-]+)"', HTML))
    used = set(re.findall(r'\b(?:at|text|figure|terms)\(\s*"([\w-]+)"', SCRIPT))
    used |= set(re.findall(r'\bid: "([\w-]+)"', SCRIPT))
    assert len(used) > 30
    assert used <= ids
    colours = set(re.findall(r'colour\("(--[\w-]+)"\)', SCRIPT))
    assert colours
    assert colours <= set(re.findall(r"(--[\w-]+):", STYLE))


def test_the_script_listens_to_the_events_that_are_sent() -> None:
    heard = set(re.findall(r'addEventListener\("(history|state|\w+)", \(event\)', SCRIPT))
    assert heard == {"history", "state"}
