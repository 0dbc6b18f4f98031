"""Tensor parallel: one replica computed by several processes, rank 0 of which is the engine."""
