"""From a model's name to a model that computes."""

from __future__ import annotations

import dataclasses
import json
import logging
from dataclasses import dataclass
from hashlib import blake2b
from pathlib import Path

import torch

from services.engine.model.checkpoint import open_checkpoint
from services.engine.model.config import ModelConfig, load_config
from services.engine.model.decoder import Decoder
from services.engine.model.decoder_weights import read_decoder_weights
from services.engine.model.errors import UnsupportedModel
from services.engine.model.fetch import fetch_model
from services.engine.model.json_fields import read_json
from services.engine.model.linear.linear import DENSE, LinearMaker
from services.engine.model.model import Model, ModelShape
from services.engine.model.shard import WHOLE, Shard
from services.engine.model.tokenizer_files import TokenizerFiles, load_tokenizer_files

DIGEST_BYTES = 16
_log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class LoadedModel:
    """A model on its device, and the digest under which its KV may be exchanged with other engines."""

    config: ModelShape
    model: Model
    digest: bytes  # 16 bytes; equal digests mean interchangeable KV
    tokenizer: TokenizerFiles


def load_model(
    source: str | Path,
    *,
    device: str | torch.device,
    dtype: torch.dtype,
    kv_dtype: torch.dtype | None = None,
    linear: LinearMaker = DENSE,
    shard: Shard = WHOLE,
    max_context: int | None = None,
    pool_bytes: int | None = None,
) -> LoadedModel:
    """Loads a catalogue name, a transformers folder, a GGUF file or a hub id; downloads and converts as needed.

    The model computes in `dtype`; `linear` may keep the weights of its linear layers in another form, and pools its KV
    in `kv_dtype`. Of a model that several ranks share, the decoder is this rank's part; all else tells of the whole.
    A native model takes `max_context` tokens at most, and as many as a pool of `pool_bytes` can hold: tables of
    positions, of a million a GiB, end there.

    Raises ModelError: ModelNotFound, ModelCorrupt or UnsupportedModel, each with one sentence.
    """
    folder, device = model_folder(source), torch.device(device)
    numbers = f"{dtype}" if kv_dtype in (None, dtype) else f"{dtype}, KV {kv_dtype}"
    try:
        config = load_config(folder)
    except UnsupportedModel as reason:
        return _load_foreign(folder, device, dtype, numbers, linear, shard, reason)
    bounds = [config.max_context] if max_context is None else [config.max_context, max_context]
    if pool_bytes is not None:
        bounds.append(max(1, pool_bytes // _token_bytes(shard.of(config), kv_dtype or dtype)))
    config = dataclasses.replace(config, max_context=min(bounds))
    own = shard.of(config)
    tokenizer = load_tokenizer_files(folder, config.eos_token_ids)
    with open_checkpoint(folder) as checkpoint, torch.inference_mode():
        weights = read_decoder_weights(checkpoint, config, dtype, device, linear, shard)
        linear.settle()
        form = f"{linear.form}{' packed' if checkpoint.has_read_packed else ''}"
        digest = _digest(config, numbers + form, checkpoint.identity())
    # What ranks add up between layers is no job of a team.
    decoder = Decoder(own, weights, linear.team if shard.count == 1 else None, kv_dtype)
    return LoadedModel(config, decoder, digest, tokenizer)


def _token_bytes(config: ModelConfig, kv_dtype: torch.dtype) -> int:
    """What the KV of a token takes."""
    return config.num_layers * 2 * config.num_kv_heads * config.head_dim * kv_dtype.itemsize


def model_folder(source: str | Path) -> Path:
    """The local transformers folder of a source. Raises ModelError."""
    path = fetch_model(source)
    if path.is_dir():
        return path
    # Here, because reading GGUF takes 0.2 s to load and a package that not everybody has who has folders.
    from services.engine.model.gguf.convert import converted_folder

    return converted_folder(path)


def _load_foreign(
    folder: Path,
    device: torch.device,
    dtype: torch.dtype,
    numbers: str,
    linear: LinearMaker,
    shard: Shard,
    reason: UnsupportedModel,
) -> LoadedModel:
    """What is not native, through transformers; its linear layers keep their weights as they are."""
    from services.engine.model.foreign.load import load_foreign

    if shard.count > 1:
        raise UnsupportedModel(f"{reason} Ranks can share native models only.")
    with open_checkpoint(folder) as checkpoint:
        checkpoint.identify_all()
        weights = checkpoint.identity()
    model = load_foreign(folder, device, dtype, linear, reason)
    config = model.config
    _log.info("served through transformers", extra={"fields": {"architecture": config.architecture}})
    described = read_json(folder / "config.json")
    computation = f"{json.dumps(described, sort_keys=True)} {numbers}"
    digest = blake2b(weights + computation.encode(), digest_size=DIGEST_BYTES).digest()
    return LoadedModel(config, model, digest, load_tokenizer_files(folder, config.eos_token_ids))


def _digest(config: ModelConfig, numbers: str, weights: bytes) -> bytes:
    """What KV depends on: the weights (see Checkpoint.identity), what is computed with them, in which numbers."""
    computed = dataclasses.replace(config, eos_token_ids=(), max_context=0)
    computation = f"{computed} {numbers}"
    return blake2b(weights + computation.encode(), digest_size=DIGEST_BYTES).digest()
