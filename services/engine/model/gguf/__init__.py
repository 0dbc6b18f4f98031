"""Models from GGUF files: converted once into a folder as transformers writes it, then loaded like any other."""
