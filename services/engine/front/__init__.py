"""The gRPC side of the engine: calls become commands for the loop thread, its answers become replies."""
