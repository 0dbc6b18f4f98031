"""GGUF files compute what the folder they came from computes, convert once, and fail by name."""

from __future__ import annotations

import json
import shutil
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from services.engine.model.checkpoint import PACKED_FILE, open_checkpoint
from services.engine.model.config import load_config
from services.engine.model.decoder import LayerWeights
from services.engine.model.decoder_weights import read_decoder_weights
from services.engine.model.errors import ModelCorrupt, ModelNotFound, UnsupportedModel
from services.engine.model.gguf.convert import converted_folder
from services.engine.model.gguf.packing import is_packable, packed
from services.engine.model.gguf.reader import GgufFile, GgufTensor
from services.engine.model.linear.blocks import Blocks
from services.engine.model.linear.factory import linear_maker
from services.engine.model.linear.form import WeightForm
from services.engine.model.loader import LoadedModel, load_model
from services.engine.model.rope import frequencies, plain_frequencies
from services.engine.model.rope_config import RopeConfig
from services.engine.model.shard import Shard
from tests.engine.model.gguf_files import write_gguf
from tests.engine.model.random_models import VARIANTS, WINDOW, save_random
from tests.engine.model.running import PagedRunner, random_tokens, relative_error
from tests.models import make_tiny_llama

TOKENS = random_tokens(60, 512)


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return tmp_path / "cache" / "microserve"


def _logits(source: Path) -> torch.Tensor:
    return PagedRunner(load_model(source, device="cpu", dtype=torch.float32).model).prefill(TOKENS)


def _load(source: Path, form: WeightForm) -> LoadedModel:
    cpu = torch.device("cpu")
    return load_model(source, device=cpu, dtype=torch.float32, linear=linear_maker(cpu, torch.float32, 1, form))


@pytest.mark.parametrize(
    ("quantization", "error", "stored"),
    [("F32", 0.0, "F32"), ("F16", 0.01, "F16"), ("BF16", 0.1, "BF16"), ("Q8_0", 0.1, "F32"), ("Q4_1", 1.0, "F32")],
)
def test_equals_the_folder(
    tmp_path: Path, tiny: LoadedModel, tiny_folder: Path, quantization: str, error: float, stored: str
) -> None:
    path = write_gguf(tiny_folder, tmp_path / "model.gguf", quantization)
    expected = PagedRunner(tiny.model).prefill(TOKENS)
    assert relative_error(_logits(path), expected) <= error
    content = (converted_folder(path) / "model.safetensors").read_bytes()
    header = json.loads(content[8 : 8 + int.from_bytes(content[:8], "little")])
    assert header["model.layers.0.mlp.up_proj.weight"]["dtype"] == stored


@pytest.mark.parametrize(
    ("quantization", "block_bytes", "num_halves"), [("Q4_0", 18, 1), ("Q4_1", 20, 2), ("Q5_0", 22, 1), ("Q8_0", 34, 1)]
)
def test_blocks_hold_the_very_values_of_the_file(quantization: str, block_bytes: int, num_halves: int) -> None:
    tensor = _stored(quantization, block_bytes, 32, num_halves)
    assert np.array_equal(_blocks(tensor).values().numpy(), tensor.dequantized())


def test_blocks_of_k_quants_round_nothing_but_scales() -> None:
    tensor = _stored("Q4_K", 144, 256, 2)
    blocks, exact = _blocks(tensor), tensor.dequantized()
    assert blocks.minimums is not None
    largest = (blocks.scales.float().abs() * 15 + blocks.minimums.float().abs()).repeat_interleave(32, 1).numpy()
    assert (np.abs(blocks.values().numpy() - exact) <= largest / 2048).all()


def _stored(quantization: str, block_bytes: int, block_size: int, num_halves: int) -> GgufTensor:
    """48 rows of 512 values: every byte at random, but for the float16 numbers that a block begins with."""
    random = np.random.default_rng(0)
    data = random.integers(0, 256, (48, 512 // block_size, block_bytes), np.uint8)
    halves = random.normal(0, 0.01, (*data.shape[:2], num_halves)).astype(np.float16)
    data[..., : 2 * num_halves] = halves.view(np.uint8)
    return GgufTensor("blk.0.ffn_up.weight", (48, 512), quantization, data.reshape(48, -1))


def _blocks(tensor: GgufTensor) -> Blocks:
    parts = {name: torch.from_numpy(np.ascontiguousarray(part)) for name, part in packed(tensor).arrays().items()}
    return Blocks(tensor.shape[1], **parts)


@pytest.mark.parametrize("quantization", ["Q4_0", "Q4_1", "Q8_0"])
def test_packed_weights_are_those_of_the_file(tmp_path: Path, tiny_folder: Path, quantization: str) -> None:
    path = write_gguf(tiny_folder, tmp_path / "model.gguf", quantization)
    tensors = {name: tensor for name, tensor in GgufFile(path).tensors.items() if is_packable(tensor)}
    assert {"token_embd.weight", "blk.0.attn_q.weight", "blk.1.ffn_down.weight"} <= set(tensors)
    for tensor in tensors.values():
        assert np.array_equal(_blocks(tensor).values().numpy(), tensor.dequantized())


@pytest.mark.parametrize("quantization", ["Q4_0", "Q4_1", "Q8_0"])
def test_packed_equals_float32_but_for_the_rounding_of_rows(
    tmp_path: Path, tiny_folder: Path, quantization: str
) -> None:
    path = write_gguf(tiny_folder, tmp_path / "model.gguf", quantization)
    for form, bound in ((WeightForm.PACKED, 0.03), (WeightForm.PACKED_16, 3e-4)):
        assert relative_error(PagedRunner(_load(path, form).model).prefill(TOKENS), _logits(path)) < bound


@pytest.mark.parametrize(("quantization", "num_digests"), [("Q4_1", 4), ("F16", 3)])
def test_digest_names_the_form_of_weights(
    tmp_path: Path, tiny_folder: Path, quantization: str, num_digests: int
) -> None:
    """KV moves only between engines that compute with the same numbers: int8 rounds those of a packed file again."""
    path = write_gguf(tiny_folder, tmp_path / "model.gguf", quantization)
    digests = [_load(path, form).digest for form in WeightForm]
    assert len(set(digests)) == num_digests
    assert digests[0] not in digests[1:]


@torch.inference_mode()
def test_ranks_share_packed_weights(tmp_path: Path, tiny_folder: Path) -> None:
    folder = converted_folder(write_gguf(tiny_folder, tmp_path / "model.gguf", "Q4_1"))
    config, cpu = load_config(folder), torch.device("cpu")
    maker = linear_maker(cpu, torch.float32, 1, WeightForm.PACKED)

    def read(shard: Shard) -> LayerWeights:
        with open_checkpoint(folder) as checkpoint:
            layer = read_decoder_weights(checkpoint, config, torch.float32, cpu, maker, shard).layers[0]
            assert checkpoint.has_read_packed
            return layer

    whole, first, second = read(Shard()), read(Shard(0, 2)), read(Shard(1, 2))
    rows = torch.randn(5, config.intermediate_size, generator=torch.Generator().manual_seed(0))
    half = config.intermediate_size // 2
    parts = first.down(rows[:, :half]) + second.down(rows[:, half:])
    torch.testing.assert_close(parts, whole.down(rows), rtol=1e-5, atol=1e-5)
    hidden = rows[:, : config.hidden_size].contiguous()
    gates = [layer.gate_up(hidden).chunk(2, dim=-1) for layer in (first, second)]
    expected = whole.gate_up(hidden)
    assert torch.equal(torch.cat([*(gate for gate, _ in gates), *(up for _, up in gates)], dim=-1), expected)


def test_packed_parts_of_another_shape_are_refused(tmp_path: Path, tiny_folder: Path) -> None:
    path = write_gguf(tiny_folder, tmp_path / "model.gguf", "Q4_1")
    folder = converted_folder(path)
    whole = load_file(folder / PACKED_FILE)
    save_file({name: part[:-1] for name, part in whole.items()}, folder / PACKED_FILE)
    with pytest.raises(ModelCorrupt, match=r"model\.packed: the tensor .* is not"):
        _load(path, WeightForm.PACKED)
    (folder / PACKED_FILE).write_bytes((folder / PACKED_FILE).read_bytes()[:-8])
    with pytest.raises(ModelCorrupt, match=r"model\.packed is not a whole safetensors file"):
        _load(path, WeightForm.PACKED)


def test_configuration_and_companions(tmp_path: Path, tiny: LoadedModel, tiny_folder: Path) -> None:
    loaded = load_model(write_gguf(tiny_folder, tmp_path / "model.gguf"), device="cpu", dtype=torch.float32)
    assert loaded.config.eos_token_ids == (2,)
    assert loaded.config.max_context == tiny.config.max_context
    assert loaded.config.layers[0].rope == tiny.config.layers[0].rope
    assert loaded.tokenizer.chat_template == "{{ messages }}"
    assert (loaded.tokenizer.bos_token, loaded.tokenizer.bos_token_id) == ("<|im_start|>", 1)
    assert loaded.tokenizer.eos_token == "<|im_end|>"


def test_converts_once_for_equal_content(tmp_path: Path, tiny_folder: Path, cache: Path) -> None:
    path = write_gguf(tiny_folder, tmp_path / "model.gguf")
    folder = converted_folder(path)
    written = (folder / "model.safetensors").stat().st_mtime_ns
    copy = tmp_path / "copy.gguf"
    copy.write_bytes(path.read_bytes())
    assert converted_folder(path) == converted_folder(copy) == folder
    assert (folder / "model.safetensors").stat().st_mtime_ns == written
    other = write_gguf(make_tiny_llama(tmp_path / "other", seed=1), path)
    assert converted_folder(other) != folder


def test_llama3_rope_is_recognised_by_its_numbers(tmp_path: Path, tiny_folder: Path) -> None:
    rope = RopeConfig(500000.0, "llama3", 32.0, 1.0, 4.0, 8192)
    divisors = (plain_frequencies(rope, 16) / frequencies(rope, 16)).numpy()
    stretched = {"metadata": {"rope.freq_base": 500000.0}, "extra_tensors": {"rope_freqs.weight": divisors}}
    path = write_gguf(tiny_folder, tmp_path / "model.gguf", **stretched)
    assert load_model(path, device="cpu", dtype=torch.float32).config.layers[0].rope == rope
    stretched["extra_tensors"] = {"rope_freqs.weight": divisors + 0.1}
    with pytest.raises(UnsupportedModel, match=r"other\.gguf are not Llama 3's"):
        converted_folder(write_gguf(tiny_folder, tmp_path / "other.gguf", **stretched))


@pytest.mark.slow
@pytest.mark.parametrize(
    ("variant", "architecture", "metadata"),
    [
        ("llama", "llama", {}),
        ("qwen2", "qwen2", {}),
        ("qwen3", "qwen3", {}),
        ("gemma", "gemma", {}),
        ("gemma2", "gemma2", {"attn_logit_softcapping": 2.0, "final_logit_softcapping": 3.0}),
        ("gemma3", "gemma3", {"rope.freq_base": 1e6}),
    ],
)
def test_every_architecture_equals_its_folder(
    tmp_path: Path, tiny_folder: Path, variant: str, architecture: str, metadata: dict[str, Any]
) -> None:
    config_class, changes = VARIANTS[variant]
    # The scale of Gemma's scores is not in a GGUF file: that of all but its largest models is meant.
    usual = {"vocab_size": 512, "head_dim": 8, "num_attention_heads": 6, "query_pre_attn_scalar": 8}
    folder = tmp_path / "folder"
    save_random(folder, config_class, {**changes, **usual})
    shutil.copy(tiny_folder / "tokenizer.json", folder)
    config = json.loads((folder / "config.json").read_text())
    config["rope_theta"] = 1e4
    window = {"attention.sliding_window": WINDOW} if config.get("sliding_window") else {}
    path = write_gguf(
        folder, tmp_path / "a.gguf", architecture=architecture, metadata={**window, **metadata}, config=config
    )
    assert relative_error(_logits(path), _logits(folder)) < 1e-5


def test_window(tmp_path: Path, tiny_folder: Path) -> None:
    path = write_gguf(tiny_folder, tmp_path / "model.gguf", metadata={"attention.sliding_window": 64})
    loaded = load_model(path, device="cpu", dtype=torch.float32)
    assert {layer.attention.window for layer in loaded.config.layers} == {64}


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"architecture": "mamba"}, "architecture mamba"),
        ({"metadata": {"expert_count": 8}}, "mixture of experts"),
        ({"metadata": {"rope.dimension_count": 8}}, "a part of each head"),
        ({"metadata": {"rope.scaling.type": "yarn"}}, "type yarn"),
        ({"extra_tensors": {"blk.0.attn_q_norm.weight": np.ones(16, dtype=np.float32)}}, "blk.0.attn_q_norm.weight"),
    ],
)
def test_unsupported(tmp_path: Path, tiny_folder: Path, cache: Path, change: dict[str, Any], words: str) -> None:
    path = write_gguf(tiny_folder, tmp_path / "model.gguf", **change)
    with pytest.raises(UnsupportedModel, match=words):
        converted_folder(path)
    assert not [entry for entry in (cache / "converted").iterdir() if entry.is_dir()]


@pytest.mark.parametrize("share", [0.0, 0.001, 0.1, 0.5, 0.99])
def test_truncated(tmp_path: Path, tiny_folder: Path, share: float) -> None:
    content = write_gguf(tiny_folder, tmp_path / "model.gguf").read_bytes()
    cut = tmp_path / "cut.gguf"
    cut.write_bytes(content[: int(len(content) * share)])
    with pytest.raises(ModelCorrupt, match=r"cut\.gguf"):
        converted_folder(cut)


def test_not_gguf_at_all(tmp_path: Path) -> None:
    path = tmp_path / "text.gguf"
    path.write_text("hello " * 100)
    with pytest.raises(ModelCorrupt, match=r"text\.gguf is not a whole GGUF file"):
        converted_folder(path)
    with pytest.raises(ModelNotFound, match=r"absent\.gguf"):
        converted_folder(tmp_path / "absent.gguf")


@pytest.mark.slow
def test_default_model_loads_quickly_the_second_time(smollm2_folder: Path) -> None:
    started = time.process_time()
    loaded = load_model(smollm2_folder, device="cpu", dtype=torch.float32)
    assert loaded.config.num_layers == 30
    assert time.process_time() - started < 10  # 0.3 to 1.3 s; a busy machine does not count
