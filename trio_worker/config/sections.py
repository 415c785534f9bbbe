"""cluster.yaml: its keys, their defaults and ranges, and how a file becomes a `Config`.

Every key is described once, in the sections below; the checks, the error messages, the JSON
Schema and the reference in the documentation are all read from there (see config/keys.py). Three
sources are laid over the defaults, each later one winning: the file, variables of the
environment, `--set`. All problems of all sources are reported at once.

Rules:
 1. A `Config` that `load_config` returned is complete and consistent: nobody checks it again.
 2. Whatever the sources hold, `load_config` returns or raises `ConfigError`; nothing else.
 3. The values of secret keys appear in no message and in no repr.
"""

from __future__ import annotations

import ipaddress
import re
import stat
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal, TypeAlias

import msgspec
from msgspec import Meta, Struct

from trio_worker.config import keys, strict_yaml
from trio_worker.config.keys import (
    STREAM_NAME,
    SUBJECT,
    SUBJECT_PREFIX,
    SUBJECT_TOKEN,
    Key,
    Section,
    shown,
    without_login,
)
from trio_worker.errors import ConfigError
from trio_worker.nats.address import parse_nats_url

VARIABLE_PREFIX = "TRIO_WORKER__"

# --- the sections ---------------------------------------------------------------------------
#
# What an annotation may hold beside the type is said in config/keys.py.

_Duration: TypeAlias = Annotated[int, Meta(ge=1, le=3_600_000)]
_Megabytes: TypeAlias = Annotated[int, Meta(ge=1, le=16_777_216)]
_Tokens: TypeAlias = Annotated[int, Meta(ge=1, le=1_000_000)]
_Text: TypeAlias = Annotated[str, Meta(min_length=1, max_length=4096)]
_SubjectToken: TypeAlias = Annotated[str, Meta(pattern=SUBJECT_TOKEN)]
_Subject: TypeAlias = Annotated[str, Meta(pattern=SUBJECT, max_length=255)]
_Prefix: TypeAlias = Annotated[str, Meta(pattern=SUBJECT_PREFIX, max_length=255)]
_StreamName: TypeAlias = Annotated[str, Meta(pattern=STREAM_NAME)]
_PriorityName: TypeAlias = Literal["high", "medium", "low"]


class TlsConfig(Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    ca_file: (
        Annotated[_Text, Meta(description="the authorities to trust; null: the system's")] | None
    ) = None
    cert_file: Annotated[_Text, Meta(description="the worker's own certificate")] | None = None
    key_file: Annotated[_Text, Meta(description="the key of `cert_file`")] | None = None


class JetStreamConfig(Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    enabled: Annotated[bool, Meta(description="whether jobs are taken from a stream, too")] = False
    stream: Annotated[_StreamName, Meta(description="the stream that holds the jobs")] = "INFERENCE"
    subject: Annotated[_Subject, Meta(description="the subjects of jobs")] = "jobs.inference.>"
    max_deliver: Annotated[
        int, Meta(ge=1, le=1000, description="how often a job is tried before it is given up")
    ] = 3
    ack_wait_ms: Annotated[
        _Duration, Meta(description="the time after which an unacknowledged job is tried again")
    ] = 30_000


class NatsConfig(Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    url: Annotated[
        _Text,
        Meta(
            description="where NATS listens: `nats://` or `tls://`, a host and a port",
            examples=["nats://127.0.0.1:4222"],
            extra={"login": True},
        ),
    ] = "nats://127.0.0.1:4222"
    embedded: Annotated[
        Literal["auto", "always", "never"],
        Meta(
            description="when to start the bundled nats-server; auto: when `url` is on this "
            "machine and nobody listens there"
        ),
    ] = "auto"
    connect_timeout_ms: Annotated[
        _Duration, Meta(description="the longest that the first connection may take")
    ] = 10_000
    user: Annotated[_Text, Meta(description="the user to log in as")] | None = None
    password: (
        Annotated[_Text, Meta(description="the password of `user`", extra={"secret": True})] | None
    ) = None
    password_file: (
        Annotated[_Text, Meta(description="a file with the password of `user`")] | None
    ) = None
    token: (
        Annotated[_Text, Meta(description="the token to log in with", extra={"secret": True})]
        | None
    ) = None
    token_file: (
        Annotated[_Text, Meta(description="a file with the token to log in with")] | None
    ) = None
    credentials_file: (
        Annotated[_Text, Meta(description="a `.creds` file to log in with")] | None
    ) = None
    nkey_seed_file: (
        Annotated[_Text, Meta(description="a file with the seed of an nkey to log in with")] | None
    ) = None
    tls: Annotated[TlsConfig | None, Meta(description="TLS; null: as `url` says")] = None
    reply_prefixes: Annotated[
        tuple[_Prefix, ...],
        Meta(
            min_length=1,
            max_length=16,
            description="how a reply subject may begin; requests with another one are dropped",
        ),
    ] = ("_INBOX.",)
    dialects: Annotated[
        tuple[Literal["native", "mlx-serving"], ...],
        Meta(min_length=1, max_length=2, description="the request formats that are understood"),
    ] = ("native",)
    jetstream: Annotated[
        JetStreamConfig,
        Meta(
            description="not built yet: `enabled: true` is refused, and the other keys have no "
            "effect"
        ),
    ] = JetStreamConfig()

    def __rich_repr__(self) -> list[tuple[str, Any]]:
        hidden = {
            "url": without_login(self.url),
            "password": self.password and "***",
            "token": self.token and "***",
        }
        return [(name, hidden.get(name, getattr(self, name))) for name in self.__struct_fields__]

    def __repr__(self) -> str:
        fields = ", ".join(f"{name}={value!r}" for name, value in self.__rich_repr__())
        return f"NatsConfig({fields})"


class BatchingConfig(Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    enabled: Annotated[
        bool, Meta(description="whether requests are decoded together; false: one at a time")
    ] = True
    min_batch_size: Annotated[
        int, Meta(ge=1, le=64, description="how many requests an idle engine waits for")
    ] = 1
    max_batch_size: Annotated[
        int, Meta(ge=1, le=64, description="how many requests decode together")
    ] = 8
    batch_timeout_ms: Annotated[
        int,
        Meta(ge=0, le=60_000, description="the longest an idle engine waits for `min_batch_size`"),
    ] = 50
    adaptive_timeout: Annotated[
        bool,
        Meta(description="whether that wait is shortened to what arrivals make worth while"),
    ] = True
    preempt: Annotated[
        bool,
        Meta(
            description="whether an urgent request may take the slot of a less urgent running one"
        ),
    ] = True
    prefill_chunk_tokens: Annotated[
        int,
        Meta(
            ge=16,
            le=65_536,
            description="the most prompt tokens computed in one turn, all requests together; "
            "what turns take may make it less, but not less than 8",
        ),
    ] = 512
    turn_timeout_ms: Annotated[
        int,
        Meta(
            ge=100,
            le=3_600_000,
            description="the longest one turn may take before the engine, also the simulated one, "
            "is restarted",
        ),
    ] = 60_000


class QueueConfig(Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    enabled: Annotated[
        bool, Meta(description="whether requests may wait for a slot; false: nobody waits")
    ] = True
    max_depth: Annotated[int, Meta(ge=1, le=100_000, description="how many requests may wait")] = (
        100
    )
    reject_when_full: Annotated[
        bool,
        Meta(
            description="whether a full queue refuses; false: up to `max_depth` more wait "
            "for a place"
        ),
    ] = True
    priority_levels: Annotated[
        int,
        Meta(
            ge=1,
            le=8,
            description="the number of priorities; 0 is the most urgent, high is 0, medium is "
            "levels // 2, low is levels - 1",
        ),
    ] = 3
    aging_ms: (
        Annotated[
            _Duration,
            Meta(
                description="the wait that is worth one level; null, not 0, means strict priorities"
            ),
        ]
        | None
    ) = 5_000


class ResourceConfig(Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    max_memory_mb: Annotated[
        _Megabytes, Meta(description="the soft limit: above it the worker does less")
    ] = 8_192
    critical_memory_mb: Annotated[
        _Megabytes, Meta(description="the hard limit: above it new requests are refused")
    ] = 10_240
    check_interval_ms: Annotated[
        int,
        Meta(ge=10, le=600_000, description="the time between two readings of the memory in use"),
    ] = 5_000
    degraded_max_tokens: Annotated[
        _Tokens, Meta(description="the longest answer of requests that start under pressure")
    ] = 128
    relief_timeout_ms: Annotated[
        _Duration,
        Meta(
            description="how long memory may stay critical before the engine is replaced by a "
            "fresh one"
        ),
    ] = 60_000


class EngineConfig(Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    prefix_cache_mb: Annotated[
        int,
        Meta(ge=0, le=16_777_216, description="memory for prompts that may come again; 0: none"),
    ] = 512
    max_restarts: Annotated[
        int,
        Meta(
            ge=0,
            le=1_000,
            description="how many unplanned restarts of the engine in `restart_window_s` are "
            "borne, and how many of the batch loop",
        ),
    ] = 5
    restart_window_s: Annotated[
        int, Meta(ge=1, le=86_400, description="the time over which restarts are counted")
    ] = 60
    recycle_after_tokens: Annotated[
        int,
        Meta(
            ge=1,
            le=1_000_000_000_000,
            description="on Metal only: the number of generated tokens after which the engine is "
            "replaced by a fresh one",
        ),
    ] = 250_000
    token_gap_target_ms: Annotated[
        _Duration,
        Meta(
            description="the pause between the tokens of running answers that prefill is measured "
            "out for; where more than half as many requests wait for their prefill as decode, it "
            "grows in that proportion, up to four times"
        ),
    ] = 200
    wired_limit_mb: (
        Annotated[
            int,
            Meta(
                ge=0,
                le=16_777_216,
                description="memory that Metal may wire down; null leaves it as the system has it",
            ),
        ]
        | None
    ) = None
    allocator_cache_mb: (
        Annotated[
            int,
            Meta(
                ge=0,
                le=16_777_216,
                description="freed memory that MLX may keep for reuse; null leaves its own limit",
            ),
        ]
        | None
    ) = None


class DefaultPriority(Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    buffered: Annotated[
        _PriorityName, Meta(description="the priority of `stream: false` when none is asked for")
    ] = "high"
    streaming: Annotated[
        _PriorityName, Meta(description="the priority of `stream: true` when none is asked for")
    ] = "medium"


class RequestsConfig(Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    default_max_tokens: Annotated[
        _Tokens, Meta(description="the longest answer when a request does not say")
    ] = 256
    max_tokens_limit: Annotated[
        _Tokens, Meta(description="the longest answer that a request may ask for")
    ] = 4_096
    default_timeout_ms: Annotated[
        int,
        Meta(ge=1, le=86_400_000, description="the time for an answer when a request does not say"),
    ] = 30_000
    timeout_limit_ms: Annotated[
        int,
        Meta(ge=1, le=86_400_000, description="the longest time that a request may ask for"),
    ] = 600_000
    max_prompt_bytes: Annotated[
        int, Meta(ge=1, le=67_108_864, description="the largest message body that is read")
    ] = 900_000
    refuse_unmeetable: Annotated[
        bool,
        Meta(
            description="whether a request is refused at once when its deadline cannot be met "
            "by the measured rates"
        ),
    ] = True
    default_priority: DefaultPriority = DefaultPriority()


class PrewarmConfig(Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    enabled: Annotated[
        bool, Meta(description="whether the model answers once before the worker is ready")
    ] = True
    prompt: Annotated[
        _Text,
        Meta(description="what it is asked, again and again until it is as long as a short prompt"),
    ] = "Hello"
    max_tokens: Annotated[int, Meta(ge=1, le=1_024, description="the length of its answer")] = 1


class MonitoringConfig(Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    host: Annotated[
        _Text, Meta(description="the address that health, metrics and the dashboard listen on")
    ] = "127.0.0.1"
    port: (
        Annotated[int, Meta(ge=0, le=65_535, description="their port; 0: any free one; null: off")]
        | None
    ) = 9_464
    report_interval_ms: Annotated[
        int, Meta(ge=10, le=3_600_000, description="the time between two published statistics")
    ] = 10_000


class SimulatedConfig(Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    turn_ms: Annotated[
        float, Meta(ge=0, le=60_000, description="how long a turn of the simulated engine takes")
    ] = 20.0
    prefill_ms_per_token: Annotated[
        float, Meta(ge=0, le=1_000, description="how long it takes to read one prompt token")
    ] = 0.05
    vocabulary: Annotated[
        int, Meta(ge=1, le=1_000_000, description="how many different words it knows")
    ] = 1_000
    seed: Annotated[int, Meta(ge=0, le=2**53 - 1, description="what its words are drawn from")] = 0


class WorkerConfig(Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    id: Annotated[
        _SubjectToken,
        Meta(
            description="the worker's name on the wire; not `model` and not `cancel`",
            extra={"derived": "from the host name"},
        ),
    ] = "worker"
    model: Annotated[
        _Text,
        Meta(
            description="what is served: the built-in demo model, a local mlx-lm folder, a "
            "`.gguf` file, or a Hugging Face repository",
            examples=["smollm2-135m-instruct", "models/my-model", "models/my-model.gguf"],
        ),
    ] = "smollm2-135m-instruct"
    model_name: Annotated[
        _SubjectToken,
        Meta(
            description="the model's name on the wire",
            extra={"derived": "the last component of `model`"},
        ),
    ] = "smollm2-135m-instruct"
    continuous_batching: BatchingConfig = BatchingConfig()
    request_queue: QueueConfig = QueueConfig()
    resource_limits: ResourceConfig = ResourceConfig()
    engine: Annotated[
        EngineConfig,
        Meta(description="of these, only `token_gap_target_ms` matters to `--engine simulated`"),
    ] = EngineConfig()
    requests: RequestsConfig = RequestsConfig()
    drain_timeout_ms: Annotated[
        int,
        Meta(ge=0, le=3_600_000, description="how long running requests may go on at a stop"),
    ] = 30_000
    prewarm: Annotated[
        PrewarmConfig, Meta(description="without effect with `--engine simulated`")
    ] = PrewarmConfig()
    monitoring: MonitoringConfig = MonitoringConfig()
    simulated: Annotated[SimulatedConfig, Meta(description="only with `--engine simulated`")] = (
        SimulatedConfig()
    )


class Config(Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    nats: NatsConfig = NatsConfig()
    worker: WorkerConfig = WorkerConfig()


# --- loading --------------------------------------------------------------------------------


def load_config(
    path: Path | None,
    *,
    environ: Mapping[str, str],
    overrides: Sequence[str] = (),
    hostname: str,
    read_secrets: bool = True,
) -> Config:
    """Read the file, lay variables and then `--set` over it, check and complete everything.

    Args:
        path: cluster.yaml; None for the defaults alone.
        environ: the environment; of it, the names that begin with `TRIO_WORKER__` count.
        overrides: `PATH=VALUE` each, the path beginning below `cluster`.
        hostname: what `worker.id` is derived from.
        read_secrets: whether `password` and `token` are taken from the files that are named for
            them; if not, they stay null.

    Raises:
        ConfigError: with every problem found, one sentence each.
    """
    loaded = load_with_sources(
        path, environ=environ, overrides=overrides, hostname=hostname, read_secrets=read_secrets
    )
    return loaded.config


@dataclass(frozen=True, slots=True, kw_only=True)
class Loaded:
    """A configuration, and who said what of it."""

    config: Config
    sources: Mapping[str, str]
    """Of each key that was given a value, by its path: `FILE:LINE`, the name of a variable, or
    `--set PATH`. All others have their default."""


def load_with_sources(
    path: Path | None,
    *,
    environ: Mapping[str, str],
    overrides: Sequence[str] = (),
    hostname: str,
    read_secrets: bool = True,
) -> Loaded:
    """As `load_config`, with where each value came from."""
    values = _Values()
    if path is not None:
        _read_file(path, values)
    _read_variables(environ, values)
    _read_overrides(overrides, values)
    bad: set[str] = set()
    raw = _section(_ROOT, values.tree.get("cluster"), "cluster", values, bad)
    config = _complete(raw, hostname)
    unclear: set[str] = set()
    for paths, sentence in () if values.is_partial else _conflicts(config):
        concerned = [f"cluster.{each}" for each in paths]
        if not bad.intersection(concerned):
            values.complain(concerned[0], sentence, beside=concerned[1:])
            unclear.update(concerned)
    if read_secrets:
        config = _with_secrets(config, values, bad | unclear)
    if values.problems:
        raise ConfigError(*dict.fromkeys(values.problems))
    return Loaded(config=config, sources=_sources(values))


def effective_yaml(loaded: Loaded) -> str:
    """A cluster.yaml with every key, its value in effect, and behind it where that comes from.

    Where no secret is set, it is loaded to the same configuration. In the place of a secret stands
    `***`, or null if it was read from a file, which is named in its own key.
    """
    config = loaded.config
    from_files = [name for name in ("password", "token") if _is_in_file(config.nats, name)]
    nats = msgspec.structs.replace(config.nats, **dict.fromkeys(from_files))

    def remark(path: str) -> str:
        if path in [f"nats.{name}" for name in from_files]:
            return f"hidden, from {path}_file"
        source = loaded.sources.get(path)
        if source is not None:
            return quoted(source)
        derived = _KEYS[path].derived if path in _KEYS else None
        return f"default, {derived}" if derived else "default"

    return keys.filled(_ROOT, msgspec.structs.replace(config, nats=nats), remark)


def warnings(config: Config, *, total_memory_bytes: int) -> list[str]:
    """What is allowed but probably not meant, one sentence each."""
    total_mb = total_memory_bytes // 2**20
    limits = config.worker.resource_limits
    found = [
        f"cluster.worker.resource_limits.{name}: {value} MB is more than this machine's "
        f"{total_mb} MB, so the machine runs out of memory before the limit takes effect"
        for name, value in (
            ("max_memory_mb", limits.max_memory_mb),
            ("critical_memory_mb", limits.critical_memory_mb),
        )
        if value > total_mb
    ]
    if config.worker.engine.prefix_cache_mb >= limits.max_memory_mb:
        found.append(
            f"cluster.worker.engine.prefix_cache_mb: {config.worker.engine.prefix_cache_mb} MB "
            f"fill max_memory_mb ({limits.max_memory_mb}) alone"
        )
    if limits.degraded_max_tokens > config.worker.requests.max_tokens_limit:
        found.append(
            f"cluster.worker.resource_limits.degraded_max_tokens: {limits.degraded_max_tokens} "
            f"is above max_tokens_limit ({config.worker.requests.max_tokens_limit}) "
            "and has no effect"
        )
    found += [
        f"cluster.{path}: {shown(name)} can be read by every user of this machine; "
        f"`chmod o-r` keeps the secret in it"
        for path, name in files_with_secrets(config.nats).items()
        if _is_readable_by_all(name)
    ]
    found += _without_effect(config.nats.jetstream)
    monitoring = config.worker.monitoring
    if monitoring.port is not None and not _is_loopback(monitoring.host):
        found.append(
            f"cluster.worker.monitoring.host: {shown(monitoring.host)} can be reached from other "
            "machines, and the monitoring pages ask for no password"
        )
    return found


def _without_effect(jetstream: JetStreamConfig) -> Iterator[str]:
    """What is said of JetStream while it is off."""
    if jetstream.enabled:
        return
    default = JetStreamConfig()
    for name in jetstream.__struct_fields__:
        value = getattr(jetstream, name)
        if value != getattr(default, name):
            yield (
                f"cluster.nats.jetstream.{name}: {shown(value)} has no effect while "
                "cluster.nats.jetstream.enabled is false"
            )


def files_with_secrets(nats: NatsConfig) -> dict[str, str]:
    """The files that are given to log in with, by the paths of their keys."""
    names = ("password_file", "token_file", "credentials_file", "nkey_seed_file")
    files = {f"nats.{name}": getattr(nats, name) for name in names}
    if nats.tls is not None:
        files["nats.tls.key_file"] = nats.tls.key_file
    return {path: file for path, file in files.items() if file is not None}


def all_keys() -> tuple[Key, ...]:
    """Every key, in the order of the file; their paths begin below `cluster`."""
    return tuple(_KEYS.values())


def variable_of(path: str) -> str:
    """The environment variable that sets the key at `path`."""
    return VARIABLE_PREFIX + path.replace(".", "__").upper()


def json_schema() -> dict[str, Any]:
    """The JSON Schema of cluster.yaml."""
    return {
        "$schema": "https://json-schema.org/draft/2020-12/schema",
        "title": "cluster.yaml of trio-worker",
        "type": "object",
        "properties": {"cluster": keys.schema(_ROOT)},
        "required": ["cluster"],
        "additionalProperties": False,
    }


def reference_markdown() -> str:
    """Every key with its values, default and meaning, in one table per section."""
    return keys.markdown(_ROOT)


_ROOT = keys.describe(Config)
_KEYS = {key.path: key for key in _ROOT.leaves()}
_PATHS = (*_KEYS, *(section.path for section in _ROOT.sections() if section.path))
_VARIABLES = {variable_of(path): key for path, key in _KEYS.items()}


# --- checking -------------------------------------------------------------------------------


class _Values:
    """What the sources said so far: the tree, where each part came from, and the problems."""

    def __init__(self) -> None:
        self.tree: dict[str, Any] = {}
        self.origins: dict[str, str] = {}
        self.problems: list[str] = []
        self.is_partial = False
        """Whether the file could not be read, so that nothing can be said about pairs."""

    def complain(self, path: str, sentence: str, *, beside: Sequence[str] = ()) -> None:
        """Note a problem at `path`; of values that do not go together, `beside` are the others."""
        given = [self.origins[each] for each in (path, *beside) if each in self.origins]
        origin = given[0] if given else self.origin(path)
        self.problems.append(f"{quoted(path)}: {sentence}{f' ({origin})' if origin else ''}")

    def origin(self, path: str) -> str:
        """Where the value at `path`, or the nearest part around it, came from."""
        while path:
            if path in self.origins:
                return self.origins[path]
            path = path.rpartition(".")[0]
        return ""

    def put(self, path: str, value: object, origin: str) -> None:
        """Lay one value over what is there; does nothing below what is no mapping."""
        *parents, leaf = path.split(".")
        level = self.tree
        for name in parents:
            if level.get(name) is None:
                level[name] = {}
            level = level[name]
            if not isinstance(level, dict):
                return
        level[leaf] = value
        self.origins[path] = origin

    def at(self, path: str) -> object:
        """The value at `path`, or None."""
        value: object = self.tree
        for name in path.split("."):
            value = value.get(name) if isinstance(value, dict) else None
        return value


def _sources(values: _Values) -> dict[str, str]:
    """Where the values in effect came from. Null is not one where something is derived from it."""
    derived = {f"cluster.{key.path}" for key in _KEYS.values() if key.derived}
    return {
        path.removeprefix("cluster."): origin
        for path, origin in values.origins.items()
        if path not in derived or values.at(path) is not None
    }


def _section(
    section: Section, given: object, path: str, values: _Values, bad: set[str]
) -> dict[str, Any]:
    """The section's values, defaults filled in; the paths that had none worth using go to `bad`."""
    if given is None:
        given = {}
    if not isinstance(given, dict):
        values.complain(
            path,
            f"{shown(given)} is {keys.named(given)}; expected a section with "
            f"{', '.join(section.children)}",
        )
        bad.update(f"cluster.{key.path}" for key in section.leaves())
        given = {}
    for name in given:
        if name not in section.children:
            values.complain(f"{path}.{name}", f"unknown key{_meant(f'{section.path}.{name}')}")
    result: dict[str, Any] = {}
    for name, child in section.children.items():
        inner = f"{path}.{name}"
        if isinstance(child, Key):
            result[name] = child.default
            if name in given:
                value, complaint = keys.check(child, given[name])
                if complaint is None:
                    result[name] = value
                else:
                    values.complain(inner, complaint)
                    bad.add(inner)
        elif child.nullable and given.get(name) is None:
            result[name] = None
        else:
            result[name] = _section(child, given.get(name), inner, values, bad)
    return result


def _complete(raw: dict[str, Any], hostname: str) -> Config:
    """Derive what was null, and make the sections."""
    worker: dict[str, Any] = raw["worker"]
    worker["id"] = worker["id"] or _derived_id(hostname)
    worker["model_name"] = worker["model_name"] or _derived_model_name(worker["model"])
    config: Config = msgspec.convert(raw, Config)
    return config


def _derived_id(hostname: str) -> str:
    name = _subject_token(hostname, otherwise="worker")
    return f"worker-{name}" if name in _RESERVED_IDS else name


def _derived_model_name(model: str) -> str:
    last = re.split(r"[/\\]", model.rstrip("/\\"))[-1]
    return _subject_token(re.sub(r"\.gguf\Z", "", last, flags=re.IGNORECASE), otherwise="model")


_RESERVED_IDS = ("model", "cancel")


def _subject_token(text: str, *, otherwise: str) -> str:
    return re.sub(r"[^A-Za-z0-9_-]+", "-", text).strip("-")[:64].strip("-") or otherwise


_Conflict: TypeAlias = tuple[tuple[str, ...], str]
"""The keys concerned, the first of which shows the problem, and a sentence."""


def _conflicts(config: Config) -> Iterator[_Conflict]:
    """What is wrong with values that are each allowed."""
    yield from _pairs(config)
    yield from _nats_conflicts(config.nats)
    if config.worker.id in _RESERVED_IDS:
        yield (
            ("worker.id",),
            f"{shown(config.worker.id)} is a subject of its own; expected another name",
        )


def _pairs(config: Config) -> Iterator[_Conflict]:
    """Keys whose value may not be above that of another one."""
    for low, high in (
        ("continuous_batching.min_batch_size", "continuous_batching.max_batch_size"),
        ("engine.token_gap_target_ms", "continuous_batching.turn_timeout_ms"),
        ("simulated.turn_ms", "continuous_batching.turn_timeout_ms"),
        ("resource_limits.max_memory_mb", "resource_limits.critical_memory_mb"),
        ("requests.default_max_tokens", "requests.max_tokens_limit"),
        ("requests.default_timeout_ms", "requests.timeout_limit_ms"),
    ):
        lower, upper = _value_at(config.worker, low), _value_at(config.worker, high)
        if lower > upper:
            yield (
                (f"worker.{low}", f"worker.{high}"),
                f"{shown(lower)} is above cluster.worker.{high}, which is {shown(upper)}",
            )


def _value_at(config: Struct, path: str) -> Any:
    value: Any = config
    for name in path.split("."):
        value = getattr(value, name)
    return value


def _nats_conflicts(nats: NatsConfig) -> Iterator[_Conflict]:
    yield from _address_conflicts(nats)
    yield from _login_conflicts(nats)
    yield from _reply_conflicts(nats.reply_prefixes)
    if nats.tls is not None and nats.tls.cert_file is not None and nats.tls.key_file is None:
        yield ("nats.tls.cert_file", "nats.tls.key_file"), "needs cluster.nats.tls.key_file, too"
    if nats.tls is not None and nats.tls.key_file is not None and nats.tls.cert_file is None:
        yield ("nats.tls.key_file", "nats.tls.cert_file"), "needs cluster.nats.tls.cert_file, too"
    if "mlx-serving" in nats.dialects:
        yield ("nats.dialects",), "mlx-serving is not built yet in this version; expected [native]"
    if nats.jetstream.enabled:
        yield (
            ("nats.jetstream.enabled",),
            "true is not built yet: this version takes no jobs from JetStream; expected false",
        )


def _address_conflicts(nats: NatsConfig) -> Iterator[_Conflict]:
    if not nats.url.isprintable() or set(nats.url) & set(" ,"):
        yield ("nats.url",), "it holds a blank or a comma; expected the address of one server"
        return
    try:
        address = parse_nats_url(nats.url)
    except ConfigError as error:
        yield ("nats.url",), str(error).removeprefix("nats.url: ")
        return
    if nats.embedded == "always" and not address.is_loopback:
        yield (
            ("nats.embedded", "nats.url"),
            "always needs a `url` on this machine, such as nats://127.0.0.1:4222",
        )


def _reply_conflicts(prefixes: tuple[str, ...]) -> Iterator[_Conflict]:
    for prefix in prefixes:
        for own in ("inference", "worker.", "$"):
            if prefix.startswith(own) or own.startswith(prefix):
                allowed = f"{shown(prefix)} allows replies to subjects that begin with {own}"
                yield ("nats.reply_prefixes",), f"{allowed}; expected the beginning of inboxes"


def _login_conflicts(nats: NatsConfig) -> Iterator[_Conflict]:
    passwords = [name for name in ("password", "password_file") if getattr(nats, name) is not None]
    if nats.user is not None and not passwords:
        yield (
            ("nats.user", "nats.password", "nats.password_file"),
            "needs cluster.nats.password or cluster.nats.password_file, too",
        )
    if passwords and nats.user is None:
        yield (f"nats.{passwords[0]}", "nats.user"), "needs cluster.nats.user, too"
    for name in ("password", "token"):
        if getattr(nats, name) is not None and getattr(nats, f"{name}_file") is not None:
            yield (
                (f"nats.{name}_file", f"nats.{name}"),
                f"cluster.nats.{name} is given, too; expected one of them",
            )
    logins = (("user",), ("token", "token_file"), ("credentials_file",), ("nkey_seed_file",))
    given = [
        f"nats.{names[0]}"
        for kind in logins
        if (names := [name for name in kind if getattr(nats, name) is not None])
    ]
    if "@" in nats.url:
        given.insert(0, "nats.url")
    if len(given) > 1:
        others = ", ".join(f"cluster.{path}" for path in given[1:])
        yield tuple(given), f"is a login, and so is {others}; expected one kind of login"


def _with_secrets(config: Config, values: _Values, bad: set[str]) -> Config:
    """With the contents of `password_file` and `token_file`; what is wrong with them is noted."""
    found: dict[str, str] = {}
    for name in ("password", "token"):
        path = f"cluster.nats.{name}_file"
        file: str | None = getattr(config.nats, f"{name}_file")
        if file is None or path in bad:
            continue
        try:
            found[name] = _secret_in(file)
        except _Unreadable as error:
            values.complain(path, f"{shown(file)} {error}; expected a file with the {name}")
    nats = msgspec.structs.replace(config.nats, **found)
    return msgspec.structs.replace(config, nats=nats)


def _is_in_file(nats: NatsConfig, name: str) -> bool:
    return getattr(nats, f"{name}_file") is not None


def _secret_in(file: str) -> str:
    """What the file holds, without the newline at its end."""
    try:
        with Path(file).open("rb") as opened:
            line = opened.read(_SECRET_BYTES_MAX + 3)
    except OSError as error:
        raise _Unreadable(f"cannot be read: {error.strerror}") from None
    line = line.removesuffix(b"\n").removesuffix(b"\r")
    if not line:
        raise _Unreadable("is empty")
    if len(line) > _SECRET_BYTES_MAX:
        raise _Unreadable(f"is longer than {_SECRET_BYTES_MAX} bytes")
    try:
        secret = line.decode()
    except UnicodeDecodeError:
        raise _Unreadable("is not text in UTF-8") from None
    if not secret.isprintable():
        raise _Unreadable("holds more than one line, or what cannot be printed")
    return secret


def _is_readable_by_all(file: str) -> bool:
    try:
        return bool(Path(file).stat().st_mode & stat.S_IROTH)
    except OSError:
        return False


def _is_loopback(host: str) -> bool:
    try:
        return host == "localhost" or ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False


# --- the three sources ----------------------------------------------------------------------

_FILE_BYTES_MAX = 262_144
_SECRET_BYTES_MAX = 4_096


def _read_file(path: Path, values: _Values) -> None:
    try:
        tree = _tree_of(path, values)
    except _Unreadable as error:
        values.is_partial = True
        values.problems.append(f"{quoted(str(path))}: {error}")
        return
    for name in tree:
        if name != "cluster":
            values.complain(name, f"unknown key{_meant(name)}")
    values.tree.update(tree)


def _tree_of(path: Path, values: _Values) -> dict[str, Any]:
    try:
        with path.open("rb") as file:
            text = file.read(_FILE_BYTES_MAX + 1)
        if len(text) > _FILE_BYTES_MAX:
            raise _Unreadable(f"is larger than {_FILE_BYTES_MAX} bytes")
        document = strict_yaml.parse(text)
    except OSError as error:
        raise _Unreadable(f"cannot be read: {error.strerror}") from None
    except ValueError:
        raise _Unreadable("is not a file name") from None
    except strict_yaml.NotYaml as error:
        raise _Unreadable(f"is not YAML as expected here: {error}") from None
    tree = document.value
    if not isinstance(tree, dict) or not tree:
        what = f"holds {keys.named(tree)}" if tree else "is empty"
        raise _Unreadable(f"{what}; expected a mapping with `cluster:` at its top")
    values.origins.update({key: f"{path}:{line}" for key, line in document.lines.items()})
    for key, first, second in document.repeated:
        values.problems.append(
            f"{quoted(key)}: written twice, in the lines {first} and {second} ({path}:{second})"
        )
    return tree


class _Unreadable(Exception):
    """The file as a whole is of no use."""


def _read_variables(environ: Mapping[str, str], values: _Values) -> None:
    for name in sorted(environ):
        if not name.startswith(VARIABLE_PREFIX):
            continue
        key = _VARIABLES.get(name)
        if key is not None:
            _override(key, environ[name], name, values)
            continue
        path = name.removeprefix(VARIABLE_PREFIX).lower().replace("__", ".")
        near = keys.nearest(path, _KEYS)
        meant = f"; did you mean {variable_of(near)}?" if near else ""
        values.problems.append(f"{quoted(name)}: names no key of cluster.yaml{meant}")


def _read_overrides(overrides: Sequence[str], values: _Values) -> None:
    for override in overrides:
        path, separator, text = override.partition("=")
        key = _KEYS.get(path)
        if key is not None and separator:
            _override(key, text, f"--set {path}", values)
            continue
        if not separator:
            fault = "expected PATH=VALUE"
        elif path in _PATHS:
            fault = "names a section; expected one of its keys"
        else:
            near = keys.nearest(path.removeprefix("cluster."), _KEYS)
            fault = f"names no key{f'; did you mean {near}?' if near else ''}"
        values.problems.append(f"--set {quoted(path)}: {fault}")


def _override(key: Key, text: str, origin: str, values: _Values) -> None:
    """Lay one value over the file's.

    Where text is wanted it counts as it stands, so that a password of digits needs no quotes
    inside the shell's; everything else is read as YAML.
    """
    value: object = text
    if key.is_text:
        if key.nullable and text in ("", "~", "null"):
            value = None
    else:
        try:
            value = strict_yaml.parse(text.encode("utf-8", "surrogatepass")).value
        except strict_yaml.NotYaml as error:
            values.problems.append(f"cluster.{key.path}: not YAML: {error} ({origin})")
            return
    values.put(f"cluster.{key.path}", value, origin)


def _meant(path: str) -> str:
    near = keys.nearest(path.removeprefix("."), _PATHS)
    return f"; did you mean cluster.{near}?" if near else ""


def quoted(name: str) -> str:
    """A name that somebody wrote, fit for one line of a message."""
    return name if name.isprintable() and len(name) <= 200 else shown(name)
