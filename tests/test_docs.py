"""The documentation and the shipped files say what the code says."""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import yaml

from trio_worker import config, errors

ROOT = Path(__file__).resolve().parent.parent


@pytest.fixture(scope="module")
def generator() -> ModuleType:
    spec = importlib.util.spec_from_file_location(
        "generate_docs", ROOT / "scripts/generate_docs.py"
    )
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules["generate_docs"] = module
    spec.loader.exec_module(module)
    return module


def test_generated_parts_are_current(generator: ModuleType) -> None:
    """`just docs` writes them again."""
    for page in generator.pages():
        text = page.read_text(encoding="utf-8")
        assert generator.generate(text) == text, page.name


def test_an_unknown_block_is_an_error(generator: ModuleType) -> None:
    with pytest.raises(KeyError):
        generator.generate("<!-- generated: nothing -->\n<!-- end -->")


def test_generating_twice_changes_nothing(generator: ModuleType) -> None:
    once = generator.generate("a\n<!-- generated: error-codes -->\nold\n<!-- end -->\nb\n")
    assert "old" not in once
    assert generator.generate(once) == once


def test_every_error_code_has_a_row(generator: ModuleType) -> None:
    table = generator.error_codes()
    assert [row.split("`")[1] for row in table.splitlines()[2:]] == list(errors.ErrorCode)


def _leaves(tree: Any, path: str = "") -> dict[str, Any]:
    if not isinstance(tree, dict):
        return {path: tree}
    found: dict[str, Any] = {}
    for name, inner in tree.items():
        found |= _leaves(inner, f"{path}.{name}" if path else name)
    return found


def test_cluster_yaml_holds_every_key_with_its_default() -> None:
    """Below `tls`, which is null, there is nothing to be written out."""
    shipped = yaml.safe_load((ROOT / "cluster.yaml").read_text(encoding="utf-8"))
    assert list(shipped) == ["cluster"]
    expected = {
        key.path: list(key.default) if isinstance(key.default, tuple) else key.default
        for key in config.all_keys()
        if not key.path.startswith("nats.tls.")
    }
    assert _leaves(shipped["cluster"]) == expected | {"nats.tls": None}
    text = (ROOT / "cluster.yaml").read_text(encoding="utf-8")
    for key in config.all_keys():
        assert key.path.rpartition(".")[2] in text, key.path


def test_every_key_is_documented() -> None:
    text = (ROOT / "docs/configuration.md").read_text(encoding="utf-8")
    for key in config.all_keys():
        assert f"| `{key.path}` |" in text
        assert key.description


def test_the_licence_is_complete() -> None:
    text = (ROOT / "LICENSE").read_text(encoding="utf-8")
    assert "Version 2.0, January 2004" in text
    assert "END OF TERMS AND CONDITIONS" in text
    assert text.endswith("limitations under the License.\n")
