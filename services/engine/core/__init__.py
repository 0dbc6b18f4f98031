"""Everything that the engine's loop thread owns. No grpc; torch only in runner.py."""
