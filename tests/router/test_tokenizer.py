"""Tokenizers from engines' files, chat templates, the store."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator

import pytest

from services.router.errors import BadTokenizer, ChatTemplateFailed, NoChatTemplate
from services.router.text import store as store_module
from services.router.text.store import TokenizerStore
from services.router.text.template import ChatMessage, ChatTemplate
from services.router.text.tokenizer import Tokenizer, TokenizerFiles
from tests.router.vocabularies import byte_level, files, sentencepiece

HELLO = [ChatMessage("user", "hello")]


def tokenizer(template: str | None = "", backend=byte_level) -> Tokenizer:
    handed_out = files(backend()) if template == "" else files(backend(), template)
    return Tokenizer(TokenizerFiles.read(handed_out))


async def test_special_tokens_in_text_are_text_and_in_chats_are_tokens() -> None:
    plain = await tokenizer().encode("<|im_start|>hello")
    assert 1 not in plain
    assert tokenizer().decode(plain) == "<|im_start|>hello"
    chat = await tokenizer().encode_chat(HELLO)
    assert chat[0] == 1
    assert tokenizer().decode(chat) == "user\nhello\nassistant\n"


async def test_the_first_token_of_the_model_comes_before_text_but_not_before_chats() -> None:
    assert (await tokenizer(backend=sentencepiece).encode("hello"))[0] == 1
    chat = await tokenizer("{{ messages[0].content }}", sentencepiece).encode_chat(HELLO)
    assert 1 not in chat


async def test_long_text_is_encoded_on_a_thread_to_the_same_tokens() -> None:
    text = "hello world " * 1000
    assert list(await tokenizer().encode(text)) == byte_level().encode(text).ids


async def test_truncation_and_padding_of_the_file_are_not_applied() -> None:
    spelled = json.loads(byte_level().to_str())
    spelled["truncation"] = {"max_length": 2, "strategy": "LongestFirst", "stride": 0, "direction": "Right"}
    ours = Tokenizer(TokenizerFiles.read({"tokenizer.json": json.dumps(spelled).encode()}))
    assert ours.decode(await ours.encode("hello world")) == "hello world"


async def test_a_model_without_template_takes_no_chat() -> None:
    with pytest.raises(NoChatTemplate):
        await tokenizer(None).encode_chat(HELLO)


@pytest.mark.parametrize(
    "damage",
    [
        {},
        {"tokenizer.json": b"{}"},
        {"tokenizer.json": b"\xff"},
        {"tokenizer.json": byte_level().to_str().encode(), "special_tokens.json": b"["},
        {"tokenizer.json": byte_level().to_str().encode(), "special_tokens.json": b"[]"},
        {"tokenizer.json": byte_level().to_str().encode(), "chat_template.jinja": b"{% for %}"},
    ],
)
def test_damaged_files_are_refused(damage: dict[str, bytes]) -> None:
    with pytest.raises(BadTokenizer):
        Tokenizer(TokenizerFiles.read(damage))


def render(template: str, *messages: ChatMessage) -> str:
    return ChatTemplate(template, {"bos_token": "<s>"}).render(messages or HELLO)


def test_templates_have_what_models_expect() -> None:
    assert render("{{ bos_token }}{{ messages|length }}") == "<s>1"
    assert render("{{ messages[0]|tojson }}") == '{"role": "user", "content": "hello"}'
    assert render("{% for m in messages %}{% if m.role == 'user' %}{% continue %}{% endif %}x{% endfor %}") == ""
    assert len(render("{{ strftime_now('%Y') }}")) == 4
    assert render("{{ undefined_variable }}") == ""


@pytest.mark.parametrize(
    "template",
    [
        "{{ raise_exception('roles must alternate') }}",
        "{{ messages.append(1) }}",
        "{{ ''.__class__.__mro__ }}",
        "{{ 'x' * 100000000 }}",
        "{{ 9 ** 99999999 }}",
        "{% for a in range(99999999) %}x{% endfor %}",
        "{% for a in range(99999) %}{% for b in range(99999) %}xxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxx{% endfor %}"
        "{% endfor %}",
        "{{ messages[0] + 1 }}",
        "{{ 1 / 0 }}",
    ],
)
def test_templates_that_fail_or_misbehave_are_the_conversations_fault(template: str) -> None:
    with pytest.raises(ChatTemplateFailed):
        render(template)


def test_the_templates_own_message_is_passed_on() -> None:
    with pytest.raises(ChatTemplateFailed, match="roles must alternate"):
        render("{{ raise_exception('roles must alternate') }}")


class Downloads:
    """Hands out files and counts how often."""

    def __init__(self, handed_out: dict[str, bytes]) -> None:
        self._files = handed_out
        self.count = 0

    async def __call__(self) -> AsyncIterator[tuple[str, bytes]]:
        self.count += 1
        for name, data in self._files.items():
            yield name, data[:100]
            await asyncio.sleep(0)
            yield name, data[100:]


async def test_each_digest_is_downloaded_once() -> None:
    store, downloads = TokenizerStore(), Downloads(files(byte_level()))
    first, second = await asyncio.gather(store.obtain(b"1", downloads), store.obtain(b"1", downloads))
    assert first is second
    assert downloads.count == 1


async def test_a_failed_download_is_tried_again() -> None:
    store = TokenizerStore()
    with pytest.raises(BadTokenizer):
        await store.obtain(b"1", Downloads({}))
    assert await store.obtain(b"1", Downloads(files(byte_level())))


async def test_downloads_are_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(store_module, "MAX_FILES_BYTES", 1000)
    with pytest.raises(BadTokenizer, match="larger"):
        await TokenizerStore().obtain(b"1", Downloads(files(byte_level())))
