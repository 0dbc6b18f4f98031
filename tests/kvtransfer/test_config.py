"""Options of the transfer service that exclude each other."""

from __future__ import annotations

import pytest

from services.kvtransfer.config import KvTransferConfig


@pytest.mark.parametrize("beyond", [{"nixl_devices": "lo"}, {"cuda_device": 0}], ids=["nixl", "gpu"])
def test_checksums_are_not_promised_where_nothing_checks(beyond: dict[str, str | int]) -> None:
    KvTransferConfig(listen="127.0.0.1:0", checksums=True)
    KvTransferConfig(listen="127.0.0.1:0", **beyond)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="--checksums covers shm and tcp only"):
        KvTransferConfig(listen="127.0.0.1:0", checksums=True, **beyond)  # type: ignore[arg-type]
