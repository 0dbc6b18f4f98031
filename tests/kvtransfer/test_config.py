"""Options of the transfer service that exclude each other."""

from __future__ import annotations

import pytest

from services.kvtransfer.config import KvTransferConfig


def test_checksums_are_not_promised_where_nothing_checks() -> None:
    KvTransferConfig(listen="127.0.0.1:0", checksums=True, nixl_devices="lo")
    KvTransferConfig(listen="127.0.0.1:0", cuda_device=0)
    with pytest.raises(ValueError, match="--checksums covers pools in host memory only"):
        KvTransferConfig(listen="127.0.0.1:0", checksums=True, cuda_device=0)
