"""The bounds of names, secrets and addresses, which the loop thread never looks at. Each check raises one sentence."""

from __future__ import annotations

from dataclasses import dataclass

from services.engine.errors import BadRequest
from services.protocol.address import KvAddress
from services.protocol.errors import OutsideWindow
from services.protocol.hashes import DIGEST_BYTES
from services.protocol.ranges import TokenRange

MAX_NAME_CHARACTERS = 128
MAX_SALT_CHARACTERS = 128
MAX_ENDPOINT_CHARACTERS = 256
MAX_ATTEMPT = 2**31 - 1
MAX_SHARDS = 1024  # of an address: a tensor parallel receiver has one a rank


@dataclass(frozen=True, slots=True)
class Limits:
    """What the engine's model and pool bound. See Bounds."""

    vocab_size: int
    context_limit: int  # tokens, prompt and output together


def check_name(field: str, value: str) -> None:
    """BadRequest unless it has 1 to 128 characters."""
    if not 1 <= len(value) <= MAX_NAME_CHARACTERS:
        raise BadRequest(f"{field} must have 1 to {MAX_NAME_CHARACTERS} characters, not {len(value)}.")


def shown(name: str) -> str:
    """As much of a name from outside as an answer may hold."""
    return name[:MAX_NAME_CHARACTERS]


def check_salt(value: str) -> None:
    """BadRequest if it is too long."""
    if len(value) > MAX_SALT_CHARACTERS:
        raise BadRequest(f"cache_salt must have at most {MAX_SALT_CHARACTERS} characters, not {len(value)}.")


def check_digest(field: str, value: bytes) -> None:
    """BadRequest unless it has sixteen bytes. The value stays out of the message: it may be a secret."""
    if len(value) != DIGEST_BYTES:
        raise BadRequest(f"{field} must have {DIGEST_BYTES} bytes, not {len(value)}.")


def check_address(address: KvAddress) -> None:
    """BadRequest if an address cannot have come from PrepRecv."""
    check_name("address.reservation_id", address.reservation_id)
    if not 1 <= len(address.endpoint) <= MAX_ENDPOINT_CHARACTERS:
        raise BadRequest(f"address.endpoint must have 1 to {MAX_ENDPOINT_CHARACTERS} characters.")
    check_digest("address.epoch", address.epoch)
    check_digest("address.secret", address.secret)
    check_digest("address.model_digest", address.model_digest)
    check_digest("address.prompt_digest", address.prompt_digest)
    if not address.shards:
        raise BadRequest("address.shards names no pool.")
    num_pages = len(address.window.page_indices(address.layout.page_size))
    for shard in address.shards:
        check_name("address.shards.pool_id", shard.pool_id)
        if shard.layers[0] >= shard.layers[1] or shard.kv_heads[0] >= shard.kv_heads[1]:
            raise BadRequest("A shard of the address holds no layer or no head.")
        if len(shard.page_ids) != num_pages:
            raise BadRequest(f"A shard of the address has {len(shard.page_ids)} pages for {num_pages}.")


def check_inside(tokens: TokenRange, window: TokenRange) -> None:
    """OutsideWindow if positions that nobody may write were asked for."""
    if not window.contains(tokens):
        raise OutsideWindow(f"{tokens} is not inside the window {window}.")
