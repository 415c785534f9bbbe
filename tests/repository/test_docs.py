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
from support.paths import DOCS, REPOSITORY

from trio_worker import config, errors
from trio_worker.core.memory import DegradationStep


def _load_script(name: str) -> ModuleType:
    spec = importlib.util.spec_from_file_location(name, REPOSITORY / f"scripts/{name}.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def quotes() -> ModuleType:
    return _load_script("quotes")


@pytest.fixture(scope="module")
def generator(quotes: ModuleType) -> ModuleType:
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


# --- quotes ---------------------------------------------------------------------------------

UNKNOWN = """\
# A page

See `test_nothing_holds_this`, `tests/test_nothing.py`, `tests/sim/nothing.py` and `nothing.py`.
Set `nats.passwort_file`, `worker.engine.max_restart`, `max_dept`, `cluster.worker.modell: x` or
`TRIO_WORKER__WORKER__MODELL=x`, and look at `queue_waiting_seconds`, `trio_worker_nothing`,
`memory_bytes{kind="lost"}`, `requests_total{result="ok"}` and `requests_total{outcome="LATE"}`.
`QUEUE_OVERFULL` comes after `just nothing`, `just lint nothing`, `just bench nothing`,
`just test tests/test_nothing.py`, `just test -m nothing`, `just sim seedlings=3`,
`just docs --nothing`, `trio-worker serve`, `trio-worker ask --nothing`, `--verbosity 3`,
`trio-worker run --log-level loud`, `--set worker.modell=x` and `uv run just nothing-else`.

```sh
trio-worker schema | x && trio-worker unit upstart > trio-worker run
NO_SUCH=1 trio-worker run \\
  --port 3  # trio-worker walk
```

```yaml
cluster:
  worker:
    modell: x
```
"""


def test_what_does_not_exist_is_found_on_a_page(quotes: ModuleType) -> None:
    first = "trio-worker schema | x && trio-worker unit upstart > trio-worker run"
    second = "NO_SUCH=1 trio-worker run   --port 3  # trio-worker walk"
    assert quotes.unknown_quotes(UNKNOWN) == [
        "3: `test_nothing_holds_this`: there is no such test",
        "3: `tests/test_nothing.py`: there is no such file",
        "3: `tests/sim/nothing.py`: there is no such file",
        "3: `nothing.py`: there is no such file",
        "4: `nats.passwort_file`: there is no such key",
        "4: `worker.engine.max_restart`: there is no such key",
        "4: `max_dept`: this name is nowhere in the source",
        "4: `cluster.worker.modell: x`: there is no such key",
        "5: `TRIO_WORKER__WORKER__MODELL=x`: TRIO_WORKER__WORKER__MODELL names no key",
        "5: `queue_waiting_seconds`: there is no such metric",
        "5: `trio_worker_nothing`: there is no such metric",
        '6: `memory_bytes{kind="lost"}`: kind is never lost',
        '6: `requests_total{result="ok"}`: it has no label result',
        '6: `requests_total{outcome="LATE"}`: outcome is never LATE',
        "7: `QUEUE_OVERFULL`: this name is nowhere in the source",
        "7: `just nothing`: there is no recipe nothing",
        "7: `just lint nothing`: there is no recipe nothing",
        "7: `just bench nothing`: what is never nothing",
        "8: `just test tests/test_nothing.py`: there is no such file",
        "8: `just test -m nothing`: there is no marker nothing",
        "8: `just sim seedlings=3`: sim takes no seedlings=3",
        "9: `just docs --nothing`: docs has no option --nothing",
        "9: `trio-worker serve`: trio-worker has no command serve",
        "9: `trio-worker ask --nothing`: trio-worker ask has no option --nothing",
        "9: `--verbosity 3`: no command has the option --verbosity",
        "10: `trio-worker run --log-level loud`: log_level is never loud",
        "10: `--set worker.modell=x`: there is no key worker.modell",
        "10: `uv run just nothing-else`: there is no recipe nothing-else",
        f"13: `{first}`: trio-worker unit has no command upstart",
        f"14: `{second}`: this name is nowhere in the source",
        f"14: `{second}`: trio-worker run has no option --port",
        "19: `cluster:\n  worker:\n    modell: x`: there is no key cluster.worker.modell",
    ]


def test_what_exists_or_is_none_of_ours_is_no_fault(quotes: ModuleType) -> None:
    page = """\
`test_a_broken_link_is_found`, `tests/engine/test_engine_*.py`, `core/`, `stages/batcher.py`
`launch.py`, `nats.url`, `request_queue.max_depth`
`reject_when_full: false`, `worker.queue_ms`, `cluster.yaml`
`worker_draining`, `engine_restarts_total{reason="load"}`
`trio_worker_turn_seconds_count`, `DUPLICATE_REQUEST`
`just lint types`, `just bench scheduling --rounds 1`, `just chaos seconds=120 seed=7`, `tokens/s`
`just test -m "not mlx and not nats"`, `trio-worker ask "Why?" --no-stream`, `--set PATH=VALUE`
`uv run --no-group backend --extra cuda trio-worker run`, `systemctl status trio-worker`, `crash`
`trio-worker unit systemd --user`, `python -m trio_worker`, `models/mine`, `inference.cancel`

```python
max_dept = test_nothing_holds_this
```

```sh
sudo TRIO_WORKER_CACHE=x /opt/worker/bin/trio-worker unit launchd --name=two | tee trio-worker
```
"""
    assert quotes.unknown_quotes(page) == []


def test_a_query_for_what_no_worker_has_is_found(quotes: ModuleType) -> None:
    asked = 'sum(trio_worker_ready{instance=~"a"}) + trio_worker_turn_seconds_total'
    escaped = '"expr": "trio_worker_requests_total{outcome=~\\"ok|ENGINE_BROKE\\"}"'
    assert quotes.unknown_series(asked) == [
        "trio_worker_turn_seconds_total: there is no such metric"
    ]
    assert quotes.unknown_series(escaped) == [
        'trio_worker_requests_total{outcome=~"ok|ENGINE_BROKE"}: outcome is never ENGINE_BROKE'
    ]


def test_the_check_fails_for_a_page_that_quotes_what_does_not_exist(
    generator: ModuleType,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    page = tmp_path / "README.md"
    monkeypatch.setattr(generator, "ROOT", tmp_path)
    monkeypatch.setattr(generator, "QUERIES", ())
    monkeypatch.setattr(sys, "argv", ["generate_docs.py", "--check"])
    page.write_text("`just docs`")
    assert generator.main() == 0
    page.write_text("`just nothing`")
    assert generator.main() == 1
    assert capsys.readouterr().out == "README.md:1: `just nothing`: there is no recipe nothing\n"


def test_every_name_on_a_page_exists(generator: ModuleType) -> None:
    """Tests, files, commands, keys, metrics and codes; in the alerts and the panels, too."""
    assert generator.unknown_names() == []


def _leaves(tree: Any, path: str = "") -> dict[str, Any]:
    if not isinstance(tree, dict):
        return {path: tree}
    found: dict[str, Any] = {}
    for name, inner in tree.items():
        found |= _leaves(inner, f"{path}.{name}" if path else name)
    return found


def test_cluster_yaml_holds_every_key_with_its_default() -> None:
    """Below `tls`, which is null, there is nothing to be written out."""
    shipped = yaml.safe_load((REPOSITORY / "cluster.yaml").read_text(encoding="utf-8"))
    assert list(shipped) == ["cluster"]
    expected = {
        key.path: list(key.default) if isinstance(key.default, tuple) else key.default
        for key in config.all_keys()
        if not key.path.startswith("nats.tls.")
    }
    assert _leaves(shipped["cluster"]) == expected | {"nats.tls": None}
    text = (REPOSITORY / "cluster.yaml").read_text(encoding="utf-8")
    for key in config.all_keys():
        assert key.path.rpartition(".")[2] in text, key.path


def test_every_step_of_degradation_is_documented() -> None:
    text = (REPOSITORY / "docs/architecture.md").read_text(encoding="utf-8")
    for step in DegradationStep:
        assert f"| `{step}` |" in text


def test_every_key_is_documented() -> None:
    text = (REPOSITORY / "docs/configuration.md").read_text(encoding="utf-8")
    for key in config.all_keys():
        assert f"| `{key.path}` |" in text
        assert key.description


def test_the_table_of_layers_has_every_part_of_the_package() -> None:
    page = (REPOSITORY / "docs/architecture.md").read_text(encoding="utf-8")
    table = page.partition("## Layers")[2].partition("\n## ")[0]
    named = set(re.findall(r"`([\w/]+(?:\.py)?)`", table))
    parts = {
        f"{each.name}/" if each.is_dir() else each.name
        for each in (REPOSITORY / "trio_worker").iterdir()
        if each.suffix == ".py" or (each / "__init__.py").is_file()
    }
    assert parts - {"__init__.py"} <= named


def test_the_licence_is_complete() -> None:
    text = (REPOSITORY / "LICENSE").read_text(encoding="utf-8")
    assert "Version 2.0, January 2004" in text
    assert "END OF TERMS AND CONDITIONS" in text
    assert text.endswith("limitations under the License.\n")


# --- pages and links ------------------------------------------------------------------------

PAGES = sorted([*REPOSITORY.glob("docs/**/*.md"), *REPOSITORY.glob("*.md")])


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


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.relative_to(REPOSITORY).as_posix())
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
    site = yaml.safe_load((REPOSITORY / "mkdocs.yml").read_text(encoding="utf-8"))
    pages = [page.relative_to(DOCS).as_posix() for page in DOCS.glob("**/*.md")]
    assert sorted(_in_nav(site["nav"])) == sorted(pages)


def test_a_page_that_loads_something_from_elsewhere_is_found() -> None:
    hooks = _load_script("site_hooks")
    own = '<img src="images/a.png"><script src="../a.js"></script><a href="https://x.org/">x</a>'
    assert hooks.foreign(own) == []
    foreign = '<link rel=stylesheet href=\'//fonts.org/a\'><img alt="" src="http://x.org/a.png">'
    assert hooks.foreign(foreign) == ["//fonts.org/a", "http://x.org/a.png"]
