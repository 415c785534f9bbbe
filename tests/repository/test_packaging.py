"""What is shipped: the source distribution, the wheel made of it, and whether that runs elsewhere.

Built and installed offline: the build backend is among the development dependencies, and the
fresh environment borrows the dependencies of this one.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import sysconfig
import tarfile
import zipfile
from dataclasses import dataclass
from pathlib import Path

import pytest
from support.commands import clean_environment, running_command
from support.paths import PACKAGE, REPOSITORY

from trio_worker import __version__

pytestmark = pytest.mark.process


@dataclass(frozen=True)
class Built:
    wheel: Path
    sdist: Path


def uv(*arguments: str | Path) -> None:
    program = os.environ.get("UV") or shutil.which("uv")
    if program is None:
        pytest.fail("uv is not on this machine: `pip install uv`")
    done = subprocess.run(
        [program, *arguments, "--offline", "--no-config", "--quiet"],
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> Built:
    """The source distribution of this tree, and the wheel of that, not of the tree."""
    folder = tmp_path_factory.mktemp("dist")
    uv("build", "--no-build-isolation", "--python", sys.executable, "--out-dir", folder, REPOSITORY)
    (wheel,) = folder.glob("*.whl")
    (sdist,) = folder.glob("*.tar.gz")
    return Built(wheel=wheel, sdist=sdist)


def shipped(folder: str) -> set[str]:
    """The files below a folder of this tree that are no leftovers of running it."""
    return {
        path.relative_to(REPOSITORY).as_posix()
        for path in (REPOSITORY / folder).rglob("*")
        if path.is_file()
        and "__pycache__" not in path.parts
        and not any(part.startswith(".") for part in path.relative_to(REPOSITORY).parts)
    }


def test_the_wheel_holds_the_package_and_nothing_else(built: Built) -> None:
    names = set(zipfile.ZipFile(built.wheel).namelist())
    information = f"trio_worker-{__version__}.dist-info/"
    assert {name for name in names if not name.startswith(information)} == shipped("trio_worker")
    assert f"{information}licenses/LICENSE" in names
    assert names >= {
        "trio_worker/py.typed",
        "trio_worker/gateway/page/chat.js",
        "trio_worker/gateway/page/index.html",
        "trio_worker/monitoring/page/dashboard.js",
        "trio_worker/monitoring/page/index.html",
        "trio_worker/monitoring/page/uplot-LICENSE",
    }


def test_the_source_distribution_can_be_tested_and_documented(built: Built) -> None:
    top = f"trio_worker-{__version__}/"
    with tarfile.open(built.sdist) as archive:
        names = {name.removeprefix(top) for name in archive.getnames()}
    expected = shipped("trio_worker") | shipped("tests") | shipped("docs") | shipped("scripts")
    # Git's list of what to ignore is added by the build backend.
    assert names == expected | {
        ".gitignore",
        "CHANGELOG.md",
        "LICENSE",
        "PKG-INFO",
        "README.md",
        "cluster.yaml",
        "justfile",
        "mkdocs.yml",
        "pyproject.toml",
    }


@pytest.fixture(scope="module")
def elsewhere(built: Built, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """`trio-worker` installed from the wheel into an environment of its own."""
    environment = tmp_path_factory.mktemp("elsewhere") / "venv"
    uv("venv", "--python", sys.executable, environment)
    python = environment / "bin/python"
    uv("pip", "install", "--python", python, "--no-deps", built.wheel)
    (site,) = environment.glob("lib/python*/site-packages")
    # Last on the path, and its own .pth files are not read: not a way to this tree.
    (site / "borrowed.pth").write_text(sysconfig.get_path("purelib") + "\n")
    return environment / "bin/trio-worker"


def run(program: Path, *arguments: str) -> str:
    return subprocess.run(
        [program, *arguments],
        cwd=program.parent,
        env=clean_environment(),
        capture_output=True,
        text=True,
        check=True,
    ).stdout


def test_an_installed_worker_knows_itself_and_its_files(elsewhere: Path) -> None:
    assert run(elsewhere, "--version") == f"trio-worker {__version__}\n"
    assert run(elsewhere, "check-config").startswith("# the defaults: valid.")
    assert '"$schema"' in run(elsewhere, "schema")
    assert "ExecStart=" in run(elsewhere, "unit", "systemd")
    assert "<plist" in run(elsewhere, "unit", "launchd")
    where = run(elsewhere.with_name("python"), "-c", "import trio_worker as t; print(t.__file__)")
    assert Path(where.strip()).is_relative_to(elsewhere.parent.parent)


@pytest.mark.nats
async def test_an_installed_worker_serves_its_page(elsewhere: Path, tmp_path: Path) -> None:
    # The nats-server is borrowed, too.
    env = {"PATH": f"{sysconfig.get_path('scripts')}:{os.environ['PATH']}"}
    async with running_command(
        tmp_path, "--engine", "simulated", program=[str(elsewhere)], env=env
    ) as worker:
        await worker.wait_ready()
        status, script = await worker.get("/page/dashboard.js")
    assert status == 200
    assert script == (PACKAGE / "monitoring/page/dashboard.js").read_text(encoding="utf-8")
