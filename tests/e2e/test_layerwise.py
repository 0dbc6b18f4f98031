"""Layers travel while later ones still compute: the sender is held, and the receiver's pool is looked at."""

from __future__ import annotations

import asyncio
import os
from pathlib import Path

import numpy as np
import pytest
from microserve.types.v1 import kv_pb2 as kv

from tests.e2e.prompts import mixed_prompts
from tests.e2e.suite import generate, idle, pool_of, prep_recv, remote_send, start_suite, wait_for_load
from tests.models import make_tiny_llama

pytestmark = pytest.mark.slow

HELD_AFTER = 1


async def test_layers_arrive_one_by_one(tmp_path: Path) -> None:
    model = make_tiny_llama(tmp_path / "model")
    fifo = tmp_path / "go"
    os.mkfifo(fifo)
    hold = ["--fault-points", f"send.layer.{HELD_AFTER}=hold:{fifo}"]
    async with start_suite(model, policy=None, options_of={0: hold}) as suite:
        sender, receiver = suite.engines
        (prompt,) = [p for p in mixed_prompts(10, 500, 200) if len(p) == 200]
        prepared = await prep_recv(suite, receiver, prompt, len(prompt) - 1)
        sending = asyncio.create_task(remote_send(suite, sender, prompt, prepared.address))
        # Opening the FIFO for writing returns when the held engine has opened it for reading.
        release = await asyncio.to_thread(os.open, fifo, os.O_WRONLY)
        try:
            arrived = np.zeros(0)
            # The service moves the layer on its own: look until it is there; the test's timeout bounds it.
            while not arrived.size or np.isnan(arrived[: HELD_AFTER + 1]).any():
                arrived = tokens_of(await pool_of(suite, receiver), prepared.address)
            assert np.isnan(arrived[HELD_AFTER + 1 :]).all(), "a layer arrived before it was computed"
            assert not sending.done()
        finally:
            os.write(release, b"go")
            os.close(release)
        sent = await sending
        assert sent.timing.transferred_token_count == len(prompt) - 1
        arrived = tokens_of(await pool_of(suite, receiver), prepared.address)
        assert not np.isnan(arrived).any()
        result = await generate(suite, receiver, prompt, address=prepared.address)
        assert len(result.token_ids) == 16
        await wait_for_load(receiver, idle)
        await wait_for_load(sender, idle)


def tokens_of(pool: np.ndarray, address: kv.KvAddress) -> np.ndarray:
    """The keys and values of the window of an address that begins at 0, (layers, tokens, values)."""
    layout, pages = address.layout, list(address.shards[0].page_ids)
    heads = 2 * layout.kv_head_count
    values = pool[:, pages].view(np.float32)
    values = values.reshape(layout.layer_count, len(pages), heads, layout.page_size, layout.head_dim)
    tokens = values.transpose(0, 1, 3, 2, 4).reshape(layout.layer_count, len(pages) * layout.page_size, -1)
    return tokens[:, : address.window.end]
