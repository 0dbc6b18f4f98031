"""The engine: batched decoding of one model replica over paged KV, driven through sub-request calls."""
