"""Folders that load, folders that are refused, and what the digest tells apart."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.numpy import load_file, save_file

from services.engine.attention.stored import FLOAT8
from services.engine.model.decoder import Decoder
from services.engine.model.errors import ModelCorrupt, ModelNotFound, UnsupportedModel
from services.engine.model.loader import LoadedModel, load_model
from tests.engine.model.running import PagedRunner, random_tokens
from tests.models import make_tiny_llama

Weights = dict[str, np.ndarray]
LAST = "model.layers.3.mlp.down_proj.weight"


def _load(folder: Path, dtype: torch.dtype = torch.float32) -> LoadedModel:
    return load_model(folder, device="cpu", dtype=dtype)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return make_tiny_llama(tmp_path / "model")


def _rewrite(folder: Path, change: Callable[[Weights], object]) -> None:
    weights = load_file(folder / "model.safetensors")
    change(weights)
    save_file(weights, folder / "model.safetensors")


def _set(folder: Path, **values: object) -> None:
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, **values}))


def _shard(folder: Path) -> dict[str, str]:
    weights = load_file(folder / "model.safetensors")
    (folder / "model.safetensors").unlink()
    names = sorted(weights)
    shards = {"a.safetensors": names[:10], "b.safetensors": names[10:]}
    for file, members in shards.items():
        save_file({name: weights[name] for name in members}, folder / file)
    weight_map = {name: file for file, members in shards.items() for name in members}
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    return weight_map


def test_sharded_equals_single(folder: Path, tiny: LoadedModel) -> None:
    _shard(folder)
    loaded = _load(folder)
    assert loaded.digest == tiny.digest
    tokens = random_tokens(20, 512)
    assert torch.equal(PagedRunner(loaded.model).prefill(tokens), PagedRunner(tiny.model).prefill(tokens))


def test_digest_names_weights_dtypes_and_rope(folder: Path, tiny: LoadedModel, tmp_path: Path) -> None:
    assert len(tiny.digest) == 16
    digests = {tiny.digest, _load(folder, torch.bfloat16).digest, _load(make_tiny_llama(tmp_path / "b", seed=1)).digest}
    assert _load(folder).digest == tiny.digest
    _rewrite(folder, lambda weights: weights[LAST].__imul__(1.01))
    digests.add(_load(folder).digest)
    _set(folder, rope_theta=20000.0)
    digests.add(_load(folder).digest)
    in_eight_bits = load_model(folder, device="cpu", dtype=torch.float32, kv_dtype=FLOAT8)
    digests.add(in_eight_bits.digest)
    assert len(digests) == 6
    as_ever = load_model(folder, device="cpu", dtype=torch.float32, kv_dtype=torch.float32)
    assert as_ever.digest == _load(folder).digest
    _set(folder, rope_theta=20000.0, eos_token_id=5)  # no part of what KV depends on
    assert _load(folder).digest in digests


def test_positions_that_nobody_wants_take_no_memory(folder: Path, tiny: LoadedModel) -> None:
    short = load_model(folder, device="cpu", dtype=torch.float32, max_context=50)
    assert (short.config.max_context, short.digest) == (50, tiny.digest)
    assert isinstance(short.model, Decoder)
    assert [table.cosine.shape[0] for table in short.model._rotary.values()] == [50]
    tokens = random_tokens(50, 512)
    assert torch.equal(PagedRunner(short.model).prefill(tokens), PagedRunner(tiny.model).prefill(tokens))
    assert load_model(folder, device="cpu", dtype=torch.float32, max_context=10**6).config.max_context == 4096


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda weights: weights.pop(LAST), rf"model lacks the tensor {LAST}"),
        (lambda weights: weights.update({LAST: weights[LAST][:, 1:].copy()}), rf"{LAST} has shape \(64, 127\)"),
        (lambda weights: weights.update({"model.extra": weights[LAST]}), r"model\.extra does not belong"),
        (lambda weights: weights.update({LAST: weights[LAST].astype(np.int32)}), rf"{LAST} holds torch\.int32"),
    ],
)
def test_tensors_that_do_not_fit(folder: Path, change: Callable[[Weights], object], words: str) -> None:
    _rewrite(folder, change)
    with pytest.raises((ModelCorrupt, UnsupportedModel), match=words):
        _load(folder)


def test_leftovers_that_are_known_to_be_unused(folder: Path, tiny: LoadedModel) -> None:
    frequencies = "model.layers.0.self_attn.rotary_emb.inv_freq"
    _rewrite(folder, lambda weights: weights.update({frequencies: np.zeros(8, dtype=np.float32)}))
    assert _load(folder).digest == tiny.digest
    _set(folder, tie_word_embeddings=True)  # the stored head is then a copy
    _load(folder)


@pytest.mark.parametrize("share", [0.0, 0.0001, 0.5, 0.9999])
def test_truncated(folder: Path, share: float) -> None:
    path = folder / "model.safetensors"
    content = path.read_bytes()
    path.write_bytes(content[: int(len(content) * share)])
    with pytest.raises(ModelCorrupt, match=r"model\.safetensors is not a whole safetensors file"):
        _load(folder)


def test_shards_that_do_not_fit(folder: Path) -> None:
    weight_map = _shard(folder)
    index = folder / "model.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": {**weight_map, LAST: "a.safetensors"}}))
    with pytest.raises(ModelCorrupt, match=rf"a\.safetensors lacks the tensor {LAST}"):
        _load(folder)
    index.write_text(json.dumps({"weight_map": {**weight_map, LAST: "../a.safetensors"}}))
    with pytest.raises(ModelCorrupt, match="not a file name"):
        _load(folder)
    index.write_text(json.dumps({"weight_map": {**weight_map, LAST: "c.safetensors"}}))
    with pytest.raises(ModelCorrupt, match=r"c\.safetensors is missing"):
        _load(folder)
    index.write_text("{}")
    with pytest.raises(ModelCorrupt, match="has no weight_map"):
        _load(folder)


def test_folders_without_what_is_needed(folder: Path, tmp_path: Path) -> None:
    (folder / "model.safetensors").rename(folder / "elsewhere")
    with pytest.raises(ModelNotFound, match=r"neither model\.safetensors nor"):
        _load(folder)
    (folder / "pytorch_model.bin").touch()
    with pytest.raises(UnsupportedModel, match="pickled"):
        _load(folder)
    (folder / "tokenizer.json").unlink()
    with pytest.raises(ModelNotFound, match=r"no tokenizer\.json"):
        _load(folder)
    (folder / "tokenizer.model").touch()
    with pytest.raises(UnsupportedModel, match=r"tokenizer\.model but no tokenizer\.json"):
        _load(folder)
    with pytest.raises(ModelNotFound, match=r"no config\.json"):
        _load(tmp_path)
