"""The GPU whose memory this service's device pools are in."""

from __future__ import annotations

import asyncio
import logging
import os

from services.kvtransfer.config import KvTransferConfig
from services.kvtransfer.transports.cuda_ipc.copies import RunCopier
from services.kvtransfer.transports.cuda_ipc.device import CudaDevice, Device
from services.kvtransfer.transports.cuda_ipc.kernel_trial import choose_kernel
from services.kvtransfer.transports.cuda_ipc.staging import Staging
from services.rpc.cuda_driver import CudaDriver, CudaFailed, CudaMissing
from services.rpc.errors import StartError

log = logging.getLogger(__name__)

_PROBE_INTERVAL_S = 1.0


class Gpu:
    """The driver, and what is made with it. `way`: how pages are copied on it, for people."""

    def __init__(self, driver: CudaDriver, num_streams: int, *, copy_kernel: bool) -> None:
        """`num_streams`: threads that copy. Raises CudaFailed."""
        self.driver = driver
        self.device: Device = CudaDevice(driver)
        kernel, self.way = choose_kernel(driver) if copy_kernel else (None, "run by run: --no-copy-kernel")
        self.copier = RunCopier(self.device, num_streams, kernel)
        # Always there: whether bytes are to be checked is also the other service's to say.
        self.staging = Staging(self.device)
        self._probe = self.device.new_stream()
        log.info("gpu opened", extra={"fields": {"device": driver.ordinal, "copies": self.way}})

    async def lost(self) -> str:
        """Returns, when nothing works on the GPU any more, why. An error that breaks a context shows in every call of
        the process from then on, also on a stream that has nothing to do."""
        while True:
            await asyncio.sleep(_PROBE_INTERVAL_S)
            try:
                # On a thread: the driver may be busy with a call that waits for the GPU.
                await asyncio.to_thread(self._probe.is_idle)
            except CudaFailed as error:
                return str(error)


def open_gpu(config: KvTransferConfig) -> Gpu | None:
    """The GPU that the options name, or None if they name none. Raises StartError if it is not there."""
    if config.cuda_device is None:
        return None
    # Queues to the GPU, 8 by default: streams that share one may wait for each other, and NCCL's wait for peers.
    os.environ.setdefault("CUDA_DEVICE_MAX_CONNECTIONS", "32")
    try:
        # Those that copy within the service, and those that place what was fetched.
        return Gpu(CudaDriver(config.cuda_device), 2 * config.copy_threads, copy_kernel=config.copy_kernel)
    except (CudaMissing, CudaFailed) as error:
        raise StartError(f"--cuda-device {config.cuda_device}: {error}") from None
