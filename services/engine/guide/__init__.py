"""Guided output: what may come next, from a grammar and the tokens so far."""
