"""Models that transformers computes, with our attention over paged KV in the place of its own."""
