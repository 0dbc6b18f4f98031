"""Options of the transfer service that exclude each other."""

from __future__ import annotations

import pytest

from services.kvtransfer.config import KvTransferConfig


def test_nccl_moves_memory_of_a_gpu_only() -> None:
    KvTransferConfig(listen="127.0.0.1:0", checksums=True, cuda_device=0, nccl_library="auto")
    with pytest.raises(ValueError, match="--nccl-library needs --cuda-device"):
        KvTransferConfig(listen="127.0.0.1:0", nccl_library="auto")
