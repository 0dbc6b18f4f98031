"""The built-in policies over two engines: the same tokens, each by its own verbs."""

from __future__ import annotations

import pytest

from services.router.metrics import FALLBACKS
from tests.fakes import FakeEngine
from tests.router.harness import PROMPT, at_once, model, running, verbs

LENGTH, END = len(PROMPT), len(PROMPT) - 1
POLICIES = [
    "data_parallel",
    "disaggregated",
    "context_aware",
    "balanced",
    "balanced:0.5",
    "balanced:ratio=0.9",
    "adaptive",
]


@pytest.mark.parametrize("policy", POLICIES)
@pytest.mark.parametrize("prompt", [PROMPT[:1], PROMPT[:8], PROMPT], ids=["one", "pages", "more"])
async def test_every_policy_gives_the_same_tokens(policy: str, prompt: tuple[int, ...]) -> None:
    async with running() as suite:
        for _ in range(2):  # cold, then with a warm cache
            answer = await suite.generate(prompt, policy=policy)
            assert list(answer.token_ids) == model().generate(prompt, 8)
            assert answer.policy == policy
            assert answer.finish_reason == 2
            assert (answer.usage.prompt_token_count, answer.usage.output_token_count) == (len(prompt), 8)


async def test_data_parallel_uses_one_engine() -> None:
    async with running() as suite:
        assert verbs(await suite.generate()) == [("start_generate", "a", 0, LENGTH)]


async def test_disaggregated_prefills_on_one_and_decodes_on_the_other() -> None:
    async with running(policy="disaggregated") as suite:
        answer = await suite.generate()
        assert verbs(answer) == [
            ("prep_recv", "b", 0, END),
            ("remote_send", "a", 0, END),
            ("start_generate", "b", END, LENGTH),
        ]
        prepared, sent, generated = (leg.timing for leg in answer.legs)
        assert prepared.matched_token_count == 0
        assert (sent.computed_token_count, sent.transferred_token_count) == (END, END)
        assert sent.transferred_bytes > 0
        assert (generated.computed_token_count, generated.transferred_token_count) == (1, END)
        assert all(leg.elapsed.ToNanoseconds() > 0 for leg in answer.legs)
        assert 0 < answer.legs[2].first_token.ToNanoseconds() < answer.legs[2].elapsed.ToNanoseconds()
        [start] = suite.engines[1].called("Session")
        assert start.reservation.secret
        assert suite.engines[1].called("Release") == []  # used up, so no call is spent on it


async def test_disaggregated_sends_only_what_is_missing() -> None:
    async with running(policy="disaggregated") as suite:
        await suite.generate()
        again = await suite.generate()
        assert verbs(again)[1] == ("remote_send", "a", 48, END)
        assert again.usage.cached_token_count == 48
        whole_pages = await suite.generate(PROMPT[:49])
        assert [verb for verb, *_ in verbs(whole_pages)] == ["prep_recv", "start_generate"]


async def test_context_aware_goes_where_the_prefix_is_and_skips_the_sender() -> None:
    engines = engines_of("abcd")
    async with running(engines=engines, policy="context_aware:little=4") as suite:
        first = await suite.generate()
        assert [verb for verb, *_ in verbs(first)] == ["prep_recv", "remote_send", "start_generate"]
        decode = first.legs[2].engine
        chosen, other = sorted(engines[2:], key=lambda engine: engine.name != decode)
        other.kv.publish(PROMPT[:20], "")
        await suite.cached(other, 5)
        await suite.cached(chosen, LENGTH // 4)
        again = await suite.generate()
        assert verbs(again) == [("start_generate", decode, 0, LENGTH)]
        assert again.usage.cached_token_count == 48
        longer = await suite.generate((*PROMPT, *range(100, 120)))
        assert [(verb, engine) for verb, engine, *_ in verbs(longer)][::2] == [
            ("prep_recv", decode),
            ("start_generate", decode),
        ]
        assert longer.legs[0].timing.matched_token_count >= 48


def engines_of(names: str, **options: object) -> list[FakeEngine]:
    peers: dict[str, FakeEngine] = {}
    return [FakeEngine(model(), name, peers=peers, **options) for name in names]


@pytest.mark.parametrize(("ratio", "end"), [("0", 48), ("0.1", 44), ("0.5", 24), ("0.9", 4), ("1", 0)])
async def test_balanced_splits_at_a_page(ratio: str, end: int) -> None:
    async with running(policy=f"balanced:{ratio}") as suite:
        legs = verbs(await suite.generate())
        assert legs[0] == ("prep_recv", "b", 0, end)
        assert legs[-1] == ("start_generate", "b", end, LENGTH)


async def test_labels_say_which_engine_prefills() -> None:
    engines = engines_of("ab")
    engines[0].labels, engines[1].labels = {"role": "decode"}, {"role": "prefill"}
    async with running(engines=engines, policy="disaggregated") as suite:
        assert [engine for _, engine, *_ in verbs(await suite.generate())] == ["a", "b", "a"]


@pytest.mark.parametrize(("names", "kvtransfer", "cause"), [("a", True, "ONE_ENGINE"), ("ab", False, "NO_KVTRANSFER")])
async def test_no_pair_means_data_parallel_counted(
    names: str, kvtransfer: bool, cause: str, caplog: pytest.LogCaptureFixture
) -> None:
    counter = FALLBACKS.labels("disaggregated", cause)
    before = counter._value.get()
    async with running(engines=engines_of(names, kvtransfer=kvtransfer), policy="disaggregated") as suite:
        answer = await suite.generate()
    assert (answer.policy, verbs(answer)) == ("data_parallel", [("start_generate", "a", 0, LENGTH)])
    assert counter._value.get() == before + 1
    assert "policy replaced by data_parallel" in caplog.text


async def test_data_parallel_spreads_requests_that_run_at_once() -> None:
    async with running() as suite:
        assert await at_once(suite, 6, suite.engines) == {"a", "b"}
