"""cluster.yaml: its sections and keys, and how sources become one configuration.

`sections` is what there is to configure. `sources` are read and laid one over the other (`values`),
checked key by key (`keys`, from the `catalogue`) and against each other (`conflicts`), completed
(`loading`, `secrets`), and shown again (`documentation`). `warnings` are about what is valid.
"""

from trio_worker.config.catalogue import VARIABLE_PREFIX, all_keys, variable_of
from trio_worker.config.documentation import effective_yaml, json_schema, reference_markdown
from trio_worker.config.keys import quoted
from trio_worker.config.loading import Loaded, load_config, load_with_sources
from trio_worker.config.secrets import files_with_secrets
from trio_worker.config.sections import (
    BatchingConfig,
    Config,
    DefaultPriority,
    EngineConfig,
    FleetConfig,
    GatewayConfig,
    JetStreamConfig,
    MonitoringConfig,
    NatsConfig,
    PrewarmConfig,
    QueueConfig,
    RequestsConfig,
    ResourceConfig,
    SimulatedConfig,
    TlsConfig,
    WorkerConfig,
)
from trio_worker.config.warnings import warnings_about

__all__ = [
    "VARIABLE_PREFIX",
    "BatchingConfig",
    "Config",
    "DefaultPriority",
    "EngineConfig",
    "FleetConfig",
    "GatewayConfig",
    "JetStreamConfig",
    "Loaded",
    "MonitoringConfig",
    "NatsConfig",
    "PrewarmConfig",
    "QueueConfig",
    "RequestsConfig",
    "ResourceConfig",
    "SimulatedConfig",
    "TlsConfig",
    "WorkerConfig",
    "all_keys",
    "effective_yaml",
    "files_with_secrets",
    "json_schema",
    "load_config",
    "load_with_sources",
    "quoted",
    "reference_markdown",
    "variable_of",
    "warnings_about",
]
