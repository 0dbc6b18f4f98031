"""Guided sequences in the core, with a real tiny model: the same output whatever happens to them, one end each."""

from __future__ import annotations

import ast
import json
import re
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from tokenizers import Tokenizer

from services.engine.core import api
from services.engine.model.loader import LoadedModel, load_model
from services.engine.sampling.guide import MAX_CHOICES, MAX_GUIDE_BYTES, Guide, GuideKind
from services.engine.sampling.params import SamplingParams
from tests.engine.core.answers import Clock, Stream
from tests.engine.core.test_torch import OPTIONS, ByteRows, maker, prompt_of
from tests.engine.core.world import Node, World, ref_of
from tests.engine.guide.guides import END, HeldGuides, InstantGuides, choice, grammar, json_schema, regex
from tests.models import make_tiny_llama

pytestmark = pytest.mark.slow

SCHEMA = {
    "type": "object",
    "properties": {
        "name": {"type": "string", "minLength": 3, "maxLength": 8},
        "tags": {"type": "array", "items": {"enum": ["red", "green", "blue"]}, "minItems": 2, "maxItems": 4},
    },
    "required": ["name", "tags"],
    "additionalProperties": False,
    "x-guidance": {"whitespace_pattern": ""},
}
COLOURS = "(red|green|blue)(-(red|green|blue)){9,12}"
TEXTS = tuple(" and then ".join([colour] * 6) for colour in ("red", "green", "blue"))
# Brackets in brackets, which no regular expression describes.
SUMS = 'start: term (/[+*]/ term){9,12}\nterm: /[1-9][0-9]?/ | "(" term /[+*]/ term ")"'


def _is_person(text: str) -> bool:
    value = json.loads(text)
    return (
        set(value) == {"name", "tags"}
        and 3 <= len(value["name"]) <= 8
        and 2 <= len(value["tags"]) <= 4
        and set(value["tags"]) <= {"red", "green", "blue"}
    )


def _is_sum(text: str) -> bool:
    ast.parse(text, mode="eval")
    return re.fullmatch("[0-9+*()]+", text) is not None


# A guide of each kind, and whether a text is what it allows.
KINDS: dict[str, tuple[Guide, Callable[[str], object]]] = {
    "json_schema": (json_schema(json.dumps(SCHEMA)), _is_person),
    "regex": (regex(COLOURS), re.compile(COLOURS).fullmatch),
    "choice": (choice(*TEXTS), TEXTS.__contains__),
    "grammar": (grammar(SUMS), _is_sum),
}
each_kind = pytest.mark.parametrize("kind", KINDS)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_tiny_llama(tmp_path_factory.mktemp("tiny"))


@pytest.fixture(scope="module")
def model(folder: Path) -> Iterator[LoadedModel]:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield load_model(folder, device="cpu", dtype=torch.float32)
    torch.set_num_threads(threads)


@pytest.fixture(scope="module")
def tokenizer(folder: Path) -> Tokenizer:
    return Tokenizer.from_file(str(folder / "tokenizer.json"))


@pytest.fixture
def make_node(model: LoadedModel, folder: Path) -> Any:
    def make(guides: Any = InstantGuides, **options: Any) -> Node:
        options = {**OPTIONS, "eos_token_ids": (END,), **options}
        return Node(Clock(), None, "E", make_runner=maker(model, []), make_guides=partial(guides, folder), **options)

    return make


def guided(
    guide: Guide, *, max_tokens: int = 80, seed: int = 0, temperature: float = 1.0, **more: Any
) -> SamplingParams:
    return SamplingParams(guide=guide, max_tokens=max_tokens, seed=seed, temperature=temperature, **more)


def assert_valid(stream: Stream, tokenizer: Tokenizer, kind: str) -> None:
    assert stream.finish_reason == api.FinishReason.STOP
    text = tokenizer.decode(stream.tokens)
    assert KINDS[kind][1](text), text


def test_every_kind_is_here() -> None:
    assert {guide.kind for guide, _ in KINDS.values()} == set(GuideKind)


@each_kind
def test_batched_and_preempted_equal_one_by_one(make_node: Any, tokenizer: Tokenizer, kind: str) -> None:
    guide, _ = KINDS[kind]
    prompts = [prompt_of(length, start=length) for length in (1, 9, 20, 33)]
    params = [guided(guide, seed=seed) for seed in range(len(prompts))]
    expected = []
    for prompt, param in zip(prompts, params, strict=True):
        engine = make_node(max_step_tokens=128, num_pages=64)
        expected.append(engine.generate(prompt, param))
        engine.run()
        assert_valid(expected[-1], tokenizer, kind)
    engine = make_node(num_pages=18)
    free = engine.generate(prompt_of(12, start=99), SamplingParams(max_tokens=20))
    streams = [engine.generate(prompt, param) for prompt, param in zip(prompts, params, strict=True)]
    engine.run()
    assert [stream.tokens for stream in streams] == [stream.tokens for stream in expected]
    assert sum(stream.account.preemptions for stream in streams) > 0
    assert len(free.tokens) == 20
    engine.assert_idle()


@each_kind
def test_a_continuation_goes_on_in_the_grammar(make_node: Any, tokenizer: Tokenizer, kind: str) -> None:
    param, prompt = guided(KINDS[kind][0]), prompt_of(10)
    engine = make_node(num_pages=64)
    whole = engine.generate(prompt, param)
    engine.run()
    assert_valid(whole, tokenizer, kind)
    for count in range(1, len(whole.tokens)):
        other = make_node(num_pages=64)
        given = (*prompt, *whole.tokens[:count])
        rest = other.generate(given, param, prompt_token_count=len(prompt))
        other.run()
        assert whole.tokens[:count] + rest.tokens == whole.tokens
        assert rest.finish_reason == api.FinishReason.STOP


@each_kind
def test_disaggregated_equals_single(
    make_node: Any, model: LoadedModel, folder: Path, tokenizer: Tokenizer, kind: str
) -> None:
    pools: list[torch.Tensor] = []
    options = {**OPTIONS, "eos_token_ids": (END,), "make_guides": partial(InstantGuides, folder)}
    world = World(make_runner=maker(model, pools), **options)
    for node, pool in zip(world.nodes, pools, strict=True):
        node.service.memory = ByteRows(pool)  # type: ignore[assignment]
    prompt, param = prompt_of(40), guided(KINDS[kind][0], max_tokens=80)
    single = make_node(num_pages=64)
    expected = single.generate(prompt, param)
    single.run()
    reserved = world.reserve(prompt, 39)
    stream = world.d.generate(prompt, param, reservation=ref_of(reserved), begin=39)  # before the KV is there
    sent = world.p.remote_send(prompt, 0, 39, reserved)
    world.run()
    assert sent.value.transferred_tokens == 39
    assert_valid(stream, tokenizer, kind)
    assert stream.tokens == expected.tokens
    world.assert_idle()


def test_only_choices(make_node: Any, tokenizer: Tokenizer) -> None:
    engine = make_node()
    texts = ("yes", "no", "perhaps")
    streams = [engine.generate(prompt_of(5, start=n), guided(choice(*texts), seed=n)) for n in range(8)]
    engine.run()
    said = [tokenizer.decode(stream.tokens) for stream in streams]
    assert set(said) <= set(texts)
    assert len(set(said)) > 1
    assert {stream.finish_reason for stream in streams} == {api.FinishReason.STOP}
    assert all(END not in stream.tokens for stream in streams)  # it ends by itself when nothing may follow


def test_the_guide_wins_over_min_tokens_and_ignored_ends(make_node: Any, tokenizer: Tokenizer) -> None:
    engine = make_node()
    stream = engine.generate(prompt_of(5), guided(regex("a|ab"), min_tokens=10, ignore_eos=True))
    engine.run()
    assert tokenizer.decode(stream.tokens) in ("a", "ab")
    assert stream.finish_reason == api.FinishReason.STOP


def test_max_tokens_cut_it_short(make_node: Any, tokenizer: Tokenizer) -> None:
    engine = make_node()
    stream = engine.generate(prompt_of(5), guided(regex("[0-9]{50}"), max_tokens=7))
    engine.run()
    assert tokenizer.decode(stream.tokens).isdigit()
    assert (len(stream.tokens), stream.finish_reason) == (7, api.FinishReason.LENGTH)


def test_nothing_to_say(make_node: Any) -> None:
    engine = make_node()
    stream = engine.generate(prompt_of(5), guided(regex("")))
    engine.run()
    assert set(stream.tokens) <= {END}
    assert stream.finish_reason == api.FinishReason.STOP
    engine.assert_idle()


@pytest.mark.parametrize(
    ("guide", "more", "reason"),
    [
        (regex("(a"), {}, "INVALID_GUIDE"),
        (regex("x{3}"), {"prompt_token_count": 3}, "INVALID_GUIDE"),
        (regex("a"), {"forced": (5, 6)}, "INVALID_SAMPLING"),
        (choice(), {}, "INVALID_SAMPLING"),
        (choice(*["a"] * (MAX_CHOICES + 1)), {}, "INVALID_SAMPLING"),
        (regex("a" * (MAX_GUIDE_BYTES + 1)), {}, "INVALID_SAMPLING"),
    ],
)
def test_refusals(make_node: Any, guide: Guide, more: dict[str, Any], reason: str) -> None:
    engine = make_node()
    other = engine.generate(prompt_of(7), SamplingParams(max_tokens=3))
    stream = engine.generate(prompt_of(5), guided(guide), **more)
    engine.run()
    assert stream.error is not None
    assert stream.error.reason == reason
    assert len(other.tokens) == 3
    engine.assert_idle()


def test_an_engine_without_guides(model: LoadedModel) -> None:
    engine = Node(Clock(), None, "E", make_runner=maker(model, []), **OPTIONS)
    stream = engine.generate(prompt_of(5), guided(regex("a")))
    engine.run()
    assert stream.error is not None
    assert stream.error.reason == "GUIDES_UNAVAILABLE"


@pytest.mark.parametrize("ending", ["cancel", "abort", "deadline"])
def test_it_ends_while_its_guide_is_compiled(make_node: Any, ending: str) -> None:
    held: list[HeldGuides] = []

    def hold(folder: Path, answer: Any) -> HeldGuides:
        held.append(HeldGuides(folder, answer))
        return held[0]

    engine = make_node(hold)
    stream = engine.generate(prompt_of(5), guided(regex("a")), name="it", deadline=engine.clock() + 5)
    engine.run()
    assert engine.core.load().waiting_sequences == 0
    if ending == "cancel":
        engine.cancel("it")
    elif ending == "abort":
        engine.abort("it")
    else:
        engine.clock.now += 6
    engine.run()
    if ending == "deadline":
        assert stream.error is not None
        assert stream.error.reason == "DEADLINE_EXCEEDED"
    else:
        assert stream.finish_reason == api.FinishReason.CANCELLED
    assert held[0].cancelled == [number for number, _, _ in held[0].asked]
    held[0].compile_all()  # too late
    engine.run()
    engine.assert_idle()


def test_a_reservation_that_ends_while_the_guide_is_compiled(model: LoadedModel, folder: Path) -> None:
    held: list[HeldGuides] = []

    def hold(answer: Any) -> HeldGuides:
        held.append(HeldGuides(folder, answer))
        return held[-1]

    world = World(make_runner=maker(model, []), make_guides=hold, **OPTIONS)
    prompt = prompt_of(20)
    reserved = world.reserve(prompt, 19)
    stream = world.d.generate(prompt, guided(regex("a")), reservation=ref_of(reserved), begin=19)
    world.run()
    world.clock.now += 1000
    world.run()
    for guides in held:
        guides.compile_all()
    world.run()
    assert stream.error is not None
    assert stream.error.reason == "RESERVATION_GONE"
    world.assert_idle()
