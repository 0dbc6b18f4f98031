"""One page pool: its memory, its engine, and the bytes moved."""

from __future__ import annotations

import threading
from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray

from services.kvtransfer.control import ControlPage
from services.kvtransfer.errors import InvalidPages, InvalidPool, NoTransport
from services.kvtransfer.liveness import EngineConnection
from services.kvtransfer.memory import SharedSegment
from services.protocol.errors import LayoutMismatch, StaleIncarnation
from services.protocol.extents import ModelPart
from services.protocol.layout import PageLayout
from services.protocol.ranges import TokenRange
from services.rpc.cuda_driver import CudaDriver, CudaFailed
from services.rpc.cuda_memory import DeviceSegment
from services.rpc.fd_passing import close_descriptors


@dataclass(frozen=True, slots=True)
class PoolShape:
    """Arrangement and number of pages, and what is in them; two pools of one shape are interchangeable.

    Raises LayoutMismatch unless the layout has the layers and heads of the part.
    """

    layout: PageLayout
    page_count: int
    part: ModelPart
    # Sixteen bytes that name the GPU whose memory it is in; empty: host memory.
    gpu: bytes = b""

    def __post_init__(self) -> None:
        extent = self.part.extent
        if (extent.layer_count, extent.kv_head_count) != (self.layout.layer_count, self.layout.kv_head_count):
            raise LayoutMismatch("the layout has other numbers of layers or heads than the part of the model")

    @property
    def size_bytes(self) -> int:
        """Bytes of such a pool."""
        return self.layout.pool_bytes(self.page_count)

    def with_pages(self, page_count: int) -> PoolShape:
        """The same arrangement of another number of pages."""
        return replace(self, page_count=page_count)

    def check_pages(self, page_ids: tuple[int, ...], part: TokenRange) -> None:
        """Raises InvalidPages unless these are as many pages of the pool as `part` needs, none of them twice."""
        needed = len(part.page_indices(self.layout.page_size))
        if len(page_ids) != needed:
            raise InvalidPages(f"{part} needs {needed} pages, not {len(page_ids)}")
        if page_ids and not 0 <= min(page_ids) <= max(page_ids) < self.page_count:
            raise InvalidPages(f"a page id is not below {self.page_count}")
        if len(set(page_ids)) != len(page_ids):
            raise InvalidPages("a page id comes twice")


@dataclass(frozen=True, slots=True)
class PoolMemory:
    """The shared parts of a pool."""

    pages: SharedSegment | DeviceSegment
    control: ControlPage

    @classmethod
    def adopt(cls, shape: PoolShape, descriptors: tuple[int, ...], gpu: CudaDriver | None) -> PoolMemory:
        """Maps what an engine hands back: pages, control page, eventfd. Takes them over, also when it raises
        InvalidPool because they are not such a pool's. `gpu`: the shape's, None for host memory."""
        if len(descriptors) != 3:
            close_descriptors(descriptors)
            raise InvalidPool("a pool is handed back as three descriptors")
        pages_descriptor, control_descriptor, eventfd = descriptors
        try:
            pages = _adopt_pages(shape, pages_descriptor, gpu)
        except InvalidPool:
            close_descriptors((control_descriptor, eventfd))
            raise
        try:
            return cls(pages, ControlPage.adopt(control_descriptor, eventfd))
        except InvalidPool:
            pages.close()
            raise

    def close(self) -> None:
        """Lets go of both; engines that map them keep them."""
        self.control.close()
        self.pages.close()


def _adopt_pages(shape: PoolShape, descriptor: int, gpu: CudaDriver | None) -> SharedSegment | DeviceSegment:
    if gpu is None:
        return SharedSegment.adopt(descriptor, shape.size_bytes)
    try:
        return DeviceSegment.adopt(gpu, descriptor, shape.size_bytes)
    except CudaFailed as error:
        raise InvalidPool(f"the descriptor handed back is no memory of the GPU: {error}") from None


@dataclass(frozen=True, slots=True)
class Engine:
    """Who uses the pool at present."""

    incarnation: bytes
    connection: EngineConnection


class Pool:
    """Changed only by PoolTable (memory, engine, ticket); those who move bytes out of it and into it count them."""

    def __init__(self, pool_id: str, engine_name: str, shape: PoolShape) -> None:
        self.id = pool_id
        self.engine_name = engine_name
        self.shape = shape
        # None until the engine hands back the memory of an earlier incarnation.
        self.memory: PoolMemory | None = None
        self.engine: Engine | None = None
        self.ticket: bytes | None = None
        self.sent_bytes = 0
        self.received_bytes = 0
        self._counting = threading.Lock()

    def count_received(self, num_bytes: int) -> None:
        """So many more bytes were written into the pool; any thread."""
        with self._counting:
            self.received_bytes += num_bytes

    @property
    def pages(self) -> NDArray[np.uint8]:
        """Host memory by layer and page, (layer_count, page_count, layer_page_bytes). Raises NoTransport."""
        layout = self.shape.layout
        assert self.memory is not None
        if isinstance(self.memory.pages, DeviceSegment):
            raise NoTransport("the pool is in memory of a GPU")
        return self.memory.pages.array.reshape(layout.layer_count, self.shape.page_count, layout.layer_page_bytes)

    @property
    def device_address(self) -> int | None:
        """Where the memory begins on its GPU; None: it is host memory."""
        assert self.memory is not None
        return self.memory.pages.address if isinstance(self.memory.pages, DeviceSegment) else None

    def require(self, incarnation: bytes) -> PoolMemory:
        """The memory, if the caller is the engine. Raises StaleIncarnation."""
        if self.engine is None or self.engine.incarnation != incarnation or self.memory is None:
            raise StaleIncarnation("the caller is not the engine that has the pool at present")
        return self.memory
