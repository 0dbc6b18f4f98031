"""Any causal model of transformers whose attention can be replaced, proved right before it serves."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

import torch

from services.engine.model.config import MAX_LAYERS, end_tokens
from services.engine.model.errors import ModelCorrupt, ModelError, UnsupportedModel
from services.engine.model.foreign.interface import NAME, AttentionCall, ProbeStep, computing, register
from services.engine.model.foreign.linears import replace_linears
from services.engine.model.foreign.model import ForeignConfig, ForeignModel
from services.engine.model.foreign.proof import Proof
from services.engine.model.json_fields import Fields
from services.engine.model.linear.linear import DENSE, LinearMaker

_log = logging.getLogger(__name__)


class _TeamDoesNotFit(UnsupportedModel):
    """The model fails with a team's linear layers; it may serve with torch's."""


def load_foreign(
    folder: Path, device: torch.device, dtype: torch.dtype, linear: LinearMaker, reason: UnsupportedModel
) -> ForeignModel:
    """The model in `folder`, which is not native for `reason`; a team of `linear` computes its linear layers, unless it
    then fails: such a model is loaded again, and they stay torch's.

    Raises UnsupportedModel if transformers is not installed or does not know it, if its attention cannot be replaced,
    or if it then computes something else; ModelCorrupt for weights that lack something.
    """
    try:
        import transformers
    except ImportError:
        raise UnsupportedModel(f"{reason} With transformers installed it may be served through it.") from None
    logs: Any = transformers.utils.logging
    logs.set_verbosity_error()
    logs.disable_progress_bar()
    register()
    config = _config(folder, reason)
    try:
        return _proved(folder, config, device, dtype, linear)
    except _TeamDoesNotFit as error:
        why = str(error)
    # Behind the handler, which would keep the model that failed in memory beside this one.
    model = _proved(folder, config, device, dtype, DENSE)
    fields = {"architecture": _name(config), "why": why}
    _log.warning("linear layers stay torch's, on one thread", extra={"fields": fields})
    return model


def _proved(folder: Path, config: Any, device: torch.device, dtype: torch.dtype, linear: LinearMaker) -> ForeignModel:
    """See load_foreign. Raises _TeamDoesNotFit, too."""
    model = _model(folder, config, device, dtype)
    try:
        return _over_pages(model, config, linear, _counts(config, folder))
    except ModelError:
        raise
    except Exception as error:  # whatever a model makes of attention that is not its own
        raise UnsupportedModel(f"{_name(config)} cannot be computed over pages: {_first_line(error)}") from None


@torch.inference_mode()
def _over_pages(model: Any, config: Any, linear: LinearMaker, counts: Fields) -> ForeignModel:
    """The model with our attention and a team's linear layers. Raises _TeamDoesNotFit if it fails with these,
    UnsupportedModel, or whatever the model's code raises, if it fails without."""
    proof = Proof.of(model, config.get_text_config().vocab_size)
    model.set_attn_implementation(NAME)
    shape = _shape(model, config, counts.count("max_position_embeddings", default=2048))
    if linear.team is None:
        return proof.checked(ForeignModel(shape, model))
    try:
        from services.engine.model.foreign.experts import replace_experts  # and numba, which no engine on a GPU needs

        replace_linears(model, linear.make_exact)
        replace_experts(model, linear.make_exact, linear.team)
        linear.settle()
        return proof.checked(ForeignModel(shape, model))
    except Exception as error:  # whatever a model makes of layers that are not its own
        raise _TeamDoesNotFit(_first_line(error)) from None


def _config(folder: Path, reason: UnsupportedModel) -> Any:
    from transformers import AutoConfig
    from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

    try:
        config = AutoConfig.from_pretrained(folder, trust_remote_code=False)
    except Exception as error:  # whatever the code of a model makes of its configuration
        raise UnsupportedModel(f"{reason} transformers cannot read it either: {_first_line(error)}") from None
    if getattr(config, "quantization_config", None) is not None:
        raise UnsupportedModel(f"{_name(config)} with quantized safetensors weights is not supported.")
    known = MODEL_FOR_CAUSAL_LM_MAPPING_NAMES.get(config.model_type, ())
    if _name(config) not in ((known,) if isinstance(known, str) else known):
        raise UnsupportedModel(f"{_name(config)} is no causal language model of transformers.")
    _counts(config, folder).count("num_hidden_layers", default=1, most=MAX_LAYERS)  # before they are made
    return config


def _counts(config: Any, folder: Path) -> Fields:
    """Whatever the model's own names for them are."""
    text = config.get_text_config()
    names = ("num_hidden_layers", "max_position_embeddings")
    return Fields({name: getattr(text, name, None) for name in names}, folder / "config.json")


def _model(folder: Path, config: Any, device: torch.device, dtype: torch.dtype) -> Any:
    from transformers import AutoModelForCausalLM

    try:
        loaded: Any = AutoModelForCausalLM.from_pretrained(
            folder,
            config=config,
            dtype=dtype,
            attn_implementation="eager",
            use_safetensors=True,
            output_loading_info=True,
        )
    except Exception as error:
        raise ModelCorrupt(f"{folder} cannot be loaded by transformers: {_first_line(error)}") from None
    model, report = loaded
    for what in ("missing_keys", "mismatched_keys"):
        if names := sorted(map(str, report.get(what, ()))):
            raise ModelCorrupt(f"{folder} lacks the tensor {names[0]}, or has it in another shape.")
    return model.to(device).eval()


def _shape(model: Any, config: Any, max_context: int) -> ForeignConfig:
    """What the calls of its attention tell. Raises UnsupportedModel for what pages cannot hold."""
    probe = ProbeStep()
    ids = torch.arange(2, device=model.device)[None]
    with computing(probe):
        getattr(model, model.base_model_prefix)(input_ids=ids, position_ids=ids, use_cache=False)
    name, calls = _name(config), probe.calls
    text, vocab_size = config.get_text_config(), model.get_output_embeddings().weight.shape[0]
    if not calls:
        raise UnsupportedModel(f"{name} has no attention that can be replaced by one over pages.")
    if len(calls) != text.num_hidden_layers:
        raise UnsupportedModel(f"{name} has layers without attention, whose state pages do not hold.")
    if [call.layer for call in calls] != list(range(len(calls))):
        raise UnsupportedModel(f"{name} does not call its layers' attention in order.")
    first = calls[0]
    if any(_kv_shape(call) != _kv_shape(first) for call in calls):
        raise UnsupportedModel(f"{name} has layers with KV of different shapes.")
    if first.head_dim != first.value_dim:
        raise UnsupportedModel(f"{name} has values and keys of different size.")
    return ForeignConfig(
        architecture=name,
        vocab_size=vocab_size,
        max_context=max_context,
        num_layers=len(calls),
        num_heads=first.num_heads,
        num_kv_heads=first.num_kv_heads,
        head_dim=first.head_dim,
        eos_token_ids=end_tokens(model.generation_config.eos_token_id, vocab_size, name),
    )


def _kv_shape(call: AttentionCall) -> tuple[int, int, int]:
    return call.num_kv_heads, call.head_dim, call.value_dim


def _name(config: Any) -> str:
    return str((config.architectures or [config.model_type])[0])


def _first_line(error: Exception) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0]
