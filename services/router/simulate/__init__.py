"""Router programs over simulated engines, on a clock that jumps."""
