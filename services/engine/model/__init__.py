"""Finding, converting, loading and running a language model."""
