"""Whatever stands in a model's files: it is loaded, or refused in a sentence that a person can use."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.numpy import load_file

from services.engine.model.config import MAX_LAYERS, load_config
from services.engine.model.errors import ModelCorrupt, ModelError
from services.engine.model.gguf import convert as converting
from services.engine.model.gguf.convert import convert
from services.engine.model.gguf.reader import GgufFile
from services.engine.model.gguf.tokenizer import tokenizer_files
from services.engine.model.loader import load_model
from services.engine.model.tokenizer_files import load_tokenizer_files
from tests.engine.model.gguf_files import write_gguf, write_vocabulary
from tests.models import make_tiny_llama

NONSENSE: tuple[Any, ...] = (
    None, True, -1, 0, 3, 2**31 - 1, 2**40, 1.5, float("nan"), "x", [], [-1], ["x"], [[]], {"x": 1},
)  # fmt: skip
# What a config.json may say beside what the tiny model's does.
MORE_KEYS = (
    "layer_types", "rope_scaling", "rope_parameters", "partial_rotary_factor", "sliding_window", "hidden_activation",
    "query_pre_attn_scalar", "attn_logit_softcapping", "final_logit_softcapping", "quantization_config",
    "rope_local_base_freq", "text_config", "mlp_bias", "attention_bias",
)  # fmt: skip


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return make_tiny_llama(tmp_path / "model")


def _versions(value: Any) -> Iterator[Any]:
    """A JSON value with each of its parts replaced by nonsense, the whole of it first."""
    yield from NONSENSE
    items = value.items() if isinstance(value, dict) else enumerate(value[:2]) if isinstance(value, list) else ()
    for key, part in items:
        for version in _versions(part):
            changed = value.copy()
            changed[key] = version
            yield changed


def _try_all(path: Path, value: dict[str, Any], load: Callable[[], object]) -> int:
    """Writes all versions of a file and loads each. Returns how many are refused; other errors get out."""
    num_refused = 0
    for version in _versions(value):
        path.write_text(json.dumps(version))
        num_refused += _is_refused(load)
    return num_refused


def _is_refused(load: Callable[[], object]) -> bool:
    """Whether it raises a ModelError, in one line."""
    refusal = ""
    try:
        load()
    except ModelError as error:
        refusal = str(error)
    assert "\n" not in refusal
    return bool(refusal)


@pytest.mark.slow
def test_config(folder: Path) -> None:
    path = folder / "config.json"
    config = json.loads(path.read_text())
    rope = {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}
    more = dict.fromkeys(MORE_KEYS) | {"rope_scaling": rope}
    for name in ("LlamaForCausalLM", "Gemma3ForConditionalGeneration"):
        assert _try_all(path, {**config, **more, "architectures": [name]}, lambda: load_config(folder)) > 100


def test_layers_are_counted_before_they_are_listed(folder: Path) -> None:
    path = folder / "config.json"
    config = json.loads(path.read_text())
    path.write_text(json.dumps({**config, "num_hidden_layers": MAX_LAYERS + 1}))
    with pytest.raises(ModelCorrupt, match="num_hidden_layers"):
        load_config(folder)


def test_no_memory_is_taken_for_sizes_that_the_weights_do_not_have(folder: Path) -> None:
    path = folder / "config.json"
    config = json.loads(path.read_text())
    for name in ("hidden_size", "intermediate_size", "vocab_size"):
        path.write_text(json.dumps({**config, name: 2**31 - 2}))
        with pytest.raises(ModelCorrupt, match=r"model\.safetensors: the tensor .* has shape"):
            load_model(folder, device="cpu", dtype=torch.float32)


def test_index_of_shards(folder: Path) -> None:
    weights = load_file(folder / "model.safetensors")
    (folder / "model.safetensors").rename(folder / "a.safetensors")
    index = folder / "model.safetensors.index.json"
    weight_map = dict.fromkeys(list(weights)[:2], "a.safetensors")

    def load() -> None:
        load_model(folder, device="cpu", dtype=torch.float32)

    assert _try_all(index, {"weight_map": weight_map}, load) > 50


@pytest.mark.slow
@pytest.mark.parametrize("name", ["tokenizer.json", "tokenizer_config.json"])
def test_tokenizer(folder: Path, name: str) -> None:
    path = folder / name
    content = json.loads(path.read_text())
    if name == "tokenizer.json":  # what is read of it
        content = {"added_tokens": content["added_tokens"][1:], "model": {"vocab": {"<|im_start|>": 1}}}
    else:
        content["chat_template"] = [{"name": "default", "template": "x"}]
    assert _try_all(path, content, lambda: load_tokenizer_files(folder, ())) > 20


def test_a_template_that_is_no_text(folder: Path) -> None:
    (folder / "chat_template.jinja").write_bytes(b"\xff\xfe")
    with pytest.raises(ModelCorrupt, match=r"chat_template\.jinja cannot be read as text"):
        load_tokenizer_files(folder, ())


@pytest.mark.slow
def test_gguf_metadata(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = write_gguf(make_tiny_llama(tmp_path / "small", layers=1, hidden=16), tmp_path / "model.gguf")
    target, read, file = tmp_path / "converted", GgufFile.get, GgufFile(path)
    target.mkdir()
    monkeypatch.setattr(converting, "GgufFile", lambda path: file)  # to read it takes longer than to convert it
    asked: set[str] = set()
    lies: dict[str, Any] = {}

    def get(self: GgufFile, name: str) -> Any:
        asked.add(name)
        return lies[name] if name in lies else read(self, name)

    monkeypatch.setattr(GgufFile, "get", get)
    convert(path, target)
    num_refused = 0
    for name in sorted(asked):
        for value in NONSENSE:
            lies = {name: value}
            num_refused += _is_refused(lambda: convert(path, target))
    assert num_refused > 100


def test_gguf_unknown_token(tmp_path: Path) -> None:
    path = write_vocabulary(tmp_path / "a.gguf", "llama", ["a", "b"], [1, 1], [0.0, 0.0], unknown_token_id=2)
    with pytest.raises(ModelCorrupt, match=r"a\.gguf: the unknown token 2 is not in its vocabulary"):
        tokenizer_files(GgufFile(path))


def test_gguf_kinds_of_tokens_that_it_does_not_have(tmp_path: Path) -> None:
    path = write_vocabulary(tmp_path / "a.gguf", "llama", ["a", "b"], [1, 1, 3], [0.0, 0.0])
    with pytest.raises(ModelCorrupt, match="3 kinds of tokens for 2 tokens"):
        tokenizer_files(GgufFile(path))


def test_gguf_rows_that_are_no_heads(tmp_path: Path, folder: Path) -> None:
    path = write_gguf(folder, tmp_path / "a.gguf", metadata={"attention.head_count": 3, "attention.head_count_kv": 1})
    (tmp_path / "converted").mkdir()
    with pytest.raises(ModelCorrupt, match=r"a\.gguf: the 64 rows of blk\.0\.attn_q\.weight are no 3 heads"):
        convert(path, tmp_path / "converted")
