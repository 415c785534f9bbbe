"""The sections and keys of cluster.yaml: types, ranges, defaults and meanings.

Every key is described here, once: the checks, the error messages, the JSON Schema and the reference
in the documentation are read from it. What an annotation may hold beside the type is said in
config/keys.py.
"""

from __future__ import annotations

from typing import Annotated, Any, Literal, TypeAlias

from msgspec import Meta, Struct

from trio_worker.config.keys import (
    ORIGIN,
    STREAM_NAME,
    SUBJECT_PREFIX,
    SUBJECT_TOKEN,
    without_login,
)

_Duration: TypeAlias = Annotated[int, Meta(ge=1, le=3_600_000)]
_Megabytes: TypeAlias = Annotated[int, Meta(ge=1, le=16_777_216)]
_Tokens: TypeAlias = Annotated[int, Meta(ge=1, le=1_000_000)]
_Text: TypeAlias = Annotated[str, Meta(min_length=1, max_length=4096)]
_SubjectToken: TypeAlias = Annotated[str, Meta(pattern=SUBJECT_TOKEN)]
_Prefix: TypeAlias = Annotated[str, Meta(pattern=SUBJECT_PREFIX, max_length=255)]
_StreamName: TypeAlias = Annotated[str, Meta(pattern=STREAM_NAME)]
_Origin: TypeAlias = Annotated[str, Meta(pattern=ORIGIN, max_length=255)]
_PriorityName: TypeAlias = Literal["high", "medium", "low"]


class TlsConfig(Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    ca_file: (
        Annotated[_Text, Meta(description="the authorities to trust; null: the system's")] | None
    ) = None
    cert_file: Annotated[_Text, Meta(description="the worker's own certificate")] | None = None
    key_file: Annotated[_Text, Meta(description="the key of `cert_file`")] | None = None


class JetStreamConfig(Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    enabled: Annotated[
        bool, Meta(description="whether durable jobs are taken from a stream, too")
    ] = False
    store_dir: (
        Annotated[
            _Text,
            Meta(
                description="the folder of the embedded server's streams; null: `trio-worker` in "
                "the user's data"
            ),
        ]
        | None
    ) = None
    stream: Annotated[_StreamName, Meta(description="the stream that holds the jobs")] = "INFERENCE"
    results: Annotated[_StreamName, Meta(description="the stream that keeps the answers")] = (
        "RESULTS"
    )
    dead: Annotated[_StreamName, Meta(description="the stream of jobs that were given up")] = "DEAD"
    max_deliver: Annotated[
        int,
        Meta(
            ge=1,
            le=1000,
            description="how often a job is given to a worker before it is given up",
        ),
    ] = 3
    ack_wait_ms: Annotated[
        int,
        Meta(
            ge=1_000,
            le=3_600_000,
            description="how long after the last sign of life of its worker a job is given to "
            "another one; decided when the consumers are made",
        ),
    ] = 30_000
    keep_results_s: Annotated[
        int,
        Meta(
            ge=1,
            le=31_536_000,
            description="how long an answer is kept; decided when the stream is made",
        ),
    ] = 86_400


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
        Meta(
            min_length=1,
            max_length=2,
            description="the request formats that are understood; `mlx-serving` makes the worker "
            "a member of the clusters of its controllers, and without `native` it is nothing else",
        ),
    ] = ("native",)
    jetstream: Annotated[
        JetStreamConfig,
        Meta(
            description="durable jobs, which survive the death of who does them; the other keys "
            "need `enabled: true`"
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


class GatewayConfig(Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    host: Annotated[
        _Text,
        Meta(
            description="the address that it listens on; one that other machines reach needs "
            "`keys_file`"
        ),
    ] = "127.0.0.1"
    port: (
        Annotated[
            int,
            Meta(
                ge=0,
                le=65_535,
                description="its port; a worker starts a gateway of its own where this is given; "
                "0: any free one; null: none, and 8000 for one that runs by itself",
            ),
        ]
        | None
    ) = None
    keys_file: (
        Annotated[
            _Text,
            Meta(
                description="a file with a line for each key: who holds it, its SHA-256, and if "
                "you like the most urgent priority and the number of concurrent requests it is "
                "good for; null: everybody may ask"
            ),
        ]
        | None
    ) = None
    max_body_bytes: Annotated[
        int, Meta(ge=1, le=67_108_864, description="the largest body of a request that is read")
    ] = 900_000
    max_file_bytes: Annotated[
        int,
        Meta(
            ge=1,
            le=536_870_912,
            description="the largest file of requests for a batch; a few of them are in memory at "
            "a time",
        ),
    ] = 33_554_432
    max_connections: Annotated[
        int, Meta(ge=1, le=100_000, description="how many connections may be open at a time")
    ] = 1_000
    attempts: Annotated[
        int,
        Meta(ge=1, le=10, description="how many workers are tried before anything is sent on"),
    ] = 2
    timeout_ms: Annotated[
        int,
        Meta(
            ge=1,
            le=86_400_000,
            description="the time for an answer when a caller does not say, within the workers' "
            "`timeout_limit_ms`",
        ),
    ] = 600_000
    cors_origins: Annotated[
        tuple[_Origin, ...],
        Meta(
            min_length=0,
            max_length=64,
            description="the origins of pages that may ask from a browser; `*` stands for all",
        ),
    ] = ()
    unknown_fields: Annotated[
        Literal["refuse", "ignore"],
        Meta(
            description="what becomes of a request with a field that OpenAI's API does not have "
            "either"
        ),
    ] = "refuse"
    drain_timeout_ms: Annotated[
        int,
        Meta(
            ge=0,
            le=3_600_000,
            description="how long answers that are under way may go on at a stop",
        ),
    ] = 30_000


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
    max_per_caller: (
        Annotated[
            int,
            Meta(
                ge=1,
                le=100_000,
                description="how many places one caller may hold or wait for, all requests without "
                "a caller together being one; null: all of them",
            ),
        ]
        | None
    ) = None
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
    lead_ms: Annotated[
        int,
        Meta(
            ge=0,
            le=1_000,
            description="how far the engine may run ahead of what it is told, where its turns are "
            "shorter; a newcomer and a cancel may have to wait that much longer; 0: not at all",
        ),
    ] = 4
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
    allow_lark: Annotated[
        bool,
        Meta(
            description="whether a request may bring a grammar in Lark; one can be written that "
            "stalls the engine, and no limit prevents that"
        ),
    ] = False
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
        Meta(
            description="of these, only `token_gap_target_ms` and `lead_ms` matter to "
            "`--engine simulated`"
        ),
    ] = EngineConfig()
    requests: RequestsConfig = RequestsConfig()
    tools: Annotated[
        Literal["auto", "prompt", "off"],
        Meta(
            description="how requests with tools are served; auto: where the model's chat template "
            "knows of tools; prompt: where it does not, the model is told of them in general "
            "words; off: not at all"
        ),
    ] = "auto"
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


class FleetConfig(Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    hand_on: Annotated[
        bool,
        Meta(
            description="whether a request for any worker is passed to one that has room, or knows "
            "the beginning of its prompt"
        ),
    ] = True
    beat_interval_ms: Annotated[
        int,
        Meta(ge=100, le=60_000, description="how often a worker says at least how it is"),
    ] = 1_000
    forget_after_ms: Annotated[
        int,
        Meta(ge=100, le=600_000, description="the silence after which a worker counts as gone"),
    ] = 3_000


class Config(Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    nats: NatsConfig = NatsConfig()
    fleet: Annotated[
        FleetConfig, Meta(description="the workers on one NATS, and how they share the work")
    ] = FleetConfig()
    gateway: Annotated[
        GatewayConfig, Meta(description="OpenAI's API over HTTP, beside a worker or by itself")
    ] = GatewayConfig()
    worker: WorkerConfig = WorkerConfig()
