"""The trial at the start: broken backends are passed over and said to be, slow ones are not taken."""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping
from types import SimpleNamespace

import pytest
import torch
from torch import Tensor

from services.engine.attention.backend import AttentionBackend, BackendUnavailable
from services.engine.attention.choice import AttentionFailed, Factory, choose
from services.engine.attention.form import PLAIN, AttentionForm
from services.engine.attention.gather_sdpa import GatherSdpaAttention
from services.engine.attention.problem import CONTEXTS
from services.engine.attention.stored import FLOAT8
from services.engine.batch import ForwardBatch

NUM_HEADS, KV_HEADS, HEAD_DIM = 4, 2, 32


class ForgetsTheSecondSequence(GatherSdpaAttention):
    """As a paged split-KV kernel of torch does."""

    def attend(self, layer: int, query: Tensor, batch: ForwardBatch, form: AttentionForm = PLAIN) -> Tensor:
        mixed = torch.empty_like(query)
        self.attend_into(mixed, layer, query, batch, [0], form)
        return mixed


class ForgetsTheWindow(GatherSdpaAttention):
    def attend(self, layer: int, query: Tensor, batch: ForwardBatch, form: AttentionForm = PLAIN) -> Tensor:
        return super().attend(layer, query, batch, AttentionForm(form.scale, None, form.softcap))


class ReadsOneTokenTooFew(GatherSdpaAttention):
    def attend(self, layer: int, query: Tensor, batch: ForwardBatch, form: AttentionForm = PLAIN) -> Tensor:
        short = ForwardBatch(
            batch.token_ids, batch.positions, batch.slots, batch.query_starts, batch.context_lengths - 1,
            batch.block_tables, batch.logits_rows,
        )  # fmt: skip
        return super().attend(layer, query, short, form)


class ReadsUnwrittenSlots(GatherSdpaAttention):
    def attend(self, layer: int, query: Tensor, batch: ForwardBatch, form: AttentionForm = PLAIN) -> Tensor:
        return super().attend(layer, query, batch, form) + 0 * self.kv[0, :, 0, 0, -1].sum()


class Raises(GatherSdpaAttention):
    def attend(self, layer: int, query: Tensor, batch: ForwardBatch, form: AttentionForm = PLAIN) -> Tensor:
        raise RuntimeError("no kernel image is available")


class AlsoRight(GatherSdpaAttention):
    pass


def absent(kv: Tensor, num_threads: int) -> AttentionBackend:
    raise BackendUnavailable("its library is not installed")


def of(kind: Callable[[Tensor], AttentionBackend]) -> Factory:
    return lambda kv, num_threads: kind(kv)


def pool(page_size: int = 16, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.zeros(1, 3, 2, KV_HEADS, page_size, HEAD_DIM, dtype=dtype)


def chosen_of(
    candidates: Mapping[str, Factory], kv: Tensor, dtype: torch.dtype = torch.float32, *, by_speed: bool = False
) -> AttentionBackend:
    return choose(candidates, kv, NUM_HEADS, 1, dtype, by_speed=by_speed)


def said(caplog: pytest.LogCaptureFixture) -> list[tuple[str, dict[str, object]]]:
    return [(record.levelname, record.__dict__["fields"]) for record in caplog.records]


@pytest.mark.parametrize(
    ("broken", "why", "by_speed"),
    [
        (of(ForgetsTheSecondSequence), "WrongResult: differs by nan", False),
        (of(ForgetsTheWindow), "WrongResult: differs by", False),
        (of(ReadsOneTokenTooFew), "WrongResult: differs by", False),
        (of(ReadsUnwrittenSlots), "WrongResult: differs by nan", False),
        (of(Raises), "RuntimeError: no kernel image is available", True),
    ],
)
def test_a_broken_backend_is_passed_over_and_named(
    broken: Factory, why: str, by_speed: bool, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO)
    kv = pool()
    chosen = chosen_of({"broken": broken, "right": of(AlsoRight)}, kv, by_speed=by_speed)
    assert isinstance(chosen, AlsoRight)
    assert chosen.kv is kv, "the one that serves has the real pool"
    (level, first), (_, last) = said(caplog)
    assert (level, first["backend"], last["backend"]) == ("WARNING", "broken", "right")
    assert str(first["why"]).startswith(why)
    assert not torch.are_deterministic_algorithms_enabled()


def short_of_memory(kv: Tensor, num_threads: int) -> AttentionBackend:
    raise MemoryError


@pytest.mark.parametrize(
    ("failing", "why"), [(of(Raises), "RuntimeError: no kernel image"), (short_of_memory, "MemoryError")]
)
def test_where_speed_decides_nothing_a_failure_does_not_either(failing: Factory, why: str) -> None:
    """Another backend would compute other bits under the same name."""
    with pytest.raises(AttentionFailed, match=f"failing cannot be tried \\({why}"):
        chosen_of({"failing": failing, "right": of(AlsoRight)}, pool())


def test_one_that_is_not_there_is_no_warning(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO)
    assert isinstance(chosen_of({"absent": absent, "right": of(AlsoRight)}, pool()), AlsoRight)
    assert said(caplog)[0] == ("INFO", {"backend": "absent", "why": "its library is not installed"})


def test_a_clearly_slower_one_is_not_taken_though_it_comes_first(
    caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    now_s = [0.0]
    monkeypatch.setattr("services.engine.attention.problem.time", SimpleNamespace(perf_counter=lambda: now_s[0]))

    class Quick(GatherSdpaAttention):
        takes_s = 0.001

        def attend(self, layer: int, query: Tensor, batch: ForwardBatch, form: AttentionForm = PLAIN) -> Tensor:
            now_s[0] += self.takes_s
            return super().attend(layer, query, batch, form)

    class Slow(Quick):
        takes_s = 0.02

    caplog.set_level(logging.INFO)
    chosen = chosen_of({"slow": of(Slow), "right": of(Quick)}, pool(), by_speed=True)
    assert isinstance(chosen, Quick)
    assert not isinstance(chosen, Slow)
    ((_, fields),) = said(caplog)
    assert fields["why"] == "fastest of those that are right"
    assert fields["slow_ms"] > fields["right_ms"]  # type: ignore[operator]


def test_where_speed_decides_nothing_the_first_that_is_right_is_taken(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO)
    made: list[str] = []

    def not_wanted(kv: Tensor, num_threads: int) -> AttentionBackend:
        made.append("later")
        return AlsoRight(kv)

    candidates = {"broken": of(ReadsOneTokenTooFew), "right": of(AlsoRight), "later": not_wanted}
    assert isinstance(chosen_of(candidates, pool()), AlsoRight)
    assert not made
    assert said(caplog)[-1] == ("INFO", {"backend": "right", "why": "the first that is right"})


def test_none_left_is_an_error() -> None:
    with pytest.raises(BackendUnavailable, match="none of absent, broken computes"):
        chosen_of({"absent": absent, "broken": of(ReadsOneTokenTooFew)}, pool())


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_one_that_reads_kv_of_eight_bits_is_right_in_every_type(dtype: torch.dtype) -> None:
    assert isinstance(chosen_of({"right": of(AlsoRight)}, pool(16, FLOAT8), dtype), AlsoRight)


def test_one_that_reads_eight_bits_as_others_is_passed_over() -> None:
    class OtherBytes(GatherSdpaAttention):
        def read_pages(self, layer: int, pages: Tensor, dtype: torch.dtype) -> Tensor:
            return self.kv[layer].view(torch.uint8)[pages].view(torch.float8_e5m2).to(dtype)

    candidates = {"other": of(OtherBytes), "right": of(AlsoRight)}
    assert isinstance(chosen_of(candidates, pool(16, FLOAT8)), AlsoRight)


@pytest.mark.parametrize("page_size", [1, 16, 256, 1024])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_the_right_one_passes_for_every_page_size_and_type(page_size: int, dtype: torch.dtype) -> None:
    assert max(CONTEXTS) < 1024, "one page may hold a whole sequence"
    assert isinstance(chosen_of({"right": of(AlsoRight)}, pool(page_size, dtype), dtype), AlsoRight)
