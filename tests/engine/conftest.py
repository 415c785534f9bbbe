"""The tiny model, loaded once for all tests that leave it as it is."""

from __future__ import annotations

from typing import Any

import pytest
from support.batches import (
    mixed,
    run,
)
from support.tiny_model import (
    write_tiny_model,
)

from trio_worker.engine.models.load import load
from trio_worker.engine.serve import open_batch


@pytest.fixture(scope="session")
def model(tmp_path_factory: Any) -> Any:
    folder = write_tiny_model(tmp_path_factory.mktemp("models") / "tiny")
    return load(str(folder), None, lambda *_: None)


@pytest.fixture
def batch(model: Any) -> Any:
    return open_batch(model, 0)


@pytest.fixture(scope="session")
def alone(model: Any) -> Any:
    batch = open_batch(model, 0)
    return {name: run(batch, one)[name] for name, one in mixed().items()}
