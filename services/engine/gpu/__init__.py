"""How an engine keeps a GPU busy: one copy of inputs a step, captured decode steps, choices that stay on the device."""
