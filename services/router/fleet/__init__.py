"""The fleet: what is known of each engine, how it is called, and what a policy sees of it."""
