"""The documentation and the shipped files say what the code says."""

from __future__ import annotations

import importlib.util
import re
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import yaml

from trio_worker import config, errors

ROOT = Path(__file__).resolve().parent.parent


def _load_script(name: str) -> ModuleType:
    spec = importlib.util.spec_from_file_location(name, ROOT / f"scripts/{name}.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def generator() -> ModuleType:
    return _load_script("generate_docs")


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


# --- pages and links ------------------------------------------------------------------------

PAGES = sorted([*ROOT.glob("docs/**/*.md"), *ROOT.glob("*.md")])


def _anchors(text: str) -> set[str]:
    """As the repository's view and the site both make them of headings."""
    prose = re.sub(r"^```.*?^```", "", text, flags=re.DOTALL | re.MULTILINE)
    headings = re.findall(r"^#+ +(.+)$", prose, re.MULTILINE)
    return {re.sub(r"[^\w\s-]", "", each.lower()).strip().replace(" ", "-") for each in headings}


def broken_links(page: Path) -> list[str]:
    """Relative links of a page that lead nowhere in the repository's view."""
    broken = []
    prose = re.sub(r"^```.*?^```", "", page.read_text("utf-8"), flags=re.DOTALL | re.MULTILINE)
    for target in re.findall(r"\]\(([^)\s]+)\)", prose):
        if re.match(r"[a-z]+:", target):
            continue
        path, _, anchor = target.partition("#")
        file = (page.parent / path) if path else page
        if not file.exists() or (anchor and anchor not in _anchors(file.read_text("utf-8"))):
            broken.append(target)
    return broken


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.relative_to(ROOT).as_posix())
def test_every_link_leads_somewhere(page: Path) -> None:
    """In the repository's view; `just docs` asks the same of the site."""
    assert broken_links(page) == []


def test_a_broken_link_is_found(tmp_path: Path) -> None:
    page = tmp_path / "page.md"
    page.write_text("# A `b/c` d\n[a](#a-bc-d) [b](#x) [c](no.md) [d](page.md#x) <http://y>\n")
    assert broken_links(page) == ["#x", "no.md", "page.md#x"]


def _in_nav(nav: Any) -> list[str]:
    if isinstance(nav, str):
        return [nav]
    inner = nav.values() if isinstance(nav, dict) else nav
    return [page for each in inner for page in _in_nav(each)]


def test_every_page_has_its_place_on_the_site() -> None:
    site = yaml.safe_load((ROOT / "mkdocs.yml").read_text(encoding="utf-8"))
    pages = [page.relative_to(ROOT / "docs").as_posix() for page in ROOT.glob("docs/**/*.md")]
    assert sorted(_in_nav(site["nav"])) == sorted(pages)


def test_a_page_that_loads_something_from_elsewhere_is_found() -> None:
    hooks = _load_script("site_hooks")
    own = '<img src="images/a.png"><script src="../a.js"></script><a href="https://x.org/">x</a>'
    assert hooks.foreign(own) == []
    foreign = '<link rel=stylesheet href=\'//fonts.org/a\'><img alt="" src="http://x.org/a.png">'
    assert hooks.foreign(foreign) == ["//fonts.org/a", "http://x.org/a.png"]
