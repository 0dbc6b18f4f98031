"""A model replica put together: weights, pool, loop thread. Imports torch, so thread counts must be set before."""

from __future__ import annotations

import os
import secrets
from dataclasses import dataclass

import torch

from services.engine.attention.backend import AttentionBackend
from services.engine.attention.factory import check_name, make_attention
from services.engine.config import EngineConfig
from services.engine.core.config import CoreConfig
from services.engine.core.core import EngineCore
from services.engine.core.faults import ScriptedFaults
from services.engine.core.loop import EngineLoop
from services.engine.core.plan import Runner
from services.engine.core.runner import TorchRunner
from services.engine.front.front import Front
from services.engine.front.limits import Limits
from services.engine.gpu.graphs import decode_graphs
from services.engine.gpu.runner import QueuedRunner
from services.engine.guide.compiler import GuideCompiler
from services.engine.kvlink.link import KvLink, PoolPlan
from services.engine.loading import (
    TORCH_DTYPES,
    kv_bytes,
    load,
    machine_bytes,
    set_torch_threads,
    torch_device,
    use_device,
)
from services.engine.model.errors import ModelError
from services.engine.model.loader import LoadedModel
from services.engine.model.shard import WHOLE, Shard
from services.engine.parallel.collective import TorchCollective
from services.engine.parallel.pool import pool_part
from services.engine.parallel.ranks import Ranks
from services.engine.parallel.runner import ParallelRunner
from services.engine.servicer import EngineIdentity
from services.engine.timed import TimedModel, TimedRunner
from services.protocol.layout import Dtype, PageLayout
from services.rpc.cuda_driver import CudaDriver, CudaMissing
from services.rpc.cuda_memory import DeviceSegment
from services.rpc.errors import StartError
from services.rpc.pool_client import AttachedPool

_MIB = 1 << 20


@dataclass(frozen=True, slots=True)
class Replica:
    """A loaded model and the arrangement of its KV, before there is a pool."""

    config: EngineConfig
    model: LoadedModel
    layout: PageLayout
    num_pages: int
    incarnation: bytes
    device: torch.device
    shard: Shard
    ranks: Ranks | None
    # Whose memory the pool is shared in; None: host memory, or a pool of its own.
    gpu: CudaDriver | None = None

    @property
    def limits(self) -> Limits:
        """What the model and the pool bound."""
        config, room = self.config, self.num_pages * self.layout.page_size
        if config.kvtransfer is not None and config.max_context is None:
            room //= 2  # so that a longest prompt can be reserved while another one's pages stay free (rule 6)
        most = min(self.model.config.max_context, room)
        return Limits(self.model.config.vocab_size, min(most, config.max_context or most))

    @property
    def pool_plan(self) -> PoolPlan:
        """The pool it wants from the KV transfer service."""
        return PoolPlan(self.config.name, self.layout, self.num_pages, self.gpu)

    def identity(self) -> EngineIdentity:
        """What GetInfo says."""
        return EngineIdentity(
            name=self.config.name,
            incarnation=self.incarnation,
            model=os.path.basename(os.path.normpath(self.config.model)),
            model_digest=self.model.digest,
            tokenizer_digest=self.model.tokenizer.digest,
            layout=self.layout,
            page_count=self.num_pages,
            limits=self.limits,
            device=str(self.device),
            labels=self.config.label_map,
            eos_token_ids=tuple(self.model.config.eos_token_ids),
            max_batch_size=self.config.max_batch_size,
            max_message_bytes=self.config.max_message_bytes,
        )

    def private_pool(self) -> torch.Tensor:
        """A pool of this replica alone, zeroed: what rank 0 has of it. Raises StartError if memory is too small."""
        if self.ranks is not None:
            self.ranks.attach(self._pool_shape, None)
        size_bytes = self.layout.pool_bytes(self.num_pages)
        try:
            if self.device.type == "cpu" and size_bytes > machine_bytes():
                raise MemoryError  # here, because a kernel may grant it and end the process that writes to it
            return pool_part(self._pool_shape, self.shard, self.device, self._kv_dtype, None)
        except (RuntimeError, MemoryError):  # torch's, for memory that it does not get
            mib = size_bytes // _MIB
            raise StartError(f"there is no memory for {self.num_pages} pages of KV, {mib} MiB: see --pages") from None

    def attached_pool(self, pool: AttachedPool) -> torch.Tensor:
        """What rank 0 has of the memory shared with the KV transfer service; it must not outlive the mapping."""
        if pool.device is not None:
            memory = torch.as_tensor(_DeviceBytes(pool.device), device=self.device)
            return memory.view(self._kv_dtype).view(self._pool_shape)
        if self.ranks is not None:
            self.ranks.attach(self._pool_shape, pool.descriptors[0])
        whole = torch.from_numpy(pool.memory).view(self._kv_dtype).view(self._pool_shape)
        return whole[:, :, :, self.shard.part(self.layout.kv_head_count)]

    def make_loop(self, kv: torch.Tensor, front: Front, link: KvLink | None) -> EngineLoop:
        """The loop thread over a pool, not started. Raises StartError for an attention backend that does not fit."""
        use_device(self.device)
        try:
            model, config = self.model.model, self.config
            attention = make_attention(config.attention, kv, model.config, config.num_threads, model.dtype)
        except ValueError as error:
            raise StartError(f"--attention: {error}") from None
        runner = self._runner(attention, kv)
        if self.ranks is not None:
            self.ranks.watch(front.on_fatal)
        guides = GuideCompiler(
            self.model.tokenizer.tokenizer_json,
            self.limits.vocab_size,
            self.model.config.eos_token_ids,
            lambda news: loop.submit(news),
        )
        core = EngineCore(self._core_config(), TimedRunner(runner), front, link, guides=guides, faults=self._faults())
        loop = EngineLoop(core, front, prepare=lambda: use_device(self.device))
        return loop

    def close(self) -> None:
        """Ends the other ranks; the loop must have ended. Blocks for seconds at most."""
        if self.ranks is not None:
            self.ranks.close()

    def _runner(self, attention: AttentionBackend, kv: torch.Tensor) -> Runner:
        model, eos_token_ids = TimedModel(self.model.model), self.model.config.eos_token_ids
        if self.ranks is not None:
            return ParallelRunner(TorchRunner(model, attention, kv, eos_token_ids), self.ranks)
        if self.device.type == "cpu":
            return TorchRunner(model, attention, kv, eos_token_ids)
        graphs = decode_graphs(model, kv, self.config.max_batch_size, self.limits.context_limit)
        return QueuedRunner(model, attention, kv, eos_token_ids, graphs)

    @property
    def _pool_shape(self) -> tuple[int, ...]:
        """Of the whole model's pool, (layers, pages, 2, kv_heads, page_size, head_dim)."""
        layout = self.layout
        return layout.layer_count, self.num_pages, 2, layout.kv_head_count, layout.page_size, layout.head_dim

    @property
    def _kv_dtype(self) -> torch.dtype:
        return TORCH_DTYPES[self.config.kv_dtype_name]

    def _core_config(self) -> CoreConfig:
        config, limits = self.config, self.limits
        return CoreConfig(
            model_digest=self.model.digest,
            layout=self.layout,
            num_pages=self.num_pages,
            vocab_size=limits.vocab_size,
            max_context=limits.context_limit,
            eos_token_ids=tuple(self.model.config.eos_token_ids),
            incarnation=self.incarnation,
            max_batch_size=config.max_batch_size,
            max_step_tokens=config.max_step_tokens,
            max_waiting=config.max_waiting,
            default_lease_s=config.lease_default,
            max_lease_s=config.lease_max,
            poison_pages=config.poison_pages,
        )

    def _faults(self) -> ScriptedFaults | None:
        return self.config.faults if self.config.fault_points else None


def load_replica(config: EngineConfig) -> Replica:
    """Reads the weights, on all ranks, and sizes the pool. Raises StartError with a sentence if either cannot be."""
    try:
        check_name(config.attention)
    except ValueError as error:
        raise StartError(f"--attention: {error}") from None
    set_torch_threads(config)
    device = torch_device(config)
    gpu = _shared_gpu(config, device)
    ranks = Ranks(config) if config.tp > 1 else None
    try:
        shard = _rank_zero(config, ranks, device)
        model = load(config, device, shard)
        if ranks is not None:
            ranks.wait_loaded()
    except (ModelError, StartError) as error:
        if ranks is not None:
            ranks.close()
        raise StartError(str(error)) from None
    layout = PageLayout(
        layer_count=model.config.num_layers,
        kv_head_count=model.config.num_kv_heads,
        head_dim=model.config.head_dim,
        page_size=config.page_size,
        dtype=Dtype[config.kv_dtype_name.upper()],
    )
    num_pages = config.pages or max(1, kv_bytes(config, device) // layout.pool_bytes(1))
    return Replica(config, model, layout, num_pages, secrets.token_bytes(16), device, shard, ranks, gpu)


def _shared_gpu(config: EngineConfig, device: torch.device) -> CudaDriver | None:
    """The GPU whose memory is shared with the KV transfer service, if there is one. Raises StartError."""
    if device.type == "cpu" or config.kvtransfer is None:
        return None
    if config.tp > 1:
        raise StartError("the ranks of a tensor parallel GPU engine have no common pool: it needs --kvtransfer none")
    try:
        return CudaDriver(device.index if device.index is not None else torch.cuda.current_device())
    except CudaMissing as error:
        raise StartError(f"--device {config.device}: {error}") from None


class _DeviceBytes:
    """Device memory as torch takes it: an object with the CUDA array interface, version 3."""

    def __init__(self, segment: DeviceSegment) -> None:
        self.__cuda_array_interface__ = {
            "shape": (segment.size_bytes,),
            "typestr": "|u1",
            "data": (segment.address, False),
            "version": 3,
        }


def _rank_zero(config: EngineConfig, ranks: Ranks | None, device: torch.device) -> Shard:
    if ranks is None:
        return WHOLE
    try:
        return Shard(0, config.tp, TorchCollective(ranks.meeting_place, 0, config.tp, device))
    except RuntimeError as error:
        raise StartError(f"the ranks did not find each other: {error}") from None
