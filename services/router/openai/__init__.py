"""The OpenAI-compatible HTTP front door: its bodies in, its shapes out; what is done is GenerationService's."""
