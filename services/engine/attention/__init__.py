"""Attention over the paged KV pool: one small interface, one plain oracle, one implementation a machine."""
