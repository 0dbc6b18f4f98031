"""Which requests make a topic, and what is kept of the traffic: pure, on prompts made up here."""

from __future__ import annotations

import asyncio
import random
from collections.abc import Iterable, Iterator

import pytest

from services.router.fleet.homes import Homes
from services.router.planning.topics import MAX_TOPICS, Topic, TopicLimits, find_topics
from services.router.planning.traffic import MAX_SAMPLES, MAX_TOKENS, WINDOW_S, Sample, Traffic
from services.router.request import ModelKey, PolicyRequest
from services.rpc.virtual_loop import run

MODEL = ModelKey("m", b"weights", b"tokens")
LIMITS = TopicLimits(tokens=256, requests=3)


def text(length: int, seed: int) -> tuple[int, ...]:
    return tuple(random.Random(seed).choices(range(1000), k=length))


def request(prompt: Iterable[int], salt: str = "") -> PolicyRequest:
    return PolicyRequest("r", MODEL, tuple(prompt), cache_salt=salt)


def sampled(*prompts: Iterable[int], salt: str = "") -> Iterator[Sample]:
    return (Sample(0.0, request(prompt, salt), 1.0) for prompt in prompts)


def topics(*prompts: Iterable[int]) -> dict[tuple[int, ...], float]:
    return {topic.context.prompt: topic.rate for topic in find_topics(sampled(*prompts), 10.0, LIMITS)}


def asking(context: tuple[int, ...], count: int, seed: int = 0, length: int = 40) -> list[tuple[int, ...]]:
    return [context + text(length, 1000 * seed + number) for number in range(1, count + 1)]


def test_requests_that_share_a_long_prefix_are_a_topic() -> None:
    context = text(512, 1)
    assert topics(*asking(context, 5)) == {context: pytest.approx(0.5)}


def test_its_context_is_whole_blocks() -> None:
    context = text(500, 1)
    assert list(topics(*asking(context, 5))) == [context[:448]]


@pytest.mark.parametrize(
    "prompts",
    [
        [],
        [text(30, 1)] * 9,
        asking(text(512, 1), 2),
        asking(text(192, 1), 9),
        [text(600, number) for number in range(50)],
    ],
    ids=["nothing", "short prompts", "too few", "too little in common", "nothing in common"],
)
def test_what_is_no_topic(prompts: list[tuple[int, ...]]) -> None:
    assert topics(*prompts) == {}


def test_topics_behind_a_common_system_prompt_are_told_apart() -> None:
    system = text(320, 1)
    first, second = system + text(512, 2), system + text(1024, 3)
    assert topics(*asking(first, 6), *asking(second, 4, seed=1)) == {first: 0.6, second: 0.4}


def test_a_few_more_of_the_same_questions_are_no_topics() -> None:
    """Each is asked often enough, but adds too little to what all share."""
    context = text(512, 1)
    prompts = [context + text(150, question) + text(9, number) for question in range(4) for number in range(5)]
    assert topics(*prompts) == {context: 2.0}


def test_a_long_conversation_within_a_topic_is_one_of_its_own() -> None:
    context = text(512, 1)
    conversation = context + text(640, 2)
    assert topics(*asking(context, 20), *asking(conversation, 4, seed=1)) == {context: 2.0, conversation: 0.4}


def test_long_branches_behind_a_short_common_beginning() -> None:
    """The beginning alone is too little; what lies behind it is not."""
    beginning = text(128, 1)
    first, second = beginning + text(256, 2), beginning + text(384, 3)
    assert topics(*asking(first, 3), *asking(second, 3, seed=1)) == {first: 0.3, second: 0.3}


def test_tenants_share_no_topic() -> None:
    context = text(512, 1)
    samples = [*sampled(*asking(context, 4), salt="a"), *sampled(*asking(context, 3), salt="b")]
    found = find_topics(samples, 10.0, LIMITS)
    assert [(topic.context.cache_salt, topic.rate) for topic in found] == [("a", 0.4), ("b", 0.3)]
    assert len({topic.name for topic in found}) == 2


def test_the_hottest_come_first_and_there_are_not_too_many() -> None:
    prompts = [prompt for seed in range(40) for prompt in asking(text(256, seed), 3 + (seed == 7))]
    found = find_topics(sampled(*prompts), 10.0, LIMITS)
    assert len(found) == MAX_TOPICS
    assert found[0].context.prompt == text(256, 7)


def test_samples_stand_for_more_than_themselves() -> None:
    context = text(256, 1)
    samples = [Sample(0.0, request(prompt), 4.0) for prompt in asking(context, 3)]
    [topic] = find_topics(samples, 10.0, LIMITS)
    assert topic.rate == pytest.approx(1.2)


def test_a_request_is_at_home_where_its_longest_context_is() -> None:
    short, homes = text(256, 1), Homes()
    long = short + text(256, 2)

    def last_block(context: tuple[int, ...]) -> bytes:
        return request(context).block_hashes(64)[-1]

    assert homes.of(request(short)) == ()
    homes.set(MODEL, {last_block(short): ("a:1",), last_block(long): ("b:1", "c:1")})
    assert homes.of(request(short + text(99, 3))) == ("a:1",)
    assert homes.of(request(long + text(99, 3))) == ("b:1", "c:1")
    assert homes.of(request(text(600, 4))) == homes.of(request(short, salt="other")) == ()
    homes.clear()
    assert homes.of(request(long)) == ()


# --- the sample -------------------------------------------------------------------------------------------------------


def test_traffic_is_kept_for_a_while() -> None:
    async def main() -> None:
        traffic = Traffic()
        traffic.saw(request((1,)))
        assert traffic.samples() == (), "off"
        traffic.begin()
        traffic.saw(request((2,)))
        await asyncio.sleep(WINDOW_S - 1)
        traffic.saw(request((3,)))
        assert [sample.request.prompt for sample in traffic.samples()] == [(2,), (3,)]
        assert traffic.span_s() == WINDOW_S - 1
        await asyncio.sleep(2)
        assert [sample.request.prompt for sample in traffic.samples()] == [(3,)]
        assert traffic.span_s() == WINDOW_S
        traffic.end()
        assert traffic.samples() == ()

    run(main())


@pytest.mark.parametrize(("length", "most"), [(1, MAX_SAMPLES), (8192, MAX_TOKENS // 8192)])
def test_what_is_kept_is_bounded_and_stands_for_all(length: int, most: int) -> None:
    async def main() -> None:
        traffic, prompts = Traffic(), [(number,) * length for number in range(2)]
        traffic.begin()
        for number in range(20 * most):
            traffic.saw(request(prompts[number % 4 == 0]))  # every fourth: no regular sample would do
        samples = traffic.samples()
        assert most / 4 < len(samples) <= most
        total = sum(sample.weight for sample in samples)
        fourth = sum(sample.weight for sample in samples if sample.request.prompt[0])
        assert total == pytest.approx(20 * most, rel=0.3)
        assert fourth / total == pytest.approx(0.25, abs=0.1)
        await asyncio.sleep(WINDOW_S + 1)
        for _ in range(10):
            assert traffic.samples() == ()
        traffic.saw(request((1,)))
        assert [sample.weight for sample in traffic.samples()] == [1.0], "quiet traffic is kept whole again"

    run(main())


def test_a_prompt_longer_than_all_that_is_kept() -> None:
    async def main() -> None:
        traffic = Traffic()
        traffic.begin()
        traffic.saw(request((0,) * (MAX_TOKENS + 1)))
        assert traffic.samples() == ()

    run(main())


def test_topics_are_named_alike_wherever_they_are_met() -> None:
    context = text(256, 1)

    def name(samples: Iterable[Sample]) -> list[str]:
        return [topic.name for topic in find_topics(samples, 10.0, LIMITS)]

    assert name(sampled(*asking(context, 3))) == name(sampled(*asking(context, 5, seed=9)))
    assert isinstance(find_topics(sampled(*asking(context, 3)), 1.0, LIMITS)[0], Topic)
