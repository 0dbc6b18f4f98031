"""The files a router gets: complete, named by their digest, and free of torch."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from services.engine.model.errors import ModelCorrupt
from services.engine.model.tokenizer_files import load_tokenizer_files
from tests.models import CHAT_TEMPLATE, make_tiny_llama


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return make_tiny_llama(tmp_path)


def _set(folder: Path, **values: object) -> None:
    path = folder / "tokenizer_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **values}))


def test_files(folder: Path) -> None:
    loaded = load_tokenizer_files(folder, (2,))
    files = dict(loaded.files())
    assert set(files) == {"tokenizer.json", "chat_template.jinja", "special_tokens.json"}
    assert files["tokenizer.json"] == (folder / "tokenizer.json").read_bytes()
    assert files["chat_template.jinja"].decode() == CHAT_TEMPLATE
    assert json.loads(files["special_tokens.json"]) == {
        "eos_token_ids": [2],
        "bos_token": "<|im_start|>",
        "bos_token_id": 1,
        "eos_token": "<|im_end|>",
        "unk_token": "<|endoftext|>",
        "pad_token": None,
    }


def test_digest_changes_with_every_part(folder: Path) -> None:
    digests = {load_tokenizer_files(folder, (2,)).digest, load_tokenizer_files(folder, (2, 0)).digest}
    _set(folder, chat_template="{{ 1 }}")
    digests.add(load_tokenizer_files(folder, (2,)).digest)
    _set(folder, bos_token=None)
    digests.add(load_tokenizer_files(folder, (2,)).digest)
    (folder / "tokenizer.json").write_text("{}")
    digests.add(load_tokenizer_files(folder, (2,)).digest)
    assert len(digests) == 5
    assert load_tokenizer_files(folder, (2,)).digest in digests


def test_where_a_template_may_stand(folder: Path) -> None:
    named = [{"name": "tool_use", "template": "tools"}, {"name": "default", "template": "plain"}]
    _set(folder, chat_template=named)
    assert load_tokenizer_files(folder, ()).chat_template == "plain"
    (folder / "chat_template.jinja").write_text("own file é", encoding="utf-8")
    assert load_tokenizer_files(folder, ()).chat_template == "own file é"
    (folder / "chat_template.jinja").unlink()
    (folder / "tokenizer_config.json").unlink()
    bare = load_tokenizer_files(folder, ())
    assert (bare.chat_template, bare.bos_token, bare.bos_token_id) == (None, None, None)
    assert "chat_template.jinja" not in dict(bare.files())


def test_special_tokens_as_objects(folder: Path) -> None:
    _set(folder, bos_token={"content": "Ġt", "special": True}, eos_token={"content": "</s>"})
    loaded = load_tokenizer_files(folder, ())
    assert (loaded.bos_token, loaded.eos_token) == ("Ġt", "</s>")
    assert loaded.bos_token_id == json.loads(loaded.tokenizer_json)["model"]["vocab"]["Ġt"]


def test_damaged(folder: Path) -> None:
    (folder / "tokenizer.json").write_text("{")
    with pytest.raises(ModelCorrupt, match=r"tokenizer\.json"):
        load_tokenizer_files(folder, ())


def test_no_torch_needed() -> None:
    modules = "services.engine.model.tokenizer_files, services.engine.model.fetch"
    code = f"import sys, {modules}; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
