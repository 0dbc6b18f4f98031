"""Load on the OpenAI-compatible door, with locust: streamed chats, and the time to their first piece.

locust -f clients/load/locustfile.py --headless --host http://localhost:8080 --users 8 --run-time 20s
"""

from __future__ import annotations

import json
import os
import time

from locust import HttpUser, events, task

MAX_TOKENS = int(os.environ.get("MAX_TOKENS", "16"))


class Chatter(HttpUser):
    """Asks, reads the whole answer, and asks again."""

    @task
    def chat(self) -> None:
        """One streamed chat; it fails unless the answer is whole."""
        body = {
            "messages": [{"role": "user", "content": f"Tell me about the number {time.monotonic_ns() % 1000}."}],
            "max_tokens": MAX_TOKENS,
            "stream": True,
            "stream_options": {"include_usage": True},
        }
        begin = time.perf_counter()
        path = "/v1/chat/completions"
        with self.client.post(path, json=body, stream=True, catch_response=True, timeout=120) as response:
            lines = [line for line in _timed_lines(response, begin) if line]
            if response.status_code != 200:
                response.failure(f"{response.status_code}: {lines[:1]}")
            elif lines[-1] != b"data: [DONE]":
                response.failure(f"the stream ended with {lines[-1][:200]!r}")
            elif not json.loads(lines[-2].removeprefix(b"data: "))["usage"]["completion_tokens"]:
                response.failure("the usage counts no token")
            else:
                response.success()


def _timed_lines(response, begin):
    """The lines; the time to the first is reported as a request of its own kind."""
    for number, line in enumerate(response.iter_lines()):
        if not number:
            elapsed_ms = (time.perf_counter() - begin) * 1000
            events.request.fire(
                request_type="TTFT", name="first piece", response_time=elapsed_ms, response_length=0, exception=None
            )
        yield line
