"""Salts that keep what tenants have cached apart, whatever they say themselves."""

from __future__ import annotations

from hashlib import blake2b


def tenant_salt(owner: str, tenant: str, salt: str) -> str:
    """The cache salt of engines for a request of the tenant whose key `owner` was shown, empty: no tenant's, which
    counts for `tenant` and names a salt of its own.

    Two requests have the same one only if they agree in all three: each comes after its length, so that no end of one
    passes for the beginning of the next. Nor is it the salt of a client that names it, since that one is hashed too.
    It depends on nothing else, so that routers over the same engines share what is cached.
    """
    parts = [part.encode() for part in (owner, tenant, salt)]
    told = b"".join(b"%d:%b" % (len(part), part) for part in parts)
    return blake2b(told, digest_size=32, person=b"microserve salt").hexdigest()
