"""The GPU whose memory this service's device pools are in."""

from __future__ import annotations

from services.kvtransfer.config import KvTransferConfig
from services.kvtransfer.transports.cuda_ipc.copies import ThreadStreams
from services.kvtransfer.transports.cuda_ipc.device import CudaDevice, Device
from services.rpc.cuda_driver import CudaDriver, CudaMissing
from services.rpc.errors import StartError


class Gpu:
    """The driver, and what is made with it."""

    def __init__(self, driver: CudaDriver) -> None:
        self.driver = driver
        self.device: Device = CudaDevice(driver)
        self.streams = ThreadStreams(self.device)


def open_gpu(config: KvTransferConfig) -> Gpu | None:
    """The GPU that the options name, or None if they name none. Raises StartError if it is not there."""
    if config.cuda_device is None:
        return None
    try:
        return Gpu(CudaDriver(config.cuda_device))
    except CudaMissing as error:
        raise StartError(f"--cuda-device {config.cuda_device}: {error}") from None
