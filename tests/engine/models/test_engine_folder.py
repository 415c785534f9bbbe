"""What came as a model's folder and is none, or means ill: refused by name, and never run."""

from __future__ import annotations

import json
import os
import pickle
import shutil
import socket
import struct
import subprocess
import sys
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
from support.engine_rig import chat, opened
from support.tiny_model import write_tiny_model

from trio_worker.__main__ import main
from trio_worker.engine.models import CannotLoad
from trio_worker.engine.models import folder as folders
from trio_worker.engine.models.folder import Unfit, check_folder
from trio_worker.engine.models.load import load
from trio_worker.errors import ExitStatus

pytestmark = pytest.mark.mlx


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: Any) -> Path:
    return write_tiny_model(tmp_path_factory.mktemp("tiny"))


@pytest.fixture
def folder(tiny: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(tiny, tmp_path / "model"))


def change(folder: Path, name: str, **changes: Any) -> None:
    file = folder / name
    content = json.loads(file.read_text()) if file.exists() else {}
    file.write_text(json.dumps({**content, **changes}))


def quiet(*step: Any) -> None:
    pass


# --- numbers ------------------------------------------------------------------------------


def test_a_plain_folder_is_fit(folder: Path) -> None:
    check_folder(folder)


@pytest.mark.parametrize(
    ("file", "changes", "said"),
    [
        ("config.json", {"hidden_size": 10**9}, "hidden_size is 1000000000; expected 1 to"),
        ("config.json", {"hidden_size": 0}, "hidden_size is 0"),
        ("config.json", {"hidden_size": 1e300}, "hidden_size is 1e"),
        ("config.json", {"num_hidden_layers": 10**6}, "num_hidden_layers is 1000000"),
        ("config.json", {"num_hidden_layers": 9_999}, "9999, but the weights have 21 tensors"),
        ("config.json", {"vocab_size": -1}, "vocab_size is -1"),
        ("config.json", {"max_position_embeddings": 10**18}, "max_position_embeddings is 1"),
        ("config.json", {"head_dim": 10**12}, "head_dim is"),
        ("config.json", {"num_key_value_heads": 2**40}, "num_key_value_heads is"),
        ("config.json", {"num_local_experts": 2**40}, "num_local_experts is"),
        ("config.json", {"text_config": {"hidden_size": 10**9}}, "text_config.hidden_size is"),
        ("config.json", {"layer_types": [{"x": [10**20]}]}, "layer_types.x is"),
        ("config.json", {"anything": 10**400}, "a number of more than 30 digits"),
        ("config.json", {"quantization": {"group_size": 0, "bits": 4}}, "quantization.group_size"),
        ("config.json", {"quantization": {"group_size": 64, "bits": 0}}, "quantization.bits is 0"),
        ("config.json", {"sliding_window": 10**18}, "sliding_window is"),
        ("config.json", {"model_type": "../../evil"}, "model_type is '../../evil'"),
        ("config.json", {"model_type": None}, "model_type is None"),
        ("config.json", {"model_file": "evil.py"}, "model_file asks to run"),
        ("generation_config.json", {"eos_token_id": [10**18]}, "eos_token_id is"),
        ("tokenizer.json", {"added_tokens": [{"id": 2**32 - 1, "content": "x"}]}, "a token has"),
        ("tokenizer.json", {"model": {"type": "BPE", "vocab": {"a": 2**31}}}, "a token has"),
        ("added_tokens.json", {"<x>": 2**31}, "a token has the number"),
    ],
)
def test_absurd_values_are_named_with_their_file_and_key(
    folder: Path, file: str, changes: dict[str, Any], said: str
) -> None:
    change(folder, file, **changes)
    with pytest.raises(Unfit) as caught:
        check_folder(folder)
    assert str(folder / file) in str(caught.value)
    assert said in str(caught.value)
    assert len(str(caught.value)) < 500


@pytest.mark.parametrize(
    "changes",
    [
        {"rope_theta": 10**10, "rms_norm_eps": 1e-6, "partial_rotary_factor": 0.5},
        {"max_position_embeddings": 10_485_760, "sliding_window": None, "pad_token_id": -1},
        {"num_attention_heads": [4, 8], "moe_intermediate_size": 0, "tie_word_embeddings": True},
        {"vocab_size": 262_208, "eos_token_id": [1, 106], "time_step_limit": [0.0, float("inf")]},
        {"full_attention_layers": [0, 1], "routed_scaling_factor": 2.5, "dt_rank": "auto"},
    ],
)
def test_what_real_models_say_is_fit(folder: Path, changes: dict[str, Any]) -> None:
    change(folder, "config.json", **changes)
    check_folder(folder)


@pytest.mark.parametrize("file", ["config.json", "tokenizer_config.json", "generation_config.json"])
@pytest.mark.parametrize(
    ("text", "said"),
    [
        pytest.param("[" * 100_000 + "]" * 100_000, "nested deeper", id="deep for the parser"),
        pytest.param('{"a":' * 40 + "1" + "}" * 40, "nested deeper", id="deep"),
        pytest.param("[]", "no mapping", id="a list"),
        pytest.param("{", "no JSON", id="half"),
        pytest.param("\udcff", "no JSON", id="no text"),
        pytest.param('{"a": ' + "9" * 5000 + "}", "no JSON", id="a long number"),
    ],
)
def test_what_is_no_configuration_is_named(folder: Path, file: str, text: str, said: str) -> None:
    (folder / file).write_bytes(text.encode("utf-8", "surrogateescape"))
    with pytest.raises(Unfit, match=said) as caught:
        check_folder(folder)
    assert str(folder / file) in str(caught.value)


@pytest.mark.parametrize(
    ("file", "limit"),
    [("config.json", 16), ("tokenizer.json", 128), ("chat_template.jinja", 4), ("merges.txt", 256)],
)
def test_a_file_too_large_for_its_kind_is_not_read(folder: Path, file: str, limit: int) -> None:
    with (folder / file).open("ab") as sparse:
        sparse.truncate((limit << 20) + 1)
    with pytest.raises(Unfit, match=f"such a file has at most {limit} MB"):
        check_folder(folder)


# --- weights ------------------------------------------------------------------------------


def safetensors(header: Any, data: bytes = b"", *, length: int | None = None) -> bytes:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return struct.pack("<Q", len(text) if length is None else length) + text + data


def tensor(shape: Any, begin: Any, end: Any, dtype: Any = "F32") -> dict[str, Any]:
    return {"t": {"dtype": dtype, "shape": shape, "data_offsets": [begin, end]}}


@pytest.mark.parametrize(
    ("content", "said"),
    [
        pytest.param(b"", "no safetensors", id="nothing"),
        pytest.param(safetensors({}, length=2**63), "would have 9223372036854775808", id="header"),
        pytest.param(safetensors({}, b"x" * 50, length=40), "cannot be read", id="header of data"),
        pytest.param(safetensors(b"[" * 100_000), "cannot be read", id="nested"),
        pytest.param(safetensors([1]), "no mapping", id="a list"),
        pytest.param(safetensors({"t": 1}), "is not described", id="a number"),
        pytest.param(safetensors(tensor([2], 0, 8)), "reaches beyond", id="beyond the end"),
        pytest.param(safetensors(tensor([2], 8, 0), b"x" * 8), "reaches beyond", id="backwards"),
        pytest.param(safetensors(tensor([-2], 0, 8), b"x" * 8), "the shape", id="negative"),
        pytest.param(safetensors(tensor([2**40], 0, 8), b"x" * 8), "the shape", id="long"),
        pytest.param(safetensors(tensor([1] * 99, 0, 4), b"x" * 4), "the shape", id="dimensions"),
        pytest.param(
            safetensors(tensor([2**16, 2**16, 2**16, 2**16], 0, 0)), "0 bytes", id="overflow"
        ),
        pytest.param(safetensors(tensor([2], 0, 4), b"x" * 8), "has 4 bytes", id="too short"),
        pytest.param(safetensors(tensor([2], 0, "8"), b"x" * 8), "the offsets", id="offsets"),
        pytest.param(safetensors(tensor([2], 0, 4, ["F"]), b"xxxx"), None, id="an unknown type"),
    ],
)
def test_weights_lie_within_their_file(folder: Path, content: bytes, said: str | None) -> None:
    extra = folder / "model-00002-of-00002.safetensors"
    extra.write_bytes(content)
    if said is None:
        check_folder(folder)
        with pytest.raises(CannotLoad):
            load(str(folder), None, quiet)
        return
    with pytest.raises(Unfit, match=said) as caught:
        check_folder(folder)
    assert str(extra) in str(caught.value)


# --- links and what is no file ------------------------------------------------------------


def test_links_inside_the_folder_lead_where_they_may(folder: Path, tmp_path: Path) -> None:
    (folder / "weights").mkdir()
    (folder / "model.safetensors").rename(folder / "weights/w")
    (folder / "model.safetensors").symlink_to("weights/w")
    linked = tmp_path / "by another name"
    linked.symlink_to(folder)
    check_folder(linked)


@pytest.mark.parametrize("file", ["config.json", "model.safetensors", "chat_template.jinja", "sub"])
def test_a_link_out_of_the_folder_is_refused(folder: Path, tmp_path: Path, file: str) -> None:
    outside = tmp_path / "outside"
    outside.mkdir() if file == "sub" else outside.write_text("{}")
    (folder / file).unlink(missing_ok=True)
    (folder / file).symlink_to(Path("..") / "outside")
    with pytest.raises(Unfit, match=f"{file} is a link to {outside}, outside"):
        check_folder(folder)


def test_a_link_out_of_the_folder_of_templates_is_refused(folder: Path) -> None:
    (folder / "additional_chat_templates").mkdir()
    (folder / "additional_chat_templates/x.jinja").symlink_to("/etc/passwd")
    with pytest.raises(Unfit, match="outside"):
        check_folder(folder)


@pytest.mark.parametrize("target", ["nowhere", "config.json"])
def test_a_link_that_leads_nowhere_is_refused(folder: Path, target: str) -> None:
    (folder / "config.json").unlink()
    (folder / "config.json").symlink_to(target)
    with pytest.raises(Unfit, match="leads nowhere"):
        check_folder(folder)


def test_the_cache_of_hugging_face_links_from_snapshots_to_blobs(
    folder: Path, tmp_path: Path
) -> None:
    repository = tmp_path / "models--somebody--tiny"
    snapshot, blobs = repository / "snapshots" / "abc", repository / "blobs"
    snapshot.mkdir(parents=True)
    blobs.mkdir()
    for file in folder.iterdir():
        file.rename(blobs / f"hash-of-{file.name}")
        (snapshot / file.name).symlink_to(Path("../../blobs") / f"hash-of-{file.name}")
    check_folder(snapshot)
    assert load(str(snapshot), None, quiet).context_length

    other = tmp_path / "models--somebody--else" / "blobs"
    other.mkdir(parents=True)
    (other / "x").write_text("{}")
    (snapshot / "generation_config.json").symlink_to(other / "x")
    with pytest.raises(Unfit, match="outside"):
        check_folder(snapshot)


def make_socket(path: Path) -> None:
    with socket.socket(socket.AF_UNIX) as bound:
        bound.bind(str(path))


@pytest.mark.parametrize("make", [os.mkfifo, make_socket])
@pytest.mark.parametrize("file", ["config.json", "model.safetensors", "tokenizer.model"])
def test_what_is_no_file_is_not_waited_for(
    folder: Path, monkeypatch: pytest.MonkeyPatch, file: str, make: Callable[[Path], None]
) -> None:
    monkeypatch.chdir(folder)  # a socket's path is short
    (folder / file).unlink(missing_ok=True)
    make(Path(file))
    with pytest.raises(CannotLoad, match=f"{file} is neither a file nor a folder"):
        load(str(folder), None, quiet)


# --- programs -----------------------------------------------------------------------------


def program(marker: Path) -> str:
    return f"open({str(marker)!r}, 'w')\nclass Model: pass\nModelArgs = Model\n"


class Evil:
    """Writes a file when it is unpickled."""

    def __init__(self, marker: Path) -> None:
        self.marker = marker

    def __reduce__(self) -> Any:
        return open, (str(self.marker), "w")


AUTO_MAP = {
    "AutoConfig": "evil.Config",
    "AutoModelForCausalLM": "evil.Model",
    "AutoTokenizer": ["evil.Tokenizer", "evil.Tokenizer"],
}


@pytest.mark.parametrize(
    ("file", "changes"),
    [
        ("config.json", {"model_file": "evil.py"}),
        ("config.json", {"model_type": "evil"}),
        ("config.json", {"auto_map": AUTO_MAP}),
        ("tokenizer_config.json", {"auto_map": AUTO_MAP}),
        ("tokenizer_config.json", {"auto_map": AUTO_MAP, "tokenizer_class": "Tokenizer"}),
        ("tokenizer_config.json", {"tokenizer_class": "evil.Tokenizer"}),
        ("tokenizer_config.json", {"chat_template_type": "evil"}),
        ("tokenizer_config.json", {"tool_parser_type": "evil"}),
    ],
)
def test_no_program_of_the_folder_is_run(
    folder: Path, tmp_path: Path, file: str, changes: dict[str, Any]
) -> None:
    """Whether the model loads without it or not."""
    marker = tmp_path / "it ran"
    (folder / "evil.py").write_text(program(marker))
    change(folder, file, **changes)
    with suppress(CannotLoad):
        load(str(folder), None, quiet)
    assert not marker.exists()


def test_nothing_is_unpickled(folder: Path, tmp_path: Path) -> None:
    marker = tmp_path / "it ran"
    weights = pickle.dumps(Evil(marker))
    for name in ("pytorch_model.bin", "model.pt", "model.npz", "tokenizer.pkl", "model.bin"):
        (folder / name).write_bytes(weights)
    assert load(str(folder), None, quiet).context_length
    (folder / "model.safetensors").unlink()
    with pytest.raises(CannotLoad, match=r"has no model\*\.safetensors"):
        load(str(folder), None, quiet)
    (folder / "model.safetensors").write_bytes(weights)
    with pytest.raises(CannotLoad, match="no safetensors file"):
        load(str(folder), None, quiet)
    assert not marker.exists()


@pytest.fixture
def marker(folder: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """There if a program ran that lies where the worker was started: in the model's folder."""
    marker = folder / "it ran"
    for name in ("transformers", "mlx_lm", "jinja2", "trio_worker"):
        (folder / f"{name}.py").write_text(f"open({str(marker)!r}, 'w')")
    monkeypatch.chdir(folder)
    return marker


async def test_the_engine_imports_nothing_from_where_the_worker_was_started(
    folder: Path, marker: Path
) -> None:
    async with opened(".", prewarm=False) as engine:
        assert await engine.tokenise(chat(("user", "hello")))
    assert not marker.exists()


def test_the_commands_import_nothing_from_where_they_were_started(
    folder: Path, marker: Path
) -> None:
    assert main(["model", "prepare", "."]) == ExitStatus.OK
    assert not marker.exists()


def test_the_command_says_what_is_wrong_and_exits_with_78(folder: Path) -> None:
    change(folder, "config.json", hidden_size=10**9)
    done = subprocess.run(
        [sys.executable, "-m", "trio_worker.engine", "check", str(folder)],
        capture_output=True,
        check=False,
        timeout=60,
    )
    assert done.returncode == ExitStatus.CONFIG
    assert done.stderr.decode().endswith(
        f"{folder / 'config.json'}: hidden_size is 1000000000; expected 1 to {2**24}\n"
    )


def test_the_limits_leave_room_for_what_there_is() -> None:
    """The largest files of well-known models: a vocabulary of 262,144, 90,000 tensors."""
    sizes = dict(folders.SIZES)
    assert sizes["tokenizer.json"] > 40 << 20
    assert sizes["*.index.json"] > 10 << 20
    assert folders.TOKENS_MAX > 10 * 262_144
