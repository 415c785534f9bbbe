"""The metrics as Prometheus reads them: the official parsers, and the counts of a whole worker."""

from __future__ import annotations

import json
import re
from collections import Counter
from collections.abc import Collection, Iterable
from typing import Any

import pytest
import trio
import yaml
from prometheus_client.openmetrics.parser import (
    text_string_to_metric_families as parse_openmetrics,
)
from prometheus_client.parser import text_string_to_metric_families as parse_plain
from support.paths import DOCS
from support.worker_rig import running_worker
from trio.testing import MockClock

from trio_worker import config
from trio_worker.core.formation import Trigger
from trio_worker.core.memory import DegradationStep
from trio_worker.core.priority import NAMES
from trio_worker.core.sequence import Ending, Stage
from trio_worker.errors import ErrorCode
from trio_worker.monitoring import http_pages, metrics
from trio_worker.monitoring.metrics import (
    CounterMetric,
    GaugeReading,
    HistogramMetric,
    Metrics,
    all_descriptions,
)
from trio_worker.monitoring.observed import Observed
from trio_worker.monitoring.prometheus import exposition

OPENMETRICS = "application/openmetrics-text; version=1.0.0"

DESIGNED = {
    "requests_total": ("outcome", "priority"),
    "requests_in_flight": (),
    "queue_depth": ("priority",),
    "queue_wait_seconds": ("priority",),
    "queue_promotions_total": (),
    "rejections_total": ("code",),
    "cancellations_total": ("source", "stage"),
    "cancel_latency_seconds": (),
    "time_to_first_token_seconds": ("priority",),
    "inter_token_seconds": (),
    "request_seconds": ("outcome",),
    "batch_size": (),
    "batch_formation_seconds": ("trigger",),
    "turn_seconds": (),
    "prompt_tokens_total": (),
    "generated_tokens_total": (),
    "prefix_cache_hit_tokens_total": (),
    "memory_bytes": ("kind",),
    "memory_reserved_bytes": (),
    "memory_pressure": (),
    "degradations_total": ("step",),
    "engine_restarts_total": ("reason",),
    "requests_resumed_total": (),
    "event_loop_lag_seconds": (),
    "build_info": ("version", "worker", "model"),
}


class Written:
    """Something observed that has only what a test writes."""

    def __init__(self, *readings: GaugeReading) -> None:
        self.written = Metrics()
        self._readings = readings

    def metrics(self) -> Iterable[CounterMetric | HistogramMetric | GaugeReading]:
        yield from self.written.written()
        yield from self._readings


def values(observed: Any) -> dict[tuple[str, tuple[tuple[str, str], ...]], float]:
    """Every sample by its name, without the prefix, and its labels."""
    body, content_type = exposition(observed)
    assert content_type.startswith("text/plain")
    return {
        (
            sample.name.removeprefix(metrics.PREFIX),
            tuple(sorted(sample.labels.items())),
        ): sample.value
        for family in parse_plain(body.decode())
        for sample in family.samples
    }


def test_every_metric_of_the_design_exists_with_its_labels() -> None:
    described = {each.name: each.labels for each in all_descriptions()}
    assert {name: described.get(name) for name in DESIGNED} == DESIGNED


def test_every_metric_says_what_it_means_and_fits_its_kind() -> None:
    for each in all_descriptions():
        assert each.meaning.endswith("."), each.name
        assert each.name.endswith("_total") == (each.kind == "counter"), each.name
        assert bool(each.buckets) == (each.kind == "histogram"), each.name
        assert list(each.buckets) == sorted(set(each.buckets)), each.name
        assert all(len(labels) == len(each.labels) for labels in each.starts), each.name


def test_a_histogram_counts_up_to_each_bound() -> None:
    observed = Written()
    for seconds in (0.005, 0.006, 0.4, 99.0):
        observed.written.inter_token.observe(seconds)
    found = values(observed)
    counts = {
        bound: found["inter_token_seconds_bucket", (("le", bound),)]
        for bound in ("0.005", "0.01", "0.5", "10.0", "+Inf")
    }
    assert counts == {"0.005": 1, "0.01": 2, "0.5": 3, "10.0": 3, "+Inf": 4}
    assert found["inter_token_seconds_count", ()] == 4
    assert found["inter_token_seconds_sum", ()] == pytest.approx(99.411)


def test_what_an_alert_watches_is_there_before_it_happens() -> None:
    """The first count of a series that appears with it is no increase to Prometheus."""
    found = values(Written())
    assert found["rejections_total", (("code", "QUEUE_FULL"),)] == 0
    assert found["degradations_total", (("step", "cap_tokens"),)] == 0
    for reason in ("priority", "memory"):
        assert found["preemptions_total", (("reason", reason),)] == 0
    assert found["generated_tokens_total", ()] == 0
    assert found["turn_seconds_count", ()] == 0
    assert found["event_loop_lag_seconds_bucket", (("le", "+Inf"),)] == 0


def test_label_values_may_be_anything_text_can_be() -> None:
    model = 'a "model"\\\nof two lines'
    reading = GaugeReading(description=metrics.BUILD_INFO, values={("1.0", "w1", model): 1})
    labels = (("model", model), ("version", "1.0"), ("worker", "w1"))
    assert values(Written(reading))["build_info", labels] == 1


async def test_a_whole_worker_counts_what_its_callers_saw(autojump_clock: MockClock) -> None:
    async with running_worker(
        "worker.request_queue.max_depth=4", "worker.continuous_batching.max_batch_size=4"
    ) as rig:
        outcomes: Counter[str] = Counter()
        tokens: Counter[str] = Counter()

        async def one(priority: str) -> None:
            reply = await rig.ask(prompt="a b c", max_tokens=5, priority=priority, stream=True)
            outcomes[reply.code] += 1
            if reply.code == "ok":
                tokens["generated"] += reply.usage["completion_tokens"]
                tokens["prompt"] += reply.usage["prompt_tokens"]

        async with trio.open_nursery() as nursery:
            for index in range(12):
                nursery.start_soon(one, ("high", "medium", "low")[index % 3])
        found = values(rig.observed)
        openmetrics, content_type = exposition(rig.observed, OPENMETRICS)
    assert outcomes["QUEUE_FULL"] > 0
    assert outcomes["ok"] + outcomes["QUEUE_FULL"] == 12
    by_outcome: Counter[str] = Counter()
    for (name, labels), value in found.items():
        if name == "requests_total":
            by_outcome[dict(labels)["outcome"]] += int(value)
    assert by_outcome == {"ok": outcomes["ok"]}
    assert found["rejections_total", (("code", "QUEUE_FULL"),)] == outcomes["QUEUE_FULL"]
    assert found["generated_tokens_total", ()] == tokens["generated"]
    assert found["batch_size_sum", ()] == tokens["generated"]
    assert found["prompt_tokens_total", ()] == tokens["prompt"]
    assert found["request_seconds_count", (("outcome", "ok"),)] == outcomes["ok"]
    assert found["requests_in_flight", ()] == 0
    assert found["ready", ()] == 1
    assert content_type.startswith("application/openmetrics-text")
    parsed = parse_openmetrics(openmetrics.decode())  # type: ignore[no-untyped-call]
    families = {family.name for family in parsed}
    assert {each.full_name.removesuffix("_total") for each in all_descriptions()} == families


async def test_every_series_of_a_worker_belongs_to_a_described_metric(
    autojump_clock: MockClock,
) -> None:
    async with running_worker() as rig:
        await rig.ask(prompt="a", max_tokens=3)
        observed: Observed = rig.observed
        read = [each.description.name for each in observed.metrics()]
    assert sorted(read) == [each.name for each in all_descriptions()]


# --- what is written about the metrics elsewhere ------------------------------------------

DESCRIBED = {each.full_name: each for each in all_descriptions()}
FROM_OUTSIDE = {"instance", "job", "le"}
"""Labels that Prometheus puts on, and that of a histogram's buckets."""


def alert_rules() -> list[dict[str, Any]]:
    (group,) = yaml.safe_load((DOCS / "alerts.yaml").read_text())["groups"]
    rules: list[dict[str, Any]] = group["rules"]
    return rules


def grafana() -> Any:
    return json.loads((DOCS / "grafana-dashboard.json").read_text())


def expressions() -> list[str]:
    dashboard = grafana()
    panels = [
        target["expr"] for panel in dashboard["panels"] for target in panel.get("targets", [])
    ]
    notes = [each["expr"] for each in dashboard["annotations"]["list"]]
    return [*panels, *notes, *(rule["expr"] for rule in alert_rules())]


@pytest.mark.parametrize("expression", expressions())
def test_an_expression_names_metrics_and_labels_that_exist(expression: str) -> None:
    named = re.findall(r"trio_worker_\w+", expression)
    assert named or expression.startswith("up{")
    grouped = {
        label.strip()
        for each in re.findall(r"by \(([^)]*)\)", expression)
        for label in each.split(",")
    }
    known = set(FROM_OUTSIDE)
    for name in named:
        plain = re.sub(r"_(bucket|sum|count)\Z", "", name)
        about = DESCRIBED.get(name) or DESCRIBED[plain]
        assert (name != plain) == (about.kind == "histogram"), name
        known |= set(about.labels)
    selected = re.findall(r'[{,]\s*(\w+)(?:=~|!~|!=|=)"([^"]*)"', expression)
    assert {label for label, _ in selected} | grouped <= known
    for label, wanted in selected:
        for value in wanted.split("|"):
            assert label in FROM_OUTSIDE or value in VALUES[label], value


VALUES: dict[str, Collection[str]] = {
    "priority": {*NAMES, *map(str, range(16))},
    "step": set(DegradationStep),
    "source": set(Ending),
    "stage": set(Stage),
    "trigger": set(Trigger),
    "code": {code.value for code in ErrorCode},
    "outcome": {"ok", *(code.value for code in ErrorCode)},
    "reason": {value for (value,) in metrics.ENGINE_RESTARTS.starts},
    "what": set(metrics.JOB_EVENTS),
    "kind": {"used", "engine_active", "engine_cache", "available", "soft", "hard"},
}


def labels_left(expression: str) -> set[str]:
    """The labels that the result of an expression has."""
    grouped = re.findall(r"by \(([^)]*)\)", expression)
    if grouped:
        return {label.strip() for each in grouped for label in each.split(",")} - {"le"}
    if re.match(r"(sum|max|min|avg|count)\(", expression):
        return set()
    # Of two joined by `and` the first is the result.
    name = re.search(r"trio_worker_\w+|up", expression)
    assert name is not None
    about = DESCRIBED.get(name[0])
    return {"instance", "job", *(about.labels if about is not None else ())}


def test_a_legend_and_an_alert_name_labels_that_are_left() -> None:
    legends = [
        (target["expr"], re.findall(r"\{\{(\w+)\}\}", target["legendFormat"]))
        for panel in grafana()["panels"]
        for target in panel.get("targets", [])
    ]
    alerts = [
        (rule["expr"], re.findall(r"\$labels\.(\w+)", str(rule["annotations"])))
        for rule in alert_rules()
    ]
    assert sum(bool(labels) for _, labels in [*legends, *alerts]) > 35
    for expression, labels in [*legends, *alerts]:
        assert set(labels) <= labels_left(expression), expression


def test_the_dashboard_asks_for_the_variables_it_has() -> None:
    variables = {each["name"] for each in grafana()["templating"]["list"]}
    used = set(re.findall(r"\$\{?(\w+)", (DOCS / "grafana-dashboard.json").read_text()))
    assert used == variables | {"__rate_interval", "__all"}


def test_there_is_a_panel_for_every_metric_of_the_design() -> None:
    text = " ".join(expressions())
    for name in set(DESIGNED) - {"build_info"}:
        assert f"{metrics.PREFIX}{name}" in text, name


def test_every_alert_says_what_to_do_and_is_documented() -> None:
    operations = (DOCS / "operations.md").read_text()
    for rule in alert_rules():
        assert rule["labels"]["severity"] in ("warning", "critical")
        assert rule["annotations"]["summary"]
        assert rule["annotations"]["description"]
        assert f"`{rule['alert']}`" in operations


def test_every_metric_and_page_is_documented() -> None:
    """That the list is current is tests/repository/test_docs.py's to check."""
    text = (DOCS / "metrics.md").read_text()
    for name in DESCRIBED:
        assert f"### `{name}`" in text
    operations = (DOCS / "operations.md").read_text()
    for path in http_pages.ENDPOINTS:
        assert f"| `{path}` |" in operations


def test_every_metric_and_key_that_operations_speaks_of_exists() -> None:
    operations = (DOCS / "operations.md").read_text()
    for name in re.findall(r"`(\w+_(?:total|seconds|bytes))[`{]", operations):
        assert f"{metrics.PREFIX}{name}" in DESCRIBED, name
    keys = {key.path.rpartition(".")[2] for key in config.all_keys()}
    for name in re.findall(
        r"`((?:max|critical|prefix|recycle|restart|drain|turn|relief|report)_\w+)`", operations
    ):
        assert name in keys or f"{metrics.PREFIX}{name}" in DESCRIBED, name
    anchors = {
        re.sub(r"[^\w -]", "", line.lstrip("# ")).strip().lower().replace(" ", "-")
        for line in operations.splitlines()
        if line.startswith("#")
    }
    assert set(re.findall(r"\(#([\w-]+)\)", operations)) <= anchors
